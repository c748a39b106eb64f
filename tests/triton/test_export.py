from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import msgspec
import onnx
import onnxruntime
import pytest

import unetc
from tests.command import run
from tests.house.test_imports import BLOCK
from tests.house.test_imports import run as run_alone
from tests.triton.schema import SCHEMA, parse
from tests.triton.server import OnnxModel, Server
from unetc.artifacts.manifest import MANIFEST, Manifest
from unetc.compiler.store import write_bundle
from unetc.errors import ArtifactError, CompileError, CorruptArtifactError, UnetcError
from unetc.precision import Precision
from unetc.runtime.batching.levels import best_batch
from unetc.runtime.bundle import Bundle
from unetc.triton import model as copied
from unetc.triton.placement import PLACEMENTS
from unetc.triton.repository import EXPORT, Export


def config_of(repository: Path, name: str) -> object:
    return parse((repository / name / "config.pbtxt").read_text())


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_levels_share_one_model_per_engine(repository: Path, ladder_bundle: Path) -> None:
    manifest = Manifest.load(ladder_bundle / MANIFEST)
    assert len(manifest.levels) == 2
    graphs = {engine.graph for engine in manifest.level_engines()}
    export = Export.load(repository / EXPORT)
    assert {one.graph for one in export.models} == graphs | {None}
    assert {path.name for path in repository.iterdir()} == {EXPORT, *(one.name for one in export.models)}
    assert "tiny-full" in {one.name for one in export.models}


def test_engines_run_under_the_names_types_and_sizes_of_their_configuration(
    server: Server, ladder_bundle: Path
) -> None:
    own_size = [*Manifest.load(ladder_bundle / MANIFEST).sample_shape]
    for model in server.models.values():
        assert model.config.model_warmup
        assert all([*one.inputs["sample"].dims] == own_size for one in model.config.model_warmup)
        model.calls.clear()  # of other tests
        model.warm_up()
        assert model.calls == [*dict.fromkeys((1, model.config.max_batch_size))]
        model.calls.clear()


def test_engines_batch_as_many_rows_as_the_build_found_best(
    prompted_repository: Path, prompted_bundle: Path, repository: Path, ladder_bundle: Path
) -> None:
    for folder, bundle, rows in ((prompted_repository, prompted_bundle, 2), (repository, ladder_bundle, 1)):
        manifest = Manifest.load(bundle / MANIFEST)
        by_graph = {one.graph: one.name for one in Export.load(folder / EXPORT).models}
        for engine in manifest.level_engines():
            config = config_of(folder, by_graph[engine.graph])
            assert config.max_batch_size == rows * best_batch(engine.batch_ms)
            assert config.HasField("dynamic_batching") == (config.max_batch_size > 1)
            assert config.parameters["intra_op_thread_count"].string_value == str(manifest.threads)
            assert [one.kind for one in config.instance_group] == [SCHEMA.ModelInstanceGroup.KIND_CPU]


def test_the_decoder_is_a_model_too(prompted_server: Server) -> None:
    decoder = prompted_server.models["prompted-decoder"]
    assert decoder.config.max_batch_size in (0, 1)
    assert not decoder.config.HasField("dynamic_batching")


def test_a_weights_file_is_on_the_disk_once(repository: Path, ladder_bundle: Path) -> None:
    weights = sorted(repository.glob("*/1/weights.safetensors"))
    assert len(weights) > 1
    assert len({path.stat().st_ino for path in weights}) == 1
    bundle = Bundle.open(ladder_bundle)
    assert weights[0].read_bytes() == bundle.weights
    export = Export.load(repository / EXPORT)
    others = {path.stat().st_ino: path.stat().st_size for path in repository.rglob("*") if path.is_file()}
    assert export.bytes_on_disk == sum(others.values()) - (repository / EXPORT).stat().st_size
    assert export.bytes_apart == export.bytes_on_disk + (len(weights) - 1) * len(bundle.weights)


def test_without_hard_links_files_are_copied(
    ladder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "link", refuse)
    export = unetc.export_triton(ladder_bundle, tmp_path / "repository")
    assert export.bytes_on_disk == export.bytes_apart
    assert len(Server(tmp_path / "repository").models) > 1


def test_the_loop_holds_no_weights_and_is_a_bundle(repository: Path, ladder_bundle: Path) -> None:
    loop, whole = Bundle.open(repository / "tiny/1/bundle"), Bundle.open(ladder_bundle)
    assert loop.tensors == frozenset()
    assert [level.plan for level in loop.manifest.levels] == [level.plan for level in whole.manifest.levels]
    assert loop.scheduler.name == whole.scheduler.name
    with pytest.raises(UnetcError, match="onnxruntime cannot load an engine"):
        unetc.load(repository / "tiny/1/bundle")


