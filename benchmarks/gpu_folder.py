"""What `gpu_prepare.py` writes and `gpu.py` reads: one folder per model, with its engines and what they need.

Random weights do not travel. The folder has the header of the weights file, which says what is in it, and the contents
of what is small; the rest is drawn from a seed where it is needed, so the file has the same layout as the one that the
graphs were written for. Trained weights travel whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from unetc.artifacts.manifest import SCHEDULER_ROWS, FileRecord
from unetc.artifacts.plan import Assignment
from unetc.artifacts.profile import ModelReference
from unetc.artifacts.record import Artifact, Record, read_bounded, require
from unetc.backend import SerialisedGraph
from unetc.conditions import Conditions
from unetc.errors import ArtifactError, CorruptArtifactError
from unetc.sampler.table import SchedulerHeader, SchedulerTable, SchedulerTables

RECORD = "prepared.json"
HEADER, CONTENTS = "weights.header", "weights.safetensors"
SOLVER, CONDITIONS = "scheduler.safetensors", "conditions.safetensors"

FULL, REFRESH, OUTER, FORECAST, INNER, DROP = "full", "refresh", "hold outer", "forecast outer", "hold inner", "drop"
"""Engines of every model. Outer is the level that joins last: all but the blocks of the finest resolution, which is
what DeepCache reuses. Inner is the level inside of it. What is dropped are the first and the last skip."""
PLANNED = (REFRESH, OUTER, INNER)
"""Engines that plans are made of, in their order."""

LARGEST_FILE = 2**30
"""Bytes; no file of a folder is nearly as large."""

_TYPES: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Engine(Record, frozen=True, kw_only=True):
    """One engine."""

    name: str
    graph: str
    """Path of the ONNX graph."""
    reads: tuple[str, ...]
    """What it reads of the weights file."""
    assignment: Assignment


class PreparedModel(Artifact, frozen=True, kw_only=True):
    """A model, ready to be measured."""

    unetc: str
    commit: str
    """Of the sources that prepared it."""
    reference: ModelReference
    precision: str
    """What its engines compute in: fp32, fp16 or bf16."""
    trained: bool
    """Whether its weights mean anything, so that damage can be told."""
    sample_shape: tuple[int, int, int]
    predicted_channels: int
    rows: dict[str, tuple[int, ...]]
    """Shape of a row of each condition that is random."""
    guidance_scale: float
    """1 if there is no guidance."""
    steps: int
    scheduler: SchedulerHeader
    engines: tuple[Engine, ...]
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        """Check that every graph is listed."""
        listed = {file.path for file in self.files}
        named = {HEADER, CONTENTS, SOLVER, *(engine.graph for engine in self.engines)}
        require(named <= listed, f"not in the list of files: {sorted(named - listed)}")


class Folder:
    """The folder of one model."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            ArtifactError: If there is nothing that `gpu_prepare.py` has finished.
        """
        self.path = path
        self.model = PreparedModel.load(path / RECORD)
        self._engines = {engine.name: engine for engine in self.model.engines}

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.path.name

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            CorruptArtifactError: If it is not what was written.
        """
        (record,) = (file for file in self.model.files if file.path == name)
        data = read_bounded(self.path / name, LARGEST_FILE)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise CorruptArtifactError(f"{self.path / name} is not what was prepared. Run gpu_prepare.py again.")
        return data

    def assignment(self, engine: str) -> Assignment:
        """Tell what an engine does."""
        return self._engines[engine].assignment

    def graph(self, engine: str) -> SerialisedGraph:
        """Read the graph of an engine."""
        own = self._engines[engine]
        return SerialisedGraph(graph=self.read(own.graph), weights=frozenset(own.reads))

    def scheduler(self) -> SchedulerTables:
        """Read the scheduler."""
        return SchedulerTables.from_array(
            self.model.scheduler, safetensors.numpy.load(self.read(SOLVER))[SCHEDULER_ROWS]
        )

    @property
    def table(self) -> SchedulerTable:
        """The scheduler at the model's number of steps."""
        return self.scheduler().table(self.model.steps)

    def conditions(self) -> Conditions:
        """Read what samples are conditioned on, or draw it."""
        if any(file.path == CONDITIONS for file in self.model.files):
            return Conditions.from_arrays(safetensors.numpy.load(self.read(CONDITIONS)), self.model.guidance_scale)
        generator = np.random.default_rng(0)
        rows = {name: (_RANDOM_ROWS, *shape) for name, shape in self.model.rows.items()}
        return Conditions(own={name: generator.standard_normal(shape, np.float32) for name, shape in rows.items()})

    @functools.cached_property
    def weights(self) -> bytes:
        """The weights file, put together; on a GPU random numbers take a second, on the CPU half a minute."""
        given = safetensors.torch.load(self.read(CONTENTS))  # numpy has no bfloat16
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parts = [header := self.read(HEADER)]
        for name, shape, dtype in _entries(header):
            parts.append(_bytes(given[name]) if name in given else _bytes(_draw(name, shape, device).to(dtype)))
        return b"".join(parts)


_RANDOM_ROWS = 8


def open_folders(path: Path) -> tuple[Folder, ...]:
    """Open the folders of all models below a path.

    Raises:
        ArtifactError: If there is none.
    """
    found = tuple(Folder(record.parent) for record in sorted(path.glob(f"*/{RECORD}")))
    if not found:
        raise ArtifactError(f"{path} holds no prepared model. `python benchmarks/gpu_prepare.py {path}` makes them.")
    return found


def header_of(weights: Path) -> bytes:
    """Read the header of a weights file, the eight bytes of its length included."""
    with weights.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _entries(header: bytes) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """List name, shape and type of what a weights file holds, in the order in which it lies there."""
    entries: dict[str, dict[str, Any]] = json.loads(header[8:])
    entries.pop("__metadata__", None)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        yield name, tuple(entry["shape"]), _TYPES[entry["dtype"]]


def _draw(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    """Draw normal numbers that leave the size of what they are applied to about as it is."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    fan_in = math.prod(shape[1:]) if len(shape) > 2 else max(shape)  # matrices lie either way round
    return torch.randn(shape, generator=generator, device=device) / math.sqrt(fan_in)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
