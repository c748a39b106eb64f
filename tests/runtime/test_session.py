"""A session follows its plan: reproducibly, at any number of steps, from any thread."""

from __future__ import annotations

import gc
import itertools
import shutil
import stat
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import parser

import unetc
from tests.batching.levels import scheduler_of
from tests.models import Reuse, Tiny, tiny_of
from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase, Plan
from unetc.backend import WEIGHTS, Array, Backend, Loader, Program, SerialisedGraph
from unetc.device import Device
from unetc.errors import NonFiniteError, SessionError, ShapeMismatch, StaleEngineError
from unetc.runtime import session as session_module
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.request import SampleRequest
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.bundle import Bundle
from unetc.runtime.decoder import Decoder
from unetc.runtime.engine_pool import LoadedLater
from unetc.runtime.session import Session, Step, _warn_of_start, load
from unetc.sampler.noise import initial_noise
from unetc.sampler.table import SchedulerTables, update
from unetc.treatments import Treatment

SHAPE = (1, 16, 16)
ROUNDING = 1e-4
"""Tolerance for samples in -1 to 1. Another batch, packing or number of threads sums in a different order."""


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return unetc.load(tiny_bundle)


def dropping(count: int) -> list[Assignment]:
    """Make engines that each drop a different component, except the first, which drops nothing."""
    return [Assignment(treatments={str(i): Treatment.DROP} if i else {}) for i in range(count)]


def session_of(
    programs: list[Any], scheduler: SchedulerTables, phases: tuple[Phase, ...], engines: Sequence[Assignment] = ()
) -> Session:
    """Create a session with arbitrary programs as engines."""
    plan = plan_of(engines or dropping(len(programs)), phases)
    return Session(plan=plan, full=programs[0], programs=programs, scheduler=scheduler, sample_shape=SHAPE, steps=4)


