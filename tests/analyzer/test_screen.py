"""The screen measures local errors of ablations, and estimates their damage from the measured error amplification."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.analyzer.sweeps import REMOVALS, REUSES, SAMPLES, SEED, SHAPE, Watched, along, relative_l2, tiny
from tests.models import shared_folder
from unetc.analyzer.ablation import Ablation, PeriodicTreatment, ablations_of, entry_of
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.screen import (
    TYPICAL_LOG_AMPLIFICATION,
    TYPICAL_SPREAD,
    Z_95,
    Screen,
    choose,
    estimate_rest,
    run_screen,
    screen_calls,
)
from unetc.analyzer.sweep import FullTrajectory, Sweep, make_bins, run_base
from unetc.artifacts.profile import STEP, Cost, Effect, Estimate
from unetc.backend import Array, Backend
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.progress import Progress, ignore
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.treatments import Treatment

STEPS = 8
BINS = (range(4), range(4, 8))
PROBED = (2, 6)
"""The middle step of every bin."""

DROP, HOLD = PeriodicTreatment(treatment=Treatment.DROP), PeriodicTreatment(treatment=Treatment.HOLD, period=2)
KINDS = REMOVALS + REUSES


class Counter(Watched):
    """A backend that counts the samples passed to its programs."""

    def __init__(self) -> None:
        super().__init__(open_backend("onnxruntime:cpu", threads=1), self._count)
        self.rows = 0

    def _count(self, inputs: Mapping[str, object], output: Array) -> None:
        self.rows += len(output)


def sweep_on(
    backend: Backend, *, samples: int = SAMPLES, rows: int = 5 * SAMPLES, steps: int = STEPS, bins: int = 2
) -> Sweep:
    """Create a sweep in which the last batch of a kind is smaller than the others."""
    table = extract(make_scheduler("ddim", {"beta_schedule": "scaled_linear"}), steps)
    return Sweep(
        denoiser=GatedDenoiser(tiny().gated, backend, prediction_type=table.prediction_type),
        components=tiny().gated.components,
        ablated=tiny().gated.components,
        table=table,
        bins=make_bins(table.log_snr, bins),
        sample_shape=SHAPE,
        samples=samples,
        seed=SEED,
        rows=rows,
    )


@functools.cache
def swept() -> tuple[Sweep, FullTrajectory]:
    sweep = sweep_on(open_backend("onnxruntime:cpu", threads=1))
    return sweep, run_base(sweep, ignore)


@functools.cache
def finished() -> tuple[Screen, Path]:
    """Run a screen and return it with its folder of partial results, which tests must copy before changing it."""
    work = Path(tempfile.mkdtemp(dir=shared_folder(), prefix="screen-"))
    return run_screen(along(*swept()), swept()[0], work, ignore), work


def screened() -> Screen:
    return finished()[0]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Copy the partial results of a finished screen."""
    return Path(shutil.copytree(finished()[1], tmp_path / "work"))


def test_every_ablation_is_screened_in_every_bin() -> None:
    assert {*screened().errors} == {
        (a, b) for a in ablations_of(tiny().gated.components, denoises=True) for b in range(len(BINS))
    }
    assert all(np.isfinite(error) and error >= 0 for error in screened().errors.values())
    assert np.mean([error > 0 for error in screened().errors.values()]) > 0.9


def alone(ablation: Ablation, b: int) -> float:
    """Measure the local error of one ablation with separate calls."""
    sweep, base = swept()
    denoiser, kind, step = sweep.denoiser, ablation.periodic, PROBED[b]

    def at(step: int) -> tuple[Array, float]:
        return base.states[step].sample, float(sweep.table.timesteps[step])

    full = denoiser.predict(*at(step), gates=denoiser.gates({}, SAMPLES), means=base.means[b])
    if kind.treatment.reuses:
        branches = BranchCache()
        for source in (step - kind.period // 2 - kind.period, step - kind.period // 2):
            if source >= 0:
                denoiser.compute_branches(*at(source), branches, log_snr=sweep.log_snr(source))
        (index,) = (c.index for c in sweep.components if c.name == ablation.component)
        holds = np.zeros((SAMPLES, len(sweep.components)), np.float32)
        holds[:, index] = 1
        treatments, level = {index: kind.treatment}, sweep.log_snr(step)
        changed = denoiser.recall(*at(step), branches, log_snr=level, treatments=treatments, holds=holds)
    else:
        gates = denoiser.gates({ablation.component: kind.treatment}, SAMPLES)
        changed = denoiser.predict(*at(step), gates=gates, means=base.means[b])
    return relative_l2(full, changed) * sum(kind.treats(step) for step in BINS[b])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.treatment}{kind.period}")
