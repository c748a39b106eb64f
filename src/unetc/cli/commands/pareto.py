"""`unetc pareto`: model → curve of the least damage at each saving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options import Cache, ClusterGroup, Json, LimitGroup, ModelGroup, ProfileGroup


def pareto(
    model: ModelGroup,
    limits: LimitGroup,
    sampling: ProfileGroup,
    machines: ClusterGroup,
    budgets: Annotated[
        int, typer.Option(min=1, help="Number of budgets, from 0.1 (saves 10 %) to 0.8 (saves 80 %).")
    ] = 8,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Curve to write; a picture of it is put next to it as .svg.")
    ] = Path("pareto.json"),
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure the least damage at each saving: plan, repair and sample at many budgets.

    Every plan that was sampled is kept in the curve.
    """
    from unetc.api import pareto as measure
    from unetc.artifacts.record import check_writable, write_together
    from unetc.compiler.search.pareto import ParetoOptions
    from unetc.report.curve import draw

    from .. import summary
    from ..output import OUT, print_json, progress, say

    check_writable(output)
    picture = output.with_suffix(".svg")
    if picture == output:
        raise typer.BadParameter(f"{output} is the name of the picture; give the curve another one.")
    check_writable(picture)
    known, cluster, source = sampling.known(), machines.cluster(), model.source()
    options = ParetoOptions(
        budgets=budgets,
        steps=sampling.steps_of(source),
        max_engines=limits.max_engines,
        max_memory=limits.max_memory,
        planner=limits.planner,
    )
    analysis = sampling.analysis(source)
    with progress() as on_progress:
        curve = measure(
            source, options, profile=known, analysis=analysis, cache=cache, cluster=cluster, on_progress=on_progress
        )
    write_together({output: curve.to_json(), picture: draw(curve).encode()})
    if as_json:
        print_json(summary.pareto_facts(curve, output))
    else:
        OUT.print(summary.pareto_table(curve))
        say(f"wrote {output} and {picture}")
