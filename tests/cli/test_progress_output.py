"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from rich.console import Console

from unetc.cli import output
from unetc.progress import Progress


@dataclass
class Screen:
    """Streams that the command line writes to, and its clock."""

    now: float = 1000.0
    text: io.StringIO = field(default_factory=io.StringIO)

    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """Write to a file, with a clock that stands still until it is moved."""
    screen = Screen()
    monkeypatch.setattr(output, "ERR", Console(file=screen.text, force_terminal=False, highlight=False))
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: screen.now))
    return screen


def test_a_stage_begins_and_ends_with_a_line(screen: Screen) -> None:
    with output.progress() as report:
        for done in range(11):
            report(Progress(stage="capture", done=done, total=10))
            screen.now += 0.5
    assert screen.lines() == ["capture: 0 % after 0 s", "capture: 100 % after 5 s"]


def test_a_long_stage_writes_a_line_now_and_then_with_the_time_left(screen: Screen) -> None:
    with output.progress() as report:
        for done in range(41):
            report(Progress(stage="ablations", done=done, total=40))
            screen.now += 1
    assert screen.lines() == [
        "ablations: 0 % after 0 s",
        "ablations: 25 % after 10 s, 30 s left",
        "ablations: 50 % after 20 s, 20 s left",
        "ablations: 75 % after 30 s, 10 s left",
        "ablations: 100 % after 40 s",
    ]


def test_a_note_is_said_once_before_its_stage(screen: Screen) -> None:
    with output.progress() as report:
        report(Progress(stage="full model", done=0, total=2, note="about 14 minutes"))
        report(Progress(stage="full model", done=2, total=2))
    assert screen.lines() == ["about 14 minutes", "full model: 0 % after 0 s", "full model: 100 % after 0 s"]


def test_every_stage_has_its_own_clock(screen: Screen) -> None:
    with output.progress() as report:
        report(Progress(stage="capture", done=0, total=1))
        screen.now += 30
        report(Progress(stage="capture", done=1, total=1))
        report(Progress(stage="timing", done=0, total=4))
        screen.now += 20
        report(Progress(stage="timing", done=1, total=4))
    assert screen.lines() == [
        "capture: 0 % after 0 s",
        "capture: 100 % after 30 s",
        "timing: 0 % after 0 s",
        "timing: 25 % after 20 s, 60 s left",
    ]


def test_a_stage_that_starts_in_the_middle_does_not_guess(screen: Screen) -> None:
    # partial results of an earlier run: the first report is not zero and took no time
    with output.progress() as report:
        report(Progress(stage="ablations", done=30, total=40))
    assert screen.lines() == ["ablations: 75 % after 0 s"]


def test_a_stage_of_nothing_ends_at_once(screen: Screen) -> None:
    with output.progress() as report:
        report(Progress(stage="ablations", done=0, total=0))
    assert len(screen.lines()) == 1


def test_a_long_name_stays_on_one_line(screen: Screen) -> None:
    with output.progress() as report:
        report(Progress(stage="a stage " * 30, done=0, total=2))
    assert len(screen.lines()) == 1


def test_on_a_terminal_every_stage_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(output, "ERR", Console(file=text, force_terminal=True, width=100, highlight=False))
    with output.progress() as report:
        for stage in ("capture", "timing"):
            for done in range(3):
                report(Progress(stage=stage, done=done, total=2))
    assert "capture" in text.getvalue()
    assert "timing" in text.getvalue()
    assert text.getvalue().count("100 %") >= 2


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress() as report:
        report(Progress(stage="timing", done=0, total=2))
    written = capsys.readouterr()
    assert written.out == ""
    assert "timing" in written.err


def test_square_brackets_are_printed_as_they_are(screen: Screen) -> None:
    with output.progress() as report:
        report(Progress(stage="capture", done=1, total=1, note="pip install 'unetc[serve]'"))
    output.say("wrote samples[bold].png", output.ERR)
    assert {"pip install 'unetc[serve]'", "wrote samples[bold].png"} <= set(screen.lines())
