"""Where two models begin to differ: every layer alone, on the reference's own input (level L3 of docs/numerics.md).

One pass of the other model does it for all layers at once: each is given the reference's inputs in the place of its
own, and what follows it the reference's outputs. So what a layer makes of the reference's input is its *added* error,
what plain code makes of the reference's outputs is that code's, and neither is hidden by what went wrong before. On the
way back the same is done with what comes back to every output. What the layer's output is off by in its own network
is the *inherited* error.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Literal

import numpy as np

from common.diagnosis.arithmetic import activate
from common.errors import ModelError
from common.foreign.protocol import Forced, Trace
from common.parity.hosts import Ask, Host
from common.parity.levels import FLOOR, ORDER_LIMIT, RESPONSE_FACTOR, SAME_VALUES, UNIT, rho
from common.parity.matching import Matching, Turn, turns
from common.parity.names import ArrayName, Pass
from common.parity.record import LayerCall, Record, Source, distance, finite, norm

# So many arrays behind a layer are looked at for what an activation makes of its output.
_BEHIND = 6
# So many layers that differ are tried alone, whether what follows makes up for it.
_LOOSE = 8
# Activations that layers have in them.
_COMMON = ("relu", "silu", "gelu", "gelu_tanh", "relu6", "tanh", "sigmoid")

Part = Literal["input", "layer", "result", "statistic", "gradient", "cotangent"]


@dataclass(frozen=True, kw_only=True)
class Added:
    """The error that one layer, or the code before it, adds to the reference's own values."""

    run: Pass
    part: Part
    place: str  # the layer by the reference's name; of a parameter, its name there; of a result, its path
    yours: str  # the same by the other's name
    number: int = 0  # of the input or output
    added: float  # ‖yours on the reference's values - reference‖ / ‖reference‖
    inherited: float | None  # the same within its own network; None where it was not compared
    limit: float  # what rounding may make of it, relative as well

    @property
    def fails(self) -> bool:
        return not self.added <= self.limit

    @property
    def backward(self) -> bool:
        """Whether it is found on the way back from the loss."""
        return self.part in ("gradient", "cotangent")


@dataclass(frozen=True, kw_only=True)
class Localised:
    """Every matched layer of a pair of models, in order of execution, and what the passes gave."""

    pair: tuple[str, str]
    added: tuple[Added, ...]
    traces: Mapping[Pass, Trace] = field(default_factory=dict, repr=False)
    # The same, where layers that differ gave what they give by themselves.
    free: Mapping[Pass, Trace] = field(default_factory=dict, repr=False)
    # Layers of the other model that give other values by design: see `_passed`.
    fused: Mapping[Pass, frozenset[str]] = field(default_factory=dict)
    # Of layers of the other model that differ: what the reference has in the place of their output, which is another
    # than the output of its layer, since the other's has an activation as well.
    activated: Mapping[Pass, Mapping[str, np.ndarray]] = field(default_factory=dict, repr=False)
    measured: bool = True  # by running the layers; else told from records

    @property
    def failing(self) -> tuple[Added, ...]:
        """What adds more than rounding, each once: what fails in eval mode is not told again of training."""
        found: dict[tuple[Part, str, int], Added] = {}
        for one in self.added:
            if one.fails:
                found.setdefault((one.part, one.place, one.number), one)
        return tuple(found.values())

    @property
    def first(self) -> Added | None:
        """The first on the way forward."""
        return next((one for one in self.failing if not one.backward), None)

    @property
    def first_backward(self) -> Added | None:
        """The first on the way back."""
        return next((one for one in self.failing if one.backward), None)


