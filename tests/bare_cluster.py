"""A Ray cluster on this machine without the libraries of a capture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray_cluster

ABSENT = ("torch", "diffusers", "transformers", "torchmetrics", "onnxscript")
"""Libraries that workers do not need."""


@contextmanager
def bare_cluster(folder: Path, cpus: int) -> Iterator[None]:
    """Start a cluster whose processes cannot import the libraries of a capture.

    Args:
        folder: An empty folder.
        cpus: CPUs that it counts with.
    """
    for library in ABSENT:
        (folder / f"{library}.py").write_text(f"raise ModuleNotFoundError({library!r})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        with ray_cluster.started(cpus=cpus):
            yield
