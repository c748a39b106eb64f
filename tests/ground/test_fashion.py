"""The class-conditional reference model draws the classes that it is asked for, with guidance and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from image_classifier import ImageClassifier

import unetc.models
from unetc.models.find import find_model

diffusers: Any = untyped_diffusers

FOLDER = Path(unetc.models.__file__).parent / "fashion"
STEPS = 10
NO_CLASS = 10


def test_it_is_small_enough_to_ship() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} == {".json", ".md", ".png", ".safetensors"}


def test_its_classes_have_names() -> None:
    model = find_model("fashion")
    classes = model.calls.classes
    assert classes is not None
    assert (classes.find("Ankle boot"), classes.no_class, len(classes.labels)) == (9, NO_CLASS, 10)
    assert sorted(model.prompts()) == sorted(classes.names)
    assert model.encode(["bag"], 2.0).negative["class_labels"].tolist() == [NO_CLASS]


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1.0, pytest.param(2.0, marks=pytest.mark.nightly)])
def test_it_draws_the_class_of_its_label(scale: float) -> None:
    """Few steps of diffusers are nearly as right as the card's 50."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(FOLDER, use_safetensors=True, local_files_only=True)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(STEPS)
    wanted = torch.arange(40) % 10
    sample = torch.randn(len(wanted), 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        predicted = pipeline.unet(sample, timestep, wanted).sample
        if scale > 1:
            negative = pipeline.unet(sample, timestep, torch.full_like(wanted, NO_CLASS)).sample
            predicted = negative + scale * (predicted - negative)
        sample = scheduler.step(predicted, timestep, sample).prev_sample
    classifier = ImageClassifier.load(FOLDER / "classifier/model.safetensors")
    _, chances = classifier.describe(sample.clamp(-1, 1).numpy())
    expected = json.loads((FOLDER / "card.json").read_text())[f"guidance_{scale:g}"]["right"]
    # 40 draws at the card's rate fall below three deviations once in a thousand; a fifth of the steps may cost 0.05
    slack = 3 * (expected * (1 - expected) / len(wanted)) ** 0.5
    assert expected >= 0.8
    assert (chances.argmax(1) == np.arange(40) % 10).mean() >= expected - slack - 0.05
