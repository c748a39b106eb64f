"""What do phase engines save on an NVIDIA GPU, and what does the runtime cost there?

    python benchmarks/gpu_prepare.py FOLDER      # beforehand, with all libraries installed; needs no GPU
    PYTHONPATH=FOLDER/libraries python benchmarks/gpu.py FOLDER      # with a GPU, torch, numpy and onnx

The benchmark measures UNets with the shapes of Stable Diffusion 1.5, XL and GLIDE's base model (random weights) and the
trained reference models, and writes `results/gpu.json`:

- engine calls, timed alternately by CUDA events: the full model and engines that emit, hold, forecast and drop
- the cost of a switch of engines, in steps of the full model
- whole trajectories, sampled alternately: plans fitted to a budget by the engine times measured just before, and
  DeepCache's plans, with predicted and measured time; wall time of sampling / time inside the engine calls; the cost of
  checking every step for non-finite values; the damage, for trained models
- GPU memory taken as more engines are loaded
- CUDA graphs against torch eager, and against torch.compile, for the full model and an engine that holds

TensorRT engines are built on their first call, then cached. Building takes longer than measuring, so start the command
again until it has nothing left to do.

Every part is saved when it is finished, and skipped when the command is started again. Starts for other models, parts
or targets add to the same result, as long as sources, settings, machine and prepared models are the same. Parts that
cannot be measured are listed in the result with the reason. The slowest part, torch.compile, comes last. When the time
is up, the command stops, and the next start continues. A failed part does not prevent the others. If no CUDA graph can
be captured, the part counts as failed, since kernels launched one by one take a different time.

`--target torch:cpu` tries the script on the CPU; its figures then say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import checkout
import torch
from clock import Effort
from gpu_engines import Loaded
from gpu_folder import Folder, open_folders
from gpu_parts import compiled, engines, graphs, memory
from gpu_result import Absent, Measured, joined
from gpu_sampling import DAMAGE_SAMPLES, sampling

from unetc.artifacts.record import write_atomically
from unetc.environment import describe
from unetc.errors import ArtifactError, MissingDependency, UnetcError
from unetc.runtime.backends import cuda_graph
from unetc.runtime.backends.registry import open_backend

RESULT = "gpu.json"
TARGET = "torch:cuda"
OTHERS = ("onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt", "tensorrt-rtx")
"""Further targets, measured if their libraries are installed."""

Part = Callable[[Loaded], Measured]


class TimeIsUp(BaseException):
    """Time limit reached. Not an `Exception`, because libraries that try alternatives would swallow it."""


class Eager(UnetcError):
    """Kernels were launched one by one although a CUDA graph was to be measured."""


class Result:
    """The result file, which keeps finished parts."""

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        prepared: Mapping[str, str],
    ) -> None:
        """Read the parts that earlier starts finished and that would be measured the same way now.

        A file with other settings or from another machine is moved aside.

        Args:
            path: Path of the result file.
            settings: Settings that affect all parts.
            environment: The machine and its libraries.
            prepared: Hash of each prepared model, by name.

        Raises:
            ArtifactError: If the file exists but is not a result.
        """
        self.path = path
        self._settings = settings
        self._environment = environment
        self.parts: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.late: frozenset[str] = frozenset()
        """Parts that failed or were cut short before; they come last, so that they do not delay the others."""
        if path.exists():
            try:
                before = json.loads(path.read_text())
                parts, absent, failed, *same = (
                    before[key] for key in ("parts", "absent", "failed", "settings", "environment")
                )
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise ArtifactError(f"{path} is no result of gpu.py. Move it, or choose other --results.") from error
            if same != [settings, environment]:
                aside = path.replace(path.with_name(f"{path.name}.before"))
                print(f"{aside}: earlier result, with other settings or from another machine", flush=True)
                return
            self.absent, self.failed, self.late = absent, failed, frozenset(failed)
            self.parts = {
                key: part for key, part in parts.items() if prepared.get(part["model"]) in (None, part["prepared"])
            }

    def add(self, key: str, loaded: Loaded, seconds: float, measured: Measured) -> None:
        """Add the measurements of a part."""
        self.parts[key] = {
            "model": loaded.folder.name,
            "prepared": loaded.folder.model.sha256(),
            "seconds": seconds,
            "figures": measured.figures,
            "tables": measured.tables,
        }

    def save(self) -> None:
        """Write all results so far."""
        record = {
            "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
            "commit": checkout.commit(),
            "environment": self._environment,
            "settings": self._settings,
            **joined(self.parts.values()),
            "absent": self.absent,
            "failed": self.failed,
            "parts": self.parts,
        }
        write_atomically(self.path, (json.dumps(record, indent=1) + "\n").encode())


def passes_of(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Part]]]:
    """List target, model and parts in the order of measurement; parts have their names in the result."""
    effort = Effort(seconds=options.seconds, least=options.rounds)
    patient = Effort(seconds=3 * options.seconds, least=options.rounds)
    calls: dict[str, Part] = {
        "engines": partial(engines, batches=options.batches, effort=effort),
        "sampling": partial(sampling, effort=patient),
    }
    eager: Part = partial(graphs, batches=options.batches, effort=effort)
    first: dict[str, Part] = {"memory": memory, **calls, "graphs": eager}
    last: dict[str, Part] = {"compiled": partial(compiled, effort=effort)}
    passes = [(options.target, first), *((target, calls) for target in options.others), (options.target, last)]
    for target, parts in passes:
        for model in options.models:
            chosen = {name: part for name, part in parts.items() if name in options.parts}
            yield target, model, {f"{model}, {target}: {name}": part for name, part in chosen.items()}


def measure_all(options: argparse.Namespace, result: Result) -> None:
    """Measure all parts that are not finished."""
    tried = {name for target, _, parts in passes_of(options) for name in (target, *parts)}
    result.absent = {name: reason for name, reason in result.absent.items() if name not in tried}
    for late in (False, True):
        for target, model, parts in passes_of(options):
            pending = {
                key: part for key, part in parts.items() if key not in result.parts and (key in result.late) is late
            }
            if pending and target not in result.absent:
                measure_model(options.folder / model, target, pending, result, max(*options.batches, DAMAGE_SAMPLES))


def measure_model(path: Path, target: str, pending: Mapping[str, Part], result: Result, most: int) -> None:
    """Load a model and measure parts on it, with at most `most` samples per call."""
    try:
        loaded = Loaded(Folder(path), target, most=most)
    except UnetcError as error:
        result.absent[target] = str(error)
        result.save()
        print(f"{target}: absent, {error}", flush=True)
        return
    with warnings_of(cuda_graph.logger) as said:
        for key, part in pending.items():
            measure(key, partial(captured, part, said), loaded, result)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def captured(part: Part, said: Sequence[str], loaded: Loaded) -> Measured:
    """Measure a part, and check that its engines ran as CUDA graphs where the target supports them.

    Args:
        part: The part.
        said: Warnings about failed captures since the model was loaded; an engine that failed once stays eager.
        loaded: The model.

    Raises:
        Eager: If an engine could not be captured.
    """
    measured = part(loaded)
    if said:
        raise Eager(said[0])
    return measured


@contextmanager
def warnings_of(logger: logging.Logger) -> Iterator[Sequence[str]]:
    """Collect the warnings of a logger."""
    said: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def measure(key: str, part: Part, loaded: Loaded, result: Result) -> None:
    """Measure a part and save it, or save the reason why it cannot be measured.

    Raises:
        TimeIsUp: If the time is up.
    """
    start = time.perf_counter()
    print(f"{key} ...", flush=True)
    result.failed.pop(key, None)
    try:
        measured = part(loaded)
    except (Absent, MissingDependency) as error:
        result.absent[key] = str(error)
        print(f"{key}: absent, {error}", flush=True)
    except Exception as error:  # drivers and compilers raise anything; the other parts are still measured
        result.failed[key] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
        print(f"{key}: failed, {result.failed[key]}", flush=True)
    except TimeIsUp:
        result.failed[key] = f"cut short after {time.perf_counter() - start:.0f} s"
        result.save()
        raise
    else:
        seconds = time.perf_counter() - start
        result.add(key, loaded, seconds, measured)
        print(f"{key}: {seconds:.0f} s", flush=True)
    result.save()


def gpu_facts() -> dict[str, str]:
    """Describe the GPU that torch uses, and its driver; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "gpu memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    }
    with suppress(PackageNotFoundError):
        facts["triton"] = version("triton")
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        facts["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return facts


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """List the settings that affect all parts."""
    return {
        "batches": ", ".join(map(str, options.batches)),
        "seconds": options.seconds,
        "rounds": options.rounds,
        "convolutions in TF32": torch.backends.cudnn.allow_tf32,
        "matrices in TF32": torch.backends.cuda.matmul.allow_tf32,
        "sources": checkout.sources_sha256()[:12],
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the running code after a number of seconds."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


PARTS = ("memory", "engines", "sampling", "graphs", "compiled")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder written by gpu_prepare.py")
    parser.add_argument("--results", type=Path, help=f"folder of {RESULT} [default: benchmarks/results]")
    parser.add_argument("--target", default=TARGET)
    parser.add_argument("--others", nargs="*", default=list(OTHERS), help="further targets")
    parser.add_argument("--models", nargs="*", default=[], help="[default: all prepared models]")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 8])
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="time per comparison; sampling takes 3 times as long"
    )
    parser.add_argument("--rounds", type=int, default=5, help="minimum rounds of a comparison, however long they take")
    parser.add_argument("--minutes", type=float, default=8.3, help="time limit after which the command stops")
    parser.add_argument("--smoke", action="store_true", help="try the script: two rounds of every comparison")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.batches, options.seconds, options.rounds = [1, 2], 0.0, 2
    return options


