"""Which layer, array and parameter of one model is which of another.

By the user's table; by parameters of the same values, in whatever layout; by outputs of the same values; by equal
names; and what is left between those by an alignment along the order of execution, which may skip layers on either
side. A fault leaves the parameters and all that comes before it as they are, so that the rest finds its place.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import permutations
from math import prod
from re import findall
from typing import Any, Literal

import numpy as np

from common.diagnosis.arithmetic import activate
from common.diagnosis.identify import FUSED
from common.errors import ModelError, RecordError
from common.foreign.protocol import Held
from common.parity.levels import SAME_VALUES
from common.parity.names import ArrayName, Pass
from common.parity.record import Array, LayerCall, Record, Source, distance, finite, norm

Shape = tuple[int, ...]
# So many arrays behind a layer are looked at for what an activation makes of its output.
_BEHIND = 6
# So many values of an array are looked at before all of them.
_FEW = 512


@dataclass(frozen=True)
class Turn:
    """How an array of the other model, of this shape, becomes the reference's: by steps, each a transposition of axes,
    another shape, or another order of rows."""

    shape: Shape
    steps: tuple[tuple[Literal["axes", "shape", "rows"], Shape], ...] = ()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The array in the reference's layout."""
        for kind, value in self.steps:
            array = _step(array, kind, value)
        return array

    def back(self, array: np.ndarray) -> np.ndarray:
        """An array of the reference in the layout of the other model."""
        for (kind, value), shape in zip(reversed(self.steps), reversed(self._shapes[:-1]), strict=True):
            array = array.reshape(shape) if kind == "shape" else _step(array, kind, _inverse(value))
        return array

    @property
    def turned(self) -> Shape:
        """The shape in the reference."""
        return self._shapes[-1]

    @property
    def _shapes(self) -> list[Shape]:
        """Before the first step, and behind each."""
        shapes = [self.shape]
        for kind, value in self.steps:
            last = shapes[-1]
            shapes.append(value if kind == "shape" else last if kind == "rows" else tuple(last[i] for i in value))
        return shapes


