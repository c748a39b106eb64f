"""A process that has imported a lot forks a process for each command, so that a command takes little time.

It reads one JSON line for each command from stdin, and writes the number of the new process and its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from tests.promises.limits import limit
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
)
"""Modules that commands import, or that import most of them: without torch, and with it."""


def arguments() -> list[str]:
    """Fork for each line, and wait until the new process ends.

    Returns:
        The arguments of the command, in a forked process; never in this one.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        if not (child := os.fork()):
            return _become(asked)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def _become(asked: dict[str, Any]) -> list[str]:
    become(asked["folder"], asked["environment"], asked["out"], asked["err"])
    limit(**asked["limits"])
    return ["unetc", *asked["arguments"]]


def become(folder: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """Turn a forked process into the process of a command.

    Args:
        folder: Folder that it runs in.
        environment: What it adds to the environment.
        out: File or named pipe for its output.
        err: The same for its errors.
    """
    os.setsid()
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment)
    tempfile.tempdir = None  # a library may have asked for it before the fork
    os.chdir(folder)


if __name__ == "__main__":
    for module in HEAVY if sys.argv[1] == "heavy" else LIGHT:
        importlib.import_module(module)
    gc.freeze()  # or a forked process copies every page when it collects garbage
    atexit.register(gc.unfreeze)
    print("ready", flush=True)
    sys.argv = arguments()
    main()
