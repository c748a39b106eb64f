"""Fields of the A1111 web UI's API: which are read, which are ignored, and which are refused.

A field that would change the image, and that cannot be obeyed, is refused unless it has its neutral value: a client
would get another image than it asked for. Fields that leave the image alone, and unknown ones, are ignored, because
clients send nearly all fields in every request.

Source:
    https://github.com/AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py and modules/processing.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .limits import LARGEST_WHOLE

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "enable_hr": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "eta": (0, 1),  # clients send the default of the samplers that read it
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "script_name": ("",),
    "script_args": ([],),
    "refiner_checkpoint": ("", "None"),
    "infotext": ("",),
}
"""Values of refused fields that do not change the image, besides null."""

NEUTRAL_WITH_IMAGE: Mapping[str, tuple[Any, ...]] = {
    "mask": ("",),
    "latent_mask": ("",),
    "resize_mode": (0, 1),  # stretched, or cut, which `crop` tells
    "initial_noise_multiplier": (1,),
    "include_init_images": (False,),
}
"""The same for images from images."""

AUTOMATIC = ("", "Automatic")
"""Values of `scheduler` and `sampler_name` that leave the choice to the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class A1111Request:
    """A request of the A1111 API."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    """None for a random one."""
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    count: int = 1
    """Images in total, `batch_size` * `n_iter`."""
    batch_size: int = 1
    model: str | None = None
    """Name of the model in `override_settings`."""
    quality: str | None = None
    """Quality level; not a field of the web UI."""
    images: tuple[str, ...] = ()
    """Images to start from, base64."""
    crop: bool = False
    """Whether the image to start from covers the size and is cut; otherwise it is stretched."""
    strength: float | None = None
    send_images: bool = True
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Fields as they came, without images."""


def read_fields(body: Mapping[str, Any], scheduler: str, *, with_image: bool) -> tuple[A1111Request, dict[str, str]]:
    """Read a request.

    Args:
        body: Fields of the request.
        scheduler: Name of the scheduler of the bundle.
        with_image: Whether the request is for images from images.

    Returns:
        The request, and a description of every wrong field by its name. The request is valid if there is none.
    """
    problems: dict[str, str] = {}
    reader = _Reader(body, problems)
    for name, neutral in {**NEUTRAL, **(NEUTRAL_WITH_IMAGE if with_image else {})}.items():
        if (value := body.get(name)) is not None and not any(_same(value, one) for one in neutral):
            shown = " or ".join(json.dumps(one) for one in neutral)
            problems[name] = f"is not supported here. Leave it out, or send {shown}"
    scripts = body.get("alwayson_scripts") or {}
    if not isinstance(scripts, Mapping) or any(_is_active(script) for script in scripts.values()):
        problems["alwayson_scripts"] = "is not supported here. Leave it out, or disable every script in it"
    for name in ("sampler_name", "sampler_index"):
        wanted = reader.text(name)
        if wanted not in (None, *AUTOMATIC, scheduler):
            problems[name] = f"is {_short(wanted)}; the model has one sampler, {scheduler}"
    wanted = reader.text("scheduler")
    if wanted is not None and wanted not in (*AUTOMATIC, scheduler) and wanted.lower() != "automatic":
        problems["scheduler"] = f"is {_short(wanted)}; the model has one schedule, Automatic"
    batch_size = reader.whole("batch_size", 1) or 1
    batches = reader.whole("n_iter", 1) or 1
    seed = reader.whole("seed", -1)
    return (
        A1111Request(
            prompt=reader.text("prompt") or "",
            negative_prompt=reader.text("negative_prompt") or "",
            seed=None if seed == -1 else seed,
            steps=reader.whole("steps", 1),
            guidance_scale=reader.number("cfg_scale"),
            width=reader.whole("width", 1),
            height=reader.whole("height", 1),
            count=batch_size * batches,
            batch_size=batch_size,
            model=reader.override(),
            quality=reader.text("quality"),
            images=reader.images() if with_image else (),
            crop=with_image and body.get("resize_mode") == 1,
            strength=reader.number("denoising_strength") if with_image else None,
            send_images=body.get("send_images") is not False,
            parameters={name: value for name, value in body.items() if name not in ("init_images", "mask")},
        ),
        problems,
    )


class _Reader:
    """Reads fields by their types; null counts as absent."""

    def __init__(self, body: Mapping[str, Any], problems: dict[str, str]) -> None:
        self._body = body
        self._problems = problems

    def text(self, name: str) -> str | None:
        value = self._body.get(name)
        if value is None or isinstance(value, str):
            return value
        self._problems[name] = f"expected a string, got {_short(value)}"
        return None

    def whole(self, name: str, least: int) -> int | None:
        value = self._body.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (type(value) is int and least <= value <= LARGEST_WHOLE):
            return value
        self._problems[name] = f"expected a whole number from {least} to {LARGEST_WHOLE}, got {_short(value)}"
        return None

    def number(self, name: str) -> float | None:
        value = self._body.get(name)
        if value is None:
            return None
        if type(value) in (int, float) and abs(value) < 1e9:
            return float(value)
        self._problems[name] = f"expected a number, got {_short(value)}"
        return None

    def override(self) -> str | None:
        """Read the model in `override_settings`, which may set nothing else."""
        settings = self._body.get("override_settings")
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            self._problems["override_settings"] = f"expected an object, got {_short(settings)}"
            return None
        model = settings.get("sd_model_checkpoint")
        for name in settings:
            if name != "sd_model_checkpoint":
                self._problems[f"override_settings.{name}"] = "is not supported here. Only sd_model_checkpoint is"
        if model is None or isinstance(model, str):
            return model
        self._problems["override_settings.sd_model_checkpoint"] = f"expected a string, got {_short(model)}"
        return None

    def images(self) -> tuple[str, ...]:
        """Read the images to start from."""
        value = self._body.get("init_images")
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return tuple(value)
        self._problems["init_images"] = "expected a list of at least one image, each as a base64 string"
        return ()


def _same(value: Any, neutral: Any) -> bool:
    """Compare as JSON does, where true is not 1."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _is_active(script: Any) -> bool:
    """Check whether a script would do something; clients send those that are installed with `false` or no arguments."""
    arguments = script.get("args") if isinstance(script, Mapping) else script
    return not (isinstance(arguments, Sequence) and not any(arguments))


def _short(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
