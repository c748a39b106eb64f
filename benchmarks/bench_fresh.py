"""How often does a fresh build save the share of time that was asked for?

    python benchmarks/bench_fresh.py     # about an hour on one core; resumes

Every build measures and searches anew, from one profile for each number of steps, and another process verifies it on
new seeds. One of the bundles is verified as often as there are builds: its scatter comes from the clock and the machine
alone, and no build can be judged more finely. Writes `results/fresh.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from builds import VERIFIED_SEED, Workplace
from checkout import ROOT
from command_line import add_results
from result_file import write

MODEL, SCHEDULER, BUDGET = "digits", "ddim", 0.27
STEPS = 50, 20
BUILDS = 10
LEAST, MOST = 1.0, 1.05
"""Accepted time saved / time asked for."""
ENOUGH = 9
"""Least number of builds within these."""


def saved(place: Workplace, bundle: Path, number: int, rounds: int) -> float:
    """Verify a bundle in another process; return time saved / time asked for."""
    result = bundle.with_name(f"{bundle.name}.verification-{number}.json")
    asked = "--rounds", str(rounds), "--seed", str(VERIFIED_SEED), "--no-converged"  # only the time is of interest
    place.make(result, "verify", str(bundle), *asked)
    ratio: float = json.loads(result.read_text())["time_ratio"]
    return (1 - ratio) / BUDGET


def measure(place: Workplace, steps: int, rounds: int) -> dict[str, Any]:
    """Build and verify at a number of steps."""
    profile, sampling = place.folder / f"{steps}.json", ("--steps", str(steps))
    cache = ("--cache", str(place.folder / "cache"))
    place.make(profile, "analyze", MODEL, "--scheduler", SCHEDULER, *sampling, "--samples", "8", *cache)
    asked = ("--profile", str(profile), "--budget", f"{BUDGET:g}", *sampling, "--no-controls")
    builds, again = [], []
    for number in range(BUILDS):
        bundle = place.folder / f"{steps}-{number}"
        place.make(bundle, "build", MODEL, *asked, *cache)
        builds.append(saved(place, bundle, 0, rounds))
        again.append(saved(place, place.folder / f"{steps}-0", 1 + number, rounds))
    return {"steps": steps, "builds": builds, "one_bundle_again": again}


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count the builds that meet the budget, and describe both scatters."""
    found: list[dict[str, Any]] = []
    for one in rows:
        what = f"{MODEL}, {SCHEDULER} {one['steps']}, budget {BUDGET:g}"
        for key, words in (("builds", f"{BUILDS} fresh builds"), ("one_bundle_again", f"one bundle, {BUILDS} times")):
            values = np.array(one[key])
            within = int(((values >= LEAST) & (values <= MOST)).sum())
            goal = {"goal": {"at_least": ENOUGH}} if key == "builds" else {}
            found += [
                {"figure": f"{what}, {words}: saved / asked within {LEAST:g} and {MOST:g}", "value": within, **goal},
                {"figure": f"{what}, {words}: median of saved / asked", "value": float(np.median(values))},
                {"figure": f"{what}, {words}: standard deviation of saved / asked", "value": float(values.std(ddof=1))},
            ]
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/fresh", help="profiles and bundles")
    add_results(parser)
    parser.add_argument("--rounds", type=int, default=30, help="batches that full model and plan sample alternately")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    place = Workplace(ROOT, options.work)
    rows = [measure(place, steps, options.rounds) for steps in STEPS]
    settings = {"model": MODEL, "scheduler": SCHEDULER, "budget": BUDGET, "rounds": options.rounds}
    write(options.results, "fresh", {"settings": settings, "figures": figures(rows), "rows": rows})


if __name__ == "__main__":
    main()
