"""Families of architectures, found by name: the one place in `common` that lists them."""

import json
from dataclasses import fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.architectures import (
    alexnet,
    densenet,
    efficientnet,
    googlenet,
    inception_v3,
    lenet,
    resnet,
    resnet_v2,
    vgg,
)
from common.architectures.spec import Spec, least_size, logits, output, outputs, running
from common.errors import SpecError

__all__ = [
    "Spec",
    "conventions",
    "families",
    "find",
    "from_dict",
    "from_json",
    "least_size",
    "logits",
    "matching",
    "output",
    "outputs",
    "read",
    "running",
    "title",
    "to_dict",
    "to_json",
    "variants",
    "variants_of",
]

_FAMILIES = {
    module.Spec.family: module
    for module in (resnet, resnet_v2, vgg, googlenet, inception_v3, densenet, efficientnet, lenet, alexnet)
}


def variants() -> dict[str, Spec]:
    """All named specifications, by name."""
    return {name: spec for family in _FAMILIES.values() for name, spec in family.VARIANTS.items()}


def families() -> tuple[str, ...]:
    """Names of all families; each has modules of that name here, in `common.names` and in every backend."""
    return tuple(_FAMILIES)


def variants_of(family: str) -> dict[str, Spec]:
    """The named specifications of one family, by name."""
    return dict(_FAMILIES[family].VARIANTS)


def conventions(family: str) -> dict[str, dict[str, Any]]:
    """What each published convention does differently from the spec's defaults: fields by name of the convention."""
    return {name: dict(changes) for name, changes in _FAMILIES[family].CONVENTIONS.items()}


def title(name: str) -> str:
    """The name of a family or a variant as people write it, and as classes and Keras' builders are called: ResNet50."""
    titles: dict[str, str] = {start: title for family in _FAMILIES.values() for start, title in family.TITLES.items()}
    start = max((start for start in titles if name.startswith(start)), key=len)
    return titles[start] + name.removeprefix(start)


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
    spec: Spec = _FAMILIES[family].Spec.from_data(data)
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
