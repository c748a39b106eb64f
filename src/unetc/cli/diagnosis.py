"""Find the libraries and targets that work on this machine."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from unetc.compiler.tensorrt.options import check_tools
from unetc.environment import describe, free_memory, lacking
from unetc.errors import EngineBuildError, MissingDependency, UnetcError
from unetc.extras import EXTRAS
from unetc.nvidia.driver import ask
from unetc.nvidia.library import LIBRARIES, Library
from unetc.precision import Precision
from unetc.runtime.backends.registry import DEFAULT_TARGET, OFFERED, open_backend

_STAGES = {
    "analyze, plan, build, verify": ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "scipy"),
    "report": ("matplotlib", "jinja2"),
}

MACHINE = "machine"
_COMMAND = re.compile(r"(pip uninstall \S+; )?pip install '[^']+'")
"""The command at the end of a message about a missing library."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part that works here or does not."""

    name: str
    works: bool
    needed: bool
    detail: str

    @property
    def short(self) -> str:
        """The command that brings a missing part, or else the reason; nothing for a part that works."""
        if self.works:
            return self.detail if self.name == MACHINE else ""
        if command := _COMMAND.search(self.detail):
            return command[0]
        return re.sub(r"^target \S+ ", "", self.detail).split(". ")[0].rstrip(".")

    def facts(self) -> dict[str, object]:
        """List everything that is known, for programs."""
        return asdict(self) | {"help": "" if self.works else self.short}


def diagnose() -> list[Finding]:
    """Try every backend and every library that a command needs."""
    machine = ", ".join(
        f"{key} {value}" for key, value in describe().items() if key in ("processor", "cores", "python")
    )
    if (free := free_memory()) is not None:
        machine += f", {free / 2**30:.0f} GiB of memory free"
    findings = [Finding(name=MACHINE, works=True, needed=True, detail=machine), _find_gpu()]
    findings += [_try_backend(target) for target in OFFERED]
    findings += [_try_library(library) for library in LIBRARIES.values()]
    findings += [_try_stage(stage, libraries) for stage, libraries in _STAGES.items()]
    return findings


def _find_gpu() -> Finding:
    name = "NVIDIA GPU"
    try:
        gpu, capability, driver, memory = ask("name", "compute_cap", "driver_version", "memory.total")
    except EngineBuildError as error:
        return Finding(name=name, works=False, needed=False, detail=str(error))
    detail = f"{gpu}, compute capability {capability}, driver {driver}, {memory}"
    return Finding(name=name, works=True, needed=False, detail=detail)


def _try_backend(target: str) -> Finding:
    name, needed = f"target {target}", target == DEFAULT_TARGET
    try:
        open_backend(target, threads=1)
    except UnetcError as error:
        return Finding(name=name, works=False, needed=needed, detail=str(error))
    return Finding(name=name, works=True, needed=needed, detail=_version(target.split(":")[0]))


def _try_library(library: Library) -> Finding:
    name = f"compile for {library.target}"
    try:
        origin = library.origin()
        check_tools(library, [Precision.FP32])
    except UnetcError as error:
        return Finding(name=name, works=False, needed=False, detail=str(error))
    place = "for any GPU it supports" if origin.gpu is None else f"for {origin.gpu.name}"
    detail = f"{library.module} {origin.library}, {place}"
    try:
        check_tools(library, [Precision.FP16])
    except MissingDependency as error:
        detail += f"; {error}"
    return Finding(name=name, works=True, needed=False, detail=detail)


def _try_stage(stage: str, libraries: tuple[str, ...]) -> Finding:
    if missing := lacking(libraries):
        reasons = ", ".join(f"{library} ({reason})" for library, reason in missing.items())
        detail = f"{reasons}: pip install 'unetc[{EXTRAS[next(iter(missing))]}]'"
        return Finding(name=stage, works=False, needed=False, detail=detail)
    return Finding(name=stage, works=True, needed=False, detail=", ".join(_version(name) for name in libraries))


def _version(library: str) -> str:
    name = library.replace("_", "-")
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return name
