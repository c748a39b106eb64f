"""The charts of the report over steps and controls, with the colours, style and number format of all its charts.

Each chart is a separate figure, returned as markup for a page. Blue always means the plan, red means a control that
does better than the plan, and brown means damage.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from unetc.artifacts.profile import Estimate
from unetc.artifacts.verification import Verification

INK, MUTED, FAINT, BLANK = "#1f2328", "#57606a", "#d0d7de", "#f1f3f5"
PLAN, BETTER = "#0b62a8", "#c1121f"
WIDTH = 10.6
"""Width of every chart in inches: the width of the page."""
_ENGINES = ("#6e7781", "#0b62a8", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#b8a000")
"""Grey for engine 0, which computes everything, then the palette of Okabe and Ito without its red."""
_SVG_LIMIT = 2**20
"""Most characters of an SVG; a larger chart becomes a PNG."""
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "hatch.linewidth": 0.9,
    "svg.fonttype": "none",
    "svg.hashsalt": "unetc",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": FAINT,
    "xtick.labelcolor": MUTED,
    "ytick.color": FAINT,
    "ytick.labelcolor": MUTED,
}
styled = matplotlib.rc_context(_STYLE)
"""Decorator that draws in the style of the report and restores matplotlib's settings afterwards."""


@styled
def timeline(schedule: Sequence[int], log_snr: Sequence[float], engine_ms: Sequence[float], full_ms: float) -> str:
    """Draw the time of every denoiser call in a sampling run.

    Args:
        schedule: Engine of every step.
        log_snr: Noise level of every step.
        engine_ms: Milliseconds per call of every engine.
        full_ms: Milliseconds per call of the full model.

    Returns:
        Markup of the chart.
    """
    figure = Figure((WIDTH, 2.5))
    axes = figure.add_axes((0.06, 0.19, 0.925, 0.6))
    highest, count = max(full_ms, *engine_ms), len(schedule)
    style: dict[str, Any] = {"width": 1, "edgecolor": "white", "linewidth": 0.7 if count <= 120 else 0}
    axes.bar(range(count), full_ms, color=BLANK, **style)
    axes.bar(range(count), [engine_ms[e] for e in schedule], color=[engine_colour(e) for e in schedule], **style)
    axes.axhline(full_ms, color=INK, linewidth=1, linestyle=(0, (5, 3)))
    axes.text(count - 0.5, full_ms + highest * 0.03, f"full model, {number(full_ms)} ms", ha="right", va="bottom")
    axes.set(xlim=(-0.6, count - 0.4), ylim=(0, highest * 1.16), xlabel="step", ylabel="ms per denoiser call")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _label_runs(axes, schedule, engine_ms)
    _add_log_snr(axes, log_snr)
    return inline(figure, "Milliseconds per denoiser call of every step, by engine")


def _label_runs(axes: Axes, schedule: Sequence[int], engine_ms: Sequence[float]) -> None:
    """Write the engine at the foot of every run of steps that is wide enough."""
    start, room, highest = 0, 0.925 * WIDTH / len(schedule), max(engine_ms)
    for engine, run in itertools.groupby(schedule):
        length = len(list(run))
        text = next((text for text in (f"engine {engine}", str(engine)) if 0.085 * len(text) < length * room), "")
        inside = engine_ms[engine] > 0.15 * highest
        ink = ink_on(engine_colour(engine)) if inside else INK
        axes.text(start + (length - 1) / 2, highest * 0.03, text, ha="center", color=ink, weight="bold")
        start += length


