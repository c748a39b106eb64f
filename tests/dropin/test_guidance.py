"""A drop-in computes half of the rows only where it can prove that the pipeline guides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.dropin.runs import SIDE, STEPS, begin, noise, words
from tests.models import relative_error, tiny_of
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.profile import GUIDANCE, with_guidance
from unetc.backend import Array, Program, SerialisedGraph
from unetc.call import CONTEXT, CallSignature
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.diffusers import BundleUNet
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.treatments import Treatment

CONFIG = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
SCALE = 3.0
AGREE = 1e-4


class Rows:
    """A session whose programs record the rows of their calls."""

    def __init__(self, shared: Path, treatment: Treatment, cycle: tuple[int, ...]) -> None:
        tiny = tiny_of("cross-attention", shared)
        self.rows: list[int] = []
        engines = with_emissions([{}, {GUIDANCE: treatment}], with_guidance(tiny.gated.components))
        backend = open_backend("onnxruntime:cpu", threads=1)
        loader = backend.open_weights(tiny.gated.weights.read_bytes())
        means = np.zeros(tiny.gated.channels, np.float32)
        calls = CallSignature.of(type(tiny.denoiser).__name__, tiny.denoiser.config)

        def load(graph: SerialisedGraph) -> Program:
            program = loader.load(graph)

            def run(inputs: Mapping[str, Any], output: Array) -> Mapping[str, Any]:
                self.rows.append(len(output))
                return program(inputs, output)

            return run

        plain = load(specialise(tiny.gated, {}, means))
        self.session = Session(
            plan=plan_of(engines, [Phase(low=-20.0, high=20.0, cycle=cycle)]),
            full=plain,
            programs=[plain, plain],
            scheduler=extract_all(make_scheduler("ddim", CONFIG), "ddim", [STEPS]),
            sample_shape=(calls.channels, SIDE, SIDE),
            steps=STEPS,
            device=backend.device,
            calls=calls,
        )
        self._tiny = tiny

    def dropin(self, *, full_model: bool = False) -> BundleUNet:
        """Make a fresh drop-in."""
        denoiser = self._tiny.denoiser
        return BundleUNet(self.session, type(denoiser).__name__, denoiser.config, full_model=full_model)

    def take(self) -> list[int]:
        """Return the rows since the last time."""
        rows, self.rows = self.rows, []
        return rows


def sample(unet: BundleUNet, noise: Tensor, text: Tensor, *, guided: bool) -> Tensor:
    """Sample as pipelines of diffusers do: with guidance, the batch is doubled, negative conditions first."""
    scheduler, current = begin("DDIMScheduler"), noise
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            predicted = unet(torch.cat([current] * (2 if guided else 1)), timestep, text).sample
        if guided:
            negative, own = predicted.chunk(2)
            predicted = negative + SCALE * (own - negative)
        current = scheduler.step(predicted, timestep, current).prev_sample
    return current


@pytest.mark.parametrize("treatment", [Treatment.DROP, Treatment.HOLD, Treatment.FORECAST])
def test_it_computes_half_of_the_rows_once_the_pipeline_has_guided(shared: Path, treatment: Treatment) -> None:
    rows = Rows(shared, treatment, (0, 1, 1))
    start, text = torch.cat([noise(1), noise(2)]), torch.cat([words(i) for i in range(4)])
    sampled = sample(rows.dropin(), start, text, guided=True)
    assert rows.take() == [4, 2, 2] * 2
    own, negative = text[2:].numpy(), text[:2].numpy()
    conditions = Conditions(own={CONTEXT: own}, negative={CONTEXT: negative}, scale=SCALE)
    expected = rows.session.sample(noise=start.numpy(), conditions=conditions)
    assert relative_error(sampled.numpy(), expected) < AGREE
    full = sample(rows.dropin(full_model=True), start, text, guided=True)
    assert relative_error(sampled.numpy(), full.numpy()) > 10 * AGREE


def test_the_first_step_is_never_halved(shared: Path) -> None:
    rows = Rows(shared, Treatment.DROP, (1,))
    start, text = noise(1), torch.cat([words(0), words(1)])
    sample(rows.dropin(), start, text, guided=True)
    assert rows.take() == [2, *[1] * (STEPS - 1)]


@pytest.mark.parametrize("treatment", [Treatment.DROP, Treatment.HOLD])
def test_two_prompts_with_the_same_noise_are_no_pair(shared: Path, treatment: Treatment) -> None:
    rows = Rows(shared, treatment, (1, 0))
    start, text = torch.cat([noise(1)] * 2), torch.cat([words(0), words(1)])
    sampled = sample(rows.dropin(), start, text, guided=False)
    assert {*rows.take()} == {2}
    full = sample(rows.dropin(full_model=True), start, text, guided=False)
    assert (sampled - full).abs().max() < AGREE
    assert (full[0] - full[1]).abs().max() > 100 * AGREE
