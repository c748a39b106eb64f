"""Does a plan save the time that was asked for, on every target that works here?

    python benchmarks/bench_asked.py             # about 25 minutes on two cores; resumes

Analyses the reference model on every target, builds a bundle for it per budget, and samples on new seeds: full model
and plan in turns, at the same noise. Writes `results/asked.json`: the share of the full model's sampling time that is
saved / the budget. A target that takes minutes to compile an engine is left out, as an analysis measures a hundred.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from unetc.analyzer.analysis import AnalysisOptions
from unetc.cli.output import progress
from unetc.compiler.planner import PlanOptions
from unetc.environment import describe
from unetc.errors import UnetcError
from unetc.progress import OnProgress
from unetc.runtime.backend import OFFERED
from unetc.runtime.bundle import Bundle
from unetc.workflow.build import BuildOptions, build
from unetc.workflow.verify import VerifyOptions, verify

HERE = Path(__file__).parent
BUDGETS = (0.27, 0.5)
GOAL = {"at_least": 1.0, "at_most": 1.05}


def row(target: str, budget: float, options: argparse.Namespace, on_progress: OnProgress) -> list[object]:
    """Build and verify on one target at one budget."""
    path = options.work / f"asked-{target.replace(':', '-')}-{budget:g}"
    analysis = AnalysisOptions(samples=options.samples, target=target)
    building = BuildOptions(plan=PlanOptions(budget=budget), analysis=analysis, controls=False)
    build("digits", path, building, cache=options.work, on_progress=on_progress)
    result = verify(Bundle.open(path), VerifyOptions(rounds=options.rounds), on_progress)
    ratios = (result.time_ratio, result.time_ratio_p10, result.time_ratio_p90)
    return [target, budget, *ratios, (1 - result.time_ratio) / budget, result.damage.relative_l2.mean]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundles")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result")
    parser.add_argument("--samples", type=int, default=8, help="trajectories of the analysis")
    parser.add_argument("--rounds", type=int, default=24, help="batches that full model and plan sample in turns")
    options = parser.parse_args()
    rows: list[list[object]] = []
    absent: dict[str, str] = {}
    with progress() as on_progress:
        for target in OFFERED:
            if ":compiled" in target:
                absent[target] = "takes half a minute and more for an engine, and an analysis measures a hundred"
                continue
            try:
                rows += [row(target, budget, options, on_progress) for budget in BUDGETS]
            except UnetcError as error:
                absent[target] = str(error)
    figures = [
        {"figure": f"{target}, budget {budget}: time removed / asked", "value": asked, "goal": GOAL}
        for target, budget, _, _, _, asked, _ in rows
    ]
    columns = ["target", "budget", "time / time of the full model", "p10", "p90", "removed / asked", "relative L2"]
    record = {
        "command": shlex.join(["python", "benchmarks/bench_asked.py", *sys.argv[1:]]),
        "environment": describe(),
        "settings": {"model": "digits", "steps": 50, "samples": options.samples, "rounds": options.rounds},
        "figures": figures,
        "tables": [{"title": "Plans of the fast planner, repaired", "columns": columns, "rows": rows}],
        "absent": absent,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "asked.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["figures"], indent=1))


if __name__ == "__main__":
    main()
