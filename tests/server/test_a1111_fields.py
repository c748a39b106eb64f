"""Fields of the A1111 API: requests of its clients pass, and fields that cannot be obeyed are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from unetc.server.a1111_fields import A1111Request, read_fields

TEXT_TO_IMAGE: dict[str, Any] = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0, "prompt": "a lake",
    "styles": [], "seed": -1, "subseed": -1, "subseed_strength": 0.0, "seed_resize_from_h": 0, "seed_resize_from_w": 0,
    "batch_size": 2, "n_iter": 3, "steps": 20, "cfg_scale": 7.0, "width": 64, "height": 32, "restore_faces": False,
    "tiling": False, "do_not_save_samples": False, "do_not_save_grid": False, "negative_prompt": "fog", "eta": 1.0,
    "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
    "override_settings_restore_afterwards": True, "sampler_name": "ddim", "sampler_index": "ddim", "script_name": None,
    "script_args": [], "send_images": True, "save_images": False, "alwayson_scripts": {"ADetailer": {"args": [False]}},
}  # fmt: skip
"""Fields that the most used client sends for txt2img."""

IMAGE_TO_IMAGE = TEXT_TO_IMAGE | {
    "init_images": ["aGVsbG8="], "resize_mode": 0, "image_cfg_scale": 1.5, "mask_blur": 4, "inpainting_fill": 0,
    "inpaint_full_res": True, "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 1, "include_init_images": False,
}  # fmt: skip
"""Fields that it sends for img2img."""


def test_the_requests_of_clients_pass() -> None:
    """Neutral values of all other fields are ignored."""
    request, problems = read_fields(TEXT_TO_IMAGE, "ddim", with_image=False)
    assert problems == {}
    assert (request.prompt, request.negative_prompt, request.seed) == ("a lake", "fog", None)
    assert (request.count, request.batch_size, request.steps, request.guidance_scale) == (6, 2, 20, 7.0)
    assert (request.width, request.height, request.strength) == (64, 32, None)
    request, problems = read_fields(IMAGE_TO_IMAGE | {"seed": 5}, "ddim", with_image=True)
    assert problems == {}
    assert (request.images, request.strength, request.seed) == (("aGVsbG8=",), 0.7, 5)


def test_an_empty_request_has_the_defaults_of_the_bundle() -> None:
    """Null and absent fields leave the choice to the bundle."""
    assert read_fields({}, "ddim", with_image=False) == (A1111Request(), {})
    body = dict.fromkeys(TEXT_TO_IMAGE)
    request, problems = read_fields(body, "ddim", with_image=False)
    assert problems == {}
    assert request == A1111Request(parameters=body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_hr", True),
        ("enable_hr", 1),
        ("restore_faces", True),
        ("tiling", True),
        ("styles", ["film"]),
        ("subseed_strength", 0.3),
        ("seed_resize_from_w", 512),
        ("eta", 0.5),
        ("s_churn", 2),
        ("script_name", "x/y plot"),
        ("script_args", [1]),
        ("refiner_checkpoint", "refiner"),
        ("alwayson_scripts", {"ControlNet": {"args": [{"model": "canny"}]}}),
        ("alwayson_scripts", ["ControlNet"]),
        ("sampler_name", "Euler a"),
        ("sampler_index", "Euler a"),
        ("scheduler", "Karras"),
        ("seed", -2),
        ("seed", "5"),
        ("seed", 2**63),
        ("steps", 10**30),
        ("width", 1e300),
        ("batch_size", 10**30),
        ("n_iter", 10**30),
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("batch_size", 0),
        ("n_iter", "2"),
        ("cfg_scale", "7"),
        ("prompt", ["a", "b"]),
        ("negative_prompt", 3),
        ("override_settings", []),
    ],
)
def test_a_wrong_or_unsupported_field_is_named(name: str, value: Any) -> None:
    """One wrong field gives one problem, under its name."""
    assert list(read_fields(TEXT_TO_IMAGE | {name: value}, "ddim", with_image=False)[1]) == [name]


def test_every_wrong_field_is_named_at_once() -> None:
    """A client sees everything that it has to change."""
    wrong = {
        "tiling": True,
        "steps": -1,
        "override_settings": {"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": 3},
    }
    _, problems = read_fields(TEXT_TO_IMAGE | wrong, "ddim", with_image=False)
    assert set(problems) == {
        "tiling",
        "steps",
        "override_settings.CLIP_stop_at_last_layers",
        "override_settings.sd_model_checkpoint",
    }


@pytest.mark.parametrize("name", ["sampler_name", "scheduler"])
def test_the_one_sampler_is_named_in_a_refusal(name: str) -> None:
    """The message says which value would do."""
    _, problems = read_fields({name: "Euler a"}, "ddim", with_image=False)
    assert ("ddim" if name == "sampler_name" else "Automatic") in problems[name]


@pytest.mark.parametrize("images", [None, [], "aGVsbG8=", [3]])
def test_images_are_needed_where_they_belong(images: Any) -> None:
    """An image from an image needs one; an image from a text ignores it."""
    body = IMAGE_TO_IMAGE | {"init_images": images}
    assert list(read_fields(body, "ddim", with_image=True)[1]) == ["init_images"]
    assert read_fields(body, "ddim", with_image=False)[1] == {}


@pytest.mark.parametrize(("value", "crop"), [(None, False), (0, False), (1, True), (1.0, True)])
def test_an_image_is_stretched_unless_it_is_to_be_cut(value: Any, crop: bool) -> None:
    """As in the web UI, where 0 is to resize alone and 1 to cut and resize."""
    request, problems = read_fields(IMAGE_TO_IMAGE | {"resize_mode": value}, "ddim", with_image=True)
    assert problems == {}
    assert request.crop == crop
    for wrong in (2, 3, True, "1"):
        assert list(read_fields(IMAGE_TO_IMAGE | {"resize_mode": wrong}, "ddim", with_image=True)[1]) == ["resize_mode"]


def test_a_mask_is_refused_for_images_alone() -> None:
    """Painting inside a mask is not supported."""
    assert list(read_fields(IMAGE_TO_IMAGE | {"mask": "aGVsbG8="}, "ddim", with_image=True)[1]) == ["mask"]


def test_override_settings_choose_the_model() -> None:
    """As clients do it."""
    request, problems = read_fields({"override_settings": {"sd_model_checkpoint": "lakes"}}, "ddim", with_image=False)
    assert problems == {}
    assert request.model == "lakes"
