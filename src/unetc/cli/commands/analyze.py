"""`unetc analyze`: model → profile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..groups import Group
from ..options import AnalysisGroup, Cache, ClusterGroup, Json, ModelGroup, RankingGroup

if TYPE_CHECKING:
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.models.model import Model


class EffortGroup(Group, panel="Effort"):
    """How many ablations are carried to the final output."""

    components: Annotated[
        list[str] | None,
        typer.Option(help="Ablate only components like 'up_blocks.*.attentions.*'; repeatable (default: all)."),
    ] = None
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Carry every ablation to the final output; takes some ten times longer."),
    ] = False
    screen_only: Annotated[
        bool,
        typer.Option("--screen-only", help="Carry no ablation to the final output; damages are rough estimates."),
    ] = False
    time_limit: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds after which nothing more is measured; a later run goes on (default: none)."),
    ] = None

    def decisive(self) -> int | None:
        """Count the ablations of each noise level that reach the final output; None for all.

        Raises:
            typer.BadParameter: If all and none are asked for.
        """
        from unetc.analyzer.analysis import AnalysisOptions

        if self.exhaustive and self.screen_only:
            raise typer.BadParameter("--exhaustive carries all ablations to the final output, --screen-only none.")
        return None if self.exhaustive else 0 if self.screen_only else AnalysisOptions().decisive


def analyze(
    model: ModelGroup,
    sampling: AnalysisGroup,
    effort: EffortGroup,
    machines: ClusterGroup,
    ranking: RankingGroup,
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write.")] = Path("profile.json"),
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure damage and cost of every component at every noise level, and rank them.

    Interrupted, the same command continues.
    """
    from unetc.analyzer.analyze import analyze_model
    from unetc.artifacts.record import check_writable
    from unetc.environment import cache_folder
    from unetc.models.find import find_model

    from .. import summary
    from ..output import OUT, print_json, progress, say

    check_writable(output)
    by, cluster, source = ranking.order(), machines.cluster(), model.source()
    options = sampling.options(
        source,
        components=tuple(effort.components or ()),
        decisive=effort.decisive(),
        time_limit_s=effort.time_limit or math.inf,
    )
    if options.bins <= options.steps:  # every step has a denoiser call, so the model need not be opened
        summary.check_bin(ranking.bin, options.bins)
    found = find_model(source)
    if ranking.bin is not None and options.bins > options.steps:
        summary.check_bin(ranking.bin, min(options.bins, _calls_of(found, options)))
    with progress() as on_progress:
        profile = analyze_model(found, options, cache=cache or cache_folder(), cluster=cluster, on_progress=on_progress)
    profile.save(output)
    if as_json:
        print_json(summary.profile_facts(profile, output, by=by, top=ranking.top, bin=ranking.bin))
    else:
        OUT.print(summary.profile_table(profile, by=by, top=ranking.top, bin=ranking.bin))
        say(f"wrote {output}")


def _calls_of(model: Model, options: AnalysisOptions) -> int:
    """Count the denoiser calls of an analysis: there is at least one in each noise level."""
    from unetc.compiler.schedulers.make import scheduler_for
    from unetc.compiler.schedulers.walk import calls_of

    return calls_of(scheduler_for(options.scheduler, model), options.steps)
