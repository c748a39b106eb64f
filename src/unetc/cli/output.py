"""Output of the commands: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from unetc.artifacts.record import Record, to_builtins
from unetc.percent import percent
from unetc.progress import OnProgress
from unetc.progress import Progress as Report

_PLAIN_WIDTH = 160
"""Columns of a table that goes into a file or a pipe."""

OUT = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
ERR = Console(stderr=True, highlight=False)

_LINE_EVERY_S = 10.0
"""Without a terminal, progress is a line at this interval."""


@contextmanager
def progress() -> Iterator[OnProgress]:
    """Show stages of work with the time left: bars on a terminal, lines elsewhere."""
    if not ERR.is_terminal:
        yield _Lines()
        return
    columns = TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=ERR) as bars:
        tasks: dict[str, int] = {}

        def show(report: Report) -> None:
            if report.note:
                say(report.note, bars.console)
            if report.stage not in tasks:
                tasks[report.stage] = bars.add_task(report.stage, total=report.total)
            bars.update(tasks[report.stage], completed=report.done, total=report.total)  # type: ignore[arg-type]

        yield show


class _Lines:
    """Writes a line when a stage begins, every ten seconds, and when it ends."""

    def __init__(self) -> None:
        self._stage = ""
        self._began = self._written = 0.0

    def __call__(self, report: Report) -> None:
        if report.note:
            say(report.note, ERR)
        now = time.monotonic()
        if report.stage != self._stage:
            self._stage, self._began, self._written = report.stage, now, 0.0
        if report.done < report.total and now - self._written < _LINE_EVERY_S:
            return
        self._written = now
        spent = now - self._began
        left = spent * (report.total - report.done) / report.done if report.done else 0.0
        tail = f", {left:.0f} s left" if left >= 1 else ""
        share = 100 * report.done / max(1, report.total)
        say(f"{report.stage}: {share:.0f} % after {spent:.0f} s{tail}", ERR)


def say(text: str, console: Console = OUT) -> None:
    """Print a line as it is: square brackets in it, as in a path, are no markup."""
    console.print(text, soft_wrap=True, markup=False)


def print_json(value: Record | dict[str, object]) -> None:
    """Print a result for programs."""
    print(json.dumps(to_builtins(value), indent=2))


def saves(time_ratio: float) -> str:
    """Write the time that is left as the time that is saved, with the ratio itself."""
    return f"saves {percent(1 - time_ratio)} (time ratio {time_ratio:.3f})"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> Table:
    """Lay out a table; the first `words` columns are left-aligned, the numbers after them right-aligned."""
    result = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i < words else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result
