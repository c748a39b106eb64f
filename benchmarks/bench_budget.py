"""What does saving 27 % of the time cost on `digits`, and what do simpler ways to save it cost?

    python benchmarks/bench_budget.py            # about 7 minutes on two cores; resumes

Analyses the reference model on 8 trajectories of 25 steps, builds, verifies, and writes
`results/budget.json` (the verification, its plan, the disk sizes, what the digit classifier says of the samples) and
the pictures of the README. Full model, plan and controls sample the same noise in turns in one run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import unetc
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.metrics.classifier import DigitClassifier
from unetc.artifacts.profile import Profile
from unetc.artifacts.record import to_builtins
from unetc.cli.output import progress
from unetc.compiler.planner import PlanOptions
from unetc.report import heatmap
from unetc.report.pictures import grid, png_bytes
from unetc.runtime.backend import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.workflow.build import BuildOptions, build
from unetc.workflow.report import write_report
from unetc.workflow.verify import VerifyOptions, verify

HERE = Path(__file__).parent
ANALYSIS = AnalysisOptions(steps=25, samples=8)
PICTURES = HERE.parent / "docs/images"
JUDGED_SAMPLES = 256
CONFIDENT = 0.9


def judge(session: Session, seed: int) -> dict[str, float]:
    """Ask the digit classifier about samples of the full and of the pruned model at the same noise."""
    classifier = DigitClassifier.load(Path(unetc.__file__).parent / "models/digits/classifier/model.safetensors")
    chances = {}
    for lossless in (True, False):
        batches = [
            session.sample(32, seed=seed, first_index=first, lossless=lossless)
            for first in range(0, JUDGED_SAMPLES, 32)
        ]
        _, chances[lossless] = classifier.describe(np.concatenate(batches))
    return {
        "samples": JUDGED_SAMPLES,
        "same_digit_share": float((chances[True].argmax(1) == chances[False].argmax(1)).mean()),
        "confident_share_full": float((chances[True].max(1) >= CONFIDENT).mean()),
        "confident_share_pruned": float((chances[False].max(1) >= CONFIDENT).mean()),
    }


def draw(session: Session, profile: Profile, seed: int) -> None:
    """Draw the README's pictures: full, pruned and difference for the same noise; the damage map with the plan."""
    full = session.sample(8, seed=seed, lossless=True)
    pruned = session.sample(8, seed=seed)
    PICTURES.mkdir(parents=True, exist_ok=True)
    sheet = grid(np.concatenate([full, pruned, np.clip(4 * (pruned - full), -1, 1)]), columns=8)
    (PICTURES / "samples.png").write_bytes(png_bytes(sheet))
    (PICTURES / "damage.svg").write_text(heatmap.draw(profile, session.plan))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache and bundle")
    parser.add_argument("--budget", type=float, default=0.27)
    options = parser.parse_args()
    path = options.work / "bundle"
    with progress() as on_progress:
        build(
            "digits",
            path,
            BuildOptions(plan=PlanOptions(budget=options.budget), analysis=ANALYSIS),
            cache=options.work,
            on_progress=on_progress,
        )
        bundle = Bundle.open(path)
        result = verify(bundle, VerifyOptions(rounds=16), on_progress)
        write_report(path, options.work / "report.html", verification=result, on_progress=on_progress)
    session = Session.of(bundle, open_backend(bundle.manifest.target, threads=bundle.manifest.threads))
    profile = Profile.from_json(bundle.profile, "the bundle's profile")
    draw(session, profile, result.seed)
    record = {
        "command": "python benchmarks/bench_budget.py",
        "verification": to_builtins(result),
        "classifier": judge(session, result.seed),
        "plan": to_builtins(bundle.manifest.plan),
        "notes": list(bundle.manifest.notes),
        "analysis": {key: getattr(profile, key) for key in ("steps", "samples", "seed", "batch", "scheduler")},
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results/budget.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"classifier": record["classifier"]}, indent=1))
    print(f"report: {options.work / 'report.html'}")


if __name__ == "__main__":
    main()
