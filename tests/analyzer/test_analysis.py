"""An analysis reuses only its own partial results, keeps to its limits, and refuses invalid input."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.analyzer.sweeps import (
    BINS,
    CONFIG,
    REFERENCE,
    SAMPLES,
    SHAPE,
    STEPS,
    Recorder,
    Watched,
    backend,
    estimate_of,
    everything,
    here,
    kind_of,
    made_up_costs,
    sweep_of,
    table_of,
    tiny,
)
from tests.every_day import every_nth
from tests.models import shared_folder
from unetc.analyzer import analysis, cost
from unetc.analyzer.ablation import entry_of
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.cost import Costs
from unetc.analyzer.duration import Duration, predict_duration
from unetc.analyzer.sweep import Swept
from unetc.artifacts.profile import STEP, Profile
from unetc.backend import Array, Backend
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.errors import ProfileError
from unetc.progress import OnProgress, Progress, ignore


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the timing, which is tested elsewhere."""
    monkeypatch.setattr(cost, "measure_costs", made_up_costs)


def analyse(
    work: Path,
    gated: GatedGraph | None = None,
    on: Backend | None = None,
    on_progress: OnProgress = ignore,
    **changes: Any,
) -> Profile:
    options = AnalysisOptions(**({"steps": 2, "samples": 1, "bins": 1, "threads": 1} | changes))
    gated, table = gated or tiny().gated, table_of(options.scheduler, options.steps)
    return analyze(
        gated,
        REFERENCE,
        table,
        here(gated, on or backend(), table, options.samples),
        sample_shape=SHAPE,
        options=options,
        work=work,
        on_progress=on_progress,
    )


@functools.cache
def plain() -> tuple[Profile, Path]:
    """Analyse with default options; tests must copy the folder of partial results before changing it."""
    work = Path(tempfile.mkdtemp(dir=shared_folder(), prefix="analysis-"))
    return analyse(work), work


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize(
    "change",
    every_nth(
        3,
        [
            {"seed": 1},
            {"samples": 2},
            {"bins": 2},
            {"steps": 3},
            {"scheduler": "dpmsolver++"},
            {"decisive": 3},
            {"decisive": None},
        ],
    ),
    ids=str,
)
def test_partial_results_of_other_options_are_not_reused(tmp_path: Path, change: dict[str, Any]) -> None:
    before, finished = plain()
    work = Path(shutil.copytree(finished, tmp_path / "shared"))
    changed = analyse(work, **change)
    assert changed.effects != before.effects
    assert changed == analyse(tmp_path / "fresh", **change)
    assert analyse(work) == before


@pytest.mark.usefixtures("no_timing")
def test_a_model_with_large_branches_is_analysed_in_small_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    most = {}
    for limit in (2**29, 1):
        monkeypatch.setattr("unetc.analyzer.analysis.BRANCH_BYTES", limit)
        recorder = Recorder(backend())
        profile = analyse(tmp_path / str(limit), on=recorder, samples=SAMPLES, batch=1)
        most[limit] = (
            max(len(call["sample"]) for call in recorder.calls),
            {e.key: e.relative_l2.mean for e in profile.effects},
        )
    assert most[1][0] == SAMPLES < most[2**29][0]
    assert most[1][1] == pytest.approx(most[2**29][1], rel=1e-3, abs=1e-5)


@pytest.mark.usefixtures("no_timing")
def test_another_target_is_measured_separately(tmp_path: Path) -> None:
    counts = []
    for target in ("onnxruntime:cpu", "tensorrt-rtx:fp16", "onnxruntime:cpu"):
        recorder = Recorder(backend())
        analyse(tmp_path, on=recorder, target=target)
        counts.append(len(recorder.calls))
    assert counts[0] == counts[1] > counts[2]


