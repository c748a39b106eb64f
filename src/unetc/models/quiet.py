"""Silence around calls of diffusers and transformers, whose warnings are for those who call them by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def quiet(*libraries: ModuleType) -> Iterator[None]:
    """Let libraries report only errors, without progress bars; their own settings hold again afterwards.

    Args:
        libraries: diffusers, transformers.
    """
    loggings = [library.utils.logging for library in libraries]
    earlier = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in loggings]
    try:
        for logging in loggings:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield
    finally:
        for logging, (verbosity, bars) in zip(loggings, earlier, strict=True):
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
