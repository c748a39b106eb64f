"""The rules of peers that benchmarks hold against unetc do what their papers say, and leave the pipeline as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peer_rules import AdaptiveDiffusion, HiCache, Rule, Spectrum, Zeus, guided_until, skipping, taylorseer
from torch import Tensor

import unetc.models
from tests.every_day import every_nth

diffusers: Any = untyped_diffusers

FOLDER = Path(unetc.models.__file__).parent / "prompted-digits"
STEPS = 20
NOISE = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def run(rule: Rule, steps: int, predict: Callable[[int], Tensor]) -> tuple[list[int], list[Tensor]]:
    """Let a rule watch samples that move evenly; return the computed steps and what it predicts in the others."""
    computed, predicted = [], []
    for step in range(steps):
        if rule.computes(step, torch.full((1, 1, 2, 2), float(step))):
            rule.add(step, predict(step))
            computed.append(step)
        else:
            predicted.append(rule.predict(step) - predict(step))
    return computed, predicted


def line(step: int) -> Tensor:
    return torch.tensor([[[[1.0 + 0.5 * step, 2.0 - 0.25 * step]]]])


@given(steps=st.integers(20, 100), share=st.floats(0.55, 1.0))
def test_rules_with_a_schedule_keep_to_the_calls(steps: int, share: float) -> None:
    calls = int(steps * share)
    computed, _ = run(Spectrum(steps, calls), steps, line)
    assert len(computed) <= calls
    assert computed[:5] == [0, 1, 2, 3, 4]
    computed, _ = run(Zeus(steps, calls), steps, line)
    assert {*range(10), *range(steps - 5, steps)} <= {*computed}
    assert len(computed) <= calls or len(computed) == 16, "one call between them is the least"


def test_zeus_extrapolates_and_reuses_in_turns() -> None:
    computed, errors = run(Zeus(30, 20), 30, line)
    assert computed == [*range(11), 13, 16, 19, 22, *range(25, 30)]
    off = [float(error.abs().max()) for error in errors]
    assert off[:2] == pytest.approx([0.0, 0.5], abs=1e-5), "a line first, and then the same again"
    assert off[2] == pytest.approx(0.5, abs=1e-5), "the next line begins at the repeated prediction"


def test_adaptive_diffusion_skips_while_samples_move_evenly() -> None:
    computed, _ = run(AdaptiveDiffusion(0.01), 20, line)
    assert computed == [0, 1, 2, 7, 12, 17], "at most four in a row"
    rule = AdaptiveDiffusion(0.01)
    samples = [0.0, 1.0, 2.0, 3.0, 9.0, 4.0]
    assert [rule.computes(step, torch.tensor([value])) for step, value in enumerate(samples)] == [
        True, True, True, False, True, True,
    ]  # fmt: skip


def test_spectrum_forecasts_what_hardly_changes() -> None:
    constant = torch.ones(1, 1, 2, 2)
    _, errors = run(Spectrum(50, 30), 50, lambda step: constant)
    assert errors
    assert max(float(error.abs().max()) for error in errors) < 0.05  # the ridge pulls weights towards zero


@pytest.mark.parametrize("backend", ["hermite", "dmd"])
def test_hicache_computes_one_step_of_every_interval(backend: str) -> None:
    computed, errors = run(HiCache(STEPS, 3, backend), STEPS, lambda step: torch.ones(1, 1, 2, 2))
    assert computed == [0, 1, 4, 7, 10, 13, 16, 19]
    assert max(float(error.abs().max()) for error in errors) < 1e-4


@pytest.fixture(scope="module")
def pipeline() -> Any:
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, use_safetensors=True, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = diffusers.DDIMScheduler.from_config(loaded.scheduler.config)
    return loaded


def sample(pipeline: Any, **options: Any) -> Tensor:
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "latents": NOISE, "output_type": "latent"}
    latents: Tensor = pipeline(["a seven"], **settings | options).images
    return latents


@pytest.fixture(scope="module")
def full(pipeline: Any) -> Tensor:
    """Sample with the full model."""
    return sample(pipeline)


CONTEXTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "ZEUS": lambda pipeline: skipping(pipeline, Zeus(STEPS, 17)),
    "Spectrum": lambda pipeline: skipping(pipeline, Spectrum(STEPS, 14)),
    "AdaptiveDiffusion": lambda pipeline: skipping(pipeline, AdaptiveDiffusion(0.1)),
    "Hermite": lambda pipeline: skipping(pipeline, HiCache(STEPS, 2, "hermite")),
    "TaylorSeer": lambda pipeline: taylorseer(pipeline, 2, 1),
    "Adaptive Guidance": lambda pipeline: guided_until(pipeline, 12),
}


@pytest.mark.parametrize("context", every_nth(2, CONTEXTS.values()), ids=CONTEXTS)
def test_pictures_are_near_the_full_models_and_the_pipeline_is_restored(
    pipeline: Any, full: Tensor, context: Callable[[Any], AbstractContextManager[Any]]
) -> None:
    rows = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    with context(pipeline) as given:
        near = sample(pipeline, **(given if isinstance(given, dict) else {}))
    handle.remove()
    damage = float((near - full).norm() / full.norm())
    assert 1e-5 < damage < 0.3
    assert sum(rows) <= 2 * STEPS
    torch.testing.assert_close(sample(pipeline), full, rtol=0, atol=0)


def test_guidance_ends_with_its_step(pipeline: Any) -> None:
    rows: list[int] = []
    handle = pipeline.unet.conv_in.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    with guided_until(pipeline, 12) as options:
        sample(pipeline, **options)
    handle.remove()
    assert rows == [2] * 12 + [1] * (STEPS - 12)
