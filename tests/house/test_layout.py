"""The package list, the layers and the rules of the house, checked on the files themselves."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import importlib.util
import itertools
import re
import sys
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]

STAGES = {"analyzer", "compiler", "runtime"}
GROUND = {
    "arguments",
    "artifacts",
    "backend",
    "call",
    "class_labels",
    "conditions",
    "controlnet",
    "device",
    "environment",
    "errors",
    "extras",
}
GROUND |= {"metrics", "models", "nvidia", "percent", "precision", "progress", "report", "sampler", "tensors", "timing"}
GROUND |= {"jobs", "lock", "memory", "ray_token", "ray_workers", "temporary", "treatments"}
FRONT_DOOR = {"", "__main__", "api", "cli", "demo", "diffusers", "server", "triton"}
FLOORS = (GROUND, {"runtime"}, {"compiler"}, {"analyzer"}, FRONT_DOOR)
"""The house from the ground up, as children of unetc: each floor may import itself and the floors below it.

`tests/house/test_layout.py` holds the order, `docs/concepts.md` explains it.
"""

VERSION = {"unetc", "unetc.__version__"}
"""Names of the package itself that every floor may import."""

COMPILE_TIME_BACKENDS = tuple(
    f"unetc.runtime.backends.{name}"
    for name in ("cuda_graph", "fused_loop", "onnxruntime_gpu", "step_kernel", "tensorrt", "torch")
)
"""Backends that need compile-time libraries, by the prefix of their module names."""

HEAVY = {"diffusers", "onnx", "onnx_ir", "onnxscript", "scipy", "torch", "transformers", "triton"}
"""Libraries of the extra `compile`, which sampling does not need."""

LIGHT = (
    "unetc.artifacts",
    "unetc.backend",
    "unetc.device",
    "unetc.errors",
    "unetc.runtime.branch_cache",
    "unetc.nvidia",
    "unetc.precision",
    "unetc.runtime",
    "unetc.sampler",
    "unetc.tensors",
    "unetc.treatments",
)


HOSTS = {"triton_python_backend_utils"}
"""Modules that a host process brings, so no package installs them."""

CHECKPOINTS = "unetc.models.openai_checkpoint"
"""The only module that reads pickles, restricted to tensors."""

LISTS_OF_MODULES = {"unetc.environment", "unetc.nvidia.library"}
"""Modules that import each name of a list in their own code."""


def modules() -> dict[str, Path]:
    """Find every module of unetc by its import name, without following the links in src/unetc."""
    found = {}
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """List (line, absolute dotted name) of a module's imports, inside functions too, and of facade names it uses."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "unetc":
            yield node.lineno, f"unetc.{node.attr}"


def layer(name: str) -> str:
    """Return the layer of a dotted name: `sampler` for unetc.sampler.table, the empty string for unetc itself."""
    return name.split(".")[1] if "." in name else ""


def scripts() -> dict[str, Path]:
    """Find the Python files that are not installed, by path."""
    return {str(path): path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}


def test_the_package_list_matches_the_disk() -> None:
    folders = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)
    assert [package for package in SETUPTOOLS["packages"] if package not in modules()] == [], "no __init__.py"


def test_floors_import_only_themselves_and_what_lies_below() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    assert {layer(name) for name in modules()} == floor.keys()
    offences = [
        f"{path}:{line}: {name} may not import {target}"
        for name, path in modules().items()
        for line, target in imports(name, path)
        if target.split(".")[0] == "unetc" and target not in VERSION and floor[layer(target)] > floor[layer(name)]
    ]
    assert offences == []


def test_no_module_imports_itself_through_others() -> None:
    known = modules()

    def module_of(target: str) -> str:
        """Strip the name imported from a module; a package stands for itself, not for its modules."""
        return target if target in known else target.rpartition(".")[0]

    graph = {
        name: {module_of(target) for _, target in imports(name, path) if target not in VERSION} & known.keys() - {name}
        for name, path in known.items()
        if name != "unetc"  # the facade, which imports lazily
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise AssertionError(f"import circle: {' -> '.join(error.args[1])}") from error


def test_stages_are_imported_as_part_of_unetc() -> None:
    offences = [
        f"{path}:{line}: {target} makes a second copy of unetc.{target}"
        for name, path in (modules() | scripts()).items()
        for line, target in imports(name, path)
        if target.split(".")[0] in STAGES
    ]
    assert offences == []


def test_sampling_never_imports_a_compile_time_library() -> None:
    offences = [
        f"{path}:{line}: {target}"
        for name, path in modules().items()
        if name.startswith(LIGHT) and not name.startswith(COMPILE_TIME_BACKENDS)
        for line, target in imports(name, path)
        if target.split(".")[0] in HEAVY
    ]
    assert offences == []


def test_every_imported_library_is_declared() -> None:
    requirements = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    declared = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
    distributions = importlib.metadata.packages_distributions()
    offences = [
        f"{path}:{line}: {target}"
        for name, path in modules().items()
        for line, target in imports(name, path)
        if (library := target.split(".")[0]) not in {*sys.stdlib_module_names, *HOSTS, "unetc"}
        and declared.isdisjoint(
            distribution.lower().replace("_", "-") for distribution in distributions.get(library, [library])
        )
    ]
    assert offences == []


def test_modules_are_named_after_their_subject() -> None:
    empty_names = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
    assert [str(path) for path in modules().values() if path.stem.strip("_") in empty_names] == []


def test_no_input_can_run_code() -> None:
    benchmarks = {name: path for name, path in scripts().items() if path.is_relative_to(ROOT / "benchmarks")}
    files = modules() | benchmarks
    assert [
        one for name, path in files.items() for one in code_offences(name, path, may_load={*benchmarks, CHECKPOINTS})
    ] == []


def code_offences(name: str, path: Path, *, may_load: Container[str] = (CHECKPOINTS,)) -> list[str]:
    """List the places of a module where an input could be run."""
    return [
        f"{path}:{line}: imports {target}"
        for line, target in imports(name, path)
        if target.split(".")[0] in {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
        or target == "torch.load"
    ] + [
        f"{path}:{node.lineno}: calls {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and runs_code(node, name, may_load=name in may_load)
    ]


def runs_code(call: ast.Call, name: str, *, may_load: bool) -> bool:
    """Check whether a call can execute its argument; loading that is restricted to arrays cannot."""
    function = ast.unparse(call.func)
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if function.removeprefix("importlib.") in {"import_module", "__import__"}:
        return name.startswith("unetc") and name not in LISTS_OF_MODULES and not is_fixed(call.args[0])
    return (
        function in {"eval", "exec", "compile"}
        or (function == "np.load" and words.get("allow_pickle") != "False")
        or (function == "torch.load" and not (may_load and words.get("weights_only") == "True"))
    )


def is_fixed(name: ast.expr) -> bool:
    """Check whether the name of a module is a text in the code, or an item of a table in capitals."""
    match name:
        case ast.Constant():
            return True
        case ast.Subscript(value=ast.Name(id=table)):
            return table.isupper()
    return False
