"""One session per quality level of a bundle, over shared programs."""

from __future__ import annotations

from unetc.artifacts.manifest import FULL
from unetc.backend import Backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.loaded_bundle import LoadedBundle
from unetc.runtime.session import Session


def open_levels(bundle: Bundle, backend: Backend) -> dict[str, Session]:
    """Open a session for the full model and one for every quality level of a bundle.

    Every graph is loaded once, and the sessions share its program and the decoder. Calls of different levels may
    therefore be batched wherever their program is the same object. With `memory="low"` on a GPU, every session
    releases the engines that its own rollouts do not need soon, and a call of another session loads them again.

    Args:
        bundle: The bundle.
        backend: Runs its engines.

    Returns:
        Sessions by the name of their level: "full" first, then from the smallest budget to the largest.
    """
    loaded = LoadedBundle(bundle, backend)
    names = (FULL, *(level.name for level in bundle.manifest.levels))
    return {name: Session.over(loaded, level=name) for name in names}
