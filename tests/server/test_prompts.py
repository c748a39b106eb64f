"""Prompts, labels and images of requests, as conditions and starts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unetc
from tests.server.bundles import make_class_server, make_free_server
from tests.server.local import in_loop, local
from tests.server.test_openai import pixels
from unetc.artifacts.classes import Classes
from unetc.call import CLASS_LABELS, CONTEXT, EXTRA_CHANNELS, TIMESTEP_COND
from unetc.class_labels import encode_labels
from unetc.conditions import Conditions
from unetc.errors import RequestError
from unetc.report.pictures import to_pixels
from unetc.runtime.bundle import Bundle
from unetc.server.image_request import ImageRequest
from unetc.server.prompts import PromptReader, Wanted


@pytest.fixture(scope="session")
def class_bundle(shared: Path) -> Path:
    """Build a bundle of a model with ten classes."""
    return make_class_server(shared) / "bundle"


def wanted(**fields: Any) -> Wanted:
    usual: dict[str, Any] = {
        "prompt": None,
        "negative_prompt": None,
        "label": None,
        "guidance_scale": None,
        "indices": (0, 1),
        "size": (16, 16),
    }
    return Wanted(**usual | fields)


def read(bundle: Path, **fields: Any) -> Conditions | None:
    return PromptReader(Bundle.open(bundle), None).read(wanted(**fields))


def test_a_label_conditions_every_image(class_bundle: Path) -> None:
    assert PromptReader(Bundle.open(class_bundle), None).classes == Classes(count=10)
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
        ({"prompt": "a cat"}, "prompt", "takes a label and no other prompt: whole numbers from 0 to 9"),
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


NAMED = Classes(count=10, names=tuple("abcdefghi"), no_class=9)


def read_named(bundle: Path, **fields: Any) -> Conditions | None:
    opened = Bundle.open(bundle)
    named: Any = SimpleNamespace(
        manifest=opened.manifest, conditions=opened.conditions, calls=opened.calls.with_classes(NAMED)
    )
    return PromptReader(named, None).read(wanted(**fields))


def test_classes_with_names_and_a_label_for_none_are_guided(class_bundle: Path) -> None:
    own = Bundle.open(class_bundle).conditions.own[CLASS_LABELS][:2].tolist()
    for fields, labels, scale in (
        ({"prompt": "C"}, [2, 2], 1.0),
        ({"prompt": "2", "guidance_scale": 3.0}, [2, 2], 3.0),
        ({"label": 4, "guidance_scale": 2.0}, [4, 4], 2.0),
        ({"guidance_scale": 2.0}, own, 2.0),
        ({"label": 4, "guidance_scale": 1.0}, [4, 4], 1.0),
    ):
        conditions = read_named(class_bundle, **fields)
        assert conditions is not None
        assert (conditions.own[CLASS_LABELS].tolist(), conditions.scale) == (labels, scale)
        assert conditions.guided == (scale > 1)
        if conditions.guided:
            assert conditions.negative[CLASS_LABELS].tolist() == [9, 9]
    assert read_named(class_bundle) is None
    for fields, field in (({"prompt": "z"}, "prompt"), ({"negative_prompt": "a"}, "negative_prompt")):
        with pytest.raises(RequestError) as caught:
            read_named(class_bundle, **fields)
        assert caught.value.field == field


@in_loop
async def test_a_label_makes_an_image_of_its_class(class_bundle: Path) -> None:
    session = unetc.load(class_bundle)
    async with local(class_bundle) as (client, _):
        answer = await client.post("/v1/images/generations", json={"label": 4, "seed": 2})
        conditions = encode_labels("the model", [4], Classes(count=10))
        expected = to_pixels(session.sample(seed=2, conditions=conditions, full_model=True))[0]
        assert np.abs(pixels(answer.json()["data"][0]["b64_json"]) - expected).max() <= 1
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["classes"], model["prompts"], model["free_prompts"]) == ([*"0123456789"], [], False)


@in_loop
@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 3.0}, {"prompt": "#0"}], ids=str)
async def test_an_image_is_not_mixed_with_the_images_of_the_bundle(tiny_bundle: Path, fields: dict[str, Any]) -> None:
    """Models that inpaint or edit take an image with every prompt, which a request cannot replace."""

    class Editing:
        calls = SimpleNamespace(names={EXTRA_CHANNELS})

        def __init__(self, bundle: Bundle) -> None:
            self.bundle = bundle

        def __getattr__(self, name: str) -> Any:
            return getattr(self.bundle, name)

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    async with local(tiny_bundle) as (client, service):
        served: Any = service.models["plain"]
        served.bundle = Editing(served.bundle)
        image = base64.b64encode(buffer.getvalue()).decode()
        answer = await client.post("/v1/images/generations", json={"image": image, **fields})
        assert answer.status_code == 400
        assert "image: this model takes an image with every prompt" in answer.text
        with pytest.raises(RequestError, match="takes an image with every prompt"):
            await service.submit(ImageRequest(image=np.zeros((1, 3, 16, 16), np.float32), **fields))


def test_without_encoders_a_prompt_must_be_one_of_the_bundle(prompted_bundle: Path) -> None:
    bundle = Bundle.open(prompted_bundle)
    assert bundle.manifest.conditioning is not None
    prompts = bundle.manifest.conditioning.prompts
    for prompt in (prompts[1], f" {prompts[1]} ", "#1"):
        conditions = read(prompted_bundle, prompt=prompt)
        assert conditions is not None
        for name, values in bundle.conditions.own.items():
            assert np.array_equal(conditions.own[name], values[[1, 1]])
    for prompt in ("a cat", f"#{len(prompts)}", f"#{'9' * 5000}", "#x", ""):
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


def test_a_scale_that_the_model_reads_itself_is_fixed_without_encoders() -> None:
    """Its embedding is in the prompts of the bundle."""
    own = Conditions(own={CONTEXT: np.zeros((2, 3, 4)), TIMESTEP_COND: np.zeros((2, 8))}, scale=8.5)
    conditioning = SimpleNamespace(prompts=("a cat", "a dog"), guidance_scale=8.5)
    bundle: Any = SimpleNamespace(
        manifest=SimpleNamespace(conditioning=conditioning), conditions=own, calls=SimpleNamespace(classes=None)
    )
    reader = PromptReader(bundle, None)
    for prompt in (None, "#1"):
        for scale in (0.0, 1.0, 3.0):
            with pytest.raises(RequestError, match=rf"is {scale}, .*send 8\.5\.") as caught:
                reader.read(wanted(prompt=prompt, guidance_scale=scale))
            assert caught.value.field == "guidance_scale"
        conditions = reader.read(wanted(prompt=prompt, guidance_scale=8.5))
        assert conditions is not None
        assert (conditions.scale, conditions.rows_per_sample) == (8.5, 1)


def test_an_image_has_the_same_prompt_whatever_else_is_asked(prompted_bundle: Path) -> None:
    own = Bundle.open(prompted_bundle).conditions
    for indices in ((0, 1), (0, 0, 0), (5, 2**62)):
        conditions = read(prompted_bundle, guidance_scale=6.0, indices=indices)
        assert conditions is not None
        rows = [index % (own.rows or 1) for index in indices]
        for name, values in own.own.items():
            assert np.array_equal(conditions.own[name], values[rows])


class Echo:
    """An encoder that keeps the prompts; its conditions are their numbers."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.negative: list[Sequence[str] | None] = []

    def encode(self, prompts: Sequence[str], *, negative: Sequence[str] | None, **given: Any) -> Conditions:
        self.prompts += prompts
        self.negative.append(negative)
        own = {"x": np.arange(len(prompts))[:, None]}
        return Conditions(own=own, negative=own, notes=("a note",))


