"""How much faster is an engine than in an older version, and does leaving out a skip ever cost time?

    python benchmarks/bench_engines.py                    # about half an hour on one thread, 16 GB of memory
    python benchmarks/bench_engines.py --only digits      # some models; the result keeps its other rows

Both versions specialise their engines from the same denoiser: the full model, and one without each skip connection. The
older version is checked out next to this one. One process times all engines in turns and compares the full models with
float64 in torch. Writes `results/engines.json`. The UNet of Stable Diffusion has random weights, which take as long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import torch
from checkout import ROOT, check_out, commit
from command_line import add_only, add_results, chosen
from result_file import absent, earlier, write

from unetc.backend import Array, SerialisedGraph
from unetc.environment import describe
from unetc.runtime.backends.registry import open_backend
from unetc.timing import interleaved_ms

diffusers: Any = untyped_diffusers

OLDER = "a993132"
TARGET = "onnxruntime:cpu"
FULL = "full model"
MOST_TIME, LEAST_SAVED = 0.85, -0.02
"""Goals: time of a full model / time in the older version; least share of the time that a missing skip saves."""

MAKE = """
import importlib, json, sys
from pathlib import Path

import diffusers
import numpy as np

package, treatments, source, folder = *sys.argv[1:4], Path(sys.argv[4])
parts = {name: importlib.import_module(f"{package}.{name}") for name in ("capture", "gated", "specialise")}
drop = importlib.import_module(treatments).Treatment.DROP
config = json.loads((Path(source) / "config.json").read_text())
denoiser = getattr(diffusers, config["_class_name"]).from_pretrained(source).eval()
gated = parts["gated"].GatedGraph.build(parts["capture"].capture(denoiser), folder / "graph")
none = np.zeros(gated.channels, np.float32)
skips = [one.name for one in gated.components if one.kind == "skip"]
graphs = {}
for name, treated in {"full model": {}, **{skip: {skip: drop} for skip in skips}}.items():
    engine = parts["specialise"].specialise(gated, treated, none)
    (folder / f"{len(graphs)}.onnx").write_bytes(engine.graph)
    graphs[name] = sorted(engine.weights)
(folder / "graphs.json").write_text(json.dumps({"graphs": graphs, "weights": str(gated.weights)}))
"""
"""Makes the engines with the version on the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A denoiser and its input."""

    name: str
    batch: int
    side: int
    rounds: int
    skips: bool
    """Whether to leave out skips too."""
    save: Callable[[Path], object]
    """Write the denoiser as diffusers does."""


def save_built_in(name: str) -> Callable[[Path], object]:
    """Copy the denoiser of a built-in model."""
    source = ROOT / "src/unetc/models" / name / "unet"

    def save(folder: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        getattr(diffusers, config["_class_name"]).from_pretrained(source).save_pretrained(folder)

    return save


def save_stable_diffusion(folder: Path) -> None:
    """Write a UNet of the shape of Stable Diffusion 1.5, with random weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet.save_pretrained(folder)


CASES = (
    Case(name="digits", batch=8, side=32, rounds=60, skips=True, save=save_built_in("digits")),
    Case(name="prompted-digits", batch=8, side=16, rounds=60, skips=True, save=save_built_in("prompted-digits")),
    Case(name="Stable Diffusion 1.5", batch=1, side=64, rounds=5, skips=False, save=save_stable_diffusion),
)


@dataclass(frozen=True, slots=True)
class Version:
    """The sources of a version, and its names of the needed modules."""

    sources: Path
    package: str
    treatments: str

    def make(self, denoiser: Path, folder: Path) -> dict[str, Callable[[Mapping[str, Array], Array], object]]:
        """Make the engines of a denoiser and load them."""
        folder.mkdir()
        command = [sys.executable, "-c", MAKE, self.package, self.treatments, str(denoiser), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(self.sources / "src")})
        made = json.loads((folder / "graphs.json").read_text())
        loader = open_backend(TARGET, threads=1).open_weights(Path(made["weights"]).read_bytes())
        return {
            name: loader.load(SerialisedGraph(graph=(folder / f"{i}.onnx").read_bytes(), weights=frozenset(weights)))
            for i, (name, weights) in enumerate(made["graphs"].items())
        }


