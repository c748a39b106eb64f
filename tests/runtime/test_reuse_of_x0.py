"""Sessions, servers and drop-ins reuse the denoised sample as a reference in float64 does."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.models import Tiny, relative_error, tiny_of
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.profile import STEP
from unetc.backend import Array, Program
from unetc.call import CONTEXT, CallSignature
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.errors import CompileError, SessionError
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.request import SampleRequest
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise, step_noise
from unetc.sampler.table import SchedulerTables, update
from unetc.treatments import Treatment

STEPS = 12
SIDE = 8
HOLD, FORECAST, HOLD_X0, FORECAST_X0 = (Treatment(name) for name in ("hold", "forecast", "hold_x0", "forecast_x0"))
ENGINES: Sequence[Mapping[str, Treatment]] = [{}, *({STEP: own} for own in (HOLD_X0, FORECAST_X0, HOLD, FORECAST))]
CYCLE = (0, 1, 0, 2, 2, 0, 3, 1, 0, 0, 2, 4)
"""Engine of every step: the forms take turns, and each comes after one refresh and after two."""
CLOSE = 2e-5
"""Largest difference from the reference, relative to the largest element: float32, in batches of other sizes."""

Float = NDArray[np.float64]


@functools.cache
def tables(scheduler: str, kind: str, learned: bool = False) -> SchedulerTables:
    config: dict[str, Any] = {"beta_schedule": "scaled_linear", "prediction_type": kind}
    if scheduler in ("ddim", "ddpm"):
        config["clip_sample"] = scheduler == "ddpm"
    if learned:
        config["variance_type"] = "learned_range"
    return extract_all(make_scheduler(scheduler, config), scheduler, [STEPS])


@functools.cache
def session_of(tiny: Tiny, scheduler: str, kind: str, *, scale: float = 1.0, learned: bool = False) -> Session:
    """Open a session whose plan reuses the step in every form."""
    means = np.zeros(tiny.gated.channels, np.float32)
    backend = open_backend("onnxruntime:cpu", threads=1)
    loader = backend.open_weights(tiny.gated.weights.read_bytes())
    engines = with_emissions(ENGINES, tiny.gated.components)
    graphs = [specialise(tiny.gated, one.treatments, means, one.emits) for one in engines]
    loaded = {graph.graph: loader.load(graph) for graph in graphs}
    calls = CallSignature.of(type(tiny.denoiser).__name__, tiny.denoiser.config)
    return Session(
        plan=plan_of(engines, [Phase(low=-40.0, high=40.0, cycle=CYCLE)]),
        full=loader.load(specialise(tiny.gated, {}, means)),
        programs=[loaded[graph.graph] for graph in graphs],
        scheduler=tables(scheduler, kind, learned),
        sample_shape=(calls.channels, SIDE, SIDE),
        steps=STEPS,
        predicted_channels=tiny.gated.predicted_channels,
        conditions=conditions(tiny, scale),
        device=backend.device,
        calls=calls,
    )


def conditions(tiny: Tiny, scale: float) -> Conditions:
    drawn = tiny.inputs(batch=4, height=SIDE, width=SIDE, seed=3)
    if CONTEXT not in drawn:
        return Conditions()
    own, negative = drawn[CONTEXT][:2], drawn[CONTEXT][2:]
    return Conditions(own={CONTEXT: own}, negative={CONTEXT: negative} if scale > 1 else {}, scale=scale)


class Reference:
    """Samples in float64 with the full model, and reuses what the guided calls have returned."""

    def __init__(self, session: Session, kind: str) -> None:
        self.session = session
        self.kind = kind
        self.history: list[tuple[float, Float, Float]] = []
        """Timestep, guided prediction with its variance, and denoised sample of every refresh."""

    def sample(self, seed: int, count: int) -> Float:
        session = self.session
        table = session.scheduler.table(STEPS)
        shape = session.sample_shape
        samples = [initial_noise(seed, range(count), shape).astype(np.float64) * table.initial_scale]
        predictions: list[Float] = []
        for step, engine in enumerate(CYCLE):
            level, timestep = table.log_snr.item(step), table.timesteps.item(step)
            alpha, sigma = ((1 / (1 + np.exp(sign * level))) ** 0.5 for sign in (-1, 1))
            seen = table.input_scale.item(step) * samples[0]
            prediction = self.predict(engine, seen, timestep, alpha, sigma)
            channels = shape[0]
            variance = prediction[:, channels:] if prediction.shape[1] > channels else None
            predictions = [prediction[:, :channels], *predictions][: table.window]
            noisy = table.noise_coefficient.item(step)
            noise = step_noise(seed, range(count), step, shape).astype(np.float64) if noisy else None
            samples = [update(table, step, samples, predictions, noise, variance), *samples][: table.window]
        return samples[0]

    def predict(self, engine: int, seen: Float, timestep: float, alpha: float, sigma: float) -> Float:
        channels = seen.shape[1]
        treatment = ENGINES[engine].get(STEP)
        if treatment is None:
            predicted = self.call(seen, timestep)
            noise = predicted[:, :channels]
            x0 = (seen - sigma * noise) / alpha if self.kind == "epsilon" else alpha * seen - sigma * noise
            self.history = [(timestep, predicted, x0), *self.history]
            return predicted
        (at, last, x0), (before, earlier, x0_before) = self.history[0], self.history[min(1, len(self.history) - 1)]
        factor = (timestep - at) / (at - before) if at != before else 0.0
        if treatment in (HOLD, FORECAST):
            return last + (factor if treatment is FORECAST else 0.0) * (last - earlier)
        x0 = x0 + (factor if treatment is FORECAST_X0 else 0.0) * (x0 - x0_before)
        implied = (seen - alpha * x0) / sigma if self.kind == "epsilon" else (alpha * seen - x0) / sigma
        return np.concatenate([implied, last[:, channels:]], axis=1)

    def call(self, seen: Float, timestep: float) -> Float:
        session = self.session
        own = session.conditions.take(range(len(seen)))
        inputs = own.widen(seen.astype(np.float32), timestep)
        output = np.empty((len(inputs["sample"]), session.predicted_channels, *seen.shape[2:]), np.float32)
        session.full(inputs, output)
        return own.guide(output.astype(np.float64), seen.shape[1])


CASES = [
    ("attention", "ddim", "epsilon", 1.0, False),
    ("attention", "ddim", "v_prediction", 1.0, False),
    ("attention", "ddpm", "v_prediction", 1.0, False),
    ("attention", "euler", "epsilon", 1.0, False),
    ("attention", "dpmsolver++", "epsilon", 1.0, False),
    ("cross-attention", "ddim", "v_prediction", 3.0, False),
    ("cross-attention", "dpmsolver++", "epsilon", 3.0, False),
    ("added-kv", "ddpm", "epsilon", 3.0, True),
]
"""Architecture, scheduler, prediction, guidance scale, and whether the variance is predicted."""
SLOW = (CASES[2], CASES[5], CASES[7])
"""Of which ordinary runs have a neighbour in every part; the last one is of a model that no other of them captures."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.nightly] * (case in SLOW)) for case in CASES],
    ids=lambda case: "-".join(map(str, case)),
)
def test_a_session_samples_as_the_reference(case: tuple[str, str, str, float, bool], shared: Path) -> None:
    architecture, scheduler, kind, scale, learned = case
    session = session_of(tiny_of(architecture, shared), scheduler, kind, scale=scale, learned=learned)
    assert session.schedule(STEPS) == CYCLE
    sampled = session.sample(2, seed=4)
    assert relative_error(sampled, Reference(session, kind).sample(4, 2)) < CLOSE
    assert session.non_finite_steps == 0
    assert relative_error(sampled, session.sample(2, seed=4, full_model=True)) > 10 * CLOSE


