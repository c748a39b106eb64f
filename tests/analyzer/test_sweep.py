"""A sweep measures the same as a plain loop, resumes after a crash, and calls the model as often as it predicts."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from tests.analyzer.sweeps import (
    CONFIG,
    REMOVALS,
    REUSES,
    SAMPLES,
    SEED,
    SHAPE,
    STEPS,
    Recorder,
    along,
    backend,
    everything,
    kind_of,
    relative_l2,
    steps_of,
    sweep_of,
    table_of,
    tiny,
)
from tests.every_day import every_nth
from tests.models import shared_folder
from unetc.analyzer.ablation import Ablation, PeriodicTreatment, ablations_of, treatments_for
from unetc.analyzer.sweep import (
    FullTrajectory,
    Sweep,
    _batches,
    make_bins,
    recall_steps,
    run_base,
    run_sweep,
    sweep_calls,
)
from unetc.artifacts.profile import STEP, Effect
from unetc.backend import Array
from unetc.compiler.schedulers.make import make_scheduler
from unetc.progress import Progress, ignore
from unetc.sampler.noise import initial_noise
from unetc.treatments import Treatment

CLOSE = 5e-5
"""Largest difference between onnxruntime and torch, relative to the compared values. Kernels sum in different orders
and differ by 1e-6 per call, and five steps of an untrained denoiser amplify that."""


@dataclass
class Measured:
    """A sweep with its results, and the folder of its partial results, which tests must copy before changing it."""

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
    """Sweep once with a scheduler that uses only the last step, and once with a scheduler that keeps a history."""
    return measured_with(request.param)


@pytest.fixture
def ddim() -> Measured:
    return measured_with("ddim")


@pytest.fixture
def work(ddim: Measured, tmp_path: Path) -> Path:
    """Copy the partial results of a finished sweep."""
    return Path(shutil.copytree(ddim.work, tmp_path / "work"))


def measure(sweep: Sweep, work: Path) -> Measured:
    base = run_base(sweep, ignore)
    effects = run_sweep(along(sweep, base), sweep, everything(sweep), work, ignore).effects
    return Measured(sweep=sweep, base=base, effects=effects, work=work)


class Branches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every branch at its gate, and replaces some of them by other tensors."""

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
    """Samples with the gated graph in torch and a diffusers scheduler, one ablation at a time, from step 0."""

    scheduler: str
    means: NDArray[np.float32]
    """Shape `[bin, channel of all components]`."""

    @torch.no_grad()
    def run(self, ablation: tuple[str, PeriodicTreatment] | None = None, steps: range = range(0)) -> list[Array]:
        """Sample with an ablation at some steps; return the state before every step and the last one."""
        components = tiny().gated.components
        scheduler: Any = make_scheduler(self.scheduler, CONFIG)
        scheduler.set_timesteps(STEPS)
        sample = torch.from_numpy(initial_noise(SEED, range(SAMPLES), SHAPE)) * scheduler.init_noise_sigma
        states = [sample.numpy()]
        computed: list[tuple[float, torch.Tensor, torch.Tensor, float]] = []
        for step, timestep in enumerate(scheduler.timesteps):
            gates = np.zeros((SAMPLES, len(components), 2), np.float32)
            gates[..., 0] = 1
            instead: dict[int, torch.Tensor] = {}
            index = -1
            seen = scheduler.scale_model_input(sample, timestep)
            signal = float(scheduler.alphas_cumprod[int(timestep)])
            if ablation is not None:
                name, kind = ablation
                (index,) = (component.index for component in components if component.name == name)
                if step in steps and not kind.treatment.reuses:
                    gates[:, index] = {Treatment.DROP: (0, 0), Treatment.MEAN: (0, 1)}[kind.treatment]
                elif step in steps and step % kind.period:
                    instead[index] = self.recalled(computed, kind, float(timestep), seen, signal)
            with Branches(instead) as branches:
                prediction = tiny().reference(
                    seen,
                    torch.full((SAMPLES,), float(timestep)),
                    torch.from_numpy(gates),
                    torch.from_numpy(self.means[0 if step < 3 else 1]),
                )
            if ablation is not None and step % ablation[1].period == 0:
                computed.append((float(timestep), branches.seen[index], seen, signal))
            sample = scheduler.step(prediction, timestep, sample).prev_sample
            states.append(sample.numpy())
        return states

    @staticmethod
    def recalled(
        computed: Sequence[tuple[float, torch.Tensor, torch.Tensor, float]],
        kind: PeriodicTreatment,
        timestep: float,
        seen: torch.Tensor,
        signal: float,
    ) -> torch.Tensor:
        """Return the branch of the last refresh, or extrapolate the last two linearly; or do so with x0."""
        x0 = kind.treatment in (Treatment.HOLD_X0, Treatment.FORECAST_X0)
        values = [
            (at, (sample - (1 - own) ** 0.5 * noise) / own**0.5 if x0 else noise) for at, noise, sample, own in computed
        ]
        at, result = values[-1]
        if kind.treatment in (Treatment.FORECAST, Treatment.FORECAST_X0) and len(values) > 1:
            before, earlier = values[-2]
            result = result + (timestep - at) / (at - before) * (result - earlier)
        return (seen - signal**0.5 * result) / (1 - signal) ** 0.5 if x0 else result

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


