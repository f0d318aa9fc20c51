"""Options that belong together, as one dataclass: a command takes it as a parameter, the command line as its fields."""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which the fields of every parameter that is a dataclass stand in the place of that parameter.

    Fields are annotated as typer's parameters are.
    """
    shape = signature(command)
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in shape.parameters if is_dataclass(hints[name])}

    @wraps(command)
    def ungrouped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters: list[Parameter] = []
    for name, parameter in shape.parameters.items():
        if name in groups:
            own = get_type_hints(groups[name], include_extras=True)
            for field in fields(groups[name]):
                default = Parameter.empty if field.default is MISSING else field.default
                parameters.append(
                    Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=own[field.name])
                )
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[name]))
    ungrouped.__signature__ = shape.replace(parameters=parameters)  # type: ignore[attr-defined]
    return ungrouped
