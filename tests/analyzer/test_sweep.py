"""The sweep measures what a plain loop measures, continues where it was killed, and refuses what it cannot measure."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import Tiny, shared_folder, tiny_of
from unetc.analyzer import analysis
from unetc.analyzer.ablation import REMOVALS, REUSES, Ablation, PeriodicTreatment, ablations_of, treatments_for
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.cost import Costs
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.duration import Duration, predict_duration
from unetc.analyzer.sweep import FullTrajectory, Sweep, make_bins, recall_steps, run_base, run_sweep, sweep_calls
from unetc.artifacts.profile import STEP, Bin, Cost, Effect, Estimate, ModelReference, Profile
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.compiler.scheduler import extract, make_scheduler
from unetc.device import Device
from unetc.errors import ProfileError
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backends.registry import open_backend
from unetc.sampler.noise import initial_noise
from unetc.sampler.table import SchedulerTable
from unetc.treatments import Treatment

ARCHITECTURE = "attention"
SHAPE = (2, 16, 16)
SAMPLES, SEED = 2, 5
STEPS, BINS = 5, 2  # bins of 3 and 2 steps
CONFIG: Mapping[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

CLOSE = 5e-5
"""Largest difference between onnxruntime and torch, relative to what is compared: kernels that sum in another order
differ by 1e-6 per call, and five steps of an untrained denoiser enlarge that."""


@functools.cache
def tiny() -> Tiny:
    """Share one architecture between the tests of all files."""
    return tiny_of(ARCHITECTURE, shared_folder())


def table_of(scheduler: str, steps: int = STEPS) -> SchedulerTable:
    return extract(make_scheduler(scheduler, CONFIG), steps)


def backend() -> Backend:
    return open_backend("onnxruntime:cpu", threads=1)


def sweep_of(scheduler: str, *, on: Backend | None = None, **changes: Any) -> Sweep:
    gated, table = tiny().gated, table_of(scheduler)
    settings: dict[str, Any] = {
        "denoiser": GatedDenoiser(gated, on or backend()),
        "components": gated.components,
        "ablated": gated.components,
        "table": table,
        "bins": make_bins(table.log_snr, BINS),
        "sample_shape": SHAPE,
        "samples": SAMPLES,
        "seed": SEED,
        "rows": 5 * SAMPLES,  # not a divisor of the number of ablations: the last batch is smaller
    }
    return Sweep(**(settings | changes))


@dataclass
class Measured:
    """A sweep, what it gave and the folder of its partial results, which is to be copied and not changed."""

    sweep: Sweep
    base: FullTrajectory
    effects: tuple[Effect, ...]
    work: Path

    @property
    def damages(self) -> dict[tuple[str, PeriodicTreatment, int], float]:
        return {(e.component, kind_of(e), e.bin): e.relative_l2.mean for e in self.effects}


@functools.cache
def measured_with(scheduler: str) -> Measured:
    return measure(sweep_of(scheduler), Path(tempfile.mkdtemp(dir=shared_folder(), prefix="sweep-")))


@pytest.fixture(params=["ddim", "dpmsolver++"])
def measured(request: pytest.FixtureRequest) -> Measured:
    """Sweep once with a scheduler that looks at the last step only and once with one that has a history."""
    return measured_with(request.param)


@pytest.fixture
def ddim() -> Measured:
    return measured_with("ddim")


@pytest.fixture
def work(ddim: Measured, tmp_path: Path) -> Path:
    """A folder with the partial results of a finished sweep."""
    return Path(shutil.copytree(ddim.work, tmp_path / "work"))


def measure(sweep: Sweep, work: Path) -> Measured:
    base = run_base(sweep, ignore)
    return Measured(sweep=sweep, base=base, effects=run_sweep(sweep, base, everything(sweep), work, ignore), work=work)


def everything(sweep: Sweep) -> list[tuple[Ablation, int]]:
    """List every ablation in every bin that has a step for it, in no useful order."""
    return [
        (ablation, b)
        for ablation in ablations_of(sweep.components)
        for b in reversed(range(BINS))
        if any(step % ablation.periodic.period or not ablation.periodic.treatment.reuses for step in steps_of(b))
    ]


def steps_of(b: int) -> range:
    return (range(3), range(3, STEPS))[b]


def kind_of(effect: Effect) -> PeriodicTreatment:
    return PeriodicTreatment(treatment=effect.treatment, period=effect.period)


class Branches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every branch where it enters its gate, and lets other tensors take the place of some."""

    def __init__(self, instead: Mapping[int, torch.Tensor] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.instead = instead or {}
        self.seen: dict[int, torch.Tensor] = {}
        self.rows: dict[int, Array] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is torch.ops.unetc.gate.default:
            branch, gates, means, index, offset, axis = args
            self.seen[index] = branch
            self.rows[index] = branch.mean([i for i in range(branch.ndim) if i != axis]).numpy()
            args = (self.instead.get(index, branch), gates, means, index, offset, axis)
        return operator(*args, **(kwargs or {}))


@dataclass
class Naive:
    """Samples with the gated graph in torch and the scheduler of diffusers, one ablation at a time, from step 0."""

    scheduler: str
    means: NDArray[np.float32]
    """[bin, channel of all components]"""

    @torch.no_grad()
    def run(self, ablation: tuple[str, PeriodicTreatment] | None = None, steps: range = range(0)) -> list[Array]:
        """Sample with an ablation in some steps; return the state before every step and the last one."""
        components = tiny().gated.components
        scheduler: Any = make_scheduler(self.scheduler, CONFIG)
        scheduler.set_timesteps(STEPS)
        sample = torch.from_numpy(initial_noise(SEED, range(SAMPLES), SHAPE)) * scheduler.init_noise_sigma
        states = [sample.numpy()]
        computed: list[tuple[float, torch.Tensor]] = []
        for step, timestep in enumerate(scheduler.timesteps):
            gates = np.zeros((SAMPLES, len(components), 2), np.float32)
            gates[..., 0] = 1
            instead: dict[int, torch.Tensor] = {}
            index = -1
            if ablation is not None:
                name, kind = ablation
                (index,) = (component.index for component in components if component.name == name)
                if step in steps and not kind.treatment.reuses:
                    gates[:, index] = {Treatment.DROP: (0, 0), Treatment.MEAN: (0, 1)}[kind.treatment]
                elif step in steps and step % kind.period:
                    instead[index] = self.recalled(computed, kind, float(timestep))
            with Branches(instead) as branches:
                prediction = tiny().reference(
                    scheduler.scale_model_input(sample, timestep),
                    torch.full((SAMPLES,), float(timestep)),
                    torch.from_numpy(gates),
                    torch.from_numpy(self.means[0 if step < 3 else 1]),
                )
            if ablation is not None and step % ablation[1].period == 0:
                computed.append((float(timestep), branches.seen[index]))
            sample = scheduler.step(prediction, timestep, sample).prev_sample
            states.append(sample.numpy())
        return states

    @staticmethod
    def recalled(
        computed: Sequence[tuple[float, torch.Tensor]], kind: PeriodicTreatment, timestep: float
    ) -> torch.Tensor:
        """Give the branch of the last refresh, or what the last two lead to on a straight line."""
        at, latest = computed[-1]
        if kind.treatment is Treatment.HOLD or len(computed) < 2:
            return latest
        before, earlier = computed[-2]
        return latest + (timestep - at) / (at - before) * (latest - earlier)

    @torch.no_grad()
    def branch_means(self, states: Sequence[Array]) -> NDArray[np.float32]:
        """Average the branches of the full model over samples, positions and the steps of each bin."""
        scheduler: Any = make_scheduler(self.scheduler, CONFIG)
        scheduler.set_timesteps(STEPS)
        count = len(tiny().gated.components)
        rows = []
        for state, timestep in zip(states, scheduler.timesteps, strict=False):
            gates = torch.ones(SAMPLES, count, 2) * torch.tensor([1.0, 0.0])
            with Branches() as seen:
                sample = scheduler.scale_model_input(torch.from_numpy(state), timestep)
                tiny().reference(
                    sample, torch.full((SAMPLES,), float(timestep)), gates, torch.zeros(tiny().gated.channels)
                )
            rows.append(np.concatenate([seen.rows[i] for i in range(count)]))
        return np.stack([np.mean(rows[:3], axis=0), np.mean(rows[3:], axis=0)])


def naive_of(measured: Measured) -> Naive:
    scheduler = "ddim" if measured.sweep.table.window == 1 else "dpmsolver++"
    return Naive(scheduler=scheduler, means=measured.base.means)


def relative_l2(reference: Array, candidate: Array) -> float:
    """Average over samples, written out."""
    norms = [np.linalg.norm(c - r) / np.linalg.norm(r) for r, c in zip(reference, candidate, strict=True)]
    return float(np.mean(norms))


def test_there_is_one_effect_for_every_ablation_that_was_asked_for(measured: Measured) -> None:
    found = [(Ablation(component=e.component, periodic=kind_of(e)), e.bin) for e in measured.effects]
    assert len(found) == len(everything(measured.sweep))
    assert {*found} == {*everything(measured.sweep)}
    assert all(effect.measured for effect in measured.effects)
    for effect in measured.effects:
        assert effect.relative_l2.low <= effect.relative_l2.mean <= effect.relative_l2.high


def test_only_what_was_chosen_is_measured_and_the_same_as_among_others(ddim: Measured, tmp_path: Path) -> None:
    chosen = everything(ddim.sweep)[::7]
    effects = run_sweep(ddim.sweep, ddim.base, chosen, tmp_path, ignore)
    assert {(e.component, kind_of(e), e.bin) for e in effects} == {(a.component, a.periodic, b) for a, b in chosen}
    for effect in effects:
        # other batches may sum in another order
        expected = ddim.damages[effect.component, kind_of(effect), effect.bin]
        assert effect.relative_l2.mean == pytest.approx(expected, abs=1e-4)
    assert run_sweep(ddim.sweep, ddim.base, (), tmp_path, ignore) == ()


def test_every_component_is_removed_and_reused_but_the_step_is_reused_only() -> None:
    components = tiny().gated.components
    whole = [component for component in components if component.kind == "step"]
    assert [component.name for component in whole] == [STEP]
    assert treatments_for(whole[0]) == REUSES
    for component in components:
        if component.kind != "step":
            assert treatments_for(component) == REMOVALS + REUSES
    assert {(kind.treatment, kind.period) for kind in REMOVALS} == {(Treatment.DROP, 1), (Treatment.MEAN, 1)}
    assert {(kind.treatment, kind.period) for kind in REUSES} == {
        (treatment, period) for treatment in (Treatment.HOLD, Treatment.FORECAST) for period in (2, 4)
    }
    ablations = ablations_of(components)
    assert {*ablations} == {Ablation(component=c.name, periodic=kind) for c in components for kind in treatments_for(c)}
    assert len({*ablations}) == len(ablations)
    # those of one kind stand together, so that they can share a batch
    assert len([kind for kind, _ in groupby(ablations, lambda a: a.periodic)]) == len(REMOVALS + REUSES)


@pytest.mark.parametrize("kind", REMOVALS + REUSES, ids=str)
def test_the_share_of_a_kind_is_that_of_the_steps_it_treats(kind: PeriodicTreatment) -> None:
    treated = [kind.treats(step) for step in range(40)]
    assert np.mean(treated) == kind.share
    assert [step for step in range(40) if not treated[step]] == (
        list(range(0, 40, kind.period)) if kind.treatment.reuses else []
    )


@pytest.mark.parametrize(
    ("period", "first", "expected"),
    [
        (2, 0, ()),
        (2, 1, (0,)),
        (2, 2, (0,)),
        (2, 3, (0, 2)),
        (2, 8, (4, 6)),
        (4, 4, (0,)),
        (4, 5, (0, 4)),
        (4, 20, (12, 16)),
    ],
)
def test_what_is_remembered_are_the_last_two_refreshes(period: int, first: int, expected: tuple[int, ...]) -> None:
    assert recall_steps(PeriodicTreatment(treatment=Treatment.FORECAST, period=period), first) == expected


def test_the_states_are_the_full_models_trajectory(measured: Measured) -> None:
    states = naive_of(measured).run()
    scale = np.abs(states[-1]).max()
    assert len(measured.base.states) == STEPS + 1
    for step, state in enumerate(measured.base.states):
        history = [states[at] for at in range(step, -1, -1)][: measured.sweep.table.window]
        assert len(state.samples) == len(history)
        for sample, expected in zip(state.samples, history, strict=True):
            np.testing.assert_allclose(sample, expected, atol=CLOSE * scale)
    np.testing.assert_allclose(measured.base.final, states[-1], atol=CLOSE * scale)


def test_means_are_the_branches_averaged_over_samples_positions_and_steps(measured: Measured) -> None:
    naive = naive_of(measured)
    expected = naive.branch_means(naive.run()[:-1])
    np.testing.assert_allclose(measured.base.means, expected, atol=CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("kind", REMOVALS + REUSES, ids=lambda kind: f"{kind.treatment}{kind.period}")
def test_effects_are_those_of_a_loop_over_single_ablations(measured: Measured, kind: PeriodicTreatment) -> None:
    naive = naive_of(measured)
    full = naive.run()[-1]
    own = [effect for effect in measured.effects if kind_of(effect) == kind]
    chosen = [*own[::4], *(effect for effect in own if effect.component == STEP)]  # meets all bins
    assert {effect.bin for effect in chosen} == {0, 1}
    for effect in chosen:
        expected = relative_l2(full, naive.run((effect.component, kind), steps_of(effect.bin))[-1])
        assert effect.relative_l2.mean == pytest.approx(expected, abs=CLOSE), effect
    # the comparison means something: most ablations do much more than the tolerance; reuse for one step is the gentlest
    damages = np.array([effect.relative_l2.mean for effect in chosen])
    assert (damages > 10 * CLOSE).mean() > (0.8 if kind in REMOVALS else 0.6)


def differing(measured: Measured, one: PeriodicTreatment, other: PeriodicTreatment, b: int) -> float:
    """Share of the components that two kinds of ablation harm differently in a bin."""
    pairs = [
        (damage, measured.damages[name, other, b])
        for (name, kind, at), damage in measured.damages.items()
        if (kind, at) == (one, b) and (name, other, b) in measured.damages
    ]
    return float(np.mean([left != right for left, right in pairs]))


def test_kinds_differ(ddim: Measured) -> None:
    drop, mean = REMOVALS
    hold, rarely, forecast, _ = REUSES
    assert differing(ddim, drop, mean, 0) > 0.9
    assert differing(ddim, drop, hold, 0) > 0.9
    assert differing(ddim, hold, rarely, 0) > 0.9
    assert differing(ddim, hold, forecast, 1) > 0.9
    # after a single refresh there is no line to follow
    assert differing(ddim, hold, forecast, 0) == 0


class Recorder:
    """A backend that notes what its programs are called with."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.calls: list[dict[str, Any]] = []
        """Inputs of every call; those that are tensors of the backend as they are."""

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._inner.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        program = self._loader.load(graph)

        def run(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
            self.calls.append(
                {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
            )
            return program(inputs, output)

        return run

    @property
    def device(self) -> Device:
        return self._inner.device


def test_a_removal_touches_the_steps_of_its_bin_only(tmp_path: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = [(ablation, b) for ablation, b in everything(swept) if ablation.periodic in REMOVALS]
    effects = run_sweep(swept, base, chosen, tmp_path, ignore)
    timesteps = swept.table.timesteps.tolist()
    calls = iter(recorder.calls)
    for (b, treatment), group in groupby(effects, lambda e: (e.bin, e.treatment)):
        names = [effect.component for effect in group]
        for start in range(0, len(names), 5):
            batch = names[start : start + 5]
            for step in range(steps_of(b)[0], STEPS):
                call = next(calls)
                assert set(call["timestep"].tolist()) == {timesteps[step]}
                np.testing.assert_array_equal(call["means"], base.means[b])
                gates = call["gates"].reshape(len(batch), SAMPLES, len(swept.components), 2)
                for row, name in zip(gates, batch, strict=True):
                    changed = [
                        component.name for component in swept.components if (row[:, component.index] != [1, 0]).any()
                    ]
                    assert changed == ([name] if step in steps_of(b) else [])
                    (index,) = (c.index for c in swept.components if c.name == name)
                    if step in steps_of(b):
                        assert (row[:, index] == [0, treatment is Treatment.MEAN]).all()
    assert next(calls, None) is None


@pytest.mark.parametrize("kind", REUSES, ids=lambda kind: f"{kind.treatment}{kind.period}")
def test_a_reuse_refreshes_with_its_period_and_touches_the_steps_of_its_bin_only(
    tmp_path: Path, kind: PeriodicTreatment
) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = [(ablation, b) for ablation, b in everything(swept) if ablation.periodic == kind]
    effects = run_sweep(swept, base, chosen, tmp_path, ignore)
    timesteps = swept.table.timesteps.tolist()
    calls = iter(recorder.calls)
    for b, group in groupby(effects, lambda e: e.bin):
        names = [effect.component for effect in group]
        for start in range(0, len(names), 5):
            batch = names[start : start + 5]
            refreshes = [step for step in range(steps_of(b)[0]) if step % kind.period == 0][-2:]
            for step in (*refreshes, *range(steps_of(b)[0], STEPS)):
                call = next(calls)
                assert set(call["timestep"].tolist()) == {timesteps[step]}
                if step in steps_of(b) and step % kind.period:
                    holds = call["holds"].reshape(len(batch), SAMPLES, len(swept.components))
                    for row, name in zip(holds, batch, strict=True):
                        marked = {c.name for c in swept.components if row[:, c.index].all()}
                        assert marked == {name}
                        assert row.sum() == SAMPLES
                else:
                    assert "holds" not in call
    assert next(calls, None) is None


def test_calls_are_counted_as_they_are_made(tmp_path: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = everything(swept)[::3]
    run_sweep(swept, base, chosen, tmp_path, ignore)
    rows = sum(len(call["sample"]) for call in recorder.calls)
    assert sweep_calls(swept, chosen) == rows / SAMPLES


def test_an_ablation_that_only_refreshes_does_no_damage_to_a_stochastic_trajectory(tmp_path: Path) -> None:
    table = table_of("ddpm")
    assert table.noise_coefficient.any()
    swept = sweep_of("ddpm", bins=make_bins(table.log_snr, STEPS))  # of one step each
    chosen = [
        (Ablation(component=component.name, periodic=kind), b)
        for component in swept.components
        for kind in REUSES
        for b in range(0, STEPS, kind.period)
    ]
    effects = run_sweep(swept, run_base(swept, ignore), chosen, tmp_path, ignore)
    assert len(effects) == len(chosen)
    # the same denoiser on the same noise; a batch of another size may sum in another order
    assert max(effect.relative_l2.high for effect in effects) < 1e-4


def test_a_stochastic_trajectory_has_noise_of_its_own_for_every_sample_and_seed(tmp_path: Path) -> None:
    finals = [run_base(sweep_of("ddpm", seed=seed), ignore).final for seed in (5, 5, 6)]
    assert relative_l2(finals[0], finals[1]) == 0
    assert relative_l2(finals[0], finals[2]) > 0.1
    assert relative_l2(finals[0][:1], finals[0][1:]) > 0.1


def test_seeds_matter(ddim: Measured, tmp_path: Path) -> None:
    other = measure(sweep_of("ddim", seed=SEED + 1), tmp_path)
    pairs = zip(ddim.effects, other.effects, strict=True)
    assert all(left.relative_l2 != right.relative_l2 for left, right in pairs)


def test_batches_do_not_change_what_is_measured(ddim: Measured, tmp_path: Path) -> None:
    alone = dataclasses.replace(ddim.sweep, rows=1)
    chosen = everything(alone)[::3]
    assert {b for _, b in chosen} == {0, 1}
    assert {ablation.periodic for ablation, _ in chosen} == {*REMOVALS, *REUSES}
    one_by_one = run_sweep(alone, ddim.base, chosen, tmp_path, ignore)
    assert len(one_by_one) == len(chosen)
    for effect in one_by_one:  # a batch of another size may sum in another order
        expected = ddim.damages[effect.component, kind_of(effect), effect.bin]
        assert effect.relative_l2.mean == pytest.approx(expected, abs=1e-4)


def test_more_samples_leave_the_first_ones_as_they_are() -> None:
    few, more = (run_base(sweep_of("ddim", samples=samples), ignore) for samples in (SAMPLES, SAMPLES + 3))
    np.testing.assert_allclose(more.final[:SAMPLES], few.final, atol=1e-5)  # another batch size, another order of sums


def test_a_finished_sweep_is_read_and_not_run(ddim: Measured, work: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    assert run_sweep(swept, ddim.base, everything(swept), work, ignore) == ddim.effects
    assert recorder.calls == []


DAMAGES: Mapping[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda own, other: b"",
    "truncated": lambda own, other: own[: len(own) // 2],
    "not text": lambda own, other: own.replace(b"drop", b"\xff\xfe\xfd\xfc"),
    "of nothing": lambda own, other: b"[]",
    "one effect less": lambda own, other: json.dumps(json.loads(own)[1:]).encode(),
    "of another batch": lambda own, other: other,
    "of another bin": lambda own, other: own.replace(b'"bin":0', b'"bin":1'),
    "of another treatment": lambda own, other: own.replace(b'"drop"', b'"mean"'),
    "not a number": lambda own, other: own.replace(b'"low":', b'"low":1e999,"old":'),
    "out of order": lambda own, other: own.replace(b'"high":', b'"high":-1,"old":'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_partial_result_is_measured_again(
    ddim: Measured, work: Path, damage: Callable[[bytes, bytes], bytes]
) -> None:
    first, second, *_ = sorted(work.iterdir())
    whole = first.read_bytes()
    first.write_bytes(damage(whole, second.read_bytes()))
    assert run_sweep(ddim.sweep, ddim.base, everything(ddim.sweep), work, ignore) == ddim.effects
    assert first.read_bytes() == whole


def test_progress_rises_to_the_end(ddim: Measured, tmp_path: Path) -> None:
    reports: list[Progress] = []
    run_base(ddim.sweep, reports.append)
    run_sweep(ddim.sweep, ddim.base, everything(ddim.sweep)[::7], tmp_path, reports.append)
    for stage in ("full model", "ablations"):
        done = [report.done for report in reports if report.stage == stage]
        assert done == sorted(set(done))
        assert done[-1] == next(report.total for report in reports if report.stage == stage)


def estimate_of(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


REFERENCE = ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel")


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the timing, which is tested elsewhere."""

    def measure_costs(gated: GatedGraph, *_: object, **__: object) -> Costs:
        # what comes later saves more, so that what is decisive is not what comes first
        saved = [1 + component.index for component in gated.components]
        costs = (
            Cost(component=c.name, saved_ms=estimate_of(s), freed_bytes=0)
            for c, s in zip(gated.components, saved, strict=True)
        )
        return Costs(full_ms=estimate_of(100.0), full_bytes=1, costs=tuple(costs))

    monkeypatch.setattr(analysis, "measure_costs", measure_costs)


def analyse(
    work: Path,
    gated: GatedGraph | None = None,
    on: Backend | None = None,
    on_progress: OnProgress = ignore,
    **changes: Any,
) -> Profile:
    options = AnalysisOptions(**({"steps": 2, "samples": 1, "bins": 1, "threads": 1} | changes))
    return analyze(
        gated or tiny().gated,
        REFERENCE,
        table_of(options.scheduler, options.steps),
        on or backend(),
        sample_shape=SHAPE,
        options=options,
        work=work,
        on_progress=on_progress,
    )


@functools.cache
def plain() -> tuple[Profile, Path]:
    """Analyse with no options; the folder of the partial results is to be copied and not changed."""
    work = Path(tempfile.mkdtemp(dir=shared_folder(), prefix="analysis-"))
    return analyse(work), work


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"samples": 2},
        {"bins": 2},
        {"steps": 3},
        {"scheduler": "dpmsolver++"},
        {"decisive": 3},
        {"decisive": None},
    ],
    ids=str,
)
def test_other_options_do_not_take_over_partial_results(tmp_path: Path, change: dict[str, Any]) -> None:
    before, finished = plain()
    work = Path(shutil.copytree(finished, tmp_path / "shared"))
    changed = analyse(work, **change)
    assert changed.effects != before.effects
    assert changed == analyse(tmp_path / "fresh", **change)
    assert analyse(work) == before