def check(options: argparse.Namespace) -> None:
    """Check the options, and fill in the models and the results folder.

    Raises:
        UnetcError: If the target cannot be used, a model is not prepared, or CPU figures would be taken for a GPU's.
    """
    if options.results is None and options.target.endswith(":cpu"):
        raise UnetcError(f"{options.target} is no GPU. Choose a folder for its figures with --results FOLDER.")
    open_backend(options.target, threads=0)
    prepared = [folder.name for folder in open_folders(options.folder)]
    if unknown := [name for name in options.models if name not in prepared]:
        raise UnetcError(f"{options.folder} has no {unknown[0]}. It has: {', '.join(prepared)}.")
    options.models = options.models or prepared
    options.results = options.results or checkout.ROOT / "benchmarks/results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 if all is measured, 1 on an error or a failed part, 3 if the time ran out."""
    options = parse(arguments)
    try:
        check(options)
        prepared = {folder.name: folder.model.sha256() for folder in open_folders(options.folder)}
        result = Result(options.results / RESULT, settings_of(options), describe() | gpu_facts(), prepared)
    except UnetcError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1
    try:
        with time_limit(60 * options.minutes):
            measure_all(options, result)
    except TimeIsUp:
        print(f"{options.minutes:g} minutes are over. Run the same command again to continue.")
        return 3
    return 1 if result.failed else 0


if __name__ == "__main__":
    sys.exit(main())
