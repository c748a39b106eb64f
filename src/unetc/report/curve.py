"""The curve of a search: damage against time for every sampled plan, and the least damage at each time."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from unetc.artifacts.pareto import Pareto

from .charts import FAINT, MUTED, PLAN, WIDTH, inline, number, styled

LABEL_SHARE = 0.05
"""Width of a label as a share of the chart's width; of points closer than this, only the first one gets a label."""


@styled
def draw(curve: Pareto) -> str:
    """Draw a curve, with damage on a logarithmic scale.

    Args:
        curve: Sampled plans of a search.

    Returns:
        Markup of the chart, a self-contained SVG.
    """
    figure = Figure((WIDTH, 4.4))
    axes = figure.add_axes((0.07, 0.12, 0.86, 0.8))
    front = curve.front()
    others = [point for point in curve.points if point not in front]
    axes.set(yscale="log", xlabel="time / time of the full model", ylabel="damage, relative L2")
    axes.plot([p.time_ratio for p in others], [_damage(p.damage.relative_l2.mean) for p in others], "o", color=FAINT)
    axes.plot(
        [p.time_ratio for p in front],
        [_damage(p.damage.relative_l2.mean) for p in front],
        "D-",
        color=PLAN,
        markersize=5,
        linewidth=1.2,
    )
    room = LABEL_SHARE * (axes.get_xlim()[1] - axes.get_xlim()[0])
    end = -np.inf
    for point in front:  # fastest first
        if point.time_ratio < end:
            continue
        place = (point.time_ratio, _damage(point.damage.relative_l2.mean))
        text = f"{point.damage.psnr.mean:.0f} dB"
        axes.annotate(text, place, (5, 5), textcoords="offset points", color=MUTED, fontsize=7.5)
        end = point.time_ratio + room
    _finish(axes, curve)
    return inline(figure, "Damage against time of all sampled plans, and the least damage at each time")


def _damage(value: float) -> float:
    """Limit a damage from below, because a logarithmic scale has no zero."""
    return max(value, 1e-6)


def _finish(axes: Axes, curve: Pareto) -> None:
    axes.grid(axis="y", which="major", color=FAINT, linewidth=0.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_title(
        f"{curve.model.title}, {curve.steps} steps, {curve.target}: {len(curve.points)} plans, {curve.samples} samples",
        loc="left",
        fontsize=8,
        color=MUTED,
    )