def test_times_are_measured_once_for_the_same_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[dict[str, Any]] = []

    def measure_costs(*_: object, **options: Any) -> Costs:
        measured.append(options)
        return Costs(full_ms=estimate_of(10.0 + len(measured)), full_bytes=1, costs=())

    monkeypatch.setattr(cost, "measure_costs", measure_costs)
    monkeypatch.setattr(analysis, "run_sweep", lambda *_: Swept(effects=(), non_finite=()))
    profile_of = functools.partial(analyse, decisive=None)  # skip the screen, which is tested elsewhere
    assert profile_of(tmp_path).full_ms == profile_of(tmp_path).full_ms == profile_of(tmp_path, seed=1).full_ms
    assert len(measured) == 1
    changes: list[dict[str, Any]] = [{"batch": 3}, {"rounds": 4}, {"threads": 2}, {"target": "null"}]
    for count, change in enumerate(changes, start=2):
        profile_of(tmp_path, **change)
        assert len(measured) == count
    (timing,) = (path for path in tmp_path.rglob("timing.json") if b"11.0" in path.read_bytes())
    whole = timing.read_bytes()
    timing.write_bytes(b'{"full_ms": "\xff')
    assert profile_of(tmp_path).full_ms == estimate_of(16.0)
    timing.write_bytes(whole.replace(b'"full_bytes":1,', b""))  # like a file from before weights were counted
    assert profile_of(tmp_path).full_ms == estimate_of(17.0)


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    gated = tiny().gated
    weights = {name: array.copy() for name, array in load_file(gated.weights).items()}
    name = max(weights, key=lambda name: weights[name].size)
    weights[name].flat[0] = value
    save_file(weights, tmp_path / gated.weights.name)
    broken = dataclasses.replace(gated, folder=tmp_path)
    with pytest.raises(ProfileError, match=r"at step 1 of \d+ .*, first in .*\. Check that the weights are finite"):
        analyse(tmp_path / "work", broken)


@pytest.mark.usefixtures("no_timing")
def test_a_few_ablations_of_every_bin_are_measured_and_the_rest_is_estimated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": STEPS, "samples": SAMPLES, "bins": BINS}
    profile = analyse(tmp_path / "some", decisive=5, **options)
    whole = analyse(tmp_path / "all", decisive=None, **options)
    assert all(effect.measured for effect in whole.effects)
    assert [sum(e.measured for e in profile.effects if e.bin == b) for b in range(BINS)] == [5] * BINS
    places, everywhere = ([(e.component, kind_of(e), e.bin) for e in p.effects] for p in (profile, whole))
    assert len({*places}) == len(places)
    assert {*places} == {*everywhere}
    measured = {(e.component, kind_of(e), e.bin): e.relative_l2.mean for e in whole.effects}
    for effect in profile.effects:
        if effect.measured:
            expected = measured[effect.component, kind_of(effect), effect.bin]
            assert effect.relative_l2.mean == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize("decisive", every_nth(2, [4, 0, None]))
def test_samplings_count_the_calls_of_an_analysis(tmp_path: Path, decisive: int | None) -> None:
    recorder = Recorder(backend())
    profile = analyse(tmp_path, on=recorder, steps=STEPS, samples=SAMPLES, bins=BINS, decisive=decisive)
    rows = sum(len(call["sample"]) for call in recorder.calls[2:])  # two calls measure the time of one
    assert profile.samplings == pytest.approx(rows / SAMPLES / STEPS)


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize("decisive", every_nth(2, [4, 0, None]))
def test_the_duration_of_an_analysis_is_predicted(tmp_path: Path, decisive: int | None) -> None:
    reports: list[Progress] = []
    options: dict[str, Any] = {"steps": STEPS, "samples": SAMPLES, "bins": BINS, "decisive": decisive}
    profile = analyse(tmp_path, on_progress=reports.append, **options)
    (note,) = (report.note for report in reports if report.note)
    assert reports[0].note == note
    measured = sum(effect.measured for effect in profile.effects)
    assert f"{len(profile.effects)} local probes" in note or decisive is None
    assert f"{measured} ablations to the final output" in note or decisive == 0
    sweep = sweep_of("ddim", rows=CACHED_ROWS)
    told = predict_duration(sweep, screened=decisive is not None, decisive=decisive, limit_s=math.inf, sample_ms=1000.0)
    # the decisive ablations are not known in advance, so their calls are predicted by averages
    assert told.seconds == pytest.approx(profile.samplings * STEPS * SAMPLES, rel=0.05 if decisive else 1e-9)
    full_model_s = 2 * STEPS * SAMPLES * 1e6
    for timing_s in (0.0, 60.0):
        limited = predict_duration(
            sweep, screened=True, decisive=None, limit_s=1.0, sample_ms=1e9, forms=3, timing_s=timing_s
        )
        assert limited.seconds == full_model_s + timing_s, "the rest, no limit cuts"


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize("decisive", [0, 4, None])
def test_a_noise_level_without_ablations_takes_no_time(tmp_path: Path, decisive: int | None) -> None:
    """The first step is never reused, so nothing can be tried on it where the step alone is ablated."""
    reports: list[Progress] = []
    options: dict[str, Any] = {"steps": 3, "bins": 3, "components": (STEP,), "decisive": decisive}
    profile = analyse(tmp_path, on_progress=reports.append, **options)
    assert {effect.bin for effect in profile.effects} == {1, 2}
    (note,) = (report.note for report in reports if report.note)
    assert re.fullmatch(r"about \d+ seconds: .*", note)
    (step,) = (one for one in profile.components if one.name == STEP)
    sweep = sweep_of("ddim", bins=profile.bins, table=table_of("ddim", 3), samples=1, ablated=(step,), rows=CACHED_ROWS)
    told = predict_duration(sweep, screened=decisive is not None, decisive=decisive, limit_s=math.inf, sample_ms=1000.0)
    assert told.seconds == pytest.approx(profile.samplings * 3, rel=0.25 if decisive else 1e-9)


