"""`unetc export`: bundle → the files of another server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..options import BundlePath, Json


class Server(StrEnum):
    """Servers that bundles are exported for."""

    TRITON = "triton"


def export(
    server: Annotated[Server, typer.Argument(help="The server: triton, for NVIDIA's.", metavar="triton")],
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="Repository folder to write.")] = Path("repository"),
    target: Annotated[
        str | None,
        typer.Option(
            help="Where the server runs engines: onnxruntime:cpu, onnxruntime:cuda or onnxruntime:tensorrt "
            "(default: the target that the bundle was built for)."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model that samples (default: the name of the bundle's model).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server: one model per engine, and one that samples.

    The model that samples runs unetc in Triton's Python backend and calls the others.
    """
    from unetc.api import export_triton
    from unetc.triton.options import ExportOptions

    from ..output import OUT, print_json, progress, say, table

    with progress() as on_progress:
        done = export_triton(bundle, output, ExportOptions(target=target, name=name), on_progress=on_progress)
    if as_json:
        print_json(done)
        return
    rows = [
        [one.name, one.graph or "samples images", "" if one.most_rows is None else str(one.most_rows)]
        for one in done.models
    ]
    OUT.print(table(f"{done.model} on {done.target}", ["model", "runs", "largest batch"], rows, words=2))
    say(f"wrote {output}: {done.bytes_on_disk} bytes, or {done.bytes_apart} where hard links become copies")