def test_a_local_error_is_the_change_of_one_prediction_times_the_treated_steps(kind: PeriodicTreatment) -> None:
    own = [entry for entry in screened().errors if entry[0].periodic == kind]
    for ablation, b in [*own[::5], *(entry for entry in own if entry[0].component == STEP)]:
        # another batch size, another order of sums
        assert screened().errors[ablation, b] == pytest.approx(alone(ablation, b), rel=1e-3, abs=1e-5)


def test_no_error_is_counted_where_no_step_is_treated(tmp_path: Path) -> None:
    sweep = sweep_on(open_backend("onnxruntime:cpu", threads=1), steps=4, bins=4)  # one step per bin
    screen = run_screen(along(sweep, run_base(sweep, ignore)), sweep, tmp_path, ignore)
    for ablation, b in screen.errors:
        assert ablation.periodic.treats(b)
    assert {b for ablation, b in screen.errors if ablation.periodic == DROP} == {0, 1, 2, 3}
    assert {b for ablation, b in screen.errors if ablation.periodic == HOLD} == {1, 3}


def test_the_predicted_calls_equal_the_calls_made(tmp_path: Path) -> None:
    counter = Counter()
    sweep = sweep_on(counter)
    base = run_base(sweep, ignore)
    counter.rows = 0
    assert run_screen(along(sweep, base), sweep, tmp_path, ignore).calls == counter.rows / SAMPLES
    assert screen_calls(sweep) == counter.rows / SAMPLES


def test_a_finished_screen_is_read_instead_of_run(work: Path) -> None:
    counter = Counter()
    assert run_screen(along(sweep_on(counter), swept()[1]), sweep_on(counter), work, ignore) == screened()
    assert counter.rows == 0


DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda own: b"",
    "truncated": lambda own: own[: len(own) // 2],
    "not text": lambda own: own.replace(b"drop", b"\xff\xfe\xfd\xfc"),
    "of another kind": lambda own: b"[]",
    "without errors": lambda own: own.replace(b'"errors"', b'"terrors"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_part_of_a_screen_is_measured_again(work: Path, damage: Callable[[bytes], bytes]) -> None:
    (second,) = work.glob("bin01-local1-*.json")
    whole = second.read_bytes()
    second.write_bytes(damage(whole))
    assert run_screen(along(*swept()), swept()[0], work, ignore) == screened()
    assert second.read_bytes() == whole


def test_an_interrupted_screen_resumes_to_the_same_bits(work: Path) -> None:
    for part in sorted(work.iterdir())[::2]:
        part.unlink()
    assert run_screen(along(*swept()), swept()[0], work, ignore) == screened()


def test_progress_rises_to_the_end(work: Path) -> None:
    reports: list[Progress] = []
    sorted(work.iterdir())[1].unlink()
    run_screen(along(*swept()), swept()[0], work, reports.append)
    assert {(report.stage, report.total) for report in reports} == {("screen", reports[0].total)}
    done = [report.done for report in reports]
    assert done == sorted(done)
    assert 0 < done[0] < done[1] < done[-1] == reports[0].total, "the finished bin at once, the other call by call"


NAMES = ("a", "b", "c", "d")
ablations = st.builds(Ablation, component=st.sampled_from(NAMES), periodic=st.sampled_from(KINDS))
entries = st.tuples(ablations, st.integers(0, 2))
amounts = st.floats(1e-6, 1e3)
screens = st.dictionaries(entries, st.one_of(amounts, st.just(0.0)), min_size=1, max_size=30).map(
    lambda errors: Screen(errors=errors, calls=0)
)
shares = st.fixed_dictionaries({name: st.one_of(st.floats(1e-3, 1), st.sampled_from([0.0, -0.2])) for name in NAMES})


def costs_of(saved: Mapping[str, float], full_ms: float = 80.0) -> list[Cost]:
    return [
        Cost(component=name, saved_ms=Estimate(mean=saved_ms, low=saved_ms, high=saved_ms), freed_bytes=0)
        for name, saved_ms in ((name, full_ms * share) for name, share in saved.items())
    ]


@given(screen=screens, saved=shares, per_bin=st.integers(1, 6))
def test_the_chosen_ablations_have_the_least_local_error_per_time_saved(
    screen: Screen, saved: dict[str, float], per_bin: int
) -> None:
    def worth(entry: tuple[Ablation, int]) -> float:
        ablation, _ = entry
        return screen.errors[entry] / (saved[ablation.component] * ablation.periodic.share)

    chosen = choose(screen, costs_of(saved), 80.0, per_bin)
    assert len({*chosen}) == len(chosen)
    assert {*chosen} <= {*screen.errors}
    assert all(saved[ablation.component] > 0 for ablation, _ in chosen)
    for b in range(3):
        own = [entry for entry in chosen if entry[1] == b]
        possible = [entry for entry in screen.errors if entry[1] == b and saved[entry[0].component] > 0]
        assert len(own) == min(per_bin, len(possible))
        left = [worth(entry) for entry in possible if entry not in own]
        assert not left or max(map(worth, own)) <= min(left) * (1 + 1e-9)


def test_a_reuse_saves_only_between_refreshes() -> None:
    rarely = PeriodicTreatment(treatment=Treatment.HOLD, period=4)
    # with equal errors, the one that skips most comes first; the removal has the lowest error per time saved
    errors = {
        (Ablation(component="a", periodic=kind), 0): error for kind, error in ((HOLD, 1.0), (rarely, 1.0), (DROP, 1.2))
    }
    ranked = [
        [ablation.periodic for ablation, _ in choose(Screen(errors=errors, calls=0), costs_of({"a": 0.5}), 80.0, count)]
        for count in (1, 2, 3)
    ]
    assert ranked == [[DROP], [DROP, rarely], [DROP, rarely, HOLD]]


def test_equal_worth_is_chosen_in_the_order_of_the_screen() -> None:
    errors = {(Ablation(component=name, periodic=DROP), 0): 1.0 for name in "cab"}
    chosen = choose(Screen(errors=errors, calls=0), costs_of({"a": 0.1, "b": 0.1, "c": 0.1}), 80.0, 2)
    assert [ablation.component for ablation, _ in chosen] == ["c", "a"]


def test_both_forms_of_reusing_the_step_are_chosen_first() -> None:
    kinds = [PeriodicTreatment(treatment=Treatment(name), period=2) for name in ("hold", "forecast", "hold_x0")]
    errors = {(Ablation(component=STEP, periodic=kind), 0): error for kind, error in zip(kinds, (9, 8, 7), strict=True)}
    errors |= {(Ablation(component=name, periodic=DROP), 0): 0.1 for name in "ab"}
    costs = costs_of({STEP: 0.9, "a": 0.5, "b": 0.4})
    chosen = [ablation for ablation, _ in choose(Screen(errors=errors, calls=0), costs, 80.0, 3)]
    assert [(own.component, own.periodic.treatment.value) for own in chosen] == [
        (STEP, "hold_x0"),
        (STEP, "forecast"),
        ("a", "drop"),
    ]
    one_form = {entry: error for entry, error in errors.items() if not entry[0].periodic.treatment.row.of_x0}
    assert [own.component for own, _ in choose(Screen(errors=one_form, calls=0), costs, 80.0, 3)] == ["a", "b", STEP]


def effect_of(entry: tuple[Ablation, int], damage: float) -> Effect:
    ablation, b = entry
    return Effect(
        component=ablation.component,
        treatment=ablation.periodic.treatment,
        period=ablation.periodic.period,
        bin=b,
        measured=True,
        relative_l2=Estimate(mean=damage, low=0.5 * damage, high=2 * damage),
    )


@st.composite
def partly_measured(draw: st.DrawFn) -> tuple[Screen, tuple[Effect, ...]]:
    screen = draw(screens)
    known = draw(st.lists(st.sampled_from(list(screen.errors)), unique=True))
    damages = draw(st.lists(st.one_of(amounts, st.just(0.0)), min_size=len(known), max_size=len(known)))
    return screen, tuple(map(effect_of, known, damages))


def ratios_of(screen: Screen, measured: tuple[Effect, ...]) -> dict[int, list[float]]:
    """List damage / local error of the measured ablations, by bin."""
    found: dict[int, list[float]] = {}
    for effect in measured:
        error, damage = screen.errors[entry_of(effect)], effect.relative_l2.mean
        if error and damage:
            found.setdefault(effect.bin, []).append(damage / error)
    return found


def geometric_mean(values: list[float]) -> float:
    return float(np.prod(np.array(values) ** (1 / len(values))))


@given(known=partly_measured())
def test_exactly_the_unmeasured_ablations_are_estimated(known: tuple[Screen, tuple[Effect, ...]]) -> None:
    screen, measured = known
    rest = estimate_rest(screen, measured)
    assert not any(effect.measured for effect in rest)
    missing = {*screen.errors} - {*map(entry_of, measured)}
    assert {*map(entry_of, rest)} == missing
    assert len({*map(entry_of, rest)}) == len(rest)


@given(known=partly_measured())
def test_an_estimate_is_the_local_error_times_the_amplification_of_its_bin(
    known: tuple[Screen, tuple[Effect, ...]],
) -> None:
    screen, measured = known
    amplifications = {b: geometric_mean(ratios) for b, ratios in ratios_of(screen, measured).items()}
    # a bin without measurements takes the mean of the other bins; without any, the constant of the reference model
    typical = geometric_mean(list(amplifications.values())) if amplifications else np.exp(TYPICAL_LOG_AMPLIFICATION)
    for effect in estimate_rest(screen, measured):
        amplification = amplifications.get(effect.bin, typical)
        assert effect.relative_l2.mean == pytest.approx(amplification * screen.errors[entry_of(effect)], rel=1e-6)


@given(known=partly_measured())
def test_intervals_are_as_wide_as_the_scatter_of_the_measurements(known: tuple[Screen, tuple[Effect, ...]]) -> None:
    screen, measured = known
    ratios = ratios_of(screen, measured)
    scatter = [np.log(ratio / geometric_mean(own)) for own in ratios.values() for ratio in own]
    for effect in estimate_rest(screen, measured):
        interval = effect.relative_l2
        assert interval.low <= interval.mean <= interval.high
        if screen.errors[entry_of(effect)]:
            width = np.exp(Z_95 * (max(0.1, float(np.std(scatter))) if ratios else TYPICAL_SPREAD))
            assert interval.high / interval.mean == pytest.approx(width, rel=1e-6)
            assert interval.mean / interval.low == pytest.approx(width, rel=1e-6)


def test_wide_scatter_makes_wide_intervals() -> None:
    errors = {(Ablation(component=name, periodic=kind), 0): 1.0 for name in NAMES for kind in (DROP, HOLD)}
    first, second, *_ = errors

    def width(one: float, other: float) -> float:
        measured = (effect_of(first, one), effect_of(second, other))
        (interval, *_) = (effect.relative_l2 for effect in estimate_rest(Screen(errors=errors, calls=0), measured))
        return interval.high / interval.low

    assert 1 < width(1.0, 1.0) < width(1.0, 2.0) < width(1.0, 8.0)
    assert width(1.0, 1.0) == width(3.0, 3.0)


def test_the_unmeasured_rest_of_the_tiny_models_screen_is_estimated() -> None:
    chosen = list(screened().errors)[::9]
    measured = tuple(effect_of(entry, 3 * error) for entry in chosen if (error := screened().errors[entry]))
    rest = estimate_rest(screened(), measured)
    assert len(measured) + len(rest) == len(screened().errors)
    for effect in rest:
        assert effect.relative_l2.mean == pytest.approx(3 * screened().errors[entry_of(effect)])


def test_the_typical_error_amplification_is_the_committed_measurement() -> None:
    path = Path(__file__).parents[2] / "benchmarks/results/amplification.json"
    figures = {figure["figure"]: figure["value"] for figure in json.loads(path.read_text())["figures"]}
    assert pytest.approx(figures["log(damage / local error), mean"], abs=0.05) == TYPICAL_LOG_AMPLIFICATION
    assert pytest.approx(figures["log(damage / local error), standard deviation"], abs=0.05) == TYPICAL_SPREAD


@pytest.mark.nightly
def test_a_screen_takes_a_quarter_of_the_samples(tmp_path: Path) -> None:
    """Its local errors equal an analysis of only these samples, whatever fits in a batch."""
    many, few = (sweep_on(open_backend("onnxruntime:cpu", threads=1), samples=count) for count in (8, 2))
    counter = Counter()
    counted = sweep_on(counter, samples=8, rows=3)
    base = run_base(counted, ignore)
    counter.rows = 0
    screens = [
        run_screen(along(many, run_base(many, ignore)), many, tmp_path / "many", ignore),
        run_screen(along(few, run_base(few, ignore)), few, tmp_path / "few", ignore),
        run_screen(along(counted, base), counted, tmp_path / "counted", ignore),
    ]
    assert counter.rows / 8 == screens[2].calls < screens[1].calls
    for ablation, b in screens[1].errors:
        errors = [screen.errors[ablation, b] for screen in screens]
        assert errors[2] == pytest.approx(errors[0], rel=1e-3, abs=1e-5)
        if ablation.periodic.treatment is not Treatment.MEAN:  # the means are of all samples
            assert errors[1] == pytest.approx(errors[0], rel=1e-3, abs=1e-5)
