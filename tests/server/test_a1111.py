"""The API of the A1111 web UI, with the requests of its clients, against a real server process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

import unetc
from tests.server.live import Live, serving, until
from tests.server.local import in_loop, local
from tests.server.test_a1111_fields import IMAGE_TO_IMAGE, TEXT_TO_IMAGE
from unetc.report.pictures import to_pixels
from unetc.server.image_request import ImageRequest
from unetc.server.prompts import PromptReader
from unetc.server.running import Running

SIZE = {"width": 16, "height": 16}
PLAIN = TEXT_TO_IMAGE | SIZE | {"prompt": "", "negative_prompt": "", "steps": 4, "batch_size": 1, "n_iter": 1}
PROMPTED = PLAIN | {"width": 32, "height": 32, "prompt": "a red square", "cfg_scale": 3.0}
PROMPTED |= {"override_settings": {"sd_model_checkpoint": "prompted"}}


def pixels(text: str) -> Any:
    """Decode an image."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def encoded(image: Any) -> str:
    """Encode an image as clients do."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def made(live: Live, path: str, body: dict[str, Any], **headers: str) -> tuple[list[Any], dict[str, Any]]:
    """Make images; return them and the facts about them."""
    answer = live.post(f"/sdapi/v1/{path}", body, headers=headers)
    assert answer.status_code == 200, answer.text
    parsed = answer.json()
    assert set(parsed) == {"images", "parameters", "info"}
    return [pixels(image) for image in parsed["images"]], json.loads(parsed["info"])


def refusal(live: Live, path: str, body: object, status: int = 400) -> str:
    """Return the message of a refusal."""
    answer = live.post(f"/sdapi/v1/{path}", body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}
    return str(answer.json()["detail"])


def test_images_of_consecutive_seeds(live: Live, tiny_bundle: Path) -> None:
    """Image k has seed + k, so that a client can repeat any of them."""
    images, info = made(live, "txt2img", PLAIN | {"seed": 7, "batch_size": 2, "n_iter": 2, "quality": "full"})
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert (info["seed"], info["sampler_name"], info["steps"], info["sd_model_name"]) == (7, "ddim", 4, "plain")
    assert "Seed: 8" in info["infotexts"][1]
    assert info["extra_generation_params"]["level"] == "full"
    session = unetc.load(tiny_bundle)
    for image, seed in zip(images, info["all_seeds"], strict=True):
        expected = to_pixels(session.sample(1, seed=seed, full_model=True))[0]
        np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_a_seed_is_drawn_and_told(live: Live) -> None:
    """The seed of -1 is random; the answer has it, and it gives the same image again."""
    (first,), info = made(live, "txt2img", PLAIN)
    (second,), other = made(live, "txt2img", PLAIN)
    (again,), _ = made(live, "txt2img", PLAIN | {"seed": info["seed"]})
    assert info["seed"] != other["seed"]
    assert (first != second).any()
    np.testing.assert_allclose(first.astype(int), again.astype(int), atol=1)


def test_prompts_and_the_choice_of_a_model(live: Live) -> None:
    """The model is chosen as clients do it."""
    (one,), info = made(live, "txt2img", PROMPTED | {"seed": 1})
    (other,), _ = made(live, "txt2img", PROMPTED | {"seed": 1, "prompt": "a blue circle"})
    (stronger,), _ = made(live, "txt2img", PROMPTED | {"seed": 1, "cfg_scale": 6})
    assert (info["prompt"], info["all_prompts"], info["cfg_scale"]) == ("a red square", ["a red square"], 3.0)
    assert one.shape == (32, 32, 3)
    assert (one != other).any()
    assert (one != stronger).any()


def test_an_image_from_an_image(live: Live) -> None:
    """The result depends on the image and on the strength."""
    body = IMAGE_TO_IMAGE | PLAIN | {"seed": 1}
    dark, bright = np.zeros((16, 16), np.uint8), np.full((20, 24), 255, np.uint8)
    images = [
        made(live, "img2img", body | {"init_images": [encoded(image)], "denoising_strength": strength})[0][0]
        for image, strength in ((dark, 0.5), (bright, 0.5), (dark, 1.0))
    ]
    assert (images[0] != images[1]).any()
    assert (images[0] != images[2]).any()


def test_an_image_of_other_proportions_is_stretched_by_default(live: Live) -> None:
    """It is cut if the client says so."""
    wide = np.repeat(np.array([[0] * 16 + [255] * 16 + [0] * 16], np.uint8), 16, axis=0)
    alike = np.asarray(Image.fromarray(wide).resize((16, 16), Image.Resampling.LANCZOS))
    body = IMAGE_TO_IMAGE | PLAIN | {"seed": 1, "denoising_strength": 0.25}
    expected = {0: alike, 1: np.full((16, 16), 255, np.uint8)}
    for mode, image in expected.items():
        (made_of_wide,), _ = made(live, "img2img", body | {"init_images": [encoded(wide)], "resize_mode": mode})
        (same,), _ = made(live, "img2img", body | {"init_images": [encoded(image)]})
        np.testing.assert_allclose(made_of_wide.astype(int), same.astype(int), atol=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"init_images": ["!"]}, "init_images is not base64"),
        ({"init_images": ["aGVsbG8="]}, "init_images cannot be read"),
        ({"init_images": ["aGVsbG8="] * 2}, "init_images: has 2 images; expected one"),
        ({"init_images": []}, "init_images: expected a list"),
        ({"mask": "aGVsbG8=", "resize_mode": 3}, "resize_mode: is not supported"),
        ({"denoising_strength": 1.5}, "denoising_strength is 1.5"),
    ],
)
def test_wrong_images_are_named(live: Live, change: dict[str, Any], named: str) -> None:
    """The message has the API's own name of the field."""
    image = encoded(np.zeros((16, 16), np.uint8))
    assert named in refusal(live, "img2img", IMAGE_TO_IMAGE | PLAIN | {"init_images": [image]} | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"enable_hr": True, "tiling": True}, ("enable_hr: is not supported", "tiling: is not supported")),
        ({"sampler_name": "Euler a"}, ("sampler_name", "ddim")),
        ({"steps": 777}, ("steps is 777",)),
        ({"seed": -5}, ("seed: expected a whole number",)),
        ({"batch_size": 5, "n_iter": 5}, ("batch_size", "25 images", "at most 16")),
        ({"width": 17}, ("width",)),
        ({"prompt": "a lake"}, ("prompts",)),
        ({"quality": "11%"}, ("quality",)),
    ],
)
def test_wrong_fields_are_named(live: Live, change: dict[str, Any], named: tuple[str, ...]) -> None:
    """Fields that cannot be obeyed are refused, all at once."""
    message = refusal(live, "txt2img", PLAIN | change)
    for words in named:
        assert words in message


