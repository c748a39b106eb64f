"""All engines of a bundle are built once, into the cache; wrong options are refused in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from PIL import Image

import unetc
from tests.e2e.test_cli import run
from tests.nvidia.cached_engine import ENGINE_BYTES, KEY, ONE, TWO
from tests.nvidia.cached_engine import record as record_of
from tests.stand_ins import tensorrt_on_cpu
from tests.stand_ins.tensorrt_on_cpu import LIBRARY, NAME, CpuTensorRt
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts import Assignment, Manifest, Phase, Plan, Prediction
from unetc.artifacts.manifest import BundleDecoder, FileRecord
from unetc.cli.engine_inventory import find, memory_of, missing
from unetc.cli.summary import compiling
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.tensorrt.compile_bundle import compile_bundle
from unetc.compiler.tensorrt.options import CompileOptions, target_of
from unetc.compiler.tensorrt.ranges import describe_sides
from unetc.compiler.tensorrt.supervise import build_engine
from unetc.conditions import UNCONDITIONAL
from unetc.errors import ArtifactError, EngineBuildError, MissingDependency, SessionError, UnetcError
from unetc.models.find import find_model
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.library import LIBRARIES
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import NO_WEIGHTS, Precision
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.treatments import Treatment

RTX = ("--target", "tensorrt-rtx")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build `digits` with a handmade plan: one engine refreshes, one drops and holds, one forecasts and averages."""
    folder = tmp_path_factory.mktemp("digits")
    analysis = AnalysisOptions(steps=4, samples=2, bins=2, batch=2, rounds=1, threads=1, decisive=0)
    profile = analyze_model(find_model("digits"), analysis, cache=folder / "cache")
    first = {component.kind: component.name for component in reversed(profile.components)}
    other = next(c.name for c in profile.components if c.kind == "residual" and c.name != first["residual"])
    reused = (first["level"], first["residual"])
    noisy, clean = profile.bins
    plan = Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.3,
        max_engines=2,
        engines=(
            Assignment(treatments={}, emits=reused),
            Assignment(treatments={first["level"]: Treatment.HOLD, first["skip"]: Treatment.DROP}),
            Assignment(treatments={first["residual"]: Treatment.FORECAST, other: Treatment.MEAN}),
        ),
        phases=(
            Phase(low=noisy.low, high=noisy.high, cycle=(0, 1)),
            Phase(low=clean.low, high=clean.high, cycle=(0, 2)),
        ),
        prediction=Prediction(time_ratio=0.6, relative_l2=0.5, memory=2.0),
    )
    options = BuildOptions(plan=PlanOptions(budget=0.3), steps=4, controls=False)
    build(find_model("digits"), profile, folder / "bundle", options, cache=folder / "cache", plan=plan)
    return folder / "bundle"


def graphs_of(bundle: Path) -> list[str]:
    manifest = Manifest.load(bundle / "manifest.json")
    return list(dict.fromkeys(engine.graph for engine in (manifest.full, *manifest.engines)))


def check_compile(bundle: Path, cache: Path, *options: str, fallback: bool = False) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    arguments = ("compile", bundle, *RTX, "--cache", cache, *options, "--json")
    engines = run(*arguments).json["engines"]
    graphs = graphs_of(bundle)
    assert [engine["graph"] for engine in engines] == (graphs + graphs[:1] if fallback else graphs)
    assert engines[-1]["key"]["precision"] == "fp32" or not fallback
    assert all(not engine["known"] and engine["tries"] == 1 and engine["layers"] > 0 for engine in engines)
    for engine in engines:
        assert (Path(engine["folder"]) / "engine.trt").stat().st_size == engine["engine_bytes"] > 0
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before, "a bundle holds no engines"
    shutil.rmtree(engines[0]["folder"])
    again = run(*arguments).json["engines"]
    assert [engine["known"] for engine in again] == [False] + [True] * (len(engines) - 1)


@pytest.mark.rtx
def test_every_engine_is_built_once(tiny_bundle: Path, tmp_path: Path, rtx: None) -> None:
    check_compile(tiny_bundle, tmp_path / "cache")
    shown = run("compile", tiny_bundle, *RTX, "--cache", tmp_path / "cache")
    assert (shown.code, shown.out.count("was there")) == (0, len(graphs_of(tiny_bundle)))


