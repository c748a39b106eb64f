"""Everything that decides what an engine is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec

from unetc.artifacts.record import Record
from unetc.precision import Precision

from .sizes import Sizes

RECIPE = 2
"""Of this version: 1 did not ask for scratch memory that the caller always gives."""


class Gpu(Record, frozen=True, kw_only=True):
    """A GPU that an engine is bound to."""

    name: str
    compute_capability: str
    """As in 8.9."""
    driver: str

    def __str__(self) -> str:
        """Write for people."""
        return f"{self.name} of {self.compute_capability} with driver {self.driver}"


class _Hashed(Record, frozen=True, kw_only=True):
    def sha256(self) -> str:
        """Hash all fields."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class Origin(_Hashed, frozen=True, kw_only=True):
    """Where an engine is built, and so where it may run."""

    unetc: str
    recipe: int
    """What unetc asks of the library whatever the engine; another number where it asks for something else."""
    target: str
    """What the library is called on the command line."""
    library: str
    """Version of the library that builds and runs it."""
    platform: str
    """Operating system and processor."""
    gpu: Gpu | None
    """Of the machine; None if the engine is for many."""

    def misfit(self, here: Origin) -> str:
        """Say what keeps an engine of this origin from running here; nothing if it runs.

        One that is for many GPUs runs on each of them.
        """
        names = [name for name in _differences(self, here) if name != "gpu" or self.gpu is not None]
        pairs = ((name, getattr(self, name), getattr(here, name)) for name in names)
        said = ", ".join(f"{name} {own} (here {now or 'not known'})" for name, own, now in pairs)
        return said and f"for {said}"


class Effort(Record, frozen=True, kw_only=True):
    """What a build may spend; the first try gets what was asked for, later ones less."""

    optimization_level: int = 3
    """0 to 5, as both libraries count; 3 is their default."""
    workspace_share: float = 1.0
    """Of the memory for scratch that the library would allow itself."""


class EngineKey(_Hashed, frozen=True, kw_only=True):
    """Two engines differ where two keys do."""

    origin: Origin
    graph_sha256: str
    weights_sha256: str
    """Of the bundle's files, before their precision was lowered."""
    precision: Precision
    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition."""
    effort: Effort
    """What was asked for."""

    def differences(self, other: EngineKey) -> list[str]:
        """Name the fields in which another key differs."""
        return _differences(self.origin, other.origin) + [n for n in _differences(self, other) if n != "origin"]


def compile_command(target: str, precision: Precision, sizes: Sizes | None = None, *, bundle: str = "BUNDLE") -> str:
    """Write the command that builds an engine of a bundle."""
    command = f"unetc compile {bundle} --target {target}"
    if precision is not Precision.FP32:
        command += f" --precision {precision}"
    return command if sizes is None else f"{command} {sizes.options()}"


def _differences(one: Record, other: Record) -> list[str]:
    return [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
