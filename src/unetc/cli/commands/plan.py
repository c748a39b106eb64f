"""`unetc plan`: profile → plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import BudgetGroup, Json, LimitGroup


def plan(
    profile: Annotated[Path, typer.Argument(help="Profile from `unetc analyze`.", metavar="PROFILE")],
    budget: BudgetGroup,
    limits: LimitGroup,
    output: Annotated[Path, typer.Option("-o", "--output", help="Plan to write.")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Choose the components to remove or reuse at each noise level.

    Pure: the same profile and options give the same bytes.
    """
    share = budget.share()

    from unetc.api import plan as make
    from unetc.artifacts.profile import Profile

    from .. import summary
    from ..output import OUT, print_json, say

    made = make(Profile.load(profile), limits.plan(share))
    made.save(output)
    if as_json:
        print_json(made)
    else:
        OUT.print(summary.plan_table(made))
        say(f"wrote {output}")
