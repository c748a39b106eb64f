"""Compile the graphs of a bundle into engines of an NVIDIA library, into the cache of engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unetc.artifacts.record import check_writable
from unetc.backend import WEIGHTS
from unetc.controlnet import ControlNetInput
from unetc.environment import cores, free_memory, lacking
from unetc.errors import EngineBuildError, MissingDependency, StaleEngineError
from unetc.nvidia.cache import ENGINE, EngineCache, EngineRecord
from unetc.nvidia.key import Effort, EngineKey, Origin
from unetc.nvidia.library import LIBRARIES, Library, library_of
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import NO_WEIGHTS, Precision
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.bundle import Bundle

from .messages import STEPS, BuildRequest
from .private_folder import lower_beside, private_folder
from .ranges import check_sides, describe_sides
from .supervise import Running, build_engine

_BASE_BYTES = 900 * 2**20
"""What a building process holds besides weights: libraries, kernels, and what it knows of some thousand layers."""
_COPIES_OF_WEIGHTS = 4
"""What it holds of them at its peak. Both bound all that was measured: benchmarks/results/rtx_build.json."""
_FIND = "find engines"
"""A stage of the work."""

Wanted = tuple[str, Precision]
"""An engine: the path of its graph in the bundle, and what it computes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What to build engines for, and what that may take."""

    target: str
    precision: Precision = Precision.FP32
    batch: str | None = None
    """One size, or least and most, or least, usual and most, as '1,2,8'; None for 1 to that of the bundle."""
    height: str | None = None
    """The same for the samples' height; None for the bundle's."""
    width: str | None = None
    time_limit_s: float = 3600.0
    """For one engine."""
    jobs: int = 1
    """Most engines that are built at once; fewer where memory or cores do not allow it, one where kernels are timed."""
    trust_engines: bool = False
    """Whether to take engines that others have put into the cache; from then on they count as built here."""
    on_this_gpu: bool = False
    """Whether engines need run on no other GPU than that of this machine."""
    controls: bool = False
    """Whether to build the engines of the control plans too."""
    fallback: bool = True
    """Whether to build the full model in float32 too, which makes a step again that overflows in less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledEngine:
    """One engine in the cache."""

    graph: str
    """Path of its graph in the bundle."""
    record: EngineRecord
    folder: Path
    known: bool
    """Whether it was in the cache already, or was built elsewhere meanwhile."""


def compile_bundle(
    path: Path, options: CompileOptions, *, cache: Path, on_progress: OnProgress = ignore
) -> tuple[CompiledEngine, ...]:
    """Build the engines of a bundle's full model, plan and decoder, unless the cache has them.

    Args:
        path: The bundle.
        options: What to build for.
        cache: Folder of caches; engines go into `engines` there.
        on_progress: Told how far each engine is.

    Returns:
        One engine per graph: the full model first, then those of the plan that differ from it, the decoder, and last
        the full model in float32 where the others are in less.

    Raises:
        ArtifactError: If the bundle or the cache cannot be read or written.
        CorruptArtifactError: If a graph takes weights from elsewhere than the bundle's own file.
        EngineBuildError: If an engine cannot be built. Those that were finished before are in the cache.
        MissingDependency: If the library is not installed, or others that building needs.
    """
    library = library_of(options.target)
    origin = library.origin(on_this_gpu=options.on_this_gpu)
    bundle = Bundle.open(path)
    check_sides(bundle.manifest, sizes_of(bundle, options))
    engines = EngineCache.inside(cache)
    wanted = _wanted(bundle, options, origin)
    for note in _notes(bundle, options):
        on_progress(Progress(stage=_FIND, done=0, total=len(wanted), note=note))
    done = _find(wanted, engines, options.trust_engines, on_progress)
    if missing := {one: key for one, key in wanted.items() if one not in done}:
        check_tools(library, {precision for _, precision in missing})
        check_writable(engines.root / ENGINE)
        from .references import check_references  # needs onnx

        names = sorted({graph for graph, _ in wanted})
        for graph in names:
            check_references(bundle.graphs[graph], str(path / graph), len(bundle.weights))
        graphs = {_beside_weights(graph): bundle.graphs[graph] for graph in names}
        with private_folder(bundle.weights, graphs) as private:
            folders = _lower(bundle, Path(private), missing, options.controls, on_progress)
            controlnet = bundle.conditions.controlnet
            for one, (record, known) in _build_all(missing, folders, controlnet, engines, options, on_progress):
                folder = engines.folder(record.key)
                done[one] = CompiledEngine(graph=one[0], record=record, folder=folder, known=known)
    return tuple(done[one] for one in wanted)


