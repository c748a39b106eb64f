"""How much is a local error amplified on its way to the final output, where no ablation was measured?

    python benchmarks/bench_amplification.py            # a few minutes on two cores; resumes

The benchmark measures the local errors of all ablations of the reference model in all bins. It measures the final
output for a few ablations of every bin, drawn at random, and compares the two. `analyzer/screen.py` has the mean and
the standard deviation over all bins as constants, for analyses that measure no final output. The unit tests check these
constants against this result. Writes `results/amplification.json`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from command_line import add_results
from result_file import write

from unetc.analyzer.ablation import entry_of
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.duration import entries_of
from unetc.analyzer.screen import run_screen
from unetc.analyzer.sweep import Course, Sweep, make_bins, run_base, run_sweep
from unetc.cli.output import progress
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.jobs import InProcess
from unetc.models.find import find_model
from unetc.runtime.backends.registry import open_backend


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn", type=int, default=16, help="ablations per bin measured on the final output")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("steps", "samples", "bins", "seed", "drawn", "threads")}
    model = find_model("digits")
    rng = np.random.default_rng(options.seed)
    with progress() as on_progress:
        prepared = prepare(model, options.work, on_progress)
        # without a type of the prediction, no ablation reuses the denoised sample
        table = replace(extract(make_scheduler("ddim", model.scheduler_config), options.steps), prediction_type=None)
        sweep = Sweep(
            denoiser=GatedDenoiser(prepared.gated, open_backend("onnxruntime:cpu", threads=options.threads)),
            components=prepared.gated.components,
            ablated=prepared.gated.components,
            table=table,
            bins=make_bins(table.log_snr, options.bins),
            sample_shape=model.sample_shape,
            samples=options.samples,
            seed=options.seed,
            rows=32,
        )
        base = run_base(sweep, on_progress)
        work = prepared.work / f"amplification-{options.steps}-{options.samples}-{options.bins}-{options.seed}"
        workers = InProcess(bench=Course(sweep=sweep, base=base))
        screen = run_screen(workers, sweep, work, on_progress)
        chosen = []
        for b in range(options.bins):
            own = [entry for entry in entries_of(sweep) if entry[1] == b]
            chosen += [own[i] for i in rng.choice(len(own), options.drawn, replace=False)]
        effects = run_sweep(workers, sweep, chosen, work, on_progress).effects
    ratios: dict[int, list[float]] = {b: [] for b in range(options.bins)}
    for effect in effects:
        error = screen.errors[entry_of(effect)]
        if error > 0 and effect.relative_l2.mean > 0:
            ratios[effect.bin].append(float(np.log(effect.relative_l2.mean / error)))
    everything = [ratio for own in ratios.values() for ratio in own]
    measured = {
        "settings": {"model": "digits", **settings},
        "figures": [
            {"figure": "ablations compared", "value": len(everything)},
            {"figure": "log(damage / local error), mean", "value": float(np.mean(everything))},
            {"figure": "log(damage / local error), standard deviation", "value": float(np.std(everything))},
        ],
        "tables": [
            {
                "title": "Within the bins, from high noise to low",
                "columns": ["bin", "ablations", "mean", "standard deviation"],
                "rows": [[b, len(own), float(np.mean(own)), float(np.std(own))] for b, own in ratios.items()],
            }
        ],
    }
    write(options.results, "amplification", measured)


if __name__ == "__main__":
    main()
