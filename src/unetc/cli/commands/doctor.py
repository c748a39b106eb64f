"""`unetc doctor`: libraries and targets that work on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ..options import Json


def doctor(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show versions and reasons too.")] = False,
    as_json: Json = False,
) -> None:
    """Check which libraries and targets work here, and name the command that brings a missing one."""
    from .. import summary
    from ..diagnosis import diagnose
    from ..output import OUT, print_json

    findings = diagnose()
    if as_json:
        print_json({"findings": [finding.facts() for finding in findings]})
    else:
        OUT.print(summary.diagnosis_table(findings, verbose=verbose))
    if not all(finding.works for finding in findings if finding.needed):
        raise typer.Exit(1)