class Reference:
    """The arrays of a record by what calls take and give."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.calls: dict[tuple[Pass, str], LayerCall] = {(c.run, c.name): c for c in record.manifest.calls}

    def behind(self, run: Pass, name: str, source: Source) -> Iterator[np.ndarray]:
        """What came about next after a call, and is as large as that output."""
        calls = [call for (of, _), call in self.calls.items() if of == run]
        at = next(i for i, call in enumerate(calls) if call.name == name)
        known = {source.name}
        for call in calls[at + 1 :]:
            for other in (*call.inputs, *call.outputs):
                if other.name not in known and prod(other.shape) == prod(source.shape) and len(known) <= _BEHIND:
                    known.add(other.name)
                    array = self.source(run, other)
                    if array is not None and array.dtype.kind == "f":
                        yield array

    def unpadded(self, run: Pass, source: Source, matched: Container[str]) -> Source | None:
        """What a layer without a counterpart pads to make that."""
        kind, _, place = source.name.partition("/")
        call = self.calls.get((run, place)) if kind == "tap" else None
        if call is None or place in matched or not call.operation or call.operation["operation"] != "Pad":
            return None
        return call.inputs[0]

    def whole(self, run: Pass, name: str) -> np.ndarray | None:
        """What a source holds, in the shape in which it came about."""
        kind, _, place = name.partition("/")
        found = ArrayName(run, kind, place)
        if found not in self.record and kind == "given":
            found = next((one for one in self.record if (one.kind, one.place) == (kind, place)), found)
        return self.record.get(found)

    def source(self, run: Pass, source: Source) -> np.ndarray | None:
        """What an input or output holds, in its own shape; None where the record has not got it."""
        kind, _, place = source.name.partition("/")
        both: list[Pass] = [run, "eval", "train"]
        for one in both:
            name = ArrayName(one, kind, place)
            if name in self.record:
                array = self.record[name]
                if source.moved:
                    ends = (-1, 1) if np.moveaxis(array, -1, 1).shape == source.shape else (1, -1)
                    array = np.moveaxis(array, *ends)
                return array.reshape(source.shape)
            if kind != "given":
                return None
        return None


def localise(
    reference: Record, host: Host, other: Record, matching: Matching, views: tuple[Record, Record], ask: Ask
) -> Localised:
    """Run the model of `host`, whose record is `other`, on the reference's values. `views` are both records by the
    reference's names. Raises `ModelError`."""
    ours, theirs = Reference(reference), Reference(other)
    limits = _Limits(views)
    found: list[Added] = []
    traces: dict[Pass, Trace] = {}
    free: dict[Pass, Trace] = {}
    by_design: dict[Pass, frozenset[str]] = {}
    behind_it: dict[Pass, dict[str, np.ndarray]] = {}
    runs: list[Pass] = ["eval", "train"]
    for run in runs:
        if not any(name.run == run for name in reference.arrays):
            continue
        pairs = [
            (ours.calls[run, one], theirs.calls[run, two])
            for one, two in matching.calls
            if (run, one) in ours.calls and (run, two) in theirs.calls
        ]
        forced = {
            two.name: _forced(run, one, two, ours, theirs, matching, "grad" in ask.modes)
            for one, two in pairs
            if two.leaf
        }
        padded = _padded(run, pairs, forced, ours, theirs, matching)
        rows, trace, fused = _passed(
            run, pairs, forced, host, ask, (ours, theirs, matching, limits), free, padded, behind_it.setdefault(run, {})
        )
        by_design[run] = frozenset(fused)
        pairs = [pair for pair in pairs if pair[1].name not in fused]
        traces[run] = trace
        found += [one for one in rows if one.part != "layer" or one.yours not in fused]
        if "grad" in ask.modes:
            found += _backward(run, pairs, trace, ours, matching, limits)
    return Localised(
        pair=(str(reference.path), str(other.path)),
        added=tuple(found),
        traces=traces,
        free=free,
        fused=by_design,
        activated=behind_it,
    )


