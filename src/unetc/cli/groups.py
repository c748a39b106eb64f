"""Option groups: records whose fields are options of the command line.

A command takes a group as one parameter. `spliced` puts the fields of the group into the command's signature, where
typer finds them, and hands over the finished object:

    class Shape(Group, panel="Shape"):
        width: Annotated[int, typer.Option(help="Width in pixels.")] = 8

    def draw(shape: Shape) -> None: ...

    app.command()(spliced(draw))  # draw --width 8
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Never, dataclass_transform, get_args, get_origin, get_type_hints

from typer.models import OptionInfo


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Group:
    """Base of option groups; the panel is their heading in `--help`.

    Type checkers see subclasses as frozen dataclasses with keyword-only fields. They are not made by `dataclass`, whose
    code generation would take a twentieth of the time of `unetc --help`.
    """

    panel: ClassVar[str]
    parameters: ClassVar[tuple[inspect.Parameter, ...]]
    """One per field, in the panel of the group."""

    def __init_subclass__(cls, *, panel: str = "") -> None:
        """Keep the heading, or have the base's, and list the fields."""
        super().__init_subclass__()
        cls.panel = panel or cls.panel
        cls.parameters = tuple(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(cls, name, inspect.Parameter.empty),
                annotation=_in_panel(annotation, cls.panel),
            )
            for name, annotation in get_type_hints(cls, include_extras=True).items()
            if get_origin(annotation) is Annotated
        )

    def __init__(self, **values: Any) -> None:
        """Fill in the fields; those that are not given have their defaults."""
        defaults = {parameter.name: parameter.default for parameter in self.parameters}
        if inspect.Parameter.empty in (defaults | values).values() or not values.keys() <= defaults.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(defaults)}; got {', '.join(values) or 'nothing'}.")
        vars(self).update(defaults | values)

    def __setattr__(self, name: str, value: object) -> Never:
        """Refuse changes."""
        raise AttributeError(f"cannot change {name} of {type(self).__name__}: option groups are frozen.")


def spliced(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a group by the fields of that group."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Group]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if isinstance(hints[name], type) and issubclass(hints[name], Group):
            groups[name] = hints[name]
            parameters += hints[name].parameters
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    def call(**values: Any) -> None:
        made = {
            name: group(**{parameter.name: values.pop(parameter.name) for parameter in group.parameters})
            for name, group in groups.items()
        }
        command(**made, **values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _in_panel(annotation: Any, panel: str) -> Any:
    """Copy the option of an annotation into a panel; arguments keep their place."""
    plain, *extras = get_args(annotation)
    moved = [copy.copy(extra) for extra in extras]
    for extra in moved:
        if isinstance(extra, OptionInfo):
            extra.rich_help_panel = panel
    return Annotated[(plain, *moved)]
