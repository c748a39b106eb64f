"""What the driver's own tool, which needs no further library, says of the GPU that programs see first."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from unetc.errors import EngineBuildError

TOOL = "nvidia-smi"
ANSWERS_WITHIN_S = 60.0
"""One that takes longer hangs."""
_TAIL = 200
"""Characters of a wrong answer that are shown."""


def ask(*fields: str) -> tuple[str, ...]:
    """Ask for fields of the GPU, as `nvidia-smi --help-query-gpu` names them.

    Raises:
        EngineBuildError: If the tool is not there, finds no GPU or does not answer.
    """
    query = [TOOL, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible.split(',')[0]}")
    if shutil.which(TOOL) is None:
        raise EngineBuildError(f"{TOOL} is not there")
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=ANSWERS_WITHIN_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise EngineBuildError(f"{TOOL} does not answer within {ANSWERS_WITHIN_S:g} s") from error
    except OSError as error:
        raise EngineBuildError(f"{TOOL} cannot be run: {error.strerror}") from error
    return _read(asked, fields)


def _read(asked: subprocess.CompletedProcess[str], fields: Sequence[str]) -> tuple[str, ...]:
    values = asked.stdout.partition("\n")[0].rsplit(",", len(fields) - 1)  # the name, asked for first, may have commas
    if asked.returncode or len(values) != len(fields):
        said = " ".join((asked.stdout + asked.stderr).split())[-_TAIL:]
        raise EngineBuildError(f"{TOOL} finds none: {said or 'it says nothing'}")
    return tuple(value.strip() for value in values)
