"""Write a repository of Triton models from a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath

import unetc
from unetc.artifacts.manifest import BundleEngine
from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt.shapes import resolve
from unetc.compiler.whole_folder import real_path, write_file, written_whole
from unetc.errors import ArtifactError
from unetc.nvidia.sizes import Range, Sizes
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backends.null import NullBackend
from unetc.runtime.batching.levels import best_batch
from unetc.runtime.bundle import Bundle
from unetc.runtime.text import TextEncoder
from unetc.server.names import NAME, short_name
from unetc.server.prompts import PromptReader

from .asked import taken
from .backend import VERSION
from .config import EngineConfig, SamplingConfig, Shapes
from .loop_bundle import graphs_of, write_loop_bundle
from .options import ExportOptions
from .placement import Placement, placement_of
from .repository import EXPORT, Export, ExportedModel, check_repository, share_file, sizes_of
from .sampling import BUNDLE
from .served_graph import ServedGraph
from .signature import Signature, read_signature

CONFIG = "config.pbtxt"
GRAPH = "model.onnx"
STAGE = "export"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """One graph, as a model of the repository."""

    name: str
    graph: bytes
    weights: bytes
    """Its weights file; empty if it reads none."""
    signature: Signature
    most_rows: int | None
    warm_up: Shapes

    def served(self) -> ServedGraph:
        """Describe it for the loop."""
        inputs, outputs = self.signature.inputs, self.signature.outputs
        return ServedGraph(
            model=self.name,
            inputs=tuple(one.name for one in inputs),
            outputs=tuple(one.name for one in outputs),
            most_rows=self.most_rows,
        )


def export_bundle(path: Path, destination: Path, options: ExportOptions, *, on_progress: OnProgress = ignore) -> Export:
    """Write a repository from a bundle; an earlier export at the destination is replaced.

    Args:
        path: Folder of the bundle.
        destination: Folder of the repository.
        options: Where the engines run, and the name of the model.
        on_progress: Called after each model.

    Returns:
        The record that the repository holds too.

    Raises:
        ArtifactError: If the bundle cannot be read, or the repository cannot be written.
        CompileError: If Triton cannot run the bundle on the target.
    """
    _check(options)
    check_repository(destination)
    if real_path(destination).is_relative_to(real_path(path)):
        raise ArtifactError(f"{destination} lies in the bundle {path}. Choose a folder outside of it.")
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    target = options.target or manifest.target
    placement = placement_of(target)
    name = short_name(manifest.model.name) if options.name is None else options.name
    _check_folder(name)
    models = _models(bundle, name)
    check_repository(destination)  # again: reading the bundle took a while
    with written_whole(destination, "repository") as root:
        _write_engines(root, models, placement, manifest.threads, on_progress)
        _write_sampling(root / name, name, bundle, {path: model.served() for path, model in models.items()})
        on_disk, apart = sizes_of(root)
        sampling = ExportedModel(name=name, graph=None, most_rows=None)
        export = Export(
            unetc=unetc.__version__,
            bundle_sha256=manifest.sha256(),
            target=target,
            model=name,
            models=(
                sampling,
                *(ExportedModel(name=one.name, graph=at, most_rows=one.most_rows) for at, one in models.items()),
            ),
            bytes_on_disk=on_disk,
            bytes_apart=apart,
        )
        write_file(root / EXPORT, export.to_json())
    return export


def _check(options: ExportOptions) -> None:
    """Refuse bad options before the bundle is read.

    Raises:
        ArtifactError: If the name is none.
        CompileError: If Triton has no backend for the target.
    """
    if options.target is not None:
        placement_of(options.target)
    if options.name is not None and not NAME.fullmatch(options.name):
        raise ArtifactError(
            f"{options.name!r} cannot name a model. Use letters, digits, dots, hyphens and underscores, with --name."
        )
    if options.name is not None:
        _check_folder(options.name)


def _check_folder(name: str) -> None:
    """Refuse the name of the record for the folder of a model.

    Raises:
        ArtifactError: If it is this name.
    """
    if name.casefold() == EXPORT:  # some file systems take both for one name
        raise ArtifactError(
            f"{name!r} cannot name a model: the record of an export has this name. Choose another with --name."
        )


def _models(bundle: Bundle, name: str) -> dict[str, _Model]:
    """Read all graphs, by their path in the bundle.

    Raises:
        ArtifactError: If two graphs would be models of one name.
    """
    manifest = bundle.manifest
    weights = {} if manifest.text is None else {one.graph: bundle.text[one.weights] for one in manifest.text.encoders}
    models: dict[str, _Model] = {}
    for path, engine in graphs_of(manifest).items():
        of_engine = engine is not None and bool(bundle.graph_of(engine).weights)
        own = bundle.weights if of_engine else weights.get(path, b"")
        graph = bundle.graphs[path]
        signature = read_signature(graph, f"{bundle.path / path}", len(own))
        most = _most_rows(bundle, signature, engine)
        models[path] = _Model(
            name=f"{name}-{_short_path(path)}",
            graph=graph,
            weights=own,
            signature=signature,
            most_rows=most,
            warm_up={} if engine is None or most is None else _rows(bundle, signature),
        )
    if len({model.name for model in models.values()}) < len(models):
        raise ArtifactError(f"two graphs of {bundle.path} would have one name. Build the bundle again.")
    return models


def _short_path(path: str) -> str:
    """Name a graph: engines/55/2.onnx becomes 55-2."""
    return "-".join(PurePosixPath(path).with_suffix("").parts).removeprefix("engines-")


def _most_rows(bundle: Bundle, signature: Signature, engine: BundleEngine | None) -> int | None:
    """Choose the largest batch: of engines, the smallest measured one whose time per sample is nearly the least.

    The decoder's is 1, as activations are large at full size.
    """
    if not signature.batched:
        return None
    if engine is None:
        return 1
    samples = best_batch(engine.batch_ms) if engine.batch_ms else bundle.manifest.batch
    return samples * bundle.conditions.rows_per_sample


def _rows(bundle: Bundle, signature: Signature) -> Shapes:
    """Compute the shape of a row of every input, at the model's own size."""
    _, height, width = bundle.manifest.sample_shape
    one, down, across = (Range(least=side, usual=side, most=side) for side in (1, height, width))
    shapes = resolve(
        {tensor.name: tensor.axes for tensor in signature.inputs},
        Sizes(batch=one, height=down, width=across),
        {name: tuple(array.shape[1:]) for name, array in bundle.conditions.own.items()},
        bundle.calls.controlnet,
    )
    return {name: usual[1:] for name, (_, usual, _) in shapes.items()}


