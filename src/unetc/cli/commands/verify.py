"""`unetc verify`: bundle → verification."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BundlePath, BundleTarget, Json, QualityLevel


def verify(
    bundle: BundlePath,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Verification to write as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Batches that every contender samples, alternating.")] = 8,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size (default: the bundle's).")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="A seed that the build has not used (default: a new one).")
    ] = None,
    level: QualityLevel = None,
    target: BundleTarget = None,
    converged: Annotated[
        bool, typer.Option(help="Compare with the converged trajectory too, which takes 500 calls per batch.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Measure time and damage on new seeds, along with simpler ways to save the same time.

    The controls take the time of the level that saves least, so only that level is compared with all of them.
    """
    from unetc.analyzer.verify import VerifyOptions
    from unetc.api import verify as measure
    from unetc.artifacts.record import check_writable

    from .. import summary
    from ..output import OUT, print_json, progress

    if output is not None:
        check_writable(output)
    with progress() as on_progress:
        options = VerifyOptions(rounds=rounds, batch=batch, seed=seed, level=level, target=target, converged=converged)
        result = measure(bundle, options, on_progress=on_progress)
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result)
    else:
        OUT.print(summary.verification_table(result))
