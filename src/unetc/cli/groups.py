"""Option groups: frozen dataclasses whose fields are options of the command line.

A command takes a group as one parameter. `spliced` puts the fields of the group into the command's signature, where
typer finds them, and hands over the finished object:

    @dataclass(frozen=True, kw_only=True)
    class Shape(Group, panel="Shape"):
        width: Annotated[int, typer.Option(help="Width in pixels.")] = 8

    def draw(shape: Shape) -> None: ...

    app.command()(spliced(draw))  # draw --width 8
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


class Group:
    """Base of option groups; the panel is their heading in `--help`."""

    panel: ClassVar[str]

    def __init_subclass__(cls, *, panel: str = "", **others: Any) -> None:
        """Keep the heading; a group derived from another one may keep that heading."""
        super().__init_subclass__(**others)
        if panel:
            cls.panel = panel


def spliced(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a group by the fields of that group."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Group]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if isinstance(hints[name], type) and issubclass(hints[name], Group):
            groups[name] = hints[name]
            parameters += _fields(hints[name])
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    names = {group: [field.name for field in dataclasses.fields(_record(group))] for group in groups.values()}

    def call(**values: Any) -> None:
        made = {name: group(**{own: values.pop(own) for own in names[group]}) for name, group in groups.items()}
        command(**made, **values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _fields(group: type[Group]) -> Iterator[inspect.Parameter]:
    """Make one parameter per field of a group, in the panel of the group."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(_record(group)):
        required = field.default is dataclasses.MISSING
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else field.default,
            annotation=_in_panel(hints[field.name], group.panel),
        )


def _record(group: type[Group]) -> Any:
    """Widen the type of a group: every group is a dataclass, which a type checker cannot see in the base."""
    return group


def _in_panel(annotation: Any, panel: str) -> Any:
    """Copy the option of an annotation into a panel; arguments keep their place."""
    if get_origin(annotation) is not Annotated:
        return annotation
    plain, *extras = get_args(annotation)
    moved = [copy.copy(extra) for extra in extras]
    for extra in moved:
        if isinstance(extra, OptionInfo):
            extra.rich_help_panel = panel
    return Annotated[(plain, *moved)]
