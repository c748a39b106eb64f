"""The files of a bundle, and the manifest that names them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import unetc
from unetc.artifacts.manifest import (
    SCHEDULER_ROWS,
    BundleDecoder,
    BundleEncoder,
    BundleEngine,
    BundleTable,
    BundleText,
    Conditioning,
    Control,
    EnginePair,
    FileRecord,
    Level,
    LoweredGraph,
    Manifest,
)
from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.set_up import Setup
from unetc.compiler.text import PreparedText
from unetc.precision import Precision
from unetc.sampler.table import SchedulerTables
from unetc.tensors import save_tensors
from unetc.treatments import Treatment

PROFILE_FILE = "profile.json"
SCHEDULER_FILE = "scheduler.safetensors"
CONDITIONS_FILE = "conditions.safetensors"
DECODER_FILE = "decoder.onnx"
ENCODER_FILE = "encoder.onnx"


class Contents:
    """Collects the files of a bundle; equal graphs share a file."""

    def __init__(self, setup: Setup, batch_ms: Mapping[bytes, tuple[tuple[int, float], ...]]) -> None:
        """Start with the files that every plan of a profile needs.

        Args:
            setup: The model, its profile and its target.
            batch_ms: Numbers of samples with the median milliseconds of a call, for graphs that were timed like that.
        """
        self._setup = setup
        self._batch_ms = batch_ms
        self._scheduler, rows = setup.scheduler.to_array()
        self._files: dict[str, bytes | Path] = {
            WEIGHTS: setup.prepared.gated.weights,
            PROFILE_FILE: setup.profile.to_json(),
            SCHEDULER_FILE: save_tensors({SCHEDULER_ROWS: rows}),
        }
        if setup.conditions.rows:
            self._files[CONDITIONS_FILE] = save_tensors(setup.conditions.to_arrays())
        if setup.decoder is not None:
            self._files[DECODER_FILE] = setup.decoder
        self._encodes_images = False
        self._text: BundleText | None = None
        self._tables: list[BundleTable] = []
        self._names: dict[bytes, str] = {}
        self._lowered: dict[str, LoweredGraph | None] = {}

    @property
    def files(self) -> Mapping[str, bytes | Path]:
        """All files so far by their path in the bundle, as bytes or as a file to copy."""
        return self._files

    def add_encoder(self, graph: bytes) -> None:
        """Add the graph from images to samples."""
        self._files[ENCODER_FILE] = graph
        self._encodes_images = True

    def add_text(self, prepared: PreparedText) -> None:
        """Add text encoders."""
        self._files.update(prepared.files)
        self._text = prepared.text

    def add_full(self, step_ms: float) -> BundleEngine:
        """Add the full model.

        Args:
            step_ms: Median milliseconds per call.
        """
        return self._add("engines/full.onnx", self._setup.workbench.full, {}, step_ms)

    def add_engines(self, prefix: str, candidate: Candidate) -> tuple[BundleEngine, ...]:
        """Add the engines of a plan.

        Args:
            prefix: Beginning of their paths; the number of the engine follows.
            candidate: The plan with its engines.
        """
        engines = zip(candidate.graphs, candidate.plan.engines, candidate.step_ms, strict=True)
        return tuple(
            self._add(f"{prefix}{i}.onnx", graph, own.treatments, ms) for i, (graph, own, ms) in enumerate(engines)
        )

    def add_table(self, name: str, scheduler: SchedulerTables) -> str:
        """Add a schedule besides the bundle's own.

        Args:
            name: Its name, part of its path.
            scheduler: The scheduler, for one number of steps.

        Returns:
            The name.
        """
        header, rows = scheduler.to_array()
        path = f"schedules/{name}.safetensors"
        self._files[path] = save_tensors({SCHEDULER_ROWS: rows})
        self._tables.append(BundleTable(name=name, file=path, header=header))
        return name

    def add_tuned(self, name: str, candidate: Candidate | None) -> str | None:
        """Add the rows that are tuned to a plan; None if there are none."""
        if candidate is None or candidate.tuned is None:
            return None
        return self.add_table(name, self._setup.scheduler.only(candidate.tuned))

    def _add(self, name: str, graph: SerialisedGraph, treatments: dict[str, Treatment], step_ms: float) -> BundleEngine:
        path = self._names.setdefault(graph.graph, name)
        if path not in self._files:
            self._files[path] = graph.graph
            self._lowered[path] = self._lower(path, graph)
        return BundleEngine(
            graph=path,
            unused_weights=tuple(sorted(self._setup.workbench.full.weights - graph.weights)),
            lowered=self._lowered[path],
            treatments=treatments,
            step_ms=step_ms,
            batch_ms=self._batch_ms.get(graph.graph, ()),
        )

    def _lower(self, path: str, graph: SerialisedGraph) -> LoweredGraph | None:
        """Add the same graph in the precision of the target, if that is less than float32."""
        lowering = self._setup.lowering
        if lowering is None:
            return None
        low = lowering.lower(graph)
        own = f"{lowering.precision}/{path}"
        self._files[own] = low.graph
        return LoweredGraph(graph=own, weights=tuple(sorted(low.weights)))

    def manifest(
        self,
        files: tuple[FileRecord, ...],
        *,
        steps: int,
        full: BundleEngine,
        levels: tuple[Level, ...],
        controls: tuple[Control, ...],
        converged: str | None,
        pairs: tuple[EnginePair, ...],
        used_seeds: tuple[int, ...],
        notes: tuple[str, ...],
    ) -> Manifest:
        """Make the manifest.

        Args:
            files: Records of all files, as written.
            steps: Default number of steps.
            full: The full model.
            levels: The quality levels, the default first.
            controls: Controls with their engines or schedules.
            converged: Name of the schedule of the converged trajectory.
            pairs: How damages of the default level's engines add up.
            used_seeds: Seeds that analysis and build have used.
            notes: Steps of the build, in words.
        """
        setup, profile = self._setup, self._setup.profile
        return Manifest(
            unetc=unetc.__version__,
            model=profile.model,
            target=profile.target,
            precision=setup.lowering.precision if setup.lowering else Precision.FP32,
            threads=profile.threads,
            sample_shape=profile.sample_shape,
            sample_sizes=setup.prepared.gated.sizes,
            denoiser_config=setup.prepared.model.denoiser_config,
            inputs=setup.prepared.model.calls.inputs,
            predicted_channels=setup.prepared.gated.predicted_channels,
            conditioning=self._conditioning(),
            control=profile.control,
            decoder=self._decoder(),
            encoder=self._encoder(),
            text=self._text,
            batch=profile.batch,
            steps=steps,
            weights=WEIGHTS,
            profile=PROFILE_FILE,
            scheduler=self._scheduler,
            scheduler_file=SCHEDULER_FILE,
            full=full,
            levels=levels,
            controls=controls,
            tables=tuple(self._tables),
            converged=converged,
            pairs=pairs,
            used_seeds=used_seeds,
            notes=notes,
            files=files,
        )

    def _conditioning(self) -> Conditioning | None:
        profile = self._setup.profile
        if not self._setup.conditions.rows:
            return None
        return Conditioning(
            file=CONDITIONS_FILE,
            prompts=profile.prompts,
            used=profile.used_prompts,
            guidance_scale=profile.guidance_scale,
            image_guidance_scale=self._setup.conditions.middle_scale,
            size=self._setup.conditions.size,
        )

    def _decoder(self) -> BundleDecoder | None:
        if self._setup.decoder is None:
            return None
        return BundleDecoder(graph=DECODER_FILE, scale=self._setup.prepared.model.decoder_scale)

    def _encoder(self) -> BundleEncoder | None:
        if not self._encodes_images:
            return None
        return BundleEncoder(graph=ENCODER_FILE, scale=self._setup.prepared.model.decoder_scale)
