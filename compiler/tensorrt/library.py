"""The libraries that build engines, and everything in which they differ.

Both have the same API under two names. `tensorrt_rtx` needs no GPU: its engines are finished where they run, on any
GPU of the compute capabilities that it supports. `tensorrt` measures kernels on the GPU it finds, and what it builds
runs on that kind of GPU alone.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unetc.errors import EngineBuildError, MissingDependency

from .messages import Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of the two libraries."""

    target: str
    """What it is called on the command line."""
    module: str
    extra: str
    portable: bool
    """Whether its engines are built without a GPU, for many."""
    times_kernels: bool
    """Whether it has a timing cache, which spares the next engine the measurements of this one."""

    def load(self) -> Any:
        """Import the library.

        Raises:
            MissingDependency: If it is not installed, or cannot be loaded here.
        """
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: a library that it is linked to is missing
            raise MissingDependency(
                f"target {self.target} needs {self.module} ({error}): pip install 'unetc[{self.extra}]'"
            ) from error

    def gpu(self) -> Gpu | None:
        """Name the GPU that engines are bound to; None if they are bound to none.

        Raises:
            EngineBuildError: If one is needed and there is none.
        """
        return None if self.portable else _first_gpu(self.target)


LIBRARIES: Mapping[str, Library] = {
    library.target: library
    for library in (
        Library(target="tensorrt", module="tensorrt", extra="tensorrt", portable=False, times_kernels=True),
        Library(target="tensorrt-rtx", module="tensorrt_rtx", extra="rtx", portable=True, times_kernels=False),
    )
}


def library_of(target: str) -> Library:
    """Find the library of a target.

    Raises:
        EngineBuildError: If there is none of this name.
    """
    if target not in LIBRARIES:
        raise EngineBuildError(f"no engines can be built for target {target!r}. Available: {', '.join(LIBRARIES)}.")
    return LIBRARIES[target]


def _first_gpu(target: str) -> Gpu:
    """Ask the driver's own tool, which needs no further library."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    missing = f"target {target} builds engines for the GPU of this machine, and"
    if shutil.which(query[0]) is None:
        raise EngineBuildError(
            f"{missing} {query[0]} is not there. Build on a machine with the GPU, or for tensorrt-rtx."
        )
    asked = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if asked.returncode or not asked.stdout.strip():
        raise EngineBuildError(f"{missing} {query[0]} finds none: {(asked.stdout + asked.stderr).strip()[-200:]}")
    name, capability, driver = (field.strip() for field in asked.stdout.splitlines()[0].rsplit(",", 2))
    return Gpu(name=name, compute_capability=capability, driver=driver)
