"""The gate as an operator of torch, and its translation to ONNX; see `gate.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from torch import Tensor

from unetc.backend import DOMAIN

from .gate import KEEP, MEAN  # registers the ONNX operator too


@torch.library.custom_op("unetc::gate", mutates_args=())
def gate(branch: Tensor, gates: Tensor, means: Tensor, index: int, offset: int, axis: int) -> Tensor:
    """Gate a branch [batch, ...]; see `gate.py`."""
    per_sample = [-1] + [1] * (branch.ndim - 1)
    per_channel = [branch.shape[i] if i == axis else 1 for i in range(branch.ndim)]
    mean = means[offset : offset + branch.shape[axis]].reshape(per_channel)
    return branch * gates[:, index, KEEP].reshape(per_sample) + mean * gates[:, index, MEAN].reshape(per_sample)


@gate.register_fake
def _(branch: Tensor, gates: Tensor, means: Tensor, index: int, offset: int, axis: int) -> Tensor:
    return torch.empty_like(branch)


_OPSET = onnxscript.values.Opset(DOMAIN, 1)


def to_onnx(branch: Any, gates: Any, means: Any, index: int, offset: int, axis: int) -> Any:
    """Translate the torch operator during ONNX export; all numbers become attributes."""
    rank, channels = len(branch.shape), int(branch.shape[axis])
    return _OPSET.Gate(
        branch,
        gates,
        means,
        index=[index],
        begin=[offset],
        end=[offset + channels],
        per_sample=[-1] + [1] * (rank - 1),
        per_channel=[-1 if i == axis else 1 for i in range(rank)],
    )


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.unetc.gate.default: to_onnx}
"""Translations for `torch.onnx.export`."""
