"""LoRAs with random factors for the tiny pipelines, saved in the formats of diffusers and of kohya's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import peft as untyped_peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

diffusers: Any = untyped_diffusers
peft: Any = untyped_peft

RANK = 2

_UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def save_lora(folder: Path, path: Path, *, seed: int = 0, text: bool = True) -> Path:
    """Save a LoRA in the format of diffusers, with different alphas per layer.

    Args:
        folder: Pipeline that the LoRA is made for.
        path: Path of the .safetensors file.
        seed: Seed of its factors.
        text: Whether it also changes the text encoders.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    parts = ["unet", *(name for name in ("text_encoder", "text_encoder_2") if text and hasattr(pipeline, name))]
    saved: dict[str, Any] = {}
    for part in parts:
        model = getattr(pipeline, part)
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=3.0,
            alpha_pattern={"to_k": 5.0, "fc1": 0.5},
            target_modules=list(_UNET_LAYERS if part == "unet" else _TEXT_LAYERS),
        )
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) / len(parameter[0].flatten()) ** 0.5
        saved[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **saved)
    return path


def save_as_kohya(lora: Path, path: Path, alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """Save the factors of a LoRA with kohya's layer names; alphas are chosen by the end of a layer's name.

    Returns:
        Change that it adds to each weight at scale 1, by name of the weight.
    """
    tensors = load_file(lora)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te_text_model"}
    renamed, added = {}, {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        down, up = tensors[name], tensors[f"{layer}.lora_B.weight"]
        part, _, place = layer.partition(".")
        new = f"{prefixes[part]}_{place.replace('.', '_')}"
        alpha = next((alpha for end, alpha in alphas.items() if layer.endswith(end)), float(RANK))
        renamed |= {f"{new}.lora_down.weight": down.half(), f"{new}.lora_up.weight": up.half()}
        renamed[f"{new}.alpha"] = torch.tensor(alpha)
        product = up.half().float().flatten(1) @ down.half().float().flatten(1)
        added[f"{layer}.weight"] = alpha / RANK * product.reshape(len(up), *down.shape[1:])
    save_file(renamed, path)
    return added


def load_unfused(folder: Path, *loras: tuple[Path, float]) -> Any:
    """Load a pipeline as diffusers does, with unfused LoRAs, each with its scale."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path), adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])
    return pipeline
