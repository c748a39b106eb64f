"""A pytest plugin that runs diffusers' own pipeline tests with drop-ins in the place of their UNets.

The tests are in the repository of diffusers, not in its package. `benchmarks/bench_diffusers_tests.py` runs them in a
checkout, without and with drop-ins, and compares. The drop-ins run the full model, so every image must equal the
original UNet's. With HF_HUB_OFFLINE=1, a tiny tokenizer stands in for the ones that these tests fetch from the Hub.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
import transformers as untyped_transformers
from small_tokenizer import write_tokenizer
from torch import nn

import unetc
import unetc.diffusers
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts import Phase, Plan, Prediction
from unetc.artifacts.profile import ModelReference
from unetc.call import AESTHETIC_NUMBERS, SIZE_NUMBERS, CallSignature
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.conditions import Conditions
from unetc.models.model import Model

diffusers: Any = untyped_diffusers
transformers: Any = untyped_transformers

CACHE = "UNETC_SUITE_CACHE"
"""Environment variable with a folder for bundles; equal UNets share one."""

ORIGINAL = "UNETC_SUITE_ORIGINAL"
"""Environment variable that is 1 in the run with the original UNets."""

_TOKENS = 77
_WORDS = "a painting of squirrel eating burger photo face fantasy turtle french fries"
"""Words of the prompts in these tests; as in the Hub's tokenizer, they are single tokens."""
_POOLED = 32
"""Width of the pooled text in these tests; it tells how many size numbers a UNet of SDXL takes."""


class UNetAlone:
    """A model that is a UNet in memory."""

    guidance_scale = 1.0
    decoder_scale = 1

    def __init__(self, unet: Any, *, controlnet: bool) -> None:
        """Describe a UNet."""
        self._unet = unet
        config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(repr((sorted(config.items()), controlnet)).encode())
        for name, value in sorted(unet.state_dict().items()):
            digest.update(name.encode() + value.float().numpy().tobytes())
        name = type(unet).__name__
        self.denoiser_config = config
        self.scheduler_config = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
        }
        self.reference = ModelReference(
            name="tiny", sha256=digest.hexdigest(), pipeline="none", denoiser=name, controlnet=controlnet
        )
        channels = min(config["in_channels"], config["out_channels"])
        self.calls = CallSignature.of(
            name, config, channels=channels, size_numbers=_size_numbers(config), controlnet=controlnet
        )
        size = config["sample_size"]
        self.sample_shape = channels, *((size, size) if isinstance(size, int) else tuple(size))

    def prompts(self) -> tuple[str, ...]:
        """Name two rows of conditions."""
        return "a", "b"

    def encode(self, prompts: Sequence[str], guidance_scale: float, **_: object) -> Conditions:
        """Draw conditions."""
        sizes = {"tokens": _TOKENS, "height": self.sample_shape[1], "width": self.sample_shape[2]}
        rng, own = np.random.default_rng(0), {}
        for item in self.calls.conditions:
            shape = len(prompts), *(axis if isinstance(axis, int) else sizes[axis] for axis in item.axes)
            own[item.name] = item.read(np.zeros(shape) if item.classes else rng.standard_normal(shape))
        return Conditions(own=own, controlnet=self.calls.controlnet)

    def load_decoder(self) -> None:
        """Return nothing: samples are images here."""

    def load_encoder(self) -> None:
        """Return nothing: samples are images here."""

    def load_text(self) -> None:
        """Return nothing: conditions are drawn."""

    def load_denoiser(self) -> nn.Module:
        """Copy the UNet."""
        denoiser: nn.Module = copy.deepcopy(self._unet).float().eval().requires_grad_(False)
        return denoiser


def _size_numbers(config: dict[str, Any]) -> int:
    if config.get("addition_embed_type") != "text_time":
        return SIZE_NUMBERS
    numbers = (config["projection_class_embeddings_input_dim"] - _POOLED) // config["addition_time_embed_dim"]
    return numbers if numbers in (SIZE_NUMBERS, AESTHETIC_NUMBERS) else SIZE_NUMBERS


def dropin_for(unet: Any, *, controlnet: bool) -> Any:
    """Build a bundle of a UNet, or find it in the cache, and load it as a drop-in that runs the full model."""
    if not isinstance(unet, diffusers.UNet2DConditionModel | diffusers.UNet2DModel):
        return unet
    model, root = UNetAlone(unet, controlnet=controlnet), Path(os.environ[CACHE])
    bundle = root / model.reference.sha256[:16]
    if not (bundle / "manifest.json").exists():
        with torch.random.fork_rng(devices=[]):
            _build(model, bundle, root / "work")
    loaded = unetc.diffusers.load(bundle, full_model=True)
    return loaded if unet.dtype == torch.float32 else loaded.to(unet.dtype)


def _build(model: Model, bundle: Path, work: Path) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    options = AnalysisOptions(
        steps=2, samples=1, bins=1, batch=1, rounds=1, threads=1, decisive=1, prompts=("a",), guidance_scale=1.0
    )
    profile = analyze_model(model, options, cache=work)
    low, high = profile.bins[0].low, profile.bins[-1].high
    plan = Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=1,
        engines=with_emissions([{}], profile.components),
        phases=(Phase(low=low, high=high, cycle=(0,)),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=1.0),
    )
    building = BuildOptions(plan=PlanOptions(budget=0.0), steps=2, controls=False)
    build(model, profile, bundle, building, cache=work, plan=plan)
    torch.use_deterministic_algorithms(deterministic)


def pytest_configure(config: pytest.Config) -> None:
    """Let a tiny tokenizer stand in for those on the Hub, if that cannot be reached."""
    if os.environ.get("HF_HUB_OFFLINE") != "1":
        return
    original = transformers.CLIPTokenizer.from_pretrained.__func__

    def from_pretrained(kind: type[Any], /, name: object, *values: object, **options: object) -> Any:
        if str(name).startswith("hf-internal-testing/"):
            return write_tokenizer(_WORDS.split(), _TOKENS, Path(os.environ[CACHE]) / "tokenizer")
        return original(kind, name, *values, **options)

    transformers.CLIPTokenizer.from_pretrained = classmethod(from_pretrained)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Replace the UNet in the components of every test class, unless the run is the original one."""
    if os.environ.get(ORIGINAL) == "1":
        return
    for kind in {item.cls for item in items if isinstance(item, pytest.Function) and item.cls is not None}:
        if hasattr(kind, "get_dummy_components"):
            kind.get_dummy_components = _replacing(kind.get_dummy_components, "controlnet" in kind.__module__.lower())


def _replacing(original: Any, controlnet: bool) -> Any:
    def get_dummy_components(self: Any, *values: object, **options: object) -> dict[str, Any]:
        components: dict[str, Any] = original(self, *values, **options)
        return components | {"unet": dropin_for(components["unet"], controlnet=controlnet)}

    return get_dummy_components
