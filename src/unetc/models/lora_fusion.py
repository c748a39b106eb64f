"""Fusion of LoRAs into the UNet and the text encoders of a pipeline.

A LoRA with factors A (down) and B (up) adds D = scale · alpha / rank · B A to the weight W of a layer. A DoRA also
holds the norms m of the rows or columns of the new weight, and multiplies it by m / ||W + D||. As in peft, W is the
original weight in this norm, whatever LoRAs came before. LoRAs may therefore come in any order, but the order of DoRAs
matters. Everything is computed in float64 and rounded once.
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
        for (part, layer), all_of_layer in changes.items():
            _add(part, parts[part].get_submodule(layer), all_of_layer)


class _Change(NamedTuple):
    """The change of one layer by one LoRA, with the file of its tensors."""

    lora: Lora
    layer: LayerChange
    file: Any


def _add(part: str, layer: nn.Module, changes: Sequence[_Change]) -> None:
    """Change the weight and the bias of a layer by all LoRAs in their order, and round once."""
    original = layer.get_parameter("weight").data.double()
    weight, bias = original, None
    for change in changes:
        added = _product(original.shape, change)
        factor: Tensor | float = 1.0
        if change.layer.magnitude is not None:
            norms = change.file.get_tensor(change.layer.magnitude).double()
            present = _norms(original + added, change.layer.magnitude_axis)
            factor = norms.reshape(present.shape) / present
        if change.layer.magnitude is not None or added.any():
            weight = factor * (weight + added)
        if change.layer.bias is not None:
            old = layer.get_parameter("bias").data.double() if bias is None else bias
            bias = old + _strength(change) * change.file.get_tensor(change.layer.bias).double()
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None or value is original:
            continue  # not a bit changes
        parameter = layer.get_parameter(name)
        total = value.to(parameter.dtype)
        if not torch.isfinite(total).all():
            raise ModelError(
                f"cannot fuse LoRA {' and '.join(str(change.lora) for change in changes)}: the {name} of "
                f"{part}.{changes[0].layer.layer} becomes NaN or infinity. Check the scales and the files."
            )
        parameter.data.copy_(total)


def _product(shape: torch.Size, change: _Change) -> Tensor:
    """Compute scale · alpha / rank · B A, in float64 and in the shape of the weight."""
    layer, load = change.layer, change.file.get_tensor
    down, up = load(layer.down).double().flatten(1), load(layer.up).double().flatten(1)
    if layer.mid is None:
        product: Tensor = up @ down
    else:
        product = torch.einsum("on,nmk,mi->oik", up, load(layer.mid).double().flatten(2), down)
    return _strength(change) * product.reshape(shape)


def _strength(change: _Change) -> float:
    rank, alpha = change.layer.rank, change.layer.alpha
    if isinstance(alpha, str):
        alpha = float(change.file.get_tensor(alpha).double().reshape(()))
    return change.lora.scale * (rank if alpha is None else alpha) / (math.sqrt(rank) if change.layer.root else rank)


def _norms(weight: Tensor, axis: int) -> Tensor:
    """Compute the norm of each slice of a weight along an axis."""
    others = [other for other in range(weight.dim()) if other != axis]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norms


def _check_numbers(lora: Lora, file: Any, names: Sequence[str]) -> None:
    if broken := [name for name in names if not torch.isfinite(file.get_tensor(name).float()).all()]:
        raise ModelError(f"LoRA {lora.path} holds NaN or infinity in {some(broken)}. Get the file again.")