def target_of(text: str, precision: str | None) -> tuple[str, Precision]:
    """Read a target as `unetc sample` takes it, with the precision behind a colon, or given apart.

    Raises:
        EngineBuildError: If no engines are built for it, or two precisions are given.
    """
    name, _, suffix = text.partition(":")
    library_of(name if name in LIBRARIES else text)
    given = {Precision.parse(one) for one in (suffix, precision) if one}
    if len(given) > 1:
        raise EngineBuildError(f"--target {text} and --precision {precision} contradict each other. Give one of them.")
    return name, given.pop() if given else Precision.FP32


def check_tools(library: Library, precisions: Collection[Precision]) -> None:
    """Refuse to build where libraries are missing that check, lower and calibrate graphs.

    Raises:
        MissingDependency: It names all of them.
    """
    needed = {"onnx": library.extra}
    if any(precision is not Precision.FP32 for precision in precisions):
        needed["onnx_ir"] = library.extra
    if Precision.FP16 in precisions:
        needed["onnxruntime"] = "cpu"
    if missing := lacking(needed):
        extras = ",".join(dict.fromkeys([library.extra, *(needed[name] for name in missing)]))
        raise MissingDependency(
            f"compiling for {library.target} in {' and '.join(sorted(precisions))} needs {', '.join(missing)}: "
            f"pip install 'unetc[{extras}]'"
        )


def sizes_of(bundle: Bundle, options: CompileOptions) -> Sizes:
    """Read what sizes are asked for; what is not said is the bundle's own."""
    _, height, width = bundle.manifest.sample_shape
    batch = bundle.manifest.batch * bundle.conditions.rows_per_sample
    return Sizes(
        batch=Range.parse(options.batch, batch, least=1),
        height=Range.parse(options.height, height),
        width=Range.parse(options.width, width),
    )


def _notes(bundle: Bundle, options: CompileOptions) -> list[str]:
    """Say of sizes what may not be what was meant, before it takes minutes."""
    sizes, notes = sizes_of(bundle, options), []
    if bundle.manifest.decoder is not None and (options.height or options.width):
        notes.append(f"Engines take {describe_sides(bundle.manifest, sizes)}.")
    if sizes.one_side_varies() and options.target == "tensorrt-rtx":
        notes.append(
            "One of height and width is a range: tensorrt_rtx 1.7 fails on some graphs then. If it does, make both a "
            "range, or neither."
        )
    return notes


def _find(
    wanted: Mapping[Wanted, EngineKey], engines: EngineCache, trust: bool, on_progress: OnProgress
) -> dict[Wanted, CompiledEngine]:
    """Find the engines that the cache has, and say why one that it has cannot be taken."""
    found = {}
    for i, (one, key) in enumerate(wanted.items()):
        folder, note = engines.folder(key), ""
        try:
            record, engine = engines.open(key, trust=trust)
        except StaleEngineError as error:
            if folder.exists():
                note = f"{one[0]} is built again: {error}"
        else:
            if trust:
                record = engines.put(record, engine)
            found[one] = CompiledEngine(graph=one[0], record=record, folder=folder, known=True)
        on_progress(Progress(stage=_FIND, done=i + 1, total=len(wanted), note=note))
    return found


def _wanted(bundle: Bundle, options: CompileOptions, origin: Origin) -> dict[Wanted, EngineKey]:
    """Make the keys of all engines."""
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
    engines = manifest.all_engines() if options.controls else (manifest.full, *manifest.engines)
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


def _lower(
    bundle: Bundle, folder: Path, wanted: Mapping[Wanted, EngineKey], controls: bool, on_progress: OnProgress
) -> Mapping[Precision, Path]:
    """Lower the precision of graphs in the private folder; return the folders of all precisions that are asked for."""
    folders = {Precision.FP32: folder}
    for precision in sorted({precision for _, precision in wanted} - {Precision.FP32}):
        wide: frozenset[str] = frozenset()
        if precision is Precision.FP16:
            from .calibrate import overflowing_values  # needs onnx_ir, which float32 does without

            wide = overflowing_values(
                bundle, lambda graph: folder / _beside_weights(graph), on_progress, controls=controls
            )
        names = [_beside_weights(graph) for graph, own in wanted if own is precision]
        folders[precision] = lower_beside(folder, names, precision, wide)
    return folders


def _beside_weights(graph: str) -> str:
    """Name a graph in the private folder."""
    return graph.replace("/", ".")


