"""The GPU benchmark, tried on the CPU: its prepared folders, its measurements, and how it resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkout
import gpu
import gpu_engines
import numpy as np
import pytest
import tables
import torch
from clock import Effort, timed_ms
from gpu_engines import Loaded
from gpu_folder import CONTENTS, DROP, FULL, HEADER, Folder
from gpu_prepare import LARGE, SCHEDULE, Source, contents_of, hollow_unet, shapes, write
from gpu_result import Measured
from gpu_sampling import MOST_OVER, Times, Ways, evenly, fit, periodic
from safetensors.numpy import load, save_file

from tests.models import CONTEXT_WIDTH, Tiny, relative_error, tiny_of
from tests.nvidia.test_tensorrt_backend import backend_of
from unetc.artifacts.profile import ModelReference
from unetc.backend import WEIGHTS, Array
from unetc.call import CONTEXT
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import UNCONDITIONAL
from unetc.errors import ArtifactError, CorruptArtifactError, SessionError
from unetc.nvidia.cache import EngineCache
from unetc.precision import Precision
from unetc.runtime.backends import cuda_graph

BENCHMARKS = Path(gpu.__file__).parent
STEPS = 8
HALF = 2e-2
"""Relative tolerance of float16: 10 bits, and rounding over forty layers; tests/graph/test_lowering.py finds 3e-3."""

SAMPLING_LACKS = ("diffusers", "onnx_ir", "onnxruntime", "onnxscript", "peft", "PIL", "rich", "scipy", "sklearn")
SAMPLING_LACKS += ("torchmetrics", "transformers", "typer")
"""Libraries that are missing where only torch, numpy, onnx, msgspec and safetensors are installed."""


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("cross-attention", shared)


def prepare(tiny: Tiny, folder: Path, *, precision: Precision, carried: float) -> Folder:
    """Prepare a tiny model as `gpu_prepare.py` does the large ones."""
    captured = folder / "captured"
    shutil.copytree(tiny.gated.folder, captured)
    source = Source(
        gated=GatedGraph.load(captured),
        reference=ModelReference(name="tiny", sha256="0" * 64, pipeline="-", denoiser="-"),
        precision=precision,
        trained=True,
        carried=carried,
        sample_shape=(4, 16, 16),
        rows={CONTEXT: (5, CONTEXT_WIDTH)},
        conditions=UNCONDITIONAL,
        scheduler=extract_all(make_scheduler("ddim", SCHEDULE), "ddim", [STEPS]),
    )
    write(source, folder / "prepared/tiny")
    return Folder(folder / "prepared/tiny")


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Prepare a model in float16 with all its weights stored."""
    return prepare(tiny, tmp_path_factory.mktemp("whole"), precision=Precision.FP16, carried=float("inf"))


