"""Whose tensors these are, and of which network: what names and shapes show, and what a convention must say.

Which naming's names are these (several may match: they are tried until the shapes agree), the family's fields from the
canonical shapes, the rest from a convention, and then exactly the arrays of that spec, or an error that names what is
left over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from common import architectures, names
from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.architectures.marks import Mark, marked
from common.checkpoints.containers import Source, Stored
from common.errors import CheckpointError, ParityError, SpecError
from common.names import Found, Naming
from common.weights import LazyWeights, Weights, check_names, role_of, shapes
from common.weights.layouts import to_canonical

DEFAULT_CONVENTION = "torchvision"  # of the spec's defaults, in every family


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """A network and its weights as a source has them."""

    spec: Spec
    weights: Weights
    naming: Naming
    assumed: Mapping[str, Any]  # the fields of the spec that nothing in the source shows
    ignored: tuple[str, ...]


def infer(source: Source, convention: str | None = None, changes: Mapping[str, Any] | None = None) -> Inferred:
    """The network behind native tensors.

    `convention` names another one than the naming's own; `changes` set single fields, over both. Raises
    `CheckpointError` for tensors of no network of ours, `SpecError` for an unknown convention.
    """
    native = {name: tensor.shape for name, tensor in source.tensors.items()}
    failed: list[_Failed] = []
    for family in architectures.families():
        for naming in names.of(family).namings:
            found: Mapping[str, Found] | None = None
            try:
                found = naming.found(native)
                if found:
                    said = _constants_in(naming, source.tensors)
                    told = _told(naming, said)
                    spec = _spec_of(naming, found, convention, changes or {}, told)
                    _check_constants(naming, spec, told)
                    weights, ignored = exactly(spec, naming, source.tensors, found)
                    assumed = {name: value for name, value in _unseen(spec).items() if name not in (changes or {})}
                    return Inferred(spec=spec, weights=weights, naming=naming, assumed=assumed, ignored=ignored)
            except (CheckpointError, SpecError) as error:  # a convention may be another family's
                # Where two names are spellings of one nothing was found yet, though these names are known best.
                known = {one.native for one in found.values()} if found is not None else set(native)
                failed.append(_Failed(known=known, naming=naming, error=error))
    closest = max(failed, key=lambda one: len(one.known), default=None)
    if closest is not None and 2 * len(closest.known) >= len(native):
        raise closest.error
    some = ", ".join(list(native)[:4]) or "none"
    message = f"a {source.container} file whose {len(native)} tensors have no names known here: {some}"
    if closest is not None and closest.known:
        naming = closest.naming
        left = [name for name in native if name not in closest.known and not naming.roles.ignored.fullmatch(name)]
        message += f"; most like the family {naming.family} in {naming.title}'s names, which has no {left[0]}"
    raise CheckpointError(message)


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """A naming that a file is not in: which of the file's names it knows, and what speaks against it."""

    known: set[str]
    naming: Naming
    error: ParityError


def exactly(
    spec: Spec, naming: Naming, tensors: Mapping[str, Stored], found: Mapping[str, Found]
) -> tuple[Weights, tuple[str, ...]]:
    """The weights of a spec in the tensors, and what is left of them and known to belong to no layer.

    Raises `CheckpointError` naming the tensors that are missing, belong nowhere, or have another shape or type.
    """
    expected = naming.arrays(spec)
    here = {name: found[name].native if name in found else native for name, (native, _) in expected.items()}
    wanted = dict.fromkeys(here.values())
    ignored = tuple(name for name in tensors if name not in wanted and naming.roles.ignored.fullmatch(name))
    constant = naming.constants.pattern.fullmatch if naming.constants else lambda name: None
    left = [name for name in tensors if name not in ignored and not constant(name)]
    check_names(f"not a whole network in {naming.title}'s names", left, wanted, CheckpointError)
    getters = {}
    for name, (_, layer) in expected.items():
        native, shape = here[name], found[name].shape
        if shape != layer.arrays[name]:
            turned = "" if shape == tensors[native].shape else f", {shape} in canonical order"
            whom = "the spec" if native == name else name
            raise CheckpointError(
                f"{native} has shape {tensors[native].shape}{turned}; {whom} expects {layer.arrays[name]}"
            )
        if not np.issubdtype(np.dtype(tensors[native].dtype), np.floating):
            raise CheckpointError(f"{native} has dtype {tensors[native].dtype}; expected a floating-point type")
        getters[name] = partial(_canonical, tensors[native], layer, role_of(name, layer), naming)
    return LazyWeights(getters), ignored