def _passed(
    run: Pass,
    pairs: Sequence[tuple[LayerCall, LayerCall]],
    forced: dict[str, Forced],
    host: Host,
    ask: Ask,
    known: "tuple[Reference, Reference, Matching, _Limits]",
    free: dict[Pass, Trace],
    padded: Mapping[str, LayerCall],
    activated: dict[str, np.ndarray],
) -> tuple[list[Added], Trace, set[str]]:
    """What differs on the way forward, the pass that shows it, and the layers that give other values in the two models
    by design, since one has an activation in the layer that the other has behind it."""
    ours, theirs, matching, limits = known

    def passed(forced: dict[str, Forced]) -> tuple[Trace, list[Added]]:
        try:
            trace = host.forced(ask, run == "train", forced)
        except ModelError:
            # Plain code does not take the reference's arrays where yours are of another shape: up to there, then.
            fitting = {name: one for name, one in forced.items() if _fits(run, name, one, theirs)}
            trace = host.forced(ask, run == "train", fitting)
            rows = _forward(run, pairs, forced, trace, ours, theirs, matching, limits, padded)
            first = next((i for i, one in enumerate(rows) if one.added == np.inf), len(rows))
            return trace, rows[: first + 1]
        return trace, _forward(run, pairs, forced, trace, ours, theirs, matching, limits, padded)

    def failures(rows: Sequence[Added], but: str = "") -> dict[tuple[str, str, int], float]:
        failing = [one for one in rows if one.part != "statistic" and one.fails]
        found = {(one.part, one.yours, one.number): one.added for one in failing}
        return {row: added for row, added in found.items() if row[:2] != ("layer", but)}

    def no_worse(left: Sequence[Added], rows: Sequence[Added], name: str) -> bool:
        """Whether the same fails but for that layer, by as much; or less."""
        after, before = failures(left, name), failures(rows, name)
        if after.keys() != before.keys():
            return after.keys() < before.keys()
        return all(np.isclose(after[row], before[row], rtol=SAME_VALUES) for row in after)

    trace, rows = passed(forced)
    # Those that were seen to be by the matching.
    holding = [(one, two) for one, two in pairs if one.leaf and one.arrays and _alike(one, two)]
    fused = {two.name for one, two in holding if one.name not in matching.cotangents}
    failing = {name for part, name, _ in failures(rows) if part == "layer"} - fused
    if not failing:
        return rows, trace, fused
    # What those that differ give, goes on as it is: it may be the reference's again behind an activation.
    loose = {name: replace(one, outputs=(), cotangents=()) for name, one in forced.items() if name in failing}
    free[run], freely = passed(forced | loose)
    found = _fused(run, holding, failing, free[run], ours, theirs)
    for name, output in found.items():
        forced = forced | {name: replace(forced[name], outputs=(output,), cotangents=())}
        fused.add(name)
    if found:
        trace, rows = passed(forced)
    # Or only behind an addition: then what follows is wrong with the reference's output, and right with its own.
    tried = [(one, two) for one, two in holding if two.name in failing - fused and two.name in loose][:_LOOSE]
    # Each try is a pass: none where nothing that follows is wrong with the reference's output.
    followed = any(
        part != "layer" or any(array is None for array in forced.get(name, Forced()).inputs)
        for part, name, _ in failures(rows)
    )
    spoiling = set() if followed else _spoiling(free[run], failing, failures(freely).keys() - failures(rows).keys())
    for one, two in tried:
        name = two.name
        if name in spoiling:
            continue
        other, left = passed(forced | {name: loose[name]})
        if no_worse(left, rows, name):
            forced = forced | {name: loose[name]}
            fused.add(name)
            trace, rows = other, left
            continue
        if not followed:
            continue
        # What it gives wrongly may still be what the reference has behind an activation: so that what follows is right.
        for array in _perhaps_behind(run, one, ours):
            turn = matching.cotangents.get(one.name, ("", None))[1]
            if turn is None or turn.turned != array.shape:
                continue
            instead = replace(loose[name], outputs=(np.ascontiguousarray(turn.back(array)),))
            other, left = passed(forced | {name: instead})
            if failures(left, name).keys() < failures(rows, name).keys():
                forced = forced | {name: instead}
                activated[name] = array
                trace, rows = other, left
                break
    return rows, trace, fused


def _spoiling(trace: Trace, failing: Container[str], rows: Iterable[tuple[str, str, int]]) -> set[str]:
    """Of layers that differ, those next before what is wrong with what they give by themselves, and right without."""
    position = {call.name: number for number, call in enumerate(trace.calls)}
    before = [(number, name) for name, number in position.items() if name in failing]
    found = (
        max((one for one in before if one[0] < position.get(name, len(position))), default=None) for _, name, _ in rows
    )
    return {one[1] for one in found if one is not None}


