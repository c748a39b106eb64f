"""A clone called `unetc` is imported as the package by a script in the folder above it, as an installation would be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unetc

ROOT = Path(__file__).parents[2]
STAGES = ("analyzer", "compiler", "runtime")

EDITABLE = """
import importlib.util, sys

class Finder:  # setuptools installs one like this, after the finder of folders
    def find_spec(self, name, path=None, target=None):
        if name == "unetc":
            return importlib.util.spec_from_file_location(name, {package!r} + "/__init__.py")

sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path_hooks = [hook for hook in sys.path_hooks if "editable" not in repr(hook).lower()]
sys.meta_path.append(Finder())
"""


def make_clone(folder: Path, *, links: bool) -> Path:
    """Lay out a clone: the root's own file, and the folders of the package; as links, as they are not changed."""
    clone = folder / "unetc"
    (clone / "src/unetc").mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", clone)
    for stage in STAGES:
        (clone / stage).symlink_to(ROOT / stage)
    for entry in (ROOT / "src/unetc").iterdir():
        if entry.name not in STAGES:
            (clone / "src/unetc" / entry.name).symlink_to(entry)
        elif links:
            (clone / "src/unetc" / entry.name).symlink_to(clone / entry.name)
        else:
            (clone / "src/unetc" / entry.name).write_text(f"../../{entry.name}")  # as git does without links
    return clone


def run(folder: Path, code: str, *options: str) -> str:
    """Run a script that lies in a folder."""
    (folder / "script.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *options, folder / "script.py"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("installed", [True, False], ids=["editable", "not installed"])
def test_a_script_above_a_clone_imports_the_package(tmp_path: Path, links: bool, installed: bool) -> None:
    clone = make_clone(tmp_path, links=links)
    finder = EDITABLE.format(package=str(clone / "src/unetc")) if installed else "import sys\n"
    code = (
        f"{finder}\n"
        "import unetc\n"
        "import unetc.runtime.session, unetc.analyzer.ranking\n"
        "from unetc import compiler\n"
        "import unetc as again\n"
        "assert again is unetc and sys.modules['unetc'] is unetc\n"
        "assert unetc.Session is unetc.runtime.session.Session\n"
        "print(unetc.__version__, unetc.__file__, compiler.__name__)\n"
        "files = [str(getattr(module, '__file__', '')) for module in sys.modules.values()]\n"
        "files = [file for file in files if '/unetc/' in file]\n"
        "assert len(files) == len(set(files)), 'a second copy'\n"
    )
    assert run(tmp_path, code).split() == [unetc.__version__, f"{clone}/src/unetc/__init__.py", "unetc.compiler"]


def test_the_command_runs_from_the_folder_above_a_clone(tmp_path: Path) -> None:
    make_clone(tmp_path, links=True)
    done = subprocess.run(
        [sys.executable, "-m", "unetc", "--version"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == unetc.__version__


def test_the_file_at_the_root_does_nothing_under_another_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "clone", ignore=lambda _, names: set(names) - {"__init__.py"})
    assert run(tmp_path, "import clone, sys\nprint('unetc' in sys.modules)").strip() == "False"
