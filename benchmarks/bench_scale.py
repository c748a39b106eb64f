"""How much time and memory does it take to capture and export denoisers of real sizes?

    python benchmarks/bench_scale.py --models sd15 sd21 sdxl      # a few minutes each; 3 × the weights on disk

The benchmark writes a pipeline folder with the configuration of a public model (`tests/configs`) and random float32
weights. Then it loads, captures and exports the model as `unetc analyze` does, in a separate process per model. Peaks
are the largest resident set of that process (VmHWM). They include mapped pages of the checkpoint, which the system can
reclaim. Writes `results/scale.json` and keeps the results of models measured earlier.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from math import sqrt
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "tests/configs"
MIB = 2**20


def write_unet(config: dict[str, Any], folder: Path) -> int:
    """Write the folder of a UNet with random weights and return the number of parameters."""
    import diffusers as untyped_diffusers
    import onnx_ir as ir
    import torch

    from unetc.compiler.graph.weights import write_tensors

    diffusers: Any = untyped_diffusers
    with torch.device("meta"):
        state = diffusers.UNet2DConditionModel(**config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    random = torch.Generator().manual_seed(0)

    def lazy(name: str, shape: tuple[int, ...]) -> ir.LazyTensor:
        def draw() -> ir.TensorProtocol:
            width = sqrt(torch.Size(shape[1:]).numel()) if len(shape) > 1 else 1.0
            return ir.Tensor((torch.randn(shape, generator=random) / width).numpy())

        return ir.LazyTensor(draw, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)

    folder.mkdir(parents=True)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", {name: lazy(name, shapes[name]) for name in shapes})
    (folder / "config.json").write_text(json.dumps(config))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def measure(folder: Path) -> dict[str, object]:
    """Load, capture and export; return seconds and peak memory of each stage, and sizes."""
    import diffusers as untyped_diffusers

    from unetc.compiler.graph.capture import capture
    from unetc.compiler.graph.gated import GatedGraph
    from unetc.environment import peak_memory

    diffusers: Any = untyped_diffusers
    measured: dict[str, object] = {"libraries: peak MiB": peak_memory() / MIB}
    start = time.perf_counter()

    def note(stage: str) -> None:
        nonlocal start
        now = time.perf_counter()
        measured.update({f"{stage}: s": now - start, f"{stage}: peak MiB": peak_memory() / MIB})
        start = time.perf_counter()

    model = diffusers.UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    model.requires_grad_(False)
    note("load")
    captured = capture(model)
    note("capture")
    gated = GatedGraph.build(captured, folder / "graph")
    note("export")
    return {
        "components": len(gated.components),
        "weights MiB": gated.weights.stat().st_size / MIB,
        "graph KiB": (gated.folder / "gated.onnx").stat().st_size / 1024,
        **measured,
    }


def main() -> None:
    """Run the benchmark."""
    from command_line import add_results

    from unetc.environment import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("sd15", "sd21", "sdxl"), default=["sd15", "sd21", "sdxl"])
    parser.add_argument("--work", type=Path, help="folder for weights [default: the system's temporary folder]")
    add_results(parser)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child)))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "scale.json"
    known = {case["model"]: case for case in json.loads(path.read_text())["results"]} if path.exists() else {}
    for name in options.models:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            folder = Path(work) / name
            parameters = write_unet(json.loads((CONFIGS / f"{name}.json").read_text()), folder)
            command = [sys.executable, __file__, "--child", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        known[name] = {"model": name, "parameters": parameters, **json.loads(output.splitlines()[-1])}
        print(json.dumps(known[name], indent=1))
        record = {
            "command": shlex.join(["python", "benchmarks/bench_scale.py", "--models", *sorted(known)]),
            "environment": describe(),
            "results": [known[name] for name in sorted(known)],
        }
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
