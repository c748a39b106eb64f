"""Programs that compute every row alone, and spoil the rows of one sample in one engine.

A call of one row has the same bits whatever other rows were asked for with it. So an image must have exactly the bits
that it has alone, and any other bit comes from the code around the engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unetc.artifacts.call_input import SAMPLE
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.device import Device, Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """A value that some programs write when they meet a sample."""

    programs: Sequence[Program]
    sample: Array
    """Input of the denoiser, [channel, height, width]."""
    value: float
    branch: bool = False
    """Whether it is written into the emitted branches, where there are any; otherwise into the prediction."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row that a program has computed."""

    program: Program
    sample: Array
    company: int
    """Rows of the same call."""
    spoilt: bool


@dataclass(eq=False)
class Spoiler:
    """Wraps the programs of a backend."""

    inner: Backend
    poison: Poison | None = None
    rows: list[Row] = field(default_factory=list)
    """All rows since they were taken."""
    open: threading.Event = field(default_factory=threading.Event)
    """Calls wait until it is set."""

    def __post_init__(self) -> None:
        """Let calls pass."""
        self.open.set()

    @property
    def device(self) -> Device:
        """Device of the backend."""
        return self.inner.device

    def open_weights(self, weights: bytes) -> Loader:
        """Return a loader of wrapped programs."""
        return _Loader(self, self.inner.open_weights(weights))

    def wrap(self, program: Program) -> Program:
        """Wrap a program."""
        return _RowByRow(self, program)

    def take(self) -> list[Row]:
        """Return the rows since the last time."""
        rows, self.rows = self.rows, []
        return rows


@dataclass(frozen=True)
class _Loader:
    spoiler: Spoiler
    loader: Loader

    def load(self, graph: SerialisedGraph) -> Program:
        return self.spoiler.wrap(self.loader.load(graph))


@dataclass(frozen=True, eq=False)
class _RowByRow:
    spoiler: Spoiler
    program: Program

    def __call__(self, inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
        self.spoiler.open.wait()
        emitted = [self._row(inputs, output, i) for i in range(len(output))]
        return {name: np.concatenate([one[name] for one in emitted]) for name in emitted[0]}

    def _row(self, inputs: Mapping[str, Tensor], output: Array, i: int) -> dict[str, Array]:
        device, poison = self.spoiler.device, self.spoiler.poison
        own = _OneRow(inputs, i, device)
        prediction = output[i : i + 1]
        emitted = {name: device.to_array(value) for name, value in self.program(own, prediction).items()}
        sample = np.array(own[SAMPLE][0])
        spoilt = poison is not None and self in poison.programs and np.array_equal(sample, poison.sample)
        if spoilt and poison is not None:
            for array in emitted.values() if poison.branch and emitted else (prediction,):
                array.flat[array.size // 2] = poison.value
        self.spoiler.rows.append(Row(self, sample, len(output), spoilt))
        return emitted


@dataclass(frozen=True)
class _OneRow(Mapping[str, Tensor]):
    """One row of all inputs of a call."""

    whole: Mapping[str, Tensor]
    row: int
    device: Device

    def __getitem__(self, name: str) -> Tensor:
        return self.device.rows(self.whole[name], self.row, self.row + 1)

    def __contains__(self, name: object) -> bool:
        return name in self.whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)
