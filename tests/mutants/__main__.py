"""Do the tests notice when the heart of unetc is changed?

    python -m tests.mutants                     # make mutants: all subjects; resumes if killed
    python -m tests.mutants planner batcher     # some; the result keeps the others
    python -m tests.mutants --again             # survivors too, after tests were added
    python -m tests.mutants --share 0.1         # a tenth of the samples

mutmut makes mutants: one small change each, in functions and methods without decorators. Messages to people stay. A
random sample, always the same, is tried with the tests of its subject; `subjects.py` lists both. Writes
`benchmarks/results/mutants.json`. Survivors are listed there with the reasons of `reasons.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.mutants.subjects import SUBJECTS, Subject
from tests.mutants.workshop import FAILED, ROOT, SURVIVED, UNTESTED, Workshop, function_of
from unetc.environment import describe

RESULT = ROOT / "benchmarks/results/mutants.json"
REASONS = Path(__file__).with_name("reasons.json")
EQUIVALENT = "equivalent"
"""Beginning of the reason for a mutant that computes the same as the original."""
GOAL = 0.8
"""Share of the mutants that tests must notice."""


def main() -> None:
    """Try the mutants that are missing, and write the result."""
    names = [subject.name for subject in SUBJECTS]
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--share", type=float, default=1.0, help="share of the samples to try")
    parser.add_argument("--again", action="store_true", help="try survivors once more")
    parser.add_argument("--work", type=Path, default=ROOT / "mutants", help="copies of the sources, and outcomes")
    parser.add_argument("--result", type=Path, default=RESULT, help="file of the result")
    options = parser.parse_args()
    earlier = json.loads(options.result.read_text())["rows"] if options.result.exists() else []
    rows = {row["subject"]: row for row in earlier}
    reasons = json.loads(REASONS.read_text())
    for subject in SUBJECTS:
        if subject.name in (options.names or names):
            rows[subject.name] = tried(subject, options.work, options.share, again=options.again, reasons=reasons)
            write(options.result, [rows[name] for name in names if name in rows])


def tried(subject: Subject, work: Path, share: float, *, again: bool, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Try the sample of a subject and sum it up."""
    workshop = Workshop(subject, work)
    mutants = workshop.mutants()
    sample = [*mutants][: math.ceil(share * subject.sample)]
    done = workshop.outcomes()
    kept = {name for name, code in done.items() if not (again and code in (SURVIVED, UNTESTED))}
    if missing := [name for name in sample if name not in kept]:
        print(f"{subject.name}: {len(missing)} of {len(sample)} mutants are left", flush=True)
        workshop.run(missing)
    outcomes = {**(done if again else {}), **workshop.outcomes()}  # mutmut forgets the others where settings changed
    codes = {name: outcomes[name] for name in sample if name in outcomes}
    alive = [name for name, code in codes.items() if code in (SURVIVED, UNTESTED)]
    survivors = []
    for name in sorted(alive):
        survivor = {"function": function_of(name), "change": workshop.change(name, mutants[name])}
        survivors.append({**survivor, "reason": reasons.get(" | ".join(survivor.values()), "not examined")})
    modules = Counter(str(mutants[name]) for name in mutants)
    return {
        "subject": subject.name,
        "mutants": len(mutants),
        "tried": len(codes),
        "killed": len(codes) - len(alive),
        "hung or crashed": sum(code not in FAILED for code in codes.values()) - len(alive),
        "survivors": survivors,
        "modules": [
            {
                "module": module.removeprefix("src/unetc/"),
                "mutants": count,
                "tried": sum(str(mutants[name]) == module for name in codes),
                "killed": sum(str(mutants[name]) == module for name in codes if name not in alive),
            }
            for module, count in sorted(modules.items())
        ],
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the result with its figures and tables."""
    figures = [share_of(row["subject"], [row]) for row in rows] + [share_of("all subjects", rows)]
    counts = ("subject", "mutants", "tried", "killed", "hung or crashed")
    subjects = [[row[count] for count in counts] for row in rows]
    modules = [list(own.values()) for row in rows for own in row["modules"]]
    survivors = [list(own.values()) for row in rows for own in row["survivors"]]
    result = {
        "command": "make mutants",
        "settings": {"mutmut": version("mutmut")},
        "environment": describe(),
        "figures": figures,
        "tables": [
            {"title": "Subjects; killed ones may hang or crash", "columns": counts, "rows": subjects},
            {"title": "Modules", "columns": ["module", "mutants", "tried", "killed"], "rows": modules},
            {"title": "Survivors", "columns": ["function", "change", "reason"], "rows": survivors},
        ],
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def share_of(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the share of the mutants that were killed, leaving out those that compute the same as the original."""
    killed = sum(row["killed"] for row in rows)
    same = sum(own["reason"].startswith(EQUIVALENT) for row in rows for own in row["survivors"])
    differing = sum(row["tried"] for row in rows) - same
    value = killed / differing if differing else 0.0
    return {"figure": f"{name}: killed / tried, without {same} equivalent", "value": value, "goal": {"at_least": GOAL}}


if __name__ == "__main__":
    main()
