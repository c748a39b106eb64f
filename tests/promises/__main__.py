"""Which promises does unetc keep, and how often was each tried?

    python -m tests.promises                      # make promises: all; resumes if killed
    python -m tests.promises kill corruption      # some; the result keeps the other rows
    python -m tests.promises --share 0.1          # a tenth of the trials

Writes `benchmarks/results/promises.json`, from which `python benchmarks/readme.py` makes docs/promises.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.promises.journal import Journal
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.promises import PROMISES
from unetc.environment import describe

RESULT = Path(__file__).parents[2] / "benchmarks/results/promises.json"
EXAMPLES = 5
"""Most broken tries that a row quotes."""


def main() -> None:
    """Run the trials that are missing."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the tests
    sys.path.append(str(RESULT.parents[1]))  # as in the tests, which share helpers with benchmarks
    names = [promise.name for promise in PROMISES]
    parser = argparse.ArgumentParser(
        prog="python -m tests.promises", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials to run")
    parser.add_argument("--work", type=Path, default=Path("promises"), help="journals and models")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the result")
    options = parser.parse_args()
    chosen = [promise for promise in PROMISES if promise.name in (options.names or names)]
    earlier = json.loads(options.result.read_text())["rows"] if options.result.exists() else []
    rows = {row["promise"]: row for row in earlier}
    journals = {promise.name: Journal(promise, options.work) for promise in chosen}
    left = {promise.name: missing(promise, options.share, journals[promise.name]) for promise in chosen}
    minutes = sum(promise.seconds * len(left[promise.name]) for promise in chosen) / 60
    say(f"{sum(map(len, left.values()))} trials are left, about {math.ceil(minutes)} minutes")
    for promise in chosen:
        run(promise, left[promise.name], journals[promise.name], options.work)
        rows[promise.name] = row_of(promise, journals[promise.name])
        write(options.result, [rows[name] for name in names if name in rows])


def missing(promise: Promise, share: float, journal: Journal) -> list[int]:
    """List the trials that a journal lacks."""
    return [number for number in range(max(1, round(share * promise.trials))) if number not in journal.lines]


def run(promise: Promise, trials: Sequence[int], journal: Journal, work: Path) -> None:
    """Run trials and write each into the journal."""
    if not trials:
        return
    own = (work / promise.name).resolve()
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    with promise.prepare(Place(shared=work.resolve(), own=own)) as trial:
        for count, number in enumerate(trials, 1):
            begun = time.monotonic()
            outcome = without_place(promise.judged(attempted(trial, number)), work)
            journal.add(number, outcome, time.monotonic() - begun)
            say(f"{promise.name}: {count} of {len(trials)}{''.join(f', {one}' for one in outcome.broken)}")
    shutil.rmtree(own, ignore_errors=True)


def attempted(trial: Trial, number: int) -> Outcome:
    """Run a trial; one that fails in an unforeseen way breaks the promise too."""
    try:
        return trial(number)
    except Exception as error:
        traceback.print_exc()
        return Outcome(broken=(f"trial {number}: {type(error).__name__}: {error}",))


def without_place(outcome: Outcome, work: Path) -> Outcome:
    """Leave this machine's path to the work folder out of sentences, which are published."""
    return replace(outcome, broken=tuple(one.replace(str(work.resolve()), work.name) for one in outcome.broken))


def row_of(promise: Promise, journal: Journal) -> dict[str, Any]:
    """Sum up the trials of a promise."""
    outcomes = [line.outcome for _, line in sorted(journal.lines.items())]
    figures: dict[str, float] = {}
    for outcome in outcomes:
        figures |= {name: max(value, figures.get(name, -math.inf)) for name, value in outcome.figures.items()}
    broken = [one for outcome in outcomes for one in outcome.broken]
    return {
        "promise": promise.name,
        "promised": promise.promised,
        "tried": promise.tried,
        "tries": sum(outcome.tries for outcome in outcomes),
        "broken": len(broken),
        "examples": broken[:EXAMPLES],
        "figures": figures,
        "limits": dict(promise.limits),
        "trials": len(outcomes),
        "trials in full": promise.trials,
        "seconds": round(sum(line.seconds for line in journal.lines.values()), 1),
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the result."""
    columns = ["promise", "tries", "broken"]
    table = {"title": "", "columns": columns, "rows": [[row[column] for column in columns] for row in rows]}
    result = {"command": "make promises", "environment": describe(), "tables": [table], "rows": rows}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