def _padded(
    run: Pass,
    pairs: Sequence[tuple[LayerCall, LayerCall]],
    forced: dict[str, Forced],
    ours: Reference,
    theirs: Reference,
    matching: Matching,
) -> dict[str, LayerCall]:
    """Where one model has a layer that pads before another, and the other pads in that one: there the reference's map
    without its border is `forced`. Returns layers of the other that pad, and the layer of the reference each is for."""
    found: dict[str, LayerCall] = {}
    matched = [{pair[which] for pair in matching.calls} for which in (0, 1)]
    for one, two in pairs:
        given = forced.get(two.name)
        if given is None or len(given.inputs) != 1 or given.inputs[0] is not None or len(one.inputs) != 1:
            continue
        mine, own = one.inputs[0], two.inputs[0]
        bare = ours.unpadded(run, mine, matched[0])
        if bare is not None and (value := _input(run, bare, own, set(), ours, theirs, matching)) is not None:
            forced[two.name] = replace(given, inputs=(value,))
            continue
        bare = theirs.unpadded(run, own, matched[1])
        if bare is not None and (value := _input(run, mine, bare, set(), ours, theirs, matching)) is not None:
            name = own.name.partition("/")[2]
            forced[name] = Forced(inputs=(value,))
            found[name] = one
            continue
        value = _of_another_shape(ours.source(run, mine), own, ours, theirs)
        if value is not None and bare is None and ours.unpadded(run, mine, matched[0]) is None:
            forced[two.name] = replace(given, inputs=(value,))
    return found


def _perhaps_behind(run: Pass, call: LayerCall, ours: Reference) -> Iterator[np.ndarray]:
    """What the reference may have behind a layer: what it has there next, or an activation of its output."""
    yield from ours.behind(run, call.name, call.outputs[0])
    output = ours.source(run, call.outputs[0])
    for name in _COMMON if output is not None and output.dtype.kind == "f" else ():
        if output is not None:
            yield activate(name, output.astype(np.float64)).astype(output.dtype)


def _alike(one: LayerCall, two: LayerCall) -> bool:
    """Whether both have one output, as large."""
    return len(one.outputs) == len(two.outputs) == 1 and prod(one.outputs[0].shape) == prod(two.outputs[0].shape)


def _fits(run: Pass, name: str, forced: Forced, theirs: Reference) -> bool:
    """Whether all that is forced upon a call has the shapes that it has by itself."""
    call = theirs.calls[run, name]
    pairs = (*zip(forced.inputs, call.inputs, strict=False), *zip(forced.outputs, call.outputs, strict=False))
    return all(array is None or array.shape == source.shape for array, source in pairs)


def _fused(
    run: Pass,
    pairs: Sequence[tuple[LayerCall, LayerCall]],
    failing: set[str],
    trace: Trace,
    ours: Reference,
    theirs: Reference,
) -> dict[str, np.ndarray | None]:
    """Of layers whose output differs, those where one model has an activation in the layer that the other has behind
    it: what the other's is to give, None for what it gives by itself."""
    layouts = ours.record.manifest.layout, theirs.record.manifest.layout
    found: dict[str, np.ndarray | None] = {}
    matched = {two.name for _, two in pairs if two.leaf}
    for one, two in pairs:
        made = trace.outputs.get(two.name, ())
        if two.name not in failing or len(made) != 1 or len(one.outputs) != 1:
            continue
        expected = ours.source(run, one.outputs[0])
        for array in ours.behind(run, one.name, one.outputs[0]):
            for turn in turns(array.shape, layouts[0], made[0].shape, layouts[1]):
                if _agree(array, turn(made[0])):
                    found.setdefault(two.name, np.ascontiguousarray(turn.back(array)))
        for array in behind(trace, two.name, matched) if two.name not in found else ():
            for turn in turns(expected.shape, layouts[0], array.shape, layouts[1]) if expected is not None else ():
                if expected is not None and _agree(expected, turn(array)):
                    found.setdefault(two.name, None)
    return found


def behind(trace: Trace, name: str, forced: Container[str]) -> Iterator[np.ndarray]:
    """What a pass made of a call's output next: arrays as large that are others, in order; up to a call that was
    `forced`."""
    at = next(i for i, call in enumerate(trace.calls) if call.name == name)
    own = trace.outputs[name][0]
    kept = [own]
    for call in trace.calls[at + 1 :]:
        # What another layer is given or gives is the reference's again.
        last = call.name in forced
        for array in (*trace.inputs.get(call.name, ()), *(() if last else trace.outputs.get(call.name, ()))):
            if array.size == own.size and array.dtype == own.dtype and len(kept) <= _BEHIND:
                flat = array.reshape(-1)
                if not any(np.array_equal(flat, other.reshape(-1)) for other in kept):
                    kept.append(array)
                    yield array
        if last:
            return


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and distance(a, b) <= SAME_VALUES * norm(a)


