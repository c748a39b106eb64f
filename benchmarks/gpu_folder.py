"""Folders that `gpu_prepare.py` writes and `gpu.py` reads: one per model, with its engines and their inputs.

Random weights are not stored. The folder contains the header of the weights file, which lists its tensors, and the
contents of small tensors. Large tensors are drawn from a seed when the folder is read, so the file has the same layout
as the one that the graphs were written for. Trained weights are stored in full.
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
from unetc.artifacts.reading import read_bounded
from unetc.artifacts.record import Artifact, Record, require
from unetc.backend import SerialisedGraph
from unetc.conditions import Conditions
from unetc.errors import ArtifactError, CorruptArtifactError
from unetc.sampler.table import SchedulerHeader, SchedulerTable, SchedulerTables

RECORD = "prepared.json"
HEADER, CONTENTS = "weights.header", "weights.safetensors"
SCHEDULER, CONDITIONS = "scheduler.safetensors", "conditions.safetensors"

FULL, REFRESH, OUTER, FORECAST, INNER, DROP = "full", "refresh", "hold outer", "forecast outer", "hold inner", "drop"
"""Engines of every model. Outer is the level that joins last: all but the blocks of the finest resolution, the part
that DeepCache reuses. Inner is the level inside it. "drop" drops the first and the last skip."""
PLANNED = (REFRESH, OUTER, INNER)
"""Engines of the plans, in their order."""

LARGEST_FILE = 2**30
"""Maximum bytes of a file; real files are far smaller."""

_TYPES: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Engine(Record, frozen=True, kw_only=True):
    """One engine."""

    name: str
    graph: str
    """Path of the ONNX graph."""
    reads: tuple[str, ...]
    """Names of the tensors that it reads from the weights file."""
    assignment: Assignment


class PreparedModel(Artifact, frozen=True, kw_only=True):
    """A model prepared for measurement."""

    unetc: str
    commit: str
    """Commit of the sources that prepared it."""
    reference: ModelReference
    precision: str
    """Precision of its engines: fp32, fp16 or bf16."""
    trained: bool
    """Whether its weights are trained, so that damage is meaningful."""
    sample_shape: tuple[int, int, int]
    predicted_channels: int
    rows: dict[str, tuple[int, ...]]
    """Shape of a row of each randomly drawn condition."""
    guidance_scale: float
    """1 without guidance."""
    steps: int
    scheduler: SchedulerHeader
    engines: tuple[Engine, ...]
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        """Check that every graph is listed."""
        listed = {file.path for file in self.files}
        named = {HEADER, CONTENTS, SCHEDULER, *(engine.graph for engine in self.engines)}
        require(named <= listed, f"not in the list of files: {sorted(named - listed)}")


class Folder:
    """The folder of one model."""

    def __init__(self, path: Path) -> None:
        """Open a folder.

        Raises:
            ArtifactError: If it is not a finished folder of `gpu_prepare.py`.
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
            CorruptArtifactError: If the file has changed since it was written.
        """
        (record,) = (file for file in self.model.files if file.path == name)
        data = read_bounded(self.path / name, LARGEST_FILE)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise CorruptArtifactError(f"{self.path / name} does not match its record. Run gpu_prepare.py again.")
        return data

    def assignment(self, engine: str) -> Assignment:
        """Return the assignment of an engine."""
        return self._engines[engine].assignment

    def graph(self, engine: str) -> SerialisedGraph:
        """Read the graph of an engine."""
        own = self._engines[engine]
        return SerialisedGraph(graph=self.read(own.graph), weights=frozenset(own.reads))

    def scheduler(self) -> SchedulerTables:
        """Read the scheduler tables."""
        return SchedulerTables.from_array(
            self.model.scheduler, safetensors.numpy.load(self.read(SCHEDULER))[SCHEDULER_ROWS]
        )

    @property
    def table(self) -> SchedulerTable:
        """The scheduler table for the model's number of steps."""
        return self.scheduler().table(self.model.steps)

    def conditions(self) -> Conditions:
        """Read the conditions of the samples, or draw random ones."""
        if any(file.path == CONDITIONS for file in self.model.files):
            return Conditions.from_arrays(safetensors.numpy.load(self.read(CONDITIONS)), self.model.guidance_scale)
        generator = np.random.default_rng(0)
        rows = {name: (_RANDOM_ROWS, *shape) for name, shape in self.model.rows.items()}
        return Conditions(own={name: generator.standard_normal(shape, np.float32) for name, shape in rows.items()})

    @functools.cached_property
    def weights(self) -> bytes:
        """The assembled weights file; drawing random numbers takes a second on a GPU and half a minute on the CPU."""
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
        ArtifactError: If there are none.
    """
    found = tuple(Folder(record.parent) for record in sorted(path.glob(f"*/{RECORD}")))
    if not found:
        raise ArtifactError(f"{path} has no prepared model. Run `python benchmarks/gpu_prepare.py {path}`.")
    return found


def header_of(weights: Path) -> bytes:
    """Read the header of a weights file, including the eight bytes of its length."""
    with weights.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _entries(header: bytes) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """List name, shape and type of the tensors in a weights file, in file order."""
    entries: dict[str, dict[str, Any]] = json.loads(header[8:])
    entries.pop("__metadata__", None)
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        yield name, tuple(entry["shape"]), _TYPES[entry["dtype"]]


def _draw(name: str, shape: tuple[int, ...], device: str) -> Tensor:
    """Draw normal numbers, scaled so that a layer roughly preserves the magnitude of its input."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    fan_in = math.prod(shape[1:]) if len(shape) > 2 else max(shape)  # a matrix may be stored transposed
    return torch.randn(shape, generator=generator, device=device) / math.sqrt(fan_in)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
