"""Turn artifacts into tables for people and facts for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from unetc.artifacts.manifest import MANIFEST, Manifest
from unetc.artifacts.pareto import Pareto
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Damage, Profile
from unetc.artifacts.record import read_bounded, to_builtins
from unetc.artifacts.verification import Verification
from unetc.compiler.tensorrt.ranges import describe_sides
from unetc.errors import ArtifactError, CorruptArtifactError
from unetc.nvidia.key import EngineKey, compile_command
from unetc.nvidia.library import LIBRARIES
from unetc.precision import Precision

from .output import table

if TYPE_CHECKING:
    from unetc.compiler.tensorrt.compile_bundle import CompiledEngine

    from .diagnosis import Finding


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


def render(artifact: Profile | Plan | Manifest | Verification | Pareto) -> RenderableType:
    """Show any artifact as a table."""
    match artifact:
        case Profile():
            return profile_table(artifact)
        case Plan():
            return plan_table(artifact)
        case Manifest():
            return bundle_table(artifact)
        case Verification():
            return verification_table(artifact)
        case Pareto():
            return pareto_table(artifact)


def facts(artifact: Profile | Plan | Manifest | Verification | Pareto, path: Path) -> dict[str, object]:
    """Reduce any artifact to what a program would ask of it."""
    match artifact:
        case Profile():
            return profile_facts(artifact, path)
        case Manifest():
            return bundle_facts(artifact, path)
        case Pareto():
            return pareto_facts(artifact, path)
        case _:
            plain: dict[str, object] = to_builtins(artifact)
            return plain


def profile_facts(profile: Profile, path: Path) -> dict[str, object]:
    """Summarise a profile: for every component its cost and its least damage per bin."""
    least = _least_damage(profile)
    costs = {cost.component: cost.saved_ms.mean for cost in profile.costs}
    return {
        "profile": str(path),
        "model": to_builtins(profile.model),
        "target": profile.target,
        "full_ms": profile.full_ms.mean,
        "bins": to_builtins(profile.bins),
        "measured": sum(effect.measured for effect in profile.effects),
        "estimated": sum(not effect.measured for effect in profile.effects),
        "components": [
            {
                "name": component.name,
                "kind": component.kind,
                "saved_ms": costs.get(component.name),
                "least_relative_l2": [least.get((component.name, b)) for b in range(len(profile.bins))],
            }
            for component in profile.components
        ],
    }


def profile_table(profile: Profile) -> Table:
    """Lay out cost and damage of every component; bins run from high noise to low."""
    least = _least_damage(profile)
    costs = {cost.component: cost.saved_ms.mean / profile.full_ms.mean for cost in profile.costs}
    rows = [
        [escape(component.name), f"{costs[component.name]:.1%}" if component.name in costs else "–"]
        + [f"{least[component.name, b]:.3f}" if (component.name, b) in least else "–" for b in range(len(profile.bins))]
        for component in profile.components
    ]
    return table(
        f"{escape(profile.model.title)}: time saved without a component, and the least relative L2 damage of removing "
        f"or reusing it per noise level (log-SNR); {profile.samples} samples, {profile.scheduler} {profile.steps}, "
        f"{profile.target}; {sum(effect.measured for effect in profile.effects)} of {len(profile.effects)} damages "
        f"measured, the others estimated; cost {profile.samplings:.0f} sampling runs",
        ["component", "saves", *(f"≥{bin.low:.1f}" for bin in profile.bins)],
        rows,
    )


def _least_damage(profile: Profile) -> dict[tuple[str, int], float]:
    least: dict[tuple[str, int], float] = {}
    for effect in profile.effects:
        key = effect.component, effect.bin
        least[key] = min(least.get(key, float("inf")), effect.relative_l2.mean)
    return least


def plan_table(plan: Plan) -> Table:
    """Lay out the phases of a plan."""
    rows = [
        [
            f"{'-∞' if i == 0 else format(phase.low, '.2f')} to "
            f"{'∞' if i == len(plan.phases) - 1 else format(phase.high, '.2f')}",
            " → ".join("full" if engine == 0 else f"engine {engine}" for engine in phase.cycle),
            ", ".join(
                f"{escape(name)} ({treatment})" for name, treatment in plan.engines[phase.cycle[-1]].treatments.items()
            )
            or "nothing",
        ]
        for i, phase in enumerate(plan.phases)
    ]
    title = (
        f"plan for {escape(plan.model.title)}, budget {plan.budget:.0%}: predicted time ratio "
        f"{plan.prediction.time_ratio:.3f}, relative L2 {plan.prediction.relative_l2:.4f}; engines hold "
        f"{plan.prediction.memory:.2f} × the full model's weights"
    )
    return table(title, ["log-SNR", "runs", "treated"], rows, words=3)


def bundle_facts(manifest: Manifest, path: Path) -> dict[str, object]:
    """Summarise a bundle."""
    return {
        "bundle": str(path),
        "model": to_builtins(manifest.model),
        "target": manifest.target,
        "scheduler": manifest.scheduler.name,
        "steps": manifest.steps,
        "budget": manifest.plan.budget,
        "measured": to_builtins(manifest.measured),
        "full": {"graph": manifest.full.graph, "step_ms": manifest.full.step_ms},
        "engines": [
            {"graph": e.graph, "step_ms": e.step_ms, "treatments": to_builtins(e.treatments)} for e in manifest.engines
        ],
        "phases": to_builtins(manifest.plan.phases),
        "notes": list(manifest.notes),
        "bytes": sum(record.bytes for record in manifest.files),
    }


def bundle_table(manifest: Manifest) -> RenderableType:
    """Lay out the engines and the plan of a bundle."""
    sizes = {record.path: record.bytes for record in manifest.files}
    listed = {engine.graph: engine for engine in (manifest.full, *manifest.engines)}
    rows = [
        [engine.graph, f"{engine.step_ms:.2f}", str(len(engine.treatments)), f"{sizes[engine.graph] / 1000:.0f}"]
        for engine in listed.values()
    ]
    measured = manifest.measured
    title = (
        f"bundle of {escape(manifest.model.title)} for {manifest.target}: time ratio {measured.time_ratio:.3f}, "
        f"{_damage(measured.damage)}; {sum(sizes.values()) / 1e6:.1f} MB"
    )
    engines = table(title, ["engine", f"ms per call (batch {manifest.batch})", "removed", "kB"], rows)
    return Group(engines, plan_table(manifest.plan))


def pareto_facts(curve: Pareto, path: Path) -> dict[str, object]:
    """Summarise a curve: its front, without the plans."""
    return {
        "pareto": str(path),
        "model": to_builtins(curve.model),
        "sampled": len(curve.points),
        "front": [
            {"budget": p.budget, "time_ratio": p.time_ratio, "damage": to_builtins(p.damage)} for p in curve.front()
        ],
    }


def pareto_table(curve: Pareto) -> Table:
    """Lay out the front of a curve."""
    rows = [[f"{point.time_ratio:.3f}", *_damage_cells(point.damage)] for point in curve.front()]
    title = (
        f"{escape(curve.model.title)}: least damage at any time, of {len(curve.points)} plans sampled on "
        f"{curve.samples} samples, {curve.steps} steps, {curve.target}"
    )
    return table(title, ["time ratio", "relative L2", "PSNR dB", "SSIM"], rows)


def verification_table(result: Verification) -> Table:
    """Lay out the plan beside its controls; a control that beats it is red."""
    rows = [["the plan", f"{result.time_ratio:.3f}", *_damage_cells(result.damage)]]
    beaten_by = result.beaten_by()
    for name, control in result.controls.items():
        cells = [escape(control.description), f"{control.time_ratio:.3f}", *_damage_cells(control.damage)]
        rows.append([f"[red]{cell}[/red]" for cell in cells] if name in beaten_by else cells)
    title = (
        f"{escape(result.model.title)}: {result.samples} new samples, {result.scheduler} {result.steps} steps, "
        f"{result.target}; disk {result.disk_bytes / result.full_disk_bytes:.3f} × one model"
    )
    return table(title, ["at equal noise", "time ratio", "relative L2", "PSNR dB", "SSIM"], rows)


def diagnosis_table(findings: Sequence[Finding]) -> Table:
    """Lay out what works here."""
    rows = [
        [
            f.name,
            "[green]works[/green]" if f.works else ("[red]missing[/red]" if f.needed else "missing"),
            escape(f.detail),
        ]
        for f in findings
    ]
    return table("unetc on this machine", ["what", "state", "detail"], rows, words=3)


def _damage(damage: Damage) -> str:
    return f"relative L2 {damage.relative_l2.mean:.4f}, PSNR {damage.psnr.mean:.1f} dB, SSIM {damage.ssim.mean:.4f}"


def _damage_cells(damage: Damage) -> list[str]:
    l2 = damage.relative_l2
    return [f"{l2.mean:.4f} ({l2.low:.4f}–{l2.high:.4f})", f"{damage.psnr.mean:.1f}", f"{damage.ssim.mean:.4f}"]


def engines_title(key: EngineKey, manifest: Manifest) -> str:
    """Say what engines were built for."""
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
    """Write the command that builds the engines which a bundle needs on its own target; empty if it needs none."""
    library = manifest.target.partition(":")[0]
    if library not in LIBRARIES:
        return ""
    return compile_command(library, Precision.of_target(manifest.target), bundle=str(path))


def _label(engine: CompiledEngine, precision: Precision) -> str:
    """Name an engine; where most are in another precision, say its own."""
    own = engine.record.key.precision
    return Path(engine.graph).stem if own is precision else f"{Path(engine.graph).stem} in {own}"


def engine_table(engines: Sequence[CompiledEngine], manifest: Manifest) -> Table:
    """Lay out compiled engines and what building them took."""
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
