"""List the engines that a bundle needs, with their keys, and look them up in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unetc.errors import StaleEngineError
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import Effort, EngineKey, Origin
from unetc.nvidia.sizes import Range
from unetc.precision import NO_WEIGHTS, Precision
from unetc.progress import OnProgress, Progress
from unetc.runtime.bundle import Bundle

from .options import CompileOptions, sizes_of

FIND = "find engines"
"""Name of this stage of the work."""

Wanted = tuple[str, Precision]
"""An engine: the path of its graph in the bundle, and its precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledEngine:
    """One engine in the cache."""

    graph: str
    """Path of its graph in the bundle."""
    record: EngineRecord
    folder: Path
    known: bool
    """Whether it was in the cache already, or another process has built it meanwhile."""


def wanted_engines(bundle: Bundle, options: CompileOptions, origin: Origin) -> dict[Wanted, EngineKey]:
    """Make the keys of all engines that a bundle needs.

    Returns:
        The full model first, then the other engines of all quality levels, the decoder, and last the full model in
        float32 where the other engines have a lower precision.
    """
    manifest = bundle.manifest
    hashes = {file.path: file.sha256 for file in manifest.files}
    model = EngineKey(
        origin=origin,
        graph_sha256=hashes[manifest.full.graph],
        weights_sha256=hashes[manifest.weights],
        precision=options.precision,
        sizes=sizes_of(bundle, options),
        rows={name: tuple(array.shape[1:]) for name, array in bundle.conditions.own.items()},
        effort=Effort(),
    )
    engines = manifest.all_engines() if options.controls else manifest.level_engines()
    graphs = dict.fromkeys(engine.graph for engine in engines)
    wanted = {(graph, model.precision): msgspec.structs.replace(model, graph_sha256=hashes[graph]) for graph in graphs}
    if manifest.decoder is not None:
        decoder = msgspec.structs.replace(
            model,
            graph_sha256=hashes[manifest.decoder.graph],
            weights_sha256=NO_WEIGHTS,
            precision=options.precision.over(NO_WEIGHTS),
            sizes=msgspec.structs.replace(model.sizes, batch=Range(least=1, usual=1, most=1)),
            rows={},
        )
        wanted[manifest.decoder.graph, decoder.precision] = decoder
    if options.fallback:
        exact = msgspec.structs.replace(model, precision=Precision.FP32)
        wanted.setdefault((manifest.full.graph, exact.precision), exact)
    return wanted


def find_engines(
    wanted: Mapping[Wanted, EngineKey], engines: EngineCache, *, trust: bool, on_progress: OnProgress
) -> dict[Wanted, CompiledEngine]:
    """Look engines up in the cache; a note gives the reason where the cache has one that cannot be used.

    Args:
        wanted: Keys of the engines.
        engines: The cache.
        trust: Whether to take engines that were not built here; they are sealed again, as if they were.
        on_progress: Called after each look-up.
    """
    found = {}
    for i, (one, key) in enumerate(wanted.items()):
        folder, note = engines.folder(key), ""
        try:
            record, serialized = engines.open(key, trust=trust)
        except StaleEngineError as error:
            if folder.exists():
                note = f"{one[0]} is built again: {error}"
        else:
            if not engines.is_ours(record):
                record = engines.put(record, serialized)
            found[one] = CompiledEngine(graph=one[0], record=record, folder=folder, known=True)
        on_progress(Progress(stage=FIND, done=i + 1, total=len(wanted), note=note))
    return found