def test_there_is_one_effect_for_every_requested_ablation(measured: Measured) -> None:
    found = [(Ablation(component=e.component, periodic=kind_of(e)), e.bin) for e in measured.effects]
    assert len(found) == len(everything(measured.sweep))
    assert {*found} == {*everything(measured.sweep)}
    assert all(effect.measured for effect in measured.effects)
    for effect in measured.effects:
        assert effect.relative_l2.low <= effect.relative_l2.mean <= effect.relative_l2.high


def test_only_chosen_ablations_are_measured_with_the_same_result_as_among_all(ddim: Measured, tmp_path: Path) -> None:
    chosen = everything(ddim.sweep)[::7]
    effects = run_sweep(along(ddim.sweep, ddim.base), ddim.sweep, chosen, tmp_path, ignore).effects
    assert {(e.component, kind_of(e), e.bin) for e in effects} == {(a.component, a.periodic, b) for a, b in chosen}
    for effect in effects:
        # another batch may sum in another order
        expected = ddim.damages[effect.component, kind_of(effect), effect.bin]
        assert effect.relative_l2.mean == pytest.approx(expected, abs=1e-4)
    assert run_sweep(along(ddim.sweep, ddim.base), ddim.sweep, (), tmp_path, ignore).all == ()


def test_every_component_is_removed_and_reused_but_the_step_is_reused_only() -> None:
    components = tiny().gated.components
    whole = [component for component in components if component.kind == "step"]
    assert [component.name for component in whole] == [STEP]
    of_branches = tuple(kind for kind in REUSES if not kind.treatment.row.of_x0)
    assert treatments_for(whole[0], denoises=True) == REUSES
    assert treatments_for(whole[0], denoises=False) == of_branches
    for component in components:
        if component.kind != "step":
            assert treatments_for(component, denoises=True) == REMOVALS + of_branches
    assert {(kind.treatment, kind.period) for kind in REMOVALS} == {(Treatment.DROP, 1), (Treatment.MEAN, 1)}
    assert {(kind.treatment, kind.period) for kind in REUSES} == {
        (Treatment(name), period) for name in ("hold", "forecast", "hold_x0", "forecast_x0") for period in (2, 4)
    }
    ablations = ablations_of(components, denoises=True)
    assert {*ablations} == {
        Ablation(component=c.name, periodic=kind) for c in components for kind in treatments_for(c, denoises=True)
    }
    assert len({*ablations}) == len(ablations)
    # ablations of one kind are adjacent, so that they can share a batch
    assert len([kind for kind, _ in groupby(ablations, lambda a: a.periodic)]) == len(REMOVALS + REUSES)


@pytest.mark.parametrize("kind", REMOVALS + REUSES, ids=str)
def test_the_share_of_a_kind_is_the_share_of_steps_it_treats(kind: PeriodicTreatment) -> None:
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
def test_the_last_two_refreshes_are_remembered(period: int, first: int, expected: tuple[int, ...]) -> None:
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


