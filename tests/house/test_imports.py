"""Imports of unetc load few libraries, checked in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import unetc
from tests.every_day import every_nth

BASE = [
    "unetc",
    "unetc.artifacts",
    "unetc.sampler",
    "unetc.runtime.session",
    "unetc.report.pictures",
    "unetc.cli",
    "unetc.api",
    "unetc.cli.app",
    "unetc.cli.output",
    "unetc.cli.summary",
    "unetc.compiler.tensorrt.compile_bundle",
    "unetc.triton.model",
]
"""Modules that work without extras: all imports of `unetc sample` and `unetc compile` except engine libraries."""

EXTRAS = {
    "cuda",
    "diffusers",
    "fastapi",
    "filelock",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "prometheus_client",
    "pydantic",
    "ray",
    "scipy",
    "sklearn",
    "starlette",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "torchmetrics",
    "uvicorn",
}

BLOCK = f"""
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> str:
    """Run code in a fresh interpreter and return its output."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_base_installation_is_enough() -> None:
    run(f"{BLOCK}\nimport {', '.join(BASE)}")


@pytest.mark.parametrize("module", every_nth(6, BASE))
def test_every_module_can_be_imported_first(module: str) -> None:
    run(f"import {module}")


def test_help_needs_no_extra() -> None:
    assert "sample" in run(f"{BLOCK}\nsys.argv = ['unetc', '--help']\nfrom unetc.cli import main\nmain()")


def test_no_extra_is_loaded_even_where_it_is_installed() -> None:
    code = f"""
import importlib, sys
for module in {BASE}:
    importlib.import_module(module)
    loaded = {{name.partition(".")[0] for name in sys.modules}} & {EXTRAS}
    assert not loaded, (module, loaded)
"""
    run(code)


NEED_COMPILE = {"AnalysisOptions", "BuildOptions", "ParetoOptions", "PlanOptions", "RepairOptions", "VerifyOptions"}
"""Public names that need the extra `compile`: options of steps that need it too."""


@pytest.mark.parametrize("name", unetc.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(unetc, name) is not None


def test_all_public_names_but_some_options_are_in_the_base_installation() -> None:
    run(f"{BLOCK}\nimport unetc\nfor name in {{*unetc.__all__}} - {NEED_COMPILE}: getattr(unetc, name)")


def test_importing_the_facade_loads_no_library_at_all() -> None:
    code = "import sys\nbefore = set(sys.modules)\nimport unetc\nprint(*set(sys.modules) - before)"
    loaded = {name.partition(".")[0] for name in run(code).split()}
    assert loaded - sys.stdlib_module_names == {"unetc"}


def test_a_cluster_without_ray_names_the_extra(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.modules["ray"] = None
sys.argv = ["unetc", "analyze", "digits", "--ray", "local", "--output", {str(tmp_path / "profile.json")!r}]
from unetc.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    assert "pip install 'unetc[ray]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.nightly
def test_a_cluster_that_does_not_start_in_time_is_said_without_a_traceback() -> None:
    """Ray itself raises a bare `Exception` after half a minute; here its start fails at once."""
    code = """
import ray
from unetc.errors import WorkerError
from unetc.ray_workers import joined

for kind in (Exception, RuntimeError, ConnectionError):
    def late(**_):
        raise kind("The current node timed out during startup.")

    ray.init = late
    try:
        with joined("local"):
            pass
    except WorkerError as error:
        print(error)
"""
    assert run(code).count("cannot join a Ray cluster at local: The current node timed out during startup.") == 3


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    addresses = ("127.0.0.1:1", "nowhere", "no.such.host.invalid:6379")
    code = f"""
from unetc.errors import WorkerError
from unetc.ray_workers import joined
for address in {addresses}:
    try:
        with joined(address):
            pass
    except WorkerError as error:
        print(error)
"""
    said = run(code)
    for address in addresses:
        assert f"cannot join a Ray cluster at {address}: " in said
