"""The command line: one thin function per command, each calling one function of `unetc.api`."""

from __future__ import annotations

import signal
import sys

from unetc.errors import UnetcError

_EXTRAS = {
    "onnxruntime": "cpu",
    **dict.fromkeys(
        ("torch", "diffusers", "onnx", "onnxscript", "onnx_ir", "scipy", "torchmetrics", "filelock", "huggingface_hub"),
        "compile",
    ),
    "peft": "lora",
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
}
"""Which extra brings a library."""

_INTERRUPTED = 130
"""Exit code of typer on Ctrl-C."""
_TERMINATED = 128 + signal.SIGTERM
"""Exit code that shells expect of a command that this signal ended."""


def main() -> None:
    """Run the command line: exit 0 when done, 1 on an error of unetc (one line), 2 on wrong usage."""
    from .app import app

    signal.signal(signal.SIGTERM, _end)  # by default it leaves temporary folders and the processes of builds behind
    try:
        app(prog_name="unetc")
    except UnetcError as error:
        print(f"unetc: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library not in _EXTRAS:
            raise
        print(f"unetc: this command needs {library}: pip install 'unetc[{_EXTRAS[library]}]'", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code in (_INTERRUPTED, _TERMINATED):
            print("unetc: interrupted; run the same command again to continue.", file=sys.stderr)
        raise


def _end(*_: object) -> None:
    sys.exit(_TERMINATED)


__all__ = ["main"]
