"""Every fault of a library or of the driver's tool is reported in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stand_ins.tensorrt_on_cpu import LIBRARY
from unetc.cli.diagnosis import Finding, diagnose
from unetc.errors import EngineBuildError, MissingDependency
from unetc.nvidia import driver
from unetc.nvidia.key import Gpu
from unetc.nvidia.library import Library
from unetc.runtime.backends import tensorrt
from unetc.runtime.backends.registry import Memory

BOUND = Library(target="tensorrt:bound", module=LIBRARY.module, extra="none", portable=False, times_kernels=False)
L40S = "00000000:01:00.0, NVIDIA L40S, 8.9, 580.65.06"
H100 = "00000000:C1:00.0, NVIDIA H100, 9.0, 580.65.06"

CUDA = """
#include <stdio.h>
static const char *places[] = {%s};
int cuInit(unsigned flags) { return %d; }
int cuDeviceGet(int *device, int ordinal) {
    if (ordinal >= (int)(sizeof places / sizeof *places)) return 101;
    *device = ordinal + 7;
    return 0;
}
int cuDeviceGetPCIBusId(char *place, int size, int device) {
    snprintf(place, size, "%%s", places[device - 7]);
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = error == 100 ? "no device" : 0; return 0; }
"""
"""Source of a stand-in for the functions of CUDA's driver library, which is missing without a GPU."""