@pytest.fixture(scope="module")
def hollow(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Prepare a model whose large weights are drawn when it is loaded."""
    return prepare(tiny, tmp_path_factory.mktemp("hollow"), precision=Precision.FP32, carried=64)


def test_prepared_engines_compute_the_same_as_the_model(tiny: Tiny, whole: Folder) -> None:
    loaded = Loaded(whole, "torch:cpu", most=2, threads=1)
    batch = loaded.batch(2)
    means = np.zeros(tiny.gated.channels, np.float32)
    sample = np.random.default_rng(0).standard_normal((2, 4, 16, 16), np.float32)
    inputs = whole.conditions().take(range(2)).widen(sample, 500.0)
    for engine in (FULL, DROP):
        batch.call(engine)()
        original = tiny.load(specialise(tiny.gated, whole.assignment(engine).treatments, means))
        assert relative_error(loaded.device.to_array(batch.output), tiny.run(original, inputs)) < HALF


def test_a_plan_samples_the_same_from_a_prepared_folder_on_two_targets(whole: Folder) -> None:
    def sample(target: str) -> Array:
        loaded = Loaded(whole, target, most=2, threads=1)
        way = Ways(loaded).plan(evenly(3, 2, STEPS))
        total, inside = way.run(0)
        assert 0 < inside < total
        return way.sample(0)

    assert relative_error(sample("torch:cpu"), sample("onnxruntime:cpu")) < STEPS * HALF


@pytest.mark.rtx
@pytest.mark.without_gpu
@pytest.mark.nightly
def test_tensorrt_engines_are_built_on_their_first_call(
    whole: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    engines = EngineCache(tmp_path)
    monkeypatch.setattr(gpu_engines, "open_backend", lambda target, *, threads: backend_of(engines))
    loaded = Loaded(whole, "tensorrt-rtx", most=3)
    for engine in (FULL, DROP):
        with pytest.raises(SessionError, match=r"cannot load an engine: .*(?i:cuda)"):  # built, but needs a GPU
            loaded.program(engine)
    (apart,) = (tmp_path / "measured").iterdir()
    built = EngineCache(apart).records()
    assert len(built) == 2
    assert {record.shapes["sample"] for record in built} == {((1, 4, 16, 16), (1, 4, 16, 16), (CACHED_ROWS, 4, 16, 16))}


def test_weights_that_are_not_stored_are_drawn_in_the_exported_layout(tiny: Tiny, hollow: Folder) -> None:
    original, drawn = (tiny.gated.folder / WEIGHTS).read_bytes(), hollow.weights
    header = hollow.read(HEADER)
    assert len(drawn) == len(original)
    assert drawn.startswith(header)
    assert original.startswith(header)
    carried, exported, made = load(hollow.read(CONTENTS)), load(original), load(drawn)
    assert 0 < len(carried) < len(exported)
    assert (
        max(values.size for values in carried.values())
        <= 64
        < min(exported[name].size for name in exported.keys() - carried)
    )
    for name, values in made.items():
        assert np.array_equal(values, exported[name]) == (name in carried)
        assert name in carried or 0.5 < np.std(values) * np.sqrt(_fan_in(values)) < 2
    assert Folder(hollow.path).weights == drawn


def test_the_stored_weights_of_a_hollow_unet_are_the_drawn_ones(tmp_path: Path) -> None:
    unet = hollow_unet(shapes()["glide-base"].narrow().config)
    parameters = dict(unet.named_parameters())
    small = {name for name, parameter in parameters.items() if parameter.numel() <= LARGE}
    assert small < parameters.keys(), "some tensors must be large before their precision is lowered"
    with np.errstate(all="ignore"):  # uninitialised memory may be any number
        halved = {name: parameter.detach().numpy().astype(np.float16) for name, parameter in parameters.items()}
    save_file(halved, tmp_path / WEIGHTS)
    carried = load(contents_of(tmp_path / WEIGHTS, LARGE))
    assert set(carried) == small
    assert max(np.abs(values).max() for values in carried.values()) < 10


def _fan_in(values: np.ndarray[Any, Any]) -> int:
    return int(np.prod(values.shape[1:])) if values.ndim > 2 else max(values.shape)


def test_a_changed_folder_is_refused(hollow: Folder, tmp_path: Path) -> None:
    changed = Folder(Path(shutil.copytree(hollow.path, tmp_path / "changed")))
    (changed.path / HEADER).write_bytes(b"x" + (changed.path / HEADER).read_bytes()[1:])
    with pytest.raises(CorruptArtifactError, match=r"gpu_prepare\.py"):
        _ = changed.weights
    (changed.path / "prepared.json").unlink()
    with pytest.raises(ArtifactError):
        Folder(changed.path)


@pytest.mark.parametrize("budget", [0.1, 0.27, 0.5, 0.7])
@pytest.mark.parametrize("around", [0.0, 0.4])
def test_a_schedule_saves_its_budget_and_little_more(budget: float, around: float) -> None:
    times = Times(full=10.0, planned=np.array([10.3, 1.7, 4.4]), around=around)
    schedule = fit(times, budget, 50)
    assert schedule is not None
    assert schedule[0] == 0
    assert 1.0 <= (1 - times.ratio(schedule)) / budget <= MOST_OVER


def test_no_schedule_fits_a_budget_that_cannot_be_saved() -> None:
    assert fit(Times(full=10.0, planned=np.array([10.3, 9.9, 10.0])), 0.27, 50) is None


@pytest.mark.parametrize(("refreshes", "inners"), [(1, 0), (1, 7), (3, 2), (8, 0)])
def test_steps_are_spread_evenly(refreshes: int, inners: int) -> None:
    schedule = evenly(refreshes, inners, 8)
    assert (schedule.count(0), schedule.count(2)) == (refreshes, inners)
    full = [step for step, engine in enumerate([*schedule, 0]) if engine == 0]
    assert full[0] == 0
    assert max(np.diff(full)) <= -(-8 // refreshes)
    assert periodic(3, 8) == (0, 1, 1, 0, 1, 1, 0, 1)


def start(folder: Path, results: Path, *more: str) -> list[str]:
    """Return the arguments of a short run."""
    target = ["--target", "torch:cpu", "--others", "onnxruntime:cuda", "--parts", "memory", "engines", "sampling"]
    return [str(folder), "--results", str(results), *target, "--smoke", *more]


@pytest.fixture(scope="module")
def measured(hollow: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the script from a clone with only the runtime's libraries, and return its result."""
    results, clone = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("clone")
    left_out = shutil.ignore_patterns("__pycache__", "*.safetensors", "results")
    for folder in ("src", "analyzer", "compiler", "runtime", "benchmarks"):
        shutil.copytree(checkout.ROOT / folder, clone / folder, symlinks=True, ignore=left_out)
    scripts = clone / "benchmarks"
    lines = [
        "import runpy, sys",
        f"sys.modules.update(dict.fromkeys({SAMPLING_LACKS}))",
        f"sys.path[0], sys.argv = {str(scripts)!r}, ['gpu.py', *{start(hollow.path.parent, results)}]",
        "try:",
        f"    runpy.run_path({str(scripts / 'gpu.py')!r}, run_name='__main__')",
        "finally:",
        "    print(sys.modules['unetc'].__file__)",
    ]
    run = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.splitlines()[-1]).is_relative_to(clone), "it must use the clone, not the installation"
    return results / gpu.RESULT


