"""Parts of the benchmark that time single engine calls, and measure the memory of engines."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from clock import Effort, timed_ms
from gpu_engines import Loaded
from gpu_folder import DROP, FORECAST, FULL, INNER, OUTER, PLANNED, REFRESH
from gpu_result import Absent, Measured
from rounds import spread, switch_cost
from safetensors.torch import load

from unetc.backend import Program
from unetc.errors import UnetcError
from unetc.runtime.backends.torch import COMPILED
from unetc.runtime.backends.torch_device import TorchProgram
from unetc.runtime.backends.torch_graph import translate

MIB = 2**20
ENGINES = (FULL, REFRESH, OUTER, FORECAST, INNER, DROP)
SHARED_ENGINES = 3
"""Number of engines that should take little more memory than one."""
COMPARED = (FULL, OUTER)
"""Engines that are also run eagerly and compiled, and that alternate when a switch is timed."""
SWITCHES = 10
"""Factor on the rounds of other comparisons, because a switch costs less than the noise of a call."""


def memory(loaded: Loaded) -> Measured:
    """Load engines one after the other, call each with one sample, and measure the GPU memory taken.

    Raises:
        Absent: If the target is not on a GPU.
    """
    if not on_gpu(loaded):
        raise Absent("memory is measured on an NVIDIA GPU, which this target does not use.")
    weights, batch = len(loaded.folder.weights) / MIB, loaded.batch(1)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, _ = torch.cuda.mem_get_info()
    taken: list[float] = []
    rows: list[list[object]] = []
    for i, engine in enumerate((FULL, *PLANNED), start=1):
        batch.call(engine)()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append((before - torch.cuda.mem_get_info()[0]) / MIB)
        peak, reserved = torch.cuda.max_memory_allocated() / MIB, torch.cuda.memory_reserved() / MIB
        rows.append([f"{loaded.title}: {engine}", i, weights, taken[-1], taken[-1] / taken[0], peak, reserved])
    measured = Measured()
    columns = ["engine loaded last", "engines", "weights, MiB", "taken on the GPU, MiB", "/ one engine"]
    columns += ["torch: peak allocated, MiB", "torch: reserved, MiB"]
    measured.table(f"Memory on {loaded.target}, one sample", columns, rows)
    name = f"{loaded.title}, {loaded.target}: memory of {SHARED_ENGINES} engines / one"
    measured.figure(name, taken[SHARED_ENGINES - 1] / taken[0], {"at_most": 1.3})
    return measured


def engines(loaded: Loaded, batches: Sequence[int], effort: Effort) -> Measured:
    """Time all engines alternately, for every number of samples, and a switch between two of them."""
    measured = Measured()
    rows: list[list[object]] = []
    for size in batches:
        batch = loaded.batch(size)
        times = timed_ms([batch.call(engine) for engine in ENGINES], loaded.clock, effort)
        for i, engine in enumerate(ENGINES):
            ratio = float(np.median(times[:, i] / times[:, 0]))
            rows.append([f"{loaded.title}: {engine}", batch.rows, *spread(times[:, i]), ratio, len(times)])
    columns = ["engine", "rows of a call", "ms", "p10", "p90", "/ full model", "rounds"]
    measured.table(f"Engine calls on {loaded.target}, timed alternately", columns, rows)
    batch = loaded.batch(1)
    one, other = (batch.call(engine) for engine in COMPARED)
    patient = Effort(seconds=effort.seconds, least=SWITCHES * effort.least, most=SWITCHES * effort.most)
    cost, low, high = switch_cost(timed_ms([one, one, other, other], loaded.clock, patient))
    name = f"{loaded.title}, {loaded.target}: a switch of engines, in steps"
    measured.figure(name, cost, {"at_most": 0.005})
    measured.figure(f"{name}, lower end of the 95 % interval", low)
    measured.figure(f"{name}, upper end of the 95 % interval", high)
    return measured


def graphs(loaded: Loaded, batches: Sequence[int], effort: Effort) -> Measured:
    """Compare CUDA graphs with torch eager, which launches kernels one by one.

    Raises:
        Absent: If the target has no CUDA graphs.
    """
    if not (on_gpu(loaded) and loaded.target.startswith("torch:")):
        raise Absent("only torch:cuda targets have CUDA graphs.")
    device = torch.device("cuda")
    weights = {name: tensor.to(device) for name, tensor in load(loaded.folder.weights).items()}
    eager: dict[str, Program] = {}
    for engine in COMPARED:
        translated = translate(loaded.folder.graph(engine).graph, weights, device)
        eager[engine] = TorchProgram(translated.module, translated.inputs, translated.outputs)
    rows: list[list[object]] = []
    for size in batches:
        batch = loaded.batch(size)
        calls = [batch.call(engine, program) for engine in COMPARED for program in (None, eager[engine])]
        times = timed_ms(calls, loaded.clock, effort).reshape(-1, len(COMPARED), 2)
        for i, engine in enumerate(COMPARED):
            ratio = spread(times[:, i, 0] / times[:, i, 1])
            medians = [float(value) for value in np.median(times[:, i], axis=0)]
            rows.append([f"{loaded.title}: {engine}", batch.rows, *medians, *ratio])
    columns = ["engine", "rows of a call", "CUDA graph, ms", "eager, ms", "graph / eager", "p10", "p90"]
    measured = Measured()
    measured.table(f"CUDA graphs and torch eager on {loaded.target}, timed alternately", columns, rows)
    return measured


def compiled(loaded: Loaded, effort: Effort) -> Measured:
    """Compare engines compiled by torch.compile with the target itself, and time the compilation.

    Raises:
        Absent: If the target cannot be compiled, or there is no compiler.
    """
    try:
        other = Loaded(loaded.folder, f"{loaded.target}:{COMPILED}", most=loaded.most)
    except UnetcError as error:
        raise Absent(str(error)) from error
    batch = loaded.batch(1)
    seconds: list[float] = []
    calls = []
    for engine in COMPARED:
        start = time.perf_counter()
        call = batch.call(engine, other.program(engine))
        call()
        loaded.device.synchronize()
        seconds.append(time.perf_counter() - start)
        calls += [batch.call(engine), call]
    times = timed_ms(calls, loaded.clock, effort).reshape(-1, len(COMPARED), 2)
    rows: list[list[object]] = []
    for i, engine in enumerate(COMPARED):
        medians = [float(value) for value in np.median(times[:, i], axis=0)]
        to_full = float(np.median(times[:, i, 1] / times[:, 0, 1]))
        rows.append(
            [f"{loaded.title}: {engine}", batch.rows, *medians, *spread(times[:, i, 1] / times[:, i, 0]), to_full]
        )
        rows[-1].append(seconds[i])
    columns = ["engine", "rows of a call", f"{loaded.target}, ms", "compiled, ms", "compiled / not", "p10", "p90"]
    columns += ["compiled / full compiled", "load and compile, s"]
    measured = Measured()
    measured.table(f"torch.compile on {loaded.target}, timed alternately", columns, rows)
    return measured


def on_gpu(loaded: Loaded) -> bool:
    """Check whether a target is on an NVIDIA GPU."""
    return torch.cuda.is_available() and not loaded.target.endswith(":cpu")
