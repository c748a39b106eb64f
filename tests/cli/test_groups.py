"""Option groups: fields become options, and the command is handed the finished object."""

from __future__ import annotations

from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from unetc.cli.groups import Group, spliced
from unetc.cli.options import AnalysisGroup
from unetc.models import find
from unetc.models.find import ModelSource, Sampling

Size = Annotated[int, typer.Option(min=1, help="Size in pixels.")]


class Shape(Group, panel="Shape"):
    name: Annotated[str, typer.Argument()]
    width: Size = 8
    closed: Annotated[bool, typer.Option("--closed")] = False

    def text(self) -> str:
        return f"{self.name} {self.width} {self.closed}"


class Solid(Shape):
    depth: Size = 2


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()

    def draw(solid: Solid, size: Size = 3) -> None:
        """Draw a solid."""
        print(solid.text(), solid.depth, size)

    app.command()(spliced(draw))
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_fields_of_a_group_and_of_its_base_are_options() -> None:
    assert run("cube") == (0, "cube 8 False 2 3\n")
    assert run("cube", "--closed", "--width", "5", "--depth", "6", "--size", "7") == (0, "cube 5 True 6 7\n")
    assert run("cube", "--depth", "0")[0] == 2
    assert run()[0] == 2


def test_help_shows_the_group_under_its_heading() -> None:
    code, shown = run("--help")
    assert (code, "Draw a solid." in shown, "─ Shape ─" in shown) == (0, True, True)


def test_a_group_is_a_frozen_record() -> None:
    shape = Shape(name="square")
    assert (shape.width, shape.closed) == (8, False)
    with pytest.raises(AttributeError, match="frozen"):
        shape.width = 9  # type: ignore[misc]
    with pytest.raises(TypeError, match="Shape takes name, width, closed; got nothing"):
        Shape()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="got name, depth"):
        Shape(name="square", depth=1)  # type: ignore[call-arg]
    assert not hasattr(Shape, "depth")


def test_the_usual_sampling_of_a_model_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ModelSource] = []

    def usual(model: ModelSource) -> Sampling:
        asked.append(model)
        return Sampling(scheduler="lcm", steps=4)

    monkeypatch.setattr(find, "usual_sampling", usual)
    group = AnalysisGroup()
    for source in (ModelSource("one"), ModelSource("another")):
        options = group.options(source)
        assert (options.scheduler, options.steps, group.steps_of(source)) == ("lcm", 4, 4)
    assert asked == [ModelSource("one"), ModelSource("another")]
