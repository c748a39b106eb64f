"""The file of what a benchmark has measured."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from unetc.environment import describe


def write(folder: Path, name: str, measured: Mapping[str, object]) -> None:
    """Write `name.json`, with the command of bench_`name`.py and what it ran on; print its figures, or else its tables.

    Args:
        folder: Where to; made if it is not there.
        name: Of the benchmark.
        measured: What `tables.py` can show, by its names.
    """
    command = shlex.join(["python", f"benchmarks/bench_{name}.py", *sys.argv[1:]])
    record = {"command": command, "environment": describe(), **measured}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(measured.get("figures", measured.get("tables")), indent=1))
