"""Run the command line and read its output."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from unetc.cli import main

ALONE = (sys.executable, "-c", "from unetc.cli import main; main()")
"""The command line in a separate process."""


@dataclass(frozen=True)
class Result:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Parse stdout, which must contain exactly one strict JSON value."""
        assert self.code == 0, self.err
        return json.loads(self.out, parse_constant=pytest.fail)

    @property
    def error(self) -> str:
        """The message of a failure: one line on stderr after any progress, no traceback, and nothing on stdout."""
        assert self.code == 1
        assert self.out == ""
        *progress, last = self.err.splitlines()
        assert last.startswith("unetc: ")
        assert [
            line for line in progress if not re.fullmatch(r"[\w ()%]+: \d+ % after \d+ s(, \d+ s left)?", line)
        ] == []
        return self.err


def run(*arguments: object) -> Result:
    """Run a command in this process, which has already imported torch."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["unetc", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


def run_alone(*arguments: object, **environment: str) -> Result:
    """Run a command in a separate process."""
    done = subprocess.run(
        [*ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | environment,
    )
    return Result(done.returncode, done.stdout, done.stderr)
