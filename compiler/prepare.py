"""Prepare a model for analysis and build: its gated graph, its scheduler tables, its decoder and its encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

import unetc
from unetc.artifacts.record import write_atomically
from unetc.compiler.graph.capture import Capture, capture
from unetc.compiler.graph.decoder import export_decoder
from unetc.compiler.graph.encoder import export_encoder
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.errors import ArtifactError
from unetc.lock import locked_with_note
from unetc.models.model import Model
from unetc.progress import OnProgress, Progress, ignore
from unetc.sampler.table import SchedulerTables

from .schedulers.extract import STEP_COUNTS, extract_all
from .schedulers.make import scheduler_for

CAPTURES = 4
"""Version of the way in which models are captured: captures and partial results of other versions are not reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A captured model."""

    model: Model
    gated: GatedGraph
    work: Path
    """Folder for partial results about this model."""


def prepare(model: Model, cache: Path, on_progress: OnProgress = ignore) -> Prepared:
    """Capture a model, or read the capture that an earlier command left in the cache.

    Raises:
        ModelError: If it is not supported.
        CompileError: If it cannot be exported.
        ArtifactError: If the cache cannot be written.
    """
    versions = (unetc.__version__, version("torch"), version("onnxscript"), OPSET, CAPTURES)
    key = hashlib.sha256(repr((model.reference.sha256, model.calls, versions)).encode()).hexdigest()[:24]
    work = cache / key
    on_progress(Progress(stage="capture", done=0, total=1))
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked_with_note(work / "graph.lock", "captures this model", on_progress):
            gated = open_or_build(work / "graph", lambda: _capture(model))
    except OSError as error:
        raise ArtifactError(f"cannot write the cache {work}: {error.strerror}. Choose another with --cache.") from error
    on_progress(Progress(stage="capture", done=1, total=1))
    return Prepared(model=model, gated=gated, work=work)


def _capture(model: Model) -> Capture:
    return capture(model.load_denoiser(), controlnet=model.reference.controlnet, calls=model.calls)


def prepare_decoder(prepared: Prepared) -> bytes | None:
    """Export the decoder as ONNX, or read the file that an earlier command exported.

    Returns:
        The graph from samples to images; None if samples are images.

    Raises:
        ModelError: If the decoder cannot be loaded.
        CompileError: If it cannot be exported.
        ArtifactError: If the cache cannot be written or read.
    """
    if (decoder := prepared.model.load_decoder()) is None:
        return None
    return _exported(prepared, f"decoder-{decoder.sha256()[:16]}.onnx", lambda: export_decoder(decoder))


def prepare_encoder(prepared: Prepared) -> bytes | None:
    """Export the encoder as ONNX, or read the file that an earlier command exported.

    Returns:
        The graph from images to samples; None if samples are images.

    Raises:
        ModelError: If the encoder cannot be loaded.
        CompileError: If it cannot be exported.
        ArtifactError: If the cache cannot be written or read.
    """
    if (encoder := prepared.model.load_encoder()) is None:
        return None
    return _exported(prepared, f"encoder-{encoder.sha256()[:16]}.onnx", lambda: export_encoder(encoder))


def _exported(prepared: Prepared, name: str, export: Callable[[], bytes]) -> bytes:
    """Read a graph from the cache, after exporting it if it is not there."""
    path = prepared.work / name
    try:
        with FileLock(prepared.work / f"{name.partition('-')[0]}.lock"):
            if not path.exists():
                write_atomically(path, export())
            return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}. Choose another folder with --cache.") from error


def prepare_scheduler(
    model: Model, scheduler: str, counts: tuple[int, ...] = (), on_progress: OnProgress = ignore
) -> SchedulerTables:
    """Extract a scheduler's tables for many step counts, including the given ones.

    Raises:
        ModelError: If the scheduler is unknown, or cannot do the given step counts.
    """

    def report(done: int, total: int) -> None:
        on_progress(Progress(stage="scheduler", done=done, total=total))

    return extract_all(scheduler_for(scheduler, model), scheduler, STEP_COUNTS, report, asked=counts)