@pytest.mark.usefixtures("no_timing")
def test_a_timing_that_is_read_is_reported_as_finished(tmp_path: Path) -> None:
    for _ in range(2):
        reports: list[Progress] = []
        analyse(tmp_path, on_progress=reports.append, decisive=0)
        timing = [report for report in reports if report.stage == "timing"]
        assert timing[-1].done == timing[-1].total > 0
    assert len(timing) == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"), (7200, "2 hours")],
)
def test_a_duration_is_written_in_words(seconds: float, words: str) -> None:
    duration = Duration(seconds=seconds, forms=9, probes=1616, ablations=80)
    work = "timing of 9 forms of components, 1,616 local probes, 80 ablations to the final output"
    assert str(duration) == f"about {words}: {work}"


@pytest.mark.usefixtures("no_timing")
def test_without_ablations_everything_is_estimated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": STEPS, "samples": SAMPLES, "bins": BINS}
    profile = analyse(tmp_path, decisive=0, **options)
    assert not any(effect.measured for effect in profile.effects)
    assert {(e.component, kind_of(e), e.bin) for e in profile.effects} == {
        (a.component, a.periodic, b) for a, b in everything(sweep_of("ddim"))
    }
    for effect in profile.effects:  # wide, since no error amplification was measured
        assert effect.relative_l2.high >= 2 * effect.relative_l2.mean


def test_only_components_that_match_and_the_step_are_ablated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": 1, "rounds": 1}
    for pattern in ("mid_block.*", "*.attentions.0"):
        profile = analyse(tmp_path, components=(pattern,), **options)
        names = {c.name for c in tiny().gated.components if fnmatchcase(c.name, pattern)} | {STEP}
        assert 1 < len(names) < len(tiny().gated.components)
        assert {cost.component for cost in profile.costs} == {effect.component for effect in profile.effects} == names
        assert profile.components == tiny().gated.components
    # an analysis of all components does not reuse these results
    whole = analyse(tmp_path, **options)
    assert len(whole.costs) == len(whole.components)
    assert {effect.component for effect in whole.effects} == {component.name for component in whole.components}


