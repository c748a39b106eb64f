"""An engine without removals computes the same as the pipeline, on every target of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import torch
from torch import nn

from tests.models import ARCHITECTURES, LARGER, TRANSFORMERS, Tiny, relative_error, tiny_of
from tests.pipeline_calls import predict
from tests.plans import plan_of
from tests.promises.promise import Outcome, Place, Promise, Trial
from unetc.artifacts import Assignment, Phase
from unetc.artifacts.call_input import SAMPLE
from unetc.backend import Array, Program
from unetc.call import TIMESTEP
from unetc.compiler.graph.lowering import lower_graph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.device import Device
from unetc.models.find import BUILT_IN, find_model
from unetc.precision import Precision
from unetc.runtime.backends.registry import DEFAULT_TARGET, OFFERED, Memory, open_backend
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise

diffusers: Any = untyped_diffusers

STEPS, BATCH = 8, 2
TARGETS = (
    (DEFAULT_TARGET, Memory.FAST),
    (DEFAULT_TARGET, Memory.LOW),
    *((target, Memory.FAST) for target in OFFERED if target.startswith("torch:cpu")),
)
"""Every target of the CPU, with both ways of spending memory where there are two."""


class Shipped(Tiny):
    """A built-in model, whose weights are trained."""

    @functools.cached_property
    def denoiser(self) -> nn.Module:
        """The denoiser."""
        return find_model(self.architecture).load_denoiser()

    @functools.cached_property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The scheduler's configuration."""
        return find_model(self.architecture).scheduler_config


WELL_CONDITIONED = {"prediction_type": "v_prediction", "clip_sample": False}
"""With random weights, a scheduler for predictions of noise would multiply rounding errors."""


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Pair every model with every target."""
    tiny = [tiny_of(name, place.shared) for name in (*ARCHITECTURES, *LARGER, *TRANSFORMERS)]
    models = [*tiny, *(Shipped(name, place.shared / "shipped") for name in BUILT_IN)]
    pairs = [(model, *target) for model in models for target in TARGETS]

    def trial(number: int) -> Outcome:
        """Sample a model on a target and with its pipeline, and compare the samples and every call."""
        model, target, memory = pairs[number % len(pairs)]
        return compared(model, target, memory, seed=number)

    yield trial


def compared(model: Tiny, target: str, memory: Memory, *, seed: int) -> Outcome:
    """Compare an engine without removals with the pipeline's denoiser.

    Args:
        model: The model.
        target: Where the engine runs.
        memory: How the target spends memory.
        seed: Seed of noise and conditions.
    """
    precision = Precision.of_target(target)
    backend = open_backend(target, threads=1, memory=memory)
    graph = specialise(model.gated, {}, np.zeros(model.gated.channels, np.float32))
    loader = backend.open_weights(model.gated.weights.read_bytes())
    program = loader.load(graph if precision is Precision.FP32 else lower_graph(graph, precision))
    config = model.scheduler_config if isinstance(model, Shipped) else WELL_CONDITIONED
    scheduler = diffusers.DDIMScheduler.from_config(config)
    side = model.denoiser.config.sample_size if hasattr(model.denoiser.config, "sample_size") else 8
    drawn = model.inputs(batch=BATCH, height=side, width=side, seed=seed)
    conditions = Conditions(own={name: drawn[name] for name in drawn if name not in (SAMPLE, TIMESTEP)})
    calls, expected = from_pipeline(model, scheduler, conditions, drawn[SAMPLE].shape[1:], seed)
    errors = [relative_error(call(program, backend.device, inputs, model), output) for inputs, output in calls]
    session = Session(
        plan=plan_of([Assignment(treatments={})], [Phase(low=-40.0, high=40.0, cycle=(0,))]),
        full=program,
        programs=[program],
        scheduler=extract_all(make_scheduler("ddim", config), "ddim", (STEPS,)),
        sample_shape=drawn[SAMPLE].shape[1:],
        steps=STEPS,
        predicted_channels=model.gated.predicted_channels,
        conditions=conditions,
        device=backend.device,
    )
    samples = session.sample(BATCH, seed=seed, latents=True)
    name = f"{precision}, {{}}, relative"
    return Outcome(
        tries=len(calls) + 1,
        figures={name.format("one call"): max(errors), name.format("all steps"): relative_error(samples, expected)},
    )


@torch.no_grad()
def from_pipeline(
    model: Tiny, scheduler: Any, conditions: Conditions, shape: tuple[int, ...], seed: int
) -> tuple[list[tuple[Mapping[str, Array], Array]], Array]:
    """Sample as the pipeline does.

    Returns:
        Inputs and output of every call of the denoiser, and the samples.
    """
    scheduler.set_timesteps(STEPS)
    sample = torch.from_numpy(initial_noise(seed, range(BATCH), shape))
    calls = []
    for timestep in scheduler.timesteps:
        inputs = {
            SAMPLE: sample.numpy(),
            TIMESTEP: np.full(BATCH, float(timestep), np.float32),
            **{name: np.asarray(value) for name, value in conditions.own.items()},
        }
        predicted = predict(model, inputs)
        calls.append((inputs, predicted))
        sample = scheduler.step(torch.from_numpy(predicted[:, : shape[0]]), timestep, sample).prev_sample
    return calls, sample.numpy()


def call(program: Program, device: Device, inputs: Mapping[str, Array], model: Tiny) -> Array:
    """Call an engine."""
    batch, _, height, width = inputs[SAMPLE].shape
    output = device.empty((batch, model.gated.predicted_channels, height, width))
    program({name: device.put(value) for name, value in inputs.items()}, output)
    return device.to_array(output)


PROMISE = Promise(
    name="numerics",
    promised="Without removals, engines compute the same as the pipeline.",
    tried="All steps of a trajectory, for every architecture of the tests and every built-in model, on every target of "
    "the CPU, against the denoiser and the scheduler of diffusers.",
    prepare=prepare,
    trials=(len(ARCHITECTURES) + len(LARGER) + len(TRANSFORMERS) + len(BUILT_IN)) * len(TARGETS),
    short=4,
    seconds=17,
    limits={
        "fp32, one call, relative": 1e-5,
        "fp32, all steps, relative": 1e-5,
        "fp16, one call, relative": 1e-2,
        "fp16, all steps, relative": 2e-2,
        "bf16, one call, relative": 8e-2,
        "bf16, all steps, relative": 16e-2,
    },
)
