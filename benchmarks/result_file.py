"""Write the result file of a benchmark."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from unetc.environment import describe

RESULTS = Path(__file__).parent / "results"
"""Folder of the committed results."""
IMAGES = Path(__file__).parents[1] / "docs/images"
"""Folder of the pictures that pages show, drawn from the committed results."""


def earlier(
    folder: Path, name: str, *keys: str, again: Collection[str], settings: Mapping[str, object] | None = None
) -> dict[Any, dict[str, Any]]:
    """Read the rows of an earlier result, if there is one, for a run that measures some of them again.

    Args:
        folder: Folder of the result.
        name: Name of the benchmark.
        keys: A key of the rows, or several, by whose values they are found; the first is the name of the case. Without
            any, the cases are those under `measured`.
        again: Names of the cases that the run measures.
        settings: Settings of the run. Rows of other settings are left out where it measures them again.

    Raises:
        SystemExit: If another row would stay, and was measured with other settings.
    """
    path = folder / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    common, wanted = result.get("settings", {}), dict(settings or {})
    rows = {tuple(row[key] for key in keys): row for row in result["rows"]} if keys and result else {}
    if not keys:
        rows = {(case,): row for case, row in result.get("measured", {}).items()}
    kept = {}
    for key, row in rows.items():
        theirs = row.get("settings", common)
        if theirs == wanted:
            kept[key if len(key) > 1 else key[0]] = {**row, "settings": theirs} if wanted else row
        elif key[0] not in again:
            sys.exit(
                f"{path} has {key[0]} with {shown(theirs)}, and this run has {shown(wanted)}. One result has the same "
                "settings for all its rows: give these, or another folder with --results."
            )
    return kept


def absent(names: Iterable[str], rows: Collection[str]) -> dict[str, str]:
    """List the cases that have no row, in the way that pages show as not measured."""
    return {name: "no row yet" for name in names if name not in rows}


def shown(settings: Mapping[str, object]) -> str:
    """Write settings as pages do."""
    return " · ".join(f"{key} {value}" for key, value in settings.items()) or "unknown settings"


def picture_of(folder: Path, name: str) -> Path:
    """Choose where to draw a picture: for pages with the committed results, next to other results.

    The folder is made, since a picture may be drawn before the result is written.
    """
    place = IMAGES if folder.resolve() == RESULTS.resolve() else folder
    place.mkdir(parents=True, exist_ok=True)
    return place / name


def write(folder: Path, name: str, measured: Mapping[str, object]) -> None:
    """Write `name.json` with the command of bench_`name`.py and the environment; print its figures or its tables.

    Args:
        folder: Folder of the result; created if it is missing.
        name: Name of the benchmark.
        measured: Results by the keys that `tables.py` shows.
    """
    command = shlex.join(["python", f"benchmarks/bench_{name}.py", *sys.argv[1:]])
    record = {"command": command, "environment": describe(), **measured}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if shows := measured.get("figures", measured.get("tables")):
        print(json.dumps(shows, indent=1))
