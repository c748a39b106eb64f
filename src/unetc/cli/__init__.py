"""The command line: one thin function per command, each calling one function of `unetc.api`."""

from __future__ import annotations

import signal
import sys

from unetc.errors import UnetcError
from unetc.extras import needed

_INTERRUPTED = 130
"""Exit code of typer on Ctrl-C."""
_TERMINATED = 128 + signal.SIGTERM
"""Exit code that shells expect of a command that this signal ended."""


def main() -> None:
    """Run the command line: exit 0 when done, 1 on an error of unetc (one line), 2 on wrong usage."""
    from .app import app

    signal.signal(signal.SIGTERM, _end)  # by default it leaves temporary folders and the processes of builds behind
    try:
        with needed():
            app(prog_name="unetc")
    except UnetcError as error:
        print(f"unetc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (_INTERRUPTED, _TERMINATED):
            print("unetc: interrupted; run the same command again to continue.", file=sys.stderr)
        raise


def _end(*_: object) -> None:
    sys.exit(_TERMINATED)


__all__ = ["main"]