@pytest.mark.usefixtures("no_timing")
def test_damages_of_another_target_are_measured_anew(tmp_path: Path) -> None:
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

    monkeypatch.setattr(analysis, "measure_costs", measure_costs)
    monkeypatch.setattr(analysis, "run_sweep", lambda *_: ())
    profile_of = functools.partial(analyse, decisive=None)  # without the screen, which is tested elsewhere
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
    timing.write_bytes(whole.replace(b'"full_bytes":1,', b""))  # as before weights were counted
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
    with pytest.raises(ProfileError, match=r"NaN or infinity at timestep \d+\. Check that the weights are finite\."):
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
@pytest.mark.parametrize("decisive", [0, 4, None])
def test_the_price_of_an_analysis_are_the_calls_it_makes(tmp_path: Path, decisive: int | None) -> None:
    recorder = Recorder(backend())
    profile = analyse(tmp_path, on=recorder, steps=STEPS, samples=SAMPLES, bins=BINS, decisive=decisive)
    rows = sum(len(call["sample"]) for call in recorder.calls)
    assert profile.samplings == pytest.approx(rows / SAMPLES / STEPS)


@pytest.mark.usefixtures("no_timing")
@pytest.mark.parametrize("decisive", [0, 4, None])
def test_its_duration_is_told_beforehand(tmp_path: Path, decisive: int | None) -> None:
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
    # which ablations are decisive is not known beforehand; their calls are averages
    assert told.seconds == pytest.approx(profile.samplings * STEPS * SAMPLES, rel=0.05 if decisive else 1e-9)
    limited = predict_duration(sweep, screened=True, decisive=None, limit_s=1.0, sample_ms=1e9)
    without = predict_duration(sweep, screened=True, decisive=0, limit_s=1.0, sample_ms=1e9)
    assert limited.seconds == without.seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"), (7200, "2 hours")],
)
def test_a_duration_is_said_in_words(seconds: float, words: str) -> None:
    duration = Duration(seconds=seconds, probes=1616, ablations=80)
    assert str(duration) == f"about {words}: 1,616 local probes, 80 ablations to the final output"


