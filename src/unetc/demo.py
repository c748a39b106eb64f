"""The whole way on the built-in model, small enough for a coffee break."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.analyzer.report import write_report
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.artifacts.record import write_atomically
from unetc.artifacts.verification import Verification
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.models.find import find_model
from unetc.report.pictures import grid, png_bytes
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import load

from .progress import OnProgress, ignore

MODEL = "digits"

STEPS = 25
"""Half of what `digits` usually takes, as most of the demo's time goes into sampling."""
ANALYSIS = AnalysisOptions(steps=STEPS, samples=3, rounds=7)
"""Fewer samples and timings than `unetc analyze` takes, so that the demo is done in minutes."""
REPAIR = RepairOptions(evaluations=8)
RANDOM_PLANS = 2
"""Not the 5 of `unetc build`, as finding one takes longer than finding the plan; the table says how many there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo made."""

    verification: Verification
    files: tuple[tuple[Path, str], ...]


def run_demo(output: Path, *, budget: float, cache: Path, on_progress: OnProgress = ignore) -> Demo:
    """Analyse, build, verify and report `digits` into a folder.

    Raises:
        UnetcError: As the single commands do.
    """
    bundle, report, verification, samples = (
        output / name for name in ("bundle", "report.html", "verification.json", "samples.png")
    )
    model = find_model(MODEL)
    profile = analyze_model(model, ANALYSIS, cache=cache, on_progress=on_progress)
    options = BuildOptions(plan=PlanOptions(budget=budget), steps=STEPS, repair=REPAIR, random_plans=RANDOM_PLANS)
    build(model, profile, bundle, options, cache=cache, on_progress=on_progress)
    result = verify(Bundle.open(bundle), VerifyOptions(rounds=4), on_progress)
    result.save(verification)
    write_report(bundle, report, verification=result, on_progress=on_progress)
    write_atomically(samples, png_bytes(grid(load(bundle).sample(36, seed=0))))
    return Demo(
        verification=result,
        files=(
            (report, "damage map with the plan, samples, controls (open in a browser)"),
            (samples, "samples of the pruned model"),
            (bundle, f"the bundle: unetc sample {bundle}"),
            (verification, "the figures above"),
        ),
    )
