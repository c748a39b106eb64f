"""The checkout that contains this script. Importing this module makes its sources importable without installation.

Import it before any module that imports unetc. The stages are found through the links in `src/unetc`.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("src", "analyzer", "compiler", "runtime", "benchmarks")

sys.path.insert(0, str(ROOT / "src"))


@functools.cache
def commit() -> str:
    """Return the commit of these sources, followed by `-dirty` if they were changed, or `unknown` without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def check_out(revision: str, folder: Path) -> None:
    """Write the sources of another commit to a folder, unless it exists."""
    if not folder.exists():
        folder.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=archive.stdout)


@functools.cache
def sources_sha256(root: Path = ROOT, *, benchmarks: bool = True) -> str:
    """Hash these sources or others, with or without the benchmarks; works without git too."""
    folders = _SOURCES if benchmarks else _SOURCES[:-1]
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(f"{path.relative_to(root).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()
