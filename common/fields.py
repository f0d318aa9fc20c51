"""Frozen dataclasses that come from people and from files: a field says in its annotation what it allows.

    Count = Annotated[int, Bound("an integer of at least 1", lambda n: n >= 1)]

    @dataclass(frozen=True, kw_only=True)
    class Recipe(Checked):
        error = RecipeError
        title = "a recipe"
        epochs: Count = 90

JSON's lists become tuples, and whole numbers become floats where a float is asked for. What contradicts what is for
the class's own `__post_init__`, after this one's. None is allowed where it is the default: such a field follows from
the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from sys import float_info
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from common.errors import ParityError


@dataclass(frozen=True)
class Bound:
    """What a value must be beyond its type: `words` say it to a person, `holds` of a value."""

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[int, Bound("an integer of at least 1", lambda n: n >= 1)]
Natural = Annotated[int, Bound("an integer of at least 0", lambda n: n >= 0)]
Counts = Annotated[tuple[Count, ...], Bound("a list of one or more integers of at least 1", bool)]
Positive = Annotated[float, Bound("a number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Bound("a number of at least 0", lambda x: x >= 0)]
Between = Annotated[float, Bound("a number above 0 and below 1", lambda x: 0 < x < 1)]
Share = Annotated[float, Bound("a share of at least 0 and below 1", lambda x: 0 <= x < 1)]


class Checked:
    """Base of such dataclasses. `error` is what a bad value raises, `title` what an instance is called."""

    error: ClassVar[type[ParityError]]
    title: ClassVar[str]

    def __post_init__(self) -> None:
        """Hold every field to its annotation. Raises `error` naming field, value and what is allowed."""
        for field in fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, field.name), self.hints()[field.name]
            if value is None and field.default is None:
                continue
            try:
                object.__setattr__(self, field.name, _fitted(value, hint))
            except _NotAllowed:
                self.require(field.name, False, _in_words(hint))

    def follow(self, name: str, value: Any) -> None:
        """Fill in a field that was left to follow from the others."""
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise `error` with the field's name, its value and what was `expected`, unless the condition `holds`."""
        if not holds:
            raise self.error(f"{name}={getattr(self, name)!r} is not allowed in {self.title}; expected {expected}")

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """The instance whose fields these are, as JSON or TOML gives them. Raises `error` for an unknown field, one
        that is missing, or a value that is not allowed."""
        if not isinstance(data, Mapping):
            raise cls.error(f"{cls.title} is a table of fields, and this is a {type(data).__name__}")
        cls.check_names(data)
        for field in fields(cls):  # type: ignore[arg-type]
            required = field.default is MISSING and field.default_factory is MISSING
            if required and field.name not in data:
                raise cls.error(f"field {field.name!r} is missing in {cls.title}")
        return cls(**data)

    @classmethod
    def hints(cls) -> dict[str, Any]:
        """The annotation of every field, by name."""
        return _hints(cls)  # type: ignore[arg-type]  # a class can be hashed, whatever its instances can

    @classmethod
    def check_names(cls, names: Mapping[str, Any]) -> None:
        """Raise `error` for a name that no field has, with the nearest that one has."""
        known = cls.hints()
        for name in names:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
                raise cls.error(f"unknown field {name!r} in {cls.title}; {hint}")


class _NotAllowed(Exception):
    """Of a value that its annotation does not allow; not a ValueError, which those of a table of fields are."""


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotation of every field, by name."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def extras(cls: type, kind: type) -> dict[str, Any]:
    """Of every field that has one, the extra of this kind in its annotation, by name."""
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in _hints(cls).items()}
    return {name: extra for name, every in found.items() for extra in every if isinstance(extra, kind)}


def _fitted(value: Any, hint: Any) -> Any:
    """`value` as its annotation wants it. Raises `_NotAllowed` for one that it does not allow."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        fitted = _fitted(value, arguments[0])
        if all(bound.holds(fitted) for bound in arguments[1:] if isinstance(bound, Bound)):
            return fitted
    elif origin is Literal:
        if any(value == one and type(value) is type(one) for one in arguments):
            return value
    elif origin in (UnionType, Union):
        for one in arguments:
            try:
                return _fitted(value, one)
            except _NotAllowed:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple) and (arguments[-1] is ... or len(value) == len(arguments)):
            kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            return tuple(_fitted(one, kind) for one, kind in zip(value, kinds, strict=True))
    elif hint is float:
        # Not `isfinite`, which cannot take an integer that is too large for a float.
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max:
            return float(value)
    elif isinstance(hint, type) and issubclass(hint, Checked) and isinstance(value, Mapping):
        return hint.from_data(value)
    elif hint is Any or (isinstance(value, origin or hint) and isinstance(value, bool) == (hint is bool)):
        return value
    raise _NotAllowed


def _in_words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [bound.words for bound in arguments[1:] if isinstance(bound, Bound)]
        return bounds[0] if bounds else _in_words(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (UnionType, Union):
        return ", or ".join(_in_words(one) for one in arguments)
    if origin is tuple and arguments[-1] is ...:
        return f"a list, each {_in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(hint, f"a table of fields, {hint.title}" if hasattr(hint, "title") else str(hint.__name__))