def test_the_script_needs_only_the_runtimes_libraries_and_lists_missing_parts(measured: Path) -> None:
    record = json.loads(measured.read_text())
    assert record["failed"] == {}
    assert list(record["parts"]) == ["tiny, torch:cpu: engines", "tiny, torch:cpu: sampling"]
    assert "onnxruntime:cuda" in record["absent"]
    assert "GPU" in record["absent"]["tiny, torch:cpu: memory"]
    assert {"torch", "numpy"} <= set(record["environment"])
    assert checkout.sources_sha256().startswith(record["settings"]["sources"])


def test_the_result_is_shown_in_tables(measured: Path) -> None:
    record = json.loads(measured.read_text())
    assert len(record["tables"][0]["rows"]) == 2 * 6, "two batches of six engines"
    text = tables.section("gpu", record)
    assert "DeepCache, 1 of 3 steps in full" in text
    assert "a switch of engines, in steps | " in text
    assert "≤ 0.005" in text
    assert "Not measured: " in text


def test_a_second_start_repeats_nothing(measured: Path, hollow: Folder, tmp_path: Path) -> None:
    before = json.loads(measured.read_text())
    result = Path(shutil.copy(measured, tmp_path))
    assert gpu.main(start(hollow.path.parent, tmp_path)) == 0
    after = json.loads(result.read_text())
    assert after["parts"] == before["parts"]
    assert after["absent"].keys() == before["absent"].keys()


def test_starts_for_other_models_parts_and_targets_add_to_the_result(
    measured: Path, hollow: Folder, tmp_path: Path
) -> None:
    before = json.loads(measured.read_text())
    result = Path(shutil.copy(measured, tmp_path))
    shutil.copytree(hollow.path, tmp_path / "prepared/other")
    arguments = ["--results", str(tmp_path), "--target", "torch:cpu", "--others", "--parts", "engines", "--smoke"]
    assert gpu.main([str(tmp_path / "prepared"), *arguments]) == 0
    after = json.loads(result.read_text())
    assert list(after["parts"]) == [*before["parts"], "other, torch:cpu: engines"]
    assert before["parts"].items() <= after["parts"].items()
    assert after["absent"] == before["absent"]
    assert len(after["tables"][0]["rows"]) == 2 * len(before["tables"][0]["rows"])


def test_parts_with_other_settings_are_not_kept(measured: Path, tmp_path: Path) -> None:
    before = json.loads(measured.read_text())
    settings, environment = before["settings"], before["environment"]
    prepared = {part["model"]: part["prepared"] for part in before["parts"].values()}
    result = Path(shutil.copy(measured, tmp_path))
    assert gpu.Result(result, settings, environment, prepared | {"another": "1"}).parts == before["parts"]
    assert gpu.Result(result, settings, environment, {"tiny": "prepared again"}).parts == {}
    aside = result.with_name("gpu.json.before")
    for changed in ((settings | {"rounds": 3}, environment), (settings, environment | {"driver": "another"})):
        shutil.copy(measured, tmp_path)
        assert gpu.Result(result, *changed, prepared).parts == {}
        assert not result.exists()
        assert aside.read_text() == measured.read_text()
        aside.unlink()
    result.write_text("{}")
    with pytest.raises(ArtifactError, match="no result"):
        gpu.Result(result, {}, {}, {})


def test_the_script_stops_when_the_time_is_up(hollow: Folder, tmp_path: Path) -> None:
    assert gpu.main(start(hollow.path.parent, tmp_path, "--minutes", "0.0001")) == 3