def _add_log_snr(axes: Axes, log_snr: Sequence[float]) -> None:
    steps = sorted({round(step) for step in np.linspace(0, len(log_snr) - 1, 9)})
    above = axes.secondary_xaxis("top")
    above.xaxis.set_major_locator(FixedLocator(steps))
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xticklabels([level(log_snr[step]) for step in steps])
    above.set_xlabel("log-SNR")
    above.spines[:].set_visible(False)
    above.tick_params(length=2, pad=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    name: str
    time_ratio: float
    damage: Estimate
    colour: str
    marker: str
    weight: str


@styled
def controls(verification: Verification, better: Sequence[str]) -> str:
    """Draw damage against time for the plan, the full model and all controls.

    Args:
        verification: Measurements of the plan and the controls.
        better: Names of the controls that do better than the plan, drawn in red.

    Returns:
        Markup of the chart.
    """
    points = _points(verification, better)
    left = min(verification.time_ratio_p10, *(point.time_ratio for point in points))
    right = max(point.time_ratio for point in points)
    top = 1.08 * max(0.001, *(point.damage.high for point in points))
    figure = Figure((WIDTH, 3.7))
    axes = figure.add_axes((0.06, 0.13, 0.925, 0.84))
    axes.set(xlim=(left - 0.04, max(right + 0.1, 1.02)), ylim=(-0.03 * top, top))
    axes.set(xlabel="time / time of the full model", ylabel="damage, relative L2")
    _draw_plan(axes, verification)
    if "full" not in verification.controls:
        axes.plot(1, 0, "s", color=engine_colour(0), markersize=6)
        axes.annotate("full model", (1, 0), (0, 7), textcoords="offset points", ha="center", color=MUTED)
    for point, height in zip(points, _spread([point.damage.mean for point in points], 0.06 * top), strict=True):
        _draw_point(axes, point, (right + 0.012, height))
    return inline(figure, "Damage against time of the plan and of the controls")


def _points(verification: Verification, better: Sequence[str]) -> list[_Point]:
    """List the points of the plan and the controls, by rising damage."""
    plan = _Point(
        name="plan",
        time_ratio=verification.time_ratio,
        damage=verification.damage.relative_l2,
        colour=PLAN,
        marker="D",
        weight="bold",
    )
    others = [
        _Point(
            name=name,
            time_ratio=control.time_ratio,
            damage=control.damage.relative_l2,
            colour=BETTER if name in better else MUTED,
            marker="X" if name in better else "o",
            weight="bold" if name in better else "normal",
        )
        for name, control in verification.controls.items()
    ]
    return sorted([plan, *others], key=lambda point: point.damage.mean)


def _draw_plan(axes: Axes, verification: Verification) -> None:
    """Draw the spread of the plan's times, and the region where a control would be better."""
    damage, left = verification.damage.relative_l2.mean, axes.get_xlim()[0]
    slowest = verification.time_ratio_p90
    axes.add_patch(Rectangle((left, 0), slowest - left, damage, facecolor="#fbeaea", edgecolor="none"))
    axes.annotate("better than the plan", (left, 0), (6, 3), textcoords="offset points", color=BETTER, fontsize=7.5)
    axes.plot([verification.time_ratio_p10, slowest], [damage, damage], color=PLAN, linewidth=1.4)


def _draw_point(axes: Axes, point: _Point, label: tuple[float, float]) -> None:
    place = (point.time_ratio, point.damage.mean)
    interval = [point.damage.low, point.damage.high]
    axes.plot([point.time_ratio] * 2, interval, color=point.colour, linewidth=1.4)
    axes.plot(*place, point.marker, color=point.colour, markersize=7, zorder=4 if point.marker == "X" else 3)
    leader = {"arrowstyle": "-", "color": FAINT, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5}
    text = f"{shorten(point.name)}  {number(point.damage.mean)}"
    axes.annotate(text, place, label, color=point.colour, weight=point.weight, va="center", arrowprops=leader)


def _spread(rising: Sequence[float], gap: float) -> list[float]:
    """Raise increasing values until each is at least `gap` above the previous one."""
    return list(itertools.accumulate(rising, lambda below, value: max(value, below + gap)))


def engine_colour(engine: int) -> str:
    """Choose the colour of an engine; after the end of the palette, all colours but grey repeat."""
    return _ENGINES[0] if engine == 0 else _ENGINES[1 + (engine - 1) % (len(_ENGINES) - 1)]


def ink_on(colour: str | tuple[float, float, float, float]) -> str:
    """Choose dark or white text for a background."""
    red, green, blue = to_rgb(colour)
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"


def number(value: float) -> str:
    """Format a number with three significant digits and a typographic minus sign."""
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.2g}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}".replace("-", "−")


def level(log_snr: float) -> str:
    """Format a noise level."""
    return f"{log_snr:.1f}".replace("-", "−")


def shorten(name: str) -> str:
    """Cut the middle out of a name that is too long for a chart."""
    return name if len(name) <= 56 else f"{name[:27]}…{name[-28:]}"


def inline(figure: Figure, label: str, limit: int = _SVG_LIMIT) -> str:
    """Turn a figure into self-contained markup.

    Args:
        figure: The chart.
        label: Description of the chart, for readers who cannot see it.
        limit: Most characters of an SVG; a larger chart becomes a PNG.

    Returns:
        An `<svg>` or an `<img>` element.
    """
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg, described = text.getvalue(), html.escape(label)
    if len(svg) <= limit:
        # Group identifiers repeat from figure to figure, and nothing refers to them.
        body = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])
        return body.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=160)
    return f'<img alt="{described}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
