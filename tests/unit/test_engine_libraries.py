"""What is wrong with a library or the driver's tool is said in a line, whatever it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.tensorrt_on_cpu import LIBRARY
from unetc.cli.diagnosis import Finding, diagnose
from unetc.errors import EngineBuildError, MissingDependency
from unetc.nvidia import driver
from unetc.nvidia.key import Gpu
from unetc.nvidia.library import Library

BOUND = Library(target="tensorrt:bound", module=LIBRARY.module, extra="none", portable=False, times_kernels=False)
L40S = "NVIDIA L40S, 8.9, 580.65.06"


def tool(folder: Path, patch: pytest.MonkeyPatch, *lines: str) -> None:
    """Put a program in place of nvidia-smi; without lines there is none."""
    path = folder / driver.TOOL
    if lines:
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


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


def test_a_name_with_a_comma_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, monkeypatch, "echo 'NVIDIA, of course, 9.0, 580.1'", "echo second, 9.0, 580.1")
    gpu = LIBRARY.origin(on_this_gpu=True).gpu
    assert gpu == Gpu(name="NVIDIA, of course", compute_capability="9.0", driver="580.1")


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
    assert bound.misfit(here) == "for gpu NVIDIA L40S of 8.9 with driver 580.65.06 (here not known)"
    assert "engines for one GPU alone are not run here: " in caplog.text
    assert "nvidia-smi is not there" in caplog.text
    with pytest.raises(EngineBuildError, match="nvidia-smi is not there"):
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