@pytest.mark.rtx
@pytest.mark.nightly
def test_two_that_compile_a_bundle_at_once_build_every_engine_once(
    tiny_bundle: Path, tmp_path: Path, rtx: None
) -> None:
    arguments = ("compile", tiny_bundle, *RTX, "--cache", tmp_path / "cache", "--jobs", "2", "--json")
    command = [sys.executable, "-m", "unetc", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    one, other = (json.loads(out)["engines"] for out, _ in said)
    graphs = graphs_of(tiny_bundle)
    assert [engine["graph"] for engine in one] == [engine["graph"] for engine in other] == graphs
    assert all(mine["known"] != theirs["known"] for mine, theirs in zip(one, other, strict=True))
    left = {path.name for path in (tmp_path / "cache/engines").iterdir() if path.suffix != ".lock"}
    assert left == {*(Path(engine["folder"]).name for engine in one), "secret"}


@pytest.mark.rtx
@pytest.mark.nightly
def test_half_precision_and_other_sizes_are_other_engines(tiny_bundle: Path, tmp_path: Path, rtx: None) -> None:
    cache, half = tmp_path / "cache", ("--precision", "fp16", "--jobs", "2")
    check_compile(tiny_bundle, cache, *half, "--batch", "1,2", fallback=True)
    assert len(list((cache / "engines").glob("*/engine.trt"))) == len(graphs_of(tiny_bundle)) + 1
    check_compile(tiny_bundle, cache, *half, "--batch", "1,3", "--no-fallback")
    assert len(list((cache / "engines").glob("*/engine.trt"))) == 2 * len(graphs_of(tiny_bundle)) + 1
    assert "full in fp32" in run("compile", tiny_bundle, *RTX, "--cache", cache, *half, "--batch", "1,2").out


@pytest.mark.rtx
@pytest.mark.nightly
def test_engines_of_others_are_built_again_unless_trusted(tiny_bundle: Path, tmp_path: Path, rtx: None) -> None:
    run("compile", tiny_bundle, *RTX, "--cache", tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs/engines", tmp_path / "ours/engines", ignore=shutil.ignore_patterns("secret"))
    arguments = ("compile", tiny_bundle, *RTX, "--cache", tmp_path / "ours", "--json")
    assert all(engine["known"] for engine in run(*arguments, "--trust-engines").json["engines"])
    assert all(engine["known"] for engine in run(*arguments).json["engines"]), "who was trusted once is one of ours"
    for record in (tmp_path / "theirs/engines").glob("*/record.json"):
        shutil.copyfile(record, tmp_path / "ours/engines" / record.parent.name / record.name)
    again = run(*arguments)
    assert not any(engine["known"] for engine in again.json["engines"])
    assert "engines/full.onnx is built again: the engine in " in again.err
    assert "was not built here" in again.err
    assert "`unetc compile --trust-engines` takes it" in again.err


@pytest.mark.rtx
def test_what_may_not_be_meant_is_said_before_building(
    tiny_bundle: Path, tmp_path: Path, rtx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise EngineBuildError("began to build")

    monkeypatch.setattr("unetc.compiler.tensorrt.build_one.build_engine", stop)
    arguments = ("compile", tiny_bundle, *RTX, "--cache", tmp_path)
    said = run(*arguments, "--height", "16,32").err
    range_ = "One of height and width is a range: tensorrt_rtx 1.7 fails on some graphs"
    assert said.index(range_) < said.index("began to build")
    said = run(*arguments, "--height", "16,32", "--width", "16,32").err
    assert "is a range" not in said
    assert "began to build" in said


@pytest.mark.rtx
@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_phase_of_digits_is_built(digits_bundle: Path, tmp_path: Path, rtx: None, precision: str) -> None:
    assert len(graphs_of(digits_bundle)) == 4
    options = ("--precision", precision, "--batch", "1,2,8")
    check_compile(digits_bundle, tmp_path / "cache", *options, fallback=precision != "fp32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "onnxruntime:cpu"), "no engines can be built for target 'onnxruntime:cpu'"),
        (("--target", "torch:cuda"), "runs the graphs of a bundle directly, so `unetc sample` needs no engines"),
        (("--target", "tpu"), "no engines can be built for target 'tpu'. Available: tensorrt, tensorrt-rtx."),
        (("--precision", "fp8"), "unknown precision 'fp8'. Available: fp32, fp16, bf16."),
        (("--target", "tensorrt-rtx:fp8"), "unknown precision 'fp8'. Available: fp32, fp16, bf16."),
        (
            ("--target", "tensorrt-rtx:bf16", "--precision", "fp16"),
            "--target tensorrt-rtx:bf16 and --precision fp16 contradict each other. Give one of them.",
        ),
    ],
)
def test_what_does_not_exist_is_refused(
    tiny_bundle: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in run("compile", tiny_bundle, "--cache", tmp_path, *options).error


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_without_the_library_the_extra_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    error = run("compile", tiny_bundle, "--target", "tensorrt", "--cache", tmp_path).error
    assert "target tensorrt needs tensorrt" in error
    assert "pip install 'unetc[tensorrt]'" in error


@pytest.mark.rtx
def test_sizes_that_cannot_be_are_refused(tiny_bundle: Path, tmp_path: Path, rtx: None) -> None:
    error = run("compile", tiny_bundle, *RTX, "--cache", tmp_path, "--batch", "8,1").error
    assert "cannot build for the sizes '8,1'" in error


def test_a_bundle_for_tensorrt_says_how_it_is_compiled(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle / "manifest.json")
    assert compiling(manifest, tiny_bundle) == ""
    for target, options in (("tensorrt", ""), ("tensorrt-rtx:fp16", " --precision fp16")):
        command = compiling(msgspec.structs.replace(manifest, target=target), Path("b"))
        assert command == f"unetc compile b --target {target.removesuffix(':fp16')}{options}"


def test_the_doctor_lists_what_can_be_compiled_for() -> None:
    findings = {finding["name"]: finding for finding in json.loads(run("doctor", "--json").out)["findings"]}
    for target, library in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        finding = findings[f"compile for {target}"]
        assert not finding["needed"]
        assert library in finding["detail"]


def test_targets_on_a_gpu_say_what_is_missing(tiny_bundle: Path, tmp_path: Path) -> None:
    for target in ("onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt", "tensorrt-rtx", "tensorrt-rtx:fp16"):
        if not works(target):
            error = run("sample", tiny_bundle, "--target", target, "-o", tmp_path / "samples.png").error
            assert f"target {target.removesuffix(':fp16')}" in error
            assert "pip install" in error or "use onnxruntime:cpu" in error


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt-rtx:fp16", "tensorrt-rtx:bf16", "tensorrt:fp16"])
def test_nothing_is_measured_on_a_gpu_that_is_not_there(tiny_model: Path, tmp_path: Path, target: str) -> None:
    for command in (("analyze", "-o", tmp_path / "p.json"), ("build", "-o", tmp_path / "b")):
        if not works(target):
            name, *options = command
            error = run(name, tiny_model, "--target", target, "--cache", tmp_path / "cache", *options).error
            assert f"target {target.partition(':')[0]}" in error
            assert "needs" in error
            assert not (tmp_path / "cache").exists(), "the model was captured before its target was found missing"


@pytest.mark.parametrize(
    ("text", "precision", "read"),
    [
        ("tensorrt-rtx", None, ("tensorrt-rtx", Precision.FP32)),
        ("tensorrt-rtx:fp16", None, ("tensorrt-rtx", Precision.FP16)),
        ("tensorrt:bf16", "BF16", ("tensorrt", Precision.BF16)),
        ("tensorrt", "FP16", ("tensorrt", Precision.FP16)),
    ],
)
def test_a_target_may_end_with_its_precision(text: str, precision: str | None, read: tuple[str, Precision]) -> None:
    assert target_of(text, precision) == read


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> CompileOptions:
    """Offer the stand-in for the CPU as the only library; starting to build fails the test."""
    monkeypatch.setattr("unetc.nvidia.library.LIBRARIES", {NAME: LIBRARY})
    monkeypatch.setattr(
        "unetc.compiler.tensorrt.build_one.build_engine", lambda *_, **__: pytest.fail("began to build")
    )
    return CompileOptions(target=NAME)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (
            {"height": "15"},
            r"height 15 and width 16\. Expected multiples of 2\. Nearest: height 14 or 16\.",
        ),
        ({"height": "16,32", "width": "16,33"}, r"width 33\. .* Nearest: width 32 or 34\."),
        ({"width": "1,16"}, r"width 1\. .* Nearest: width 2 or 4\."),
    ],
)
def test_sides_that_a_unet_cannot_halve_are_refused_before_building(
    tiny_bundle: Path, tmp_path: Path, stand_in: CompileOptions, sides: dict[str, str], message: str
) -> None:
    with pytest.raises(EngineBuildError, match=message):
        compile_bundle(tiny_bundle, replace(stand_in, **sides), cache=tmp_path)
    session = unetc.load(tiny_bundle)
    with pytest.raises(SessionError, match=r"height 15 and width 16\. Expected multiples of 2"):
        session.sample(noise=np.zeros((1, 1, 15, 16), np.float32))
    assert session.sample(noise=np.zeros((1, 1, 14, 18), np.float32)).shape == (1, 1, 14, 18)


def test_sides_of_latents_are_told_in_pixels_too(tiny_bundle: Path) -> None:
    manifest = Manifest.load(tiny_bundle / "manifest.json")
    side, varying = Range(least=64, usual=64, most=64), Range(least=32, usual=64, most=96)
    sizes = Sizes(batch=side, height=side, width=varying)
    assert describe_sides(manifest, sizes) == "64 x 32,64,96"
    latent = SimpleNamespace(decoder=BundleDecoder(graph="decoder.onnx", scale=8))
    assert describe_sides(cast("Manifest", latent), sizes) == "64 x 32,64,96 latents (512 x 256,512,768 pixels)"


def test_a_cache_that_cannot_be_written_is_noticed_before_building(
    tiny_bundle: Path, tmp_path: Path, stand_in: CompileOptions
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/engines"):
        compile_bundle(tiny_bundle, stand_in, cache=tmp_path / "file")


def test_all_tools_that_are_missing_are_named_at_once(
    tiny_bundle: Path, tmp_path: Path, stand_in: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("onnx", "onnx_ir", "onnxruntime"):
        monkeypatch.setitem(sys.modules, library, None)  # which Python takes for a library that is not there
    half = replace(stand_in, precision=Precision.FP16)
    with pytest.raises(MissingDependency, match=r"in fp16 and fp32 needs onnx, onnx_ir, onnxruntime: .*\[none,cpu\]"):
        compile_bundle(tiny_bundle, half, cache=tmp_path)
    with pytest.raises(MissingDependency, match=r"in fp32 needs onnx: pip install 'unetc\[none\]'"):
        compile_bundle(tiny_bundle, stand_in, cache=tmp_path)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupt_stops_builds_that_hang(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    source = f"import os, time; open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w'); time.sleep(300)"
    hangs = partial(build_engine, command=(sys.executable, "-S", "-c", source))
    monkeypatch.setattr("unetc.compiler.tensorrt.build_one.build_engine", hangs)
    monkeypatch.setattr("unetc.nvidia.library.LIBRARIES", {NAME: LIBRARY})
    monkeypatch.setattr("unetc.compiler.tensorrt.build_all.cores", lambda: 2)
    monkeypatch.setattr("unetc.compiler.tensorrt.build_all.free_memory", lambda: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while len(list(tmp_path.glob("[0-9]*"))) < jobs:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    clock, began = threading.Thread(target=interrupt, daemon=True), time.monotonic()
    try:
        clock.start()
        with pytest.raises(KeyboardInterrupt):
            compile_bundle(tiny_bundle, CompileOptions(target=NAME, jobs=jobs), cache=tmp_path / "cache")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 60
    started = [int(path.name) for path in tmp_path.glob("[0-9]*")]
    assert len(started) == jobs
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.without_gpu  # where there is one, the real library is tested
def test_samples_are_drawn_in_calls_that_engines_for_the_bundles_batch_take(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_the_stand_in(target: str, *, threads: int, memory: Memory) -> CpuTensorRt:
        return CpuTensorRt(LIBRARY, memory, calls, EngineCache(tmp_path / "engines"))

    side, most = 16, Manifest.load(tiny_bundle / "manifest.json").batch
    calls = MeasuredCalls.of((1, side, side), most, most, UNCONDITIONAL)
    own = run("sample", tiny_bundle, "--batch", 2 * most + 1, "-o", tmp_path / "own.png")
    assert own.code == 0
    tensorrt_on_cpu.without_streams(monkeypatch)
    monkeypatch.setattr("unetc.runtime.session.open_backend", on_the_stand_in)
    result = run("sample", tiny_bundle, "--batch", 2 * most + 1, "-o", tmp_path / "samples.png", "--json")
    assert result.json["shape"] == [2 * most + 1, 1, side, side]
    for output in (own, result):
        assert [line.split(" after")[0] for line in output.err.splitlines()] == [
            "loading the engines: 0 %",
            "loading the engines: 100 %",
            f"sampling: {100 / (3 * 4):.0f} %",
            "sampling: 100 %",
        ]
    with Image.open(tmp_path / "own.png") as one, Image.open(tmp_path / "samples.png") as other:
        difference = np.abs(np.asarray(one, dtype=np.int64) - np.asarray(other, dtype=np.int64))
    assert difference.max() <= 1  # of 255; rounding may fall to either side


def works(target: str) -> bool:
    try:
        open_backend(target, threads=1)
    except UnetcError:
        return False
    return True


@pytest.mark.rtx
def test_inspect_tells_the_memory_of_engines(
    tiny_bundle: Path, tmp_path: Path, rtx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNETC_CACHE", str(tmp_path))
    assert run("inspect", tiny_bundle, "--json").json["compiled"] == []
    built = run("compile", tiny_bundle, *RTX, "--json").json["engines"]
    (one,) = run("inspect", tiny_bundle, "--json").json["compiled"]
    assert {graph: own["engine_bytes"] for graph, own in one["engines"].items()} == {
        engine["graph"]: engine["engine_bytes"] for engine in built
    }
    sums = {row["name"]: row for row in one["memory"]}
    assert sums["full"]["engine_bytes"] == built[0]["engine_bytes"]
    assert sums["with --memory low, at most"]["engine_bytes"] < sums["the plan, all loaded"]["engine_bytes"]
    assert (one["missing"], one["misfit"]) == ([], "")
    shown = run("inspect", tiny_bundle).out
    assert "tensorrt-rtx" in shown
    if sums["full"]["scratch_bytes"] is None:
        assert "have no figure for scratch memory" in " ".join(shown.split())
    assert shown.count("phase from") == 2
    assert f"{sum(engine['engine_bytes'] for engine in built) / 2**20:.1f}" in shown
    (low,) = (line for line in shown.splitlines() if "with --memory low, at most" in line)
    in_phases = {engine.graph for engine in Manifest.load(tiny_bundle / "manifest.json").engines[1:]}
    assert f"{sum(engine['engine_bytes'] for engine in built if engine['graph'] in in_phases) / 2**20:.1f}" in low


def test_inspect_says_what_is_missing_and_what_cannot_be_run(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNETC_CACHE", str(tmp_path))
    monkeypatch.setattr("unetc.cli.engine_inventory.LIBRARIES", {NAME: LIBRARY})
    monkeypatch.setattr("unetc.runtime.session.open_backend", lambda *_, **__: backend)
    tensorrt_on_cpu.without_streams(monkeypatch)
    assert f"No engines of this bundle are in {tmp_path}. `unetc compile BUNDLE` builds them." in shown_of(tiny_bundle)
    calls = MeasuredCalls.of((1, 16, 16), 2, 2, UNCONDITIONAL)
    backend = CpuTensorRt(LIBRARY, Memory.FAST, calls, EngineCache(tmp_path / "engines"))
    assert run("sample", tiny_bundle, "-o", tmp_path / "samples.png").code == 0
    assert "the plan, all loaded" in shown_of(tiny_bundle)
    monkeypatch.setattr(tensorrt_on_cpu, "__version__", "2.0.cpu")
    misfit = "for library 1.0.cpu (here 2.0.cpu)"
    assert f"cannot be run here: {misfit}" in shown_of(tiny_bundle)
    (one,) = run("inspect", tiny_bundle, "--json").json["compiled"]
    assert (one["missing"], one["misfit"]) == ([], misfit)
    monkeypatch.setattr(tensorrt_on_cpu, "__version__", "1.0.cpu")
    with monkeypatch.context() as patch:
        patch.setattr("unetc.cli.engine_inventory.LIBRARIES", {"tensorrt": LIBRARIES["tensorrt"]})
        (one,) = run("inspect", tiny_bundle, "--json").json["compiled"]
        assert (one["missing"], one["misfit"]) == ([], "for target tensorrt:cpu (here tensorrt)")
        assert "cannot be run here: for target tensorrt:cpu" in shown_of(tiny_bundle)
    shutil.rmtree(next((tmp_path / "engines").glob("*/record.json")).parent)
    (one,) = run("inspect", tiny_bundle, "--json").json["compiled"]
    assert f"not complete, without {one['missing'][0]}" in shown_of(tiny_bundle)


def test_inspect_counts_the_decoder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNETC_CACHE", str(tmp_path))
    plain = Manifest.load(tiny_bundle / "manifest.json")
    file = FileRecord(path="decoder.onnx", bytes=1, sha256="d" * 64)
    latent = BundleDecoder(graph=file.path, scale=8)
    manifest = msgspec.structs.replace(plain, decoder=latent, files=(*plain.files, file))
    hashes = {one.path: one.sha256 for one in manifest.files}

    def put(scratch: int, **fields: Any) -> None:
        key = msgspec.structs.replace(KEY, **fields)
        built = msgspec.structs.replace(record_of(key), scratch_bytes=scratch)
        EngineCache.inside(tmp_path).put(built, ENGINE_BYTES)

    for graph in {engine.graph for engine in plain.level_engines()}:
        put(5, graph_sha256=hashes[graph], weights_sha256=hashes[manifest.weights], precision=Precision.FP16)
    one_row = msgspec.structs.replace(KEY.sizes, batch=ONE)
    decodes: dict[str, Any] = {"graph_sha256": file.sha256, "weights_sha256": NO_WEIGHTS, "rows": {}}
    put(100, **decodes, sizes=msgspec.structs.replace(one_row, width=TWO))  # for samples of another size
    (before,) = find(manifest)
    assert missing(before, manifest) == ["decoder.onnx"]
    put(7, **decodes, sizes=one_row)
    (after,) = find(manifest)
    assert missing(after, manifest) == []
    whole, without = ({row.name: row for row in memory_of(after, one)} for one in (manifest, plain))
    size = len(ENGINE_BYTES)
    assert (whole["decoder"].engine_bytes, whole["decoder"].scratch_bytes) == (size, 7)
    for name in ("the plan, all loaded", "with --memory low, at most"):
        assert whole[name].engine_bytes == (without[name].engine_bytes or 0) + size
        assert (without[name].scratch_bytes, whole[name].scratch_bytes) == (5, 12)


def shown_of(bundle: Path) -> str:
    shown = run("inspect", bundle)
    assert shown.code == 0, shown.err
    return shown.out.replace("\n", " ")


@pytest.mark.rtx
@pytest.mark.without_gpu
def test_engines_for_this_gpu_need_one(tiny_bundle: Path, tmp_path: Path, rtx: None) -> None:
    error = run("compile", tiny_bundle, *RTX, "--on-this-gpu", "--cache", tmp_path).error
    assert "this needs a tensorrt-rtx engine for the GPU of this machine, and nvidia-smi is missing" in error


@pytest.mark.rtx
@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_of_controls_are_built_if_asked_for(
    tiny_bundle: Path, tmp_path: Path, rtx: None, precision: str
) -> None:
    options = ("--precision", precision, "--controls", "--json")
    engines = run("compile", tiny_bundle, *RTX, "--cache", tmp_path, *options).json["engines"]
    manifest = Manifest.load(tiny_bundle / "manifest.json")
    assert {engine["graph"] for engine in engines} == {engine.graph for engine in manifest.all_engines()}
