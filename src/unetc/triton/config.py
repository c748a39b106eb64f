"""The configurations of the models, in the fields of Triton's model_config.proto.

Source:
    https://github.com/triton-inference-server/common, protobuf/model_config.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unetc.runtime.batching.levels import FEW_SEATS
from unetc.server.inputs import INPUTS
from unetc.server.open_inference import BYTES

from .backend import VERSION
from .placement import Kind, Placement
from .sampling import IMAGES, SAMPLES, SEED
from .signature import DataType, Signature, TensorFacts
from .text_format import to_text

Shapes = Mapping[str, Sequence[int]]
_ANY = -1
"""A size that a call chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A model that runs one graph in onnxruntime."""

    name: str
    signature: Signature
    most_rows: int | None
    """Largest batch; None for a graph with a fixed one."""
    placement: Placement
    threads: int
    """CPU threads, where the placement has some."""
    warm_up: Shapes
    """Shape of one row of every input, for the first calls; empty for none."""

    def to_text(self) -> str:
        """Write config.pbtxt."""
        threads = {"key": "intra_op_thread_count", "value": {"string_value": str(self.threads)}}
        return to_text(
            {
                "name": self.name,
                "platform": "onnxruntime_onnx",
                "backend": "onnxruntime",
                "max_batch_size": self.most_rows or 0,
                "input": [self._tensor(one) for one in self.signature.inputs],
                "output": [self._tensor(one) for one in self.signature.outputs],
                "version_policy": _ONE_VERSION,
                "instance_group": ({"count": 1, "kind": self.placement.kind},),
                **({"dynamic_batching": {}} if (self.most_rows or 0) > 1 else {}),
                **self.placement.optimization,
                "parameters": (threads,) if self.placement.threads else (),
                "model_warmup": self._warm_up() if self.warm_up else (),
            }
        )

    def _tensor(self, one: TensorFacts) -> dict[str, Any]:
        """Describe an input or an output; Triton wants a size after the batch, even where the graph has none."""
        axes = one.axes if self.most_rows is None else one.axes[1:]
        dims = tuple(axis if isinstance(axis, int) else _ANY for axis in axes)
        described = {"name": one.name, "data_type": one.data_type, "dims": dims or (1,)}
        return described if dims else {**described, "reshape": {}}

    def _warm_up(self) -> list[dict[str, Any]]:
        """Call with one row and with as many as possible, so that no client waits for first calls."""
        types = {one.name: one.data_type for one in self.signature.inputs}
        inputs = [
            {"key": name, "value": {"data_type": types[name], "dims": tuple(shape) or (1,), "zero_data": True}}
            for name, shape in self.warm_up.items()
        ]
        return [
            {"name": f"batch of {rows}", "batch_size": rows, "inputs": inputs}
            for rows in dict.fromkeys((1, self.most_rows or 1))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """The model that samples."""

    name: str
    inputs: Sequence[str]
    """Keys of the inputs of `unetc serve`."""
    channels: int
    """Channels of an image."""
    size: tuple[int, int]
    """Height and width of an image in pixels."""

    def to_text(self) -> str:
        """Write config.pbtxt.

        It has no warm-up: Triton would call the engines before it has loaded them.
        """
        pixels = DataType.UINT8 if self.channels in (1, 3) else DataType.FP32
        outputs = (
            (IMAGES, pixels, (_ANY, *self.size, self.channels)),
            (SEED, DataType.INT64, (_ANY,)),
            (SAMPLES, DataType.FP32, (_ANY, self.channels, *self.size)),
        )
        return to_text(
            {
                "name": self.name,
                "backend": "python",
                "max_batch_size": 0,
                "input": [
                    {"name": name, "data_type": _type_of(name), "dims": INPUTS[name].shape, "optional": True}
                    for name in self.inputs
                ],
                "output": [{"name": name, "data_type": kind, "dims": dims} for name, kind, dims in outputs],
                "version_policy": _ONE_VERSION,
                "instance_group": ({"count": FEW_SEATS, "kind": Kind.CPU},),
            }
        )


_ONE_VERSION = {"specific": {"versions": (VERSION,)}}


def _type_of(name: str) -> DataType:
    """Return the type of an input of the protocol; Triton calls bytes strings."""
    datatype = INPUTS[name].datatype
    return DataType.STRING if datatype == BYTES else DataType[datatype]
