"""Prepare the models that `gpu.py` measures, so that it needs none of the libraries that capture and specialise.

    python benchmarks/gpu_prepare.py FOLDER              # about 15 minutes on two cores, 15 GB on disk for a while

Large weights of random models are neither drawn here nor stored, so the folder takes about 32 MiB. Models that are
already prepared are skipped unless `--again` is given. `FOLDER/libraries` receives the libraries of unetc's runtime
that an installation with torch and onnx may lack. unetc itself is read from the checkout that contains `gpu.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkout
import diffusers as untyped_diffusers
import numpy as np
import onnx
import safetensors.torch
import torch
from gpu_folder import (
    CONDITIONS,
    CONTENTS,
    DROP,
    FORECAST,
    FULL,
    HEADER,
    INNER,
    OUTER,
    RECORD,
    REFRESH,
    SCHEDULER,
    Engine,
    PreparedModel,
    header_of,
)
from torch import nn

import unetc
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.manifest import SCHEDULER_ROWS, FileRecord
from unetc.artifacts.plan import Assignment
from unetc.artifacts.profile import Component, ModelReference
from unetc.backend import WEIGHTS
from unetc.call import CONTEXT, TIMESTEP
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.denoisers.denoiser import denoiser_of
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.compiler.graph.lowering import lower_graphs
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.models.find import find_model
from unetc.models.glide import VARIANTS
from unetc.precision import Precision
from unetc.sampler.table import SchedulerTables
from unetc.tensors import save_tensors
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

CONFIGS = checkout.ROOT / "tests/configs"
STEPS = 50
PROMPTS = 8
LARGE = 2**14
"""Number of values; larger random tensors are neither drawn here nor stored, whatever their final precision."""
CARRIED = ("msgspec", "safetensors")
"""Libraries that unetc.runtime needs in addition to numpy, torch and onnx."""
SCHEDULE: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
"""Noise schedule of Stable Diffusion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A captured model with its settings."""

    gated: GatedGraph
    reference: ModelReference
    precision: Precision
    trained: bool
    carried: float
    """Largest number of values of a stored tensor; larger ones are drawn when the folder is read."""
    sample_shape: tuple[int, int, int]
    rows: Mapping[str, tuple[int, ...]]
    conditions: Conditions
    scheduler: SchedulerTables


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A UNet given by its configuration; its weights do not matter."""

    config: Mapping[str, Any]
    tokens: int
    """Number of text tokens."""
    schedule: Mapping[str, Any]

    def sized(self, side: int | None) -> Shape:
        """Change the height and width of its samples, unless `side` is None."""
        return self if side is None else replace(self, config={**self.config, "sample_size": side})

    def narrow(self) -> Shape:
        """Return a small copy with the same blocks, one layer and one transformer per block, and few channels."""
        layers = self.config.get("transformer_layers_per_block", 1)
        changes: dict[str, Any] = {
            "sample_size": 16,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "cross_attention_dim": 12,
            "block_out_channels": [8 * (i + 1) for i in range(len(self.config["block_out_channels"]))],
            "attention_head_dim": 4,
            "transformer_layers_per_block": [1] * len(layers) if isinstance(layers, list) else 1,
        }
        if "addition_embed_type" in self.config:
            changes |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 20}
        return Shape(config={**self.config, **changes}, tokens=5, schedule=self.schedule)