def test_bodies_that_are_no_request(live: Live) -> None:
    """Whatever arrives, the error has the API's form."""
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"x": "\\ud800"}', b'{"x": NaN}', b'{"x": 1e999}'):
        answer = live.post("/sdapi/v1/txt2img", content=content)
        assert answer.status_code == 400
        assert answer.json()["error"] == "invalid_value"
    assert "absent" in refusal(live, "txt2img", {"override_settings": {"sd_model_checkpoint": "absent"}}, 404)
    assert live.get("/sdapi/v1/nothing").json()["error"] == "not_found"


def test_what_may_be_chosen(live: Live) -> None:
    """Lists have the fields that clients read, and name no folders."""
    assert live.get("/sdapi/v1/samplers").json() == [{"name": "ddim", "aliases": [], "options": {}}]
    assert live.get("/sdapi/v1/schedulers").json()[0]["label"] == "Automatic"
    models = live.get("/sdapi/v1/sd-models").json()
    assert [(one["title"], one["filename"]) for one in models] == [("plain", "plain"), ("prompted", "prompted")]
    assert all(one["sha256"].startswith(one["hash"]) and len(one["hash"]) == 10 for one in models)
    assert live.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "plain"


def test_a_client_chooses_a_model_for_requests_that_name_none(live: Live) -> None:
    """Clients read all settings, change one and send all of them back."""
    settings = live.get("/sdapi/v1/options").json()
    assert live.post("/sdapi/v1/options", settings | {"sd_model_checkpoint": "prompted"}).json() == {}
    try:
        assert live.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "prompted"
        unnamed = {name: value for name, value in PROMPTED.items() if name != "override_settings"} | {"seed": 3}
        images, info = made(live, "txt2img", unnamed)
        assert info["sd_model_name"] == "prompted"
        np.testing.assert_array_equal(images, made(live, "txt2img", PROMPTED | {"seed": 3})[0])
        for wrong, status, word in (
            ({"sd_model_checkpoint": "absent"}, 404, "absent"),
            ({"sd_model_checkpoint": 1}, 400, "sd_model_checkpoint"),
            ({"CLIP_stop_at_last_layers": 2}, 400, "CLIP_stop_at_last_layers"),
            ({"sd_vae": "other"}, 400, "sd_vae"),
        ):
            answer = live.post("/sdapi/v1/options", wrong)
            assert (answer.status_code, word in answer.json()["detail"]) == (status, True)
        assert live.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "prompted"
    finally:
        live.post("/sdapi/v1/options", {"sd_model_checkpoint": "plain"})


