"""Families of architectures, found by name: the one place in `common` that lists them."""

import json
from dataclasses import MISSING, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, Self

from common.architectures import resnet
from common.architectures.layers import Layer
from common.errors import SpecError

_FAMILIES = {module.Spec.family: module for module in (resnet,)}


class Spec(Protocol):
    """What every family's specification offers; the rest of the project uses nothing else of it."""

    @property
    def family(self) -> str: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def input_size(self) -> tuple[int, ...]: ...
    @property
    def output_stride(self) -> int: ...
    @property
    def exact_twin(self) -> Self: ...
    @property
    def layers(self) -> tuple[Layer, ...]: ...
    def replace(self, **changes: Any) -> Self: ...


def variants() -> dict[str, Spec]:
    """All named specifications, by name."""
    return {name: spec for family in _FAMILIES.values() for name, spec in family.VARIANTS.items()}


def find(name: str) -> Spec:
    """The specification of a named variant. Raises `SpecError` with the nearest names for an unknown one."""
    known = variants()
    if name in known:
        return known[name]
    asked = name.lower()
    near = [other for other in known if asked and asked in other][:3]
    near = near or get_close_matches(asked, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else "`resnet-parity list` shows all"
    raise SpecError(f"unknown variant {name!r}; {hint}")


def matching(pattern: str) -> list[str]:
    """Names of the variants that match a shell pattern, or contain it."""
    return [name for name in variants() if fnmatchcase(name, pattern) or pattern in name]


def to_dict(spec: Spec) -> dict[str, Any]:
    """A specification as JSON data: its family and every field."""
    data: dict[str, Any] = {"family": spec.family}
    for field in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        data[field.name] = list(value) if isinstance(value, tuple) else value
    return data


def from_dict(data: Any) -> Spec:
    """The specification that `to_dict` wrote; fields left out take their defaults. Raises `SpecError`."""
    if not isinstance(data, dict):
        raise SpecError(f"a spec is a JSON object of fields, and this is a {type(data).__name__}")
    data = dict(data)
    family = data.pop("family", None)
    if not isinstance(family, str) or family not in _FAMILIES:
        raise SpecError(f"family={family!r} is unknown; expected one of {', '.join(_FAMILIES)}")
    cls = _FAMILIES[family].Spec
    known = {field.name: field for field in fields(cls)}
    for name in data:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
            raise SpecError(f"unknown field {name!r} in a {family} spec; {hint}")
    for name, field in known.items():
        if field.default is MISSING and name not in data:
            raise SpecError(f"field {name!r} is missing in a {family} spec")
    spec: Spec = cls(**data)
    return spec


def to_json(spec: Spec) -> str:
    """A specification as JSON text."""
    return json.dumps(to_dict(spec))


def from_json(text: str) -> Spec:
    """The specification that `to_json` wrote. Raises `SpecError`."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"a spec is JSON, and this is not: {error}") from None
    return from_dict(data)


def read(path: Path) -> Spec:
    """The specification in a JSON file. Raises `SpecError` naming the file."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot read the spec: {error}") from None
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
