"""Frozen dataclasses that come from files: every field held to its annotation, every error naming field and value."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.errors import RecipeError


def known(cls: type, data: Any, prefix: str) -> dict[str, Any]:
    """`data` as keyword arguments of `cls`: JSON's lists as tuples, whole numbers where a float is asked for."""
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"{prefix.rstrip('.') or 'a recipe'} is a table of fields, and this is a {type(data).__name__}"
        )
    hints = get_type_hints(cls)
    for name in data:
        if name not in hints:
            near = get_close_matches(name, hints, n=1)
            hint = f"did you mean {prefix}{near[0]!s}?" if near else f"allowed: {', '.join(hints)}"
            raise RecipeError(f"unknown field {prefix}{name} in a recipe; {hint}")
    return {name: _value(value, hints[name]) for name, value in data.items()}


def _value(value: Any, hint: Any) -> Any:
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0] if get_origin(hint) is tuple else None
        return tuple(_value(one, inner) for one in value)
    takes_float = hint is float or float in get_args(hint)
    return float(value) if takes_float and isinstance(value, int) and not isinstance(value, bool) else value


def check_types(instance: Any) -> None:
    """Raise `RecipeError` naming the first field whose value is not what its annotation says."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        require(instance, name, _is(value, hint), _in_words(hint))


def _is(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_is(value, one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")
    return type(value) is hint


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if isinstance(hint, UnionType):
        return " or ".join(_in_words(one) for one in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {_in_words(get_args(hint)[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", type(None): "none"}
    return words.get(hint, str(hint.__name__))


def require(instance: Any, name: str, holds: bool, expected: str) -> None:
    """Raise `RecipeError` with the field's name and value unless the condition `holds`."""
    if not holds:
        raise RecipeError(f"{name}={getattr(instance, name)!r}; expected {expected}")
