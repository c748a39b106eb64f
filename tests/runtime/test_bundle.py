"""A bundle opens only if every byte is unchanged since the build, and nothing is parsed before that is checked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import safetensors.numpy

import unetc
from tests.disguises import DISGUISES, make_symlink, within
from tests.runtime.forgery import CONTAINERS, MALFORMED, UNSAFE, Payload, edit, forge, packed, rename, reseal
from tests.runtime.parsers import PARSERS
from unetc.artifacts.manifest import DIGEST, MANIFEST, Manifest
from unetc.artifacts.record import MAX_JSON_BYTES
from unetc.errors import ArtifactError, CorruptArtifactError, SchemaVersionError, SessionError
from unetc.runtime.bundle import Bundle

ENGINE = "engines/full.onnx"
WEIGHTS = "weights.safetensors"
SCHEDULER = "scheduler.safetensors"
TRIALS_PER_FILE = 12
"""With 15 files and 3 kinds of damage: 1125 damaged bundles."""


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Copy the tiny bundle, so that a test may damage it."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def no_parser(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Fail the test when anything parses the contents of a bundle."""
    for owner, name in PARSERS:
        monkeypatch.setattr(owner, name, parsed)
    return monkeypatch


def parsed(*_: object, **__: object) -> None:
    pytest.fail("contents were parsed before all hashes were checked")


def files(bundle: Path) -> list[str]:
    return sorted(str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file())


def refusal(bundle: Path, kind: type[ArtifactError] = CorruptArtifactError) -> str:
    """Expect that a bundle is refused, and return the message."""
    with pytest.raises(kind) as caught:
        unetc.load(bundle)
    return str(caught.value)


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    damaged[int(rng.choice(np.array([0, len(data) - 1, rng.integers(len(data))])))] ^= 1 << rng.integers(8)
    return bytes(damaged)


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.choice(np.array([0, len(data) - 1, rng.integers(len(data))])))]


def append(data: bytes, rng: np.random.Generator) -> bytes:
    return data + (b" ", b"\n", b"\0", rng.bytes(100))[rng.integers(4)]


def test_it_opens_with_the_built_contents(tiny_bundle: Path) -> None:
    opened = Bundle.open(tiny_bundle)
    listed = {record.path for record in opened.manifest.files}
    assert {*files(tiny_bundle)} == listed | {MANIFEST, DIGEST}
    assert len(opened.manifest.engines) == 3
    assert opened.graphs[ENGINE] == (tiny_bundle / ENGINE).read_bytes()
    assert opened.weights == (tiny_bundle / WEIGHTS).read_bytes()
    assert opened.graph_of(opened.manifest.engines[1]).weights < opened.tensors


