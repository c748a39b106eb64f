"""How much damage does a plan do, beside an older version of unetc and beside all controls, at equal measured time?

    python benchmarks/bench_heart.py                       # two to four hours on two cores; resumes
    python benchmarks/bench_heart.py --only "digits, ddpm"   # some regimes; the result keeps its other rows

Both versions analyse, build and verify every regime through their command lines, in turn, on the same machine. The
older one is checked out next to this one. Both verify on the same seed, so they start from the same noise.

Writes `results/heart.json`: damages and times of both, and of every control of the newer one. Each row names its commit
and its machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import ROOT, check_out, commit
from result_file import write

from unetc.environment import describe

HERE = Path(__file__).parent
OLDER = "a993132"
VERIFIED_SEED = 2001
"""Seed that no build uses."""
PEERS = ("uniform", "deep-hold", "random")
GOALS = {
    "older": 0.5,
    "steps_only": 1.0,
    "chosen_steps": 0.5,
}
"""Most damage of a plan / damage of what it is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A model with a way to sample it."""

    model: str
    scheduler: str
    steps: int
    budgets: tuple[float, ...]
    guidance: float | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return f"{self.model}, {self.scheduler} {self.steps}{guided}"


REGIMES = (
    Regime(model="digits", scheduler="dpmsolver++", steps=20, budgets=(0.27, 0.5)),
    Regime(model="prompted-digits", scheduler="dpmsolver++", steps=20, budgets=(0.27, 0.5), guidance=7.5),
    Regime(model="digits", scheduler="dpmsolver++", steps=8, budgets=(0.27,)),
    Regime(model="digits", scheduler="ddpm", steps=50, budgets=(0.27,)),
    Regime(model="digits", scheduler="ddim", steps=50, budgets=(0.27,)),
    Regime(model="prompted-digits", scheduler="ddpm", steps=100, budgets=(0.27,), guidance=7.5),
)


def run(sources: Path, *arguments: str) -> None:
    """Run the command line of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(sources / "src")}
    subprocess.run([sys.executable, "-m", "unetc", *arguments], check=True, env=environment)


def measured(
    sources: Path, regime: Regime, budget: float, work: Path, options: argparse.Namespace
) -> Mapping[str, Any]:
    """Analyse, build and verify with one version; finished parts are read again."""
    slug = regime.name.replace(", ", "-").replace(" ", "-").replace("+", "p")
    profile, bundle = work / f"{slug}.json", work / f"{slug}-{budget:g}"
    result = work / f"{slug}-{budget:g}.verification.json"
    common = ("--cache", str(work / "cache"))
    if not profile.exists():
        guidance = () if regime.guidance is None else ("--guidance-scale", f"{regime.guidance:g}")
        sampling = ("--scheduler", regime.scheduler, "--steps", str(regime.steps), "--samples", str(options.samples))
        run(sources, "analyze", regime.model, *sampling, *guidance, *common, "-o", str(profile))
    if not result.exists():
        asked = ("--profile", str(profile), "--budget", f"{budget:g}", "--steps", str(regime.steps))
        run(sources, "build", regime.model, *asked, *common, "-o", str(bundle))
        checked = ("--rounds", str(options.rounds), "--seed", str(VERIFIED_SEED))
        run(sources, "verify", str(bundle), *checked, "-o", str(result))
    verified: dict[str, Any] = json.loads(result.read_text())
    return verified


def row(regime: Regime, budget: float, older: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Put both versions and the controls of one build side by side."""
    controls = {
        name: {"time": one["time_ratio"], "damage": one["damage"]["relative_l2"]["mean"]}
        for name, one in newer["controls"].items()
    }
    return {
        "regime": regime.name,
        "budget": budget,
        "commit": commit(),
        "environment": describe(),
        "older": {"time": older["time_ratio"], "damage": older["damage"]["relative_l2"]["mean"]},
        "newer": {"time": newer["time_ratio"], "damage": newer["damage"]["relative_l2"]["mean"]},
        "asked": (1 - newer["time_ratio"]) / budget,
        "controls": controls,
        "loses_to": newer["loses_to"],
        "verification": newer,
    }


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare every row with the goals."""
    found = []
    for one in rows:
        what, own = f"{one['regime']}, budget {one['budget']:g}", one["newer"]["damage"]
        against = {"older": one["older"], **one["controls"]}
        if peers := [against[name] for name in PEERS if name in against]:
            against["best peer"] = min(peers, key=lambda peer: peer["damage"])
        for name, goal in {**GOALS, "best peer": 0.5}.items():
            if name in against:
                found.append(
                    {
                        "figure": f"{what}: damage / {OLDER if name == 'older' else name}",
                        "value": own / against[name]["damage"],
                        "goal": {"at_most": goal},
                    }
                )
        found.append(
            {"figure": f"{what}: saved / asked", "value": one["asked"], "goal": {"at_least": 1.0, "at_most": 1.05}}
        )
    return found


def table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write all damages in one table, each with its time."""
    names = list(dict.fromkeys(name for one in rows for name in one["controls"]))
    columns = ["regime", "budget", "commit", OLDER, "plan", *names]
    lines = []
    for one in rows:
        cells = [one["older"], one["newer"], *(one["controls"].get(name) for name in names)]
        shown = ["–" if cell is None else f"{cell['damage']:.4f} at {cell['time']:.3f}" for cell in cells]
        lines.append([one["regime"], one["budget"], one["commit"], *shown])
    return {"title": "relative L2 at time / full model", "columns": columns, "rows": lines}


def rows_of(results: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """Read the rows of an earlier result by regime and budget."""
    path = results / "heart.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(one["regime"], one["budget"]): one for one in rows}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/heart", help="caches and bundles")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--samples", type=int, default=4, help="trajectories of the analysis")
    parser.add_argument("--rounds", type=int, default=8, help="batches that every contender samples")
    parser.add_argument("--only", default="", help="measure only the regimes whose names begin with this")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    older = options.work / OLDER
    check_out(OLDER, older)
    folders = {ROOT: options.work / f"newer-{commit()}", older: options.work / "older"}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    rows = rows_of(options.results)
    for regime in (one for one in REGIMES if one.name.startswith(options.only)):
        for budget in regime.budgets:
            new, old = (measured(sources, regime, budget, work, options) for sources, work in folders.items())
            rows[regime.name, budget] = row(regime, budget, old, new)
            known = [rows[one.name, asked] for one in REGIMES for asked in one.budgets if (one.name, asked) in rows]
            write(options.results, "heart", {"figures": figures(known), "tables": [table(known)], "rows": known})


if __name__ == "__main__":
    main()