def _build_all(
    wanted: Mapping[Wanted, EngineKey],
    folders: Mapping[Precision, Path],
    controlnet: tuple[ControlNetInput, ...],
    engines: EngineCache,
    options: CompileOptions,
    on_progress: OnProgress,
) -> list[tuple[Wanted, tuple[EngineRecord, bool]]]:
    """Build engines, several at once where there is room; each is in the cache as soon as it is finished."""
    running = Running()

    def build(one: Wanted) -> tuple[Wanted, tuple[EngineRecord, bool]]:
        graph, key = one[0], wanted[one]
        stage = f"build {Path(graph).stem}" + (f" in {key.precision}" if key.precision is not options.precision else "")

        def advance(done: int) -> None:
            on_progress(Progress(stage=stage, done=done, total=STEPS))

        def note(said: str) -> None:
            on_progress(Progress(stage=stage, done=0, total=STEPS, note=f"{graph}: {said}"))

        place, name, limit = folders[key.precision], _beside_weights(graph), options.time_limit_s
        try:
            return one, build_one(
                name,
                key,
                place,
                engines,
                controlnet,
                time_limit_s=limit,
                on_advance=advance,
                on_note=note,
                running=running,
            )
        except EngineBuildError as error:
            raise EngineBuildError(f"{graph}: {error}") from error

    weights = max((folder / WEIGHTS).stat().st_size for folder in folders.values())
    with ThreadPoolExecutor(_jobs(options, weights)) as pool:
        futures = [pool.submit(build, one) for one in wanted]
        try:
            return [future.result() for future in as_completed(futures)]
        except BaseException:
            running.stop()
            pool.shutdown(cancel_futures=True)
            raise


def build_one(
    graph: str,
    key: EngineKey,
    folder: Path,
    engines: EngineCache,
    controlnet: tuple[ControlNetInput, ...],
    *,
    time_limit_s: float,
    on_advance: Callable[[int], None],
    on_note: Callable[[str], None],
    running: Running | None = None,
    gpu: int = 0,
) -> tuple[EngineRecord, bool]:
    """Build one engine and put it into the cache, unless somebody else has built it or is about to.

    Args:
        graph: Name of the graph in the folder.
        key: What the engine is to be.
        folder: A private folder with the graph, in the key's precision, and its weights.
        engines: The cache.
        controlnet: What the graph takes of a ControlNet.
        time_limit_s: For all tries together, not for waiting for somebody else.
        on_advance: Told how many of `STEPS` are done.
        on_note: Told when somebody else builds it, or has built it.
        running: What stops it from another thread.
        gpu: Which of those that CUDA shows this process; the one that the key names.

    Returns:
        What the cache knows of it, and whether somebody else has built it.

    Raises:
        EngineBuildError: If it cannot be built.
        ArtifactError: If the cache cannot be written.
    """
    request = BuildRequest(
        target=key.origin.target,
        graph=graph,
        engine=f"{graph}.engine",
        timing="timing.cache",
        sizes=key.sizes,
        rows=key.rows,
        controlnet=controlnet,
        effort=key.effort,
        on_this_gpu=key.origin.gpu is not None,
        gpu=gpu,
    )
    running, waited = running or Running(), False

    def wait() -> None:
        nonlocal waited
        running.check()
        if not waited:
            on_note("the engine is being built elsewhere; waiting for it.")
        waited = True

    with engines.building(key, wait):
        try:
            record, _ = engines.open(key)
        except StaleEngineError:
            return _build(request, key, folder, engines, time_limit_s, on_advance, running), False
        on_note("the engine has been built elsewhere meanwhile; it is taken from the cache.")
        on_advance(STEPS)
        return record, True


def _build(
    request: BuildRequest,
    key: EngineKey,
    folder: Path,
    engines: EngineCache,
    time_limit_s: float,
    on_advance: Callable[[int], None],
    running: Running,
) -> EngineRecord:
    """Build one engine and put it into the cache."""
    outcome = build_engine(request, folder, time_limit_s=time_limit_s, on_advance=on_advance, running=running)
    try:
        engine = outcome.engine.read_bytes()
        outcome.engine.unlink()
    except OSError as error:
        raise EngineBuildError(f"the engine cannot be read back: {error.strerror}.") from error
    on_advance(STEPS)
    return engines.put(
        EngineRecord(
            key=key,
            engine_sha256=hashlib.sha256(engine).hexdigest(),
            engine_bytes=len(engine),
            layers=outcome.built.layers,
            shapes=outcome.built.shapes,
            spent=outcome.effort,
            tries=outcome.tries,
            seconds=round(outcome.seconds, 3),
            peak_bytes=outcome.built.peak_bytes,
            scratch_bytes=outcome.built.scratch_bytes,
        ),
        engine,
    )


def _jobs(options: CompileOptions, weights_bytes: int) -> int:
    """Tell how many builds fit beside each other: each has a core and its memory, and one is always tried.

    Builds that time kernels would time each other's, on the one GPU that they share.
    """
    if library_of(options.target).times_kernels:
        return 1
    fit = min(options.jobs, cores())
    if (free := free_memory()) is not None:
        fit = min(fit, free // (_BASE_BYTES + _COPIES_OF_WEIGHTS * weights_bytes))
    return max(1, fit)