def test_images_are_left_out_on_request(live: Live) -> None:
    """Some clients only want the facts."""
    images, info = made(live, "txt2img", PLAIN | {"send_images": False})
    assert images == []
    assert info["seed"] >= 0


def test_progress_and_interruption(live: Live) -> None:
    """While images are made, there is progress with a preview; an interrupted request answers with it."""
    idle = live.get("/sdapi/v1/progress").json()
    assert (idle["progress"], idle["current_image"], idle["state"]["job_count"]) == (0.0, None, 0)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(made(live, "txt2img", PLAIN | {"steps": 1000})))
    thread.start()
    until(lambda: live.get("/sdapi/v1/progress?skip_current_image=true").json()["progress"] > 0)
    running = live.get("/sdapi/v1/progress").json()
    assert 0 < running["progress"] < 1
    assert running["eta_relative"] > 0
    assert running["state"]["sampling_steps"] == 1000
    assert pixels(running["current_image"]).shape == (16, 16)
    assert live.post("/sdapi/v1/interrupt").json() == {}
    thread.join(timeout=30)
    ((image,), info) = answers[0]
    assert info["interrupted"]
    assert image.shape == (16, 16)
    assert live.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


@in_loop
async def test_an_interrupted_request_answers_with_the_images_that_have_begun(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any, it fails."""
    begun: dict[int, Any] = {}

    async def so_far(_: Running) -> dict[int, Any]:
        return begun

    monkeypatch.setattr(Running, "so_far", so_far)
    async with local(tiny_bundle) as (client, service):

        async def interrupted() -> httpx2.Response:
            body = PLAIN | {"steps": 1000, "batch_size": 3, "seed": 5}
            answer = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=body))
            async with asyncio.timeout(20):
                while not service.running:
                    await asyncio.sleep(0.01)
            await client.post("/sdapi/v1/interrupt")
            return await answer

        none = await interrupted()
        assert none.status_code == 499
        assert "before its first image had begun" in none.json()["detail"]
        begun[1] = np.zeros((1, 16, 16), np.float32)
        one = (await interrupted()).json()
        assert len(one["images"]) == 1
        info = json.loads(one["info"])
        assert (info["all_seeds"], info["interrupted"]) == ([6], True)


@in_loop
@pytest.mark.parametrize("guided", [False, True])
async def test_the_guidance_that_is_reported_is_the_one_that_was_used(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, guided: bool
) -> None:
    """Models of classes may have guidance without having prompts."""
    asked: list[float | None] = []
    async with local(tiny_bundle) as (client, service):
        submit = service.submit

        async def noted(request: ImageRequest) -> Running:
            asked.append(request.guidance_scale)
            return await submit(replace(request, guidance_scale=None))

        monkeypatch.setattr(service, "submit", noted)
        monkeypatch.setattr(PromptReader, "guided", guided)
        for change, scale in (({"cfg_scale": 7.0}, 7.0 if guided else 1.0), ({"cfg_scale": None}, 1.0)):
            answer = await client.post("/sdapi/v1/txt2img", json=PLAIN | change)
            info = json.loads(answer.json()["info"])
            assert info["cfg_scale"] == scale
            assert f"CFG scale: {scale:g}," in info["infotexts"][0]
    assert asked == [7.0 if guided else None, None]


def test_clients_with_other_keys_are_left_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    """Progress and interruption concern the client's own requests."""
    (tmp_path / "keys").write_text("first-key\nsecond-key\n")
    mine, others = {"Authorization": "Bearer first-key"}, {"Authorization": "Bearer second-key"}
    with serving(tiny_bundle, "--api-keys", tmp_path / "keys") as live:
        assert live.get("/sdapi/v1/progress").status_code == 401
        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(made(live, "txt2img", PLAIN | {"steps": 500}, **mine)))
        thread.start()
        until(lambda: live.get("/sdapi/v1/progress", headers=mine).json()["progress"] > 0)
        same = httpx2.get(f"{live.address}/sdapi/v1/progress", auth=("user", "first-key")).json()
        assert same["state"]["job_count"] == 1, "the key counts, not the way it is sent"
        assert live.get("/sdapi/v1/progress", headers=others).json()["state"]["job_count"] == 0
        live.post("/sdapi/v1/interrupt", headers=others)
        thread.join(timeout=60)
        assert not answers[0][1]["interrupted"]
        for password, status in (("second-key", 200), ("third-key", 401), ("", 401)):
            assert httpx2.get(f"{live.address}/sdapi/v1/options", auth=("user", password)).status_code == status