@pytest.mark.parametrize(
    "case",
    [CASES[1], CASES[6], pytest.param(CASES[7], marks=pytest.mark.nightly)],
    ids=lambda case: "-".join(map(str, case)),
)
def test_a_server_samples_as_the_reference(case: tuple[str, str, str, float, bool], shared: Path) -> None:
    architecture, scheduler, kind, scale, learned = case
    session = session_of(tiny_of(architecture, shared), scheduler, kind, scale=scale, learned=learned)
    batcher = Batcher({"own": session})
    try:
        tickets = [batcher.submit(SampleRequest(level="own", seed=seed, count=2)) for seed in (4, 5)]
        sampled = {seed: ticket.future.result(60).images for seed, ticket in zip((4, 5), tickets, strict=True)}
    finally:
        batcher.close()
    for seed, images in sampled.items():
        assert relative_error(images, Reference(session, kind).sample(seed, 2)) < CLOSE


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5]], ids=lambda case: "-".join(map(str, case)))
def test_a_drop_in_samples_as_the_reference(case: tuple[str, str, str, float, bool], shared: Path) -> None:
    from unetc.diffusers import BundleUNet

    architecture, scheduler, kind, scale, _ = case
    tiny = tiny_of(architecture, shared)
    session = session_of(tiny, scheduler, kind, scale=scale)
    unet = BundleUNet(session, type(tiny.denoiser).__name__, tiny.denoiser.config)
    config = {"beta_schedule": "scaled_linear", "prediction_type": kind, "clip_sample": False}
    timing: Any = make_scheduler(scheduler, config)
    timing.set_timesteps(STEPS)
    sample = torch.from_numpy(initial_noise(4, range(2), session.sample_shape))
    own = session.conditions
    text = () if own.rows is None else (torch.from_numpy(np.concatenate([own.negative[CONTEXT], own.own[CONTEXT]])),)
    with torch.no_grad():
        for timestep in timing.timesteps:
            predicted = unet(torch.cat([sample] * own.rows_per_sample), timestep, *text).sample
            if own.guided:
                negative, positive = predicted.chunk(2)
                predicted = negative + scale * (positive - negative)
            sample = timing.step(predicted, timestep, sample).prev_sample
    assert relative_error(sample.numpy(), Reference(session, kind).sample(4, 2)) < CLOSE


