"""Write the result file of a benchmark."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unetc.environment import describe


def earlier(folder: Path, name: str, *keys: str) -> dict[Any, dict[str, Any]]:
    """Read the rows of an earlier result, if there is one, by the value of a key or the values of several."""
    path = folder / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys)): row for row in rows}


def write(folder: Path, name: str, measured: Mapping[str, object]) -> None:
    """Write `name.json` with the command of bench_`name`.py and the environment; print the figures or the tables.

    Args:
        folder: Folder of the result; created if it is missing.
        name: Name of the benchmark.
        measured: Results by the keys that `tables.py` shows.
    """
    command = shlex.join(["python", f"benchmarks/bench_{name}.py", *sys.argv[1:]])
    record = {"command": command, "environment": describe(), **measured}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(measured.get("figures", measured.get("tables")), indent=1))
