"""`unetc build`: model → bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..groups import Group
from ..options import Cache, ClusterGroup, Json, LadderGroup, LimitGroup, ModelGroup, ProfileGroup

if TYPE_CHECKING:
    from unetc.artifacts.plan import Plan
    from unetc.compiler.build import BuildOptions
    from unetc.compiler.planner.planner import PlanOptions


class BuildGroup(Group, panel="Building"):
    """Conditions on the bundle, and its extras."""

    quality_gate: Annotated[
        str | None, typer.Option(help="Refuse a worse build: psnr>=DB, ssim>=VALUE or relative-l2<=VALUE.")
    ] = None
    at: Annotated[
        str | None,
        typer.Option(help="Instead of a budget: build the fastest plan of the curve that passes, as psnr>=32."),
    ] = None
    plan: Annotated[
        Path | None, typer.Option(help="Build this plan of the profile unchanged, whatever the budget.")
    ] = None
    repair: Annotated[int, typer.Option(min=0, help="Schedules sampled in search of less damage; 0 for none.")] = 40
    tune: Annotated[
        bool, typer.Option(help="Tune the scheduler's rows to the plan, for the number of steps of the build.")
    ] = True
    controls: Annotated[bool, typer.Option(help="Put control plans into the bundle, for verify and report.")] = True
    text: Annotated[
        bool, typer.Option(help="Put the text encoders into the bundle, so that it takes any prompt without torch.")
    ] = True

    def given_plan(self, budgets: Sequence[float]) -> Plan | None:
        """Load the plan to build, if one is given.

        Args:
            budgets: Budgets of the quality levels.

        Raises:
            typer.BadParameter: If another option chooses the plan.
            ArtifactError: If it cannot be read.
        """
        from unetc.artifacts.plan import Plan

        if len(budgets) > 1 and (self.at is not None or self.plan is not None):
            given = "--plan" if self.plan is not None else "--at"
            raise typer.BadParameter(
                f"{given} gives one plan, but --budget gives {len(budgets)} quality levels. Leave out one of them."
            )
        if self.at is not None and self.plan is not None:
            raise typer.BadParameter("--at chooses a plan itself; give one of --at and --plan.")
        return Plan.load(self.plan) if self.plan else None

    def options(self, plan: PlanOptions, ladder: tuple[float, ...], steps: int) -> BuildOptions:
        """Make the options of the build.

        Raises:
            PlanError: If a quality gate cannot be read, or the budgets make no ladder.
        """
        from unetc.compiler.build import BuildOptions
        from unetc.compiler.search.quality_gate import QualityGate
        from unetc.compiler.search.repair import RepairOptions

        return BuildOptions(
            plan=plan,
            ladder=ladder,
            steps=steps,
            quality_gate=None if self.quality_gate is None else QualityGate.parse(self.quality_gate),
            at=None if self.at is None else QualityGate.parse(self.at),
            repair=RepairOptions(evaluations=self.repair, tune=self.tune),
            controls=self.controls,
            text=self.text,
        )


def build(
    model: ModelGroup,
    budget: LadderGroup,
    limits: LimitGroup,
    building: BuildGroup,
    sampling: ProfileGroup,
    machines: ClusterGroup,
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")] = Path("bundle"),
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Build a bundle that saves the budget in measured time, with an analysis first if there is no profile.

    Several budgets make a ladder of quality levels over one weights file.
    """
    budgets = budget.shares()

    from unetc.api import build as make

    from .. import summary
    from ..output import ERR, OUT, print_json, progress, say

    plan, cluster, source = building.given_plan(budgets), machines.cluster(), model.source()
    options = building.options(limits.plan(budgets[0]), budgets[1:], sampling.steps_of(source))
    known, analysis = sampling.known(), sampling.analysis(source)
    with progress() as on_progress:
        manifest = make(
            source,
            output,
            options,
            profile=known,
            plan=plan,
            analysis=analysis,
            cache=cache,
            cluster=cluster,
            on_progress=on_progress,
        )
    for note in manifest.notes:
        say(note, ERR)
    if as_json:
        print_json(summary.bundle_facts(manifest, output))
    else:
        OUT.print(summary.bundle_table(manifest))
        say(f"wrote {output}")
        if command := summary.compiling(manifest, output):
            say(f"its engines are not built yet: {command}")
