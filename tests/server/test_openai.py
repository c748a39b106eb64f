"""The images API, through the official client and a real server."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import unetc
from tests.server.live import Live
from unetc.artifacts.manifest import Manifest
from unetc.report.pictures import to_pixels


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0)


def pixels(data: str | None) -> np.ndarray[Any, Any]:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), np.int16)


def generate(client: openai.OpenAI, prompt: str = "", model: str = "plain", **fields: Any) -> Any:
    known = {"n", "size", "output_format", "output_compression", "response_format", "stream", "partial_images"}
    own = {name: fields.pop(name) for name in known & fields.keys()}
    return client.images.generate(prompt=prompt, model=model, extra_body=fields, **own)


def test_models_are_listed_with_their_levels(client: openai.OpenAI, live: Live, tiny_bundle: Path) -> None:
    assert [model.id for model in client.models.list()] == ["plain", "prompted"]
    plain: Any = client.models.retrieve("plain")
    assert [level["level"] for level in plain.levels] == live.models["plain"]
    assert plain.levels[0] == {"level": "full", "time_ratio": 1.0, "damage": None}
    (level,) = Manifest.load(tiny_bundle / "manifest.json").levels
    assert plain.levels[1] == {
        "level": level.name,
        "time_ratio": level.measured.time_ratio,
        "damage": {
            "relative_l2": level.measured.damage.relative_l2.mean,
            "psnr": level.measured.damage.psnr.mean,
        },
    }
    assert plain.size == "16x16"
    assert 4 in plain.steps
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")


def test_images_are_those_of_a_session(client: openai.OpenAI, tiny_bundle: Path) -> None:
    session = unetc.load(tiny_bundle)
    full = to_pixels(session.sample(batch=3, seed=5, steps=10, full_model=True))
    answer = generate(client, n=3, seed=5, num_inference_steps=10, quality="full")
    shown = np.stack([pixels(image.b64_json) for image in answer.data])
    assert np.abs(shown - full).max() <= 1
    assert [(image.seed, image.index) for image in answer.data] == [(5, 0), (5, 1), (5, 2)]
    assert answer.unetc["level"] == "full"
    assert answer.unetc["steps"] == 10
    assert answer.unetc["seconds"] > answer.unetc["queue_seconds"] >= 0
    assert (answer.size, answer.output_format, answer.quality) == ("16x16", "png", "full")
    assert abs(answer.created - time.time()) < 60


def test_a_level_is_asked_for_by_name_and_states_its_damage(
    client: openai.OpenAI, live: Live, tiny_bundle: Path
) -> None:
    name = live.models["plain"][1]
    (level,) = Manifest.load(tiny_bundle / "manifest.json").levels
    answer = generate(client, seed=5, quality=name)
    fast = to_pixels(unetc.load(tiny_bundle).sample(seed=5))
    assert np.abs(pixels(answer.data[0].b64_json) - fast[0]).max() <= 1
    assert answer.unetc["level"] == name
    assert answer.unetc["damage"]["relative_l2"] == level.measured.damage.relative_l2.mean
    assert not answer.unetc["degraded"]


def test_each_seed_of_a_list_makes_one_image(client: openai.OpenAI) -> None:
    several = generate(client, seed=[3, 4, 3])
    assert [image.seed for image in several.data] == [3, 4, 3]
    alone = pixels(generate(client, seed=4).data[0].b64_json)
    shown = [pixels(image.b64_json) for image in several.data]
    assert np.abs(shown[1] - alone).max() <= 1
    assert np.abs(shown[2] - shown[0]).max() <= 1
    assert np.abs(shown[1] - shown[0]).max() > 1


def test_a_seed_is_drawn_and_can_be_used_again(client: openai.OpenAI) -> None:
    first, second = generate(client), generate(client)
    assert first.data[0].seed != second.data[0].seed
    again = generate(client, seed=first.data[0].seed)
    assert np.abs(pixels(first.data[0].b64_json) - pixels(again.data[0].b64_json)).max() <= 1


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_other_formats_are_compressed_as_asked(client: openai.OpenAI, form: str) -> None:
    sizes = []
    for quality in (95, 5):
        data = base64.b64decode(
            generate(client, seed=1, output_format=form, output_compression=quality).data[0].b64_json
        )
        assert Image.open(io.BytesIO(data)).format == form.upper()
        sizes.append(len(data))
    assert sizes[0] > sizes[1]


def test_a_stream_sends_previews_and_then_every_image(client: openai.OpenAI) -> None:
    events = list(generate(client, seed=5, n=2, num_inference_steps=250, stream=True, partial_images=3))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds[-2:] == ["completed", "completed"]
    assert set(kinds[:-2]) == {"partial_image"}
    partial = events[:-2]
    assert {event.partial_image_index for event in partial} <= {0, 1, 2}
    assert len(partial) >= 4, "two images, and at least two of three previews"
    assert all(pixels(event.b64_json).shape == (16, 16) for event in events)
    whole = generate(client, seed=5, n=2, num_inference_steps=250)
    for event, image in zip(events[-2:], whole.data, strict=True):
        assert np.abs(pixels(event.b64_json) - pixels(image.b64_json)).max() <= 1


def test_a_stream_without_previews_sends_the_image(client: openai.OpenAI) -> None:
    (event,) = generate(client, seed=5, stream=True)
    assert event.type == "image_generation.completed"
    assert event.seed == 5


def test_a_prompt_of_the_bundle_is_taken_by_text_or_number(client: openai.OpenAI, prompted_bundle: Path) -> None:
    session = unetc.load(prompted_bundle)
    prompts = Manifest.load(prompted_bundle / "manifest.json").conditioning.prompts  # type: ignore[union-attr]
    conditions = session.conditions.take([1])
    expected = to_pixels(session.sample(seed=2, conditions=conditions, full_model=True))[0]
    for prompt in (prompts[1], "#1"):
        answer = generate(client, prompt, "prompted", seed=2)
        assert np.abs(pixels(answer.data[0].b64_json) - expected).max() <= 1
    own = to_pixels(session.sample(batch=2, seed=2, full_model=True))
    answer = client.post("/images/generations", body={"model": "prompted", "n": 2, "seed": 2}, cast_to=object)
    shown: Any = answer
    assert all(
        np.abs(pixels(image["b64_json"]) - one).max() <= 1 for image, one in zip(shown["data"], own, strict=True)
    )


def test_the_guidance_scale_changes_the_image(client: openai.OpenAI) -> None:
    shown = [
        pixels(generate(client, "#0", "prompted", seed=2, guidance_scale=scale).data[0].b64_json)
        for scale in (1.0, 3.0, 3.0, 6.0)
    ]
    assert np.abs(shown[1] - shown[2]).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 1
    assert np.abs(shown[3] - shown[1]).max() > 1


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": "a cat"}, "prompt", "this model takes no prompts"),
        ({"model": "prompted", "prompt": "a cat"}, "prompt", "The prompt must be one of '"),
        ({"model": "prompted", "prompt": "#0", "negative_prompt": "dogs"}, "negative_prompt", "no text encoder"),
        ({"negative_prompt": "dogs"}, "negative_prompt", "takes no prompts"),
        ({"guidance_scale": 2.0}, "guidance_scale", "has no guidance"),
        ({"label": 3}, "label", "has no classes"),
        ({"n": 0}, "n", "n is 0. Expected 1 to 16 images"),
        ({"n": 99}, "n", "n is 99. Expected 1 to 16 images"),
        ({"seed": -1}, "seed", "seed: should be greater than or equal to 0"),
        ({"seed": [1, 2], "n": 3}, "n", "n is 3, but there are 2 seeds"),
        ({"num_inference_steps": 101}, "num_inference_steps", "num_inference_steps is 101. This model has tables"),
        ({"size": "17x16"}, "size", "size"),
        ({"size": "9999x9999"}, "size", "exceed the limit"),
        ({"size": "big"}, "size", "Expected WIDTHxHEIGHT"),
        ({"quality": "hd"}, "quality", "quality: there is no quality level 'hd'. Expected one of: auto, full"),
        ({"min_quality": "hd"}, "min_quality", "min_quality: there is no quality level"),
        ({"strength": 0.5}, "strength", "strength needs an image to start from"),
        ({"image": "AAAA"}, "image", "image cannot be read. Expected a PNG, JPEG or WebP image"),
        ({"image": "?"}, "image", "image is not base64"),
        ({"timeout": -1.0}, "timeout", "timeout is -1.0. Expected a positive number"),
        ({"response_format": "url"}, "response_format", "url is not offered"),
        ({"output_format": "gif"}, "output_format", "expected png, jpeg, webp"),
        ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"style": "vivid"}, "style", "style: there is no such field"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        generate(client, **fields)
    assert caught.value.param == param
    assert message in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_every_wrong_field_is_named_at_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"n: .*; quality: .*; colour: there is no such field\."):
        generate(client, n="two", quality=3, colour="red")


def test_a_model_must_be_named_if_there_are_several(live: Live, client: openai.OpenAI) -> None:
    answer = live.post("/v1/images/generations", {"seed": 1})
    assert answer.status_code == 400
    assert "Set model to one of plain, prompted" in answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError) as caught:
        generate(client, model="other")
    assert caught.value.code == "model_not_found"


def test_a_body_must_be_json(live: Live) -> None:
    for options in ({"content": b"{"}, {"content": b"{}", "headers": {"Content-Type": "text/plain"}}):
        answer = live.post("/v1/images/generations", **options)
        assert answer.status_code == 400
        assert "the body must be a JSON object" in answer.json()["error"]["message"]
    assert live.get("/v1/images/generations").status_code == 405
    assert live.get("/v1/nothing").json()["error"]["code"] == "not_found"
