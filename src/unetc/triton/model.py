"""The model.py of an exported repository: the only code in it, and the same in every export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unetc.triton.sampling import SamplingModel


class TritonPythonModel:
    """Samples images by calling the engines, which are other models of the server."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle next to this file."""
        import triton_python_backend_utils  # Triton brings it, for its own processes alone

        self.sampling = SamplingModel.open(Path(__file__).parent, triton_python_backend_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests."""
        return self.sampling.execute(requests)