def test_the_only_code_is_the_file_of_the_package(repository: Path) -> None:
    assert [str(path.relative_to(repository)) for path in repository.rglob("*.py")] == ["tiny/1/model.py"]
    assert (repository / "tiny/1/model.py").read_text() == Path(str(copied.__file__)).read_text()


def test_the_model_that_samples_takes_the_inputs_that_its_bundle_knows(
    repository: Path, prompted_repository: Path
) -> None:
    plain, prompted = config_of(repository, "tiny"), config_of(prompted_repository, "prompted")
    always = ["seed", "count", "steps", "quality"]
    assert [one.name for one in plain.input] == always
    assert [one.name for one in prompted.input] == ["prompt", "guidance_scale", *always]
    for config in (plain, prompted):
        assert all(one.optional for one in config.input)
        assert [one.name for one in config.output] == ["images", "seed", "samples"]
        assert config.max_batch_size == 0
        assert not config.model_warmup
        assert config.instance_group[0].count > 1


@pytest.mark.parametrize("target", PLACEMENTS)
def test_engines_run_where_the_target_says(target: str, ladder_bundle: Path, tmp_path: Path) -> None:
    unetc.export_triton(ladder_bundle, tmp_path / "r", unetc.ExportOptions(target=target, name="m"))
    config = config_of(tmp_path / "r", "m-full")
    kind = "KIND_CPU" if target.endswith("cpu") else "KIND_GPU"
    assert SCHEMA.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == kind
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    wanted = {"cpu": [], "cuda": ["cuda"], "tensorrt": ["tensorrt", "cuda"]}[target.split(":")[1]]
    assert [one.name for one in accelerators] == wanted
    assert all(dict(one.parameters) == {"use_tf32": "0"} for one in accelerators if one.name == "cuda")
    sampling = config_of(tmp_path / "r", "m")
    assert SCHEMA.ModelInstanceGroup.Kind.Name(sampling.instance_group[0].kind) == "KIND_CPU"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("torch:cuda", "no backend that runs ONNX graphs in torch"),
        ("torch:cpu:compiled", "no backend that runs ONNX graphs in torch"),
        ("tensorrt-rtx", "no backend for TensorRT for RTX"),
        ("tensorrt:fp16", "a bundle never holds them"),
        ("onnxruntime:cuda:fp16", "rounded when they are loaded"),
        ("gpu", "no backend for it"),
    ],
)
def test_a_target_that_triton_cannot_run_is_refused_with_the_reason(
    target: str, reason: str, ladder_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match=reason) as caught:
        unetc.export_triton(ladder_bundle, tmp_path / "r", unetc.ExportOptions(target=target))
    assert "onnxruntime:cpu, onnxruntime:cuda, onnxruntime:tensorrt" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_target_of_the_bundle_is_the_default(ladder_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(ladder_bundle / MANIFEST)
    other = tmp_path / "bundle"
    write_bundle(
        other,
        {record.path: ladder_bundle / record.path for record in manifest.files},
        lambda files: msgspec.structs.replace(manifest, target="torch:cuda", files=files),
    )
    with pytest.raises(CompileError, match="cannot export for target 'torch:cuda'"):
        unetc.export_triton(other, tmp_path / "r")
    assert unetc.export_triton(other, tmp_path / "r", unetc.ExportOptions(target="onnxruntime:cuda")).models


def test_a_bundle_with_lowered_graphs_is_exported_in_float32(ladder_bundle: Path, tmp_path: Path) -> None:
    from unetc.artifacts.manifest import BundleEngine, LoweredGraph

    manifest = Manifest.load(ladder_bundle / MANIFEST)

    def lowered(engine: BundleEngine) -> BundleEngine:
        return msgspec.structs.replace(engine, lowered=LoweredGraph(graph=f"fp16/{engine.graph}", weights=()))

    contents = {record.path: ladder_bundle / record.path for record in manifest.files}
    contents |= {f"fp16/{one.graph}": ladder_bundle / one.graph for one in manifest.all_engines()}
    write_bundle(
        tmp_path / "bundle",
        contents,
        lambda files: msgspec.structs.replace(
            manifest,
            precision=Precision.FP16,
            full=lowered(manifest.full),
            levels=tuple(
                msgspec.structs.replace(level, engines=tuple(map(lowered, level.engines))) for level in manifest.levels
            ),
            controls=tuple(
                msgspec.structs.replace(one, engines=tuple(map(lowered, one.engines))) for one in manifest.controls
            ),
            files=files,
        ),
    )
    unetc.export_triton(tmp_path / "bundle", tmp_path / "r", unetc.ExportOptions(name="m"))
    assert (tmp_path / "r/m-full/1/model.onnx").read_bytes() == (ladder_bundle / manifest.full.graph).read_bytes()
    assert Server(tmp_path / "r").infer(seed=0, steps=2)["samples"].shape[0] == 1


def test_an_earlier_export_is_replaced_and_nothing_else(ladder_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    unetc.export_triton(ladder_bundle, folder, unetc.ExportOptions(name="first"))
    unetc.export_triton(ladder_bundle, folder, unetc.ExportOptions(name="second"))
    assert not (folder / "first").exists()
    before = files_of(folder)
    (folder / "another-model").mkdir()
    with pytest.raises(ArtifactError, match="is not empty, and no export of unetc"):
        unetc.export_triton(ladder_bundle, folder)
    (folder / "another-model").rmdir()
    assert files_of(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_folder_with_other_files_a_file_and_the_bundle_itself_are_refused(
    ladder_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    bundle = Path(shutil.copytree(ladder_bundle, tmp_path / "bundle"))
    before = files_of(tmp_path)
    for place, reason in (
        ("full", "not empty"),
        ("file", "is a file"),
        ("bundle", "not empty"),
        ("bundle/r", "lies in"),
    ):
        with pytest.raises(ArtifactError, match=reason):
            unetc.export_triton(bundle, tmp_path / place)
    assert files_of(tmp_path) == before


def test_a_failure_leaves_nothing_behind(ladder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    unetc.export_triton(ladder_bundle, tmp_path / "r")
    before = files_of(tmp_path)
    monkeypatch.setattr("unetc.triton.export.share_file", refuse)
    with pytest.raises(ArtifactError, match=r"cannot write the repository .*No space left"):
        unetc.export_triton(ladder_bundle, tmp_path / "r")
    assert files_of(tmp_path) == before


def test_a_changed_bundle_is_refused_before_it_is_parsed(ladder_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(ladder_bundle, tmp_path / "bundle"))
    graph = bundle / Manifest.load(bundle / MANIFEST).full.graph
    graph.write_bytes(graph.read_bytes() + b"\0")
    with pytest.raises(CorruptArtifactError, match="above the limit"):
        unetc.export_triton(bundle, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_graph_that_refers_to_other_files_is_refused(ladder_bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(ladder_bundle / MANIFEST)
    graph = onnx.load_model(ladder_bundle / manifest.full.graph, load_external_data=False)
    place = next(
        entry for tensor in graph.graph.initializer for entry in tensor.external_data if entry.key == "location"
    )
    place.value = "../../../etc/passwd"
    (tmp_path / "evil.onnx").write_bytes(graph.SerializeToString())
    contents = {record.path: ladder_bundle / record.path for record in manifest.files}
    contents[manifest.full.graph] = tmp_path / "evil.onnx"
    write_bundle(tmp_path / "bundle", contents, lambda files: msgspec.structs.replace(manifest, files=files))
    with pytest.raises(CorruptArtifactError, match=r"expected .* bytes inside of weights\.safetensors"):
        unetc.export_triton(tmp_path / "bundle", tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", "-a", "ä", "unetc-export.json", "Unetc-Export.json"])
def test_a_name_that_is_no_folder_is_refused(name: str, ladder_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot name a model"):
        unetc.export_triton(ladder_bundle, tmp_path / "r", unetc.ExportOptions(name=name))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_with_the_name_of_the_record_needs_another(
    ladder_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetc.triton.export.short_name", lambda name: EXPORT)
    with pytest.raises(ArtifactError, match=r"the record of an export has this name\. Choose another with --name"):
        unetc.export_triton(ladder_bundle, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_onnx_is_asked_for_where_it_is_missing(ladder_bundle: Path, tmp_path: Path) -> None:
    code = (
        f"{BLOCK}\nimport unetc\nfrom unetc.errors import MissingDependency\n"
        f"try: unetc.export_triton({str(ladder_bundle)!r}, {str(tmp_path / 'r')!r})\n"
        "except MissingDependency as error: print(error)"
    )
    assert run_alone(code) == "this needs onnx: pip install 'unetc[compile]'\n"
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_models(ladder_bundle: Path, tmp_path: Path) -> None:
    facts = run("export", "triton", ladder_bundle, "-o", tmp_path / "r", "--name", "m", "--json").json
    assert facts["model"] == "m"
    assert {one["name"] for one in facts["models"]} == {path.name for path in (tmp_path / "r").iterdir()} - {EXPORT}
    printed = run("export", "triton", ladder_bundle, "-o", tmp_path / "r", "--name", "m")
    assert printed.code == 0, printed.err
    assert "m-full" in printed.out
    assert str(facts["bytes_on_disk"]) in printed.out
    assert (
        "no backend that runs ONNX graphs in torch"
        in run("export", "triton", ladder_bundle, "-o", tmp_path / "other", "--target", "torch:cuda").error
    )
    assert run("export", "ray", ladder_bundle).code == 2


def test_an_engine_without_its_weights_is_not_loaded(repository: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(repository / "tiny-full", tmp_path / "tiny-full"))
    (folder / "1/weights.safetensors").unlink()
    with pytest.raises(Exception, match=r"weights\.safetensors"):
        OnnxModel(folder)
    assert onnxruntime.__version__
