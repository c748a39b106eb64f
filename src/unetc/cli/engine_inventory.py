"""Find the engines of a bundle that the cache has, and the memory that they take on a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
from rich.console import RenderableType
from rich.markup import escape

from unetc.artifacts.manifest import Manifest
from unetc.artifacts.record import to_builtins
from unetc.environment import cache_folder
from unetc.errors import MissingDependency
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import EngineKey
from unetc.nvidia.library import LIBRARIES
from unetc.precision import NO_WEIGHTS

from .output import table
from .summary import engines_title


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSet:
    """Engines of one target, precision and range of sizes."""

    key: EngineKey
    """Key of one of them."""
    records: dict[str, EngineRecord] = field(default_factory=dict)
    """Records by the path of the graph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Memory that some engines take together on a GPU."""

    name: str
    engine_bytes: int | None
    """Their sum; None if one is not compiled."""
    scratch_bytes: int | None
    """The most that one needs, as they share it, apart from the decoder's; None if one of them has no figure."""


def find(manifest: Manifest) -> list[EngineSet]:
    """Find the engines of a bundle, without opening them; the most complete sets first."""
    hashes = {file.path: file.sha256 for file in manifest.files}
    graphs = {hashes[engine.graph]: engine.graph for engine in manifest.all_engines()}
    sets: dict[tuple[object, ...], EngineSet] = {}
    records = EngineCache.inside(cache_folder()).records()
    for record in records:
        key = record.key
        if key.weights_sha256 == hashes[manifest.weights] and key.graph_sha256 in graphs:
            alike = sets.setdefault((key.origin, key.precision, key.sizes), EngineSet(key=key))
            alike.records[graphs[key.graph_sha256]] = record
    if (decoder := manifest.decoder) is not None:
        decoders = [record for record in records if record.key.graph_sha256 == hashes[decoder.graph]]
        for one in sets.values():
            for record in decoders:
                if _decodes(record.key, one.key):
                    one.records[decoder.graph] = record
    return sorted(sets.values(), key=lambda one: len(missing(one, manifest)))


def _decodes(decoder: EngineKey, engine: EngineKey) -> bool:
    """Check whether an engine of the decoder takes the samples of an engine, on the same machines."""
    sides = [(key.sizes.height, key.sizes.width) for key in (decoder, engine)]
    precision = engine.precision.over(NO_WEIGHTS)
    return (decoder.origin, decoder.precision, sides[0]) == (engine.origin, precision, sides[1])


def missing(engines: EngineSet, manifest: Manifest) -> list[str]:
    """List the graphs of the full model, the quality levels and the decoder that have no engine."""
    return [graph for graph in _needed(manifest) if graph not in engines.records]


def _needed(manifest: Manifest) -> dict[str, None]:
    """List the graphs of the full model, the quality levels and the decoder, each once."""
    return dict.fromkeys([*(engine.graph for engine in manifest.level_engines()), *_decoding(manifest)])


def _decoding(manifest: Manifest) -> set[str]:
    """Return the graph that runs after the engines of a plan, if there is one."""
    return set() if manifest.decoder is None else {manifest.decoder.graph}


def misfit(engines: EngineSet) -> str:
    """Explain why engines cannot run with the libraries installed here; empty if they can, on a GPU that they fit."""
    origin = engines.key.origin
    if origin.target not in LIBRARIES:
        return f"for target {origin.target} (here {', '.join(LIBRARIES)})"
    try:
        here = LIBRARIES[origin.target].anywhere()
    except MissingDependency as error:
        return str(error)
    return origin.misfit(msgspec.structs.replace(here, gpu=origin.gpu))


def facts(sets: Sequence[EngineSet], manifest: Manifest) -> list[dict[str, object]]:
    """List engines with everything that is known about them, and the memory that they take together."""
    return [
        {
            "engines": {graph: to_builtins(record) for graph, record in one.records.items()},
            "missing": missing(one, manifest),
            "misfit": misfit(one),
            "memory": [asdict(row) for row in memory_of(one, manifest)],
        }
        for one in sets
    ]


def shown(sets: Sequence[EngineSet], manifest: Manifest) -> list[RenderableType]:
    """Lay out the memory of complete sets; name the others, and those that cannot run here, in a line each."""
    if not sets:
        return [f"No engines of this bundle are in {cache_folder()}. `unetc compile BUNDLE` builds them."]
    return [_shown(one, manifest) for one in sets]


def _shown(engines: EngineSet, manifest: Manifest) -> RenderableType:
    title = engines_title(engines.key, manifest)
    if why := misfit(engines):
        return escape(f"{title}: cannot be run here: {why}")
    if lacking := missing(engines, manifest):
        return escape(f"{title}: not complete, without {', '.join(lacking)}")
    rows = memory_of(engines, manifest)
    laid_out = table(
        title,
        ["on the GPU", "engines MiB", "scratch MiB"],
        [[row.name, _mib(row.engine_bytes), _mib(row.scratch_bytes)] for row in rows],
    )
    if any(row.scratch_bytes is None for row in rows):
        laid_out.caption = "Engines that were built without a GPU have no figure for scratch memory."
        laid_out.caption_justify = "left"
    return laid_out


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.1f}"


def memory_of(engines: EngineSet, manifest: Manifest) -> list[Memory]:
    """Add up the memory of engines, alone and together with those that take turns with them in a phase.

    With low memory the decoder is loaded beside the engines of the last phase and those of the next trajectory's first.
    """
    decoding = _decoding(manifest)
    rows = [_together(Path(graph).stem, engines, {graph}) for graph in _needed(manifest)]
    for level in manifest.levels:
        of = f"{level.name}: " if len(manifest.levels) > 1 else ""
        graphs = [{level.engines[i].graph for i in phase.cycle} for phase in level.plan.phases]
        for phase, own in zip(level.plan.phases, graphs, strict=True):
            rows.append(_together(f"{of}phase from {phase.low:.2f} to {phase.high:.2f}", engines, own))
        every = {engine.graph for engine in level.engines} | decoding
        rows.append(_together(f"{of}the plan, all loaded", engines, every))
        pairs = [own | after for own, after in zip(graphs, [*graphs[1:], graphs[0]], strict=True)]
        pairs[-1] |= decoding
        largest = max(pairs, key=lambda pair: _bytes(engines, pair))
        rows.append(_together(f"{of}with --memory low, at most", engines, largest))
    if len(manifest.levels) > 1:
        rows.append(_together("the full model and all levels, all loaded", engines, _needed(manifest)))
    return rows


def _bytes(engines: EngineSet, graphs: Collection[str]) -> int:
    """Add up the sizes of the engines that the cache has."""
    return sum(engines.records[graph].engine_bytes for graph in graphs if graph in engines.records)


def _together(name: str, engines: EngineSet, graphs: Collection[str]) -> Memory:
    """Add up engines; of those over one weights file the largest scratch memory counts, as they share it."""
    known = [engines.records[graph] for graph in graphs if graph in engines.records]
    scratch = [record.scratch_bytes for record in known if record.scratch_bytes is not None]
    shared: dict[str, int] = {}
    for record in known:
        weights = record.key.weights_sha256
        shared[weights] = max(shared.get(weights, 0), record.scratch_bytes or 0)
    complete = len(known) == len(graphs)
    return Memory(
        name=name,
        engine_bytes=_bytes(engines, graphs) if complete else None,
        scratch_bytes=sum(shared.values()) if complete and len(scratch) == len(graphs) else None,
    )
