"""The whole way on the built-in model, small enough for a coffee break."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.verify import VerifyOptions
from unetc.artifacts.record import write_atomically
from unetc.artifacts.verification import Verification
from unetc.compiler.build import BuildOptions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.report.pictures import grid, png_bytes
from unetc.runtime.session import load

from .api import build, verify, write_report
from .progress import OnProgress, ignore

MODEL = "digits"

STEPS = 25
"""Half of the usual steps of `digits`, as most of the demo's time goes into sampling."""
ANALYSIS = AnalysisOptions(steps=STEPS, samples=3, rounds=7)
"""Fewer samples and timings than the defaults of `unetc analyze`, so that the demo is done in minutes."""
REPAIR = RepairOptions(evaluations=5)
VERIFYING = VerifyOptions(rounds=3, converged=False)
"""Without the converged trajectory, which takes as long as all other samples of the demo."""
RANDOM_PLANS = 0
"""Not the 5 of `unetc build`: finding one takes longer than finding the plan, and all other controls are stronger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """The results of the demo."""

    verification: Verification
    bundle: Path
    files: tuple[tuple[Path, str], ...]
    """Each file or folder with its meaning."""


def run_demo(output: Path, *, budget: float, cache: Path | None = None, on_progress: OnProgress = ignore) -> Demo:
    """Analyse, build, verify and report `digits` into a folder.

    Args:
        output: The folder.
        budget: Share of the time to save, in [0, 1).
        cache: Folder for captures and partial results; `$UNETC_CACHE` or `~/.cache/unetc` when not given.
        on_progress: Called as the work advances.

    Raises:
        UnetcError: For the reasons of the single steps.
    """
    bundle, report, verification, samples = (
        output / name for name in ("bundle", "report.html", "verification.json", "samples.png")
    )
    options = BuildOptions(plan=PlanOptions(budget=budget), steps=STEPS, repair=REPAIR, random_plans=RANDOM_PLANS)
    build(MODEL, bundle, options, analysis=ANALYSIS, cache=cache, on_progress=on_progress)
    result = verify(bundle, VERIFYING, on_progress=on_progress)
    result.save(verification)
    write_report(bundle, report, verification=result, on_progress=on_progress)
    write_atomically(samples, png_bytes(grid(load(bundle).sample(36, seed=0))))
    return Demo(
        verification=result,
        bundle=bundle,
        files=(
            (report, "damage map with the plan, samples, controls (open in a browser)"),
            (samples, "samples of the pruned model"),
            (bundle, f"the bundle: unetc sample {bundle}"),
            (verification, "the figures above"),
        ),
    )
