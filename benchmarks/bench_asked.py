"""Does a plan save the requested share of time, on every available target?

    python benchmarks/bench_asked.py             # about 30 minutes on two cores; analyses are cached

The benchmark analyses the reference model on every target, builds one bundle per budget, and samples on new seeds.
Full model and plan sample the same noise alternately. Every pass goes through all bundles, so that a disturbance of the
machine that lasts a minute affects all of them. Writes `results/asked.json`: the share of the full model's sampling
time that is saved / the budget, from the median over the passes. Targets where torch compiles the engines are left out:
an engine takes half a minute to compile, and an analysis measures a hundred.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from command_line import add_results
from result_file import write

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.cli.output import progress
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.errors import UnetcError
from unetc.models.find import find_model
from unetc.progress import OnProgress
from unetc.runtime.backends.registry import OFFERED
from unetc.runtime.bundle import Bundle

BUDGETS = (0.27, 0.5)
GOAL = {"at_least": 1.0, "at_most": 1.05}


def built(target: str, budget: float, options: argparse.Namespace, on_progress: OnProgress) -> Bundle:
    """Build a bundle for one target and budget."""
    path = options.work / f"asked-{target.replace(':', '-')}-{budget:g}"
    analysis = AnalysisOptions(samples=options.samples, target=target)
    building = BuildOptions(plan=PlanOptions(budget=budget), controls=False)
    model = find_model("digits")
    profile = analyze_model(model, analysis, cache=options.work, on_progress=on_progress)
    build(model, profile, path, building, cache=options.work, on_progress=on_progress)
    return Bundle.open(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundles")
    add_results(parser)
    parser.add_argument("--samples", type=int, default=8, help="trajectories of the analysis")
    parser.add_argument("--rounds", type=int, default=6, help="batches that full model and plan sample alternately")
    parser.add_argument("--passes", type=int, default=5, help="passes over all bundles")
    options = parser.parse_args()
    bundles: dict[tuple[str, float], Bundle] = {}
    absent: dict[str, str] = {}
    with progress() as on_progress:
        for target in OFFERED:
            if ":compiled" in target:
                absent[target] = "takes half a minute and more for an engine, and an analysis measures a hundred"
                continue
            try:
                bundles |= {(target, budget): built(target, budget, options, on_progress) for budget in BUDGETS}
            except UnetcError as error:
                absent[target] = str(error)
        verifying = VerifyOptions(rounds=options.rounds)
        verified = [[verify(one, verifying, on_progress) for one in bundles.values()] for _ in range(options.passes)]
    rows = []
    for (target, budget), results in zip(bundles, zip(*verified, strict=True), strict=True):
        ratios = [result.time_ratio for result in results]
        asked = (1 - float(np.median(ratios))) / budget
        damage = results[0].damage.relative_l2.mean
        rows.append([target, budget, float(np.median(ratios)), min(ratios), max(ratios), asked, damage])
    figures = [
        {"figure": f"{target}, budget {budget}: time saved / budget", "value": asked, "goal": GOAL}
        for target, budget, _, _, _, asked, _ in rows
    ]
    columns = ["target", "budget", "time / full", "least", "most", "saved / budget", "relative L2"]
    measured = {
        "settings": {
            "model": "digits",
            "steps": 50,
            **{name: getattr(options, name) for name in ("samples", "rounds", "passes")},
        },
        "figures": figures,
        "tables": [{"title": "Plans of the fast planner, repaired", "columns": columns, "rows": rows}],
        "absent": absent,
    }
    write(options.results, "asked", measured)


if __name__ == "__main__":
    main()
