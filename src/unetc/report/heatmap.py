"""The heatmap of the report: damage by component and noise level, the plan's treatments, and the components' costs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from unetc.artifacts.plan import Assignment, Plan
from unetc.artifacts.profile import STEP, Bin, Effect, Profile
from unetc.treatments import Treatment

from .charts import BLANK, FAINT, INK, MUTED, PLAN, WIDTH, engine_colour, ink_on, inline, level, number, shorten, styled

_RAMP = ("#fff9ee", "#fbe6c3", "#f2c792", "#dfa067", "#bd7341", "#874620")
_DAMAGE = LinearSegmentedColormap.from_list("damage", _RAMP, 64)
_BROKEN = "#5b4b8a"
"""Colour of ablations that end in NaN or infinity."""
_MARKERS = {"residual": "o", "skip": "D", "level": "v", "step": "s", "guidance": "^"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovedCell:
    """A cell of the heatmap: a component that the plan does not always compute in a bin."""

    component: str
    bin: int
    treatment: Treatment
    named: bool
    """Whether the plan names the component itself; otherwise it is nested in a component that the plan names."""
    always: bool
    """Whether every engine of the phase leaves the component out; otherwise only some of the alternating engines do."""


def removed_cells(profile: Profile, plan: Plan) -> tuple[RemovedCell, ...]:
    """List the cells that the plan removes, by component and bin; the centre of a bin decides its phase."""
    nested = {component.name: component.nested for component in profile.components}
    removed = [_removed_by(engine, nested) for engine in plan.engines]
    centres = [(low + high) / 2 for low, high in itertools.pairwise(_borders(profile.bins))]
    cells = []
    for component, (bin, centre) in itertools.product(profile.components, enumerate(centres)):
        cycle = plan.phases[sum(1 for later in plan.phases[1:] if centre >= later.low)].cycle
        if hits := [removed[engine][component.name] for engine in cycle if component.name in removed[engine]]:
            treatment, named = max(hits, key=lambda hit: hit[1])
            always = len(hits) == len(cycle)
            cells.append(
                RemovedCell(component=component.name, bin=bin, treatment=treatment, named=named, always=always)
            )
    return tuple(cells)


def _removed_by(engine: Assignment, nested: dict[str, tuple[str, ...]]) -> dict[str, tuple[Treatment, bool]]:
    """Map each component that an engine does not compute to its treatment and whether the engine names it."""
    carried = {
        child: (treatment, False) for name, treatment in engine.treatments.items() for child in nested.get(name, ())
    }
    return carried | {name: (treatment, True) for name, treatment in engine.treatments.items()}


def _borders(bins: Sequence[Bin]) -> list[float]:
    """List the borders of the bins, with finite outer borders in place of infinity."""
    inner = [bin.low for bin in bins[1:]]
    if not inner:
        return [bins[0].low, bins[0].high]
    margin = max(inner[-1] - inner[0], 1.0)
    return [max(bins[0].low, inner[0] - margin), *inner, min(bins[-1].high, inner[-1] + margin)]


@styled
def draw(profile: Profile, plan: Plan) -> str:
    """Draw the heatmap; its height grows with the number of components.

    Args:
        profile: Profile of a model.
        plan: Plan made from the profile.

    Returns:
        Markup of the chart.
    """
    sheet = _Sheet(profile)
    cells = removed_cells(profile, plan)
    _draw_damage(sheet, profile, {(cell.component, cell.bin) for cell in cells})
    _draw_broken(sheet, profile)
    _draw_removed(sheet, cells)
    _draw_phases(sheet, profile, plan)
    _draw_kinds(sheet, profile)
    _draw_costs(sheet, profile, {cell.component for cell in cells})
    return inline(sheet.figure, "Damage of removing each component at each noise level, and the plan's treatments")


class _Sheet:
    """The axes of the heatmap: one row per component, each of the same fixed height."""

    def __init__(self, profile: Profile) -> None:
        rows, bins = len(profile.components), len(profile.bins)
        self.rows = {component.name: row for row, component in enumerate(profile.components)}
        self.font = 7.5 if rows <= 48 else 6.5
        names = 0.2 + self.font * 0.0083 * max(len(shorten(name)) for name in self.rows)
        above, below, marks, cost = 0.85, 0.5, 0.2, 2.0
        tall = rows * self.font * 0.0305
        height = above + tall + below
        self.figure = Figure((WIDTH, height))

        def axes(left: float, base: float, width: float, tall: float) -> Axes:
            return self.figure.add_axes((left / WIDTH, base / height, width / WIDTH, tall / height))

        left, right = names + marks, WIDTH - cost - 0.1
        wide = right - left - 0.35
        self.kinds = axes(names, below, marks, tall)
        self.heat = axes(left, below, wide, tall)
        self.strip = axes(left, below + tall + 0.24, wide, 0.19)
        self.cost = axes(right, below, cost, tall)
        self.scale = axes(right, height - 0.3, cost, 0.1)
        for part in (self.kinds, self.heat, self.cost):
            part.set(ylim=(rows, 0), yticks=[])
        for part in (self.heat, self.strip):
            part.set(xlim=(0, bins))
        for part in (self.kinds, self.heat, self.strip):
            part.spines[:].set_visible(False)

    def write(self, column: float, row: float, text: str, **style: Any) -> None:
        """Write text into the middle of a cell."""
        centred: dict[str, Any] = {"fontsize": self.font, "ha": "center", "va": "center_baseline"}
        self.heat.text(column + 0.5, row + 0.5, text, **centred | style)


def _draw_damage(sheet: _Sheet, profile: Profile, planned: set[tuple[str, int]]) -> None:
    damages = np.full((len(profile.components), len(profile.bins)), np.nan)
    least = _least_damage(profile)
    for (name, bin), effect in least.items():
        damages[sheet.rows[name], bin] = effect.relative_l2.mean
    norm = _damage_norm(damages)
    sheet.heat.set_facecolor(BLANK)
    sheet.heat.pcolormesh(np.ma.masked_invalid(damages), cmap=_DAMAGE, norm=norm, edgecolors="white", linewidth=0.6)
    for (name, bin), effect in least.items():
        if effect.measured and (name, bin) not in planned:
            row = sheet.rows[name]
            ink = ink_on(_DAMAGE(float(norm(damages[row, bin]))))
            sheet.write(bin, row, effect.treatment.row.letter, color=ink, alpha=0.7)
    _draw_scales(sheet, norm, _borders(profile.bins))


def _draw_broken(sheet: _Sheet, profile: Profile) -> None:
    """Fill the cells in which every ablation ends in NaN or infinity; in a cell where only some do, fill a corner."""
    sound = {(effect.component, effect.bin) for effect in profile.effects}
    for name, bin in dict.fromkeys((one.component, one.bin) for one in profile.broken):
        row = sheet.rows[name]
        if (name, bin) in sound:
            corner = [(bin + 0.78, row + 1), (bin + 1, row + 1), (bin + 1, row + 0.5)]
            sheet.heat.add_patch(Polygon(corner, facecolor=_BROKEN, linewidth=0))
        else:
            sheet.heat.add_patch(Rectangle((bin, row), 1, 1, facecolor=_BROKEN, edgecolor="white", linewidth=0.6))


def _least_damage(profile: Profile) -> dict[tuple[str, int], Effect]:
    """Find the least harmful treatment of every component in every bin."""
    best_first = sorted(profile.effects, key=lambda effect: effect.relative_l2.mean)
    return {(effect.component, effect.bin): effect for effect in reversed(best_first)}


def _damage_norm(damages: NDArray[np.float64]) -> LogNorm:
    """Scale colours to the range of damages, at most four decades; zero damage gets the lightest colour."""
    positive = damages[damages > 0]
    high = float(positive.max(initial=1e-6))
    low = max(float(positive.min(initial=high)), high * 1e-4)
    return LogNorm(min(low, high / 10), high, clip=True)


def _draw_scales(sheet: _Sheet, norm: LogNorm, borders: Sequence[float]) -> None:
    bar = sheet.figure.colorbar(ScalarMappable(norm, _DAMAGE), cax=sheet.scale, orientation="horizontal")
    bar.ax.spines[:].set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.set_title("damage, relative L2", fontsize=8, color=MUTED, loc="left", pad=3)
    shown = range(0, len(borders), 1 + len(borders) // 16)
    sheet.heat.set_xticks(list(shown), [level(borders[i]) for i in shown])
    sheet.heat.tick_params(top=True, labeltop=True, length=2, pad=2)
    sheet.heat.set_xlabel("log-SNR at the borders of the bins: much noise on the left, little on the right")


def _draw_removed(sheet: _Sheet, cells: Sequence[RemovedCell]) -> None:
    """Frame the cells that the plan removes; neighbouring bins with the same treatment share a frame.

    Removing the step removes every component, so the other cells of its column are not hatched.
    """
    whole = {cell.bin for cell in cells if cell.component == STEP}
    shown = [cell for cell in cells if cell.named or cell.bin not in whole]
    ordered = sorted(shown, key=lambda cell: (sheet.rows[cell.component], cell.bin))
    for _, run in itertools.groupby(enumerate(ordered), _frame_of):
        first, *others = (cell for _, cell in run)
        _draw_frame(sheet, first, 1 + len(others))


def _frame_of(numbered: tuple[int, RemovedCell]) -> tuple[object, ...]:
    """Compute a key shared by neighbours: bin minus position is constant over consecutive bins."""
    position, cell = numbered
    return cell.component, cell.treatment, cell.named, cell.always, cell.bin - position


def _draw_frame(sheet: _Sheet, cell: RemovedCell, length: int) -> None:
    left, row = cell.bin, sheet.rows[cell.component]
    style: dict[str, Any] = {"fill": False, "edgecolor": PLAN}
    if not cell.named:
        sheet.heat.add_patch(Rectangle((left, row), length, 1, linewidth=0, hatch="////", **style))
        return
    line = "solid" if cell.always else (0, (3, 1.5))
    frame = Rectangle((left + 0.05, row + 0.09), length - 0.1, 0.82, linewidth=1.4, linestyle=line, **style)
    sheet.heat.add_patch(frame)
    badge = {"boxstyle": "round,pad=0.12", "facecolor": PLAN, "edgecolor": "none"}
    letter, middle = cell.treatment.row.letter.upper(), left + (length - 1) / 2
    sheet.write(middle, row, letter, color="white", weight="bold", fontsize=sheet.font - 1, bbox=badge)


def _draw_phases(sheet: _Sheet, profile: Profile, plan: Plan) -> None:
    bins = len(profile.bins)
    starts = [phase.low for phase in plan.phases[1:]]
    columns = np.interp(starts, _borders(profile.bins), range(bins + 1)).tolist()
    for column in columns:
        sheet.heat.axvline(column, color=PLAN, linewidth=1.6)
    for phase, (left, right) in zip(plan.phases, itertools.pairwise([0, *columns, bins]), strict=True):
        _draw_cycle(sheet.strip, phase.cycle, left, right)
    sheet.strip.set(ylim=(0, 1), xticks=[], yticks=[0.5], yticklabels=["engine"])
    sheet.strip.tick_params(length=0)


def _draw_cycle(strip: Axes, cycle: Sequence[int], left: float, right: float) -> None:
    """Draw the engines of a phase as equal parts of its width."""
    parts = itertools.pairwise(np.linspace(left, right, len(cycle) + 1))
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "weight": "bold", "clip_on": True}
    for engine, (start, end) in zip(cycle, parts, strict=True):
        colour = engine_colour(engine)
        strip.add_patch(Rectangle((start, 0), end - start, 1, facecolor=colour, edgecolor="white"))
        strip.text((start + end) / 2, 0.5, str(engine), color=ink_on(colour), **style)


def _draw_kinds(sheet: _Sheet, profile: Profile) -> None:
    for kind, marker in _MARKERS.items():
        rows = [row + 0.5 for row, component in enumerate(profile.components) if component.kind == kind]
        sheet.kinds.scatter([0.5] * len(rows), rows, s=11, marker=marker, color=MUTED, linewidths=0)
    sheet.kinds.set(xlim=(0, 1), xticks=[])
    sheet.kinds.set_yticks([row + 0.5 for row in sheet.rows.values()], [shorten(name) for name in sheet.rows])
    sheet.kinds.tick_params(length=0, pad=1, labelsize=sheet.font, labelcolor=INK)
    handles = [Line2D([], [], linestyle="", marker=m, markersize=4, color=MUTED, label=k) for k, m in _MARKERS.items()]
    if profile.broken:
        handles.append(Line2D([], [], linestyle="", marker="s", markersize=5, color=_BROKEN, label="NaN or infinity"))
    layout: dict[str, Any] = {"ncols": 3, "handletextpad": 0, "columnspacing": 1, "borderpad": 0}
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    sheet.strip.legend(handles=handles, frameon=False, labelcolor=MUTED, **place, **layout)


def _draw_costs(sheet: _Sheet, profile: Profile, planned: set[str]) -> None:
    for cost in profile.costs:
        saved, row = cost.saved_ms, sheet.rows[cost.component] + 0.5
        sheet.cost.barh(row, saved.mean, 0.62, color=PLAN if cost.component in planned else "#b6bec7")
        sheet.cost.plot([saved.low, saved.high], [row, row], color=INK, linewidth=0.8)
    sheet.cost.axvline(0, color=FAINT, linewidth=0.8)
    sheet.cost.spines["left"].set_visible(False)
    sheet.cost.xaxis.set_major_locator(MaxNLocator(4))
    sheet.cost.tick_params(top=True, labeltop=True, length=2, pad=2)
    sheet.cost.set_xlabel(f"cost: ms saved of {number(profile.full_ms.mean)} per call")