@pytest.mark.parametrize(
    "kind", every_nth(3, REMOVALS[::-1] + REUSES), ids=lambda kind: f"{kind.treatment}{kind.period}"
)
def test_effects_equal_a_loop_over_single_ablations(measured: Measured, kind: PeriodicTreatment) -> None:
    naive = naive_of(measured)
    full = naive.run()[-1]
    own = [effect for effect in measured.effects if kind_of(effect) == kind]
    chosen = [*own[::4], *(effect for effect in own if effect.component == STEP)]  # includes all bins
    assert {effect.bin for effect in chosen} == {0, 1}
    for effect in chosen:
        expected = relative_l2(full, naive.run((effect.component, kind), steps_of(effect.bin))[-1])
        assert effect.relative_l2.mean == pytest.approx(expected, abs=CLOSE), effect
    # the comparison is meaningful: most damages far exceed the tolerance; reuse for one step does the least
    damages = np.array([effect.relative_l2.mean for effect in chosen])
    assert (damages > 10 * CLOSE).mean() > (0.8 if kind in REMOVALS else 0.6)


def differing(measured: Measured, one: PeriodicTreatment, other: PeriodicTreatment, b: int) -> float:
    """Compute the share of components whose damage in a bin differs between two kinds of ablation."""
    pairs = [
        (damage, measured.damages[name, other, b])
        for (name, kind, at), damage in measured.damages.items()
        if (kind, at) == (one, b) and (name, other, b) in measured.damages
    ]
    return float(np.mean([left != right for left, right in pairs]))


def test_kinds_differ(ddim: Measured) -> None:
    drop, mean = REMOVALS
    hold, rarely, forecast, *_ = REUSES
    assert differing(ddim, drop, mean, 0) > 0.9
    assert differing(ddim, drop, hold, 0) > 0.9
    assert differing(ddim, hold, rarely, 0) > 0.9
    assert differing(ddim, hold, forecast, 1) > 0.9
    # a single refresh does not determine a line
    assert differing(ddim, hold, forecast, 0) == 0


