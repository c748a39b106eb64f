"""Tensor names of LoRA files find the layers that diffusers finds, in models of real structure."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import pytest
import torch
import transformers as untyped_transformers
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)

from tests.loras import layers
from unetc.models.lora_names import foreign_method, spellings, take_apart

diffusers: Any = untyped_diffusers
transformers: Any = untyped_transformers
CONFIGS = Path(__file__).parents[1] / "configs"
DOWN, UP = "lora_down.weight", "lora_up.weight"
STABILITY = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb", "out_2")


def real_unet(name: str) -> Any:
    """Build a UNet of real size and structure, without weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel.from_config(json.loads((CONFIGS / f"{name}.json").read_text()))


def diffusers_path(kohya: str, config: Any) -> str:
    """Ask diffusers for the path of the UNet layer that a name in kohya's format means."""
    tensors = {f"{kohya}.{end}": torch.zeros(1) for end in (DOWN, UP)}
    tensors, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(tensors, config))
    own = convert_unet_state_dict_to_peft({name.removeprefix("unet."): value for name, value in tensors.items()})
    (path,) = {name.partition(".lora_")[0] for name in own}
    return str(path)


def found(name: str, part: str, places: dict[str, str]) -> str | None:
    own = take_apart(f"{name}.{DOWN}")
    assert own is not None
    assert own.part == part
    return places.get(own.layer)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_kohya_names_of_unets_mean_the_layers_that_diffusers_finds(name: str) -> None:
    unet = real_unet(name)
    paths = [path for path, _ in layers(unet)]
    places = spellings("unet", paths)
    assert len(paths) > 250
    for path in paths:
        kohya = f"lora_unet_{path.replace('.', '_')}"
        assert found(kohya, "unet", places) == path
        if path == "add_embedding.linear_1" or path == "add_embedding.linear_2":
            continue  # diffusers knows only Stability AI's names of these two
        assert diffusers_path(kohya, unet.config) == path


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_stability_names_of_unets_mean_the_layers_that_diffusers_finds(name: str) -> None:
    """Trainers of SDXL use the block numbers of Stability AI's code, which run through all levels."""
    unet = real_unet(name)
    paths = [path for path, _ in layers(unet)]
    own = {flat: path for flat, path in spellings("unet", paths).items() if flat.startswith(STABILITY)}
    assert sorted(own.values()) == sorted(paths)  # every layer has one, and only one
    for flat, path in own.items():
        assert found(f"lora_unet_{flat}", "unet", own) == path
        expected = diffusers_path(f"lora_unet_{flat}", unet.config)
        if name != "sdxl" and "upsamplers" in path and "_1_conv" in flat:
            continue  # diffusers takes the upsampler of a level without attention for attention
        assert expected == path, flat


@pytest.mark.parametrize("number", ["", "2"])
def test_kohya_names_of_text_encoders_mean_the_layers_that_diffusers_finds(number: str) -> None:
    config = transformers.CLIPTextConfig(num_hidden_layers=12, vocab_size=8, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
        encoder = transformers.CLIPTextModelWithProjection(config)
    part = f"text_encoder{'_2' if number else ''}"
    paths = [path for path, _ in layers(encoder)]
    places = spellings(part, paths)
    kohya = {path: f"lora_te{number}_{path.replace('.', '_')}" for path in paths}
    assert len(kohya) == 12 * 6 + 1
    for path, name in kohya.items():
        assert found(name, part, places) == path
    tensors = {f"{name}.{end}": torch.zeros(1) for name in kohya.values() for end in (DOWN, UP)}
    tensors, _ = _convert_non_diffusers_lora_to_diffusers(tensors)
    own = {name.removeprefix(f"{part}."): value for name, value in tensors.items()}
    converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    expected = {name.partition(".lora_")[0].removesuffix(".lora") for name in converted}
    assert expected == {name.removesuffix(".lora") for name in paths}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_no_two_layers_share_a_spelling(name: str) -> None:
    paths = [path for path, _ in layers(real_unet(name))]
    places = spellings("unet", paths)
    for path in paths:
        assert places[path.replace(".", "_")] == path


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.hada_t2", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lokr_w2_b", "LoKr"),
        ("lora_unet_x.on_input", "IA3"),
        ("base_model.model.x.ia3_l", "IA3"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.oft_diag", "OFT"),
        ("base_model.model.x.oft_R.weight", "OFT"),
        ("base_model.model.x.boft_R", "BOFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_unet_x.b2.weight", "GLoRA"),
        ("lora_unet_x.diff", "full difference of weights"),
        ("lora_unet_x.diff_b", "full difference of weights"),
        ("lora_unet_x.w_norm", "norm weights"),
        ("lora_unet_x.b_norm", "norm weights"),
        ("base_model.model.x.lora_embedding_A", "LoRA of an embedding"),
        ("base_model.model.x.lora_E", "AdaLoRA"),
        ("base_model.model.x.vera_lambda_b", "VeRA"),
        ("unet.x.lora_A.weight", None),
        ("lora_unet_x.lora_mid.weight", None),
        ("lora_unet_x.dora_scale", None),
        ("lora_unet_x.alpha", None),
    ],
)
def test_other_methods_are_known_by_their_tensors(name: str, method: str | None) -> None:
    assert foreign_method(name) == method