def as_read(spec: Spec, naming: Naming) -> Spec:
    """What a file of a spec's weights in these names is taken for. Raises `CheckpointError` if for nothing."""
    found = {name: Found(native=name, shape=shape) for name, shape in shapes(spec).items()}
    constants = naming.constants.arrays(spec) if naming.constants else {}
    return _spec_of(naming, found, None, {}, _told(naming, constants))


def conventions(family: str) -> dict[str, Mapping[str, Any]]:
    """The conventions of a family by name, that of the spec's defaults first."""
    return {DEFAULT_CONVENTION: {}, **architectures.conventions(family)}


def _canonical(tensor: Stored, layer: Layer, role: str, naming: Naming) -> np.ndarray:
    return to_canonical(tensor.read(), layer, role, naming.roles.layout, naming.stored_as(layer.path))


def _constants_in(naming: Naming, tensors: Mapping[str, Stored]) -> dict[str, np.ndarray]:
    """The constants of the spec that stand among the tensors, by role."""
    if naming.constants is None:
        return {}
    matched = {name: naming.constants.pattern.fullmatch(name) for name in tensors}
    return {match["role"]: tensors[name].read() for name, match in matched.items() if match}


def _told(naming: Naming, constants: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return naming.constants.fields(constants) if naming.constants else {}


def _check_constants(naming: Naming, spec: Spec, told: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the file's constants tell of other fields than the spec's, which may have been set
    by hand."""
    if naming.constants is not None and told and told != _told(naming, naming.constants.arrays(spec)):
        raise CheckpointError(
            f"the file's own layer {naming.constants.layer} says "
            f"{', '.join(f'{name}={value}' for name, value in told.items())}; leave these fields as they are"
        )


def _spec_of(
    naming: Naming,
    found: Mapping[str, Found],
    convention: str | None,
    changes: Mapping[str, Any],
    told_by_constants: dict[str, Any],
) -> Spec:
    known = conventions(naming.family)
    if convention is not None and convention not in known:
        raise SpecError(f"unknown convention {convention!r}; expected one of {', '.join(known)}")
    inferred: dict[str, Shape] = {}
    for name, one in found.items():
        if one.shape is None:
            raise CheckpointError(f"{one.native} has another number of axes than a {name.rpartition('.')[2]} has")
        inferred[name] = one.shape
    told = names.of(naming.family).fields or partial(names.fields_of_variant, naming.family)
    shown = told(inferred)
    try:
        unseen = marked(next(iter(architectures.variants_of(naming.family).values())), Mark.UNSEEN)
        conventional = naming.convention if convention is None else known[convention]
        taken = shown | {name: value for name, value in conventional.items() if name in unseen} | told_by_constants
        spec = architectures.from_dict({"family": naming.family, **taken})
        if "classes" not in shown:
            spec = spec.with_head(head="none", pool="average")
        return spec.replace(**changes) if changes else spec
    except SpecError as error:
        raise CheckpointError(f"the shapes give no network of ours: {error}") from None


def _unseen(spec: Spec) -> dict[str, Any]:
    """The fields that could have another value, and make another network, with the same arrays."""
    hints = get_type_hints(type(spec))
    arrays = shapes(spec)
    found = {}
    for field in fields(spec):  # type: ignore[arg-type]
        value = getattr(spec, field.name)
        if field.name in marked(spec, Mark.UNSEEN) and any(
            other.layers != spec.layers and shapes(other) == arrays
            for other in _others(spec, field.name, value, hints[field.name])
        ):
            found[field.name] = value
    return found


def _others(spec: Spec, name: str, value: Any, hint: Any) -> list[Spec]:
    """The spec with other values of a field, those of them that it takes."""
    values: list[Any] = []
    if get_origin(hint) is Literal:
        values = [other for other in get_args(hint) if other != value]
    elif isinstance(value, bool):
        values = [not value]
    elif isinstance(value, int):
        values = [value + 1]
    elif isinstance(value, float):
        values = [value / 2]
    found = []
    for other in values:
        try:
            found.append(spec.replace(**{name: other}))
        except SpecError:
            continue
    return found