@pytest.mark.usefixtures("no_timing")
def test_without_ablations_everything_is_estimated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": STEPS, "samples": SAMPLES, "bins": BINS}
    profile = analyse(tmp_path, decisive=0, **options)
    assert not any(effect.measured for effect in profile.effects)
    assert {(e.component, kind_of(e), e.bin) for e in profile.effects} == {
        (a.component, a.periodic, b) for a, b in everything(sweep_of("ddim"))
    }
    for effect in profile.effects:  # wide: nothing has told what a local error does
        assert effect.relative_l2.high >= 2 * effect.relative_l2.mean


def test_only_components_that_match_and_the_step_are_ablated(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch": 1, "rounds": 1}
    for pattern in ("mid_block.*", "*.attentions.0"):
        profile = analyse(tmp_path, components=(pattern,), **options)
        names = {c.name for c in tiny().gated.components if fnmatchcase(c.name, pattern)} | {STEP}
        assert 1 < len(names) < len(tiny().gated.components)
        assert {cost.component for cost in profile.costs} == {effect.component for effect in profile.effects} == names
        assert profile.components == tiny().gated.components
    # an analysis of all does not take them over for its own
    whole = analyse(tmp_path, **options)
    assert len(whole.costs) == len(whole.components)
    assert {effect.component for effect in whole.effects} == {component.name for component in whole.components}


def test_a_pattern_that_matches_nothing_is_refused_with_close_names(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no component matches 'midblock.resnets.0'. Close names: mid_block.resnet"):
        analyse(tmp_path, components=("mid_block.*", "midblock.resnets.0"))


class Clock:
    """Time that passes only when a program is called: a second per sample."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self._inner = backend()

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._inner.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        program = self._loader.load(graph)

        def run(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
            self.now += len(output)
            return program(inputs, output)

        return run

    @property
    def device(self) -> Device:
        return self._inner.device


@pytest.mark.usefixtures("no_timing")
def test_what_a_time_limit_leaves_is_estimated_and_measured_by_a_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 4, "samples": 2, "bins": 2, "decisive": 6}
    clock = Clock(monkeypatch)

    def run(folder: str, limit_s: float) -> tuple[Profile, float]:
        start = clock.now
        profile = analyse(tmp_path / folder, on=clock, time_limit_s=limit_s, **options)
        return profile, clock.now - start

    whole, spent = run("whole", math.inf)
    screened, least = run("none", 1.0)
    assert not any(effect.measured for effect in screened.effects)
    some, took = run("some", (spent + least) / 2)
    assert took < spent
    measured, all_measured = ({e for e in p.effects if e.measured} for p in (some, whole))
    assert measured < all_measured
    assert {effect.bin for effect in measured} == {0, 1}  # the bins take turns
    assert len(some.effects) == len(whole.effects)
    later, rest = run("some", math.inf)
    assert later == whole
    assert rest < spent
    assert run("some", 1.0)[0] == whole  # what was measured is used, whatever the limit


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
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


def test_more_bins_than_steps_are_refused() -> None:
    AnalysisOptions(steps=5, bins=5)
    with pytest.raises(ProfileError, match="cannot cut 5 steps into 6 bins"):
        AnalysisOptions(steps=5, bins=6)


levels = st.lists(st.floats(1e-3, 5.0), min_size=1, max_size=60).map(lambda gaps: np.cumsum(gaps) - 10.0)


@given(levels=levels, count=st.integers(1, 12))
def test_bins_share_the_steps_evenly_and_name_the_bin_of_every_step(levels: NDArray[np.float64], count: int) -> None:
    bins = make_bins(levels, count)
    assert len(bins) == min(count, len(levels))
    sizes = [bin.steps for bin in bins]
    assert sum(sizes) == len(levels)
    assert max(sizes) - min(sizes) <= 1
    assert all(left.high == right.low for left, right in pairwise(bins))
    assert all(bin.low < bin.high for bin in bins)
    profile = bare_profile(bins)
    assert [profile.bin_of(level) for level in levels] == [b for b, size in enumerate(sizes) for _ in range(size)]
    assert (profile.bin_of(-1e9), profile.bin_of(1e9)) == (0, len(bins) - 1)


def bare_profile(bins: tuple[Bin, ...]) -> Profile:
    return Profile(
        unetc="0",
        model=REFERENCE,
        scheduler="ddim",
        steps=sum(bin.steps for bin in bins),
        samples=1,
        seed=0,
        target="null",
        threads=1,
        batch=1,
        sample_shape=SHAPE,
        components=(),
        bins=bins,
        full_ms=estimate_of(1.0),
        full_bytes=1,
        costs=(),
        effects=(),
        samplings=1.0,
        means=(b"",) * len(bins),
    )


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
@pytest.mark.parametrize("steps", [8, 25, 50])
def test_bins_of_a_real_schedule_begin_at_its_first_step(scheduler: str, steps: int) -> None:
    table = table_of(scheduler, steps)
    bins = make_bins(table.log_snr, 8)
    assert bins[0].low == table.log_snr[0]
    assert [bin.steps for bin in bins] == sorted((bin.steps for bin in bins), reverse=True)


KILLED = """
import json, os, shutil, signal, sys, time
from pathlib import Path

from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.cost import Costs
from unetc.artifacts.profile import ModelReference
from unetc.compiler.graph.gated import GatedGraph
from unetc.runtime.backends.registry import open_backend
from unetc.compiler.scheduler import extract, make_scheduler

task = json.loads(sys.argv[1])
folder = Path(task["folder"])


def start(work, out):
    # a child that inherits the imports, which take longer than the sweep; none of them has started a thread
    if child := os.fork():
        return child
    try:
        options = AnalysisOptions(**task["options"])
        analyze(
            GatedGraph.load(Path(task["gated"])),
            ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel"),
            extract(make_scheduler(options.scheduler, task["config"]), options.steps),
            open_backend("onnxruntime:cpu", threads=1),
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
# time is the one thing that never repeats: the other analysis gets the same times
for timing in (folder / "killed").rglob("timing.json"):
    copy = folder / "whole" / timing.relative_to(folder / "killed")
    copy.parent.mkdir(parents=True)
    shutil.copy(timing, copy)
assert os.waitpid(start(folder / "whole", folder / "whole.json"), 0)[1] == 0
print(json.dumps({"moments": moments, "all": finished()}))
"""


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_ends_in_the_same_profile(tmp_path: Path) -> None:
    moments = random.Random(0)
    # the first kill falls into loading or timing, the others between or into the writing of partial results
    kills = [(0, moments.uniform(0.05, 0.5)), *((count, moments.uniform(0, 0.03)) for count in (2, 5, 8))]
    components = ("mid_block.*", "*.resnets.0")  # half of them, to be timed sooner
    task = {
        "folder": str(tmp_path),
        "gated": str(tiny().gated.folder),
        "options": {
            "steps": 6,
            "samples": 4,
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
    # most kills came in the middle, however fast the machine is
    assert sum(0 < moment < report["all"] for moment in report["moments"]) >= 2, report
    killed, whole = ((tmp_path / name).read_bytes() for name in ("killed.json", "whole.json"))
    assert Profile.from_json(killed, "killed").effects
    assert killed == whole
