"""Every scheduler of diffusers with the drop-in: the pictures of the original UNet, or refused (kind A)."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
from torch import Tensor

from tests.dropin.runs import STEPS, Engines, dropin_of, noise, words
from tests.every_day import every_nth
from tests.models import tiny_of
from unetc.compiler.schedulers.classes import CLASSES, REFUSED, Family
from unetc.compiler.schedulers.page import DROP_IN, ITS_OWN_BUNDLE, NEEDS_TORCHSDE, NO, REUSES_NOTHING, WORKS
from unetc.errors import SessionError

diffusers: Any = untyped_diffusers

EXPECTED = {name: DROP_IN.get(name, WORKS if name in CLASSES else NO) for name in (*CLASSES, *REFUSED)}
"""Entries of the column for the drop-in in docs/schedulers.md."""

TRIED = {WORKS, REUSES_NOTHING, ITS_OWN_BUNDLE}

SETTINGS = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "skip_prk_steps": True}
GIVEN_DEFAULTS = {"KDPM2AncestralDiscreteScheduler", "UnCLIPScheduler"}
"""diffusers refuses v_prediction in the second, and its first gives NaN with these betas."""


def sample(unet: Any, name: str, seed: int = 3) -> Tensor:
    """Sample with a scheduler's defaults, as pipelines do."""
    kind = getattr(diffusers, name)
    known = () if name in GIVEN_DEFAULTS else inspect.signature(kind).parameters
    scheduler = kind(**{key: value for key, value in SETTINGS.items() if key in known})
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    current = noise(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(current, timestep) if hasattr(scheduler, "scale_model_input") else current
        with torch.no_grad():
            predicted = unet(seen, timestep, words(0)).sample
        current = scheduler.step(predicted, timestep, current, **random).prev_sample
    return current


def rounded(unet: Any, seed: int) -> Any:
    """Add the error that float32 leaves in a prediction: a step from a sigma of 20,000 may make thousands of it."""
    generator = torch.Generator().manual_seed(seed)

    def predict(*call: Any) -> Any:
        predicted = unet(*call).sample
        return SimpleNamespace(sample=predicted + 1e-6 * torch.randn(predicted.shape, generator=generator))

    return predict


@pytest.mark.parametrize("name", every_nth(4, sorted(name for name, entry in EXPECTED.items() if entry in TRIED)))
def test_it_samples_as_with_the_original(shared: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = tiny_of("cross-attention", shared).denoiser
    family = CLASSES[name].family if EXPECTED[name] == ITS_OWN_BUNDLE else Family.BETAS
    expected = sample(original, name)
    actual = sample(dropin_of("cross-attention", shared, family, full_model=True), name)
    moved = max(float((sample(rounded(original, seed), name) - expected).abs().max()) for seed in range(6))
    torch.testing.assert_close(actual, expected, rtol=0, atol=max(1e-4 * float(expected.abs().max()), 4 * moved))
    engines = Engines(monkeypatch)
    sample(dropin_of("cross-attention", shared, family), name)
    ran = engines.take()
    adds_noise = not torch.equal(sample(original, name, seed=4), expected)
    if EXPECTED[name] == REUSES_NOTHING:
        assert set(ran) == {0}
    elif name in CLASSES and name not in GIVEN_DEFAULTS and not adds_noise:
        assert ran == [place % 2 for place in range(len(ran))]


@pytest.mark.parametrize("name", sorted(name for name, entry in EXPECTED.items() if entry == ITS_OWN_BUNDLE))
def test_it_is_refused_for_a_model_of_another_kind(shared: Path, name: str) -> None:  # A1
    with pytest.raises(SessionError, match=r"timestep -?\d.* lies outside 0 to 999"):
        sample(dropin_of("cross-attention", shared), name)


def test_a_class_that_needs_torchsde_was_not_tried() -> None:
    for name in (name for name, entry in EXPECTED.items() if entry == NEEDS_TORCHSDE):
        with pytest.raises(ImportError, match="torchsde"):
            getattr(diffusers, name)()