def test_the_forms_of_reuse_share_their_graphs(shared: Path) -> None:
    session = session_of(tiny_of("attention", shared), "ddim", "epsilon")
    _, hold_x0, forecast_x0, hold, forecast = session.programs
    assert hold_x0 is hold
    assert forecast_x0 is forecast


def test_a_plan_needs_the_type_of_the_prediction(shared: Path) -> None:
    own = session_of(tiny_of("attention", shared), "ddim", "epsilon")
    unknown = tables("ddim", "sample")
    session = Session(
        plan=own.plan,
        full=own.full,
        programs=own.programs,
        scheduler=unknown,
        sample_shape=own.sample_shape,
        steps=STEPS,
    )
    with pytest.raises(SessionError, match="no prediction type"):
        session.sample()
    session.sample(full_model=True)


def test_only_the_step_has_a_denoised_sample(shared: Path) -> None:
    tiny = tiny_of("attention", shared)
    means = np.zeros(tiny.gated.channels, np.float32)
    with pytest.raises(CompileError, match="only the whole denoiser call"):
        specialise(tiny.gated, {tiny.names[0]: HOLD_X0}, means)


class Once:
    """A program that predicts NaN in one call."""

    def __init__(self, program: Program, bad: int) -> None:
        self.program = program
        self.left = bad

    def __call__(self, inputs: Mapping[str, Any], output: Array) -> Mapping[str, Any]:
        emitted = self.program(inputs, output)
        self.left -= 1
        if self.left == -1:
            output[:] = np.nan
        return emitted

    __hash__ = object.__hash__


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_denoised_sample_of_a_non_finite_step_is_not_reused(shared: Path) -> None:
    own = session_of(tiny_of("attention", shared), "ddim", "epsilon")
    session = Session(
        plan=own.plan,
        full=own.full,
        programs=[Once(own.programs[0], 1), *own.programs[1:]],
        scheduler=own.scheduler,
        sample_shape=own.sample_shape,
        steps=STEPS,
        device=own.device,
    )
    engines: list[int] = []
    assert np.isfinite(session.sample(on_step=lambda step: engines.append(step.engine))).all()
    assert session.non_finite_steps == 1
    assert tuple(engines) == (0, 1, 0, 0, *CYCLE[4:])  # step 3 finds nothing to reuse