def test_cpu_figures_are_not_taken_for_gpu_figures(
    hollow: Folder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main([str(hollow.path.parent), "--target", "torch:cpu"]) == 1
    assert "is no GPU" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main([str(hollow.path.parent), "--results", str(tmp_path)]) == 1
        assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unprepared_models_are_refused(hollow: Folder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(start(tmp_path, tmp_path)) == 1
    assert "gpu_prepare.py" in capsys.readouterr().err
    assert gpu.main(start(hollow.path.parent, tmp_path, "--models", "sdxl")) == 1
    assert "It has: tiny" in capsys.readouterr().err


def test_a_part_that_fails_is_named_and_comes_last_the_next_time(hollow: Folder, tmp_path: Path) -> None:
    result = gpu.Result(tmp_path / gpu.RESULT, {}, {}, {})
    loaded = Loaded(hollow, "torch:cpu", most=2, threads=1)

    def exhaust(loaded: Loaded) -> Any:
        raise RuntimeError("CUDA out of memory")

    def compile_a_launcher(loaded: Loaded) -> Any:
        raise subprocess.CalledProcessError(1, ["gcc"])

    def last(loaded: Loaded) -> Any:
        raise gpu.TimeIsUp

    gpu.measure("a part", exhaust, loaded, result)
    gpu.measure("another part", compile_a_launcher, loaded, result)
    with pytest.raises(gpu.TimeIsUp):
        gpu.measure("a long part", last, loaded, result)
    record = json.loads(result.path.read_text())
    assert record["failed"] == {
        "a part": "RuntimeError: CUDA out of memory",
        "another part": "CalledProcessError: Command '['gcc']' returned non-zero exit status 1.",
        "a long part": "cut short after 0 s",
    }
    assert gpu.Result(result.path, {}, {}, {}).late == set(record["failed"])


def test_a_failed_capture_of_a_cuda_graph_fails_the_part(hollow: Folder, tmp_path: Path) -> None:
    """Without a GPU a capture fails, just as it fails on a GPU when a kernel cannot be captured."""
    result = gpu.Result(tmp_path / gpu.RESULT, {}, {}, {})
    pool = cuda_graph.Pool(torch.device("cpu"))

    def eager(loaded: Loaded) -> Measured:
        module = cuda_graph.CapturedModule(lambda: lambda tensor: (tensor + 1,), pool)
        assert module(torch.zeros(1))[0] == 1
        return Measured()

    def other(loaded: Loaded) -> Measured:
        return Measured()

    gpu.measure_model(hollow.path, "torch:cpu", {"first": other, "second": eager, "third": other}, result, 2)
    assert list(result.parts) == ["first"]
    assert list(result.failed) == ["second", "third"], "the third part uses the engines that the second one loaded"
    assert all("no CUDA graph could be captured" in reason for reason in result.failed.values())
    gpu.measure_model(hollow.path, "torch:cpu", {"third": other}, result, 2)
    assert list(result.parts) == ["first", "third"]


def test_the_host_runs_ahead_of_a_timed_device() -> None:
    """Simulate a clock and a device: launching takes the host 1 ms, computing takes the device 3 ms."""

    class Simulated:
        host = device = 0.0

        def launch(self) -> None:
            self.host += 1
            self.device = max(self.device, self.host) + 3

        def mark(self) -> float:
            return max(self.device, self.host)

        def between_ms(self, start: float, end: float) -> float:
            return end - start

    ahead = Simulated()
    assert np.all(timed_ms([ahead.launch], ahead, Effort(seconds=0.0, least=4)) == 3)


@pytest.mark.nightly
def test_models_of_every_shape_are_prepared_and_measured(tmp_path: Path) -> None:
    def run(script: str, *arguments: str) -> None:
        command = [sys.executable, str(BENCHMARKS / script), str(tmp_path / "prepared"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    cpu = ("--target", "torch:cpu", "--others", "--smoke", "--minutes", "60", "--results")
    models = ["glide-base", "prompted-digits", "sd15", "sdxl"]
    run("gpu_prepare.py", "--smoke", "--steps", "6", "--python", "", "--models", *models)
    run("gpu.py", *cpu, str(tmp_path / "most"), "--parts", "memory", "engines", "sampling", "graphs")
    record = json.loads((tmp_path / "most" / gpu.RESULT).read_text())
    assert list(dict.fromkeys(part["model"] for part in record["parts"].values())) == models
    assert set(record["parts"]) == {
        f"{model}, torch:cpu: {part}" for model in models for part in ("engines", "sampling")
    }
    assert set(record["absent"]) == {f"{model}, torch:cpu: {part}" for model in models for part in ("memory", "graphs")}
    run("gpu.py", *cpu, str(tmp_path / "compiled"), "--parts", "compiled", "--models", "glide-base")
    record = json.loads((tmp_path / "compiled" / gpu.RESULT).read_text())
    assert set(record["parts"]) == {"glide-base, torch:cpu: compiled"}
