"""Bundles: every file is hashed before it is parsed, and no path leaves the folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.manifest import DIGEST, MANIFEST, SCHEDULER_ROWS, BundleEngine, FileRecord, Manifest, digest_of
from unetc.artifacts.reading import read_plain
from unetc.artifacts.record import MAX_JSON_BYTES
from unetc.backend import SerialisedGraph
from unetc.call import CallSignature
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.controlnet import ControlNetInput, controlnet_inputs
from unetc.errors import ArtifactError, CorruptArtifactError, SessionError, ShapeMismatch
from unetc.precision import Precision
from unetc.sampler.table import SchedulerTables
from unetc.tensors import load_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle in memory."""

    path: Path
    manifest: Manifest
    graphs: dict[str, bytes]
    """ONNX graphs by their path in the bundle."""
    weights: bytes
    """The weights file, shared by all graphs."""
    tensors: frozenset[str]
    """Names of the tensors in the weights file."""
    scheduler: SchedulerTables
    tables: dict[str, SchedulerTables]
    """Other schedules by name, for controls and the converged trajectory."""
    conditions: Conditions
    """Conditions for the prompts in the manifest; `UNCONDITIONAL` without prompts."""
    text: dict[str, bytes]
    """Weights and tokenizers of the text encoders, by their path in the bundle."""
    profile: bytes
    """JSON of the profile that the plan was made from."""

    def graph_of(self, engine: BundleEngine, precision: Precision = Precision.FP32) -> SerialisedGraph:
        """Return the graph of an engine, with the names of the weights that it reads.

        Args:
            engine: An engine of the manifest.
            precision: Precision of the graph.

        Raises:
            SessionError: If the bundle does not have the graph in this precision.
        """
        if precision is not Precision.FP32:
            if engine.lowered is None or precision is not self.manifest.precision:
                raise SessionError(
                    f"{self.path} was built for {self.manifest.target} and has no graphs in {precision}. Build it for "
                    f"a target that ends with :{precision}, or sample on a target without that suffix."
                )
            lowered = engine.lowered
            return SerialisedGraph(
                graph=self.graphs[lowered.graph], weights=frozenset(lowered.weights), call=self.usual_call
            )
        return SerialisedGraph(
            graph=self.graphs[engine.graph],
            weights=self.tensors.difference(engine.unused_weights),
            call=self.usual_call,
        )

    @property
    def usual_call(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sample and the conditions in a call for one sample of the bundle's own size and conditions."""
        rows = self.conditions.rows_per_sample
        own = {name: array.shape[1:] for name, array in self.conditions.own.items()}
        return {name: (rows, *row) for name, row in ({SAMPLE: self.manifest.sample_shape} | own).items()}

    @property
    def calls(self) -> CallSignature:
        """The calls that the engines take."""
        manifest = self.manifest
        return CallSignature(
            inputs=manifest.inputs, controlnet=_controlnet_inputs(manifest), sizes=manifest.sample_sizes
        )

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read and verify a bundle.

        Raises:
            ArtifactError: If there is no bundle at the path, or a file cannot be read.
            CorruptArtifactError: If a file has changed since the build, is a link, or lies outside the folder.
            SchemaVersionError: If another version of unetc built it.
        """
        if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
            raise ArtifactError(f"{path} is not a bundle folder. Make one with `unetc build MODEL -o {path}`.")
        if not (path / MANIFEST).exists():
            raise ArtifactError(
                f"{path} has no {MANIFEST}: it is not a bundle, or its build was interrupted. Build it again."
            )
        data = _read(path, MANIFEST, MAX_JSON_BYTES)
        if _read(path, DIGEST, 256) != digest_of(data):
            raise CorruptArtifactError(
                f"{path / MANIFEST} does not match {DIGEST}: it was edited. Build the bundle again."
            )
        manifest = Manifest.from_json(data, str(path / MANIFEST))
        contents = {record.path: read_verified(path, record) for record in manifest.files}
        encoders = () if manifest.text is None else manifest.text.encoders
        try:
            tensors = frozenset(load_tensors(contents[manifest.weights]))
            scheduler = SchedulerTables.from_array(
                manifest.scheduler, load_tensors(contents[manifest.scheduler_file])[SCHEDULER_ROWS]
            )
            tables = {
                table.name: SchedulerTables.from_array(table.header, load_tensors(contents[table.file])[SCHEDULER_ROWS])
                for table in manifest.tables
            }
            conditions = _conditions(manifest, contents)
        except (SessionError, ShapeMismatch, ValueError, KeyError) as error:
            raise CorruptArtifactError(f"{path} has contents that unetc did not write: {error}") from error
        return cls(
            path=path,
            manifest=manifest,
            graphs={path: contents[path] for path in manifest.graphs()},
            weights=contents[manifest.weights],
            tensors=tensors,
            scheduler=scheduler,
            tables=tables,
            conditions=conditions,
            text={path: contents[path] for one in encoders for path in (one.weights, one.tokenizer)},
            profile=contents[manifest.profile],
        )


def _conditions(manifest: Manifest, contents: Mapping[str, bytes]) -> Conditions:
    if manifest.conditioning is None:
        return UNCONDITIONAL
    arrays, scale = load_tensors(contents[manifest.conditioning.file]), manifest.conditioning.guidance_scale
    return Conditions.from_arrays(
        arrays,
        scale,
        _controlnet_inputs(manifest),
        middle_scale=manifest.conditioning.image_guidance_scale,
        size=manifest.conditioning.size,
    )


def _controlnet_inputs(manifest: Manifest) -> tuple[ControlNetInput, ...]:
    return controlnet_inputs(manifest.denoiser_config) if manifest.model.controlnet else ()


def read_verified(root: Path, record: FileRecord) -> bytes:
    """Read a file of a bundle.

    Args:
        root: Folder of the bundle.
        record: The file's record in the manifest.

    Raises:
        ArtifactError: If it cannot be read.
        CorruptArtifactError: If it has changed since the build, is a link, or is missing.
    """
    data = _read(root, record.path, record.bytes)
    if len(data) != record.bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise CorruptArtifactError(
            f"{root / record.path} has changed since the build (its hash differs). Build the bundle again."
        )
    return data


def _read(root: Path, name: str, limit: int) -> bytes:
    """Read a file of a bundle as `read_plain` does."""
    try:
        return read_plain(root, name, limit)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(f"{error} Copy the bundle again, or build it again.") from error