def tool(folder: Path, patch: pytest.MonkeyPatch, *lines: str) -> None:
    """Replace nvidia-smi by a program that prints lines; remove it if there are none."""
    path = folder / driver.TOOL
    if lines:
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def cuda(folder: Path, patch: pytest.MonkeyPatch, *places: str, starts_with: int = 0) -> None:
    """Replace CUDA's library by one with GPUs at these places of the PCI bus."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source, library = folder / "cuda.c", folder / "libcuda.so"
    source.write_text(CUDA % (", ".join(f'"{place}"' for place in places), starts_with))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    patch.setattr(driver, "CUDA", str(library))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["echo No devices were found"], "nvidia-smi finds none: No devices were found"),
        (["echo it has failed >&2", "exit 9"], "nvidia-smi finds none: it has failed"),
        (["exit 0"], "nvidia-smi finds none: it says nothing"),
        (["exec sleep 60"], "nvidia-smi does not answer within 0.5 s"),
    ],
)
def test_a_tool_that_shows_no_gpu_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], message: str
) -> None:
    tool(tmp_path, monkeypatch, *lines)
    monkeypatch.setattr(driver, "ANSWERS_WITHIN_S", 0.5)
    with pytest.raises(EngineBuildError, match=f"for the GPU of this machine, and {message}. Do it on the machine"):
        LIBRARY.origin(on_this_gpu=True)
    assert diagnose(), "the doctor goes on"


@pytest.mark.parametrize(
    "line", ["Warning: the driver is old, update it", "WARNING: infoROM is corrupted at gpu 0000:01:00.0", "caf\\351"]
)
def test_lines_that_are_about_no_gpu_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    tool(tmp_path, monkeypatch, f"printf '{line}\\n'", f"echo {L40S}", f"printf '{line}\\n'")
    assert LIBRARY.here().gpu == Gpu(name="NVIDIA L40S", compute_capability="8.9", driver="580.65.06")


def test_a_gpu_whose_place_is_unknown_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "echo '[N/A], NVIDIA L40S, 8.9, 580.65.06'")
    assert LIBRARY.here().gpu == Gpu(name="NVIDIA L40S", compute_capability="8.9", driver="580.65.06")


def test_a_name_with_a_comma_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "echo '00000000:01:00.0, NVIDIA, of course, 9.0, 580.1'")
    gpu = LIBRARY.origin(on_this_gpu=True).gpu
    assert gpu == Gpu(name="NVIDIA, of course", compute_capability="9.0", driver="580.1")


@pytest.mark.parametrize("order", [("0000:c1:00.0", "0000:01:00.0"), ("0000:01:00.0", "0000:c1:00.0")])
def test_of_unlike_gpus_the_one_is_named_that_cuda_gives_the_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}", f"echo {H100}")
    cuda(tmp_path, monkeypatch, *order)
    at = {"0000:01:00.0": "NVIDIA L40S", "0000:c1:00.0": "NVIDIA H100"}
    own = [LIBRARY.origin(on_this_gpu=True, gpu=gpu).gpu for gpu in (0, 1)]
    assert [gpu.name for gpu in own if gpu] == [at[place] for place in order]
    assert [LIBRARY.here().gpu, LIBRARY.here(1).gpu] == own
    monkeypatch.setattr(tensorrt, "LIBRARIES", {LIBRARY.target.partition(":")[0]: LIBRARY})
    for gpu in (0, 1):  # sampling may use a GPU other than the first
        monkeypatch.setattr(tensorrt, "gpu_of", lambda target, gpu=gpu: torch.device("cuda", gpu))
        assert (
            tensorrt.open_backend(LIBRARY.target.partition(":")[0], threads=1, memory=Memory.FAST).here.gpu == own[gpu]
        )


@pytest.mark.parametrize(
    ("places", "starts_with", "message"),
    [
        (["0000:c1:00.0"], 100, "its GPU 1: cuInit fails with 100, no device"),
        (["0000:c1:00.0"], 0, "its GPU 1: cuDeviceGet fails with 101, unknown"),
        (
            ["0000:c1:00.0", "0001:c1:00.0"],
            0,
            "does not list GPU 1 of CUDA, which is at 0001:c1:00.0; .*:01:00.0, .*:C1:",
        ),
        ([], 0, "its GPU 1: .*no_such_library"),
    ],
)
def test_which_of_unlike_gpus_it_is_is_never_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[str], starts_with: int, message: str
) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}", f"echo {H100}")
    monkeypatch.setattr(driver, "CUDA", str(tmp_path / "no_such_library"))
    if places:
        cuda(tmp_path, monkeypatch, *places, starts_with=starts_with)
    with pytest.raises(EngineBuildError, match=message):
        LIBRARY.origin(on_this_gpu=True, gpu=1)
    assert LIBRARY.here(1).gpu is None, "no engine for one GPU alone is run"


def test_gpus_that_are_alike_are_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}", f"echo {L40S.replace(':01:', ':02:')}")
    monkeypatch.setattr(driver, "CUDA", str(tmp_path / "no_such_library"))
    assert LIBRARY.here() == LIBRARY.here(1)
    assert LIBRARY.here().gpu == Gpu(name="NVIDIA L40S", compute_capability="8.9", driver="580.65.06")


@pytest.mark.parametrize(
    ("given", "gpu", "shown"),
    [
        (None, 0, "0"),
        (None, 2, "2"),
        ("3", 0, "3"),
        ("3, 1", 1, "1"),
        ("GPU-1f2e,GPU-7a,MIG-5c", 1, "GPU-7a"),
        ("", 0, ""),
        ("-1", 0, "-1"),
    ],
)
def test_one_gpu_is_shown_to_another_process_in_the_words_of_this_one(
    monkeypatch: pytest.MonkeyPatch, given: str | None, gpu: int, shown: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert driver.showing(gpu) == {"CUDA_VISIBLE_DEVICES": shown}


def test_a_gpu_that_cannot_be_shown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(EngineBuildError, match="CUDA_VISIBLE_DEVICES=0 has no GPU 1"):
        driver.showing(1)


def test_where_the_gpu_is_known_engines_for_it_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}")
    here = LIBRARY.here()
    assert here == LIBRARY.origin(on_this_gpu=True)
    assert LIBRARY.origin().misfit(here) == here.misfit(here) == ""


@pytest.mark.without_gpu
def test_without_the_tool_engines_for_many_gpus_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}")
    bound = LIBRARY.origin(on_this_gpu=True)
    (tmp_path / driver.TOOL).unlink()
    here = LIBRARY.here()
    assert here.gpu is None
    assert LIBRARY.origin().misfit(here) == ""
    assert bound.misfit(here) == "for gpu NVIDIA L40S of 8.9 with driver 580.65.06 (here unknown)"
    assert "engines for one GPU alone cannot run here: " in caplog.text
    assert "nvidia-smi is missing" in caplog.text
    with pytest.raises(EngineBuildError, match="nvidia-smi is missing"):
        BOUND.here()


def test_the_doctor_shows_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, f"echo {L40S}, 46068 MiB")
    (gpu,) = (finding for finding in diagnose() if finding.name == "NVIDIA GPU")
    assert gpu.works
    assert gpu.detail == "NVIDIA L40S, compute capability 8.9, driver 580.65.06, 46068 MiB"


def test_the_doctor_names_what_compiling_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding() -> Finding:
        return next(one for one in diagnose() if one.name == f"compile for {LIBRARY.target}")

    monkeypatch.setattr("unetc.cli.diagnosis.LIBRARIES", {LIBRARY.target: LIBRARY})
    assert finding().works
    monkeypatch.setitem(sys.modules, "onnx_ir", None)  # which Python takes for a library that is not there
    assert finding().works
    assert "in fp16 needs onnx_ir: pip install 'unetc[none]'" in finding().detail
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not finding().works
    assert "in fp32 needs onnx: pip install 'unetc[none]'" in finding().detail


@pytest.mark.parametrize(
    ("source", "raised", "message"),
    [
        (
            None,
            MissingDependency,
            r"needs imitation \(an empty package is installed, .*\): pip install 'unetc\[none\]'",
        ),
        ("import no_such_library", MissingDependency, r"needs imitation \(No module named 'no_such_library'\)"),
        (
            "try:\n  raise KeyboardInterrupt\nexcept KeyboardInterrupt as error:\n"
            "  raise ImportError('initialization failed') from error",
            KeyboardInterrupt,
            None,
        ),
    ],
    ids=["empty", "broken", "interrupted"],
)
def test_a_library_that_cannot_be_loaded_is_missing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    raised: type[BaseException],
    message: str | None,
) -> None:
    (tmp_path / "imitation").mkdir()
    if source is not None:
        (tmp_path / "imitation/__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    library = Library(target="imitation", module="imitation", extra="none", portable=True, times_kernels=False)
    try:
        with pytest.raises(raised, match=message):
            library.load()
    finally:
        sys.modules.pop("imitation", None)
