"""The libraries that build and run engines, and all their differences.

Both have the same API under two names. `tensorrt_rtx` builds without a GPU: its engines are finished where they run, on
any supported GPU from compute capability 8.0 on; for an older GPU they must be built specially. `tensorrt` measures
kernels on the GPU that it finds, and its engines run on that kind of GPU alone.
"""

from __future__ import annotations

import importlib
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

import unetc
from unetc.errors import EngineBuildError, MissingDependency, brief

from .driver import ask
from .key import RECIPE, Gpu, Origin

logger = logging.getLogger(__name__)

_KEPT_COMPLAINTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One of the two libraries."""

    target: str
    """Its name on the command line."""
    module: str
    extra: str
    portable: bool
    """Whether its engines are built without a GPU, for many GPUs."""
    times_kernels: bool
    """Whether it has a timing cache, so that measurements for one engine are not repeated for the next."""

    def load(self) -> Any:
        """Import the library.

        Raises:
            MissingDependency: If it is not installed, or cannot be loaded here.
        """
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # a library that is broken raises anything
            if isinstance(error.__cause__, KeyboardInterrupt):  # its bindings turn it into an ImportError
                raise error.__cause__ from None
            raise MissingDependency(self._lacking(brief(error))) from error
        if not hasattr(module, "__version__"):
            raise MissingDependency(self._lacking(f"an empty package is installed, {list(module.__path__)}"))
        return module

    def _lacking(self, reason: str) -> str:
        return f"target {self.target} needs {self.module} ({reason}): pip install 'unetc[{self.extra}]'"

    def origin(self, *, on_this_gpu: bool = False, gpu: int = 0) -> Origin:
        """Describe this machine as the origin of an engine, bound to a GPU if the library or the caller demands it.

        Args:
            on_this_gpu: Whether the caller demands it.
            gpu: Index of the GPU among those that CUDA shows to this process.

        Raises:
            MissingDependency: If the library is not installed, or cannot be loaded here.
            EngineBuildError: If a GPU is needed and none is found.
        """
        here = self.anywhere()
        bound = on_this_gpu or not self.portable
        return msgspec.structs.replace(here, gpu=_gpu(self.target, gpu)) if bound else here

    def anywhere(self) -> Origin:
        """Describe this machine without its GPU.

        Raises:
            MissingDependency: If the library is not installed, or cannot be loaded here.
        """
        return Origin(
            unetc=unetc.__version__,
            recipe=RECIPE,
            target=self.target,
            library=str(self.load().__version__),
            platform=f"{platform.system()} {platform.machine()}",
            gpu=None,
        )

    def here(self, gpu: int = 0) -> Origin:
        """Describe this machine as the place where engines run, on one of the GPUs that CUDA shows to this process.

        Where the driver's tool is missing, as in many containers, the GPU is unknown. Then engines for many GPUs can
        run, and engines for one GPU alone cannot.

        Raises:
            MissingDependency: If the library is not installed, or cannot be loaded here.
            EngineBuildError: If the library's engines are for one GPU alone, and this machine's GPU is unknown.
        """
        try:
            return self.origin(on_this_gpu=True, gpu=gpu)
        except EngineBuildError as error:
            if not self.portable:
                raise
            logger.warning("engines for one GPU alone cannot run here: %s", error)
            return self.origin()

    def logger(self, complaints: list[str]) -> Any:
        """Make a logger that keeps the last errors of the library."""
        return _logger(self.load(), complaints)


def started(make: Callable[[Any], Any], logger: Any) -> Any:
    """Make a library's builder or runtime; None where CUDA cannot start (the binding raises a TypeError)."""
    try:
        return make(logger)
    except TypeError:
        return None


def words(complaints: list[str]) -> str:
    """Join the errors that the library has reported."""
    return " | ".join(complaints) or "it gives no reason"


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
        EngineBuildError: If the target has no such library.
    """
    if target not in LIBRARIES:
        runs_graphs = target.partition(":")[0] in ("onnxruntime", "torch")
        reason = ": it runs the graphs of a bundle directly, so `unetc sample` needs no engines" if runs_graphs else ""
        raise EngineBuildError(
            f"no engines can be built for target {target!r}{reason}. Available: {', '.join(LIBRARIES)}."
        )
    return LIBRARIES[target]


def _logger(trt: Any, complaints: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                complaints[:] = [*complaints[1 - _KEPT_COMPLAINTS :], message.strip()]

    return Logger()


def _gpu(target: str, gpu: int) -> Gpu:
    """Ask the driver for a GPU."""
    try:
        name, capability, driver = ask("name", "compute_cap", "driver_version", gpu=gpu)
    except EngineBuildError as error:
        raise EngineBuildError(
            f"this needs a {target} engine for the GPU of this machine, and {error}. Do it on the machine with the "
            "GPU; engines of tensorrt-rtx for any GPU are built without one."
        ) from error
    return Gpu(name=name, compute_capability=capability, driver=driver)
