"""Drop-ins over tiny engines, and sampling runs that can take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import torch
from torch import Tensor

from tests.models import CONTEXT_WIDTH, Reuse, tiny_of
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.backend import Program
from unetc.call import CallSignature
from unetc.compiler.schedulers.classes import CLASSES, Family
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS
from unetc.diffusers import BundleUNet
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.rollout import Rollout
from unetc.runtime.session import Session
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

STEPS = 6
SIDE = 8

SETTINGS: dict[Family, dict[str, Any]] = {
    Family.BETAS: {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    Family.EDM: {},
    Family.FLOW: {"shift": 3.0},
}
"""Settings of the schedulers of a family that differ from their defaults."""

OWN = {Family.BETAS: "ddim", Family.EDM: "edm-euler", Family.FLOW: "flow-euler"}
"""The scheduler that a bundle of each family is built for."""


def unchanged(program: Program) -> Program:
    """Return a program as it is."""
    return program


@functools.cache
def session_of(
    architecture: str, folder: Path, family: Family = Family.BETAS, wrap: Callable[[Program], Program] = unchanged
) -> Session:
    """Load engines that alternate between computing everything and holding or forecasting two components."""
    tiny = tiny_of(architecture, folder)
    level = next(component for component in tiny.gated.components if component.kind == "level")
    apart = [c for c in tiny.gated.components if c.kind == "residual" and c.name not in level.nested]
    reuse = Reuse(tiny, {level.name: Treatment.HOLD, apart[-1].name: Treatment.FORECAST})
    backend = open_backend("onnxruntime:cpu", threads=1)
    loader = backend.open_weights(tiny.gated.weights.read_bytes())
    calls = CallSignature.of(type(tiny.denoiser).__name__, tiny.denoiser.config)
    name, own = OWN[family], dict(begin(SCHEDULERS[OWN[family]][0]).config)
    return Session(
        plan=plan_of(reuse.engines, [Phase(low=-20.0, high=20.0, cycle=(0, 1))]),
        full=wrap(loader.load(reuse.full)),
        programs=[wrap(loader.load(graph)) for graph in reuse.graphs],
        scheduler=extract_all(make_scheduler(name, own), name, [STEPS]),
        sample_shape=(calls.channels, SIDE, SIDE),
        steps=STEPS,
        device=backend.device,
        calls=calls,
    )


def dropin_of(
    architecture: str,
    folder: Path,
    family: Family = Family.BETAS,
    *,
    full_model: bool = False,
    wrap: Callable[[Program], Program] = unchanged,
) -> BundleUNet:
    """Make a fresh drop-in of a bundle for the schedulers of a family."""
    denoiser = tiny_of(architecture, folder).denoiser
    session = session_of(architecture, folder, family, wrap)
    return BundleUNet(session, type(denoiser).__name__, denoiser.config, full_model=full_model)


def noise(seed: int, channels: int = 4) -> Tensor:
    """Draw unit normal noise, [1, channel, height, width]."""
    return torch.randn(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def words(seed: int) -> Tensor:
    """Draw the encoding of a prompt, [1, token, channel]."""
    return torch.randn(1, 5, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(1000 + seed))


def begin(scheduler: str, steps: int = STEPS) -> Any:
    """Make a scheduler of diffusers at the beginning of a run."""
    family = CLASSES[scheduler].family if scheduler in CLASSES else Family.BETAS
    made = getattr(diffusers, scheduler)(**SETTINGS[family])
    if "clip_sample" in made.config:
        made = type(made).from_config(made.config, clip_sample=False)
    if "skip_prk_steps" in made.config:
        made = type(made).from_config(made.config, skip_prk_steps=True)  # as in Stable Diffusion
    made.set_timesteps(steps)
    return made


def run(
    unet: Any,
    sample: Tensor,
    *prompts: Tensor,
    scheduler: str = "DDIMScheduler",
    start: int = 0,
    steps: int = STEPS,
    numbers: bool = False,
    scale: float = 3.0,
    generator: int = 7,
) -> Iterator[Tensor]:
    """Sample; yield the samples after every step, so that runs can take turns.

    Args:
        unet: The denoiser.
        sample: Unit normal noise, [1, channel, height, width].
        prompts: None, one, or two for sequential guidance, the negative one first.
        scheduler: Class of the scheduler.
        start: Index of the first timestep, as in image to image.
        steps: Number of steps.
        numbers: Whether timesteps are passed as numbers, and not as elements of the scheduler's.
        scale: Guidance scale.
        generator: Seed of the noise that the scheduler adds.
    """
    timing, random = begin(scheduler, steps), torch.Generator().manual_seed(generator)
    if hasattr(timing, "set_begin_index"):
        timing.set_begin_index(start)
    sigmas = getattr(timing, "sigmas", None)
    first = getattr(timing, "init_noise_sigma", 1.0)  # flow matching begins with unit noise
    level = first if not start or sigmas is None else (sigmas[start] ** 2 + 1) ** 0.5
    sample = sample * (level if first != 1.0 else 1.0)
    for timestep in timing.timesteps[start:]:
        seen = timing.scale_model_input(sample, timestep) if hasattr(timing, "scale_model_input") else sample
        given = timestep.item() if numbers else timestep
        with torch.no_grad():
            if prompts:
                negative, *own = (unet(seen, given, prompt).sample for prompt in prompts)
                predicted = negative + scale * (own[0] - negative) if own else negative
            else:
                predicted = unet(seen, given).sample
        extra = {"generator": random} if "generator" in timing.step.__code__.co_varnames else {}
        sample = timing.step(predicted, timestep, sample, **extra).prev_sample
        yield sample


def last(steps: Iterator[Tensor]) -> Tensor:
    """Finish a run."""
    *_, sample = steps
    return sample


class Engines:
    """Records the engines in the order they run."""

    def __init__(self, monkeypatch: Any) -> None:
        self.ran: list[int] = []
        original = Rollout.run

        def run_and_note(rollout: Rollout, *values: Any, **named: Any) -> Any:
            call = original(rollout, *values, **named)
            self.ran.append(call.engine)
            return call

        monkeypatch.setattr(Rollout, "run", run_and_note)

    def take(self) -> list[int]:
        """Return the engines since the last time."""
        ran, self.ran = self.ran, []
        return ran
