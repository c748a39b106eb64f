"""The process that builds one engine: it reads a request from stdin and writes messages to stdout.

All files are in the folder that it is started in.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from unetc.errors import OutOfMemory, UnetcError

from .builder import build
from .messages import Advance, BuildRequest, Built, Message, Refused, encode


def main() -> None:
    """Build the requested engine; output of the library itself goes to stderr."""
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: Message) -> bool:
        try:
            os.write(channel, encode(message))
        except BrokenPipeError:  # the parent no longer waits for the engine
            return False
        return True

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildRequest)
    send(_answer(request, lambda done: send(Advance(done=done))))


def _answer(request: BuildRequest, on_advance: Callable[[int], bool]) -> Built | Refused:
    try:
        return build(request, Path.cwd(), on_advance)
    except MemoryError:
        return Refused(message="out of memory", memory=True)
    except UnetcError as error:
        return Refused(message=str(error), memory=isinstance(error, OutOfMemory))
    except OSError as error:
        return Refused(
            message=f"cannot read or write {error.filename or 'the engine'} in {Path.cwd()}: {error.strerror}. Set "
            "TMPDIR to a folder with room.",
            memory=False,
        )


if __name__ == "__main__":
    main()
