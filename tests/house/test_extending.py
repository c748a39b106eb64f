"""The worked examples of docs/extending.md run as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from unetc.compiler.graph.denoisers import denoiser
from unetc.compiler.schedulers import keys, make
from unetc.compiler.schedulers import names as scheduler_names
from unetc.runtime.backends import registry

PAGE = Path(__file__).parents[2] / "docs/extending.md"
BLOCK = re.compile(r"^```python\n(.*?)^```|^<!-- the test (.*?) -->", re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
def test_the_examples_run_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    names: dict[str, Any] = {"__name__": "extending"}

    def add_scheduler() -> None:
        for module in (scheduler_names, keys, make):
            monkeypatch.setattr(module, "SCHEDULERS", {**scheduler_names.SCHEDULERS, **names["ROW"]})

    def add_signature() -> None:
        monkeypatch.setattr(denoiser, "_SIGNATURES", {**denoiser._SIGNATURES, "Waves": names["SIGNATURE"]})

    def add_backend() -> None:
        module = ModuleType("unetc.runtime.backends.reference")
        module.open_backend = names["open_reference"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(registry, "BACKENDS", {**registry.BACKENDS, "onnx:reference": module.__name__})

    edits = {
        "adds ROW to SCHEDULERS": add_scheduler,
        "adds SIGNATURE to _SIGNATURES": add_signature,
        "adds a module with open_reference as its open_backend": add_backend,
    }
    ran = 0
    for match in BLOCK.finditer(text):
        code, edit = match.groups()
        if edit:
            edits.pop(edit)()
            continue
        line = text.count("\n", 0, match.start()) + 1
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)  # a failure names the line of the page
        ran += 1
    assert ran == text.count("```python")
    assert not edits