def test_an_empty_negative_prompt_is_encoded_as_in_diffusers(prompted_bundle: Path) -> None:
    """Some models have zeros in place of a negative prompt that is not given."""
    bundle, echo = Bundle.open(prompted_bundle), Echo()
    for negative in ("", "dogs", None):
        PromptReader(bundle, echo).read(wanted(prompt="a cat", negative_prompt=negative))
    assert echo.negative == [[""], ["dogs"], None]


def test_a_negative_prompt_alone_keeps_the_prompts_of_the_bundle(prompted_bundle: Path) -> None:
    bundle, echo = Bundle.open(prompted_bundle), Echo()
    reader = PromptReader(bundle, echo)
    conditions = reader.read(wanted(negative_prompt="dogs", indices=(1, 0, 1)))
    assert conditions is not None
    assert echo.prompts == [reader.prompts[1], reader.prompts[0]]
    assert conditions.own["x"].ravel().tolist() == [0, 1, 0]
    assert conditions.notes == ("a note",)
    with pytest.raises(RequestError, match="negative prompts cannot be encoded"):
        read(prompted_bundle, negative_prompt="dogs")


@in_loop
async def test_seeds_in_a_list_have_the_first_prompt_with_and_without_a_scale(prompted_bundle: Path) -> None:
    async with local(prompted_bundle) as (client, service):
        scale = service.models["plain"].prompts.guidance_scale
        made = []
        for fields in ({}, {"guidance_scale": scale}):
            answer = await client.post("/v1/images/generations", json={"seed": [3, 4], **fields})
            made.append([pixels(one["b64_json"]).astype(int) for one in answer.json()["data"]])
        assert np.abs(np.stack(made[0]) - np.stack(made[1])).max() <= 1


@pytest.mark.nightly  # builds a model with free prompts
@in_loop
async def test_with_encoders_any_prompt_and_any_image_are_taken(shared: Path) -> None:
    bundle = make_free_server(shared) / "bundle"
    session = unetc.load(bundle)
    assert session.text is not None
    async with local(bundle) as (client, _):

        async def made(**body: Any) -> tuple[list[Any], dict[str, Any]]:
            answer = (await client.post("/v1/images/generations", json={"seed": 3, **body})).json()
            return [pixels(image["b64_json"]) for image in answer["data"]], answer["unetc"]

        asked = {"prompt": "a cat", "negative_prompt": "dogs", "guidance_scale": 4.0, "quality": "full"}
        shown, _ = await made(**asked, n=2)
        conditions = session.text.encode(["a cat"] * 2, negative=["dogs"], guidance_scale=4.0)
        expected = to_pixels(session.sample(2, seed=3, conditions=conditions, full_model=True))
        assert np.abs(np.stack(shown) - expected).max() <= 1

        file = io.BytesIO()
        Image.fromarray(expected[0]).save(file, "PNG")
        (changed,), facts = await made(**asked, image=base64.b64encode(file.getvalue()).decode(), strength=0.5)
        samples = session.encode((expected[:1].astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))
        row = conditions.take([0])
        start = session.sample(seed=3, image=samples, strength=0.5, conditions=row, full_model=True)
        assert np.abs(changed - to_pixels(start)[0]).max() <= 1
        assert facts["steps"] == 2, "half of the steps"

        _, facts = await made(prompt="word " * 100)
        assert "is cut at" in facts["notes"][0]
