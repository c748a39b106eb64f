"""The command line: one thin function per command, each calling one function of `unetc.api`."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys

from unetc.errors import UnetcError
from unetc.extras import needed
from unetc.memory import taking_memory

_INTERRUPTED = 130
"""Exit code of typer on Ctrl-C."""
_TERMINATED = 128 + signal.SIGTERM
"""Exit code that shells expect of a command that this signal ended."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Errors of a disk that takes no more."""


def main() -> None:
    """Run the command line: exit 0 when done, 1 on an error of unetc (one line), 2 on wrong usage."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # their warnings are for those who call them by hand
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    _prepare_streams()
    signal.signal(signal.SIGTERM, _end)  # by default it leaves temporary folders and the processes of builds behind
    try:
        with needed(), taking_memory():
            from .app import app  # its imports take memory too

            try:
                app(prog_name="unetc")
            finally:
                sys.stdout.flush()
    except UnetcError as error:
        print(f"unetc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains about it at its end
        where = error.filename or "the output"
        print(f"unetc: cannot write {where}: {error.strerror}. Make room, and run it again.", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (_INTERRUPTED, _TERMINATED):
            print("unetc: interrupted; run the same command again to continue.", file=sys.stderr)
        raise


def _prepare_streams() -> None:
    """Let output that cannot be written as it is end no command: closed streams, and encodings without a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the command was started with a closed one
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _end(*_: object) -> None:
    sys.exit(_TERMINATED)


__all__ = ["main"]
