"""Decoders make the images that diffusers' own pipelines make of the same latents."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.every_day import every_nth
from tests.ground.test_models import edit, refusal
from tests.models import condition_well
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.compiler.graph.decoder import export_decoder
from unetc.models.find import find_model
from unetc.models.vae import AUTOENCODERS
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.decoder import Decoder

diffusers: Any = untyped_diffusers

STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 0.4], "latents_std": [1.5, 0.7, 1.2, 0.9]}

KL: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "act_fn": "gelu",
    "latent_channels": 8,
    "norm_num_groups": 2,
    "sample_size": 8,
    "scaling_factor": 0.4,
    "shift_factor": 0.7,
    "latents_mean": STATISTICS["latents_mean"],
    "latents_std": STATISTICS["latents_std"],
    "force_upcast": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}
"""Another value for every key of AutoencoderKL."""

TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "encoder_block_out_channels": [4, 8],
    "decoder_block_out_channels": [16, 16],
    "act_fn": "gelu",
    "upsample_fn": "bilinear",
    "latent_channels": 8,
    "upsampling_scaling_factor": 4,
    "num_encoder_blocks": [2, 1],
    "num_decoder_blocks": [2, 1],
    "latent_magnitude": 5,
    "latent_shift": 0.2,
    "force_upcast": True,
    "scaling_factor": 0.4,
    "shift_factor": 0.7,
}
"""Another value for every key of AutoencoderTiny."""

TINY_BASE = {
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [1, 1],
    "num_decoder_blocks": [1, 1],
}

NAMES = {"out_channels": "images of 4 channels", "latent_channels": "latents of 8"}
"""Words of a refusal that name the key."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "StableDiffusionPipeline": save_stable_diffusion(folder / "sd"),
        "StableDiffusionXLPipeline": save_stable_diffusion_xl(folder / "sdxl"),
    }


def with_vae(original: Path, folder: Path, kind: str, **changes: Any) -> Path:
    """Copy a pipeline and give it another autoencoder, with random weights."""
    shutil.copytree(original, folder)
    base = json.loads((folder / "vae/config.json").read_text()) if kind == "AutoencoderKL" else TINY_BASE
    autoencoder = getattr(diffusers, kind).from_config({**base, **changes})
    condition_well(autoencoder, 7)
    shutil.rmtree(folder / "vae")
    autoencoder.save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", kind])
    return folder


_LOADED: dict[str, Any] = {}


def whole(kind: str, folder: Path) -> Any:
    """Load a pipeline once; its other parts are alike in all tests."""
    if kind not in _LOADED:
        _LOADED[kind] = getattr(diffusers, kind).from_pretrained(folder, vae=None)
    return _LOADED[kind]


def decoded_by_diffusers(folder: Path, latents: NDArray[np.float32]) -> NDArray[Any]:
    """Let the pipeline itself decode latents: they replace its own after the last step.

    Returns:
        [batch, 3, height, width] in 0 to 1.
    """
    index = json.loads((folder / "model_index.json").read_text())
    autoencoder = getattr(diffusers, index["vae"][1]).from_pretrained(folder / "vae")
    base = whole(index["_class_name"], folder)
    options = {"add_watermarker": False} if "text_encoder_2" in index else {"requires_safety_checker": False}
    pipeline = type(base)(**{**base.components, "vae": autoencoder}, **options)
    pipeline.set_progress_bar_config(disable=True)
    images: NDArray[Any] = pipeline(
        ["a red square"] * len(latents),
        num_inference_steps=1,
        height=32,
        width=32,
        output_type="np",
        callback_on_step_end=lambda *_: {"latents": torch.from_numpy(latents)},
    ).images
    return images.transpose(0, 3, 1, 2)


