"""The machine and the libraries behind a measurement."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import EngineBuildError, brief
from .nvidia.driver import ask

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "triton",
    "diffusers",
    "onnx",
    "scipy",
)


def cache_folder() -> Path:
    """Return the folder of all caches: $UNETC_CACHE, or ~/.cache/unetc."""
    return Path(os.environ.get("UNETC_CACHE") or Path.home() / ".cache" / "unetc")


def cores() -> int:
    """Count the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that programs can still allocate without swapping; None if the system does not report them.

    Args:
        root: Root of the file system.

    Source:
        https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files (memory limits of containers)
    """
    groups = (_left(root / "sys/fs/cgroup" / folder) for folder in (".", "memory"))
    reported = [_available(root / "proc/meminfo"), *groups]
    return min((size for size in reported if size is not None), default=None)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _left(group: Path) -> int | None:
    """Return the bytes left below the limit of a control group; cached files count as free if they can be dropped."""
    version_2, version_1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for names in (version_2, version_1):
        try:
            limit, taken = (int((group / name).read_text()) for name in names)  # "max" means no limit
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(0, limit - taken + int(stat.get("inactive_file", 0)))
        except (OSError, ValueError):
            continue
    return None


def peak_memory() -> int:
    """Return the peak memory of this process in bytes; 0 if the system does not report it.

    `getrusage` is no substitute, because its peak includes the memory of the parent process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return 0


def lacking(libraries: Iterable[str]) -> dict[str, str]:
    """Map every library that cannot be imported to the reason."""
    missing = {}
    for library in libraries:
        try:
            importlib.import_module(library)
        except Exception as error:  # a library that is broken raises anything
            missing[library] = brief(error)
    return missing


def describe() -> dict[str, str]:
    """List the operating system, processor, cores, Python and library versions."""
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(cores()),
        "python": platform.python_version(),
    }
    for library in LIBRARIES:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            continue
    return facts


def machine_for(target: str) -> str:
    """Describe this machine as far as the results of a target depend on it, apart from its load.

    Args:
        target: Name of the target.
    """
    place = _processor()
    if not on_cpu(target):
        try:
            (place,) = ask("name")
        except EngineBuildError:
            place = "unknown GPU"
    library = "tensorrt" if target.startswith("tensorrt") else target.partition(":")[0]
    facts = describe()
    computing = [name for name in LIBRARIES if name in facts and (name == "numpy" or name.startswith(library))]
    return ", ".join([place, *(f"{name} {facts[name]}" for name in computing)])


def on_cpu(target: str) -> bool:
    """Check whether a target needs no GPU."""
    return target.startswith(("onnxruntime:cpu", "torch:cpu", "null"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