def localise_records(reference: Record, other: Record, matching: Matching, views: tuple[Record, Record]) -> Localised:
    """The same from records alone: in each pass up to the first place that differs, where what comes in is the same in
    both. What lies behind it has inherited the difference, and cannot be told from its own."""
    ours, theirs = Reference(reference), Reference(other)
    limits = _Limits(views)
    found: list[Added] = []
    traces: dict[Pass, Trace] = {}
    runs: list[Pass] = ["eval", "train"]
    for run in runs:
        if not any(name.run == run for name in other.arrays):
            continue
        pairs = [
            (ours.calls[run, one], theirs.calls[run, two])
            for one, two in matching.calls
            if (run, one) in ours.calls and (run, two) in theirs.calls
        ]
        traces[run] = _as_trace(run, theirs)
        # What it would have been given; it was given its own.
        given = {two.name: _forced(run, one, two, ours, theirs, matching, False) for one, two in pairs if two.leaf}
        places = _forward(run, pairs, given, traces[run], ours, theirs, matching, limits)
        first = next((i for i, one in enumerate(places) if one.fails), None)
        found += places if first is None else places[: first + 1]
        if first is None and any(name.mode == "grad" for name in other.arrays):
            back = _backward(run, pairs, traces[run], ours, matching, limits)
            first = next((i for i, one in enumerate(back) if one.fails), None)
            found += back if first is None else back[: first + 1]
    return Localised(pair=(str(reference.path), str(other.path)), added=tuple(found), traces=traces, measured=False)


def _as_trace(run: Pass, record: Reference) -> Trace:
    """A pass as its record has it."""
    trace = Trace()
    for (of, name), call in record.calls.items():
        if of == run:
            for sources, table in ((call.inputs, trace.inputs), (call.outputs, trace.outputs)):
                arrays = [record.source(run, source) for source in sources]
                table[name] = tuple(array for array in arrays if array is not None)
            places = (f"{name}[{i}]" if i else name for i in range(len(call.outputs)))
            trace.cotangents[name] = tuple(record.record.get(ArrayName(run, "cotangent", place)) for place in places)
    kept = {"result": trace.results, "stat": trace.statistics, "grad": trace.gradients}
    for array in record.record:
        if array.run == run and array.kind in kept:
            place = "" if (array.kind, array.place) == ("result", "output") else array.place
            kept[array.kind][place] = record.record[array]
    return trace


class _Limits:
    """What rounding may make of an array, and by how much the two differ in it within their networks."""

    def __init__(self, views: tuple[Record, Record]) -> None:
        self._ours, self._theirs = views

    def of(self, name: ArrayName, expected: np.ndarray) -> float:
        """As the gate has it: ‖yours - reference‖ may be so large."""
        least = FLOOR * UNIT[str(expected.dtype)] * norm(expected)
        orders = [view.order_response.get(name, 0.0) for view in (self._ours, self._theirs)]
        believed = [order if order <= ORDER_LIMIT * least else 0.0 for order in orders]
        return RESPONSE_FACTOR * rho(max(self._ours.response.get(name, 0.0), least), *believed)

    def inherited(self, name: ArrayName) -> float | None:
        if name not in self._ours or name not in self._theirs:
            return None
        a, b = self._ours[name], self._theirs[name]
        return distance(a, b) / (norm(a) or 1.0) if a.shape == b.shape else None