class Recorder:
    """A program that predicts a constant, emits the timestep under some names, and records its inputs."""

    def __init__(self, value: float = 0.0, emits: Sequence[str] = ()) -> None:
        self.value = value
        self.emits = emits
        self.calls: list[dict[str, Any]] = []

    def __call__(self, inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        self.calls.append(
            {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
        )
        output.fill(self.value)
        return {f"computed.{name}": f"{name} at {self.calls[-1]['timestep'][0]:g}" for name in self.emits}


def test_samples_are_images_of_the_model(session: Session) -> None:
    samples = session.sample(3, seed=1, steps=7)
    assert samples.shape == (3, *SHAPE)
    assert samples.dtype == np.float32
    assert np.abs(samples).max() <= 1 + 1e-6  # this scheduler clips
    assert samples.std() > 0.1


def test_the_default_number_of_steps_is_the_bundles(session: Session, bundle: Bundle) -> None:
    assert bundle.manifest.steps == session.steps == 4
    np.testing.assert_array_equal(session.sample(seed=5), session.sample(seed=5, steps=4))


def test_the_same_seed_gives_the_same_bits(session: Session, tiny_bundle: Path) -> None:
    first = session.sample(4, seed=7, steps=20)
    np.testing.assert_array_equal(first, session.sample(4, seed=7, steps=20))
    np.testing.assert_array_equal(first, unetc.load(tiny_bundle).sample(4, seed=7, steps=20))
    assert np.abs(first - session.sample(4, seed=8, steps=20)).max() > 0.1


def test_a_sample_depends_on_seed_and_index_alone(session: Session) -> None:
    whole = session.sample(6, seed=3, steps=7)
    for first, count in ((0, 1), (0, 3), (2, 4), (5, 1)):
        part = session.sample(count, seed=3, steps=7, first_index=first)
        np.testing.assert_allclose(part, whole[first : first + count], atol=ROUNDING)
    assert np.abs(whole[0] - whole[1]).max() > 0.1


def test_given_noise_replaces_the_seed(session: Session) -> None:
    noise = initial_noise(3, range(2), SHAPE)
    np.testing.assert_array_equal(session.sample(noise=noise, seed=9), session.sample(2, seed=3))
    before = noise.copy()
    session.sample(noise=noise)
    np.testing.assert_array_equal(noise, before)
    transposed = np.ascontiguousarray(noise.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)  # not C-contiguous
    np.testing.assert_array_equal(session.sample(noise=transposed), session.sample(noise=noise))
    np.testing.assert_array_equal(session.sample(noise=noise.astype(np.float64)), session.sample(noise=noise))


def test_a_convolutional_model_samples_other_sizes(session: Session) -> None:
    noise = initial_noise(0, range(2), (1, 32, 24))
    assert session.sample(noise=noise, steps=2).shape == (2, 1, 32, 24)


def test_full_model_runs_at_every_step(session: Session, bundle: Bundle) -> None:
    used: list[int] = []
    full_model = session.sample(2, seed=1, steps=7, full_model=True, on_step=lambda step: used.append(step.engine))
    assert used == [0] * 7
    recorders = [Recorder() for _ in bundle.manifest.engines]
    full, plan = Recorder(), bundle.manifest.plan
    Session(plan=plan, full=full, programs=recorders, scheduler=bundle.scheduler, sample_shape=SHAPE, steps=7).sample(
        full_model=True
    )
    assert (len(full.calls), [len(recorder.calls) for recorder in recorders]) == (7, [0, 0, 0])
    assert np.abs(full_model - session.sample(2, seed=1, steps=7)).max() > 0.1  # the plan does remove something


def test_sampling_is_the_scheduler_around_the_engines(session: Session, bundle: Bundle) -> None:
    table = bundle.scheduler.table(7)
    sample = initial_noise(2, range(2), SHAPE) * np.float32(table.initial_scale)
    backend = open_backend("onnxruntime:cpu", threads=1)
    loader = backend.open_weights(bundle.weights)
    programs = [loader.load(bundle.graph_of(engine)) for engine in bundle.manifest.engines]
    for i, engine in enumerate(bundle.manifest.plan.schedule(table.log_snr.tolist())):
        prediction = np.empty_like(sample)
        assert (
            programs[engine]({"sample": sample, "timestep": np.full(2, table.timesteps[i], np.float32)}, prediction)
            == {}
        )
        sample = update(table, i, [sample], [prediction])
    np.testing.assert_array_equal(session.sample(2, seed=2, steps=7), sample)


@pytest.mark.parametrize("steps", [7, 20, 50, 100])
def test_any_number_of_steps_passes_the_phases_in_order(session: Session, bundle: Bundle, steps: int) -> None:
    schedule = session.schedule(steps)
    assert len(schedule) == steps
    assert list(schedule) == sorted(schedule)
    assert {*schedule} == {1, 2}
    boundary = bundle.manifest.plan.phases[1].low
    assert schedule.count(1) == np.count_nonzero(bundle.scheduler.table(steps).log_snr < boundary)
    part = session.schedule(1000).count(1) / 1000  # the same share of the trajectory at any number of steps
    assert abs(schedule.count(1) / steps - part) <= 1 / steps
    used: list[int] = []
    session.sample(1, steps=steps, on_step=lambda step: used.append(step.engine))
    assert tuple(used) == schedule


@given(
    edges=st.lists(st.floats(-20, 20), min_size=2, max_size=6, unique=True),
    cycles=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=5, max_size=5),
    levels=st.lists(st.floats(-30, 30), min_size=1, max_size=50, unique=True),
)
def test_every_step_has_one_engine_of_its_phase(
    edges: list[float], cycles: list[list[int]], levels: list[float]
) -> None:
    phases = tuple(
        Phase(low=low, high=high, cycle=tuple(cycle))
        for (low, high), cycle in zip(itertools.pairwise(sorted(edges)), cycles, strict=False)
    )
    plan = plan_of(dropping(4), phases)
    levels = sorted(levels)
    schedule = plan.schedule(levels)
    assert len(schedule) == len(levels)
    for phase in phases:  # the outer phases are open-ended
        first, last = phase is phases[0], phase is phases[-1]
        inside = [
            engine
            for engine, level in zip(schedule, levels, strict=True)
            if (first or level >= phase.low) and (last or level < phase.high)
        ]
        assert inside == list(itertools.islice(itertools.cycle(phase.cycle), len(inside)))


@st.composite
def reusing_plans(draw: st.DrawFn) -> Plan:
    """Draw plans with engines that reuse some of three components and emit some others, in arbitrary cycles."""
    names = ("a", "b", "c")
    treatment = st.sampled_from([Treatment.DROP, Treatment.HOLD, Treatment.FORECAST])
    treatments = draw(st.lists(st.dictionaries(st.sampled_from(names), treatment), min_size=1, max_size=3))
    others = [
        Assignment(treatments=own, emits=tuple(name for name in names if name not in own and draw(st.booleans())))
        for own in treatments
    ]
    full = Assignment(treatments={}, emits=tuple(sorted(frozenset().union(*(engine.reused for engine in others)))))
    cycle = st.lists(st.integers(0, len(others)), min_size=1, max_size=4).map(tuple)
    count = draw(st.integers(1, 4))
    phases = tuple(Phase(low=float(i), high=float(i + 1), cycle=draw(cycle)) for i in range(count))
    return plan_of([full, *others], phases)


@given(plan=reusing_plans(), levels=st.lists(st.floats(-1, 5), min_size=1, max_size=40, unique=True).map(sorted))
def test_no_engine_runs_before_all_its_reused_branches_were_emitted(plan: Plan, levels: list[float]) -> None:
    emitted: set[str] = set()
    by_cycle = msgspec.structs.replace(plan, engines=tuple(dropping(len(plan.engines)))).schedule(levels)
    for engine, planned in zip(plan.schedule(levels), by_cycle, strict=True):
        assert plan.engines[engine].reused <= emitted
        # the full engine replaces another only where it must
        assert engine == (planned if plan.engines[planned].reused <= emitted else 0)
        emitted.update(plan.engines[engine].emits)


def test_an_engine_receives_the_last_emitted_branches(bundle: Bundle) -> None:
    engines = [
        Assignment(treatments={}, emits=("a", "b")),
        Assignment(treatments={"a": Treatment.FORECAST}, emits=("b",)),
        Assignment(treatments={"a": Treatment.HOLD, "b": Treatment.HOLD}),
    ]
    programs = [Recorder(emits=engine.emits) for engine in engines]
    session = session_of(list(programs), bundle.scheduler, (Phase(low=-20.0, high=20.0, cycle=(0, 1, 2)),), engines)
    assert session.schedule(7) == (0, 1, 2, 0, 1, 2, 0)
    session.sample(2, steps=7)
    times = bundle.scheduler.table(7).timesteps.tolist()
    full, forecasting, holding = (
        [(c.get("held.a"), c.get("earlier.a"), c.get("held.b")) for c in p.calls] for p in programs
    )

    def names(a: int, before: int, b: int) -> tuple[str, str, str]:
        return f"a at {times[a]:g}", f"a at {times[before]:g}", f"b at {times[b]:g}"

    assert full == [(None, None, None), names(0, 0, 1), names(3, 0, 4)]
    assert forecasting == [names(0, 0, 0), names(3, 0, 3)]
    assert holding == [names(0, 0, 1), names(3, 0, 4)]
    factors = [float(call["extrapolation.a"][0]) for call in programs[1].calls]
    assert factors == pytest.approx([0, (times[4] - times[3]) / (times[3] - times[0])])
    assert {call["extrapolation.a"].dtype for call in programs[1].calls} == {np.dtype(np.float32)}


def test_a_rollout_holds_nothing_from_the_one_before(bundle: Bundle) -> None:
    engines = [Assignment(treatments={}, emits=("a",)), Assignment(treatments={"a": Treatment.HOLD})]
    full, holding = Recorder(emits=("a",)), Recorder()
    session = session_of([full, holding], bundle.scheduler, (Phase(low=-20.0, high=20.0, cycle=(1,)),), engines)
    for _ in range(2):
        session.sample(steps=4)
    assert session.schedule(4) == (0, 1, 1, 1)
    assert ["held.a" in call for call in full.calls] == [False, False]
    assert len(holding.calls) == 6
    session.sample(steps=4, full_model=True)
    assert len(full.calls) == 2 + 4
    assert len(holding.calls) == 6


def test_a_stopped_rollout_leaves_nothing_to_the_next(bundle: Bundle) -> None:
    engines = [Assignment(treatments={}, emits=("a",)), Assignment(treatments={"a": Treatment.HOLD})]
    full = Recorder(emits=("a",))
    session = session_of([full, Recorder()], bundle.scheduler, (Phase(low=-20.0, high=20.0, cycle=(0, 1)),), engines)

    def cancel(step: Step) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        session.sample(steps=4, on_step=cancel)
    session.sample(steps=4)
    assert ["held.a" in call for call in full.calls] == [False, False, True]


def test_an_unknown_number_of_steps_names_the_nearest(session: Session) -> None:
    with pytest.raises(SessionError, match="100 or 150"):
        session.sample(steps=101)
    with pytest.raises(SessionError, match="1000"):
        session.schedule(5000)
    with pytest.raises(SessionError):
        session.sample(steps=0)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 16, 16), (0, 1, 16, 16), (16, 16), (), (1, 1, 1, 16, 16)])
def test_noise_of_a_wrong_shape_is_refused(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="expected"):
        session.sample(noise=np.zeros(shape, np.float32))


@pytest.mark.parametrize("size", [(15, 15), (17, 16), (0, 16)])
def test_a_size_the_model_cannot_halve_is_an_error_of_unetc(
    session: Session, size: tuple[int, int], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SessionError):
        session.sample(noise=np.zeros((1, 1, *size), np.float32))
    assert capfd.readouterr().err == ""  # the library prints nothing in addition to its exception
    session.sample()


def test_a_batch_or_seed_out_of_range_is_refused(session: Session) -> None:
    for batch in (0, -1):
        with pytest.raises(ShapeMismatch, match="at least 1"):
            session.sample(batch)
    for arguments in ({"seed": -1}, {"seed": 2**64}, {"first_index": -1}):
        with pytest.raises(SessionError, match="between 0 and"):
            session.sample(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_noise_that_is_not_finite_is_named_with_its_timestep(session: Session, value: float) -> None:
    noise = initial_noise(0, range(3), SHAPE)
    noise[1, 0, 3, 3] = value
    with pytest.raises(NonFiniteError, match=r"engine 1 .* timestep 852"):
        session.sample(noise=noise, steps=7)
    with pytest.raises(NonFiniteError, match=r"engine 0 .* timestep 852"):
        session.sample(noise=noise, steps=7, full_model=True)


@pytest.mark.parametrize("bad", [0, 3, 6])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_an_engine_that_fails_later_is_named_with_its_timestep(bundle: Bundle, bad: int, value: float) -> None:
    calls = 0

    def program(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        nonlocal calls
        output.fill(0.0)
        output.flat[-1] = value if calls == bad else 0.0
        calls += 1
        return {}

    broken = session_of([program], bundle.scheduler, (Phase(low=-20.0, high=20.0, cycle=(0,)),))
    with pytest.raises(NonFiniteError, match=f"timestep {bundle.scheduler.table(7).timesteps[bad]:g}"):
        broken.sample(2, steps=7)
    assert calls == bad + 1


LOGARITHM = """
    <ir_version: 8, opset_import: ["" : 18]>
    decoder (float[b, 1, h, w] sample) => (float[b, 3, h, w] image) {
        colours = Concat <axis = 1> (sample, sample, sample)
        image = Log (colours)
    }"""
"""A decoder that gives NaN where a sample is negative."""


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_images_that_are_not_finite_are_refused(bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    session = Session.of(bundle, backend)
    session._decoder = Decoder(parser.parse_model(LOGARITHM).SerializeToString(), 1, backend)
    with pytest.raises(NonFiniteError, match="the decoder produced NaN or infinity"):
        session.sample()
    assert np.isfinite(session.sample(latents=True)).all()
    batcher = Batcher({"plan": session})
    try:
        with pytest.raises(NonFiniteError, match="the decoder produced"):
            batcher.submit(SampleRequest(level="plan")).future.result(timeout=60)
    finally:
        batcher.close()


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_samples_that_a_scheduler_makes_infinite_are_refused() -> None:
    huge = session_of([Recorder(3e38)], scheduler_of("dpmsolver++"), (Phase(low=-20.0, high=20.0, cycle=(0,)),))
    with pytest.raises(NonFiniteError, match="the scheduler produced NaN or infinity"):
        huge.sample(steps=8)


def poisoned(graph: SerialisedGraph, below: float) -> SerialisedGraph:
    """Add 0 * log(timestep - below) to a prediction, which turns it into NaN below that timestep."""
    model = onnx.load_from_string(graph.graph)
    name = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["clean" if output == name else output for output in node.output]
    nodes = parser.parse_graph(
        f"""
        poison (float[b] timestep, float[b, c, h, w] clean) => (float[b, c, h, w] {name}) {{
            below = Constant <value_float = {below}> ()
            zero = Constant <value_float = 0.0> ()
            axes = Constant <value_ints = [1, 2, 3]> ()
            above = Sub (timestep, below)
            logarithm = Log (above)
            added = Mul (logarithm, zero)
            per_sample = Unsqueeze (added, axes)
            {name} = Add (clean, per_sample)
        }}"""
    ).node
    model.graph.node.extend(nodes)
    return replace(graph, graph=model.SerializeToString())


class Poison:
    """Sessions that cycle through 0, 1, 1: engine 0 emits a level and engine 1 holds it. Some give NaN."""

    def __init__(self, tiny: Tiny) -> None:
        level = next(component.name for component in tiny.gated.components if component.kind == "level")
        self._reuse = Reuse(tiny, {level: Treatment.HOLD})
        self.full, self.emitting, self.holding = (self._reuse.full, *self._reuse.graphs)
        self.table = self._reuse.scheduler.table(7)
        self._backend = open_backend("onnxruntime:cpu", threads=1)
        self._loader = self._backend.open_weights(tiny.gated.weights.read_bytes())

    def load(self, graph: SerialisedGraph, from_step: int = 7) -> Program:
        """Load an engine that gives NaN from a step on, out of steps 0 to 6."""
        times = [*self.table.timesteps.tolist(), -1.0]
        return self._loader.load(poisoned(graph, times[from_step] + 0.5))

    def session(self, full: Program, *programs: Program, exact: Program | None = None) -> Session:
        return self._reuse.session(self._backend, full, programs, (0, 1, 1), exact=exact)

    def by_hand(self, *programs: Program, forgets_before: int) -> Array:
        """Sample with one program per step, and forget emitted branches before a given step."""
        sample, branches = initial_noise(2, range(2), Reuse.SHAPE) * np.float32(self.table.initial_scale), BranchCache()
        for i, program in enumerate(programs):
            if i == forgets_before:
                branches = BranchCache()
            timestep = self.table.timesteps.item(i)
            prediction = np.empty_like(sample)
            inputs = {
                "sample": sample,
                "timestep": np.full(2, timestep, np.float32),
                **branches.inputs(timestep, rows=2),
            }
            branches.store(program(inputs, prediction), timestep)
            sample = update(self.table, i, [sample], [prediction])
        return sample


@pytest.fixture(scope="module")
def poison(shared: Path) -> Poison:
    return Poison(tiny_of("attention", shared))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_full_model_replaces_an_engine_that_gives_nan(poison: Poison, caplog: pytest.LogCaptureFixture) -> None:
    full, emitting, holding = (poison.load(graph) for graph in (poison.full, poison.emitting, poison.holding))
    session = poison.session(full, emitting, poison.load(poison.holding, 4))
    used: list[int] = []
    sample = session.sample(2, seed=2, on_step=lambda step: used.append(step.engine))
    assert session.schedule(7) == (0, 1, 1, 0, 1, 1, 0)
    assert used == [0, 1, 1, 0, 0, 0, 0]  # held branches are discarded, so engine 0 runs at step 5
    assert session.non_finite_steps == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        f"engine 1 produced NaN or infinity at timestep {poison.table.timesteps[4]:g}"
    )
    expected = (emitting, holding, holding, emitting, full, emitting, emitting)
    np.testing.assert_array_equal(sample, poison.by_hand(*expected, forgets_before=4))
    session.sample(2, seed=2)
    assert session.non_finite_steps == 2
    clean = poison.session(full, emitting, holding)
    assert np.abs(clean.sample(2, seed=2) - sample).max() > 0.01  # the full model did compute that step
    assert clean.non_finite_steps == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_branches_of_a_non_finite_step_are_not_held(poison: Poison) -> None:
    session = poison.session(poison.load(poison.full), poison.load(poison.emitting, 0), poison.load(poison.holding))
    np.testing.assert_array_equal(session.sample(2, seed=2), session.sample(2, seed=2, full_model=True))
    assert session.non_finite_steps == 7


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_from_the_full_model_too_is_an_error(poison: Poison) -> None:
    session = poison.session(*(poison.load(graph, 4) for graph in (poison.full, poison.emitting, poison.holding)))
    timestep = f"{poison.table.timesteps[4]:g}"
    with pytest.raises(NonFiniteError, match=f"engine 1 and the full model .* timestep {timestep}"):
        session.sample(2)
    assert session.non_finite_steps == 1


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_float32_model_repeats_non_finite_steps_if_it_is_available(
    poison: Poison, caplog: pytest.LogCaptureFixture
) -> None:
    full, emitting, holding = (poison.load(graph, 4) for graph in (poison.full, poison.emitting, poison.holding))
    exact = poison.load(poison.full)
    session = poison.session(full, emitting, holding, exact=exact)
    used = [
        poison.load(poison.emitting),
        *[poison.load(poison.holding)] * 2,
        poison.load(poison.emitting),
        *[exact] * 3,
    ]
    np.testing.assert_array_equal(session.sample(2, seed=2), poison.by_hand(*used, forgets_before=4))
    assert session.non_finite_steps == 3
    np.testing.assert_array_equal(
        session.sample(2, seed=2, full_model=True), poison.by_hand(*[exact] * 7, forgets_before=0)
    )

    def absent() -> Program:
        raise StaleEngineError("no engine in fp32 is there. Build it.")

    caplog.clear()
    session = poison.session(poison.load(poison.full), emitting, holding, exact=LoadedLater(absent))
    np.testing.assert_array_equal(session.sample(2, seed=2), poison.by_hand(*used, forgets_before=4))
    assert caplog.text.count("in the precision that overflowed: no engine in fp32 is there. Build it.") == 3


def test_every_step_is_reported_in_order(session: Session, bundle: Bundle) -> None:
    steps: list[Step] = []
    copies: list[NDArray[np.float32]] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        copies.append(step.sample.copy())

    result = session.sample(2, seed=4, steps=20, on_step=on_step)
    assert [step.index for step in steps] == list(range(20))
    assert {step.steps for step in steps} == {20}
    assert tuple(step.engine for step in steps) == session.schedule(20)
    np.testing.assert_array_equal([step.timestep for step in steps], bundle.scheduler.table(20).timesteps)
    for step, copy in zip(steps, copies, strict=True):
        np.testing.assert_array_equal(step.sample, copy)  # no later step has overwritten it
    np.testing.assert_array_equal(steps[-1].sample, result)
    np.testing.assert_array_equal(result, session.sample(2, seed=4, steps=20))


def test_an_exception_in_on_step_ends_the_sampling(session: Session) -> None:
    def cancel(step: Step) -> None:
        if step.index == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session.sample(steps=7, on_step=cancel)
    session.sample(steps=7)


def test_engines_see_the_scaled_sample_and_one_timestep_per_sample(bundle: Bundle) -> None:
    recorder = Recorder(0.5)
    session_of([recorder], bundle.scheduler, (Phase(low=-20.0, high=20.0, cycle=(0,)),)).sample(3, steps=7)
    table = bundle.scheduler.table(7)
    assert len(recorder.calls) == 7
    for call, expected in zip(recorder.calls, table.timesteps, strict=True):
        assert call["sample"].shape == (3, *SHAPE)
        np.testing.assert_array_equal(call["timestep"], np.full(3, expected, np.float32))
    np.testing.assert_array_equal(recorder.calls[0]["sample"], initial_noise(0, range(3), SHAPE))


def test_low_memory_and_threads_change_nothing_but_rounding(session: Session, tiny_bundle: Path) -> None:
    fast = session.sample(3, seed=2, steps=20)
    for options in ({"memory": "low"}, {"threads": 2}, {"threads": 0}, {"memory": "low", "threads": 2}):
        other = unetc.load(tiny_bundle, **options)
        np.testing.assert_allclose(other.sample(3, seed=2, steps=20), fast, atol=ROUNDING)


def mapped_weights() -> list[Path]:
    """List the weights files that this process maps, one per mapping."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [Path(line.split(maxsplit=5)[5]) for line in lines if line.endswith(WEIGHTS)]


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the folder where low-memory sessions create their private files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def load_low(bundle: Bundle) -> Session:
    return Session.of(bundle, open_backend("onnxruntime:cpu", threads=1, memory=Memory.LOW))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_low_memory_maps_the_weights_from_one_private_file(bundle: Bundle, private: Path) -> None:
    session = load_low(bundle)
    (folder,) = private.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / WEIGHTS).read_bytes() == bundle.weights
    mappings = [path for path in mapped_weights() if path == folder / WEIGHTS]
    assert len(mappings) >= len(bundle.manifest.engines)
    assert session.sample().shape == (1, *SHAPE)


def test_the_private_file_is_deleted_with_the_session(bundle: Bundle, private: Path) -> None:
    session = load_low(bundle)
    assert len([*private.iterdir()]) == 1
    del session
    gc.collect()
    assert [*private.iterdir()] == []


@pytest.mark.parametrize("memory", Memory)
def test_weights_that_are_edited_after_loading_change_nothing(
    tiny_bundle: Path, tmp_path: Path, memory: Memory
) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    session = unetc.load(copy, memory=memory)
    before = session.sample(seed=1)
    weights = copy / WEIGHTS
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # in place, as someone who knows that it is mapped would edit it
        file.write(bytes(size))
    np.testing.assert_array_equal(session.sample(seed=1), before)
    assert np.isfinite(session.sample(seed=1, full_model=True)).all()


def test_an_error_in_writing_weights_names_the_place(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SessionError, match=r"nowhere.*TMPDIR"):
        open_backend("onnxruntime:cpu", threads=1, memory=Memory.LOW).open_weights(bundle.weights)


def test_the_backend_is_opened_as_requested(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def note(target: str, **options: Any) -> Any:
        asked.append((target, options))
        return open_backend("null", **options)

    monkeypatch.setattr(session_module, "open_backend", note)
    unetc.load(tiny_bundle)
    unetc.load(tiny_bundle, threads=3, memory="low", target="null")
    unetc.load(str(tiny_bundle), threads=0)
    assert asked == [
        ("onnxruntime:cpu", {"threads": 1, "memory": "fast"}),
        ("null", {"threads": 3, "memory": "low"}),
        ("onnxruntime:cpu", {"threads": 0, "memory": "fast"}),
    ]


def test_the_null_backend_runs_the_schedule_without_an_engine(tiny_bundle: Path, bundle: Bundle) -> None:
    used: list[int] = []
    null = unetc.load(tiny_bundle, target="null")
    sample = null.sample(2, seed=6, steps=20, on_step=lambda step: used.append(step.engine))
    assert tuple(used) == null.schedule(20)
    table = bundle.scheduler.table(20)
    expected = initial_noise(6, range(2), SHAPE)
    for i in range(20):
        expected = update(table, i, [expected], [np.zeros_like(expected)])
    np.testing.assert_array_equal(sample, expected)


def test_an_unknown_target_or_memory_mode_is_refused_with_the_valid_ones(tiny_bundle: Path) -> None:
    with pytest.raises(SessionError, match=r"'cuda'\. Close ones: torch:cuda, .*onnxruntime:cuda\. `unetc doctor`"):
        unetc.load(tiny_bundle, target="cuda")
    with pytest.raises(SessionError, match=r"'tiny'.*fast, low"):
        unetc.load(tiny_bundle, memory="tiny")


def test_sessions_in_threads_give_the_same_bits(session: Session, tiny_bundle: Path) -> None:
    sessions = [session, unetc.load(tiny_bundle), unetc.load(tiny_bundle, memory="low")]
    jobs = [(number, seed, full_model) for seed in range(6) for number in range(3) for full_model in (False, True)]

    def sample(job: tuple[int, int, bool]) -> Array:
        number, seed, full_model = job
        return sessions[number].sample(1 + seed % 3, seed=seed, steps=7, full_model=full_model)

    serial = [sample(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(sample, jobs * 3))
    for one, other in zip(serial * 3, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


class Counter:
    """A backend that counts loaded graphs."""

    def __init__(self) -> None:
        self._inner: Backend = open_backend("onnxruntime:cpu", threads=1)
        self.loaded = 0

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._inner.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        self.loaded += 1
        return self._loader.load(graph)

    @property
    def device(self) -> Device:
        return self._inner.device


def test_the_full_model_is_loaded_on_first_use(bundle: Bundle) -> None:
    manifest = bundle.manifest
    (holding,) = (control for control in manifest.controls if control.name == "deep-hold")
    counter = Counter()
    session = Session.of(bundle, counter, control=holding)
    session.sample()
    assert counter.loaded == len(holding.engines) == 2
    for _ in range(2):
        session.sample(full_model=True)
        assert counter.loaded == 3
    counter = Counter()  # this plan reuses nothing, so its engine 0 is the full model
    Session.of(bundle, counter).sample(full_model=True)
    assert counter.loaded == len(manifest.engines)


def test_an_engine_that_emits_is_not_the_full_model(bundle: Bundle) -> None:
    (holding,) = (control for control in bundle.manifest.controls if control.name == "deep-hold")
    emitting = bundle.graphs[holding.engines[0].graph]
    assert b"computed." in emitting
    assert b"computed." not in bundle.graphs[bundle.manifest.full.graph]


def test_controls_sample_with_their_own_engines(session: Session, bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    controls = {control.name: control for control in bundle.manifest.controls if control.plan is not None}
    assert {"random-1", "random-2", "random-3"} <= {*controls}
    for control in controls.values():
        other = Session.of(bundle, backend, control=control)
        assert other.plan == control.plan != session.plan
        assert {*other.schedule(20)} <= {*range(len(control.engines))}
        assert np.abs(other.sample(2, seed=1) - session.sample(2, seed=1)).max() > 0.01
        np.testing.assert_array_equal(
            other.sample(2, seed=1, full_model=True), session.sample(2, seed=1, full_model=True)
        )


def test_a_control_along_a_schedule_runs_the_full_model_along_it(session: Session, bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    (control,) = (control for control in bundle.manifest.controls if control.name == "fewer_steps")
    other = Session.of(bundle, backend, control=control)
    table = bundle.tables["fewer_steps"].tables[0]
    assert other.steps == table.count < session.steps
    assert table.starts_like(session.scheduler.table(session.steps))
    assert {*other.schedule(other.steps)} == {0}
    np.testing.assert_array_equal(other.sample(2, seed=1), other.sample(2, seed=1, full_model=True))
    along = session.along(bundle.tables["fewer_steps"])
    np.testing.assert_array_equal(along.sample(2, seed=1, full_model=True), other.sample(2, seed=1))
    assert session.steps == bundle.manifest.steps, "the session itself keeps its scheduler"


def test_a_schedule_that_begins_without_noise_is_announced_once(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_start.cache_clear()
    load(tiny_bundle).sample(steps=4)
    assert not caplog.records
    for _ in range(2):  # commands open many sessions
        load(tiny_bundle).sample(steps=1)
    (record,) = caplog.records
    assert "sampling in 1 step(s) begins at log-SNR" in record.message
    assert "Use more steps" in record.message
