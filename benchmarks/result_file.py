"""Write the result file of a benchmark."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from unetc.environment import describe


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
