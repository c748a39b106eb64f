"""A folder that no other user can change, for the verified bytes that engines are built from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from unetc.backend import WEIGHTS
from unetc.precision import Precision
from unetc.temporary import PrivateFolder, no_room


def private_folder(weights: bytes, graphs: Mapping[str, bytes] | None = None) -> PrivateFolder:
    """Write verified bytes to a folder that only this user can change.

    The files of a bundle could be edited after they were hashed.

    Args:
        weights: Content of the weights file.
        graphs: Content of further files, by name.

    Raises:
        ArtifactError: If the disk is full.
    """
    try:
        folder = PrivateFolder()
        for name, content in {WEIGHTS: weights, **(graphs or {})}.items():
            (folder.path / name).write_bytes(content)
    except OSError as error:
        raise no_room(f"{len(weights)} bytes of weights", error) from error
    return folder


def flat_name(graph: str) -> str:
    """Name a graph of a bundle in a private folder, where it must lie in the folder of its weights."""
    return graph.replace("/", ".")


def lower_inside(folder: Path, graphs: Sequence[str], precision: Precision, wide: Collection[str]) -> Path:
    """Lower graphs of a private folder to another precision; return the subfolder that they are written to.

    Args:
        folder: The private folder.
        graphs: Names of the graphs.
        precision: The precision, lower than float32.
        wide: Values that stay float32.

    Raises:
        ArtifactError: If the disk is full.
    """
    from unetc.compiler.graph.lowering import lower_graphs  # needs onnx_ir, which is not needed for float32

    into = folder / precision
    try:
        lower_graphs(folder, graphs, precision, into, wide)
    except OSError as error:
        raise no_room("weights", error) from error
    return into
