"""Manifest: the table of contents of a bundle. It is written last and holds a hash of every other file."""

from __future__ import annotations

import hashlib
import math
import re
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, ClassVar

from unetc.errors import SessionError
from unetc.percent import percent
from unetc.precision import Precision
from unetc.sampler.table import SchedulerHeader
from unetc.treatments import Treatment

from .call_input import SAMPLE, CallInput
from .plan import Plan
from .profile import ControlMeasured, Damage, ModelReference
from .record import Artifact, Record, finite, require
from .sizes import SampleSizes

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
"""File with the hash of the manifest, so that the manifest is protected too."""
SCHEDULER_ROWS = "rows"
"""Name of the only array in the scheduler file."""
MOST_VALUES = 2**28
"""Most values of a sample of the model's own size: 16 channels of 4096 x 4096."""
IMAGE_CHANNELS = 3
"""Channels of an image that a decoder makes."""
FULL = "full"
"""Name of the quality level that runs the full model at every step; every bundle has it."""


def image_shape(sample_shape: tuple[int, int, int], scale: int | None) -> tuple[int, int, int]:
    """Compute [channel, height, width] of the image of a sample; the scale is the decoder's, None without one."""
    _, height, width = sample_shape
    return sample_shape if scale is None else (IMAGE_CHANNELS, height * scale, width * scale)


def digest_of(manifest: bytes) -> bytes:
    """Compute the contents of the file that protects a manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}\n".encode()


class FileRecord(Record, frozen=True, kw_only=True):
    """One file of the bundle."""

    path: str
    """Path relative to the bundle, with forward slashes."""
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Refuse a path that could reach outside the bundle."""
        parts = PurePosixPath(self.path).parts
        plain = re.fullmatch(r"[A-Za-z0-9_.\-/]+", self.path) and not self.path.startswith("/")
        require(bool(plain) and ".." not in parts and self.path == "/".join(parts), f"unsafe path {self.path!r}")
        require(self.bytes >= 0, "a size must not be negative")
        require(bool(re.fullmatch(r"[0-9a-f]{64}", self.sha256)), "a sha256 must have 64 hexadecimal digits")


class LoweredGraph(Record, frozen=True, kw_only=True):
    """A graph in half precision."""

    graph: str
    """Path of the ONNX graph."""
    weights: tuple[str, ...]
    """Weights that the graph reads, under the names described in `unetc.precision`."""


class BundleEngine(Record, frozen=True, kw_only=True):
    """One compiled graph."""

    graph: str
    """Path of the ONNX graph; its weights are in the bundle's single weights file."""
    unused_weights: tuple[str, ...]
    """Tensors of the weights file that the graph does not read."""
    lowered: LoweredGraph | None = None
    """The same graph in the bundle's precision; None for float32."""
    treatments: dict[str, Treatment]
    step_ms: float
    """Median milliseconds per call, measured on the target at the manifest's batch size."""
    batch_ms: tuple[tuple[int, float], ...] = ()
    """Number of samples in a call, rising, and its median milliseconds, measured in turns; empty for controls."""

    def __post_init__(self) -> None:
        """Check the times."""
        sizes, times = [size for size, _ in self.batch_ms], [ms for _, ms in self.batch_ms]
        rising = all(low < high for low, high in pairwise((0, *sizes)))
        require(rising, f"the batches of batch_ms must rise from 1 or more, got {sizes}")
        require(finite(*times) and all(ms > 0 for ms in times), "the times of batch_ms must be positive")


class Measurement(Record, frozen=True, kw_only=True):
    """Time and damage of a whole schedule, measured against the full model."""

    time_ratio: float
    """Time of the schedule / time of the full model, dimensionless."""
    damage: Damage


def level_name(budget: float) -> str:
    """Name the quality level of a budget: 0.27 is 27%."""
    return percent(budget).replace(" ", "")


