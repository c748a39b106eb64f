"""How do plans do on a model that nobody here has trained?

    python benchmarks/bench_terrain.py                       # hours on two cores; resumes
    python benchmarks/bench_terrain.py --only "terrain, ddpm 20"   # some regimes; the result keeps its other rows

`terrain.py` describes the model. Analyses, builds and verifies each regime through the command line. `same_time.py`
says which controls took the plan's time.

Writes `results/terrain.json`: damages and times of plans and controls, and how long each command took. Draws
`docs/images/terrain.png` from the first bundle: full model, plan, and their difference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from builds import Effort, Regime, Workplace, measured, row, table, unmeasured
from checkout import ROOT, commit
from command_line import add_only, add_results, chosen
from matplotlib import pyplot
from result_file import earlier, picture_of, write
from same_time import in_time, nearest_time
from terrain import download, make_pipeline

import unetc

REGIMES = (
    Regime(model="terrain", scheduler="ddpm", steps=20, budgets=(0.27, 0.5)),
    Regime(model="terrain", scheduler="dpmsolver++", steps=10, budgets=(0.27, 0.5)),
    Regime(model="terrain", scheduler="ddpm", steps=50, budgets=(0.27, 0.5)),
)
EFFORT = Effort(analysis=("--samples", "4", "--bins", "5", "--batch", "2"), rounds=4)
GOAL = 0.5
"""Most damage of a plan / damage of the best control."""


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every plan with the best control in its time, and count the seconds of the commands."""
    found = []
    for one in rows:
        what, plan, controls = f"{one['regime']}, budget {one['budget']:g}", one["plan"], one["controls"]
        if fair := [(own["damage"], name) for name, own in controls.items() if in_time(plan, own, GOAL)]:
            best, control = min(fair)
            value = plan["damage"] / best
            found.append({"figure": f"{what}: damage / {control}", "value": value, "goal": {"at_most": GOAL}})
        else:
            nearest = nearest_time(plan, controls.values())
            unlike = f"{what}: no control in the plan's time; nearest time / the plan's"
            found.append({"figure": unlike, "value": nearest})
        found += [
            {"figure": f"{what}: seconds of {command}", "value": seconds}
            for command, seconds in one["verification"]["seconds"].items()
        ]
    return found


def draw(bundle: Path, path: Path, *, count: int = 4) -> None:
    """Draw samples of the full model and of the plan, and how they differ."""
    session = unetc.load(bundle)
    full, planned = (session.sample(count, seed=2001, full_model=own)[:, 0] for own in (True, False))
    difference = planned - full
    figure, axes = pyplot.subplots(3, count, figsize=(2 * count, 6.3), layout="constrained")
    low, high = np.percentile(full, [1, 99])
    largest = float(np.abs(difference).max())
    for name, images, lines in (("full model", full, axes[0]), ("plan", planned, axes[1])):
        for axis, image in zip(lines, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high)
        lines[0].set_ylabel(name)
    for axis, image in zip(axes[2], difference, strict=True):
        axis.imshow(image, cmap="RdBu", vmin=-largest, vmax=largest)
    axes[2][0].set_ylabel("difference")
    figure.supxlabel(f"largest difference: {largest / (high - low):.1%} of the range of the full model's samples")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def record_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the result of some rows."""
    return {
        "figures": figures(rows),
        "tables": [table(rows, {"plan": "plan"})],
        "absent": unmeasured(rows, REGIMES),
        "rows": rows,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/terrain", help="caches and bundles")
    add_results(parser)
    add_only(parser)
    options = parser.parse_args()
    place = Workplace(ROOT, options.work / commit())
    place.folder.mkdir(parents=True, exist_ok=True)
    pipeline = options.work / "terrain"
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(download(Path(folder))).save_pretrained(pipeline)
    again = chosen(parser, options.only, (one.name for one in REGIMES))
    rows = earlier(options.results, "terrain", "regime", "budget", again=again)
    for regime in (one for one in REGIMES if one.name in again):
        for budget in regime.budgets:
            rows[regime.name, budget] = row(regime, budget, place.measure(regime, budget, EFFORT, str(pipeline)))
            write(options.results, "terrain", record_of(measured(rows, REGIMES)))
            if (regime, budget) == (REGIMES[0], REGIMES[0].budgets[0]):
                draw(place.folder / f"{regime.slug}-{budget:g}", picture_of(options.results, "terrain.png"))


if __name__ == "__main__":
    main()
