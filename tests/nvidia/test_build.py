"""Builds run in separate processes: one that crashes is tried again with less effort, one that fails leaves nothing."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import pytest

from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt.build_all import build_all
from unetc.compiler.tensorrt.build_one import build_one
from unetc.compiler.tensorrt.messages import STEPS, BuildRequest
from unetc.compiler.tensorrt.options import CompileOptions
from unetc.compiler.tensorrt.supervise import Running, build_engine
from unetc.errors import EngineBuildError
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.key import Effort, EngineKey, Origin
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.progress import ignore

ONE = Range(least=1, usual=1, most=1)
REQUEST = BuildRequest(
    target="tensorrt-rtx",
    graph="full.onnx",
    engine="full.engine",
    timing="timing.cache",
    sizes=Sizes(batch=ONE, height=ONE, width=ONE),
    rows={},
    effort=Effort(),
)
BUILT = b'{"type":"built","layers":3,"shapes":{},"peak_bytes":1,"scratch_bytes":null}'


def process(tmp_path: Path, *tries: str) -> tuple[str, ...]:
    """Make a command that runs the next source each time it is started, and stores its requests."""
    script = tmp_path / "process.py"
    lines = [
        "import os, signal, sys, time",
        f"log = open({str(tmp_path / 'requests')!r}, 'a+')",
        "log.write(sys.stdin.read()); log.seek(0); turn = len(log.readlines()); log.close()",
        f"exec({list(tries)!r}[turn - 1])",
    ]
    script.write_text("\n".join(lines))
    return sys.executable, "-S", str(script)


def requests(tmp_path: Path) -> list[BuildRequest]:
    lines = (tmp_path / "requests").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=BuildRequest) for line in lines]


DIES = "os.kill(os.getpid(), signal.SIGKILL)"
EXITS = "sys.exit(137)"
RUNS_OUT = """print('{"type":"refused","message":"out of memory","memory":true}')"""
REFUSES = """print('{"type":"refused","message":"no such operator","memory":false}')"""
HANGS = "time.sleep(60)"
BUILDS = f"open('full.engine', 'w').write('engine'); print('{BUILT.decode()}')"
TALKS = """print('noise'); print('{"type":"advance","done":250}'); print('{"type":"advance","done":5000}'); """


@pytest.mark.parametrize("death", [DIES, EXITS, RUNS_OUT])
def test_a_build_that_dies_is_tried_again_with_less(tmp_path: Path, death: str) -> None:
    command = process(tmp_path, death, death, BUILDS)
    outcome = build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)
    assert (outcome.tries, outcome.engine.read_text(), outcome.built.layers) == (3, "engine", 3)
    efforts = [(request.effort.optimization_level, request.effort.workspace_share) for request in requests(tmp_path)]
    assert efforts == [(3, 1.0), (2, 0.5), (1, 0.25)]
    assert outcome.effort == requests(tmp_path)[-1].effort


def test_the_process_sees_the_gpu_alone_that_it_builds_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f2e,GPU-7a")
    seen = "open('seen', 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); "
    request, command = msgspec.structs.replace(REQUEST, gpu=1), process(tmp_path, seen + BUILDS)
    build_engine(request, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)
    assert (tmp_path / "seen").read_text() == "GPU-7a"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("limit", [math.inf, 1e12])
def test_a_limit_beyond_what_the_system_takes_is_none(tmp_path: Path, limit: float) -> None:
    outcome = build_engine(
        REQUEST, tmp_path, time_limit_s=limit, on_advance=lambda done: None, command=process(tmp_path, BUILDS)
    )
    assert outcome.tries == 1


def test_after_three_tries_it_says_how_each_died(tmp_path: Path) -> None:
    command = process(tmp_path, DIES, EXITS, "sys.stderr.write('last words'); sys.exit(1)")
    message = r"failed 3 times.*signal SIGKILL; exit code 137; exit code 1 \(last words\)"
    with pytest.raises(EngineBuildError, match=message):
        build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)
    assert len(requests(tmp_path)) == 3


def test_a_refusal_is_not_tried_again(tmp_path: Path) -> None:
    command = process(tmp_path, REFUSES, BUILDS)
    with pytest.raises(EngineBuildError, match=r"^no such operator$"):
        build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)
    assert len(requests(tmp_path)) == 1


def test_a_build_that_hangs_is_stopped(tmp_path: Path) -> None:
    command = process(tmp_path, HANGS)
    with pytest.raises(EngineBuildError, match=r"no engine within 0.5 s \(ended by signal SIGKILL\).*--time-limit"):
        build_engine(REQUEST, tmp_path, time_limit_s=0.5, on_advance=lambda done: None, command=command)


def test_progress_is_passed_on_and_noise_is_not(tmp_path: Path) -> None:
    told: list[int] = []
    command = process(tmp_path, TALKS + BUILDS)
    build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=told.append, command=command)
    assert told == [0, 250, 1000]


def test_who_is_told_of_progress_can_stop_the_build(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    command = process(tmp_path, TALKS + "sys.stdout.flush(); " + HANGS)
    with pytest.raises(KeyboardInterrupt):
        build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=stop, command=command)
    assert not (tmp_path / "full.engine").exists()


def test_another_thread_can_stop_a_build_that_hangs(tmp_path: Path) -> None:
    command, running, began = process(tmp_path, HANGS), Running(), time.monotonic()
    clock = threading.Timer(0.5, running.stop)
    clock.start()
    with pytest.raises(EngineBuildError, match="cancelled"):
        build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command, running=running)
    with pytest.raises(EngineBuildError, match="cancelled"):
        build_engine(REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command, running=running)
    clock.join()
    assert time.monotonic() - began < 20
    assert len(requests(tmp_path)) <= 2, "it was tried again"


def test_what_every_try_died_of_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError) as caught:
        build_engine(
            REQUEST, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=process(tmp_path, *[EXITS] * 3)
        )
    assert str(caught.value) == (
        "building failed 3 times, with less effort each time: exit code 137. "
        "Build for smaller sizes, or where there is more memory."
    )


def test_where_one_side_alone_is_a_range_the_error_says_that_it_may_be_that(tmp_path: Path) -> None:
    sizes = msgspec.structs.replace(REQUEST.sizes, height=Range(least=1, usual=1, most=2))
    request, command = msgspec.structs.replace(REQUEST, sizes=sizes), process(tmp_path, *[EXITS] * 3)
    with pytest.raises(EngineBuildError, match=r"exit code 137\. Make both height and width a range, or neither"):
        build_engine(request, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)
    (tmp_path / "requests").unlink()
    other = msgspec.structs.replace(request, target="tensorrt")
    with pytest.raises(EngineBuildError, match=r"exit code 137\. Build for smaller sizes"):
        build_engine(other, tmp_path, time_limit_s=60, on_advance=lambda done: None, command=command)


ORIGIN = Origin(unetc="0", recipe=2, target="tensorrt-rtx", library="0", platform="Linux x86_64", gpu=None)
KEY = EngineKey(
    origin=ORIGIN,
    graph_sha256="1",
    weights_sha256="2",
    precision=Precision.FP32,
    sizes=REQUEST.sizes,
    rows={},
    effort=Effort(),
)


@dataclass
class Builder:
    """Builds the engine of a key in a separate folder."""

    folder: Path
    cache: Path
    running: Running = field(default_factory=Running)
    notes: list[str] = field(default_factory=list)
    done: list[int] = field(default_factory=list)

    def __call__(self, key: EngineKey = KEY) -> bool:
        """Build the engine; return whether another builder has built it."""
        (own := self.folder / str(id(self))).mkdir(exist_ok=True)
        record, known = build_one(
            "full.onnx",
            key,
            own,
            EngineCache(self.cache),
            (),
            time_limit_s=60,
            on_advance=self.done.append,
            on_note=self.notes.append,
            running=self.running,
        )
        assert record.key == key
        return known


@pytest.fixture
def building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Builder]:
    """Replace the building process by one that writes fake engines."""
    source = f"time.sleep(0.5); open('full.onnx.engine', 'w').write('engine'); print('{BUILT.decode()}')"
    command = process(tmp_path, *[source] * 4)
    monkeypatch.setattr("unetc.compiler.tensorrt.build_one.build_engine", partial(build_engine, command=command))
    return partial(Builder, tmp_path, tmp_path / "cache")


def test_an_engine_that_somebody_builds_is_waited_for_and_not_built_again(
    tmp_path: Path, building: Callable[..., Builder]
) -> None:
    one, other = building(), building()
    with ThreadPoolExecutor(2) as pool:
        known = list(pool.map(lambda builder: builder(), (one, other)))
    assert sorted(known) == [False, True]
    assert len(requests(tmp_path)) == 1
    first, second = (other, one) if known[0] else (one, other)
    assert first.notes == []
    assert second.notes == [
        "the engine is being built elsewhere; waiting for it.",
        "the engine has been built elsewhere meanwhile; it is taken from the cache.",
    ]
    assert (first.done[-1], second.done) == (STEPS, [STEPS])
    (engine,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"secret", engine.name, f"{engine.name}.lock"}


def test_engines_of_other_keys_are_built_meanwhile(tmp_path: Path, building: Callable[..., Builder]) -> None:
    builder = building()
    clock = threading.Timer(20, builder.running.stop)
    clock.start()
    with EngineCache(tmp_path / "cache").building(KEY, ignore_wait):
        assert not builder(msgspec.structs.replace(KEY, graph_sha256="3"))
    clock.cancel()
    assert builder.notes == []


def test_an_engine_that_appears_and_was_not_built_here_is_built(
    tmp_path: Path, building: Callable[..., Builder]
) -> None:
    Builder(tmp_path, tmp_path / "theirs")()
    folder = EngineCache(tmp_path / "theirs").folder(KEY)
    shutil.copytree(folder, EngineCache(tmp_path / "cache").folder(KEY))
    assert not building()()
    assert len(requests(tmp_path)) == 2
    assert building()()


def test_who_waits_for_an_engine_is_stopped_with_the_others(tmp_path: Path, building: Callable[..., Builder]) -> None:
    builder = building()
    with EngineCache(tmp_path / "cache").building(KEY, ignore_wait):
        clock = threading.Timer(0.5, builder.running.stop)
        clock.start()
        with pytest.raises(EngineBuildError, match="cancelled"):
            builder()
        clock.join()
    assert builder.notes == ["the engine is being built elsewhere; waiting for it."]
    assert not (tmp_path / "requests").exists()


def ignore_wait() -> None:
    """Continue to wait."""


@pytest.mark.parametrize(("target", "most"), [("tensorrt", 1), ("tensorrt-rtx", 3)])
def test_builds_that_time_kernels_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, most: int
) -> None:
    """They share one GPU; other builds run at once where cores and memory allow it."""
    key = msgspec.structs.replace(KEY, origin=msgspec.structs.replace(ORIGIN, target=target))
    running: set[int] = set()
    together: list[int] = []

    def note(*given: object, **options: object) -> None:
        running.add(threading.get_ident())
        time.sleep(0.2)
        together.append(len(running))
        time.sleep(0.2)
        running.remove(threading.get_ident())

    monkeypatch.setattr("unetc.compiler.tensorrt.build_all.build_one", note)
    monkeypatch.setattr("unetc.compiler.tensorrt.build_all.cores", lambda: 4)
    monkeypatch.setattr("unetc.compiler.tensorrt.build_all.free_memory", lambda: None)
    (tmp_path / WEIGHTS).write_bytes(b"")
    wanted = {(f"{name}.onnx", key.precision): key for name in "abc"}
    options = CompileOptions(target=target, jobs=3)
    build_all(wanted, {Precision.FP32: tmp_path}, (), EngineCache(tmp_path), options, ignore)
    assert max(together) == most
