"""Which engines of a bundle the cache has, and what is known of the memory that they take on a GPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from unetc.artifacts.manifest import Manifest
from unetc.artifacts.record import to_builtins
from unetc.cli.output import table
from unetc.cli.summary import engines_title
from unetc.environment import cache_folder
from unetc.nvidia.cache import EngineCache, EngineRecord
from unetc.nvidia.key import EngineKey


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSet:
    """Engines that were built alike."""

    key: EngineKey
    """Of one of them."""
    records: dict[str, EngineRecord] = field(default_factory=dict)
    """By the path of the graph."""


def find(manifest: Manifest) -> list[EngineSet]:
    """Find the engines of a bundle, without opening them."""
    hashes = {file.path: file.sha256 for file in manifest.files}
    graphs = {hashes[engine.graph]: engine.graph for engine in manifest.all_engines()}
    sets: dict[tuple[object, ...], EngineSet] = {}
    for record in EngineCache.inside(cache_folder()).records():
        key = record.key
        if key.weights_sha256 == hashes[manifest.weights] and key.graph_sha256 in graphs:
            alike = sets.setdefault((key.origin, key.precision, key.sizes), EngineSet(key=key))
            alike.records[graphs[key.graph_sha256]] = record
    return list(sets.values())


def facts(sets: Sequence[EngineSet]) -> list[dict[str, object]]:
    """List engines with everything that is known about them."""
    return [{"engines": {graph: to_builtins(record) for graph, record in one.records.items()}} for one in sets]


def table_of(engines: EngineSet, manifest: Manifest) -> Table:
    """Lay out the memory of engines, and of those that take turns in a phase."""
    plan = manifest.plan
    every = {engine.graph for engine in manifest.engines}
    rows = [
        _row(Path(graph).stem, engines, {graph})
        for graph in dict.fromkeys(engine.graph for engine in (manifest.full, *manifest.engines))
    ]
    graphs = [{manifest.engines[i].graph for i in phase.cycle} for phase in plan.phases]
    for phase, own in zip(plan.phases, graphs, strict=True):
        rows.append(_row(f"phase from {phase.low:.2f} to {phase.high:.2f}", engines, own))
    rows.append(_row("the plan, all loaded", engines, every))
    pairs = [own | after for own, after in zip(graphs, [*graphs[1:], graphs[0]], strict=True)]
    rows.append(_row("with --memory low, at most", engines, max(pairs, key=lambda pair: _bytes(engines, pair))))
    return table(engines_title(engines.key, manifest), ["on the GPU", "engines MiB", "scratch MiB"], rows)


def _bytes(engines: EngineSet, graphs: Collection[str]) -> int:
    """Add up the engines that are known."""
    return sum(engines.records[graph].engine_bytes for graph in graphs if graph in engines.records)


def _row(name: str, engines: EngineSet, graphs: Collection[str]) -> list[str]:
    """Sum up; engines are added, scratch memory is shared."""
    records = [engines.records.get(graph) for graph in graphs]
    known = [record for record in records if record is not None]
    if len(known) < len(records):
        return [name, "not compiled", ""]
    scratch = [record.scratch_bytes for record in known]
    shared = max((size for size in scratch if size is not None), default=0)
    return [
        name,
        f"{_bytes(engines, graphs) / 2**20:.1f}",
        "unknown" if None in scratch else f"{shared / 2**20:.1f}",
    ]
