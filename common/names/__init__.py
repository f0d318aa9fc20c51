"""What each community calls the layers of a network: a module for each family, all communities side by side in it.

A naming is one community's names of one family's layers; `roles` has its names of a layer's arrays, the same for every
family. A module of this package is called as its family and holds one `Family`; nothing else knows a family's names.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import numpy as np

from common import architectures
from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.errors import CheckpointError
from common.names import roles as communities
from common.names.order import model_order
from common.names.roles import Roles
from common.weights import role_of
from common.weights import shapes as shapes_of
from common.weights.layouts import canonical_shape, to_native

CANONICAL = "canonical"

# (native name of a layer, kind, role) -> the array's canonical shape, where the file has it.
ShapeOf = Callable[[str, str, str], Shape | None]


@dataclass(frozen=True)
class Place:
    """Where in a walk a layer stands: its canonical path, and its kind."""

    path: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A JSON file that a community's loaders want beside the weights."""

    name: str
    weights: str  # the name of a file of weights that gets one
    write: Callable[[Any, Sequence[str]], dict[str, Any]]  # of a spec and class names; raises `CheckpointError`
    free: tuple[str, ...]  # fields that may have become others since
    read: Callable[[Mapping[str, Any]], "Told"]  # raises `CheckpointError`


@dataclass(frozen=True, kw_only=True)
class Told:
    """What such a file says beyond the weights."""

    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Numbers of a spec that a community keeps among the weights, as the arrays of a layer that nothing trains."""

    layer: str  # its name there
    pattern: re.Pattern[str]  # of the arrays' names; its group `role` is what `arrays` and `fields` call one
    arrays: Callable[[Any], Mapping[str, np.ndarray]]  # of a spec, by role; none where it has no such layer
    fields: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]  # what they say; raises `CheckpointError`


@dataclass(frozen=True, kw_only=True)
class Naming:
    """One community's names of one family's layers, and what it takes for granted."""

    family: str
    name: str  # as in `--to`
    title: str  # for people
    roles: Roles
    layers: Callable[[Any], Mapping[str, str]]  # of a spec: name of every layer that has one, by canonical path
    # The way back, for families of any depth: the places of those of the names that are this naming's. By default
    # those of the named variant that has most of them.
    places: Callable[[Collection[str], ShapeOf], Mapping[str, Place]] | None = None
    convention: Mapping[str, Any] = field(default_factory=dict)  # fields of the spec that differ from its defaults
    preprocessing: str | None  # what its users feed it; a name in `images.PRESETS`, None where nobody knows
    aliases: tuple[str, ...] = ()
    as_convolutions: frozenset[str] = frozenset()  # dense layers that it stores as convolutions over the whole map
    shortcut_first: bool = False  # of Keras models: whether an addition reads the shortcut before the branch
    beside: Beside | None = None
    constants: Constants | None = None

    def stored_as(self, path: str) -> str | None:
        """The kind of layer that the arrays of the one at `path` are stored for, where it is not its own."""
        return "conv" if path in self.as_convolutions else None

    def places_in(self, spec: Spec) -> dict[str, Place]:
        """Name of every layer of a spec that holds arrays -> its place."""
        names = self._named(spec)
        return {names[layer.path]: Place(layer.path, layer.kind) for layer in spec.layers if layer.arrays}

    def arrays(self, spec: Spec) -> dict[str, tuple[str, Layer]]:
        """Canonical name of every array of the spec -> its native name and its layer, in the order of the walk.

        Raises `CheckpointError` where two arrays had one name, or one has none.
        """
        names = self._named(spec)
        table: dict[str, tuple[str, Layer]] = {}
        taken: dict[str, str] = {}
        for layer in spec.layers:
            for name in layer.arrays:
                native = self.roles.array(names[layer.path], layer.kind, role_of(name, layer))
                if native in taken:
                    raise CheckpointError(f"{self.title} has one name, {native}, for {taken[native]} and {name}")
                taken[native] = name
                table[name] = native, layer
        return table

    def _named(self, spec: Spec) -> Mapping[str, str]:
        """`layers`, where every layer that holds arrays has a name."""
        names = self.layers(spec)
        if unnamed := next((layer.path for layer in spec.layers if layer.arrays and layer.path not in names), None):
            raise CheckpointError(f"{self.title} has no name for {unnamed}, a layer of this {self.family}")
        return names

    def tensors(self, spec: Spec, name: Callable[[str], np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
        """What a file of a spec's weights holds, in the order that its readers expect: native name -> a getter of the
        array in native layout, and the counters that loaders ask for. `name` gives a canonical array."""
        table, names = self.arrays(spec), self.layers(spec)
        getters: dict[str, Callable[[], np.ndarray]] = {}
        if self.constants is not None:
            for role, constant in self.constants.arrays(spec).items():
                getters[f"{self.constants.layer}/{role}"] = partial(np.copy, constant)
        layers = model_order(spec.layers, self.shortcut_first) if self.roles is communities.KERAS else spec.layers
        for layer in layers:
            for array in layer.arrays:
                getters[table[array][0]] = _converted(self, array, layer, name)
            if layer.arrays and layer.kind in self.roles.counters:
                getters[self.roles.counters[layer.kind].replace("{}", names[layer.path])] = _zero
        return getters

    def found(self, shapes: Mapping[str, Shape], spec: Spec | None = None) -> dict[str, "Found"]:
        """Canonical name -> what is known of the native array, of those among native arrays that are this naming's.

        `spec` is the network's, where that is known. Raises `CheckpointError` where two names are spellings of one.
        """
        forms = {native: list(self.roles.layers_of(native)) for native in shapes}
        layers = dict.fromkeys(layer for candidates in forms.values() for layer, _ in candidates)

        def shape_of(layer: str, kind: str, role: str) -> Shape | None:
            shape = shapes.get(self.roles.array(layer, kind, role))
            return None if shape is None else canonical_shape(shape, kind, role, self.roles.layout)

        if spec is not None:
            places: Mapping[str, Place] = self.places_in(spec)
        else:
            places = self.places(layers, shape_of) if self.places else _places_of_variants(self, layers)
        found: dict[str, Found] = {}
        for native, candidates in forms.items():
            for layer, form in candidates:
                place = places.get(layer)
                role = self.roles.role(place.kind, form) if place else None
                if place is None or role is None:
                    continue
                name = f"{place.path}.{role}"
                if name in found:
                    raise CheckpointError(
                        f"{native} and {found[name].native} are two spellings of one name; expected one of each"
                    )
                stored = self.stored_as(place.path)
                shape = canonical_shape(shapes[native], place.kind, role, self.roles.layout, stored)
                found[name] = Found(native=native, shape=shape)
        return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """A native array that has a canonical name; its canonical shape, None where it has another number of axes."""

    native: str
    shape: Shape | None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a module of this package holds: the namings of its family, in the order in which a file is tried.

    `fields` tells the fields of a spec from canonical shapes; by default they are those of the variant whose shapes
    these are, but for classes and input channels. `classes` is left out where there is no classifier. A field that no
    shape shows may be there too: it counts where no convention says it. Raises `CheckpointError`.
    """

    namings: tuple[Naming, ...]
    fields: Callable[[Mapping[str, Shape]], dict[str, Any]] | None = None


