"""Rows of tensors that are cut out only when an engine reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from unetc.device import Device, Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a tensor, such as one rollout's rows of a call of several."""

    tensor: Tensor
    start: int
    stop: int
    of: int
    """Rows of the whole tensor."""

    def take(self, device: Device) -> Tensor:
        """Return the rows as a tensor, which may share memory."""
        if self.stop - self.start == self.of:
            return self.tensor
        return device.rows(self.tensor, self.start, self.stop)


def second_half(value: Tensor | Rows, rows: int) -> Rows:
    """Cut the rows of the samples' own conditions out of a guided call.

    Args:
        value: An input or a branch of a call, negative conditions first.
        rows: Rows of the call.
    """
    if isinstance(value, Rows):
        return Rows(value.tensor, value.start + rows // 2, value.stop, value.of)
    return Rows(value, rows // 2, rows, rows)


def own_half(inputs: Mapping[str, Tensor], output: Tensor, device: Device) -> tuple[dict[str, Tensor], Tensor]:
    """Cut the inputs of a guided call to the samples' own conditions, and make an output for them."""
    rows = len(output)
    halves = {name: second_half(value, rows).take(device) for name, value in inputs.items()}
    return halves, device.empty((rows // 2, *output.shape[1:]))


class Taken(Mapping[str, Tensor]):
    """Inputs of a call; rows are taken when an engine reads them."""

    def __init__(self, inputs: Mapping[str, Tensor | Rows], device: Device) -> None:
        """Keep the inputs, and the device that they are on."""
        self._inputs = inputs
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        """Return an input as a tensor."""
        value = self._inputs[name]
        return value.take(self._device) if isinstance(value, Rows) else value

    def __contains__(self, name: object) -> bool:
        """Check whether there is an input."""
        return name in self._inputs

    def __iter__(self) -> Iterator[str]:
        """List the inputs."""
        return iter(self._inputs)

    def __len__(self) -> int:
        """Count the inputs."""
        return len(self._inputs)
