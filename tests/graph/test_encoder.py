"""Encoders make the latents that diffusers' pipelines for image to image make of the same images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from tests.graph.test_decoder import STATISTICS, with_vae
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_xl
from unetc.compiler.graph.encoder import export_encoder
from unetc.errors import CompileError, ShapeMismatch
from unetc.models.find import find_model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.encoder import Encoder

diffusers: Any = untyped_diffusers


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sd": save_stable_diffusion(folder / "sd"), "sdxl": save_stable_diffusion_xl(folder / "sdxl")}


def images(batch: int = 2, height: int = 24, width: int = 32) -> np.ndarray[Any, np.dtype[np.float32]]:
    drawn = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
    return np.clip(drawn, -1, 1)


def encoders_of(folder: Path, *targets: str) -> Iterator[Encoder]:
    model = find_model(str(folder))
    loaded = model.load_encoder()
    assert loaded is not None
    graph = export_encoder(loaded)
    for target in targets:
        yield Encoder(graph, model.decoder_scale, loaded.latents.channels, open_backend(target, threads=1))


@pytest.mark.parametrize(
    ("pipeline", "changes"),
    [
        pytest.param("sd", {"scaling_factor": 0.4}, marks=pytest.mark.nightly),
        pytest.param("sd", STATISTICS, marks=pytest.mark.nightly),
        ("sdxl", STATISTICS),
        pytest.param("sd", {}, marks=pytest.mark.nightly),
        pytest.param("sdxl", {}, marks=pytest.mark.nightly),
        pytest.param("sdxl", {"scaling_factor": 0.4}, marks=pytest.mark.nightly),
    ],
)
def test_latents_are_those_of_diffusers(
    originals: dict[str, Path], tmp_path: Path, pipeline: str, changes: dict[str, Any]
) -> None:
    folder = with_vae(originals[pipeline], tmp_path / "changed", "AutoencoderKL", **changes)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        mode = vae.encode(torch.from_numpy(images())).latent_dist.mode()
    expected = mode * vae.config.scaling_factor
    if changes is STATISTICS and pipeline == "sdxl":  # as StableDiffusionXLImg2ImgPipeline does
        mean, std = (torch.tensor(STATISTICS[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
        expected = (mode - mean) * vae.config.scaling_factor / std
    for encoder in encoders_of(folder, "onnxruntime:cpu", "torch:cpu"):
        latents = encoder(images())
        assert latents.dtype == np.float32
        np.testing.assert_allclose(latents, expected.numpy(), atol=1e-5)


def test_latents_of_a_tiny_autoencoder_are_those_of_diffusers(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = with_vae(originals["sd"], tmp_path / "tiny", "AutoencoderTiny", scaling_factor=0.7)
    vae = diffusers.AutoencoderTiny.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(images())).latents * 0.7
    (encoder,) = encoders_of(folder, "onnxruntime:cpu")
    np.testing.assert_allclose(encoder(images()), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("AutoencoderKL", {"in_channels": 4}, "the encoder cannot be exported"),
        (
            "AutoencoderTiny",
            {"encoder_block_out_channels": [8, 8, 8], "num_encoder_blocks": [1, 1, 1]},
            r"makes latents of shape \(2, 4, 4, 6\) .* Expected \(2, 4, 8, 12\), as the decoder takes them",
        ),
    ],
)
def test_an_encoder_that_does_not_fit_the_decoder_is_refused(
    originals: dict[str, Path], tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    loaded = find_model(str(with_vae(originals["sd"], tmp_path / "changed", kind, **changes))).load_encoder()
    assert loaded is not None
    with pytest.raises(CompileError, match=message):
        export_encoder(loaded)


@pytest.mark.parametrize("shape", [(1, 3, 24, 31), (1, 1, 24, 32), (3, 24, 32)])
def test_images_of_another_shape_are_refused(originals: dict[str, Path], shape: tuple[int, ...]) -> None:
    encoder = Encoder(b"", 2, 4, open_backend("null", threads=1))
    with pytest.raises(ShapeMismatch, match="with sides that are multiples of 2"):
        encoder(np.zeros(shape, np.float32))
    assert encoder(np.zeros((2, 3, 4, 6), np.float32)).shape == (2, 4, 2, 3)
