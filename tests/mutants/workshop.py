"""A folder in which mutmut changes the modules of one subject and runs its tests."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from mutmut import configuration
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name, orig_function_and_class_names_from_key

from tests.mutants.subjects import Subject

ROOT = Path(__file__).parents[2]
LINKED = ("src", "tests", "benchmarks")
"""Folders that mutmut copies; the stages are links in src/unetc."""
SOURCES = ("src/unetc", "src/unetc/analyzer", "src/unetc/compiler", "src/unetc/runtime")
MESSAGES = (r"\braise\b", r"\blogger\.", r'^\s*f?"')
"""Lines whose expressions stay: messages to people, whose wording no test needs to hold."""
FAILED = {1, 3}
"""Exit codes of pytest: a test failed, or something failed outside a test. Other codes are timeouts and crashes."""
SURVIVED = 0
UNTESTED = 33
"""Exit code of mutmut: no test calls the function."""


class Workshop:
    """Mutants of one subject."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        """Prepare a folder; results of unchanged functions in it stay."""
        self.subject = subject
        self._folder = folder.resolve() / subject.name
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in LINKED:
            with contextlib.suppress(FileExistsError):
                (self._folder / name).symlink_to(ROOT / name)
        (self._folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + self._settings())
        self._paths = tuple(sorted(path for module in subject.modules for path in self._modules(module)))

    def _settings(self) -> str:
        only = [f"src/unetc/{module}" + ("" if module.endswith(".py") else "/*") for module in self.subject.modules]
        settings = {
            "source_paths": SOURCES,
            "only_mutate": only,
            "do_not_mutate_patterns": MESSAGES,
            "pytest_add_cli_args_test_selection": [f"tests/{own}" for own in self.subject.tests],
            "pytest_add_cli_args": ["--shared", str(self._folder / "shared"), "-p", "no:cacheprovider"],
            "process_isolation": "forkserver",  # torch has threads, which a fork loses
            "timeout_constant": 60.0,  # seconds for fixtures, which mutmut does not count, and a busy machine
            "timeout_multiplier": 3.0,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        return "\n".join(["", "[tool.mutmut]", "use_git_change_detection = false", *lines, ""])

    def _modules(self, module: str) -> Iterable[Path]:
        path = Path("src/unetc", module)
        if module.endswith(".py"):
            return [path]
        return [own.relative_to(self._folder) for own in (self._folder / path).rglob("*.py")]

    def mutants(self) -> dict[str, Path]:
        """List all mutants with their files, in an order that is random and always the same."""
        names: dict[str, Path] = {}
        with contextlib.chdir(self._folder):
            configuration.reset_config()
            for path in self._paths:
                made = mutate_file_contents(str(path), path.read_text()).mutant_names
                names |= {get_mutant_name(path, name): path for name in sorted(made)}
        order = sorted(names)
        random.Random(self.subject.name).shuffle(order)
        return {name: names[name] for name in order}

    def outcomes(self) -> Mapping[str, int]:
        """Read the exit codes of the mutants that were tried."""
        outcomes: dict[str, int] = {}
        for path in self._paths:
            file = self._folder / "mutants" / f"{path}.meta"
            codes = json.loads(file.read_text())["exit_code_by_key"] if file.exists() else {}
            outcomes |= {name: code for name, code in codes.items() if code is not None}
        return outcomes

    def run(self, names: Iterable[str]) -> None:
        """Try mutants."""
        for name in ("tests", "benchmarks"):  # mutmut adds to earlier copies
            shutil.rmtree(self._folder / "mutants" / name, ignore_errors=True)
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *names]
        done = subprocess.run(command, cwd=self._folder, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.subject.name}: mutmut failed\n{done.stdout[-2000:]}")

    def change(self, name: str, path: Path) -> str:
        """Write a mutant's change as `before → after`."""
        with contextlib.chdir(self._folder):
            lines = get_diff_for_mutant(name, path=path).splitlines()[2:]
        removed, added = ([line[1:].strip() for line in lines if line.startswith(sign)] for sign in "-+")
        return f"{' '.join(removed)} → {' '.join(added)}"


def function_of(name: str) -> str:
    """Name the function that a mutant changes, with its module and class."""
    function, kind = orig_function_and_class_names_from_key(name)
    module = name.rpartition(".")[0].removeprefix("unetc.")
    return ".".join(filter(None, (module, kind, function)))
