"""Options that several benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from result_file import RESULTS


def add_only(parser: argparse.ArgumentParser) -> None:
    """Add the option that measures some cases alone."""
    parser.add_argument(
        "--only", default="", help="measure only the cases whose names begin with this; the result keeps its other rows"
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the option that writes the result, and the pictures drawn from it, elsewhere."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")


def chosen(parser: argparse.ArgumentParser, only: str, names: Iterable[str]) -> list[str]:
    """List the names that begin with a text; end with a message if none does."""
    known = list(dict.fromkeys(names))
    found = [name for name in known if name.startswith(only)]
    if not found:
        parser.error(f"--only: no case begins with {only!r}; the cases are: {'; '.join(known)}")
    return found


def at_least_one(text: str) -> int:
    """Read a whole number above zero, as a type of options."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
