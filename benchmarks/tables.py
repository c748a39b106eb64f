"""Write benchmarks/README.md from the results that exist.

    python benchmarks/tables.py          # writes it
    python benchmarks/tables.py --check  # exits 1 if it is not up to date

A result has a command and an environment, and one or more of: `figures` with their goals, `tables`, `results` (a list
of cases), `verification` (or `budgets`, which have one each), `front`. Missing cases stand under `absent` or `failed`.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
Table = tuple[str, Sequence[str], Sequence[Sequence[object]]]
"""Title, columns, rows."""
CASE_COLUMNS = ("time / time of the full model", "relative L2", "PSNR dB", "SSIM")
HEAD = """# Benchmarks

One question each, one file each. This page is written from `results/`: `python benchmarks/tables.py`.
"""


def section(name: str, result: dict[str, Any]) -> str:
    """Write the question and the figures of one benchmark."""
    places = (HERE / f"bench_{name}.py", HERE / f"{name}.py", HERE.parent / f"tests/{name}/__main__.py")
    script = next(path for path in places if path.exists())
    documentation = ast.get_docstring(ast.parse(script.read_text()))
    assert documentation, f"{script} has no docstring"
    parts = [f"## {documentation.splitlines()[0]}"]
    parts.append(f"`{result['command']}` → [results/{name}.json](results/{name}.json)")
    if settings := result.get("settings"):
        parts.append(" · ".join(f"{key} {value}" for key, value in settings.items()))
    tables = tables_of(result)
    assert tables, f"{name}.json has nothing that this script knows how to show"
    for title, columns, rows in tables:
        parts += [f"{title}:", table(columns, rows)] if title else [table(columns, rows)]
    if missing := result.get("absent", {}) | result.get("failed", {}):
        parts.append("Not measured: " + " · ".join(f"{name}: {why}" for name, why in missing.items()))
    environment = result.get("environment") or verifications(result)[0]["environment"]
    parts.append("Measured on: " + " · ".join(f"{key} {value}" for key, value in environment.items()))
    return "\n\n".join(parts) + "\n"


def tables_of(result: dict[str, Any]) -> list[Table]:
    """Make the tables of a result, whichever kinds of figures it has."""
    tables: list[Table] = []
    if figures := result.get("figures"):
        goals = any("goal" in figure for figure in figures)
        rows = [[figure["figure"], figure["value"], *(goal_of(figure) if goals else [])] for figure in figures]
        tables.append(("", ["figure", "value", *(["goal", ""] if goals else [])], rows))
    tables += [(more["title"], more["columns"], more["rows"]) for more in result.get("tables", ())]
    tables += [of_verification(verified) for verified in verifications(result)]
    if points := result.get("front"):
        rows = [["least damage at this time", *of_case(point)] for point in points]
        rows.append([f"fastest with {result['gate']}, on new seeds", *of_case(result["fastest"]["held_out"])])
        tables.append(("", ["plan", *CASE_COLUMNS], rows))
    if cases := [flat(case) for case in result.get("results", ())]:
        tables.append(("", list(cases[0]), [list(case.values()) for case in cases]))
    return tables


def verifications(result: dict[str, Any]) -> list[dict[str, Any]]:
    """List the verifications in a result, one or one per budget."""
    return [own["verification"] for own in (result, *result.get("budgets", {}).values()) if "verification" in own]


def of_verification(verified: dict[str, Any]) -> Table:
    """Compare a plan with its controls."""
    cases = {"the plan": verified, **{case["description"]: case for case in verified["controls"].values()}}
    return f"Budget {verified['budget']:g}", ["", *CASE_COLUMNS], [[name, *of_case(c)] for name, c in cases.items()]


def of_case(case: dict[str, Any]) -> list[float]:
    """Read time and damage of a plan."""
    return [case["time_ratio"], *(case["damage"][metric]["mean"] for metric in ("relative_l2", "psnr", "ssim"))]


def flat(case: dict[str, Any]) -> dict[str, object]:
    """Write a case in one row."""
    row: dict[str, object] = {}
    for key, value in case.items():
        row |= {f"{key}: {inner}": own for inner, own in value.items()} if isinstance(value, dict) else {key: value}
    return row


def goal_of(figure: dict[str, Any]) -> list[str]:
    """Write a goal and whether it is met."""
    if "goal" not in figure:
        return ["", ""]
    least, most = figure["goal"].get("at_least"), figure["goal"].get("at_most")
    limits = [*([] if least is None else [f"≥ {cell(least)}"]), *([] if most is None else [f"≤ {cell(most)}"])]
    met = (least is None or figure["value"] >= least) and (most is None or figure["value"] <= most)
    return [", ".join(limits), "met" if met else "**missed**"]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table; the first column is words, the others are numbers."""
    lines = [columns, ["---", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell(value) for value in line)} |" for line in lines)


def cell(value: object) -> str:
    """Write a value: four digits of a measured number, all of a count."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main() -> None:
    """Write or check benchmarks/README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write")
    options = parser.parse_args()
    sections = [section(path.stem, json.loads(path.read_text())) for path in sorted(options.results.glob("*.json"))]
    text = "\n".join([HEAD, *sections])
    if options.check:
        current = options.page.exists() and options.page.read_text() == text
        sys.exit(0 if current else f"{options.page} does not show the results: run python benchmarks/tables.py")
    options.page.write_text(text)


if __name__ == "__main__":
    main()
