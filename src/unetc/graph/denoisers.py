"""What each class of denoiser takes: names, shapes and examples of its inputs, and how it is called.

Discovery of components needs no code per class; calling a denoiser does. Names of inputs follow diffusers, those of
ControlNet residuals StreamDiffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unetc.errors import ModelError
from unetc.residuals import PREFIX, residuals_of

SAMPLE, TIMESTEP, CONTEXT = "sample", "timestep", "encoder_hidden_states"
POOLED, TIME_IDS, CLASS_LABELS = "text_embeds", "time_ids", "class_labels"

_BATCH = 2
_TOKENS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a denoiser."""

    name: str
    example: Tensor
    """[2, ...]; sizes that may change differ from each other where the denoiser allows it."""
    dynamic: tuple[int, ...] = ()
    """Axes, beside the batch, whose size may change."""


class Denoiser(nn.Module):
    """A denoiser with positional inputs and one tensor out, [batch, channel, height, width]."""

    def __init__(self, model: nn.Module, inputs: tuple[Input, ...]) -> None:
        """Wrap a model."""
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *values: Tensor) -> Tensor:
        """Call the model; what follows its own inputs (the gates, put in later) is ignored."""
        named: dict[str, Any] = {item.name: value for item, value in zip(self.inputs, values, strict=False)}
        added = {name: named.pop(name) for name in (POOLED, TIME_IDS) if name in named}
        if added:
            named["added_cond_kwargs"] = added
        if residuals := [named.pop(item.name) for item in self.inputs if item.name.startswith(PREFIX)]:
            *named["down_block_additional_residuals"], named["mid_block_additional_residual"] = residuals
        output: Tensor = self.model(**named, return_dict=False)[0]
        return output


def denoiser_of(model: nn.Module, *, controlnet: bool = False) -> Denoiser:
    """Find out how a model is called.

    Args:
        model: A denoiser of diffusers, on the CPU.
        controlnet: Whether it is to take the residuals of a ControlNet.

    Raises:
        ModelError: If its class or a part of its configuration is not supported, by name, or takes no residuals.
    """
    name = type(model).__name__
    if name not in _SIGNATURES:
        raise ModelError(f"cannot capture a denoiser of class {name}. Supported: {', '.join(_SIGNATURES)}.")
    _refuse_patches(model, name)
    inputs = _SIGNATURES[name](model, generator := torch.Generator().manual_seed(0))
    if controlnet:
        if name != "UNet2DConditionModel":
            raise ModelError(f"a {name} takes no residuals of a ControlNet; a UNet2DConditionModel does.")
        inputs += _residuals(model, inputs[0].example, generator)
    return Denoiser(model, tuple(inputs))


def _residuals(model: Any, sample: Tensor, generator: torch.Generator) -> list[Input]:
    batch, _, height, width = sample.shape
    shapes = {one.name: one.shape(batch, height, width) for one in residuals_of(model.config)}
    return [
        Input(name=name, example=torch.randn(shape, generator=generator), dynamic=(2, 3))
        for name, shape in shapes.items()
    ]


def _refuse_patches(model: nn.Module, name: str) -> None:
    """Refuse what changes a model from outside: it would be lost or captured by halves."""
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"{name} has hooks on {path or 'itself'}: remove them (offloading, caches) before capture."
            )
        if any(getattr(module, key, None) is not None for key in ("s1", "s2", "b1", "b2")):
            raise ModelError(f"{name} has FreeU switched on ({path}): call disable_freeu() before capture.")


def _unet_2d(model: Any, generator: torch.Generator) -> list[Input]:
    return [*_image(model, generator), *_class_labels(model, generator)]


def _unet_2d_condition(model: Any, generator: torch.Generator) -> list[Input]:
    config = model.config
    hidden = getattr(config, "encoder_hid_dim_type", None)
    if hidden not in (None, "text_proj"):
        raise ModelError(f"cannot capture UNet2DConditionModel with {hidden} conditions (IP-Adapter and the like).")
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text", "text_time"):
        raise ModelError(f"cannot capture UNet2DConditionModel with addition_embed_type {added!r}.")
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise ModelError("cannot capture UNet2DConditionModel with time_cond_proj_dim (guidance as an embedding).")
    widths = config.cross_attention_dim
    width = config.encoder_hid_dim if hidden else widths if isinstance(widths, int) else widths[0]
    inputs = _image(model, generator)
    context = torch.randn(_BATCH, _TOKENS, width, generator=generator)
    inputs.append(Input(name=CONTEXT, example=context, dynamic=(1,)))
    inputs += _class_labels(model, generator)
    if added == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs.append(Input(name=POOLED, example=torch.randn(_BATCH, pooled, generator=generator)))
        inputs.append(Input(name=TIME_IDS, example=torch.full((_BATCH, 6), 64.0)))
    return inputs


def _image(model: Any, generator: torch.Generator) -> list[Input]:
    """Make a noisy sample, of different height and width, and a timestep per sample."""
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, int) else (config.sample_size or (32,))[0]
    stride = 2 ** (len(config.block_out_channels) - 1)
    sample = torch.randn(_BATCH, config.in_channels, size, size + stride, generator=generator)
    return [
        Input(name=SAMPLE, example=sample, dynamic=(2, 3)),
        Input(name=TIMESTEP, example=torch.tensor([10.0, 500.0])),
    ]


def _class_labels(model: Any, generator: torch.Generator) -> list[Input]:
    config = model.config
    kind = getattr(config, "class_embed_type", None)
    if kind is None:
        count = getattr(config, "num_class_embeds", None)
        return [Input(name=CLASS_LABELS, example=torch.tensor([0, count - 1]))] if count else []
    if kind == "timestep":
        return [Input(name=CLASS_LABELS, example=torch.tensor([1.0, 2.0]))]
    if kind == "identity":
        width = model.time_embedding.linear_2.out_features
    elif kind in ("projection", "simple_projection"):
        width = config.projection_class_embeddings_input_dim
    else:
        raise ModelError(f"cannot capture {type(model).__name__} with class_embed_type {kind!r}.")
    return [Input(name=CLASS_LABELS, example=torch.randn(_BATCH, width, generator=generator))]


_SIGNATURES: Mapping[str, Callable[[Any, torch.Generator], list[Input]]] = {
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _unet_2d_condition,
}
