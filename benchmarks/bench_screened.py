"""How many samples does a screening need?

    python benchmarks/bench_screened.py            # about five minutes on two cores; resumes

An analysis ranks ablations by their local error, averaged over a part of its samples. This benchmark screens the
reference models with 1 to 16 samples of the same trajectories, and compares the errors with the means over all 16.
Writes `results/screened.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from command_line import add_results
from result_file import write
from scipy import stats

from unetc.analyzer import screen
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.screen import run_screen
from unetc.analyzer.sweep import Course, Sweep, make_bins, run_base
from unetc.artifacts.profile import with_guidance
from unetc.cli.output import progress
from unetc.compiler.measured_calls import CACHED_ROWS
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import scheduler_for
from unetc.jobs import InProcess
from unetc.models.find import find_model
from unetc.progress import OnProgress
from unetc.runtime.backends.registry import open_backend

MODELS = ("digits", "prompted-digits")
COUNTS = (1, 2, 4, 8)
ALL = 16
USUAL = AnalysisOptions(samples=ALL)


def measure(name: str, work: Path, on_progress: OnProgress) -> list[dict[str, object]]:
    """Screen a model with few samples and with all."""
    model = find_model(name)
    table = extract(scheduler_for(USUAL.scheduler, model), USUAL.steps)
    conditions = model.encode(model.prompts(), model.guidance_scale).take(range(ALL))
    gated = prepare(model, work, on_progress).gated
    components = with_guidance(gated.components) if conditions.paired else gated.components
    backend = open_backend(USUAL.target, threads=USUAL.threads)
    sweep = Sweep(
        denoiser=GatedDenoiser(gated, backend, conditions, table.prediction_type),
        components=components,
        ablated=components,
        table=table,
        bins=make_bins(table.log_snr, USUAL.bins),
        sample_shape=model.sample_shape,
        samples=ALL,
        seed=USUAL.seed,
        rows=CACHED_ROWS,
    )
    base = run_base(sweep, on_progress)
    errors = {}
    for count in (*COUNTS, ALL):
        few = sweep.of_first(count)
        workers = InProcess(bench=Course(sweep=few, base=base))
        errors[count] = run_screen(workers, few, work / f"{name}-{count}", on_progress).errors
    entries = [entry for entry, error in errors[ALL].items() if error > 0]
    expected = np.array([errors[ALL][entry] for entry in entries])
    figures: list[dict[str, object]] = []
    for count in COUNTS:
        found = np.array([errors[count][entry] for entry in entries])
        ranks, spread = stats.spearmanr(found, expected).statistic, np.log(found / expected).std()
        what = f"{name}, {count} of {ALL} samples"
        figures.append({"figure": f"{what}: Spearman correlation of local errors", "value": float(ranks)})
        figures.append({"figure": f"{what}: standard deviation of log(error / error)", "value": float(spread)})
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/screened", help="caches")
    add_results(parser)
    options = parser.parse_args()
    screen.SCREENED_SHARE = screen.LEAST_SCREENED = 1  # screens all samples of a sweep
    with progress() as on_progress:
        figures = [figure for name in MODELS for figure in measure(name, options.work, on_progress)]
    write(options.results, "screened", {"figures": figures})


if __name__ == "__main__":
    main()