def test_a_removal_touches_the_steps_of_its_bin_only(tmp_path: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = [(ablation, b) for ablation, b in everything(swept) if ablation.periodic in REMOVALS]
    effects = run_sweep(along(swept, base), swept, chosen, tmp_path, ignore).effects
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


@pytest.mark.parametrize("kind", every_nth(3, REUSES), ids=lambda kind: f"{kind.treatment}{kind.period}")
def test_a_reuse_refreshes_with_its_period_and_touches_the_steps_of_its_bin_only(
    tmp_path: Path, kind: PeriodicTreatment
) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = [(ablation, b) for ablation, b in everything(swept) if ablation.periodic == kind]
    effects = run_sweep(along(swept, base), swept, chosen, tmp_path, ignore).effects
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


def test_the_predicted_calls_equal_the_calls_made(tmp_path: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    base = run_base(swept, ignore)
    recorder.calls.clear()
    chosen = everything(swept)[::3]
    run_sweep(along(swept, base), swept, chosen, tmp_path, ignore)
    rows = sum(len(call["sample"]) for call in recorder.calls)
    assert sweep_calls(swept, chosen) == rows / SAMPLES


def test_an_ablation_that_only_refreshes_does_no_damage_to_a_stochastic_trajectory(tmp_path: Path) -> None:
    table = table_of("ddpm")
    assert table.noise_coefficient.any()
    swept = sweep_of("ddpm", bins=make_bins(table.log_snr, STEPS))  # one step per bin
    chosen = [
        (Ablation(component=component.name, periodic=kind), b)
        for component in swept.components
        for kind in REUSES
        for b in range(0, STEPS, kind.period)
    ]
    effects = run_sweep(along(swept, run_base(swept, ignore)), swept, chosen, tmp_path, ignore).effects
    assert len(effects) == len(chosen)
    # same denoiser and noise, but a batch of another size may sum in another order
    assert max(effect.relative_l2.high for effect in effects) < 1e-4


def test_a_stochastic_trajectory_has_different_noise_for_every_sample_and_seed(tmp_path: Path) -> None:
    finals = [run_base(sweep_of("ddpm", seed=seed), ignore).final for seed in (5, 5, 6)]
    assert relative_l2(finals[0], finals[1]) == 0
    assert relative_l2(finals[0], finals[2]) > 0.1
    assert relative_l2(finals[0][:1], finals[0][1:]) > 0.1


def test_seeds_matter(ddim: Measured, tmp_path: Path) -> None:
    other = measure(sweep_of("ddim", seed=SEED + 1), tmp_path)
    pairs = zip(ddim.effects, other.effects, strict=True)
    assert all(left.relative_l2 != right.relative_l2 for left, right in pairs)


def test_the_batch_size_does_not_change_the_effects(ddim: Measured, tmp_path: Path) -> None:
    alone = dataclasses.replace(ddim.sweep, rows=1)
    chosen = [entry for i, entry in enumerate(everything(alone)) if i % 3 == 0 or entry[0].periodic.treatment.row.of_x0]
    assert {b for _, b in chosen} == {0, 1}
    assert {ablation.periodic for ablation, _ in chosen} == {*REMOVALS, *REUSES}
    one_by_one = run_sweep(along(alone, ddim.base), alone, chosen, tmp_path, ignore).effects
    assert len(one_by_one) == len(chosen)
    for effect in one_by_one:  # a batch of another size may sum in another order
        expected = ddim.damages[effect.component, kind_of(effect), effect.bin]
        assert effect.relative_l2.mean == pytest.approx(expected, abs=1e-4)


def test_more_samples_leave_the_first_ones_unchanged() -> None:
    few, more = (run_base(sweep_of("ddim", samples=samples), ignore) for samples in (SAMPLES, SAMPLES + 3))
    np.testing.assert_allclose(more.final[:SAMPLES], few.final, atol=1e-5)  # another batch size, another order of sums


def test_a_finished_sweep_is_read_instead_of_run(ddim: Measured, work: Path) -> None:
    recorder = Recorder(backend())
    swept = sweep_of("ddim", on=recorder)
    assert run_sweep(along(swept, ddim.base), swept, everything(swept), work, ignore).all == ddim.effects
    assert recorder.calls == []


def without_first(result: dict[str, list[object]]) -> dict[str, list[object]]:
    return result | {"effects": result["effects"][1:]}


DAMAGES: Mapping[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda own, other: b"",
    "truncated": lambda own, other: own[: len(own) // 2],
    "not text": lambda own, other: own.replace(b"drop", b"\xff\xfe\xfd\xfc"),
    "empty list": lambda own, other: b"[]",
    "one effect missing": lambda own, other: json.dumps(without_first(json.loads(own))).encode(),
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
    assert run_sweep(along(ddim.sweep, ddim.base), ddim.sweep, everything(ddim.sweep), work, ignore).all == ddim.effects
    assert first.read_bytes() == whole


def test_the_order_of_ablations_cuts_no_other_batches(ddim: Measured) -> None:
    """A batch takes the place of its best ablation, and holds the same ones in any order."""
    entries = everything(ddim.sweep)
    for seed in range(3):
        shuffled = random.Random(seed).sample(entries, len(entries))
        batches = _batches(ddim.sweep, shuffled)
        assert {*batches} == {*_batches(ddim.sweep, entries)}
        places = {entry: place for place, entry in enumerate(shuffled)}
        firsts = [
            min(places[Ablation(component=name, periodic=own.periodic), own.bin] for name in own.names)
            for own in batches
        ]
        assert firsts == sorted(firsts)


def test_progress_rises_to_the_end(ddim: Measured, tmp_path: Path) -> None:
    reports: list[Progress] = []
    run_base(ddim.sweep, reports.append)
    run_sweep(along(ddim.sweep, ddim.base), ddim.sweep, everything(ddim.sweep)[::7], tmp_path, reports.append)
    for stage in ("full model", "ablations"):
        done = [report.done for report in reports if report.stage == stage]
        assert done == sorted(set(done))
        assert done[-1] == next(report.total for report in reports if report.stage == stage)