def draw(height: int = 16, width: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((2, 4, height, width)).astype(np.float32)


def decoded(folder: Path, latents: NDArray[np.float32]) -> NDArray[Any]:
    """Decode latents with unetc in torch: [batch, 3, height, width] in 0 to 1."""
    decoder = find_model(str(folder)).load_decoder()
    assert decoder is not None
    with torch.no_grad():
        return np.clip(decoder(torch.from_numpy(latents)).numpy() / 2 + 0.5, 0, 1)


def decoded_by_graph(folder: Path, *latents: NDArray[np.float32]) -> Iterator[NDArray[Any]]:
    """Decode arrays of latents with the exported graph."""
    model = find_model(str(folder))
    decoder = model.load_decoder()
    assert decoder is not None
    exported = Decoder(export_decoder(decoder), model.decoder_scale, open_backend("onnxruntime:cpu", threads=1))
    for one in latents:
        yield np.clip(exported(one) / 2 + 0.5, 0, 1)


def check_equal(actual: NDArray[Any], expected: NDArray[Any], limit: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert np.std(expected) > 0.01, "an image without content would prove nothing"
    assert float(np.abs(actual - expected).max()) < limit


@pytest.mark.parametrize(
    ("kind", "key", "pipeline"),
    every_nth(
        3,
        [*(("AutoencoderKL", key) for key in KL), *(("AutoencoderTiny", key) for key in TINY)],
        ["StableDiffusionPipeline", "StableDiffusionXLPipeline"],
    ),
)
def test_every_key_changes_the_image_as_in_diffusers_or_is_refused_by_name(
    originals: dict[str, Path], tmp_path: Path, pipeline: str, kind: str, key: str
) -> None:
    value = (KL if kind == "AutoencoderKL" else TINY)[key]
    changes = {key: value}
    if key in STATISTICS:  # diffusers reads them only together
        changes = STATISTICS
    folder = with_vae(originals[pipeline], tmp_path / "changed", kind, **changes)
    if key in ("out_channels", "latent_channels", "upsampling_scaling_factor"):
        assert NAMES.get(key, key) in refusal(lambda: find_model(str(folder)))
    else:
        check_equal(decoded(folder, draw()), decoded_by_diffusers(folder, draw()))


@pytest.mark.parametrize(("kind", "table"), [("AutoencoderKL", KL), ("AutoencoderTiny", TINY)])
def test_every_key_of_an_autoencoder_is_tried(kind: str, table: dict[str, Any]) -> None:
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters.keys() - {"self"}
    assert table.keys() == known
    assert AUTOENCODERS[kind] - {"block_out_channels"} == known - {"block_out_channels"}
    assert {
        key: parameter.default
        for key, parameter in inspect.signature(getattr(diffusers, kind).__init__).parameters.items()
        if key in table and table[key] == parameter.default
    } == {}


@pytest.mark.parametrize(
    "pipeline", [pytest.param("StableDiffusionPipeline", marks=pytest.mark.nightly), "StableDiffusionXLPipeline"]
)
def test_statistics_of_latents_are_sdxls_alone(  # A2
    originals: dict[str, Path], tmp_path: Path, pipeline: str
) -> None:
    folder = with_vae(originals[pipeline], tmp_path / "with", "AutoencoderKL", **STATISTICS)
    without = with_vae(originals[pipeline], tmp_path / "without", "AutoencoderKL")
    (actual,) = decoded_by_graph(folder, draw())
    check_equal(actual, decoded_by_diffusers(folder, draw()), 1e-5)
    if pipeline == "StableDiffusionPipeline":
        (plain,) = decoded_by_graph(without, draw())
        assert np.array_equal(actual, plain)
    else:
        assert float(np.abs(actual - decoded(without, draw())).max()) > 0.01


@pytest.mark.parametrize("given", STATISTICS)
def test_one_statistic_alone_is_ignored_as_in_diffusers(originals: dict[str, Path], tmp_path: Path, given: str) -> None:
    folder = with_vae(
        originals["StableDiffusionXLPipeline"], tmp_path / "one", "AutoencoderKL", **{given: STATISTICS[given]}
    )
    check_equal(decoded(folder, draw()), decoded_by_diffusers(folder, draw()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(
            "AutoencoderKL",
            {"use_post_quant_conv": False, "mid_block_add_attention": False},
            marks=pytest.mark.nightly,
        ),
        pytest.param("AutoencoderTiny", {}, marks=pytest.mark.nightly),  # C3
        ("AutoencoderTiny", {"upsample_fn": "bilinear", "scaling_factor": 0.5}),
        pytest.param(
            "AutoencoderTiny",
            {"decoder_block_out_channels": [8] * 3, "num_decoder_blocks": [1] * 3},
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_exported_decoders_decode_oblong_latents(
    originals: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    folder = with_vae(originals["StableDiffusionPipeline"], tmp_path / "changed", kind, **changes)
    drawn = [draw(*size) for size in ((16, 16), (12, 20), (5, 3))]
    for latents, images in zip(drawn, decoded_by_graph(folder, *drawn), strict=True):
        check_equal(images, decoded_by_diffusers(folder, latents), 1e-5)


@pytest.mark.parametrize("kind", ["AsymmetricAutoencoderKL", "ConsistencyDecoderVAE", "VQModel", "AutoencoderDC"])
def test_other_classes_are_refused_by_name(originals: dict[str, Path], tmp_path: Path, kind: str) -> None:  # C3
    folder = Path(shutil.copytree(originals["StableDiffusionPipeline"], tmp_path / "other"))
    edit(folder / "model_index.json", vae=["diffusers", kind])
    message = refusal(lambda: find_model(str(folder)))
    assert f"has a {kind} as its vae" in message
    assert "AutoencoderKL, AutoencoderTiny" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scaling_factor": None}, "scaling_factor None"),
        ({"scaling_factor": 0}, "scaling_factor 0"),
        ({"scaling_factor": "1"}, "scaling_factor '1'"),
        ({"block_out_channels": None}, "block_out_channels None"),
        ({"latents_mean": [1, 2], "latents_std": [1, 2]}, "Expected 4 numbers"),
        ({"gamma": 2.2}, "'gamma'"),
    ],
)
def test_settings_that_make_no_image_are_refused(
    originals: dict[str, Path], tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    folder = Path(shutil.copytree(originals["StableDiffusionXLPipeline"], tmp_path / "changed"))
    edit(folder / "vae/config.json", **changes)
    assert named in refusal(lambda: find_model(str(folder)))
