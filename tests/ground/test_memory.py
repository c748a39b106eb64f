"""Lack of memory is recognised in the words of every library, and becomes an error of unetc."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch

from unetc.errors import CompileError, OutOfMemory, SessionError
from unetc.memory import lacks_memory, taking_memory

TOO_MUCH = 2**56
"""Bytes that no machine has."""


def wrapped() -> None:
    try:
        np.empty(TOO_MUCH, np.uint8)
    except MemoryError as error:
        raise CompileError("the graph cannot be exported") from error


@pytest.mark.parametrize(
    "take",
    [
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: bytearray(TOO_MUCH),
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: onnxruntime.OrtValue.ortvalue_from_shape_and_type([TOO_MUCH], np.uint8),
        wrapped,
    ],
    ids=["numpy", "python", "torch", "onnxruntime", "wrapped"],
)
def test_a_lack_of_memory_becomes_an_error_of_unetc(take: Callable[[], object]) -> None:
    with pytest.raises(OutOfMemory, match=r"the memory is used up.*a machine with more memory"), taking_memory():
        take()


@pytest.mark.parametrize("error", [ValueError("7"), OSError(errno.ENOSPC, "full"), CompileError("no such operator")])
def test_other_errors_stay(error: Exception) -> None:
    assert not lacks_memory(error)
    with pytest.raises(type(error)) as raised, taking_memory():
        raise error
    assert raised.value is error


def test_an_error_of_unetc_that_speaks_of_memory_stays() -> None:
    error = SessionError("onnxruntime failed: failed to allocate memory for a buffer of 12 bytes")
    with pytest.raises(SessionError) as raised, taking_memory():
        raise error
    assert raised.value is error


def test_the_system_is_understood() -> None:
    assert lacks_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert lacks_memory(RuntimeError("can't start new thread"))
    assert lacks_memory(ImportError("_mt19937.so: failed to map segment from shared object"))


UNRELATED = """
import resource
from unetc.memory import taking_memory
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + {room}, resource.RLIM_INFINITY))
with taking_memory():
    raise ValueError("a field is missing")
"""


@pytest.mark.parametrize(("room", "expected"), [(2**22, "OutOfMemory: the memory is used up"), (2**27, "ValueError")])
def test_an_unrelated_error_is_a_lack_of_memory_where_no_more_can_be_taken(room: int, expected: str) -> None:
    command = [sys.executable, "-c", UNRELATED.format(room=room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert expected in done.stderr.splitlines()[-1]
    assert "a field is missing" in done.stderr.splitlines()[-1]


def test_an_error_of_unetc_is_what_it_says() -> None:
    assert not lacks_memory(SessionError("there is no such level"))