class Level(Record, frozen=True, kw_only=True):
    """A quality level: a plan with its engines, measured against the full model."""

    name: str
    """Share of the time that its budget saves, as 27%."""
    plan: Plan
    engines: tuple[BundleEngine, ...]
    """One per engine of the plan, in the same order."""
    measured: Measurement
    tuned: str | None = None
    """Name of the schedule in `tables` whose rows are tuned to the plan; None for the bundle's own."""
    plain_damage: Damage | None = None
    """Damage with the bundle's own schedule, as in a diffusers pipeline; None if that is what was measured."""
    evaluated: tuple[Measurement, ...]
    """Every schedule that the build sampled while it chose the plan."""

    def __post_init__(self) -> None:
        """Check the name, and that every engine of the plan is present."""
        require(bool(self.name) and self.name != FULL, f"a level must have a name other than {FULL!r}")
        require(len(self.engines) == len(self.plan.engines), "there must be one graph per engine of the plan")
        require((self.tuned is None) == (self.plain_damage is None), "a tuned level must state its plain damage")


class EnginePair(Record, frozen=True, kw_only=True):
    """Damage of two engines of a plan, alone and together: relative L2, with all other steps computed in full."""

    engines: tuple[int, int]
    alone: tuple[float, float]
    together: float

    @property
    def excess(self) -> float:
        """Damage together / root of the sum of the squared single damages; 1 if they add up as the planner assumes."""
        expected = math.hypot(*self.alone)
        return self.together / expected if expected else 1.0


class BundleTable(Record, frozen=True, kw_only=True):
    """A schedule besides the bundle's own: the table of a scheduler for one number of steps."""

    name: str
    """Unique within the bundle."""
    file: str
    """Path of the packed array."""
    header: SchedulerHeader

    def __post_init__(self) -> None:
        """Check the number of tables."""
        require(len(self.header.counts) == 1, f"the schedule {self.name} must have one number of steps")


class Control(Record, frozen=True, kw_only=True):
    """Something simpler that takes the same time, for comparison: a plan, or the full model along another schedule."""

    name: str
    description: str
    plan: Plan | None = None
    """Plan made by a simpler rule; None for the full model."""
    engines: tuple[BundleEngine, ...] = ()
    """One per engine of the plan, in the same order."""
    table: str | None = None
    """Name of its schedule in `tables`, tuned to the plan if there is one; None for the bundle's own."""

    def __post_init__(self) -> None:
        """Check that every engine of the plan is present, and that there is something to compare with."""
        count = 0 if self.plan is None else len(self.plan.engines)
        require(len(self.engines) == count, "there must be one graph per engine of the plan")
        require(self.plan is not None or self.table is not None, "a control must have a plan or a schedule")


class Conditioning(Record, frozen=True, kw_only=True):
    """Default conditions of the bundle's samples."""

    file: str
    """Path of the encoded prompts."""
    prompts: tuple[str, ...]
    """Text of the prompts, or labels of classes as numbers; sample k has prompt k modulo their number."""
    used: int
    """Number of prompts used by analysis and build, from the first; `verify` uses the others, if any."""
    guidance_scale: float
    """Scale of classifier-free guidance, dimensionless; 1 without guidance."""
    image_guidance_scale: float = 1.0
    """Scale of the guidance by the image, for models that edit images; 1 without it."""
    size: tuple[int, int] | None = None
    """Height and width in pixels that the size numbers of SDXL were made for; None if they do not follow the size."""

    def __post_init__(self) -> None:
        """Check the count."""
        require(0 < self.used <= len(self.prompts), "the number of used prompts must lie between 1 and all")
        require(self.size is None or min(self.size) > 0, "the size must be positive")


class BundleDecoder(Record, frozen=True, kw_only=True):
    """Graph that turns samples into images."""

    graph: str
    """Path of the ONNX graph, which contains its weights."""
    scale: int
    """Image pixels per sample pixel, along each side."""

    def __post_init__(self) -> None:
        """Check the scale."""
        require(self.scale > 0, "the scale must be positive")


class BundleEncoder(Record, frozen=True, kw_only=True):
    """Graph that turns images into samples."""

    graph: str
    """Path of the ONNX graph, which contains its weights."""
    scale: int
    """Image pixels per sample pixel, along each side."""

    def __post_init__(self) -> None:
        """Check the scale."""
        require(self.scale > 0, "the scale must be positive")


