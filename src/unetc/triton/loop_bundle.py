"""The bundle of the loop: plans, schedules, conditions and tokenizers, with the name of a model for every graph.

It is a bundle like any other, so the session that opens it is the same as everywhere. It holds no weights. Otherwise
every instance of the loop would keep all weights in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from unetc.artifacts.manifest import BundleEngine, Manifest
from unetc.compiler.store import write_bundle
from unetc.precision import Precision
from unetc.runtime.bundle import Bundle, read_verified
from unetc.tensors import save_tensors

from .served_graph import ServedGraph


def write_loop_bundle(bundle: Bundle, folder: Path, graphs: Mapping[str, ServedGraph]) -> None:
    """Write the bundle of the loop.

    Args:
        bundle: The whole bundle.
        folder: Folder to write.
        graphs: Models by the path of their graph in the bundle, for every path of `graphs_of`.

    Raises:
        ArtifactError: If a file cannot be read or written.
        CorruptArtifactError: If a file has changed since the bundle was opened.
    """
    own = bundle.manifest
    encoders = () if own.text is None else own.text.encoders
    kept = {own.scheduler_file, *(one.file for one in own.tables), *(one.tokenizer for one in encoders)}
    if own.conditioning is not None:
        kept.add(own.conditioning.file)
    empty = save_tensors({})
    contents: dict[str, bytes | Path] = {
        **{record.path: read_verified(bundle.path, record) for record in own.files if record.path in kept},
        **{path: graph.to_json() for path, graph in graphs.items()},
        **dict.fromkeys((own.weights, *(one.weights for one in encoders)), empty),
        own.profile: b"",
    }
    write_bundle(
        folder,
        contents,
        lambda files: msgspec.structs.replace(
            own,
            precision=Precision.FP32,
            full=_in_float32(own.full),
            levels=tuple(
                msgspec.structs.replace(level, engines=tuple(map(_in_float32, level.engines))) for level in own.levels
            ),
            encoder=None,
            controls=(),
            files=files,
        ),
    )


def _in_float32(engine: BundleEngine) -> BundleEngine:
    return msgspec.structs.replace(engine, lowered=None)


def graphs_of(manifest: Manifest) -> dict[str, BundleEngine | None]:
    """List the graphs that the loop calls, by their path; None for those that are not engines."""
    engines: dict[str, BundleEngine | None] = {}
    for engine in manifest.level_engines():
        engines.setdefault(engine.graph, engine)
    around = () if manifest.decoder is None else (manifest.decoder.graph,)
    text = () if manifest.text is None else tuple(one.graph for one in manifest.text.encoders)
    return engines | dict.fromkeys((*around, *text))
