"""LoRAs with random factors for the tiny pipelines, in every format that is read, with the change that each defines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import peft as untyped_peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

diffusers: Any = untyped_diffusers
peft: Any = untyped_peft

RANK = 2

_UNET_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
_TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def save_lora(folder: Path, path: Path, *, seed: int = 0, text: bool = True, **options: Any) -> Path:
    """Save a LoRA in the format of diffusers with the code of diffusers and peft, with different alphas per layer.

    Args:
        folder: Pipeline that the LoRA is made for.
        path: Path of the .safetensors file.
        seed: Seed of its factors.
        text: Whether it also changes the text encoders.
        options: Further settings of peft.
    """
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    parts = ["unet", *(name for name in ("text_encoder", "text_encoder_2") if text and hasattr(pipeline, name))]
    saved: dict[str, Any] = {}
    for part in parts:
        model = getattr(pipeline, part)
        model.add_adapter(lora_config(part, **options))
        randomise(model, generator)
        saved[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(model)
        saved[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(path.parent, weight_name=path.name, **saved)
    return path


def lora_config(part: str, **options: Any) -> Any:
    """Make settings of peft for some layers of a part."""
    unet = part == "unet"
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=3.0,
        alpha_pattern={"to_k": 5.0} if unet else {"fc1": 0.5},
        **{"target_modules": list(_UNET_LAYERS if unet else _TEXT_LAYERS), **options},
    )


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw the factors of an adapter of peft, and change the norms of a DoRA."""
    for name, parameter in model.named_parameters():
        if ".lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / len(parameter[0].flatten()) ** 0.5


def load_unfused(folder: Path, *loras: tuple[Path, float]) -> Any:
    """Load a pipeline as diffusers does, with unfused LoRAs, each with its scale."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path), adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [scale for _, scale in loras])
    return pipeline


def layers(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield path and weight shape of every linear and convolution layer."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, tuple(module.weight.shape)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The factors of one layer's change."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @classmethod
    def draw(cls, shape: tuple[int, ...], rank: int, alpha: float | None, generator: torch.Generator) -> Factors:
        """Draw factors for a weight of some shape, in half precision."""
        outputs, inputs, *kernel = shape
        down = torch.randn(rank, inputs, *kernel, generator=generator)
        up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=generator)
        return cls(down=(down / down[0].numel() ** 0.5).half(), up=(up / rank**0.5).half(), alpha=alpha)

    def change(self, scale: float = 1.0) -> Tensor:
        """Compute scale · alpha / rank · B A in float64, element by element of the definition."""
        rank = len(self.down)
        alpha = rank if self.alpha is None else self.alpha
        product = torch.einsum("or,ri...->oi...", self.up.double().flatten(1), self.down.double())
        return scale * alpha / rank * product


def _kohya(name: str) -> Callable[[str, str], str]:
    """Name tensors as kohya does; the text encoder of a pipeline with one is `lora_te`."""
    prefixes = {"unet": "lora_unet", "text_encoder": name, "text_encoder_2": "lora_te2"}

    def write(part: str, path: str) -> str:
        if part != "unet" and path != "text_projection":
            path = f"text_model.{path.removeprefix('text_model.')}"
        return f"{prefixes[part]}_{path.replace('.', '_')}"

    return write


def _dotted(part: str, path: str) -> str:
    return f"{part}.{path}"


def _with_text_model(part: str, path: str) -> str:
    return _dotted(part, path if part == "unet" or path.startswith("text_") else f"text_model.{path}")


def _without_text_model(part: str, path: str) -> str:
    return _dotted(part, path.removeprefix("text_model."))


def _old(part: str, path: str) -> str:
    """Name layers as diffusers did before peft: attention has processors, which hold the factors."""
    head, _, last = path.rpartition(".")
    if part == "unet" and (last in ("to_q", "to_k", "to_v") or path.endswith("to_out.0")):
        head, last = (head.removesuffix(".to_out"), "to_out") if last == "0" else (head, last)
        return f"unet.{head}.processor.{last}_lora"
    if part != "unet" and last.endswith("_proj") and "self_attn" in head:
        return f"{part}.{head}.to_{last.removesuffix('_proj')}_lora"
    return f"{part}.{path}.lora" if part == "unet" else f"{part}.{path}.lora_linear_layer"


_PAIR = (".lora_down.weight", ".lora_up.weight", ".alpha")
_PEFT_PAIR = (".lora_A.weight", ".lora_B.weight", ".alpha")

FORMATS: Mapping[str, tuple[Callable[[str, str], str], tuple[str, str, str]]] = {
    "kohya": (_kohya("lora_te"), _PAIR),
    "kohya with numbers": (_kohya("lora_te1"), _PAIR),
    "diffusers": (_dotted, _PEFT_PAIR),
    "diffusers with the level text_model": (_with_text_model, _PEFT_PAIR),
    "diffusers without the level text_model": (_without_text_model, _PEFT_PAIR),
    "diffusers before peft": (_old, (".down.weight", ".up.weight", ".alpha")),
    "diffusers with lora_linear_layer": (
        _dotted,
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha"),
    ),
    "peft within parts": (lambda part, path: f"{part}.base_model.model.{path}", _PEFT_PAIR),
    "peft with the name of the adapter": (_dotted, (".lora_A.default.weight", ".lora_B.default.weight", ".alpha")),
}
"""Formats: name of a layer by part and path, and the ends of its two factors and of its alpha."""


def save_as(form: str, path: Path, changes: Mapping[tuple[str, str], Factors]) -> Path:
    """Save factors, by part and path of their layer, in one of `FORMATS`."""
    name, (down, up, alpha) = FORMATS[form]
    tensors = {}
    for (part, layer), factors in changes.items():
        own = name(part, layer)
        tensors |= {f"{own}{down}": factors.down.contiguous(), f"{own}{up}": factors.up.contiguous()}
        if factors.alpha is not None:
            tensors[f"{own}{alpha}"] = torch.tensor(factors.alpha)
    save_file(tensors, path)
    return path