def _step(array: np.ndarray, kind: str, value: Shape) -> np.ndarray:
    match kind:
        case "axes":
            return array.transpose(value)
        case "shape":
            return array.reshape(value)
        case _:
            return array[list(value)]


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What of another model is what of the reference: names of the reference, and those of the other."""

    calls: tuple[tuple[str, str], ...]  # in the reference's order of execution
    arrays: Mapping[str, tuple[str, Turn]]  # as `Source` names them: "tap/layer1.0.conv1"
    cotangents: Mapping[str, tuple[str, Turn]]  # by call, of outputs
    results: Mapping[str, tuple[str, Turn]]
    parameters: Mapping[str, tuple[str, Turn]]
    unmatched: tuple[tuple[str, ...], tuple[str, ...]]  # layers of the two that have no counterpart


def match(reference: Record, other: Record, table: Mapping[str, str] | None = None) -> Matching:
    """Match two records of models. `table` is the user's own, of layers or of parameters, by the reference's names.

    Raises `ModelError` for outputs that do not fit each other, and for names in the table that are not there.
    """
    a, b = _Model(reference), _Model(other)
    results = _results(a, b)
    by_user = _by_user(a, b, table or {})
    calls = _Pairs(by_user)
    parameters = _parameters_by_value(a, b, table or {})
    _by_parameters(a, b, calls, parameters)
    _by_values(a, b, calls)
    _by_names(a, b, calls)
    _by_order(a, b, calls)
    arrays: dict[str, tuple[str, Turn]] = {}
    cotangents: dict[str, tuple[str, Turn]] = {}
    for one, two in sorted(calls.items(), key=lambda pair: a.position[pair[0]]):
        _of_call(a.call[one], b.call[two], a, b, arrays, cotangents, parameters)
    _arrays_by_values(a, b, arrays)
    _parameters_by_name(a, b, parameters)
    found = set(calls.values())
    there = {name for name, _ in arrays.values()}
    return Matching(
        calls=tuple(sorted(calls.items(), key=lambda pair: a.position[pair[0]])),
        arrays=arrays,
        cotangents=cotangents,
        results=results,
        parameters=parameters,
        unmatched=(
            # A layer of the one may be plain code in the other: its output was found then.
            tuple(c.name for c in a.calls if c.leaf and c.name not in calls and not _outputs(c) & arrays.keys()),
            tuple(c.name for c in b.calls if c.leaf and c.name not in found and not _outputs(c) & there),
        ),
    )


def _outputs(call: LayerCall) -> set[str]:
    return {source.name for source in call.outputs}


def aligned(reference: Record, other: Record, matching: Matching) -> tuple[Record, Record]:
    """The two records with the names and layouts of the reference, and of each what the other has as well."""

    def counterpart(name: ArrayName) -> tuple[ArrayName, Turn] | None:
        table, place = matching.arrays, f"{name.kind}/{name.place}"
        match name.kind:
            case "result":
                table, place = matching.results, name.place
            case "cotangent":
                table, place = matching.cotangents, name.place
            case "loss":
                return name, Turn(())
            case "grad" if name.place.startswith("input "):
                table, place = matching.arrays, f"given/{name.place.removeprefix('input ')}"
            case "tap" | "into":
                pass
            case _:
                table, place = matching.parameters, name.place
        if place not in table:
            return None
        found, turn = table[place]
        kind, _, own = found.partition("/")
        if name.kind in ("tap", "into"):
            return ArrayName(name.run, kind, own), turn
        return ArrayName(name.run, name.kind, f"input {own}" if table is matching.arrays else found), turn

    getters: dict[ArrayName, Callable[[], np.ndarray]] = {}
    both: dict[ArrayName, ArrayName] = {}
    described: dict[str, Array] = {}
    for name in reference.arrays:
        found = counterpart(name)
        if found is None or found[0] not in other.arrays:
            continue
        own, turn = found
        if other.arrays[own].shape != turn.shape:
            continue  # of the other pass it may have another shape
        both[name] = own
        described[str(name)] = replace(reference.arrays[name], shape=turn.turned)
        getters[name] = partial(_turned, other, own, turn)
    first, second = reference.manifest, other.manifest
    arrays = tuple(array for array in first.arrays if array.name in described)
    restricted = replace(first, arrays=arrays)
    renamed = replace(
        second,
        arrays=tuple(described[array.name] for array in arrays),
        **{name: getattr(first, name) for name in ("subject", "weights", "inputs", "shape", "recipe", "batches")},
        response=_renamed(other.response, both),
        order_response=_renamed(other.order_response, both),
    )
    kept = {name: partial(reference.__getitem__, name) for name in both}
    return Record(reference.path, restricted, kept, True), Record(other.path, renamed, getters, True)


def _turned(record: Record, name: ArrayName, turn: Turn) -> np.ndarray:
    return turn(record[name])


def _renamed(changes: Mapping[ArrayName, float], both: Mapping[ArrayName, ArrayName]) -> dict[str, float]:
    return {str(name): changes[own] for name, own in both.items() if own in changes}


class _Pairs(dict[str, str]):
    """Calls of the reference and of the other, each once."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__()
        self.taken: set[str] = set()
        for one, two in pairs:
            self.add(one, two)

    def add(self, one: str, two: str) -> None:
        if one not in self and two not in self.taken:
            self[one] = two
            self.taken.add(two)


