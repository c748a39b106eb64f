"""The page of the report: time saved by a bundle, damage to its samples, and the measurements behind both."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from unetc.artifacts.manifest import Manifest
from unetc.artifacts.plan import Phase, Plan
from unetc.artifacts.profile import Damage, Estimate, Profile
from unetc.artifacts.scope import damage_scope
from unetc.artifacts.verification import WHICH_FIGURE, Verification
from unetc.percent import percent
from unetc.treatments import ROWS

from . import charts, heatmap, pictures

_SHEET_WIDTH = 1024
"""Largest width of a row of samples, in pixels; a row always has room for two samples."""
_FACTORS = (1, 2, 5, 10, 20, 50, 100)
"""Allowed amplifications of a difference."""

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedComponent:
    """A component and its best treatment in a range of noise levels, for the table of redundant components."""

    component: str
    treatment: str
    saving: float
    """Time saved, as a share of the full model's time over the range."""
    damage: float
    """Damage to the final output, relative L2."""
    worth: float
    """Saving per damage; may be infinite."""
    basis: str
    """Origin of the damage: measured or estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedRange:
    """The most redundant components of a range of noise levels, in order."""

    levels: str
    components: tuple[RankedComponent, ...]


def render(
    *,
    profile: Profile,
    manifest: Manifest,
    verification: Verification,
    full: Array,
    pruned: Array,
    log_snr: Array,
    schedule: tuple[int, ...],
    ranking: tuple[RankedRange, ...] = (),
) -> str:
    """Render the report of a bundle as one HTML file that loads no other file.

    Args:
        profile: Profile of the model.
        manifest: Manifest of the bundle; its plan was made from the profile.
        verification: Measurements on new seeds, with one engine per engine of the plan.
        full: Samples of the full model, [batch, channel, height, width] in [-1, 1].
        pruned: Samples of the bundle from the same noise, same shape.
        log_snr: Noise level of every step, [steps].
        schedule: Engine of every step, [steps].
        ranking: The most redundant components of each range of noise levels; if empty, the page omits their table.

    Returns:
        The text of the page.
    """
    engines = _engine_rows(manifest, verification)
    better = verification.beaten_by()
    factor, sheets = _sample_sheets(full, pruned)
    return _template().render(
        profile=profile,
        manifest=manifest,
        verification=verification,
        sheets=sheets,
        factor=factor,
        engines=engines,
        controls=_control_rows(verification, better),
        better=better,
        converged=verification.converged,
        which_figure=WHICH_FIGURE,
        fewer=_fewer_steps(verification),
        scope=damage_scope(manifest.model, verification.control, manifest.steps, manifest.plain_damage),
        reused_seed=verification.seed in manifest.used_seeds,
        ranking=ranking,
        treatments=tuple(ROWS.items()),
        heatmap=Markup(heatmap.draw(profile, manifest.plan)),
        timeline=Markup(
            charts.timeline(schedule, log_snr.tolist(), [engine.step_ms for engine in engines], manifest.full.step_ms)
        ),
        controls_chart=Markup(charts.controls(verification, better)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    title: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _EngineRow:
    number: int
    colour: str
    ranges: str
    steps: int
    step_ms: float
    ratio: float
    removed: int
    named: tuple[tuple[str, tuple[str, ...]], ...]
    """Components by treatment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ControlRow:
    name: str
    description: str
    time_ratio: float
    damage: Damage
    rank: str
    """"plan", "better" or "other"; also the CSS class of the row."""
    converged: Estimate | None
    """Distance to the converged trajectory, relative L2; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _FewerSteps:
    ratio: float
    """Damage of the plan / damage of sampling with fewer steps."""
    time_ratio: float
    damage: Estimate


def _sample_sheets(full: Array, pruned: Array) -> tuple[int, tuple[_Sheet, ...]]:
    """Draw samples and their difference.

    Returns:
        The factor that amplifies the difference, and three pictures.
    """
    batch, _, _, width = full.shape
    columns = min(batch, max(2, min(8, _SHEET_WIDTH // max(width, 128))))
    original, changed = np.split(pictures.to_visible(np.concatenate([full[:columns], pruned[:columns]])), 2)
    difference = changed - original
    factor = _amplification(difference)
    named = {"full model": original, "pruned by the plan": changed, f"difference × {factor}": difference * factor}
    sheets = (_Sheet(title=title, source=_data_url(pictures.grid(array, columns))) for title, array in named.items())
    return factor, tuple(sheets)


def _amplification(difference: Array) -> int:
    """Choose the largest factor at which 99.5 % of the differences stay within the range of a pixel."""
    large = float(np.quantile(np.abs(difference), 0.995))
    return max((factor for factor in _FACTORS if factor * large <= 1), default=1)


def _data_url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(pictures.png_bytes(picture)).decode()}"


def _engine_rows(manifest: Manifest, verification: Verification) -> tuple[_EngineRow, ...]:
    plan = manifest.plan
    return tuple(
        _EngineRow(
            number=number,
            colour=charts.engine_colour(number),
            ranges="; ".join(_range(plan, phase) for phase in plan.phases if number in phase.cycle),
            steps=use.steps,
            step_ms=use.step_ms,
            ratio=use.step_ms / manifest.full.step_ms,
            removed=use.removed,
            named=_by_treatment(engine.treatments),
        )
        for number, (engine, use) in enumerate(zip(plan.engines, verification.engines, strict=True))
    )


def _by_treatment(treatments: dict[str, Any]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    kinds = sorted(set(treatments.values()))
    return tuple((kind.value, tuple(name for name, own in treatments.items() if own is kind)) for kind in kinds)


def _range(plan: Plan, phase: Phase) -> str:
    first, last = phase is plan.phases[0], phase is plan.phases[-1]
    low, high = charts.number(phase.low), charts.number(phase.high)
    text = "all" if first and last else f"below {high}" if first else f"above {low}" if last else f"{low} to {high}"
    return text if len(phase.cycle) == 1 else f"{text}, alternating"


def _control_rows(verification: Verification, better: Sequence[str]) -> tuple[_ControlRow, ...]:
    converged = verification.converged
    plan = _ControlRow(
        name="plan",
        description="this bundle",
        time_ratio=verification.time_ratio,
        damage=verification.damage,
        rank="plan",
        converged=None if converged is None else converged.plan.relative_l2,
    )
    rows = [
        _ControlRow(
            name=name,
            description=control.description,
            time_ratio=control.time_ratio,
            damage=control.damage,
            rank="better" if name in better else "other",
            converged=None if converged is None else converged.controls[name].relative_l2,
        )
        for name, control in verification.controls.items()
    ]
    return (plan, *sorted(rows, key=lambda row: row.damage.relative_l2.mean))


def _fewer_steps(verification: Verification) -> _FewerSteps | None:
    control = verification.controls.get("fewer_steps")
    if control is None or control.damage.relative_l2.mean == 0:
        return None
    damage = control.damage.relative_l2
    return _FewerSteps(
        ratio=verification.damage.relative_l2.mean / damage.mean, time_ratio=control.time_ratio, damage=damage
    )


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": charts.number,
        "percent": percent,
        "worth": lambda worth: charts.number(worth) if np.isfinite(worth) else "∞",
        "interval": lambda estimate: f"{charts.number(estimate.low)} to {charts.number(estimate.high)}",
        "megabytes": lambda size: f"{charts.number(size / 1e6)} MB",
    }
    return environment.from_string(resources.files(__package__).joinpath("template.html.j2").read_text("utf-8"))