def _write_engines(
    root: Path, models: Mapping[str, _Model], placement: Placement, threads: int, on_progress: OnProgress
) -> None:
    """Write the models of all graphs; a weights file that several read is written once."""
    written: dict[bytes, Path] = {}
    for i, model in enumerate(models.values()):
        config = EngineConfig(
            name=model.name,
            signature=model.signature,
            most_rows=model.most_rows,
            placement=placement,
            threads=threads,
            warm_up=model.warm_up,
        )
        folder = root / model.name
        write_file(folder / CONFIG, config.to_text().encode())
        write_file(folder / str(VERSION) / GRAPH, model.graph)
        if model.weights:
            beside = folder / str(VERSION) / WEIGHTS
            if (first := written.setdefault(model.weights, beside)) is beside:
                write_file(beside, model.weights)
            else:
                share_file(first, beside)
        on_progress(Progress(stage=STAGE, done=i + 1, total=len(models)))


def _write_sampling(folder: Path, name: str, bundle: Bundle, graphs: Mapping[str, ServedGraph]) -> None:
    """Write the model that samples."""
    channels, height, width = bundle.manifest.image_shape
    prompts = PromptReader(bundle, None if bundle.manifest.text is None else TextEncoder.open(bundle, NullBackend()))
    config = SamplingConfig(name=name, inputs=taken(prompts), channels=channels, size=(height, width))
    write_file(folder / CONFIG, config.to_text().encode())
    write_file(folder / str(VERSION) / "model.py", files("unetc.triton").joinpath("model.py").read_bytes())
    write_loop_bundle(bundle, folder / str(VERSION) / BUNDLE, graphs)