class _Model:
    """What of a record is matched: the calls and arrays of its first pass."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.layout = record.manifest.layout
        runs: list[Pass] = ["eval", "train"]
        self.run = next(run for run in runs if any(name.run == run for name in record.arrays))
        self.calls = [call for call in record.manifest.calls if call.run == self.run]
        self.call = {call.name: call for call in self.calls}
        self.position = {call.name: number for number, call in enumerate(self.calls)}
        self.layers: dict[str, list[LayerCall]] = defaultdict(list)
        for call in self.calls:
            self.layers[call.layer].append(call)
        self.weights = {name.place: name for name in record if name.kind == "weight"}
        self.held = {held["name"]: held_of(held) for call in self.calls for held in call.arrays.values()}
        self._facts: dict[str, tuple[float, float, float]] = {}

    @cached_property
    def order(self) -> dict[str, int]:
        """Every array that a layer takes or gives, in the order in which it comes about."""
        found: dict[str, int] = {}
        for name in self.record:
            if name.run == self.run and name.kind == "given":
                found.setdefault(f"given/{name.place}", len(found))
        for call in self.calls:
            for source in (*call.inputs, *call.outputs):
                found.setdefault(source.name, len(found))
        return found

    def behind(self, source: str) -> list[str]:
        """Arrays that came about next, and are as large."""
        names = list(self.order)
        size = self.array(source).size
        later = [name for name in names[self.order[source] + 1 :] if self.has(name)]
        return [name for name in later if self.array(name).size == size][:_BEHIND]

    def array(self, source: str) -> np.ndarray:
        kind, _, place = source.partition("/")
        return self.record[ArrayName(self.run, kind, place)]

    def has(self, source: str) -> bool:
        kind, _, place = source.partition("/")
        return ArrayName(self.run, kind, place) in self.record

    def weight(self, name: str) -> np.ndarray:
        return self.record[self.weights[name]]

    def facts(self, source: str) -> tuple[float, float, float]:
        """Norm, least and largest value: the same in any layout."""
        if source not in self._facts:
            array = self.array(source)
            ends = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
            self._facts[source] = (norm(array), *ends)
        return self._facts[source]


def held_of(data: Mapping[str, Any]) -> Held:
    """What `LayerCall.arrays` has as data."""
    axes, shape = (tuple(data[key]) if data.get(key) is not None else None for key in ("axes", "shape"))
    return Held(name=data["name"], axes=axes, shape=shape)


def turns(a: Shape, a_layout: str, b: Shape, b_layout: str) -> Iterator[Turn]:
    """Ways to read an array of shape `b` as one of shape `a`, the likeliest first."""
    if prod(a) != prod(b):
        return
    # Rows on one side: a map flattened as it lies there, or as the other model has it.
    if len(b) == 2 < len(a) and a[0] == b[0]:
        for layout in dict.fromkeys((b_layout, a_layout)):
            axes = _flattened(len(a), a_layout, layout)
            yield Turn(b, (("shape", tuple(a[axis] for axis in axes)), ("axes", _inverse(axes))))
    if len(a) == 2 < len(b) and a[0] == b[0]:
        for layout in dict.fromkeys((a_layout, b_layout)):
            axes = _flattened(len(b), b_layout, layout)
            yield Turn(b, (("axes", axes), ("shape", a)))
    for first in _readings(len(b), b_layout):
        for second in _readings(len(a), a_layout):
            theirs, ours = [b[axis] for axis in first], [a[axis] for axis in second]
            alike = [n for n in theirs if n != 1] == [n for n in ours if n != 1]
            # Pixels in a row or in a grid.
            if alike or (
                len(theirs) > 2 and len(ours) > 2 and (theirs[0], theirs[-1]) == (ours[0], ours[-1]) and theirs != ours
            ):
                yield Turn(b, (("axes", first), ("shape", tuple(ours)), ("axes", _inverse(second))))


def _inverse(axes: Shape) -> Shape:
    return tuple(int(axis) for axis in np.argsort(axes))


def _flattened(axes: int, layout: str, wanted: str) -> Shape:
    """The order of an array's axes in which it is flattened as one of the wanted layout."""
    if layout == wanted or axes < 3:
        return tuple(range(axes))
    return (0, *range(2, axes), 1) if layout == "channels_first" else (0, axes - 1, *range(1, axes - 1))


def _readings(axes: int, layout: str) -> list[Shape]:
    """The axes of an array as images, pixels, channels."""
    as_is, last = tuple(range(axes)), (0, *range(2, axes), 1)
    if axes < 3:
        return [as_is]
    swapped = (1, 0, *range(2, axes))  # positions first, then images
    if layout == "channels_first" and axes >= 4:
        return [last, as_is]
    return [as_is, last, swapped] if axes == 3 else [as_is, last]


def _best_turn(a: np.ndarray, b: np.ndarray, a_layout: str, b_layout: str) -> Turn | None:
    """The way by which the values agree, or else the likeliest."""
    found = list(dict.fromkeys(turns(a.shape, a_layout, b.shape, b_layout)))
    if len(found) > 1:
        for turn in found:
            if _same(a, turn(b)):
                return turn
    return found[0] if found else None


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    a, b = finite(a, b)
    return distance(a, b) <= SAME_VALUES * norm(a)


