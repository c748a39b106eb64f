"""Turn artifacts into tables for people and facts for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from unetc.analyzer.ranking import By, Ranked, Ranking, rank
from unetc.artifacts.manifest import MANIFEST, BundleEngine, Level, Manifest
from unetc.artifacts.pareto import Pareto
from unetc.artifacts.plan import Phase, Plan
from unetc.artifacts.profile import Damage, Profile
from unetc.artifacts.reading import read_bounded
from unetc.artifacts.record import to_builtins
from unetc.artifacts.scope import control_scope, damage_scope
from unetc.artifacts.verification import WHICH_FIGURE, Verification
from unetc.compiler.tensorrt.ranges import describe_sides
from unetc.errors import ArtifactError, CorruptArtifactError, ProfileError
from unetc.nvidia.key import EngineKey, compile_command
from unetc.nvidia.library import LIBRARIES
from unetc.percent import percent
from unetc.precision import Precision

from .output import saves, table

if TYPE_CHECKING:
    from unetc.compiler.tensorrt.wanted import CompiledEngine

    from .diagnosis import Finding

TOP = 10
"""Ranked components that are shown."""
BEST_OF_BIN = 3
"""Largest number of components shown per noise level."""
_ORDERS = {By.WORTH: "time saved per damage", By.SAVING: "time saved", By.DAMAGE: "damage"}


def open_artifact(path: Path) -> Profile | Plan | Manifest | Verification | Pareto:
    """Open a bundle folder (every byte checked), a profile, a plan or a verification.

    Raises:
        ArtifactError: If it is none of them.
    """
    if path.is_dir() or path.name == MANIFEST:
        from unetc.runtime.bundle import Bundle

        return Bundle.open(path if path.is_dir() else path.parent).manifest
    data = read_bounded(path, 2**28)
    for kind in (Profile, Plan, Verification, Pareto):
        try:
            return kind.from_json(data, str(path))
        except CorruptArtifactError:
            continue
    raise ArtifactError(f"{path} is not a bundle, profile, plan, verification or curve of unetc.")


def render(artifact: Plan | Manifest | Verification | Pareto) -> RenderableType:
    """Show any artifact but a profile as a table."""
    match artifact:
        case Plan():
            return plan_table(artifact)
        case Manifest():
            return bundle_table(artifact)
        case Verification():
            return verification_table(artifact)
        case Pareto():
            return pareto_table(artifact)


def facts(artifact: Plan | Manifest | Verification | Pareto, path: Path) -> dict[str, object]:
    """Reduce any artifact but a profile to the facts that programs ask for."""
    match artifact:
        case Manifest():
            return bundle_facts(artifact, path)
        case Pareto():
            return pareto_facts(artifact, path)
        case _:
            plain: dict[str, object] = to_builtins(artifact)
            return plain


def check_bin(number: int | None, bins: int) -> None:
    """Refuse a noise level that a profile does not have.

    Raises:
        ProfileError: If there is no such noise level.
    """
    if number is not None and not 1 <= number <= bins:
        raise ProfileError(f"there is no noise level {number}. Expected 1, the noisiest, to {bins}.")


def profile_facts(
    profile: Profile, path: Path, *, by: By = By.WORTH, top: int = TOP, bin: int | None = None
) -> dict[str, object]:
    """Summarise a profile: each component's cost and least damage per bin in network order, and the ranking.

    Args:
        profile: The profile.
        path: Its file.
        by: Order of the ranking.
        top: Number of ranked components, over all bins and in each; 0 for all.
        bin: The one noise level to rank, from 1, the noisiest; all when not given.
    """
    least = _least_damage(profile)
    costs = {cost.component: cost.saved_ms.mean for cost in profile.costs}
    return {
        "profile": str(path),
        "model": to_builtins(profile.model),
        "target": profile.target,
        "timed_on": profile.timed_on or None,
        "full_ms": profile.full_ms.mean,
        "bins": to_builtins(profile.bins),
        "notes": list(profile.notes or ()),
        "measured": sum(effect.measured for effect in profile.effects),
        "estimated": sum(not effect.measured for effect in profile.effects),
        "non_finite": to_builtins(profile.broken),
        "control": to_builtins(profile.control),
        "components": [
            {
                "name": component.name,
                "kind": component.kind,
                "saved_ms": costs.get(component.name),
                "least_relative_l2": [least.get((component.name, b)) for b in range(len(profile.bins))],
            }
            for component in profile.components
        ],
        "ranking": _ranking_facts(profile, rank(profile, by), top or None, bin),
    }


def _ranking_facts(profile: Profile, ranking: Ranking, top: int | None, bin: int | None) -> dict[str, object]:
    def rows(ranked: Sequence[Ranked]) -> list[dict[str, object]]:
        return [
            {
                "component": own.component,
                "treatment": own.treatment,
                "period": own.period,
                "saving": own.saving,
                "relative_l2": own.damage,
                "worth": own.worth if math.isfinite(own.worth) else None,  # JSON has no infinity
                "measured_bins": own.measured,
                "bins": own.bins,
            }
            for own in ranked[:top]
        ]

    wanted = [(b, own) for b, own in enumerate(profile.bins) if bin in (None, b + 1)]
    return {
        "by": ranking.by,
        "overall": rows(ranking.overall),
        "bins": [
            {"bin": b + 1, "low": own.low, "high": own.high, "components": rows(ranking.bins[b])} for b, own in wanted
        ],
    }


def profile_table(profile: Profile, *, by: By = By.WORTH, top: int = TOP, bin: int | None = None) -> RenderableType:
    """Lay out the ranking of a profile: over all noise levels, then the first few of each, from high noise to low.

    Args:
        profile: The profile.
        by: Order of the ranking.
        top: Number of components to show; 0 for all.
        bin: The one noise level to show, from 1, the noisiest; all when not given.
    """
    ranking, most = rank(profile, by), top or None
    measured = sum(effect.measured for effect in profile.effects)
    about = (
        f"{profile.samples} samples, {profile.scheduler} {profile.steps}, {profile.target}; {measured} of "
        f"{len(profile.effects)} damages measured, the others estimated; cost {profile.samplings:.0f} sampling runs"
    )
    if profile.timed_on:
        about += f"; timed on {escape(profile.timed_on)}"
    if profile.broken:
        about += f"; {len(profile.broken)} ablations end in NaN or infinity, and no plan makes them"
    if scope := control_scope(profile.model, profile.control):
        about += f"; {escape(scope)}"
    figures = ["component", "treatment", "saves", "relative L2", "worth", "basis"]
    title = f"{escape(profile.model.title)}: components by {_ORDERS[by]}"
    if bin is not None:
        rows = [_ranked_cells(own) for own in ranking.bins[bin - 1][:most]]
        return table(f"{title} at log-SNR {_bin_range(profile, bin - 1)}; {about}", figures, rows, words=2)
    overall = table(
        f"{title}, over all noise levels; {about}",
        figures,
        [_ranked_cells(own) for own in ranking.overall[:most]],
        words=2,
    )
    few = min(BEST_OF_BIN, top) if top else None
    each = [
        ["" if place else _bin_range(profile, b), *_ranked_cells(own)]
        for b, ranked in enumerate(ranking.bins)
        for place, own in enumerate(ranked[:few])
    ]
    return Group(
        overall,
        table(
            "The first of each noise level; savings are shares of the time spent there",
            ["log-SNR", *figures],
            each,
            words=3,
        ),
    )


def _ranked_cells(own: Ranked) -> list[str]:
    damage = f"{own.damage:.4f}" if own.damage >= 0.001 or own.damage == 0 else f"{own.damage:.1e}"
    worth = f"{own.worth:.{1 if own.worth < 100 else 0}f}" if math.isfinite(own.worth) else "∞"
    return [escape(own.component), own.way, percent(own.saving), damage, worth, own.basis]


def _bin_range(profile: Profile, bin: int) -> str:
    """Write the range of a bin; the outer bins are open-ended."""
    own, last = profile.bins[bin], len(profile.bins) - 1
    return f"{'-∞' if bin == 0 else format(own.low, '.1f')} to {'∞' if bin == last else format(own.high, '.1f')}"


def _least_damage(profile: Profile) -> dict[tuple[str, int], float]:
    least: dict[tuple[str, int], float] = {}
    for effect in profile.effects:
        key = effect.component, effect.bin
        least[key] = min(least.get(key, float("inf")), effect.relative_l2.mean)
    return least


def plan_table(plan: Plan) -> Table:
    """Lay out the phases of a plan, with the components that each engine of the cycle treats."""
    last = len(plan.phases) - 1
    rows = [
        [
            f"{'-∞' if i == 0 else format(phase.low, '.2f')} to {'∞' if i == last else format(phase.high, '.2f')}",
            " → ".join(_engine_name(engine) for engine in phase.cycle),
            _treated(plan, phase),
        ]
        for i, phase in enumerate(plan.phases)
    ]
    title = (
        f"plan for {escape(plan.model.title)}: asked to save {percent(plan.budget)}, "
        f"{saves(plan.prediction.time_ratio)}, relative L2 {plan.prediction.relative_l2:.4f}, as predicted; engines "
        f"hold {plan.prediction.memory:.2f} × the full model's weights"
    )
    return table(title, ["log-SNR", "runs", "treated"], rows, words=3)


def _engine_name(engine: int) -> str:
    return f"engine {engine}" if engine else "full"


def _treated(plan: Plan, phase: Phase) -> str:
    """List the components that each engine of a cycle treats; where engines take turns, under its name."""
    engines = list(dict.fromkeys(phase.cycle))
    lines = []
    for engine in engines:
        treatments = plan.engines[engine].treatments
        listed = ", ".join(f"{escape(name)} ({treatment})" for name, treatment in treatments.items()) or "nothing"
        if engine:
            lines.append(f"{_engine_name(engine)}: {listed}" if len(engines) > 1 else listed)
    return "\n".join(lines) or "nothing"


def bundle_facts(manifest: Manifest, path: Path) -> dict[str, object]:
    """Summarise a bundle."""
    return {
        "bundle": str(path),
        "model": to_builtins(manifest.model),
        "target": manifest.target,
        "scheduler": manifest.scheduler.name,
        "steps": manifest.steps,
        "budget": manifest.plan.budget,
        "saves": 1 - manifest.measured.time_ratio,
        "measured": to_builtins(manifest.measured),
        "full": _engine_facts(manifest.full),
        "engines": [_engine_facts(engine) for engine in manifest.engines],
        "phases": to_builtins(manifest.plan.phases),
        "levels": [_level_facts(level) for level in manifest.levels],
        "notes": list(manifest.notes),
        "damage_holds_for": damage_scope(manifest.model, manifest.control, manifest.steps, manifest.plain_damage),
        "bytes": sum(record.bytes for record in manifest.files),
        "text_bytes": text_bytes(manifest),
    }


def text_bytes(manifest: Manifest) -> int:
    """Count the bytes of the text encoders; 0 without them."""
    encoders = () if manifest.text is None else manifest.text.encoders
    named = {path for one in encoders for path in (one.graph, one.weights, one.tokenizer)}
    return sum(record.bytes for record in manifest.files if record.path in named)


def _level_facts(level: Level) -> dict[str, object]:
    return {
        "name": level.name,
        "budget": level.plan.budget,
        "saves": 1 - level.measured.time_ratio,
        "measured": to_builtins(level.measured),
        "plain_damage": to_builtins(level.plain_damage),
        "engines": [_engine_facts(engine) for engine in level.engines],
        "phases": to_builtins(level.plan.phases),
    }


def _engine_facts(engine: BundleEngine) -> dict[str, object]:
    return {
        "graph": engine.graph,
        "step_ms": engine.step_ms,
        "batch_ms": to_builtins(engine.batch_ms),
        "treatments": to_builtins(engine.treatments),
    }


def bundle_table(manifest: Manifest) -> RenderableType:
    """Lay out the engines, the ladder and the plans of a bundle."""
    sizes = {record.path: record.bytes for record in manifest.files}
    # an engine that treats guidance may share its graph with one that computes all rows
    listed = {(engine.graph, *sorted(engine.treatments)): engine for engine in manifest.level_engines()}
    rows = [
        [engine.graph, f"{engine.step_ms:.2f}", str(len(engine.treatments)), f"{sizes[engine.graph] / 1000:.0f}"]
        for engine in listed.values()
    ]
    measured = manifest.measured
    title = (
        f"bundle of {escape(manifest.model.title)} for {manifest.target}: {saves(measured.time_ratio)}, "
        f"{_damage(measured.damage)}; {sum(sizes.values()) / 1e6:.1f} MB"
    )
    if manifest.text is not None:
        title += f", with text encoders of {text_bytes(manifest) / 1e6:.1f} MB"
    engines = table(title, ["engine", f"ms per call (batch {manifest.batch})", "removed", "kB"], rows)
    scope = damage_scope(manifest.model, manifest.control, manifest.steps, manifest.plain_damage)
    ladder = [ladder_table(manifest)] if len(manifest.levels) > 1 else []
    return Group(engines, *ladder, *(plan_table(level.plan) for level in manifest.levels), Text(scope))


def ladder_table(manifest: Manifest) -> Table:
    """Lay out the quality levels of a bundle, as measured by the build."""
    rows = [
        [level.name, *_time_cells(level.measured.time_ratio), *_damage_cells(level.measured.damage)]
        for level in manifest.levels
    ]
    return table(
        "quality levels; each request may have its own",
        ["level", "saves", "time ratio", "relative L2", "PSNR dB", "SSIM"],
        rows,
    )


def pareto_facts(curve: Pareto, path: Path) -> dict[str, object]:
    """Summarise a curve: its front, without the plans."""
    return {
        "pareto": str(path),
        "model": to_builtins(curve.model),
        "sampled": len(curve.points),
        "front": [
            {
                "budget": point.budget,
                "saves": 1 - point.time_ratio,
                "time_ratio": point.time_ratio,
                "damage": to_builtins(point.damage),
            }
            for point in curve.front()
        ],
    }


def pareto_table(curve: Pareto) -> Table:
    """Lay out the front of a curve."""
    rows = [[*_time_cells(point.time_ratio), *_damage_cells(point.damage)] for point in curve.front()]
    title = (
        f"{escape(curve.model.title)}: least damage at each saving, of {len(curve.points)} plans sampled on "
        f"{curve.samples} samples, {curve.steps} steps, {curve.target}"
    )
    return table(title, ["saves", "time ratio", "relative L2", "PSNR dB", "SSIM"], rows)


def verification_table(result: Verification) -> Table:
    """Lay out the plan and its controls; a control that beats the plan is red, and a line below names it."""
    converged, beaten_by = result.converged, result.beaten_by()
    rows = [["the plan", *_time_cells(result.time_ratio), *_damage_cells(result.damage)]]
    distances = [] if converged is None else [converged.plan]
    for name, control in result.controls.items():
        cells = [escape(control.description), *_time_cells(control.time_ratio), *_damage_cells(control.damage)]
        rows.append([f"[red]{cell}[/red]" for cell in cells] if name in beaten_by else cells)
        if converged is not None:
            distances.append(converged.controls[name])
    columns = ["at equal noise", "saves", "time ratio", "relative L2", "PSNR dB", "SSIM"]
    if converged is not None:
        columns.append("to converged")
        rows = [[*row, f"{own.relative_l2.mean:.4f}"] for row, own in zip(rows, distances, strict=True)]
        rows.append(["the full model", *_time_cells(1.0), "0", "", "", f"{converged.full.relative_l2.mean:.4f}"])
    title = (
        f"{escape(result.model.title)}, asked to save {percent(result.budget)}: {result.samples} new samples, "
        f"{result.scheduler} {result.steps} steps, "
        f"{result.target}; disk {result.disk_bytes / result.full_disk_bytes:.3f} × one model"
    )
    if scope := control_scope(result.model, result.control):
        title += f"; {escape(scope)}"
    laid_out = table(title, columns, rows)
    lines = []
    if beaten_by:
        lines.append(f"[red]The plan loses to {escape(', '.join(beaten_by))}: less damage in no more time.[/red]")
    if made_again := result.made_again():
        lines.append(f"[red]{made_again}[/red]")
    if converged is not None:
        lines.append(f"to converged: relative L2 to {converged.scheduler} in {converged.steps} steps. {WHICH_FIGURE}")
    laid_out.caption, laid_out.caption_justify, laid_out.caption_style = "\n".join(lines) or None, "left", ""
    return laid_out


def diagnosis_table(findings: Sequence[Finding], *, verbose: bool = False) -> Table:
    """Lay out findings, one line each, with the command that brings a missing part; with details if verbose."""
    states = {True: "[green]works[/green]", False: "missing"}
    rows = [
        [
            finding.name,
            "[red]missing[/red]" if finding.needed and not finding.works else states[finding.works],
            escape(finding.detail if verbose else finding.short),
        ]
        for finding in findings
    ]
    return table("unetc on this machine", ["part", "state", "detail" if verbose else "help"], rows, words=3)


def _time_cells(time_ratio: float) -> list[str]:
    return [percent(1 - time_ratio), f"{time_ratio:.3f}"]


def _damage(damage: Damage) -> str:
    return f"relative L2 {damage.relative_l2.mean:.4f}, PSNR {damage.psnr.mean:.1f} dB, SSIM {damage.ssim.mean:.4f}"


def _damage_cells(damage: Damage) -> list[str]:
    l2 = damage.relative_l2
    return [f"{l2.mean:.4f} ({l2.low:.4f}–{l2.high:.4f})", f"{damage.psnr.mean:.1f}", f"{damage.ssim.mean:.4f}"]


def engines_title(key: EngineKey, manifest: Manifest) -> str:
    """Describe the target, precision and sizes that engines were built for."""
    origin, sizes = key.origin, key.sizes
    gpu = "any GPU it supports" if origin.gpu is None else origin.gpu.name
    sides = describe_sides(manifest, sizes)
    return f"{origin.target} {origin.library}, {key.precision}, batch {sizes.batch}, {sides}, {gpu}"


def engine_facts(engines: Sequence[CompiledEngine]) -> dict[str, object]:
    """List compiled engines with everything that is known about them."""
    return {
        "engines": [
            {"graph": engine.graph, "folder": str(engine.folder), "known": engine.known} | to_builtins(engine.record)
            for engine in engines
        ]
    }


def compiling(manifest: Manifest, path: Path) -> str:
    """Write the command that builds the engines for the target of a bundle; empty if the target needs none."""
    library = manifest.target.partition(":")[0]
    if library not in LIBRARIES:
        return ""
    return compile_command(library, Precision.of_target(manifest.target), bundle=str(path))


def _label(engine: CompiledEngine, precision: Precision) -> str:
    """Name an engine, with its precision where most engines have another."""
    own = engine.record.key.precision
    return Path(engine.graph).stem if own is precision else f"{Path(engine.graph).stem} in {own}"


def engine_table(engines: Sequence[CompiledEngine], manifest: Manifest) -> Table:
    """Lay out compiled engines and the cost of building them."""
    key = engines[0].record.key
    rows = [
        [
            _label(engine, key.precision),
            f"{engine.record.engine_bytes / 2**20:.1f}",
            str(engine.record.layers),
            f"{engine.record.seconds:.1f}",
            str(engine.record.tries),
            f"{engine.record.peak_bytes / 2**20:.0f}",
            "was there" if engine.known else "built",
        ]
        for engine in engines
    ]
    return table(
        f"{engines_title(key, manifest)}; in {engines[0].folder.parent}",
        ["engine", "MiB", "layers", "seconds", "tries", "peak MiB", "state"],
        rows,
    )
