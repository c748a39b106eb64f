"""A process that has imported a lot, and forks one for each command, so that a command takes little time.

It reads a JSON line for each command from stdin, and writes the number of its process and its exit code to stdout. In
between it reads an empty line, so that no other process gets the number before somebody holds this one.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
import tempfile
from pathlib import Path

import msgspec

from tests.promises.changes import count_changes
from tests.promises.clock import set_clock
from tests.promises.limits import Limits, limit
from unetc.cli import main

LIGHT = (
    "PIL.PngImagePlugin",
    "onnxruntime",
    "unetc.cli.app",
    "unetc.cli.output",
    "unetc.cli.sampling",
    "unetc.cli.summary",
    "unetc.runtime.backends.onnxruntime",
    "unetc.runtime.session",
    "unetc.triton.export",
)
HEAVY = (
    *LIGHT,
    "diffusers.models.unets.unet_2d",
    "onnxscript",
    "torch._dynamo",
    "torch._inductor.decomposition",
    "torch.export._trace",
    "torch.onnx._internal.exporter._core",
    "unetc.analyzer.analyze",
    "unetc.compiler.build",
    "unetc.compiler.search.pareto",
    "unetc.report.curve",
    "unetc.server.app",
    "unetc.server.process",
)
"""Modules that commands import, or that import most of them: without torch, and with it."""
READY = "ready"


class Asked(msgspec.Struct, kw_only=True):
    """A command of unetc, and the process that it runs in."""

    arguments: tuple[str, ...]
    folder: str
    """Folder that it runs in, with tmp/ for temporary files and cache/ for captures."""
    out: str
    err: str
    """Named pipes for its output."""
    limits: Limits
    """Arguments of `limit`."""
    clock: str | None
    """File of the readings of its clock."""
    changes: str | None
    """File that counts the changes that it makes in the folder."""
    last: int | None
    """Number of changes after which the next one kills it, if they are counted."""


def serve() -> tuple[str, ...]:
    """Fork for each line, and wait for the end of each process.

    Returns:
        The arguments of the command, in its process alone.
    """
    for line in sys.stdin:
        asked = msgspec.json.decode(line, type=Asked)
        if not (child := os.fork()):
            return _become(asked)
        print(child, flush=True)
        sys.stdin.readline()
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(asked: Asked) -> tuple[str, ...]:
    """Turn a forked process into the process of a command."""
    os.setsid()
    for path, stream in ((asked.out, 1), (asked.err, 2)):
        os.dup2(os.open(path, os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update({"TMPDIR": f"{asked.folder}/tmp", "UNETC_CACHE": f"{asked.folder}/cache"})
    tempfile.tempdir = None  # a library may have asked for it before the fork
    os.chdir(asked.folder)
    if asked.clock is not None:
        set_clock(Path(asked.clock))
    if asked.changes is not None:
        count_changes(asked.folder, Path(asked.changes), last=asked.last)
    limit(**asked.limits)
    return asked.arguments


if __name__ == "__main__":
    for module in HEAVY if sys.argv[1] == "heavy" else LIGHT:
        importlib.import_module(module)
    gc.freeze()  # or a forked process copies every page when it collects garbage
    atexit.register(gc.unfreeze)
    print(READY, flush=True)
    sys.argv = ["unetc", *serve()]
    main()
