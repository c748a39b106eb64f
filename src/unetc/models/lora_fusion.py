"""Fusion of LoRAs into the UNet and the text encoders of a pipeline.

A LoRA with factors A (down) and B (up) turns the weight W of a layer into V = W + scale · alpha / rank · B A. A DoRA
also holds the norms m of the rows or columns of the new weight, which is m · V / ||V||. Each of several LoRAs is
relative to the original weight, as in a pipeline of diffusers with active adapters. Their changes are added in float64,
so their order does not matter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unetc.errors import ModelError

from .lora import Lora
from .lora_file import LayerChange, LoraFile, opened, some
from .lora_names import TEXT_ENCODERS, UNET


def fuse_into_unet(unet: nn.Module, loras: Sequence[Lora]) -> None:
    """Add LoRAs to the weights of a UNet; its modules do not change.

    Args:
        unet: A `UNet2DConditionModel`.
        loras: LoRAs that were checked with `check_loras`.

    Raises:
        ModelError: If a LoRA does not fit the UNet, or holds a number that is not finite.
    """
    _fuse({UNET: unet}, loras)


def fuse_into_text_encoders(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add LoRAs to the weights of a pipeline's text encoders.

    Args:
        pipeline: A diffusers pipeline; it needs no UNet.
        loras: LoRAs that were checked with `check_loras`.

    Raises:
        ModelError: If a LoRA does not fit the text encoders, or holds a number that is not finite.
    """
    encoders = {part: getattr(pipeline, part, None) for part in TEXT_ENCODERS}
    _fuse({part: encoder for part, encoder in encoders.items() if encoder is not None}, loras)


def _fuse(parts: dict[str, nn.Module], loras: Sequence[Lora]) -> None:
    with ExitStack() as stack:
        changes: dict[tuple[str, str], list[_Change]] = defaultdict(list)  # by part and layer
        for lora in loras:
            described = LoraFile(lora)
            file = stack.enter_context(opened(lora, "pt"))
            _check_numbers(lora, file, [name.full for name in described.names])
            for part, model in parts.items():
                shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
                for own in described.changes(part, shapes):
                    if lora.scale != 0:
                        changes[part, own.layer].append(_Change(lora, own, file))
        for (part, layer), own in changes.items():
            _add(part, parts[part].get_submodule(layer), own)


class _Change(NamedTuple):
    """The change of one layer by one LoRA, with the file of its tensors."""

    lora: Lora
    layer: LayerChange
    file: Any


def _add(part: str, layer: nn.Module, changes: Sequence[_Change]) -> None:
    """Add changes to the weight and the bias of a layer; each is computed from the original weight."""
    added: dict[str, Tensor] = {}
    for change in changes:
        for name, value in _difference(layer.get_parameter("weight").data, change).items():
            added[name] = added[name] + value if name in added else value
    for name, value in added.items():
        if not value.any():
            continue  # leaves even the sign of a zero
        parameter = layer.get_parameter(name)
        total = (parameter.data.double() + value).to(parameter.dtype)
        if not torch.isfinite(total).all():
            raise ModelError(
                f"cannot fuse LoRA {' and '.join(str(change.lora) for change in changes)}: the {name} of "
                f"{part}.{changes[0].layer.layer} becomes NaN or infinity. Check the scales and the files."
            )
        parameter.data.copy_(total)


def _difference(weight: Tensor, change: _Change) -> dict[str, Tensor]:
    """Compute what one LoRA adds to the weight and the bias of a layer, in float64."""
    lora, layer, load = change.lora, change.layer, change.file.get_tensor
    alpha = layer.rank if layer.alpha is None else layer.alpha
    if isinstance(alpha, str):
        alpha = float(load(alpha).double().reshape(()))
    strength = lora.scale * alpha / (math.sqrt(layer.rank) if layer.root else layer.rank)
    down, up = load(layer.down).double().flatten(1), load(layer.up).double().flatten(1)
    if layer.mid is None:
        product = up @ down
    else:
        product = torch.einsum("on,nmk,mi->oik", up, load(layer.mid).double().flatten(2), down)
    added = {"weight": strength * product.reshape(weight.shape)}
    if layer.magnitude is not None:
        norms = load(layer.magnitude).double()
        added["weight"] = _with_norms(weight.double() + added["weight"], norms, layer.magnitude_axis) - weight.double()
    if layer.bias is not None:
        added["bias"] = strength * load(layer.bias).double()
    return added


def _with_norms(weight: Tensor, norms: Tensor, axis: int) -> Tensor:
    """Give each slice of a weight along an axis its norm."""
    others = [other for other in range(weight.dim()) if other != axis]
    present = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norms.reshape(present.shape) * weight / present


def _check_numbers(lora: Lora, file: Any, names: Sequence[str]) -> None:
    if broken := [name for name in names if not torch.isfinite(file.get_tensor(name).float()).all()]:
        raise ModelError(f"LoRA {lora.path} holds NaN or infinity in {some(broken)}. Get the file again.")
