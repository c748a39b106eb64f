"""The key of an engine: everything that the engine depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from unetc.artifacts.record import Record
from unetc.precision import Precision

from .sizes import Sizes

RECIPE = 2
"""Number of the build settings of this version; 1 did not require scratch memory from the caller."""


class Gpu(Record, frozen=True, kw_only=True):
    """A GPU that an engine is bound to."""

    name: str
    compute_capability: str
    """Such as 8.9."""
    driver: str

    def __str__(self) -> str:
        """Format for people."""
        return f"{self.name} of {self.compute_capability} with driver {self.driver}"


class _Hashed(Record, frozen=True, kw_only=True):
    def sha256(self) -> str:
        """Hash all fields."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Origin(_Hashed, frozen=True, kw_only=True):
    """The place where an engine is built, and therefore where it may run."""

    unetc: str
    recipe: int
    """Number of the build settings that unetc uses for every engine; it changes with them."""
    target: str
    """Name of the library on the command line."""
    library: str
    """Version of the library that builds and runs it."""
    platform: str
    """Operating system and processor."""
    gpu: Gpu | None
    """The machine's GPU; None if the engine is for many GPUs."""

    def misfit(self, here: Origin) -> str:
        """Describe why an engine of this origin cannot run here; empty if it can.

        An engine for many GPUs runs on each of them.
        """
        names = [name for name in _differences(self, here) if name != "gpu" or self.gpu is not None]
        pairs = ((name, getattr(self, name), getattr(here, name)) for name in names)
        said = ", ".join(f"{name} {own} (here {now or 'unknown'})" for name, own, now in pairs)
        return said and f"for {said}"


class Effort(Record, frozen=True, kw_only=True):
    """Limits of a build; the first try gets the requested effort, later tries get less."""

    optimization_level: int = 3
    """Level from 0 to 5 in both libraries; 3 is their default."""
    workspace_share: float = 1.0
    """Share of the scratch memory that the library would use by default."""


class EngineKey(_Hashed, frozen=True, kw_only=True):
    """Identifies an engine: engines with equal keys are interchangeable."""

    origin: Origin
    graph_sha256: str
    weights_sha256: str
    """Hash of the bundle's weights file; like the graph's hash, from before the precision was lowered."""
    precision: Precision
    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition."""
    effort: Effort
    """The requested effort."""

    def differences(self, other: EngineKey) -> list[str]:
        """Name the fields in which another key differs."""
        return _differences(self.origin, other.origin) + [n for n in _differences(self, other) if n != "origin"]


def compile_command(target: str, precision: Precision, sizes: Sizes | None = None, *, bundle: str = "BUNDLE") -> str:
    """Format the command that builds the engines of a bundle."""
    command = f"unetc compile {bundle} --target {target}"
    if precision is not Precision.FP32:
        command += f" --precision {precision}"
    return command if sizes is None else f"{command} {sizes.options()}"


def _differences(one: Record, other: Record) -> list[str]:
    return [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
