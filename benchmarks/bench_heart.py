"""How much damage does a plan do, beside an older version of unetc and beside all controls, at equal measured time?

    python benchmarks/bench_heart.py                       # two to four hours on two cores; resumes
    python benchmarks/bench_heart.py --only "digits, ddpm"   # some regimes; the result keeps its other rows

Both versions analyse, build and verify every regime through their command lines, in turn, on the same machine. The
older one is checked out next to this one. Both verify on the same seed, so they start from the same noise.

`same_time.py` says which contenders took the plan's time. The best peer does the least damage of all `PEERS` that did.

Writes `results/heart.json`: damages and times of both, and of every control of the newer one. Each row names its commit
and its machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builds import Effort, Regime, Workplace, measured, outcome, row, table, unmeasured
from checkout import ROOT, check_out, commit
from command_line import add_only, add_results, chosen
from result_file import earlier, write
from same_time import in_time, nearest_time

OLDER = "a993132"
GOALS = {
    OLDER: 0.5,
    "steps_only": 1.0,
    "chosen_steps": 0.5,
    "best peer": 0.5,
}
"""Most damage of a plan / damage of the contender."""
PEERS = ("fewer_steps", "other_solver", "uniform", "deep-hold", "random")
"""Controls of other kinds than the plan. The others are special cases of it, chosen by the same planner."""

REGIMES = (
    Regime(model="digits", scheduler="dpmsolver++", steps=20, budgets=(0.27, 0.5)),
    Regime(model="prompted-digits", scheduler="dpmsolver++", steps=20, budgets=(0.27, 0.5), guidance=7.5),
    Regime(model="digits", scheduler="dpmsolver++", steps=8, budgets=(0.27,)),
    Regime(model="digits", scheduler="ddpm", steps=50, budgets=(0.27,)),
    Regime(model="digits", scheduler="ddim", steps=50, budgets=(0.27,)),
    Regime(model="prompted-digits", scheduler="ddpm", steps=100, budgets=(0.27,), guidance=7.5),
)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every row with the goals."""
    found = []
    for one in rows:
        what, plan, controls = f"{one['regime']}, budget {one['budget']:g}", one["plan"], one["controls"]
        others = {OLDER: [one["older"]], **{name: [own] for name, own in controls.items()}}
        others["best peer"] = [controls[name] for name in PEERS if name in controls]
        for name, goal in GOALS.items():
            those = others.get(name, [])
            if counting := [other for other in those if in_time(plan, other, goal)]:
                value = plan["damage"] / min(other["damage"] for other in counting)
                found.append({"figure": f"{what}: damage / {name}", "value": value, "goal": {"at_most": goal}})
            elif those:
                unlike = f"{what}: no damage / {name}, as the times differ; nearest time / the plan's"
                found.append({"figure": unlike, "value": nearest_time(plan, those)})
        found.append(
            {"figure": f"{what}: saved / asked", "value": one["asked"], "goal": {"at_least": 1.0, "at_most": 1.05}}
        )
    return found


def record_of(rows: list[dict[str, Any]], settings: Mapping[str, object]) -> dict[str, Any]:
    """Make the result of some rows."""
    tables = [table(rows, {OLDER: "older", "plan": "plan"})]
    return {
        "settings": settings,
        "figures": figures(rows),
        "tables": tables,
        "absent": unmeasured(rows, REGIMES),
        "rows": rows,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/heart", help="caches and bundles")
    add_results(parser)
    parser.add_argument("--samples", type=int, default=4, help="trajectories of the analysis")
    parser.add_argument("--rounds", type=int, default=8, help="batches that every contender samples")
    add_only(parser)
    options = parser.parse_args()
    effort = Effort(analysis=("--samples", str(options.samples)), rounds=options.rounds)
    again = chosen(parser, options.only, (one.name for one in REGIMES))
    settings = {"samples": options.samples, "rounds": options.rounds}
    rows = earlier(options.results, "heart", "regime", "budget", again=again, settings=settings)
    check_out(OLDER, options.work / OLDER)
    newer = Workplace(ROOT, options.work / f"newer-{commit()}")
    older = Workplace(options.work / OLDER, options.work / "older")
    for place in (newer, older):
        place.folder.mkdir(parents=True, exist_ok=True)
    for regime in (one for one in REGIMES if one.name in again):
        for budget in regime.budgets:
            own, other = (place.measure(regime, budget, effort) for place in (newer, older))
            rows[regime.name, budget] = row(regime, budget, own) | {"older": outcome(other), "settings": settings}
            write(options.results, "heart", record_of(measured(rows, REGIMES), settings))


if __name__ == "__main__":
    main()
