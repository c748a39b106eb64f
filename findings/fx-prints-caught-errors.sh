#!/usr/bin/env bash
# A module traced by torch.fx prints a traceback for every error of a call, also for errors that the caller catches.
#
# Guess: a GraphModule is a module. A call that fails raises, and who catches the error decides what is printed.
#
# Fact: the call of a GraphModule is wrapped. When an error comes out of the generated code, the wrapper writes a traceback
# and the lines around the failing one to stderr, and then raises the error. Its `forward` raises alone.
#
# Why it matters: a server that answers a failed call, as for lack of memory, with one line has two dozen lines per
# request in its log. No logger and no warnings filter stops them: they go to sys.stderr by print.
#
# Seen with torch 2.13.0: calling the module 24 lines, calling its forward 0 lines
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import contextlib
import io
import sys

import torch
from torch import fx, nn

print(f"torch {torch.__version__}")


class Product(nn.Module):
    def forward(self, left, right):
        return torch.relu(left) @ right


def printed(call):
    """Count the lines on stderr of a call whose error is caught."""
    stream, wrong = io.StringIO(), torch.ones(2, 3)
    with contextlib.redirect_stderr(stream):
        try:
            call(wrong, wrong)
        except RuntimeError as error:
            assert "cannot be multiplied" in str(error)
        else:
            sys.exit("the call did not fail")
    return len(stream.getvalue().splitlines())


traced = fx.symbolic_trace(Product())
counts = printed(Product()), printed(traced), printed(traced.forward)
print(f"lines on stderr: plain module {counts[0]}, traced module {counts[1]}, its forward {counts[2]}")
as_stated = counts[0] == counts[2] == 0 and counts[1] > 5
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY
