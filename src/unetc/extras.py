"""Which extra brings a library that a step of unetc needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unetc.errors import MissingDependency

EXTRAS = {
    "onnxruntime": "cpu",
    **dict.fromkeys(
        ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "scipy", "filelock", "huggingface_hub"),
        "compile",
    ),
    "tokenizers": "text",
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"), "serve"),
    "ray": "ray",
}
"""Extra by the name under which the library is imported."""


@contextmanager
def needed() -> Iterator[None]:
    """Name the extra when the enclosed code finds one of its libraries missing.

    Raises:
        MissingDependency: In place of the import error of a library in `EXTRAS`.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if isinstance(error, MissingDependency) or library not in EXTRAS:
            raise
        raise MissingDependency(f"this needs {library}: pip install 'unetc[{EXTRAS[library]}]'") from error
