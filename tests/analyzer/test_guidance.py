"""An analysis of a guided model measures guidance like a component, with half of the rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.analyzer.sweeps import BINS, SAMPLES, SEED, STEPS, along, backend, estimate_of, relative_l2, table_of
from tests.models import Tiny, tiny_of
from unetc.analyzer.ablation import Ablation, PeriodicTreatment, select, treatments_for
from unetc.analyzer.cost import measure_costs
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.screen import choose, run_screen, screen_calls
from unetc.analyzer.sweep import FullTrajectory, Sweep, make_bins, run_base, run_sweep, sweep_calls
from unetc.artifacts.profile import GUIDANCE, Cost, with_guidance
from unetc.backend import Array
from unetc.call import CONTEXT, TIMESTEP
from unetc.conditions import Conditions
from unetc.progress import ignore
from unetc.sampler.table import update
from unetc.treatments import Treatment

SHAPE, SCALE = (3, 8, 8), 4.0
CLOSE = 5e-5
"""As in test_sweep: onnxruntime and torch."""


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("cross-attention", shared)


@pytest.fixture(scope="module")
def conditions(tiny: Tiny) -> Conditions:
    drawn = tiny.inputs(batch=2 * SAMPLES, height=8, width=8, seed=4)[CONTEXT]
    return Conditions(own={CONTEXT: drawn[SAMPLES:]}, negative={CONTEXT: drawn[:SAMPLES]}, scale=SCALE)


@pytest.fixture(scope="module")
def sweep(tiny: Tiny, conditions: Conditions) -> Sweep:
    table, components = table_of("dpmsolver++"), with_guidance(tiny.gated.components)
    channels = tiny.inputs(batch=1, height=8, width=8)["sample"].shape[1]
    return Sweep(
        denoiser=GatedDenoiser(tiny.gated, backend(), conditions, table.prediction_type),
        components=components,
        ablated=select(components, [tiny.names[0]]),
        table=table,
        bins=make_bins(table.log_snr, BINS),
        sample_shape=(channels, *SHAPE[1:]),
        samples=SAMPLES,
        seed=SEED,
        rows=4 * SAMPLES,
    )


@pytest.fixture(scope="module")
def base(sweep: Sweep) -> FullTrajectory:
    return run_base(sweep, ignore)


def by_hand(
    tiny: Tiny, conditions: Conditions, sweep: Sweep, base: FullTrajectory, kind: PeriodicTreatment, b: int
) -> Array:
    """Compute both halves at every step in torch, and replace their difference in the treated steps of a bin."""
    table, steps = sweep.table, sweep.steps_of(b)
    history: list[tuple[float, Array]] = []

    def halves(sample: Array, timestep: float) -> tuple[Array, Array]:
        inputs = {"sample": sample, TIMESTEP: np.full(len(sample), timestep, np.float32)}
        negative, own = (
            tiny.run_denoiser({**inputs, CONTEXT: side[CONTEXT]}) for side in (conditions.negative, conditions.own)
        )
        return negative, own

    def recalled(timestep: float) -> Array | float:
        if not kind.treatment.reuses:
            return 0.0
        (t1, latest), (t0, earlier) = history[0], history[-1]
        line = kind.treatment is Treatment.FORECAST and t1 != t0
        return latest + (timestep - t1) / (t1 - t0) * (latest - earlier) if line else latest

    for step in [step for step in range(steps[0]) if not kind.treats(step)][-2:]:
        negative, own = halves(base.states[step].seen(table, step), sweep.timestep(step))
        history = [(sweep.timestep(step), own - negative), *history[:1]]
    samples, predictions = base.states[steps[0]].samples, base.states[steps[0]].predictions
    for step in range(steps[0], STEPS):
        timestep = sweep.timestep(step)
        negative, own = halves(samples[0] * table.input_scale.item(step), timestep)
        if step in steps and kind.treats(step):
            negative = own - recalled(timestep)
        else:
            history = [(timestep, own - negative), *history[:1]]
        predictions = (negative + SCALE * (own - negative), *predictions)[: table.window]
        samples = (update(table, step, samples, predictions), *samples)[: table.window]
    final: Array = samples[0]
    return final


def test_its_damage_is_the_one_of_replacing_the_difference(
    tiny: Tiny, conditions: Conditions, sweep: Sweep, base: FullTrajectory
) -> None:
    kinds = treatments_for(sweep.components[-1], denoises=sweep.denoises)
    assert [kind.treatment for kind in kinds] == [Treatment.DROP, *[Treatment.HOLD] * 2, *[Treatment.FORECAST] * 2]
    chosen = [
        (Ablation(component=name, periodic=kind), b)
        for kind in kinds
        for b in range(BINS)
        for name in (tiny.names[0], GUIDANCE)
        if any(map(kind.treats, sweep.steps_of(b)))
    ]
    with tempfile.TemporaryDirectory() as work:
        effects = run_sweep(along(sweep, base), sweep, chosen, Path(work), ignore).effects
        again = run_sweep(along(sweep, base), sweep, chosen, Path(work), ignore).effects
    assert effects == again
    assert len(effects) == len(chosen)
    for effect in effects:
        if effect.component == GUIDANCE:
            kind = PeriodicTreatment(treatment=effect.treatment, period=effect.period)
            expected = relative_l2(base.final, by_hand(tiny, conditions, sweep, base, kind, effect.bin))
            assert effect.relative_l2.mean == pytest.approx(expected, abs=CLOSE, rel=1e-3)
            assert expected > CLOSE
    assert sweep_calls(sweep, chosen) > 0


def test_the_screening_probes_it(sweep: Sweep, base: FullTrajectory, tmp_path: Path) -> None:
    screen = run_screen(along(sweep, base), sweep, tmp_path, ignore)
    probed = {(entry.periodic, b) for entry, b in screen.errors if entry.component == GUIDANCE}
    treated = {
        (kind, b)
        for kind in treatments_for(sweep.components[-1], denoises=sweep.denoises)
        for b in range(BINS)
        if any(map(kind.treats, sweep.steps_of(b)))
    }
    assert probed == treated
    assert all(error > 0 for (entry, _), error in screen.errors.items() if entry.component == GUIDANCE)
    assert screen.calls == screen_calls(sweep)
    shares = {component.name: 1.0 if component.name != GUIDANCE else 0.01 for component in sweep.ablated}
    costs = [Cost(component=name, saved_ms=estimate_of(share), freed_bytes=0) for name, share in shares.items()]
    chosen = choose(screen, costs, 1.0, 1)
    for b in range(BINS):  # its best one is carried to the final output, however little it saves
        assert len([entry for entry, at in chosen if at == b and entry.component == GUIDANCE]) == 1
        assert len([entry for entry, at in chosen if at == b]) == 2
    assert choose(screen, costs, 1.0, 0) == ()


def test_its_cost_is_the_time_of_half_of_the_rows(tiny: Tiny, conditions: Conditions, sweep: Sweep) -> None:
    costs = measure_costs(
        tiny.gated,
        sweep.ablated[-1:],
        backend(),
        conditions=conditions,
        batch=SAMPLES,
        sample_shape=sweep.sample_shape,
        rounds=3,
        on_progress=ignore,
    )
    (cost,) = costs.costs
    assert (cost.component, cost.freed_bytes) == (GUIDANCE, 0)
    assert cost.saved_ms.mean < costs.full_ms.mean