def test_a_pattern_that_matches_nothing_is_refused_with_close_names(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no component matches 'midblock.resnets.0'. Close names: mid_block.resnet"):
        analyse(tmp_path, components=("mid_block.*", "midblock.resnets.0"))


class Clock(Watched):
    """A clock that advances only when a program is called: one second per sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(backend(), self._advance)
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def _advance(self, inputs: Mapping[str, object], output: Array) -> None:
        self.now += len(output)


@pytest.mark.usefixtures("no_timing")
def test_a_time_limit_ends_the_measuring_and_a_later_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 4, "samples": 2, "bins": 2, "decisive": 6}
    clock = Clock(monkeypatch)

    def run(folder: str, limit_s: float) -> tuple[Profile, float]:
        start = clock.now
        profile = analyse(tmp_path / folder, on=clock, time_limit_s=limit_s, **options)
        return profile, clock.now - start

    whole, spent = run("whole", math.inf)
    nothing, always = run("none", 1.0)
    assert nothing.effects == ()
    assert "the time limit came before the end of the screening" in nothing.notes[0]
    part, took = run("part", always + (spent - always) / 4)
    assert always < took < spent
    assert {effect.bin for effect in part.effects} == {0, 1}  # the bins take turns
    assert not any(effect.measured for effect in part.effects)
    assert run("part", math.inf)[0] == whole
    options["decisive"] = 0
    least = run("screened", math.inf)[1]
    options["decisive"] = 6
    some, took = run("some", (spent + least) / 2)
    assert least < took < spent
    assert not some.notes
    measured, all_measured = ({e for e in p.effects if e.measured} for p in (some, whole))
    assert measured < all_measured
    assert {effect.bin for effect in measured} == {0, 1}
    assert len(some.effects) == len(whole.effects)
    later, rest = run("some", math.inf)
    assert later == whole
    assert rest < spent
    assert run("some", 1.0)[0] == whole  # measured effects are used, whatever the limit


def test_an_exhaustive_analysis_carries_everything_with_a_time_limit_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some components seem to save nothing, and a limit orders the work; a later run without one repeats none of it."""

    def measure_costs(gated: GatedGraph, *_: object, **__: object) -> Costs:
        costs = made_up_costs(gated)
        saved = [estimate_of(index % 3 - 1.0) for index, _ in enumerate(costs.costs)]
        changed = [msgspec.structs.replace(one, saved_ms=ms) for one, ms in zip(costs.costs, saved, strict=True)]
        return msgspec.structs.replace(costs, costs=tuple(changed))

    monkeypatch.setattr(cost, "measure_costs", measure_costs)
    options: dict[str, Any] = {"steps": STEPS, "samples": 1, "bins": BINS, "decisive": None}
    limited = analyse(tmp_path / "work", time_limit_s=1e6, **options)
    carried = {path.name for path in tmp_path.rglob("bin*.json") if "local" not in path.name}
    whole = analyse(tmp_path / "work", **options)
    assert {path.name for path in tmp_path.rglob("bin*.json") if "local" not in path.name} == carried
    assert {entry_of(effect) for effect in whole.effects} == {*everything(sweep_of("ddim"))}
    assert {effect.key: effect for effect in limited.effects} == {effect.key: effect for effect in whole.effects}


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_time_limit_that_leaves_no_time_is_refused(limit: float) -> None:
    with pytest.raises(ProfileError, match="a time limit must be above 0 seconds"):
        AnalysisOptions(time_limit_s=limit)


def test_fewer_than_no_decisive_ablations_are_refused() -> None:
    with pytest.raises(ProfileError, match="decisive must be at least 0, or None for all, got -1"):
        AnalysisOptions(decisive=-1)


@pytest.mark.parametrize("name", ["steps", "samples", "bins", "threads", "batch", "rounds"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ProfileError, match=f"{name} must be at least 1, got {value}"):
        AnalysisOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ProfileError, match=f"got {seed}"):
        AnalysisOptions(seed=seed)


KILLED = """
import json, os, shutil, signal, sys, time
from pathlib import Path

from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.bench import Bench
from unetc.artifacts.profile import ModelReference
from unetc.compiler.graph.gated import GatedGraph
from unetc.jobs import InProcess
from unetc.runtime.backends.registry import open_backend
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler

task = json.loads(sys.argv[1])
folder = Path(task["folder"])


def start(work, out):
    # the child inherits the imports, which take longer than the sweep; no import has started a thread
    if child := os.fork():
        return child
    try:
        options = AnalysisOptions(**task["options"])
        gated = GatedGraph.load(Path(task["gated"]))
        table = extract(make_scheduler(options.scheduler, task["config"]), options.steps)
        backend = open_backend("onnxruntime:cpu", threads=1)
        kind = table.prediction_type
        analyze(
            gated,
            ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel"),
            table,
            InProcess(bench=Bench.of(gated, backend, samples=options.samples, prediction_type=kind)),
            sample_shape=tuple(task["shape"]),
            options=options,
            work=work,
        ).save(out)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def finished():
    return len(list((folder / "killed").rglob("bin*.json")))


moments = []
for count, delay in task["kills"]:
    child = start(folder / "killed", folder / "killed.json")
    while finished() < count and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    moments.append(finished())
assert os.waitpid(start(folder / "killed", folder / "killed.json"), 0)[1] == 0
# times never repeat, so the other analysis gets the same ones
for timing in (folder / "killed").rglob("timing.json"):
    copy = folder / "whole" / timing.relative_to(folder / "killed")
    copy.parent.mkdir(parents=True)
    shutil.copy(timing, copy)
assert os.waitpid(start(folder / "whole", folder / "whole.json"), 0)[1] == 0
print(json.dumps({"moments": moments, "all": finished()}))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_a_sweep_killed_at_any_moment_ends_in_the_same_profile(tmp_path: Path) -> None:
    moments = random.Random(0)
    # the first kill hits loading or timing, the others hit the sweep or the writing of partial results
    kills = [(0, moments.uniform(0.05, 0.5)), *((count, moments.uniform(0, 0.03)) for count in (2, 5, 8))]
    components = ("mid_block.*",)  # some of the components, to save time
    task = {
        "folder": str(tmp_path),
        "gated": str(tiny().gated.folder),
        "options": {
            "steps": 6,
            "samples": 2,
            "bins": 3,
            "threads": 1,
            "batch": 1,
            "rounds": 1,
            "components": components,
        },
        "config": CONFIG,
        "shape": SHAPE,
        "kills": kills,
    }
    result = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(task)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    # most kills hit the middle, however fast the machine is
    assert sum(0 < moment < report["all"] for moment in report["moments"]) >= 2, report
    killed, whole = ((tmp_path / name).read_bytes() for name in ("killed.json", "whole.json"))
    assert Profile.from_json(killed, "killed").effects
    assert killed == whole