@pytest.mark.parametrize("damage", [flip, truncate, append])
def test_damage_at_a_random_place_of_any_file_is_refused_by_name(
    bundle: Path, damage: Callable[[bytes, np.random.Generator], bytes], no_parser: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    names = files(bundle)
    assert len(names) >= 10
    for name in names:
        data = (bundle / name).read_bytes()
        with no_parser.context() as patch:
            if name in (MANIFEST, DIGEST):
                patch.setattr(Manifest, "from_json", parsed)
            for _ in range(TRIALS_PER_FILE):
                damaged = damage(data, rng)
                assert damaged != data
                (bundle / name).write_bytes(damaged)
                assert name in refusal(bundle)
        (bundle / name).write_bytes(data)
    no_parser.undo()
    unetc.load(bundle)


def test_a_missing_file_is_named(bundle: Path, no_parser: pytest.MonkeyPatch) -> None:
    for name in files(bundle):
        data = (bundle / name).read_bytes()
        (bundle / name).unlink()
        assert name in refusal(bundle, ArtifactError)
        (bundle / name).write_bytes(data)


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("name", [MANIFEST, DIGEST, WEIGHTS, ENGINE])
def test_only_plain_files_are_read(
    bundle: Path, name: str, disguise: Callable[[Path], None], no_parser: pytest.MonkeyPatch
) -> None:
    disguise(bundle / name)
    with within(20):
        assert name in refusal(bundle, ArtifactError)


def test_a_folder_that_is_a_link_is_refused(bundle: Path, no_parser: pytest.MonkeyPatch) -> None:
    make_symlink(bundle / "engines")
    assert "engines is a link" in refusal(bundle)


def test_the_bundle_itself_may_be_reached_through_a_link(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bundle)
    unetc.load(tmp_path / "link")


@pytest.mark.parametrize("unsafe", UNSAFE.values(), ids=UNSAFE)
def test_a_path_that_could_leave_the_bundle_is_refused(
    bundle: Path, tmp_path: Path, unsafe: str, no_parser: pytest.MonkeyPatch
) -> None:
    shutil.copy(bundle / ENGINE, tmp_path / "outside")  # same contents: only the path is wrong
    rename(bundle, ENGINE, unsafe.format(root=tmp_path))
    assert "unsafe path" in refusal(bundle)


def test_paths_that_clash_are_refused(bundle: Path, no_parser: pytest.MonkeyPatch) -> None:
    shutil.copy(bundle / WEIGHTS, bundle / WEIGHTS.upper())
    (weights,) = (file for file in json.loads((bundle / MANIFEST).read_bytes())["files"] if file["path"] == WEIGHTS)
    edit(bundle, lambda manifest: manifest["files"].append(weights | {"path": WEIGHTS.upper()}))
    assert "differ only in case" in refusal(bundle)
    edit(bundle, lambda manifest: manifest["files"][-1].update(path=WEIGHTS))
    assert "listed twice" in refusal(bundle)


def test_a_file_that_is_not_listed_is_not_read(bundle: Path) -> None:
    os.mkfifo(bundle / "stray")
    with within(20):
        unetc.load(bundle)


@pytest.mark.parametrize("schema", [0, 1, 2, 3, 4, 5, 6, 7, 9, -1, 10**12])
def test_another_schema_is_named_as_such(bundle: Path, schema: int, no_parser: pytest.MonkeyPatch) -> None:
    edit(bundle, lambda manifest: manifest.update(schema=schema, a_field_of_that_schema=1))
    assert f"schema {schema}" in refusal(bundle, SchemaVersionError)


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_manifest_is_refused(bundle: Path, text: bytes, no_parser: pytest.MonkeyPatch) -> None:
    reseal(bundle, text)
    with within(20):
        assert MANIFEST in refusal(bundle)


def test_a_huge_manifest_is_refused_unread(bundle: Path, no_parser: pytest.MonkeyPatch) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(100 * MAX_JSON_BYTES)  # a sparse file, which takes no space on disk
    no_parser.setattr(hashlib, "sha256", parsed)
    assert MANIFEST in refusal(bundle)


@pytest.mark.parametrize("size", [-1, 0, 10**9, 10**18, 2**63, 10**30])
def test_a_false_size_takes_no_memory(bundle: Path, size: int, no_parser: pytest.MonkeyPatch) -> None:
    edit(bundle, lambda manifest: manifest["files"][0].update(bytes=size))
    refusal(bundle)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown field": lambda m: m.update(extra=1),
    "unknown field inside": lambda m: m["levels"][0]["plan"]["phases"][0].update(extra=1),
    "missing field": lambda m: m.pop("threads"),
    "unlisted weights": lambda m: m.update(weights="other"),
    "unlisted graph": lambda m: m["controls"][-1]["engines"][0].update(graph="other"),
    "too few engines": lambda m: m["levels"][0]["engines"].pop(),
    "too few engines of a control": lambda m: m["controls"][-1]["engines"].pop(),
    "unknown engine": lambda m: m["levels"][0]["plan"]["phases"][0].update(cycle=[9]),
    "negative engine": lambda m: m["levels"][0]["plan"]["phases"][0].update(cycle=[-1]),
    "an engine that holds an unemitted branch": lambda m: m["levels"][0]["plan"]["engines"][1].update(
        treatments={"a": "hold"}
    ),
    "an engine that emits a dropped branch": lambda m: m["levels"][0]["plan"]["engines"][1].update(
        emits=[*m["levels"][0]["plan"]["engines"][1]["treatments"]]
    ),
    "a control that holds an unemitted branch": lambda m: m["controls"][-1]["plan"]["engines"].append(
        {"treatments": {"a": "forecast"}, "emits": []}
    ),
    "an unlisted schedule": lambda m: m["tables"][0].update(file="other"),
    "a control along an unknown schedule": lambda m: m["controls"][0].update(table="other"),
    "a control of nothing": lambda m: m["controls"][0].update(table=None),
    "a converged schedule that is not there": lambda m: m.update(converged="other"),
    "a schedule of other columns": lambda m: m["tables"][0]["header"]["columns"].pop(),
    "two schedules of one name": lambda m: m["tables"].append(m["tables"][0]),
    "no level": lambda m: m.update(levels=[]),
    "a level called full": lambda m: m["levels"][0].update(name="full"),
    "two levels of one name": lambda m: m["levels"].append(m["levels"][0]),
    "a batch of none": lambda m: m["full"].update(batch_ms=[[0, 1.0]]),
    "no schedules": lambda m: m["levels"][0].pop("evaluated"),
    "a pair of three engines": lambda m: m.update(pairs=[{"engines": [1, 2, 3], "alone": [1.0, 1.0], "together": 2.0}]),
    "a gap between phases": lambda m: m["levels"][0]["plan"]["phases"][0].update(low=-90.0, high=-80.0),
    "no seeds": lambda m: m.update(used_seeds=[]),
    "no pixels": lambda m: m.update(sample_shape=[1, 0, 16]),
    "more pixels than memory": lambda m: m.update(sample_shape=[1, 2**22, 2**22]),
    "negative channels": lambda m: m.update(sample_shape=[-1, 16, 16]),
    "no steps": lambda m: m.update(steps=0),
    "number as text": lambda m: m.update(batch="2"),
    "no table": lambda m: m["scheduler"].update(counts=[]),
    "a table that is too long": lambda m: m["scheduler"]["counts"][0].update(steps=10**12),
    "a table beyond the array": lambda m: m["scheduler"]["counts"][0].update(start=10**6),
    "unknown column": lambda m: m["scheduler"]["columns"].__setitem__(0, "__class__"),
    "not a number": lambda m: m["scheduler"]["counts"][0].update(initial_scale=float("nan")),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(bundle, change)
    assert str(bundle) in refusal(bundle)


def test_a_manifest_with_random_edits_opens_or_is_refused(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_bytes()
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(300):
        edited = bytearray(text)
        for _ in range(rng.integers(1, 4)):
            start = int(rng.integers(len(edited)))
            piece = text[(at := int(rng.integers(len(text)))) : at + int(rng.integers(0, 9))]
            edited[start : start + int(rng.integers(0, 9))] = piece
        reseal(bundle, bytes(edited))
        try:
            Bundle.open(bundle)
        except ArtifactError:
            continue
        opened += 1
    assert opened < 150


@pytest.mark.parametrize("name", [WEIGHTS, SCHEDULER, MANIFEST])
@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_in_a_bundle_can_run_code(bundle: Path, tmp_path: Path, name: str, container: str) -> None:
    trace = tmp_path / "trace"
    data = packed(Payload(trace), container)
    if name == MANIFEST:
        reseal(bundle, data)
    else:
        forge(bundle, name, data)
    refusal(bundle)
    assert not trace.exists()


@pytest.mark.parametrize("name", [WEIGHTS, SCHEDULER])
def test_forged_arrays_are_refused(bundle: Path, name: str) -> None:
    text = (bundle / name).read_bytes()
    end = 8 + int.from_bytes(text[:8], "little")
    header = json.loads(text[8:end])
    tensor = next(iter(header.values()))
    rng = np.random.default_rng(0)
    headers = [b"", b"{}", b"null", b"[" * 10**5, *(bytes(rng.integers(32, 127, 200, np.uint8)) for _ in range(20))]
    for change in (
        {"dtype": "BF16"},
        {"dtype": "F8_E4M3"},
        {"dtype": "O"},
        {"shape": [2**62, 2**62]},
        {"shape": [-1]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [8, 0]},
    ):
        headers.append(json.dumps(header | {next(iter(header)): tensor | change}).encode())
    for forged in headers:
        forge(bundle, name, len(forged).to_bytes(8, "little") + forged + text[end:])
        refusal(bundle)
    for size in (0, 2**31, 2**63):
        forge(bundle, name, size.to_bytes(8, "little") + text[8:])
        refusal(bundle)


def test_weights_that_do_not_fit_the_engines_are_refused(bundle: Path) -> None:
    weights = safetensors.numpy.load_file(bundle / WEIGHTS)
    for other in (
        {name: array.reshape(-1)[:1].copy() for name, array in weights.items()},
        {name: array.astype(np.float16) for name, array in weights.items()},
        {name: array for name, array in weights.items() if "conv_in" not in name},
        {"other": np.zeros(3, np.float32)},
    ):
        forge(bundle, WEIGHTS, safetensors.numpy.save(other))
        with pytest.raises(SessionError, match="cannot load an engine"):
            unetc.load(bundle)


def test_mapped_weights_that_are_too_short_are_refused(bundle: Path) -> None:
    forge(bundle, WEIGHTS, safetensors.numpy.save({"other": np.zeros(3, np.float32)}))
    with pytest.raises(SessionError, match="cannot load an engine"):
        unetc.load(bundle, memory="low")


@pytest.mark.parametrize("absolute", [True, False])
def test_an_engine_that_maps_another_file_is_refused(bundle: Path, tmp_path: Path, absolute: bool) -> None:
    """A secret file must not be loaded as a weight, because samples could leak it."""
    secret = shutil.copy(bundle / WEIGHTS, tmp_path / "secret")
    model = onnx.load(bundle / ENGINE, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(secret) if absolute else os.path.relpath(secret, tempfile.gettempdir() + "/folder")
    forge(bundle, ENGINE, model.SerializeToString())
    with pytest.raises(SessionError, match="cannot load an engine"):
        unetc.load(bundle, memory="low")


def test_an_engine_reads_no_file_by_itself(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (used,) = {name for name in safetensors.numpy.load_file(bundle / WEIGHTS) if name.endswith("conv_in.weight")}
    edit(bundle, lambda manifest: manifest["levels"][0]["engines"][0]["unused_weights"].append(used))
    monkeypatch.chdir(bundle)  # here the weights path recorded in the graph would name a file
    with pytest.raises(SessionError, match="cannot load an engine"):
        unetc.load(bundle)


def test_a_folder_that_is_no_bundle_is_refused_with_the_way_to_build_one(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("a" * 300)):
        assert "unetc build MODEL -o" in refusal(path, ArtifactError)
    assert "Build it again" in refusal(tmp_path / "empty", ArtifactError)
    assert "unetc build MODEL -o" in refusal(bundle / MANIFEST, ArtifactError)


def test_a_copied_bundle_has_the_same_contents(bundle: Path, tiny_bundle: Path) -> None:
    copied, original = Bundle.open(bundle), Bundle.open(tiny_bundle)
    assert copied.manifest == original.manifest
    assert copied.manifest.to_json() == (tiny_bundle / MANIFEST).read_bytes()
    assert msgspec.structs.asdict(copied.manifest) == msgspec.structs.asdict(original.manifest)
