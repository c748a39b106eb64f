"""What is the least damage at each sampling time on `digits`, and how fast is a plan with a PSNR of 30 dB?

    python benchmarks/bench_pareto.py            # about 6 minutes on two cores; resumes

The benchmark plans, repairs and samples at eight budgets from the profile of `bench_budget.py`. Then it samples the
fastest plan with a PSNR of at least 30 dB again, on held-out seeds, alternating with the full model. Writes
`results/pareto.json` and the picture of the curve.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line import add_results
from result_file import picture_of, write

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.analyzer.verify import HELD_OUT
from unetc.artifacts.record import to_builtins
from unetc.cli.output import progress
from unetc.compiler.search.pareto import ParetoOptions, fastest_passing, refine, trace
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.set_up import set_up
from unetc.models.find import find_model
from unetc.report.curve import draw

ANALYSIS = AnalysisOptions(samples=8)
GATE = QualityGate(metric="psnr", bound=30.0)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    options = parser.parse_args()
    with progress() as on_progress:
        model = find_model("digits")
        profile = analyze_model(model, ANALYSIS, cache=options.work, on_progress=on_progress)
        with set_up(model, profile, steps=50, cache=options.work, on_progress=on_progress) as setup:
            curve = refine(setup, trace(setup, ParetoOptions(), on_progress), GATE, ParetoOptions(), on_progress)
            fastest = fastest_passing(curve, GATE)
            candidate = setup.workbench.compile(fastest.plan)
            checked = setup.workbench.measure(candidate, seed=curve.seed + HELD_OUT).measurement
    record = {
        "environment": curve.environment,
        "target": curve.target,
        "samples": curve.samples,
        "points": len(curve.points),
        "front": [{"time_ratio": p.time_ratio, "damage": to_builtins(p.damage)} for p in curve.front()],
        "gate": str(GATE),
        "fastest": {
            "time_ratio": fastest.time_ratio,
            "damage": to_builtins(fastest.damage),
            "held_out": to_builtins(checked),
            "plan": to_builtins(fastest.plan),
        },
    }
    write(options.results, "pareto", record)
    picture_of(options.results, "pareto.svg").write_text(draw(curve))
    print(f"fastest with {GATE}: {1 / checked.time_ratio:.2f} x, PSNR {checked.damage.psnr.mean:.1f} dB on new seeds")


if __name__ == "__main__":
    main()
