"""unetc: an optimization compiler for diffusion models.

    import unetc

    session = unetc.load("bundle/")
    images = session.sample(batch=4, seed=0)  # [batch, channel, height, width]

Names are loaded on first use, so importing the package is cheap and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unetc.runtime.bundle import Bundle
    from unetc.runtime.session import Session, Step, load

    from .artifacts import Manifest, Plan, Profile, Verification
    from .errors import UnetcError

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "unetc.runtime.bundle",
    "Manifest": "unetc.artifacts",
    "Plan": "unetc.artifacts",
    "Profile": "unetc.artifacts",
    "Session": "unetc.runtime.session",
    "Step": "unetc.runtime.session",
    "UnetcError": "unetc.errors",
    "Verification": "unetc.artifacts",
    "load": "unetc.runtime.session",
}

__all__ = [
    "Bundle",
    "Manifest",
    "Plan",
    "Profile",
    "Session",
    "Step",
    "UnetcError",
    "Verification",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unetc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