def _forced(
    run: Pass, one: LayerCall, two: LayerCall, ours: Reference, theirs: Reference, matching: Matching, gradients: bool
) -> Forced:
    """What a call of the other model is given: the reference's arrays in the other's layout."""
    alike = len(one.inputs) == len(two.inputs)
    inputs = [
        _input(run, mine, own, {source.name for source in two.inputs}, ours, theirs, matching) if alike else None
        for mine, own in zip(one.inputs if alike else two.inputs, two.inputs, strict=True)
    ]
    outputs: list[np.ndarray | None] = []
    cotangents: list[np.ndarray | None] = []
    for number in range(len(two.outputs)):
        place = f"{one.name}[{number}]" if number else one.name
        turn = matching.cotangents.get(place, ("", None))[1]
        output = ours.source(run, one.outputs[number]) if number < len(one.outputs) else None
        if turn is not None and output is not None:
            outputs.append(np.ascontiguousarray(turn.back(output)))
        else:
            outputs.append(_of_another_shape(output, two.outputs[number], ours, theirs))
        name = ArrayName(run, "cotangent", place)
        back = ours.record[name] if gradients and turn is not None and name in ours.record else None
        cotangents.append(None if back is None or turn is None else np.ascontiguousarray(turn.back(back)))
    return Forced(inputs=tuple(inputs), outputs=tuple(outputs), cotangents=tuple(cotangents))


def _of_another_shape(array: np.ndarray | None, own: Source, ours: Reference, theirs: Reference) -> np.ndarray | None:
    """An array of the reference in the other's layout, where the other's own is of another size by a fault."""
    if array is None or array.ndim != len(own.shape) or array.size == prod(own.shape):
        return None
    return _in_layout(array, ours, theirs)


def _in_layout(array: np.ndarray, ours: Reference, theirs: Reference) -> np.ndarray:
    layouts = ours.record.manifest.layout, theirs.record.manifest.layout
    if layouts[0] != layouts[1] and array.ndim >= 4:
        array = np.moveaxis(array, *((1, -1) if layouts[0] == "channels_first" else (-1, 1)))
    return np.ascontiguousarray(array)


def _input(
    run: Pass,
    mine: Source,
    own: Source,
    among: set[str],
    ours: Reference,
    theirs: Reference,
    matching: Matching,
) -> np.ndarray | None:
    """An input of the reference as the other's layer takes it, `among` whose inputs it is; None where it is no such."""
    name, turn = matching.arrays.get(mine.name, ("", None))
    if own.name != name and name in among:
        return None  # the same arrays in another order
    if turn is not None and name == own.name:
        whole = ours.source(run, Source(name=mine.name, shape=turn.turned))
        if whole is None:
            return None
        array = turn.back(whole)
        if own.moved:
            array = np.moveaxis(array, *((-1, 1) if np.moveaxis(array, -1, 1).shape == own.shape else (1, -1)))
        return np.ascontiguousarray(array.reshape(own.shape))
    layouts = ours.record.manifest.layout, theirs.record.manifest.layout
    value = ours.source(run, mine)
    fitting = next(turns(mine.shape, layouts[0], own.shape, layouts[1]), None)
    if value is not None and fitting is not None:
        return np.ascontiguousarray(fitting.back(value))
    places = [source.name.partition("/") for source in (mine, own)]
    # The output of one layer, or what code made before one layer, and other shapes by a fault.
    same = places[0][0] == places[1][0] and (places[0][0] == "into" or (places[0][2], places[1][2]) in matching.calls)
    if not same or value is None or value.ndim != len(own.shape):
        return None
    if layouts[0] != layouts[1] and value.ndim >= 4:
        value = np.moveaxis(value, *((1, -1) if layouts[0] == "channels_first" else (-1, 1)))
    return np.ascontiguousarray(value)


