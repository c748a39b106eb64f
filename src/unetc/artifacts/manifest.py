"""Manifest: the table of contents of a bundle, written last, with a hash for every other byte of it."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import PurePosixPath
from typing import Any, ClassVar

from unetc.precision import Precision
from unetc.sampler.table import SchedulerHeader
from unetc.treatments import Treatment

from .plan import Plan
from .profile import Damage, ModelReference
from .record import Artifact, Record, require

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
"""Holds the hash of the manifest, so that its own bytes are covered too."""
SCHEDULER_ROWS = "rows"
"""Name of the one array in the scheduler file."""


def digest_of(manifest: bytes) -> bytes:
    """Make the contents of the file that vouches for a manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


class FileRecord(Record, frozen=True, kw_only=True):
    """One file of the bundle."""

    path: str
    """Relative, with forward slashes, inside the bundle."""
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuse a path that could reach outside the bundle."""
        parts = PurePosixPath(self.path).parts
        plain = re.fullmatch(r"[A-Za-z0-9_.\-/]+", self.path) and not self.path.startswith("/")
        require(bool(plain) and ".." not in parts and self.path == "/".join(parts), f"unsafe path {self.path!r}")
        require(self.bytes >= 0, "a size is not negative")
        require(bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)), "a sha256 has 64 hexadecimal digits")


class LoweredGraph(Record, frozen=True, kw_only=True):
    """A graph in half precision."""

    graph: str
    """Path of the ONNX graph."""
    weights: tuple[str, ...]
    """What it reads of the weights file, called after what it is rounded from, as `unetc.precision` says."""


class BundleEngine(Record, frozen=True, kw_only=True):
    """One compiled graph."""

    graph: str
    """Path of the ONNX graph; its weights are in the bundle's one weights file."""
    unused_weights: tuple[str, ...]
    """Tensors of the weights file that the graph does not read."""
    lowered: LoweredGraph | None = None
    """The same in the bundle's precision, if that is less than float32."""
    treatments: dict[str, Treatment]
    step_ms: float
    """Median milliseconds per call, measured on the target at the manifest's batch."""


class Measurement(Record, frozen=True, kw_only=True):
    """What joint sampling measured against the full model."""

    time_ratio: float
    """Time of the schedule / time of the full model, dimensionless."""
    damage: Damage


class EnginePair(Record, frozen=True, kw_only=True):
    """How the damages of two engines of a plan add up; relative L2, all other steps computed in full."""

    engines: tuple[int, int]
    alone: tuple[float, float]
    together: float

    @property
    def excess(self) -> float:
        """Damage together / root of the sum of the squared single damages; 1 if they add up as the planner assumes."""
        expected = math.hypot(*self.alone)
        return self.together / expected if expected else 1.0


class Control(Record, frozen=True, kw_only=True):
    """A plan of the same cost made by a simpler rule, kept for comparison."""

    name: str
    plan: Plan
    engines: tuple[BundleEngine, ...]

    def __post_init__(self) -> None:
        """Check that every engine of the plan is there."""
        require(len(self.engines) == len(self.plan.engines), "there must be one graph per engine of the plan")


class Conditioning(Record, frozen=True, kw_only=True):
    """What samples of the bundle are conditioned on unless they are given conditions of their own."""

    file: str
    """Path of the encoded prompts."""
    prompts: tuple[str, ...]
    """In words; sample k has prompt k, modulo their number."""
    used: int
    """Analysis and build have seen the first so many; `verify` uses the others, if there are any."""
    guidance_scale: float
    """Of classifier-free guidance, dimensionless; 1 if there is none."""

    def __post_init__(self) -> None:
        """Check the count."""
        require(0 < self.used <= len(self.prompts), "a bundle with prompts was made with some of them")


class BundleDecoder(Record, frozen=True, kw_only=True):
    """What turns samples into images."""

    graph: str
    """Path of the ONNX graph, weights inside."""
    scale: int
    """Pixels of the image per pixel of a sample, along each side."""


class Manifest(Artifact, frozen=True, kw_only=True):
    """Everything a session needs to know about a bundle."""

    SCHEMA: ClassVar[int] = 4
    schema: int = 4
    unetc: str
    model: ModelReference
    target: str
    precision: Precision = Precision.FP32
    """What graphs are there in besides float32; float32 if in nothing else."""
    threads: int
    sample_shape: tuple[int, int, int]
    """[channel, height, width] the model was trained for."""
    denoiser_config: dict[str, Any]
    """The denoiser's own configuration, as its library writes it."""
    predicted_channels: int
    """Width of what the denoiser predicts; that of a sample, or more where it predicts a variance too."""
    conditioning: Conditioning | None = None
    """None if the denoiser gets noise and timestep alone."""
    decoder: BundleDecoder | None = None
    """None if samples are images."""
    batch: int
    """Batch of all times in this manifest."""
    steps: int
    """Default number of steps."""
    weights: str
    profile: str
    """Path of the profile that the plan was made from."""
    scheduler: SchedulerHeader
    scheduler_file: str
    full: BundleEngine
    """The full model, which emits nothing: what `full_model` runs, and what all time ratios are measured against."""
    plan: Plan
    engines: tuple[BundleEngine, ...]
    """One per engine of the plan, in its order."""
    controls: tuple[Control, ...]
    measured: Measurement
    evaluated: tuple[Measurement, ...]
    """Every schedule that the build has sampled on its way to the plan."""
    pairs: tuple[EnginePair, ...]
    """How far the damages of the plan's engines add up."""
    used_seeds: tuple[int, ...]
    """Seeds that analysis and build have seen; `verify` uses others."""
    notes: tuple[str, ...]
    """What the build did to meet the budget, in words."""
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        """Check that everything named is listed."""
        listed = {file.path for file in self.files}
        require(len(listed) == len(self.files), "a file is listed twice")
        require(len({path.lower() for path in listed}) == len(listed), "two paths differ only in case")
        named = {self.weights, self.profile, self.scheduler_file, *self.graphs()}
        if self.conditioning is not None:
            named.add(self.conditioning.file)
        require(named <= listed, f"not in the list of files: {sorted(named - listed)}")
        require(not self.full.treatments, "the full model keeps every component")
        require(len(self.engines) == len(self.plan.engines), "there must be one graph per engine of the plan")
        require(min(*self.sample_shape, self.batch, self.steps) > 0, "sample_shape, batch and steps must be positive")
        require(bool(self.used_seeds), "a bundle names the seeds it was made with")
        lowered = {engine.lowered is not None for engine in self.all_engines()}
        require(lowered == {self.precision is not Precision.FP32}, "all graphs are there in the bundle's precision")

    def all_engines(self) -> tuple[BundleEngine, ...]:
        """List the full model, the engines of the plan and those of the controls."""
        return (self.full, *self.engines, *(engine for control in self.controls for engine in control.engines))

    def graphs(self) -> frozenset[str]:
        """Name every file that a backend loads."""
        engines = self.all_engines()
        graphs = {engine.graph for engine in engines} | {one.lowered.graph for one in engines if one.lowered}
        return frozenset(graphs if self.decoder is None else graphs | {self.decoder.graph})