def _results(a: _Model, b: _Model) -> dict[str, tuple[str, Turn]]:
    ours, theirs = ([name for name in m.record.arrays if name.kind == "result"] for m in (a, b))
    ours, theirs = ([name for name in names if name.run == names[0].run] for names in (ours, theirs))
    words = [", ".join(name.place for name in names) for names in (ours, theirs)]
    titles = [m.record.manifest.variant for m in (a, b)]
    if len(ours) != len(theirs):
        raise ModelError(
            f"{titles[0]} returns {_counted(ours)} ({words[0]}) and {titles[1]} {len(theirs)} ({words[1]}); "
            "return the same from both, in one order or under the same names"
        )
    if {name.place for name in ours} == {name.place for name in theirs}:
        theirs = ours
    found = {}
    for one, two in zip(ours, theirs, strict=True):
        first, second = a.record[one], b.record[ArrayName(two.run, two.kind, two.place)]
        turn = _best_turn(first, second, a.layout, b.layout)
        if turn is None:
            raise ModelError(
                f"output {one.place} has shape {first.shape} in {titles[0]} and {second.shape} in {titles[1]}; "
                "no order of axes makes them one"
            )
        found[one.place] = two.place, turn
    return found


def _counted(names: Sequence[ArrayName]) -> str:
    return f"{len(names)} output{'s' if len(names) != 1 else ''}"