def _forward(
    run: Pass,
    pairs: Sequence[tuple[LayerCall, LayerCall]],
    forced: Mapping[str, Forced],
    trace: Trace,
    ours: Reference,
    theirs: Reference,
    matching: Matching,
    limits: _Limits,
    padded: Mapping[str, LayerCall] = MappingProxyType({}),
) -> list[Added]:
    found = []
    before = {one.name: name for name, one in padded.items()}
    layouts = ours.record.manifest.layout, theirs.record.manifest.layout
    for one, two in pairs:
        given = forced.get(two.name, Forced())
        if (padding := before.get(one.name)) is not None and given.inputs == (None,):
            wanted, got = forced[padding].inputs[0], trace.inputs[padding][0]
            if wanted is not None:
                name = _array_name(run, one.inputs[0].name)
                found.append(_added(run, "input", one.name, padding, 0, got, wanted, limits, name))
        seen = trace.inputs.get(two.name, ())
        for number, (wanted, got) in enumerate(zip(given.inputs, seen, strict=False)):
            # What another layer gave is that layer's; what the model was given may be turned on the way.
            if wanted is None or wanted.dtype.kind != "f":
                continue
            name = _array_name(run, one.inputs[number].name)
            found.append(_added(run, "input", one.name, two.name, number, got, wanted, limits, name))
        for number, got in enumerate(trace.outputs.get(two.name, ()) if two.leaf else ()):
            place = f"{one.name}[{number}]" if number else one.name
            turn = matching.cotangents.get(place, ("", None))[1]
            if number >= len(one.outputs):
                continue
            expected = ours.source(run, one.outputs[number])
            if expected is None or expected.dtype.kind != "f":
                continue
            name = _array_name(run, one.outputs[number].name)
            if turn is None:
                turn = next(turns(expected.shape, layouts[0], got.shape, layouts[1]), None)
            if turn is None or turn.shape != got.shape:
                if any(array is None for array in given.inputs):
                    continue  # it had inputs of its own, of another shape
                turn = next(turns(expected.shape, layouts[0], got.shape, layouts[1]), Turn(got.shape))
            mine = turn(got)
            found.append(_added(run, "layer", one.name, two.name, number, mine, expected, limits, name))
    for path, (own, turn) in matching.results.items():
        name = ArrayName(run, "result", path)
        if name in ours.record and (result := trace.results.get("" if own == "output" else own)) is not None:
            found.append(_added(run, "result", path, own, 0, turn(np.asarray(result)), ours.record[name], limits, name))
    for parameter in _held(one for one, _ in pairs):
        own, turn = matching.parameters.get(parameter, ("", Turn(())))
        name = ArrayName(run, "stat", parameter)
        if name in ours.record and own in trace.statistics:
            mine = turn(trace.statistics[own])
            found.append(_added(run, "statistic", parameter, own, 0, mine, ours.record[name], limits, name))
    return found


def _held(calls: Iterable[LayerCall]) -> dict[str, None]:
    """The names of what layers hold, each once."""
    return dict.fromkeys(str(held["name"]) for call in calls for held in call.arrays.values())


def _backward(
    run: Pass,
    pairs: Sequence[tuple[LayerCall, LayerCall]],
    trace: Trace,
    ours: Reference,
    matching: Matching,
    limits: _Limits,
) -> list[Added]:
    found = []
    for one, two in reversed(pairs):
        for number, got in enumerate(trace.cotangents.get(two.name, ())):
            place = f"{one.name}[{number}]" if number else one.name
            turn = matching.cotangents.get(place, ("", None))[1]
            name = ArrayName(run, "cotangent", place)
            if turn is None or name not in ours.record or (got is not None and got.shape != turn.shape):
                continue
            expected = ours.record[name]
            mine = np.zeros_like(expected) if got is None else turn(got)
            if (output := ours.source(run, one.outputs[number])) is not None and output.shape == expected.shape:
                # Where a ReLU gave zero nothing goes further back, and a tie of a max-pool may send it anywhere.
                mine, expected = mine * (output != 0), expected * (output != 0)
            found.append(_added(run, "cotangent", one.name, two.name, number, mine, expected, limits, name))
        for held in one.arrays.values():
            parameter = held["name"]
            name = ArrayName(run, "grad", parameter)
            theirs, turn = matching.parameters.get(parameter, ("", None))
            if turn is None or name not in ours.record or theirs not in trace.gradients:
                continue
            mine = turn(trace.gradients[theirs])
            found.append(_added(run, "gradient", parameter, theirs, 0, mine, ours.record[name], limits, name))
    return found


def _array_name(run: Pass, source: str) -> ArrayName:
    kind, _, place = source.partition("/")
    return ArrayName(run, kind, place)


def _added(
    run: Pass,
    part: Part,
    place: str,
    yours: str,
    number: int,
    mine: np.ndarray,
    expected: np.ndarray,
    limits: _Limits,
    name: ArrayName,
) -> Added:
    if mine.shape == expected.shape:
        mine, expected = finite(mine, expected)
    scale = norm(expected) or 1.0
    apart = distance(mine, expected) if mine.shape == expected.shape else np.inf
    limit = limits.of(name, expected)
    return Added(
        run=run,
        part=part,
        place=place,
        yours=yours,
        number=number,
        added=apart / scale,
        inherited=limits.inherited(name) if not apart <= limit else None,
        limit=limit / scale,
    )
