"""The conditional reference model is a standard Stable Diffusion pipeline that follows its prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from image_classifier import ImageClassifier
from numpy.typing import NDArray
from tgate import gated
from transformers import CLIPTokenizer

import unetc.models

diffusers: Any = untyped_diffusers

FOLDER = Path(unetc.models.__file__).parent / "prompted-digits"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def loaded() -> Any:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, use_safetensors=True, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded: Any) -> Iterator[Any]:
    """Return the pipeline, with its scheduler in the state as loaded."""
    scheduler = loaded.scheduler
    loaded.scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
    yield loaded
    loaded.scheduler = scheduler


def sample(pipeline: Any, prompts: list[str], **options: Any) -> NDArray[np.float32]:
    """Draw grey pictures [count, 1, 32, 32] in [-1, 1]; each has different noise, which is the same in every call."""
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 8, "guidance_scale": 3.0, "latents": noise, "output_type": "np"}
    images = pipeline(prompts, **settings | options).images
    grey: NDArray[np.float32] = images.mean(axis=3)[:, None] * 2 - 1
    return grey


def test_it_is_small_enough_to_ship() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} == {".json", ".md", ".png", ".safetensors", ".txt"}


def test_the_stock_pipeline_loads_every_part(pipeline: Any) -> None:
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    crossings = [name for name, _ in pipeline.unet.named_modules() if name.endswith("attn2")]
    assert {name.split(".")[0] for name in crossings} == {"down_blocks", "mid_block", "up_blocks"}
    assert len(pipeline.unet.down_blocks) >= 3
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.text_encoder.config.max_position_embeddings == pipeline.tokenizer.model_max_length
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer)


def test_the_pooled_text_is_the_state_at_the_first_end_token(pipeline: Any) -> None:
    tokens = pipeline.tokenizer("a seven", padding="max_length", return_tensors="pt").input_ids
    text = pipeline.text_encoder(tokens)
    torch.testing.assert_close(text.pooler_output, text.last_hidden_state[:, 3])  # after the start and two words


def test_a_word_of_the_captions_is_one_token(pipeline: Any) -> None:
    tokenizer: CLIPTokenizer = pipeline.tokenizer
    prompt = "on a dark ground , an upright eight , slanted and thick"
    tokens = tokenizer(prompt).input_ids
    assert len(tokens) == len(prompt.split()) + 2
    assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt


def test_any_text_has_tokens(pipeline: Any) -> None:
    tokenizer: CLIPTokenizer = pipeline.tokenizer
    tokens = tokenizer("naïve ☃ 7!").input_ids
    assert tokenizer.unk_token_id not in tokens[1:-1]
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "naïve☃7!"


def test_it_draws_the_digit_of_its_prompt(pipeline: Any) -> None:
    prompts = [f"a {slant} {digit}" for slant in ("upright", "slanted") for digit in DIGITS]
    classifier = ImageClassifier.load(FOLDER / "classifier/model.safetensors")
    _, probabilities = classifier.describe(sample(pipeline, prompts))
    card = json.loads((FOLDER / "card.json").read_text())
    expected = card["prompt_followed"]["digit"]
    # 20 draws at the card's rate fall below three deviations once in a thousand; a fifth of the steps may cost 0.05
    slack = 3 * (expected * (1 - expected) / len(prompts)) ** 0.5
    assert expected >= 0.9
    assert (probabilities.argmax(1) == np.tile(np.arange(10), 2)).mean() >= expected - slack - 0.05


def test_it_draws_the_ground_and_the_pen_of_its_prompt(pipeline: Any) -> None:
    digits = DIGITS[::2]
    dark = sample(pipeline, [f"a {pen} {digit} on a dark ground" for pen in ("thin", "thick") for digit in digits])
    light = sample(pipeline, [f"{digit}, light ground" for digit in digits])
    assert (dark[..., (0, -1), :] < 0).mean() >= 0.9  # a stroke may reach the border
    assert (light[..., (0, -1), :] > 0).mean() >= 0.9
    thin, thick = (dark > 0).mean(axis=(1, 2, 3)).reshape(2, -1)
    assert (thick > thin).sum() >= 4  # one of the five digits may be small


def test_deepcache_runs_on_it(pipeline: Any) -> None:
    from DeepCache import DeepCacheSDHelper

    prompts = ["a thick seven", "a thin three on a light ground"]
    full = sample(pipeline, prompts)
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    try:
        cached = sample(pipeline, prompts)
    finally:
        helper.disable()
    assert np.isfinite(cached).all()
    assert not np.array_equal(cached, full)
    # close to the full model, compared with an unrelated picture on the same ground
    assert np.abs(cached - full).mean() < 0.5 * np.abs(full - full[::-1]).mean()
    np.testing.assert_array_equal(sample(pipeline, prompts), full)


def test_tgate_runs_on_it(pipeline: Any) -> None:
    prompts = ["a thick seven", "a thin three on a light ground"]
    full = sample(pipeline, prompts)
    with gated(pipeline, gate=5) as options:
        cached = sample(pipeline, prompts, **options)
    assert np.isfinite(cached).all()
    assert 0 < np.abs(cached - full).mean() < 0.5 * np.abs(full - full[::-1]).mean()  # as above
    with gated(pipeline, gate=8) as options:  # after the last step
        np.testing.assert_array_equal(sample(pipeline, prompts, **options), full)
    np.testing.assert_array_equal(sample(pipeline, prompts), full)


def test_behind_its_gate_tgate_reads_no_prompt(pipeline: Any) -> None:
    """By the method's definition, cross-attention is not computed again, and a call has half the batch."""
    batches: list[int] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _unet, given: batches.append(len(given[0])))
    try:
        with gated(pipeline, gate=3) as options:
            sample(pipeline, ["a seven"], **options)
    finally:
        handle.remove()
    assert batches == [2] * 3 + [1] * 5