def config_of(name: str) -> dict[str, Any]:
    """Read the configuration of a public model."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return {key: value for key, value in config.items() if key != "_class_name"}


def shapes() -> dict[str, Shape]:
    """List the models with random weights."""
    glide = VARIANTS["glide:base"]
    return {
        "sd15": Shape(config=config_of("sd15"), tokens=77, schedule=SCHEDULE),
        "glide-base": Shape(config=glide.unet, tokens=128, schedule=glide.scheduler_config),
        "sdxl": Shape(config=config_of("sdxl"), tokens=77, schedule=SCHEDULE),
    }


TRAINED = ("digits", "prompted-digits")


def hollow_unet(config: Mapping[str, Any]) -> nn.Module:
    """Create a UNet whose large weights are uninitialised memory, which takes no space until it is written.

    The graph does not depend on weights. Small ones are drawn, because the exporter would merge equal ones.
    """
    with torch.device("meta"):
        unet: nn.Module = diffusers.UNet2DConditionModel(**config)
    assert not list(unet.buffers()), "a buffer would be left uninitialised"
    unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.numel() <= LARGE:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 5.0
            parameter.data = noise / scale + (1 if "norm" in name and name.endswith("weight") else 0)
    return unet.eval()


def random_source(name: str, shape: Shape, precision: Precision, steps: int, work: Path) -> Source:
    """Capture a model with random weights."""
    unet = hollow_unet(shape.config)
    given = [item for item in denoiser_of(unet).inputs if item.name not in (SAMPLE, TIMESTEP)]
    rows = {item.name: tuple(item.example.shape[1:]) for item in given}
    rows[CONTEXT] = shape.tokens, *rows[CONTEXT][1:]
    size = shape.config["sample_size"]
    return Source(
        gated=GatedGraph.build(capture(unet), work / "graph"),
        reference=ModelReference(
            name=name,
            sha256=hashlib.sha256(json.dumps(dict(shape.config), sort_keys=True).encode()).hexdigest(),
            pipeline="none",
            denoiser=type(unet).__name__,
        ),
        precision=precision,
        trained=False,
        carried=LARGE,
        sample_shape=(shape.config["in_channels"], size, size),
        rows=rows,
        conditions=UNCONDITIONAL,
        scheduler=extract_all(make_scheduler("ddim", shape.schedule), "ddim", [steps]),
    )


def trained_source(name: str, steps: int, work: Path) -> Source:
    """Capture a model that ships with unetc."""
    model = find_model(name)
    prompts = model.prompts()[:PROMPTS]
    return Source(
        gated=open_or_build(work / "graph", lambda: capture(model.load_denoiser())),
        reference=model.reference,
        precision=Precision.FP32,
        trained=True,
        carried=math.inf,
        sample_shape=model.sample_shape,
        rows={},
        conditions=model.encode(prompts, model.guidance_scale),
        scheduler=extract_all(make_scheduler("ddim", model.scheduler_config), "ddim", [steps]),
    )


def assignments(components: tuple[Component, ...]) -> dict[str, Assignment]:
    """List the assignments of the engines, with the branches that each emits for the others."""
    levels, skips = ([c.name for c in components if c.kind == kind] for kind in ("level", "skip"))
    treatments: dict[str, dict[str, Treatment]] = {
        REFRESH: {},
        OUTER: {levels[-1]: Treatment.HOLD},
        FORECAST: {levels[-1]: Treatment.FORECAST},
        INNER: {levels[-2]: Treatment.HOLD},
    }
    planned = with_emissions(list(treatments.values()), components)
    return {
        FULL: Assignment(treatments={}),
        **dict(zip(treatments, planned, strict=True)),
        DROP: Assignment(treatments=dict.fromkeys((skips[0], skips[-1]), Treatment.DROP)),
    }


def write(source: Source, folder: Path) -> PreparedModel:
    """Write the folder of a model; its record comes last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    chosen = assignments(source.gated.components)
    graphs = {name: f"{name.replace(' ', '-')}.onnx" for name in chosen}
    weights = write_graphs(source, chosen, graphs, folder)
    (folder / HEADER).write_bytes(header_of(weights))
    (folder / CONTENTS).write_bytes(contents_of(weights, source.carried))
    header, rows = source.scheduler.to_array()
    (folder / SCHEDULER).write_bytes(save_tensors({SCHEDULER_ROWS: rows}))
    if source.conditions.own:
        (folder / CONDITIONS).write_bytes(save_tensors(source.conditions.to_arrays()))
    model = PreparedModel(
        unetc=unetc.__version__,
        commit=checkout.commit(),
        reference=source.reference,
        precision=source.precision,
        trained=source.trained,
        sample_shape=source.sample_shape,
        predicted_channels=source.gated.predicted_channels,
        rows=dict(source.rows),
        guidance_scale=source.conditions.scale,
        steps=source.scheduler.counts[0],
        scheduler=header,
        engines=tuple(
            Engine(name=name, graph=graphs[name], reads=external(folder / graphs[name]), assignment=assignment)
            for name, assignment in chosen.items()
        ),
        files=tuple(record_of(path) for path in sorted(folder.iterdir())),
    )
    model.save(folder / RECORD)
    return model