def _by_user(a: _Model, b: _Model, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for one, two in table.items():
        for name, model in ((one, a), (two, b)):
            if name not in model.layers and name not in model.call and name not in model.weights:
                title = model.record.manifest.variant
                raise ModelError(f"the table names {name!r}, which is no layer and no parameter of {title}")
        for first, second in zip(
            [a.call[one]] if one in a.call else a.layers.get(one, ()),
            [b.call[two]] if two in b.call else b.layers.get(two, ()),
            strict=False,
        ):
            yield first.name, second.name


def _parameters_by_value(a: _Model, b: _Model, table: Mapping[str, str]) -> dict[str, tuple[str, Turn]]:
    """Parameters of the same values in some order of axes. Of several alike, none: the layers decide which is which."""
    found: dict[str, tuple[str, Turn]] = {}
    for one, two in table.items():
        if one in a.weights and two in b.weights:
            _add_parameter(a, b, one, two, found)
    keys: list[dict[tuple[Any, ...], list[str]]] = [defaultdict(list), defaultdict(list)]
    for model, by_key in zip((a, b), keys, strict=True):
        for name in model.weights:
            array = model.weight(name)
            # Least and largest are the same in any layout; an array of one value says nothing of whose it is.
            if (
                array.size > 1
                and array.dtype.kind == "f"
                and (low := float(array.min())) != (high := float(array.max()))
            ):
                by_key[array.size, low, high].append(name)
    taken = {other for other, _ in found.values()}
    for key, ours in keys[0].items():
        theirs = keys[1].get(key, [])
        if len(ours) == len(theirs) == 1 and ours[0] not in found and theirs[0] not in taken:
            _add_parameter(a, b, ours[0], theirs[0], found)
    return found


def _add_parameter(a: _Model, b: _Model, one: str, two: str, found: dict[str, tuple[str, Turn]]) -> None:
    candidates = list(_parameter_turns(a.weight(one), b.weight(two), a.held.get(one), b.held.get(two)))
    if candidates:
        found[one] = two, _agreeing(a, one, b, two, candidates) or candidates[0]


def _agreeing(a: _Model, one: str, b: _Model, two: str, candidates: Iterable[Turn]) -> Turn | None:
    """The first by which two parameters have the same values."""
    mine, theirs = a.weight(one), b.weight(two)
    return next((turn for turn in candidates if _same(mine, turn(theirs))), None)


def _parameter_turns(a: np.ndarray, b: np.ndarray, a_held: Held | None, b_held: Held | None) -> Iterator[Turn]:
    """As the layers say, where both do; any order of axes; axes of heads taken together or apart."""
    if a_held is not None and b_held is not None and a_held.canonical(a).shape == b_held.canonical(b).shape:
        first, axes = (held.axes or tuple(range(x.ndim)) for held, x in ((b_held, b), (a_held, a)))
        between = tuple(a.shape[axis] for axis in axes)
        yield Turn(b.shape, (("axes", first), ("shape", between), ("axes", _inverse(axes))))
    if a.ndim == b.ndim:
        for axes in permutations(range(b.ndim)):
            if tuple(b.shape[axis] for axis in axes) == a.shape:
                yield Turn(b.shape, (("axes", axes),))
    # Of as many axes it would be another order of values, that of a fault.
    if a.size == b.size and (a.ndim != b.ndim or _lengths(a.shape) == _lengths(b.shape)):
        yield Turn(b.shape, (("shape", a.shape),))
        if len(a.shape) == 2:
            yield Turn(b.shape, (("shape", a.shape[::-1]), ("axes", (1, 0))))
        elif len(b.shape) == 2:
            yield Turn(b.shape, (("axes", (1, 0)), ("shape", a.shape)))


def _lengths(shape: Shape) -> list[int]:
    return [length for length in shape if length != 1]


def _rows(ours: Source, theirs: Source, a: _Model, b: _Model) -> Shape | None:
    """Of two rows that are maps flattened: where of the other's row each value of the reference's stands. None where
    they are no such rows."""
    if len(ours.shape) != 2 or len(theirs.shape) != 2 or not (a.has(ours.name) and b.has(theirs.name)):
        return None
    first, second = a.array(ours.name), b.array(theirs.name)
    turn = _best_turn(first, second, a.layout, b.layout) if max(first.ndim, second.ndim) > 2 else None
    if turn is None or first.shape[0] != second.shape[0] or first[0].size != ours.shape[1]:
        return None
    numbers = np.broadcast_to(np.arange(second[0].size).reshape(second.shape[1:]), second.shape)
    return tuple(int(row) for row in turn(numbers)[0].reshape(-1))


def _rows_turns(one: LayerCall, two: LayerCall, shape: Shape, a: _Model, b: _Model) -> Iterator[Turn]:
    """Of a dense layer below a map that is flattened: its kernel's rows, from the order of the other to that of the
    reference; in either of them the kernel may be transposed."""
    rows = _rows(one.inputs[0], two.inputs[0], a, b) if one.inputs and two.inputs and len(shape) == 2 else None
    for theirs in ((0, 1), (1, 0)) if rows is not None else ():
        if shape[theirs[0]] == len(rows or ()):
            for ours in ((0, 1), (1, 0)):
                yield Turn(shape, (("axes", theirs), ("rows", rows or ()), ("axes", ours)))


def _by_parameters(a: _Model, b: _Model, calls: _Pairs, parameters: dict[str, tuple[str, Turn]]) -> None:
    """Layers that hold the same values, most of them where they hold several; calls of one in their order.

    Arrays may have been loaded into the wrong layers: of layers that would be run in another order only those that give
    the same are one.
    """
    owner = {held["name"]: call.layer for call in reversed(b.calls) for held in call.arrays.values()}
    pairs: list[tuple[LayerCall, LayerCall]] = []
    for ours in a.layers.values():
        held = [parameters[h["name"]][0] for h in ours[0].arrays.values() if h["name"] in parameters]
        theirs = Counter(owner[name] for name in held if name in owner)
        for layer, count in theirs.most_common(1):
            # A model that is one layer holds what all layers of the reference do.
            if 2 * count >= len(b.layers[layer][0].arrays):
                pairs += zip(ours, b.layers[layer], strict=False)
    straight = set(_increasing([(a.position[one.name], b.position[two.name]) for one, two in pairs]))
    for one, two in pairs:
        if (a.position[one.name], b.position[two.name]) in straight or _give_the_same(a, one, b, two):
            calls.add(one.name, two.name)


def _give_the_same(a: _Model, one: LayerCall, b: _Model, two: LayerCall) -> bool:
    return bool(one.outputs and two.outputs) and _alike(a, one.outputs[0].name, b, two.outputs[0].name)


def _by_values(a: _Model, b: _Model, calls: _Pairs) -> None:
    """Layers whose outputs are the same."""
    free: dict[int, list[LayerCall]] = defaultdict(list)
    for call in b.calls:
        if call.name not in calls.taken and call.outputs and call.outputs[0].name == f"tap/{call.name}":
            free[prod(call.outputs[0].shape)].append(call)
    for call in a.calls:
        if call.name in calls or not call.outputs or call.outputs[0].name != f"tap/{call.name}":
            continue
        for other in free.get(prod(call.outputs[0].shape), ()):
            if (
                other.name not in calls.taken
                and other.leaf == call.leaf
                and _group(other) == _group(call)
                and _alike(a, call.outputs[0].name, b, other.outputs[0].name)
            ):
                calls.add(call.name, other.name)
                break


def _alike(a: _Model, one: str, b: _Model, two: str) -> bool:
    """Whether two arrays hold the same values, in layouts that fit."""
    if not (a.has(one) and b.has(two)):
        return False
    size = a.facts(one)[0]
    if not size or any(abs(x - y) > SAME_VALUES * size for x, y in zip(a.facts(one), b.facts(two), strict=True)):
        return False
    first, second = a.array(one), b.array(two)
    return any(_same(first, turn(second)) for turn in turns(first.shape, a.layout, second.shape, b.layout))


def _words(name: str) -> tuple[str, ...]:
    """A name without what frameworks write between its parts."""
    return tuple(findall(r"[a-z]+|\d+", name.lower().replace("_", " ")))


def _by_names(a: _Model, b: _Model, calls: _Pairs) -> None:
    theirs: dict[tuple[tuple[str, ...], bool], list[str]] = defaultdict(list)
    for call in b.calls:
        if call.name not in calls.taken:
            theirs[_words(call.name), call.leaf].append(call.name)
    for call in a.calls:
        found = theirs.get((_words(call.name), call.leaf), [])
        if call.name not in calls and len(found) == 1:
            calls.add(call.name, found[0])


_GROUPS = {
    **dict.fromkeys(("BatchNorm", "LayerNorm", "GroupNorm"), "norm"),
    **dict.fromkeys(("Pool", "GlobalPool"), "pool"),
}


def _group(call: LayerCall) -> str:
    """What layers may be told to be one another: those of one kind of operation."""
    if call.operation is None:
        return ""
    name = str(call.operation["operation"])
    return _GROUPS.get(name, name)


def _by_order(a: _Model, b: _Model, calls: _Pairs) -> None:
    """Align what is left between what is found already, along the order of execution."""
    anchors = _increasing([(a.position[one], b.position[two]) for one, two in calls.items()])
    ends = [*anchors, (len(a.calls), len(b.calls))]
    start = (-1, -1)
    for end in ends:
        ours = [c for c in a.calls[start[0] + 1 : end[0]] if c.name not in calls and c.outputs]
        theirs = [c for c in b.calls[start[1] + 1 : end[1]] if c.name not in calls.taken and c.outputs]
        for leaf in (True, False):
            for one, two in _align(a, b, [c for c in ours if c.leaf == leaf], [c for c in theirs if c.leaf == leaf]):
                calls.add(one.name, two.name)
        start = end


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest sequence of pairs in which both go up."""
    ordered = sorted(pairs)
    best: list[tuple[int, int]] = []  # for every pair the length up to it, and the one before it
    for i, (_, second) in enumerate(ordered):
        before = [(best[j][0], j) for j in range(i) if ordered[j][1] < second]
        length, last = max(before, default=(0, -1))
        best.append((length + 1, last))
    found: list[tuple[int, int]] = []
    at = max(range(len(best)), key=lambda i: best[i][0], default=-1)
    while at >= 0:
        found.append(ordered[at])
        at = best[at][1]
    return found[::-1]


def _align(
    a: _Model, b: _Model, ours: Sequence[LayerCall], theirs: Sequence[LayerCall]
) -> Iterator[tuple[LayerCall, LayerCall]]:
    """The alignment of the highest score (Needleman and Wunsch 1970), in which any layer may stay alone."""
    if not ours or not theirs:
        return
    scores = np.array([[_score(a, one, b, two) for two in theirs] for one in ours])
    best = np.zeros((len(ours) + 1, len(theirs) + 1))
    for i in range(len(ours)):
        for j in range(len(theirs)):
            best[i + 1, j + 1] = max(best[i, j] + scores[i, j], best[i, j + 1], best[i + 1, j])
    found = []
    i, j = len(ours), len(theirs)
    while i and j:
        if scores[i - 1, j - 1] > 0 and best[i, j] == best[i - 1, j - 1] + scores[i - 1, j - 1]:
            i, j = i - 1, j - 1
            found.append((ours[i], theirs[j]))
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            j -= 1
    yield from reversed(found)


def _score(a: _Model, one: LayerCall, b: _Model, two: LayerCall) -> float:
    """How much speaks for two layers being one; below zero where it cannot be."""
    ours, theirs = one.outputs[0], two.outputs[0]
    groups = _group(one), _group(two)
    known = all(groups)
    if known and groups[0] != groups[1]:
        return -1.0
    found = list(turns(ours.shape, a.layout, theirs.shape, b.layout))
    held = sorted(a.weight(h["name"]).size for h in one.arrays.values() if h["name"] in a.weights)
    others = sorted(b.weight(h["name"]).size for h in two.arrays.values() if h["name"] in b.weights)
    if not found:
        # A stride or padding at fault gives other shapes; the arrays must fit then.
        return 1.0 if known and held and held[:1] == others[:1] and held[-1] == others[-1] else -1.0
    score = 1.0 + 2.0 * known + (held == others) * (1.0 + bool(held))
    if bool(held) != bool(others):
        if not known:
            return -1.0
        score -= 1.5
    words = set(_words(one.name)), set(_words(two.name))
    score += len(words[0] & words[1]) / max(1, len(words[0] | words[1]))
    if a.has(ours.name) and b.has(theirs.name):
        # An array that another has again may be there in that one's shape.
        first, second = a.array(ours.name), b.array(theirs.name)
        turn = next(turns(first.shape, a.layout, second.shape, b.layout), None)
        sizes = norm(first) * norm(second)
        if turn is not None and sizes and np.isfinite(sizes):
            score += 2.0 * abs(float(np.vdot(first.reshape(-1), turn(second).reshape(-1)))) / sizes
    return score


def _of_call(
    one: LayerCall,
    two: LayerCall,
    a: _Model,
    b: _Model,
    arrays: dict[str, tuple[str, Turn]],
    cotangents: dict[str, tuple[str, Turn]],
    parameters: dict[str, tuple[str, Turn]],
) -> None:
    """Arrays of two calls that are one: what they take, what they give, what they hold."""
    taken = {name for name, _ in arrays.values()}
    outputs = [
        (number, *pair)
        for number, pair in enumerate(zip(one.outputs, two.outputs, strict=False))
        if not (one.leaf and one.arrays and _fused(a, pair[0], b, pair[1]))
    ]
    inputs = zip(one.inputs, two.inputs, strict=True) if len(one.inputs) == len(two.inputs) else ()
    for ours, theirs in (*inputs, *((mine, yours) for _, mine, yours in outputs)):
        if ours.name not in arrays and theirs.name not in taken and (turn := _source_turn(a, ours, b, theirs)):
            arrays[ours.name] = theirs.name, turn
            taken.add(theirs.name)
    for number, ours, theirs in outputs:
        turn = next(turns(ours.shape, a.layout, theirs.shape, b.layout), None)
        if (rows := _rows(ours, theirs, a, b)) is not None:
            turn = Turn(theirs.shape, (("axes", (1, 0)), ("rows", rows), ("axes", (1, 0))))
        if turn is not None:
            end = f"[{number}]" if number else ""
            cotangents[one.name + end] = two.name + end, turn
    for role, held in one.arrays.items():
        mine, yours = held["name"], two.arrays.get(role, {}).get("name")
        # What the layer holds in this role is its own, whatever else has the same values.
        if mine in a.weights and yours in b.weights and parameters.get(mine, ("",))[0] != yours:
            for name in [name for name, (other, _) in parameters.items() if other == yours]:
                del parameters[name]
            _add_parameter(a, b, mine, yours, parameters)
        theirs_name, as_it_is = parameters.get(mine, ("", Turn(())))
        if theirs_name in {other["name"] for other in two.arrays.values()}:
            shape = b.weight(theirs_name).shape
            if not _agreeing(a, mine, b, theirs_name, [as_it_is]) and (
                rows_turn := _agreeing(a, mine, b, theirs_name, _rows_turns(one, two, shape, a, b))
            ):
                parameters[mine] = theirs_name, rows_turn


def _fused(a: _Model, ours: Source, b: _Model, theirs: Source) -> bool:
    """Whether the one layer's output is what the other model has behind its layer: one of them has an activation in
    it that the other has beside it."""
    if not (a.has(ours.name) and b.has(theirs.name)) or _alike(a, ours.name, b, theirs.name):
        return False
    if any(_alike(a, name, b, theirs.name) for name in a.behind(ours.name)):
        return True
    if any(_alike(a, ours.name, b, name) for name in b.behind(theirs.name)):
        return True
    first, second = a.array(ours.name), b.array(theirs.name)
    for turn in turns(first.shape, a.layout, second.shape, b.layout):
        mine, yours = first.astype(np.float64), turn(second).astype(np.float64)
        few = [array.reshape(-1)[:: max(1, array.size // _FEW)] for array in (mine, yours)]
        for name in FUSED:
            for whole, part in (((mine, yours), few), ((yours, mine), few[::-1])):
                # Of the whole no more may be left than that, so of a part neither.
                limit = 2 * SAME_VALUES * norm(whole[1])
                if distance(activate(name, part[0]), part[1]) <= limit and _same(activate(name, whole[0]), whole[1]):
                    return True
    return False


def _source_turn(a: _Model, ours: Source, b: _Model, theirs: Source) -> Turn | None:
    """How the arrays that two inputs or outputs come from belong to each other."""
    if not (a.has(ours.name) and b.has(theirs.name)):
        return None
    return _best_turn(a.array(ours.name), b.array(theirs.name), a.layout, b.layout)


def _arrays_by_values(a: _Model, b: _Model, arrays: dict[str, tuple[str, Turn]]) -> None:
    """What plain code made in the one and a layer in the other."""
    taken = {name for name, _ in arrays.values()}
    free: dict[int, list[str]] = defaultdict(list)
    for name in b.order:
        if name not in taken and b.has(name):
            free[b.array(name).size].append(name)
    for name in a.order:
        if name in arrays or not a.has(name):
            continue
        for other in free.get(a.array(name).size, ()):
            if other not in taken and _alike(a, name, b, other):
                turn = _best_turn(a.array(name), b.array(other), a.layout, b.layout)
                if turn is not None:
                    arrays[name] = other, turn
                    taken.add(other)
                break


def _parameters_by_name(a: _Model, b: _Model, parameters: dict[str, tuple[str, Turn]]) -> None:
    taken = {name for name, _ in parameters.values()}
    theirs: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in b.weights:
        if name not in taken:
            theirs[_words(name)].append(name)
    for name in a.weights:
        found = theirs.get(_words(name), [])
        if name not in parameters and len(found) == 1:
            _add_parameter(a, b, name, found[0], parameters)


def in_one_view(records: Sequence[Record], tables: Sequence[Mapping[str, str] | None] | None = None) -> list[Record]:
    """Records of models with the names and layouts of the first that carries a response, which comes first.

    Raises `RecordError` for records of other inputs, `ModelError` as `match`.
    """
    reference = next((record for record in records if record.response), records[0])
    others = [record for record in records if record is not reference]
    for other in others:
        _check_inputs(reference, other)
    matchings = [match(reference, other, tables[i] if tables else None) for i, other in enumerate(others)]
    views = [aligned(reference, other, found)[1] for other, found in zip(others, matchings, strict=True)]
    return [reference.restricted({name for view in views for name in view.arrays}), *views]


def _check_inputs(a: Record, b: Record) -> None:
    """Both were called with the same arrays, in whatever layout."""
    given = [{name.place: name for name in record if name.kind == "given"} for record in (a, b)]
    for record in (a, b):
        if not record.manifest.layout:
            raise RecordError(
                f"{record.path} is no record of a user's model, and the other one is; compare like with like"
            )
    for place, name in given[0].items():
        ours = a[name]
        theirs = b[given[1][place]] if place in given[1] else None
        layouts = a.manifest.layout, b.manifest.layout
        if theirs is None or not any(
            np.array_equal(ours, turn(theirs)) for turn in turns(ours.shape, layouts[0], theirs.shape, layouts[1])
        ):
            raise RecordError(f"{a.path} and {b.path} are records of different inputs: {place} is not the same")
