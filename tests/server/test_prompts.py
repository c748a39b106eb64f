"""Prompts and labels of requests, as conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unetc
from tests.conftest import once
from tests.server.bundles import build_class_bundle
from tests.server.local import in_loop, local
from tests.server.test_openai import pixels
from unetc.call import CLASS_LABELS
from unetc.conditions import Conditions
from unetc.models.prompts import encode_labels
from unetc.report.pictures import to_pixels
from unetc.runtime.bundle import Bundle
from unetc.server.errors import RequestError
from unetc.server.prompts import PromptReader, Wanted


@pytest.fixture(scope="session")
def class_bundle(shared: Path) -> Path:
    """Build a bundle of a model with ten classes."""
    return once(shared / "classes-server", build_class_bundle) / "bundle"


def wanted(**fields: Any) -> Wanted:
    usual: dict[str, Any] = {
        "prompt": None,
        "negative_prompt": None,
        "label": None,
        "guidance_scale": None,
        "count": 2,
        "first_index": 0,
        "size": (16, 16),
    }
    return Wanted(**usual | fields)


def read(bundle: Path, **fields: Any) -> Conditions | None:
    return PromptReader(Bundle.open(bundle), None).read(wanted(**fields))


def test_a_label_conditions_every_image(class_bundle: Path) -> None:
    assert PromptReader(Bundle.open(class_bundle), None).classes == 10
    for fields in ({"label": 7}, {"prompt": "7"}):
        conditions = read(class_bundle, **fields)
        assert conditions is not None
        assert conditions.own[CLASS_LABELS].tolist() == [7, 7]
    assert read(class_bundle) is None, "the bundle's own labels in turn"
    assert read(class_bundle, prompt="") is None


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"label": 10}, "label", "label 10 is not one of 0 to 9"),
        ({"prompt": "a cat"}, "prompt", "takes a label from 0 to 9 and no other prompt"),
        ({"prompt": "3", "label": 3}, "prompt", "and no other prompt"),
        ({"negative_prompt": "dogs"}, "negative_prompt", "takes no prompts"),
        ({"guidance_scale": 2.0}, "guidance_scale", "has no guidance"),
    ],
)
def test_a_model_of_classes_refuses_the_rest(
    class_bundle: Path, fields: dict[str, Any], field: str, problem: str
) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        read(class_bundle, **fields)
    assert caught.value.field == field


@in_loop
async def test_a_label_makes_an_image_of_its_class(class_bundle: Path) -> None:
    session = unetc.load(class_bundle)
    async with local(class_bundle) as (client, _):
        answer = await client.post("/v1/images/generations", json={"label": 4, "seed": 2})
        conditions = encode_labels("the model", ["4"], 10)
        expected = to_pixels(session.sample(seed=2, conditions=conditions, full_model=True))[0]
        assert np.abs(pixels(answer.json()["data"][0]["b64_json"]) - expected).max() <= 1
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["classes"], model["prompts"], model["free_prompts"]) == (10, [], False)


def test_without_encoders_a_prompt_must_be_one_of_the_bundle(prompted_bundle: Path) -> None:
    bundle = Bundle.open(prompted_bundle)
    assert bundle.manifest.conditioning is not None
    prompts = bundle.manifest.conditioning.prompts
    for prompt in (prompts[1], f" {prompts[1]} ", "#1"):
        conditions = read(prompted_bundle, prompt=prompt)
        assert conditions is not None
        for name, values in bundle.conditions.own.items():
            assert np.array_equal(conditions.own[name], values[[1, 1]])
    for prompt in ("a cat", f"#{len(prompts)}", "#x", ""):
        with pytest.raises(RequestError, match=r"has no text encoder\. The prompt must be one of '"):
            read(prompted_bundle, prompt=prompt)
    with pytest.raises(RequestError, match="negative prompts cannot be encoded"):
        read(prompted_bundle, prompt="#0", negative_prompt="dogs")


def test_the_scale_of_encoded_prompts_can_be_changed(prompted_bundle: Path) -> None:
    assert read(prompted_bundle) is None
    for prompt in (None, "#0"):
        stronger = read(prompted_bundle, prompt=prompt, guidance_scale=6.0)
        assert stronger is not None
        assert stronger.scale == 6.0
        assert stronger.rows_per_sample == 2
        without = read(prompted_bundle, prompt=prompt, guidance_scale=0.0)
        assert without is not None
        assert without.rows_per_sample == 1
