"""How well are components timed by their form, and how much sooner, than each by itself?

    python benchmarks/bench_costs.py                  # about half an hour, on all cores
    python benchmarks/bench_costs.py --only digits    # some models; the result keeps its other rows

The reference alternates every component's graph with the full one, 15 rounds each, as unetc did before components had
forms. It is measured twice, which shows how far such figures repeat at all, and its mean is taken for the truth. Writes
`results/costs.json`. Relative errors are of components that save at least a hundredth of the time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from checkout import commit
from command_line import add_only, add_results, chosen
from result_file import absent, earlier, write
from scipy.stats import spearmanr
from terrain import download, make_pipeline

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.cost import measure_costs
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.prepare import prepare
from unetc.conditions import UNCONDITIONAL
from unetc.environment import cores, describe
from unetc.models.find import find_model
from unetc.progress import ignore
from unetc.runtime.backends.registry import open_backend
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment

TARGET = "onnxruntime:cpu"
ROUNDS = AnalysisOptions().rounds
LEAST_SHARE = 0.01
CASES = (("digits", 8), ("terrain", 2))
"""Models and batch sizes."""
GOALS: Mapping[str, dict[str, float]] = {
    "seconds / reference": {"at_most": 0.1},
    "Spearman": {"at_least": 0.98},
    "median relative error": {"at_most": 0.05},
}
SHOWN = (*GOALS, "Spearman of the reference with itself", "median relative error of the reference with itself")


def reference(gated: GatedGraph, batch: int, shape: tuple[int, int, int]) -> dict[str, float]:
    """Measure the share of the time that each removal saves, one by one."""
    loader = open_backend(TARGET, threads=cores()).open_weights(gated.weights.read_bytes())
    none = np.zeros(gated.channels, np.float32)
    sample = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    inputs = UNCONDITIONAL.widen(sample, 500.0)
    output = np.empty((batch, gated.predicted_channels, *shape[1:]), np.float32)
    full = partial(loader.load(specialise(gated, {}, none)), inputs, output)
    shares = {}
    for component in gated.components:
        engine = loader.load(specialise(gated, {component.name: Treatment.DROP}, none))
        times = interleaved_ms([full, partial(engine, inputs, output)], rounds=ROUNDS)
        shares[component.name] = float(np.median(1 - times[:, 1] / times[:, 0]))
    return shares


def measure(name: str, model: str, batch: int, work: Path) -> dict[str, Any]:
    """Time the components of a model both ways."""
    found = find_model(model)
    gated = prepare(found, work).gated
    start = time.monotonic()
    costs = measure_costs(
        gated,
        gated.components,
        open_backend(TARGET, threads=cores()),
        batch=batch,
        sample_shape=found.sample_shape,
        rounds=ROUNDS,
        on_progress=ignore,
    )
    by_form = time.monotonic() - start
    first, second = (reference(gated, batch, found.sample_shape) for _ in range(2))
    one_by_one = (time.monotonic() - start - by_form) / 2
    exact = {name: (first[name] + second[name]) / 2 for name in first}
    shares = {cost.component: cost.saved_ms.mean / costs.full_ms.mean for cost in costs.costs}
    return {
        "model": name,
        "batch": batch,
        "commit": commit(),
        "environment": describe(),
        "seconds": {"by form": by_form, "reference": one_by_one},
        "seconds / reference": by_form / one_by_one,
        "Spearman": agreement(shares, exact),
        "median relative error": error(shares, exact),
        "Spearman of the reference with itself": agreement(first, second),
        "median relative error of the reference with itself": error(first, second),
        "shares": {name: [first[name], second[name], shares[name]] for name in exact},
    }


def agreement(shares: Mapping[str, float], exact: Mapping[str, float]) -> float:
    """Compute the rank correlation of two measurements."""
    return float(spearmanr([shares[name] for name in exact], list(exact.values())).statistic)


def error(shares: Mapping[str, float], exact: Mapping[str, float]) -> float:
    """Compute the median relative error of the shares that are not small."""
    return float(np.median([abs(shares[name] / one - 1) for name, one in exact.items() if one >= LEAST_SHARE]))


def figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every model with the goals."""
    found: list[dict[str, Any]] = []
    for row in rows:
        for what in SHOWN:
            goal = {"goal": GOALS[what]} if what in GOALS else {}
            found.append({"figure": f"{row['model']}, batch {row['batch']}: {what}", "value": row[what], **goal})
    return found


def record_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the result of some rows."""
    missing = absent((name for name, _ in CASES), [row["model"] for row in rows])
    return {"figures": figures(rows), "absent": missing, "rows": rows}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_only(parser)
    add_results(parser)
    options = parser.parse_args()
    again = chosen(parser, options.only, (name for name, _ in CASES))
    rows = earlier(options.results, "costs", "model", again=again)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, batch in ((name, batch) for name, batch in CASES if name in again):
            model = name
            if name == "terrain":
                make_pipeline(download(work)).save_pretrained(work / name)
                model = str(work / name)
            rows[name] = measure(name, model, batch, work / "cache")
            write(options.results, "costs", record_of([rows[own] for own, _ in CASES if own in rows]))


if __name__ == "__main__":
    main()