def inputs_of(case: Case, denoiser: Any) -> dict[str, Array]:
    """Draw the inputs of a denoiser."""
    rng = np.random.default_rng(0)
    shape = (case.batch, denoiser.config.in_channels, case.side, case.side)
    inputs = {"sample": rng.standard_normal(shape, dtype=np.float32), "timestep": np.full(case.batch, 500, np.float32)}
    if width := getattr(denoiser.config, "cross_attention_dim", None):
        inputs["encoder_hidden_states"] = rng.standard_normal((case.batch, 77, width), dtype=np.float32)
    return inputs


@torch.no_grad()
def exact(denoiser: Any, inputs: Mapping[str, Array]) -> Array:
    """Run a denoiser in float64."""
    wide = {name: torch.from_numpy(array).double() for name, array in inputs.items()}
    output: Array = denoiser.double()(**wide).sample.numpy()
    return output


def measure(case: Case, versions: Mapping[str, Version], work: Path) -> dict[str, Any]:
    """Time the engines of both versions in turns."""
    work.mkdir()
    case.save(work / "unet")
    config = json.loads((work / "unet/config.json").read_text())
    denoiser = getattr(diffusers, config["_class_name"]).from_pretrained(work / "unet").eval()
    inputs = inputs_of(case, denoiser)
    engines = {
        (version, name): engine
        for version, own in versions.items()
        for name, engine in own.make(work / "unet", work / version).items()
        if name == FULL or case.skips
    }
    expected = exact(denoiser, inputs)
    del denoiser
    output = np.empty(expected.shape, np.float32)
    errors = {}
    for version in versions:
        engines[version, FULL](inputs, output)
        errors[version] = float(np.abs(output - expected).max() / np.abs(expected).max())
    calls = [lambda engine=engine: engine(inputs, output) for engine in engines.values()]
    times = dict(zip(engines, interleaved_ms(calls, rounds=case.rounds).T, strict=True))
    ratio = {key: float(np.median(own / times[key[0], FULL])) for key, own in times.items()}
    return {
        "model": case.name,
        "batch": case.batch,
        "commit": commit(),
        "environment": describe(),
        "milliseconds": {version: float(np.median(times[version, FULL])) for version in versions},
        "time": float(np.median(times["newer", FULL] / times["older", FULL])),
        "error": errors,
        "saved": {
            version: {name: 1 - value for (own, name), value in ratio.items() if own == version and name != FULL}
            for version in versions
        },
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every row with the goals."""
    found = []
    for row in rows:
        what = f"{row['model']}, batch {row['batch']}"
        found.append({"figure": f"{what}: time / {OLDER}", "value": row["time"], "goal": {"at_most": MOST_TIME}})
        more = row["error"]["newer"] / row["error"]["older"]
        found.append({"figure": f"{what}: error / {OLDER}", "value": more, "goal": {"at_most": 1.0}})
        if row["saved"]["newer"]:
            least = min(row["saved"]["newer"].values())
            found.append(
                {"figure": f"{what}: least saving of a missing skip", "value": least, "goal": {"at_least": LEAST_SAVED}}
            )
    return found


def table(row: Mapping[str, Any]) -> dict[str, Any]:
    """Write what leaving out each skip saves."""
    saved = row["saved"]
    lines = [[name, *(round(saved[version][name], 3) for version in ("older", "newer"))] for name in saved["newer"]]
    return {"title": f"{row['model']}: saved time", "columns": ["left out", OLDER, "now"], "rows": lines}


def record_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make the result of some rows."""
    missing = absent((one.name for one in CASES), [row["model"] for row in rows])
    tables = [table(row) for row in rows if row["saved"]["newer"]]
    return {"figures": figures(rows), "tables": tables, "absent": missing, "rows": rows}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_only(parser)
    add_results(parser)
    options = parser.parse_args()
    again = chosen(parser, options.only, (one.name for one in CASES))
    rows = earlier(options.results, "engines", "model", again=again)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        check_out(OLDER, work / OLDER)
        versions = {
            "older": Version(work / OLDER, "unetc.graph", "unetc.artifacts.profile"),
            "newer": Version(ROOT, "unetc.compiler.graph", "unetc.treatments"),
        }
        for case in (one for one in CASES if one.name in again):
            rows[case.name] = measure(case, versions, work / "case")
            shutil.rmtree(work / "case")
            write(options.results, "engines", record_of([rows[one.name] for one in CASES if one.name in rows]))


if __name__ == "__main__":
    main()