def of(family: str) -> Family:
    """The names of a family."""
    found: Family = import_module(f"{__name__}.{family}").FAMILY
    return found


@cache
def formats() -> tuple[str, ...]:
    """Every naming that any family has, by name, the canonical one first."""
    return tuple(
        dict.fromkeys((CANONICAL, *(naming.name for name in architectures.families() for naming in of(name).namings)))
    )


def find(family: str, name: str) -> Naming:
    """A family's naming. Raises `CheckpointError` naming those that there are."""
    namings = (canonical(family), *of(family).namings)
    for naming in namings:
        if name == naming.name or name in naming.aliases:
            return naming
    known = ", ".join(naming.name for naming in namings)
    raise CheckpointError(f"unknown format {name!r} of a {family}; expected one of {known}")


def canonical(family: str) -> Naming:
    """The canonical names, which any family has."""
    return Naming(
        family=family,
        name=CANONICAL,
        title="canonical",
        roles=communities.CANONICAL,
        layers=lambda spec: {layer.path: layer.path for layer in spec.layers},
        preprocessing="torchvision",
    )


def fields_of_variant(family: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of that named variant, with or without its classifier, whose arrays are most like these."""
    best: tuple[tuple[int, int], Spec] | None = None
    for variant in architectures.variants_of(family).values():
        for spec in (variant, variant.with_head(head="none")):
            expected = shapes_of(spec)
            free = {
                *differing(spec, spec.replace(in_channels=spec.in_channels + 1)),
                *differing(spec, spec.with_head(classes=spec.classes + 1)),
            }
            alike = sum(shapes.get(name) == shape for name, shape in expected.items() if name not in free)
            rank = -len(expected.keys() ^ shapes.keys()), alike
            if best is None or rank > best[0]:
                best = rank, spec
    assert best is not None
    spec = best[1]
    found = architectures.to_dict(spec)
    found["in_channels"] = _size(shapes, differing(spec, spec.replace(in_channels=spec.in_channels + 1)))
    classes = _size(shapes, differing(spec, spec.with_head(classes=spec.classes + 1)))
    del found["classes"], found["family"]
    return found | ({} if classes is None else {"classes": classes})


def differing(spec: Spec, other: Spec) -> dict[str, int]:
    """The arrays that both specs have in different shapes -> the first axis in which they differ."""
    here, there = shapes_of(spec), shapes_of(other)
    return {
        name: next(axis for axis in range(len(shape)) if shape[axis] != there[name][axis])
        for name, shape in here.items()
        if name in there and shape != there[name]
    }


def _size(shapes: Mapping[str, Shape], axes: Mapping[str, int]) -> int | None:
    """The length that the first of these arrays has along its axis; None where none is there."""
    return next((shapes[name][axis] for name, axis in axes.items() if name in shapes), None)


def _places_of_variants(naming: Naming, layers: Collection[str]) -> dict[str, Place]:
    """The places of layers in the variant that they are most like; none where no variant has half of its names there:
    single ones, as ``head.fc``, are in use everywhere."""
    best: dict[str, Place] = {}
    least: int | None = None
    for spec in architectures.variants_of(naming.family).values():
        table = naming.places_in(spec)
        apart = len(table.keys() ^ set(layers))
        if (least is None or apart < least) and 2 * len(table.keys() & set(layers)) >= len(table):
            best, least = table, apart
    return best


def _converted(naming: Naming, array: str, layer: Layer, name: Callable[[str], np.ndarray]) -> Callable[[], np.ndarray]:
    role, layout = role_of(array, layer), naming.roles.layout
    return lambda: to_native(name(array), layer, role, layout, naming.stored_as(layer.path))


def _zero() -> np.ndarray:
    return np.zeros((), np.int64)
