"""How long does tensorrt_rtx take to build engines of every kind on a machine without a GPU, and how large are they?

    python benchmarks/gpu_prepare.py /tmp/gpu --models glide-base sd15 sdxl    # 5 minutes on two cores
    python benchmarks/bench_rtx_build.py --work /tmp/rtx --prepared /tmp/gpu   # 10 minutes and 18 GB of memory

There are two small models: `digits`, and a UNet with the blocks of Stable Diffusion 1.5 at a fifth of its width, with
random weights. Five kinds of engine that occur in plans are built of each, in float32 and in float16: the full model,
the full model emitting branches that others reuse, one without two skips, one that holds a level, and one that
forecasts and holds residual branches. Then every engine of the models that `gpu_prepare.py` has prepared is built at
full size in float16. Prints the results and writes `results/rtx_build.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import torch
from command_line import add_results
from gpu_folder import FULL, PLANNED, REFRESH, Folder, open_folders
from result_file import write

from unetc.artifacts.profile import Component
from unetc.backend import WEIGHTS
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.compiler.graph.lowering import lower_graphs
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.tensorrt.messages import BuildRequest
from unetc.compiler.tensorrt.supervise import build_engine
from unetc.models.find import find_model
from unetc.nvidia.key import Effort
from unetc.nvidia.library import library_of
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

HERE = Path(__file__).parent
TARGET = "tensorrt-rtx"
TIME_LIMIT_S = 900.0
STABLE_DIFFUSION = HERE.parent / "tests/configs/sd15.json"
WIDTHS, CONTEXT = (64, 128, 256, 256), 192


def digits(work: Path) -> GatedGraph:
    """Capture the reference model."""
    return open_or_build(work / "digits", lambda: capture(find_model("digits").load_denoiser()))


def stable_diffusion(work: Path) -> GatedGraph:
    """Capture a narrow UNet with the blocks and layers of Stable Diffusion 1.5."""
    config = json.loads(STABLE_DIFFUSION.read_text()) | {"block_out_channels": WIDTHS, "cross_attention_dim": CONTEXT}
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**{key: value for key, value in config.items() if key != "_class_name"})
    return open_or_build(work / "stable-diffusion", lambda: capture(model.eval()))


def one(size: int) -> Range:
    """Return the range that holds a single size."""
    return Range(least=size, usual=size, most=size)


MOST_TOGETHER = 1.3
"""Goal: the largest size of a plan's three engines together, relative to the full model's engine."""
BATCH = Range(least=1, usual=2, most=8)
MODELS: Mapping[str, tuple[Any, Sizes, Mapping[str, tuple[int, ...]]]] = {
    "digits, 32x32": (digits, Sizes(batch=BATCH, height=one(32), width=one(32)), {}),
    "narrow SD 1.5, 64x64": (
        stable_diffusion,
        Sizes(batch=BATCH, height=one(64), width=one(64)),
        {"encoder_hidden_states": (77, CONTEXT)},
    ),
}


def engines(components: tuple[Component, ...]) -> Iterator[tuple[str, dict[str, Treatment], tuple[str, ...]]]:
    """List engines by name, treatments and emitted components."""

    def named(kind: str) -> list[str]:
        return [component.name for component in components if component.kind == kind]

    level, residuals, skips = named("level")[-1], named("residual")[:2], named("skip")
    yield "full", {}, ()
    yield "emits", {}, (level, *residuals)
    yield "drops 2 skips", dict.fromkeys((skips[0], skips[-1]), Treatment.DROP), ()
    yield "holds a level", {level: Treatment.HOLD}, ()
    yield "forecasts and holds", {residuals[0]: Treatment.FORECAST, residuals[1]: Treatment.HOLD}, ()


def measure(name: str, work: Path) -> Iterator[dict[str, object]]:
    """Build all engines of a model."""
    captured, sizes, rows = MODELS[name]
    gated = captured(work)
    means = np.zeros(gated.channels, np.float32)
    folder = emptied(work / "graphs" / name)
    shutil.copyfile(gated.weights, folder / WEIGHTS)
    files = {}
    for engine, treatments, emits in engines(gated.components):
        files[engine] = f"{engine.replace(' ', '-')}.onnx"
        (folder / files[engine]).write_bytes(specialise(gated, treatments, means, emits).graph)
    lower_graphs(folder, tuple(files.values()), Precision.FP16, folder / Precision.FP16)
    for precision, place in ((Precision.FP32, folder), (Precision.FP16, folder / Precision.FP16)):
        yield from build(name, precision, place, files, sizes, rows)


def measure_prepared(prepared: Folder, work: Path) -> Iterator[dict[str, object]]:
    """Build all engines of a prepared model at full size."""
    model = prepared.model
    folder = emptied(work / "graphs" / prepared.name)
    (folder / WEIGHTS).write_bytes(prepared.weights)
    del prepared.weights  # a cached property; the build needs its memory
    files = {engine.name: f"{engine.name.replace(' ', '-')}.onnx" for engine in model.engines}
    for engine, file in files.items():
        (folder / file).write_bytes(prepared.graph(engine).graph)
    _, height, width = model.sample_shape
    sizes = Sizes(batch=BATCH, height=one(height), width=one(width))
    yield from build(f"{prepared.name}, {height}x{width}", model.precision, folder, files, sizes, model.rows)


def build(
    name: str,
    precision: str,
    place: Path,
    files: Mapping[str, str],
    sizes: Sizes,
    rows: Mapping[str, tuple[int, ...]],
) -> Iterator[dict[str, object]]:
    """Build an engine from every graph in a folder."""
    for engine, file in files.items():
        request = BuildRequest(
            target=TARGET,
            graph=file,
            engine="engine.plan",
            timing="timing.cache",
            sizes=sizes,
            rows=rows,
            effort=Effort(),
        )
        outcome = build_engine(request, place, time_limit_s=TIME_LIMIT_S, on_advance=lambda done: None)
        yield {
            "model and engine": f"{name}: {engine}",
            "precision": precision,
            "seconds": round(outcome.seconds, 1),
            "weights MB": round((place / WEIGHTS).stat().st_size / 1e6, 1),
            "engine MB": round(outcome.engine.stat().st_size / 1e6, 1),
            "layers": outcome.built.layers,
            "tries": outcome.tries,
            "peak MB": round(outcome.built.peak_bytes / 1e6),
        }


def together(results: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Add up the engine sizes of a plan that holds; on a GPU all are loaded at once, each with its own weights."""
    sizes = {str(case["model and engine"]): float(case["engine MB"]) for case in results}
    models = [label.removesuffix(f": {REFRESH}") for label in sizes if label.endswith(f": {REFRESH}")]
    return [
        {
            "figure": f"{model}: engines MB, ({' + '.join(PLANNED)}) / {FULL}",
            "value": sum(sizes[f"{model}: {engine}"] for engine in PLANNED) / sizes[f"{model}: {FULL}"],
            "goal": {"at_most": MOST_TOGETHER},
        }
        for model in models
    ]


def emptied(folder: Path) -> Path:
    """Create an empty folder, deleting an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for captures and graphs")
    parser.add_argument("--prepared", type=Path, help="folder written by gpu_prepare.py")
    add_results(parser)
    options = parser.parse_args()
    version = library_of(TARGET).load().__version__
    results = []
    prepared = open_folders(options.prepared) if options.prepared else ()
    cases = [measure(name, options.work) for name in MODELS]
    cases += [measure_prepared(folder, options.work) for folder in prepared]
    for case in itertools.chain.from_iterable(cases):
        results.append(case)
        print(json.dumps(case), flush=True)
    record = {
        "settings": {"tensorrt_rtx": version, "batch": str(BATCH), "optimization level": Effort().optimization_level},
        "figures": together(results),
        "results": results,
    }
    write(options.results, "rtx_build", record)


if __name__ == "__main__":
    main()