class BundleTextEncoder(Record, frozen=True, kw_only=True):
    """Graph of a text encoder, with its weights and its tokenizer."""

    graph: str
    """Path of the ONNX graph."""
    weights: str
    """Path of the weights file, which the graph reads as a whole."""
    tokenizer: str
    """Path of the tokenizer, in the JSON of the library `tokenizers`."""
    length: int
    """Number of tokens that it reads; shorter prompts are padded, longer ones are cut."""
    padding: int
    """Token after the end of a shorter prompt."""
    width: int
    """Width of a token's state."""
    pooled: int | None = None
    """Width of its state of a whole prompt; None if the denoiser does not take it."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        require(self.length >= 2, "a text encoder reads at least the tokens for begin and end")
        require(self.padding >= 0, "a token is not negative")
        require(min(self.width, 1 if self.pooled is None else self.pooled) > 0, "widths of states must be positive")


class BundleText(Record, frozen=True, kw_only=True):
    """Text encoders that turn any prompt into conditions."""

    encoders: tuple[BundleTextEncoder, ...]
    """Their states of a token are joined; one at most has a state of a whole prompt."""
    zero_negative: bool = False
    """Whether the conditions of no negative prompt are zero; if not, they are those of the empty prompt."""
    frequencies: tuple[float, ...] = ()
    """Frequencies that embed the guidance scale, for a denoiser that reads it; empty for the others."""

    def __post_init__(self) -> None:
        """Check the encoders."""
        require(bool(self.encoders), "there must be a text encoder")
        require(sum(one.pooled is not None for one in self.encoders) <= 1, "two encoders have a state of a prompt")


class Manifest(Artifact, frozen=True, kw_only=True):
    """Everything a session needs to know about a bundle."""

    SCHEMA: ClassVar[int] = 8
    schema: int = 8
    unetc: str
    model: ModelReference
    target: str
    precision: Precision = Precision.FP32
    """Precision of the lowered graphs; float32 if there are none."""
    threads: int
    sample_shape: tuple[int, int, int]
    """[channel, height, width] the model was trained for."""
    sample_sizes: SampleSizes = SampleSizes(multiple=1)
    """Heights and widths of samples that the engines can take."""
    denoiser_config: dict[str, Any]
    """Configuration of the denoiser, as its library writes it."""
    inputs: tuple[CallInput, ...]
    """Inputs of the engines, without timestep and ControlNet inputs: the sample, then its conditions."""
    predicted_channels: int
    """Channels of a prediction: as many as in a sample, or more if the denoiser also predicts a variance."""
    conditioning: Conditioning | None = None
    """None for an unconditional model."""
    control: ControlMeasured | None = None
    """Control images that damage was measured with; None if all ControlNet inputs, if there are any, were zero."""
    decoder: BundleDecoder | None = None
    """None if samples are images."""
    encoder: BundleEncoder | None = None
    """Makes the samples that image to image starts from; None if samples are images."""
    text: BundleText | None = None
    """Encodes prompts that are not in `conditioning`; None if the bundle has only these."""
    batch: int
    """Batch size of all timings in this manifest."""
    steps: int
    """Default number of steps."""
    weights: str
    profile: str
    """Path of the profile that the plans were made from."""
    scheduler: SchedulerHeader
    scheduler_file: str
    full: BundleEngine
    """The full model, which emits nothing. `full_model=True` runs it, and all time ratios refer to it."""
    levels: tuple[Level, ...]
    """The ladder of quality levels, from the smallest budget to the largest; the first level is the default."""
    controls: tuple[Control, ...]
    """Simpler ways to take the time of the default level."""
    tables: tuple[BundleTable, ...] = ()
    """Schedules of controls, and the converged one."""
    converged: str | None = None
    """Name of the schedule of the converged trajectory; None if there is none."""
    pairs: tuple[EnginePair, ...]
    """Joint damage of pairs of the default level's engines."""
    used_seeds: tuple[int, ...]
    """Seeds used by analysis and build; `verify` uses others."""
    notes: tuple[str, ...]
    """Notes of the build on how it met the budget."""
    files: tuple[FileRecord, ...]

    def __post_init__(self) -> None:
        """Check that every named file is listed and that the parts agree."""
        listed = {file.path for file in self.files}
        require(len(listed) == len(self.files), "a file is listed twice")
        require(len({path.lower() for path in listed}) == len(listed), "two paths differ only in case")
        named = {self.weights, self.profile, self.scheduler_file, *self.graphs(), *(one.file for one in self.tables)}
        if self.conditioning is not None:
            named.add(self.conditioning.file)
        if self.text is not None:
            named |= {path for one in self.text.encoders for path in (one.weights, one.tokenizer)}
        require(named <= listed, f"not in the list of files: {sorted(named - listed)}")
        require(bool(self.inputs) and self.inputs[0].name == SAMPLE, f"the first input must be {SAMPLE}")
        require(self.inputs[0].axes[:1] == self.sample_shape[:1], "inputs and sample_shape must have the same channels")
        require(not self.full.treatments, "the full model must keep every component")
        require(bool(self.levels), "a bundle needs a quality level")
        names = [level.name for level in self.levels]
        require(len({*names}) == len(names), f"the names of levels must differ, got {', '.join(names)}")
        tables = [table.name for table in self.tables]
        require(len({*tables}) == len(tables), f"the names of schedules must differ, got {', '.join(tables)}")
        used = {self.converged, *(one.table for one in self.controls), *(level.tuned for level in self.levels)} - {None}
        require(used <= {*tables}, "a control or a level has a schedule that the bundle lacks")
        require(min(*self.sample_shape, self.batch, self.steps) > 0, "sample_shape, batch and steps must be positive")
        require(math.prod(self.sample_shape) <= MOST_VALUES, f"a sample has more than {MOST_VALUES} values")
        require(bool(self.used_seeds), "used_seeds must not be empty")
        lowered = {engine.lowered is not None for engine in self.all_engines()}
        require(lowered == {self.precision is not Precision.FP32}, "every graph must exist in the bundle's precision")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[channel, height, width] of one image of the model's own size."""
        return image_shape(self.sample_shape, None if self.decoder is None else self.decoder.scale)

    @property
    def plan(self) -> Plan:
        """Plan of the default level."""
        return self.levels[0].plan

    @property
    def engines(self) -> tuple[BundleEngine, ...]:
        """Engines of the default level's plan, in the same order."""
        return self.levels[0].engines

    @property
    def measured(self) -> Measurement:
        """Time and damage of the default level."""
        return self.levels[0].measured

    @property
    def plain_damage(self) -> Damage | None:
        """Damage of the default level with the bundle's own schedule, if another one is tuned to its plan."""
        return self.levels[0].plain_damage

    def level(self, name: str) -> Level:
        """Find a quality level by its name.

        Raises:
            SessionError: If there is no such level; the message lists the names.
        """
        for level in self.levels:
            if level.name == name:
                return level
        known = ", ".join([FULL, *(level.name for level in self.levels)])
        raise SessionError(f"unknown quality level {name!r}. This bundle has: {known}.")

    def level_engines(self) -> tuple[BundleEngine, ...]:
        """List the full model, then the engines of all quality levels; levels may share some."""
        return (self.full, *(engine for level in self.levels for engine in level.engines))

    def all_engines(self) -> tuple[BundleEngine, ...]:
        """List the full model, then the engines of the quality levels, then the engines of the controls."""
        return (*self.level_engines(), *(engine for control in self.controls for engine in control.engines))

    def graphs(self) -> frozenset[str]:
        """List every graph file that a backend loads."""
        engines = self.all_engines()
        graphs = {engine.graph for engine in engines} | {one.lowered.graph for one in engines if one.lowered}
        around = [part.graph for part in (self.decoder, self.encoder) if part is not None]
        text = () if self.text is None else self.text.encoders
        return frozenset(graphs.union(around, (one.graph for one in text)))
