"""`unetc inspect`: the content of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import Json, RankingGroup


def inspect(
    path: Annotated[Path, typer.Argument(help="Bundle folder, profile, plan, verification or curve.", metavar="PATH")],
    ranking: RankingGroup,
    as_json: Json = False,
) -> None:
    """Show the content of a bundle, profile, plan, verification or curve.

    A profile is shown as a ranking of its components, a bundle with its engines that the cache has.
    """
    from rich.markup import escape

    from unetc.artifacts.manifest import Manifest
    from unetc.artifacts.profile import Profile

    from .. import engine_inventory as compiled
    from .. import summary
    from ..output import OUT, print_json

    by = ranking.order()
    artifact = summary.open_artifact(path)
    if isinstance(artifact, Profile):
        summary.check_bin(ranking.bin, len(artifact.bins))
        facts = summary.profile_facts(artifact, path, by=by, top=ranking.top, bin=ranking.bin)
        shown = [summary.profile_table(artifact, by=by, top=ranking.top, bin=ranking.bin)]
    else:
        facts, shown = summary.facts(artifact, path), [summary.render(artifact)]
    if isinstance(artifact, Manifest):
        sets = compiled.find(artifact)
        facts |= {"compiled": compiled.facts(sets, artifact)}
        shown += compiled.shown(sets, artifact)
    if isinstance(artifact, (Profile, Manifest)):
        shown += [f"note: {escape(note)}" for note in artifact.notes or ()]
    if as_json:
        print_json(facts)
    else:
        OUT.print(*shown, sep="\n")
