"""What each class of denoiser takes, and how it is called.

Discovery of components needs no code per class; calling a denoiser does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unetc.controlnet import PREFIX, ControlNetInput, controlnet_inputs
from unetc.errors import ModelError

from .inputs import (
    BATCH,
    CLASS_LABELS,
    CONTEXT,
    LOW_RES,
    POOLED,
    SAMPLE,
    TIME_IDS,
    TIMESTEP,
    Input,
    Signature,
    text,
    timestep,
    vector,
)
from .transformers import TRANSFORMERS


class Denoiser(nn.Module):
    """A denoiser with positional inputs and one tensor out, [batch, channel, height, width]."""

    def __init__(
        self, model: nn.Module, inputs: tuple[Input, ...], call: Callable[[Any, dict[str, Any]], Tensor]
    ) -> None:
        """Wrap a model that is called with inputs by name."""
        super().__init__()
        self.model = model
        self.inputs = inputs
        self._call = call

    def forward(self, *values: Tensor) -> Tensor:
        """Call the model; what follows its own inputs (the gates, put in later) is ignored."""
        named: dict[str, Any] = {item.name: value for item, value in zip(self.inputs, values, strict=False)}
        return self._call(self.model, named)


def denoiser_of(model: nn.Module, *, controlnet: bool = False) -> Denoiser:
    """Find out how a model is called.

    Args:
        model: A denoiser of diffusers, on the CPU.
        controlnet: Whether it is to take the residuals of a ControlNet.

    Raises:
        ModelError: If its class or a part of its configuration is not supported, by name, or takes no residuals.
    """
    name = type(model).__name__
    if name in _REFUSED:
        raise ModelError(f"cannot capture a denoiser of class {name}: {_REFUSED[name]}.")
    if name not in _SIGNATURES:
        raise ModelError(f"cannot capture a denoiser of class {name}. Supported: {', '.join(_SIGNATURES)}.")
    _refuse_patches(model, name)
    signature = _SIGNATURES[name]
    inputs = signature.inputs(model, generator := torch.Generator().manual_seed(0))
    if controlnet:
        if name != "UNet2DConditionModel":
            raise ModelError(f"a {name} takes no residuals of a ControlNet; a UNet2DConditionModel does.")
        inputs += _residuals(model, inputs[0], generator)
    return Denoiser(model, tuple(inputs), signature.call)


def _residuals(model: Any, sample: Input, generator: torch.Generator) -> list[Input]:
    """Make the inputs for the residuals of a ControlNet, in the sizes that fit those of the sample."""

    def draw(like: Tensor, residual: ControlNetInput) -> Tensor:
        batch, _, height, width = like.shape
        return torch.randn(residual.shape(batch, height, width), generator=generator)

    return [
        Input(
            name=one.name,
            example=draw(sample.example, one),
            dynamic=(2, 3),
            native=None if sample.native is None else draw(sample.native, one),
        )
        for one in controlnet_inputs(model.config)
    ]


def _refuse_patches(model: nn.Module, name: str) -> None:
    """Refuse what changes a model from outside: it would be lost or captured by halves."""
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"{name} has hooks on {path or 'itself'}: remove them (offloading, caches) before capture."
            )
        if hasattr(module, "base_layer"):
            raise ModelError(f"{name} has an adapter (LoRA) on {path}: fuse and unload it before capture.")
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
    inputs.append(text(CONTEXT, width, generator))
    inputs += _class_labels(model, generator)
    if added == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs.append(vector(POOLED, pooled, generator))
        inputs.append(Input(name=TIME_IDS, example=torch.full((BATCH, 6), 64.0)))
    return inputs


def _super_resolution(model: Any, generator: torch.Generator) -> list[Input]:
    both, *others = _unet_2d_condition(model, generator)
    assert both.native is not None
    sample, low_res = (
        replace(both, name=name, example=example, native=native)
        for name, example, native in zip(
            (SAMPLE, LOW_RES), both.example.chunk(2, dim=1), both.native.chunk(2, dim=1), strict=True
        )
    )
    return [sample, *others, low_res]


def _image(model: Any, generator: torch.Generator) -> list[Input]:
    """Make a noisy sample, of different height and width, and a timestep per sample."""
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, int) else (config.sample_size or (32,))[0]
    stride = 2 ** (len(config.block_out_channels) - 1)
    sample = torch.randn(BATCH, config.in_channels, size, size + stride, generator=generator)
    native = sample[..., :size].contiguous()
    return [Input(name=SAMPLE, example=sample, dynamic=(2, 3), native=native), timestep()]


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
    return [vector(CLASS_LABELS, width, generator)]


def _call_unet(model: Any, named: dict[str, Any]) -> Tensor:
    added = {name: named.pop(name) for name in (POOLED, TIME_IDS) if name in named}
    if added:
        named["added_cond_kwargs"] = added
    if residuals := [named.pop(name) for name in tuple(named) if name.startswith(PREFIX)]:
        *named["down_block_additional_residuals"], named["mid_block_additional_residual"] = residuals
    output: Tensor = model(**named, return_dict=False)[0]
    return output


_SIGNATURES: Mapping[str, Signature] = {
    "UNet2DModel": Signature(inputs=_unet_2d, call=_call_unet),
    "UNet2DConditionModel": Signature(inputs=_unet_2d_condition, call=_call_unet),
    "SuperResolutionUNet": Signature(inputs=_super_resolution, call=_call_unet),
    **TRANSFORMERS,
}

_REFUSED: Mapping[str, str] = {
    "UVit2DModel": "it predicts tokens, which its sampler draws, and unetc denoises images of real numbers",
    "UNet1DModel": "its samples are sounds, and unetc denoises images",
    "UNet3DConditionModel": "its samples are videos, and unetc denoises images",
}
"""Classes that may be expected to work, and why they do not."""

__all__ = ["CONTEXT", "SAMPLE", "TIMESTEP", "Denoiser", "Input", "denoiser_of"]