def write_graphs(source: Source, chosen: Mapping[str, Assignment], graphs: Mapping[str, str], folder: Path) -> Path:
    """Write the graph of every engine and return the weights file that they refer to."""
    gated = source.gated
    means = np.zeros(gated.channels, np.float32)
    for name, assignment in chosen.items():
        serialised = specialise(gated, assignment.treatments, means, assignment.emits)
        (gated.folder / graphs[name]).write_bytes(serialised.graph)
    place = gated.folder
    if source.precision is not Precision.FP32:
        place = gated.folder / source.precision
        lower_graphs(gated.folder, tuple(graphs.values()), source.precision, place)
    for file in graphs.values():
        shutil.copyfile(place / file, folder / file)
    return place / WEIGHTS


def contents_of(weights: Path, limit: float) -> bytes:
    """Read the tensors of a weights file that have at most `limit` values."""
    with safetensors.safe_open(weights, framework="pt") as file:  # numpy has no bfloat16
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        return safetensors.torch.save({name: file.get_tensor(name) for name in sizes if sizes[name] <= limit})


def external(graph: Path) -> tuple[str, ...]:
    """List the tensors that a graph reads from the weights file."""
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    return tuple(sorted(own.name for own in initializers if own.data_location == onnx.TensorProto.EXTERNAL))


def record_of(path: Path) -> FileRecord:
    """Record the size and hash of a file."""
    data = path.read_bytes()
    return FileRecord(path=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def fetch_libraries(folder: Path, python: str) -> None:
    """Unpack the libraries of unetc's runtime for another Python, in the versions installed here."""
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-compile", "--target", str(folder)]
    where = ["--only-binary", ":all:", "--platform", "manylinux2014_x86_64", "--python-version", python]
    subprocess.run([*pip, *where, *(f"{name}=={version(name)}" for name in CARRIED)], check=True)


def main() -> None:
    """Prepare models and libraries."""
    random = shapes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", choices=(*TRAINED, *random), default=[*TRAINED, *random])
    parser.add_argument("--precision", type=Precision, default=Precision.FP16)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--size", type=int, help="side of the samples of random models [default: the model's own]")
    parser.add_argument("--work", type=Path, help="folder for captures [default: the system's temporary folder]")
    parser.add_argument("--again", action="store_true", help="also prepare models that are already prepared")
    parser.add_argument("--python", default="3.12", help="Python version for the libraries; empty: no libraries")
    parser.add_argument("--smoke", action="store_true", help="try the script with narrow models")
    options = parser.parse_args()
    for name in options.models:
        folder = options.folder / name
        if (folder / RECORD).exists() and not options.again:
            print(f"{name}: already prepared", flush=True)
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            if name in random:
                shape = random[name].narrow() if options.smoke else random[name].sized(options.size)
                source = random_source(name, shape, options.precision, options.steps, Path(work))
            else:
                source = trained_source(name, options.steps, Path(work))
            model = write(source, folder)
        size = sum(file.bytes for file in model.files) / 1e6
        print(f"{name}: {size:.1f} MB in {time.perf_counter() - start:.0f} s", flush=True)
    if options.python:
        fetch_libraries(options.folder / "libraries", options.python)


if __name__ == "__main__":
    main()
