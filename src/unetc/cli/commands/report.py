"""`unetc report`: bundle → HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundlePath, Json


def report(
    bundle: BundlePath,
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    verification: Annotated[
        Path | None, typer.Option(help="Result of `unetc verify -o` (default: verify now).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page: damage map with the plan, ranking, samples, controls, time line."""
    from unetc.api import write_report
    from unetc.artifacts.verification import Verification

    from ..output import print_json, progress, say

    known = Verification.load(verification) if verification else None
    with progress() as on_progress:
        write_report(bundle, output, verification=known, on_progress=on_progress)
    if as_json:
        print_json({"output": str(output), "bytes": output.stat().st_size})
    else:
        say(f"wrote {output}")
