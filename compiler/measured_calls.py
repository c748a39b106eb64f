"""The calls that programs get while a model is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unetc.conditions import Conditions
from unetc.controlnet import ControlNetInput
from unetc.nvidia.sizes import Range, Sizes

CACHED_ROWS = 32
"""Samples per batch on a CPU: larger batches do not fit its caches and gain nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCalls:
    """Ranges of the calls that programs will get."""

    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """ControlNet inputs of the graphs."""

    @classmethod
    def of(cls, sample_shape: tuple[int, int, int], batch: int, samples: int, conditions: Conditions) -> MeasuredCalls:
        """Compute the ranges of the calls of programs that are measured.

        Args:
            sample_shape: [channel, height, width].
            batch: Samples per call when time is measured.
            samples: Trajectories that every ablation is measured on; several ablations share a call.
            conditions: Conditions of the samples; guided ones make it two or three times as large.
        """
        _, height, width = (Range(least=size, usual=size, most=size) for size in sample_shape)
        each = conditions.rows_per_sample
        rows = Range(least=1, usual=each * batch, most=each * max(batch, CACHED_ROWS, samples))
        return cls(
            sizes=Sizes(batch=rows, height=height, width=width),
            rows={name: tuple(array.shape[1:]) for name, array in conditions.own.items()},
            controlnet=conditions.controlnet,
        )
