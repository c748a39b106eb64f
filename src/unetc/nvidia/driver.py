"""Ask nvidia-smi, which comes with the driver and needs no further library, about a GPU of this process.

The tool lists all GPUs of the machine, by their place on the PCI bus. CUDA orders them by speed, unless
CUDA_DEVICE_ORDER is set, and CUDA_VISIBLE_DEVICES hides and reorders them. Where the GPUs differ, CUDA is asked for the
place of the GPU with a given index.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from typing import Any

from unetc.errors import EngineBuildError

TOOL = "nvidia-smi"
CUDA = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
"""Library of the driver."""
ANSWERS_WITHIN_S = 60.0
"""A tool that takes longer is considered to hang."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_TAIL = 200
"""Characters of an unexpected answer that are shown."""

_UNKNOWN = "[N/A]"
"""In place of a field that the tool cannot find out, which may be the place of a GPU."""

Bus = tuple[int, ...]
"""Place of a GPU on the PCI bus: domain, bus, device, function."""
_PARTS = 4
"""Numbers of such a place."""


def ask(*fields: str, gpu: int = 0) -> tuple[str, ...]:
    """Query fields of a GPU, named as in `nvidia-smi --help-query-gpu`.

    Args:
        fields: Names of the fields; only the first may have commas in its value.
        gpu: Index of the GPU among those that CUDA shows to this process.

    Raises:
        EngineBuildError: If the tool is missing, finds no GPU or does not answer, or CUDA does not identify the GPU.
    """
    query = [TOOL, f"--query-gpu={','.join(('pci.bus_id', *fields))}", "--format=csv,noheader"]
    if shutil.which(TOOL) is None:
        raise EngineBuildError(f"{TOOL} is missing")
    try:
        asked = subprocess.run(
            query, capture_output=True, text=True, errors="replace", timeout=ANSWERS_WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineBuildError(f"{TOOL} does not answer within {ANSWERS_WITHIN_S:g} s") from error
    except OSError as error:
        raise EngineBuildError(f"{TOOL} cannot be run: {error.strerror}") from error
    known = _read(asked, len(fields))
    if all(answer == known[0][1] for _, answer in known):  # equal GPUs need not be distinguished
        return known[0][1]
    bus = _bus_of(gpu)
    for place, answer in known:
        if _parsed(place) == _parsed(bus):
            return answer
    places = ", ".join(place for place, _ in known)
    raise EngineBuildError(f"{TOOL} does not list GPU {gpu} of CUDA, which is at {bus}; those that it lists: {places}")


def showing(gpu: int) -> dict[str, str]:
    """Return the environment variables of a process that is to see one GPU alone.

    Args:
        gpu: Index of the GPU among those that CUDA shows to this process.

    Raises:
        EngineBuildError: If CUDA can show no such GPU.
    """
    if (given := os.environ.get(_VISIBLE)) is None:
        return {_VISIBLE: str(gpu)}
    if gpu >= len(shown := given.split(",")):
        raise EngineBuildError(f"{_VISIBLE}={given} has no GPU {gpu}. Set it before CUDA is first used, or not at all.")
    return {_VISIBLE: shown[gpu].strip()}


def _read(asked: subprocess.CompletedProcess[str], fields: int) -> list[tuple[str, tuple[str, ...]]]:
    """Parse the place of every GPU and the values of its fields; other lines, such as warnings, are skipped."""
    rows = [line.partition(",") for line in asked.stdout.splitlines() if line.strip()]
    known = [
        (place.strip(), tuple(map(str.strip, rest.rsplit(",", fields - 1))))
        for place, _, rest in rows
        if len(_parsed(place)) == _PARTS or place.strip() == _UNKNOWN
    ]
    if asked.returncode or not known or any(len(values) != fields or not all(values) for _, values in known):
        said = " ".join((asked.stdout + asked.stderr).split())[-_TAIL:]
        raise EngineBuildError(f"{TOOL} finds none: {said or 'it says nothing'}")
    return known


def _bus_of(gpu: int) -> str:
    """Ask CUDA for the place of a GPU on the PCI bus.

    Source:
        CUDA Driver API: cuInit, cuDeviceGet, cuDeviceGetPCIBusId, cuGetErrorString.
    """
    unknown = f"{TOOL} lists unlike GPUs, and CUDA does not say which of them is its GPU {gpu}"
    try:
        cuda = ctypes.CDLL(CUDA)
    except OSError as error:
        raise EngineBuildError(f"{unknown}: {error}") from error
    device, place, reason = ctypes.c_int(), ctypes.create_string_buffer(32), ctypes.c_char_p()
    calls: dict[str, tuple[Any, ...]] = {
        "cuInit": (0,),
        "cuDeviceGet": (ctypes.byref(device), gpu),
        "cuDeviceGetPCIBusId": (place, len(place), device),
    }
    for name, arguments in calls.items():
        if result := cuda[name](*arguments):
            cuda.cuGetErrorString(result, ctypes.byref(reason))
            raise EngineBuildError(f"{unknown}: {name} fails with {result}, {(reason.value or b'unknown').decode()}")
    return place.value.decode()


def _parsed(place: str) -> Bus:
    """Parse a place; the tool writes more leading zeros than CUDA does."""
    try:
        return tuple(int(part, 16) for part in place.replace(".", ":").split(":"))
    except ValueError:
        return ()  # no place
