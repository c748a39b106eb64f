"""Compile the graphs of a bundle into engines of an NVIDIA library, and store them in the cache of engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from unetc.artifacts.record import check_writable
from unetc.nvidia.cache import ENGINE, EngineCache
from unetc.nvidia.key import EngineKey
from unetc.nvidia.library import library_of
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.bundle import Bundle

from .build_all import build_all
from .options import CompileOptions, check_tools, notes_on, sizes_of
from .private_folder import flat_name, lower_inside, private_folder
from .ranges import check_sides
from .wanted import FIND, CompiledEngine, Wanted, find_engines, wanted_engines


def compile_bundle(
    path: Path, options: CompileOptions, *, cache: Path, on_progress: OnProgress = ignore
) -> tuple[CompiledEngine, ...]:
    """Build the engines of a bundle's full model, plan and decoder, unless the cache has them.

    Args:
        path: The bundle.
        options: Sizes and precision of the engines, and the limits of the work.
        cache: Folder of all caches; engines are stored in its subfolder `engines`.
        on_progress: Called with the progress of each engine.

    Returns:
        One engine per graph, in the order of `wanted_engines`.

    Raises:
        ArtifactError: If the bundle or the cache cannot be read or written.
        CorruptArtifactError: If a graph takes weights from a file outside the bundle.
        EngineBuildError: If an engine cannot be built. Engines that were finished before it are in the cache.
        MissingDependency: If the engines' library, or another one that building needs, is not installed.
    """
    library = library_of(options.target)
    origin = library.origin(on_this_gpu=options.on_this_gpu)
    bundle = Bundle.open(path)
    check_sides(bundle.manifest, sizes_of(bundle, options))
    engines = EngineCache.inside(cache)
    wanted = wanted_engines(bundle, options, origin)
    for note in notes_on(bundle, options):
        on_progress(Progress(stage=FIND, done=0, total=len(wanted), note=note))
    done = find_engines(wanted, engines, trust=options.trust_engines, on_progress=on_progress)
    if missing := {one: key for one, key in wanted.items() if one not in done}:
        check_tools(library, {precision for _, precision in missing})
        check_writable(engines.root / ENGINE)
        from .references import check_references  # needs onnx

        names = sorted({graph for graph, _ in wanted})
        for graph in names:
            check_references(bundle.graphs[graph], str(path / graph), len(bundle.weights))
        graphs = {flat_name(graph): bundle.graphs[graph] for graph in names}
        with private_folder(bundle.weights, graphs) as private:
            folders = _lower(bundle, private, missing, options.controls, on_progress)
            controlnet = bundle.conditions.controlnet
            for one, (record, known) in build_all(missing, folders, controlnet, engines, options, on_progress):
                folder = engines.folder(record.key)
                done[one] = CompiledEngine(graph=one[0], record=record, folder=folder, known=known)
    return tuple(done[one] for one in wanted)


def _lower(
    bundle: Bundle, folder: Path, wanted: Mapping[Wanted, EngineKey], controls: bool, on_progress: OnProgress
) -> Mapping[Precision, Path]:
    """Lower graphs in the private folder to the wanted precisions; return the folder of each precision."""
    folders = {Precision.FP32: folder}
    for precision in sorted({precision for _, precision in wanted} - {Precision.FP32}):
        wide: frozenset[str] = frozenset()
        if precision is Precision.FP16:
            from .calibrate import overflowing_values  # needs onnx_ir, which is not needed for float32

            wide = overflowing_values(bundle, lambda graph: folder / flat_name(graph), on_progress, controls=controls)
        names = [flat_name(graph) for graph, own in wanted if own is precision]
        folders[precision] = lower_inside(folder, names, precision, wide)
    return folders
