"""Triton's published schema of configurations, as NVIDIA's client brings it.

The client's package for gRPC imports grpc, which the schema does not need, so its file is read on its own.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import tritonclient
from google.protobuf import text_format


def _schema() -> Any:
    path = Path(tritonclient.__path__[0]) / "grpc/model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was generated for an older protobuf
        spec.loader.exec_module(module)
    return module


SCHEMA = _schema()


def parse(text: str) -> Any:
    """Parse a configuration; unknown fields and values of a wrong type are errors."""
    return text_format.Parse(text, SCHEMA.ModelConfig())


def type_name(number: int) -> str:
    """Name an element type."""
    return str(SCHEMA.DataType.Name(number))
