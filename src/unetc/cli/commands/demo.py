"""`unetc demo`: the whole way on the built-in model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BudgetGroup, Cache, Json


def demo(
    budget: BudgetGroup,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("unetc-demo"),
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Analyse, build, verify and report the built-in model `digits`, in a few minutes on two cores."""
    share = budget.share()

    from unetc.demo import run_demo

    from .. import summary
    from ..output import OUT, print_json, progress, say

    with progress() as on_progress:
        result = run_demo(output, budget=share, cache=cache, on_progress=on_progress)
    if as_json:
        print_json(result.verification)
        return
    OUT.print(summary.verification_table(result.verification))
    OUT.print("\nLook at:")
    for path, meaning in result.files:
        say(f"  {path}  {meaning}")
    say(f"\nServe it to many clients at once: pip install 'unetc[serve]' && unetc serve {result.bundle}")
