"""How much damage does saving 27 % or half of the time do on `digits`, and how much do simpler methods do?

    python benchmarks/bench_budget.py            # about 15 minutes on two cores; resumes

The benchmark analyses the reference model on 8 trajectories of 50 steps, then builds and verifies one bundle per
budget. It writes `results/budget.json` (verifications, plans, disk sizes, and the digit classifier's answers for the
samples) and the README's pictures. Full model, plan and controls sample the same noise alternately in one run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from command_line import add_results
from image_classifier import ImageClassifier
from result_file import picture_of, write

import unetc
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.analyzer.report import write_report
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.artifacts.profile import Profile
from unetc.artifacts.record import to_builtins
from unetc.cli.output import progress
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.models.find import find_model
from unetc.report import heatmap
from unetc.report.pictures import grid, png_bytes
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session

ANALYSIS = AnalysisOptions(samples=8)
BUDGETS = (0.27, 0.5)
ROUNDS = 12
JUDGED_SAMPLES = 256
CONFIDENT = 0.9


def judge(session: Session, seed: int) -> dict[str, float]:
    """Classify the digits that the full and the pruned model sample from the same noise."""
    classifier = ImageClassifier.load(Path(unetc.__file__).parent / "models/digits/classifier/model.safetensors")
    chances = {}
    for full_model in (True, False):
        batches = [
            session.sample(32, seed=seed, first_index=first, full_model=full_model)
            for first in range(0, JUDGED_SAMPLES, 32)
        ]
        _, chances[full_model] = classifier.describe(np.concatenate(batches))
    return {
        "samples": JUDGED_SAMPLES,
        "same_digit_share": float((chances[True].argmax(1) == chances[False].argmax(1)).mean()),
        "confident_share_full": float((chances[True].max(1) >= CONFIDENT).mean()),
        "confident_share_pruned": float((chances[False].max(1) >= CONFIDENT).mean()),
    }


def draw(session: Session, profile: Profile, seed: int, results: Path) -> None:
    """Draw the README's pictures: full, pruned and difference for the same noise, and the damage map with the plan.

    Args:
        session: The bundle.
        profile: The profile that it was built from.
        seed: Seed of the noise.
        results: Folder of the result.
    """
    full = session.sample(8, seed=seed, full_model=True)
    pruned = session.sample(8, seed=seed)
    sheet = grid(np.concatenate([full, pruned, np.clip(4 * (pruned - full), -1, 1)]), columns=8)
    picture_of(results, "samples.png").write_bytes(png_bytes(sheet))
    picture_of(results, "damage.svg").write_text(heatmap.draw(profile, session.plan))


def run(budget: float, work: Path, results: Path) -> dict[str, object]:
    """Build, verify and judge at one budget; draw the pictures at the first one."""
    path = work / f"bundle-{budget:g}"
    with progress() as on_progress:
        model = find_model("digits")
        profile = analyze_model(model, ANALYSIS, cache=work, on_progress=on_progress)
        build(model, profile, path, BuildOptions(plan=PlanOptions(budget=budget)), cache=work, on_progress=on_progress)
        bundle = Bundle.open(path)
        result = verify(bundle, VerifyOptions(rounds=ROUNDS), on_progress)
        write_report(path, work / f"report-{budget:g}.html", verification=result, on_progress=on_progress)
    session = Session.of(bundle, open_backend(bundle.manifest.target, threads=bundle.manifest.threads))
    if budget == BUDGETS[0]:
        draw(session, profile, result.seed, results)
    print(f"report: {work / f'report-{budget:g}.html'}")
    return {
        "verification": to_builtins(result),
        "classifier": judge(session, result.seed),
        "plan": to_builtins(bundle.manifest.plan),
        "pairs": to_builtins(bundle.manifest.pairs),
        "notes": list(bundle.manifest.notes),
        "analysis": {
            key: getattr(profile, key) for key in ("steps", "samples", "seed", "batch", "scheduler", "samplings")
        },
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundles")
    add_results(parser)
    options = parser.parse_args()
    budgets = {f"{budget:g}": run(budget, options.work, options.results) for budget in BUDGETS}
    write(options.results, "budget", {"budgets": budgets})


if __name__ == "__main__":
    main()
