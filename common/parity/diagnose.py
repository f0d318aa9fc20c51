"""From where two models differ to why: gathers the evidence of each failing place, and asks for its causes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import prod

import numpy as np

from common.diagnosis.arithmetic import activate
from common.diagnosis.causes import AND
from common.diagnosis.evidence import (
    Backward,
    Diagnosis,
    Explained,
    Finding,
    GlueEvidence,
    LayerEvidence,
    Side,
    Statistics,
)
from common.diagnosis.glue import explain_glue, rebased
from common.diagnosis.identify import FUSED
from common.diagnosis.images import explain_input
from common.diagnosis.layers import explain_layer
from common.foreign.operations import Activation, Conv, Operation, Pad, Pool, from_data
from common.foreign.protocol import Trace
from common.parity.levels import EXPLAINED, SAME_VALUES
from common.parity.localise import Added, Localised, Reference, behind
from common.parity.matching import Matching, Turn, held_of, turns
from common.parity.names import ArrayName, Pass
from common.parity.record import LayerCall, Record, distance, norm

# What a layer that is known holds.
_ROLES = frozenset({"kernel", "bias", "scale", "mean", "var", "table"})
_MOST = 40  # failing places that are looked into
_NEXT = 2  # arrays behind a layer that an activation may have made of its output
_NEAREST = 40  # arrays before a place that plain code there may have been made of


def diagnose(reference: Record, other: Record, matching: Matching, localised: Localised) -> Diagnosis:
    """Every defect that `localised` shows, with its causes: those on the way forward first, and on the way back what
    none of them explains."""
    case = _Case(reference, other, matching, localised)
    failing = localised.failing
    forward = [one for one in failing if not one.backward]
    found: list[Explained] = []
    for one in (forward or failing)[:_MOST]:
        if one.part == "statistic" and case.layer_of(one) in {defect.place for defect in found}:
            continue  # of a layer whose output is off already
        inherits = bool(case.inherited)
        if (explained := case.explain(one)) is not None:
            if explained.best is None and inherits and one.part in ("input", "result"):
                continue  # it may be what was found before, behind plain code that is not known
            found.append(explained)
            if explained.best is not None and explained.best.cause == "detached":
                break  # what lies before it gets nothing either
    return Diagnosis(defects=tuple(_merged(list(_both_ways(found, case.swapped)))))


def _both_ways(found: Sequence[Explained], swapped: Mapping[str, tuple[str, str]]) -> Iterator[Explained]:
    """Two layers that hold each other's arrays as one defect."""
    done: set[str] = set()
    for explained in found:
        best, place = explained.best, explained.place
        if best is not None and best.cause == "block_order":
            if "blocks" in done:
                continue  # where it stands in yours
            done.add("blocks")
        if best is None or best.cause != "arrays_swapped" or place not in swapped:
            yield explained
            continue
        if place in done:
            continue
        other = next((one for one, pair in swapped.items() if pair == swapped[place][::-1]), None)
        if other is not None:
            done.add(other)
            best = replace(best, yours=f"{best.yours}, and `{other}` those of this one")
        yield replace(explained, best=best)


def _merged(found: Sequence[Explained]) -> Iterator[Explained]:
    """Each defect once: the same at many layers, and a stride that stands on another layer."""
    groups: dict[tuple[str, ...], list[Explained]] = {}
    for explained in found:
        best = explained.best
        key: tuple[str, ...] = (best.cause, best.yours, best.reference) if best else (explained.place,)
        groups.setdefault(key, []).append(explained)
    strides = [group for key, group in groups.items() if key[0] == "stride"]
    for key, (first, *others) in groups.items():
        best = first.best
        if best is None or (key[0] == "stride" and strides[0][0] is not first):
            if best is None:
                yield first
            continue
        places = list(dict.fromkeys(other.place for other in others if other.place != first.place))
        if key[0] == "stride" and len(strides) > 1:
            moved = " and ".join(f"`{group[0].place}`" for group in strides[1:])
            best = replace(best, reference=f"{best.reference}, and the other way round at {moved}")
        if places:
            best = replace(best, also=tuple(places))
        yield replace(first, best=best)


class _Case:
    """Two records, how they match, and what the other made of the reference's values."""

    def __init__(self, reference: Record, other: Record, matching: Matching, localised: Localised) -> None:
        self.ours, self.theirs = Reference(reference), Reference(other)
        self.matching, self.localised = matching, localised
        self.layouts = reference.manifest.layout, other.manifest.layout
        self.backend = other.manifest.backend
        self.pair = dict(matching.calls)
        # What yours has where plain code was off already, by the words for it.
        self.inherited: dict[str, np.ndarray] = {}
        # By place, a layer of the reference and the one whose arrays it holds in yours.
        self.swapped: dict[str, tuple[str, str]] = {}
        self.weights = [{name.place: name for name in record if name.kind == "weight"} for record in (reference, other)]

    def explain(self, one: Added) -> Explained | None:
        """The causes of one failing place; None where it says nothing that another does not say."""
        if one.part in ("input", "result"):
            return self._explain_glue(one)
        if one.part == "layer":
            evidence = self._layer_evidence(one)
            if evidence is None:
                return None
            if (array := self.localised.activated.get(one.run, {}).get(one.yours)) is not None:
                ours = self.ours.calls[one.run, one.place]
                behind_it = replace(evidence.reference, outputs=(_last(array, self.layouts[0], ours),))
                evidence = replace(evidence, reference=behind_it)
            others = list(self._of_other_arrays(one, evidence))
            answer = _answer(self._place(one), [*others, *explain_layer(evidence)])
            if others or not _may_be_fused(answer):
                return answer
            # One model may have an activation in the layer that the other has behind it.
            again = [_answer(self._place(one), explain_layer(other)) for other in self._behind(one, evidence)]
            return min((answer, *again), key=_rank)
        return self._explain_parameter(one)

    def layer_of(self, one: Added) -> str:
        """The place of the layer that holds a parameter, as findings have it."""
        owner = self.owner(one.place)
        return self._called(*owner) if owner else one.yours

    def _called(self, ours: LayerCall, theirs: LayerCall) -> str:
        return theirs.layer if theirs.layer == ours.layer else f"{theirs.layer} ({ours.layer})"

    def owner(self, parameter: str) -> tuple[LayerCall, LayerCall] | None:
        """The calls of the layer that holds a parameter of the reference."""
        for (run, name), call in self.ours.calls.items():
            if any(held["name"] == parameter for held in call.arrays.values()) and name in self.pair:
                other = self.theirs.calls.get((run, self.pair[name]))
                if other is not None:
                    return call, other
        return None

    def _place(self, one: Added) -> str:
        return one.yours if one.yours == one.place else f"{one.yours} ({one.place})"

    def _layer_evidence(self, one: Added) -> LayerEvidence | None:
        ours, theirs = self.ours.calls[one.run, one.place], self.theirs.calls[one.run, one.yours]
        trace = self.localised.traces[one.run]
        inputs = [self.ours.source(one.run, source) for source in ours.inputs]
        outputs = [self.ours.source(one.run, source) for source in ours.outputs]
        made = trace.outputs.get(one.yours, ())
        if any(array is None for array in (*inputs, *outputs)) or not made:
            return None
        expected = outputs[one.number]
        assert expected is not None
        reference = self._side(
            0, ours, tuple(_last(a, self.layouts[0], ours) for a in outputs if a is not None), theirs
        )
        if len(ours.inputs) == 1 and (bare := self.ours.unpadded(one.run, ours.inputs[0], self.pair)) is not None:
            padding = self.ours.calls[one.run, ours.inputs[0].name.partition("/")[2]].operation
            operation = _with_padding(reference.operation, from_data(padding))
            if operation is not None or reference.operation is None:
                inputs = [self.ours.source(one.run, bare)]
                reference = replace(reference, operation=operation)
        return LayerEvidence(
            training=one.run == "train",
            inputs=tuple(_last(array, self.layouts[0], ours) for array in inputs if array is not None),
            reference=reference,
            yours=self._side(1, theirs, tuple(self._turned(a, expected, ours, theirs) for a in made), ours),
            limit=one.limit * norm(expected),
        )

    def _behind(self, one: Added, evidence: LayerEvidence) -> Iterator[LayerEvidence]:
        """The same with what the reference, or yours, makes of the layer's output next."""
        ours, theirs = self.ours.calls[one.run, one.place], self.theirs.calls[one.run, one.yours]
        if len(ours.outputs) != 1 or len(theirs.outputs) != 1 or one.run not in self.localised.free:
            return
        for array in islice(self.ours.behind(one.run, one.place, ours.outputs[0]), _NEXT):
            expected = _last(array, self.layouts[0], ours)
            if expected.shape == evidence.reference.outputs[0].shape:
                yield replace(evidence, reference=replace(evidence.reference, outputs=(expected,)))
        matched = {two for mine, two in self.pair.items() if self.ours.calls[one.run, mine].leaf}
        for array in islice(behind(self.localised.free[one.run], one.yours, matched), _NEXT):
            made = self._turned(array, evidence.reference.outputs[0], ours, theirs)
            if made.shape == evidence.yours.outputs[0].shape:
                yield replace(evidence, yours=replace(evidence.yours, outputs=(made,)))

    def _turned(self, made: np.ndarray, expected: np.ndarray, ours: LayerCall, theirs: LayerCall) -> np.ndarray:
        """An array of the other, channels last; where it fits, in the reference's shape."""
        found = next(turns(expected.shape, self.layouts[0], made.shape, self.layouts[1]), None)
        if found is not None:
            return _last(found(made), self.layouts[0], ours)
        return _last(made, self.layouts[1], theirs)

    def _side(
        self, which: int, call: LayerCall, outputs: tuple[np.ndarray, ...], other: LayerCall | None = None
    ) -> Side:
        """What is known of a layer; of one that nobody knows, in the words of the `other` model's, where its arrays
        are that one's."""
        record = (self.ours, self.theirs)[which].record
        operation = from_data(call.operation)
        if other is not None and not call.arrays.keys() <= _ROLES and other.arrays.keys() <= _ROLES:
            arrays = self._in_words_of(which, call, other)
            if arrays is not None:
                return Side(
                    backend=record.manifest.backend,
                    layer=call.name,
                    kind=call.kind,
                    operation=from_data(other.operation),
                    arrays=arrays,
                    outputs=outputs,
                )
        return Side(
            backend=record.manifest.backend,
            layer=call.name,
            kind=call.kind,
            operation=operation,
            arrays={
                role: held_of(held).canonical(record[self.weights[which][held["name"]]])
                for role, held in call.arrays.items()
                if held["name"] in self.weights[which]
            },
            outputs=outputs,
        )

    def _in_words_of(self, which: int, call: LayerCall, other: LayerCall) -> dict[str, np.ndarray] | None:
        """A layer's arrays by the roles and in the layouts of the other model's layer; None where one has none."""
        record = (self.ours, self.theirs)[which].record
        own = {held["name"] for held in call.arrays.values()}
        roles = {held["name"]: (role, held_of(held)) for role, held in other.arrays.items()}
        found: dict[str, np.ndarray] = {}
        for mine, (yours, turn) in self.matching.parameters.items():
            name, there = (mine, yours) if which == 0 else (yours, mine)
            if name in own and there in roles and name in self.weights[which]:
                array = record[self.weights[which][name]]
                role, held = roles[there]
                turn = self._as_of_others(mine, yours, turn)
                found[role] = held.canonical(turn.back(array) if which == 0 else turn(array))
        return found if len(found) == len(own) else None

    def _as_of_others(self, mine: str, yours: str, turn: Turn) -> Turn:
        """How a parameter is turned; of one that has other values in the two models, as others of its name are."""
        if self._agree(mine, yours, turn):
            return turn
        last = mine.rpartition(".")[2]
        for name, (other, found) in self.matching.parameters.items():
            alike = name.rpartition(".")[2] == last and len(found.shape) == len(turn.shape)
            if alike and [kind for kind, _ in found.steps] == ["axes"] and self._agree(name, other, found):
                return Turn(turn.shape, found.steps)
        return turn

    def _agree(self, mine: str, yours: str, turn: Turn) -> bool:
        ours, theirs = self.ours.record[self.weights[0][mine]], self.theirs.record[self.weights[1][yours]]
        return _same(ours, turn(theirs))

    def _of_other_arrays(self, one: Added, evidence: LayerEvidence) -> Iterator[Finding]:
        """Whether the layer holds what another layer of the reference holds: a shared layer, or arrays in another
        order."""
        theirs = self.theirs.calls[one.run, one.yours]
        again = sum(call.layer == theirs.layer for (run, _), call in self.theirs.calls.items() if run == one.run) > 1
        owners: dict[str, list[str]] = {}
        for role, mine in evidence.yours.arrays.items():
            own = evidence.reference.arrays.get(role)
            if own is None or own.shape != mine.shape or not mine.any() or _same(own, mine):
                continue
            for (run, name), call in self.ours.calls.items():
                held = call.arrays.get(role)
                if run != one.run or held is None or name == one.place or held["name"] not in self.weights[0]:
                    continue
                array = held_of(held).canonical(self.ours.record[self.weights[0][held["name"]]])
                if array.ndim and array.shape == mine.shape and np.ptp(array) and _same(array, mine):
                    owners.setdefault(call.layer, []).append(role)
                    break
        for layer, roles in owners.items():
            self.swapped[self._place(one)] = self.ours.calls[one.run, one.place].layer, layer
            words = ", ".join(roles[:-1]) + " and " * (len(roles) > 1) + roles[-1]
            yield Finding(
                cause="shared_layer" if again else "arrays_swapped",
                place=self._place(one),
                yours=f"is `{theirs.layer}` once more" if again else f"holds the {words} of `{layer}`",
                reference=f"has {'a layer of its' if again else 'its'} own there, `{one.place}`",
                remedy="Make a layer for each call."
                if again
                else "Load each layer's own arrays: an order of definition is no name.",
                before=one.added,
                after=0.0,
                cost=0.5,
            )
            return

    def _explain_glue(self, one: Added) -> Explained | None:
        evidence = self._glue_evidence(one)
        if evidence is None:
            return None
        was, evidence = evidence, rebased(evidence)
        if one.part == "input":
            names = _words(self.ours.calls[one.run, one.place].inputs[one.number].name), evidence.place
            if names[0] in self.inherited and _same(self.inherited[names[0]], was.yours):
                return None  # it goes into several layers
            self.inherited |= dict.fromkeys((names[0], _words(f"into/{_numbered(one.place, one.number)}")), was.yours)
        if evidence is not was and _same(evidence.reference, evidence.yours):
            return None
        findings = list(self._of_blocks(one, evidence))
        given = [array.shape for name, array in evidence.sources.items() if name.startswith("the model's input")]
        if evidence.reference.ndim == 4 and evidence.reference.shape in given and self._first(one):
            findings += [
                replace(found, place=evidence.place) for found in explain_input(evidence.reference, evidence.yours)
            ]
        findings += explain_glue(evidence)
        return _answer(evidence.place, findings)

    def _ours_of(self, yours: str) -> str:
        return next(one for one, two in self.matching.calls if two == yours)

    def _first(self, one: Added) -> bool:
        """Whether no layer that holds what is trained comes before it, as far as that is known."""
        for (run, name), call in self.ours.calls.items():
            if run == one.run and one.part == "input" and name == one.place:
                return True
            if run == one.run and call.arrays.keys() & {"kernel", "table", "scale"}:
                return False
        return True

    def _glue_evidence(self, one: Added) -> GlueEvidence | None:
        trace = self.localised.traces[one.run]
        order = [call for (run, _), call in self.ours.calls.items() if run == one.run]
        layout = self.layouts[0]
        if one.part == "result":
            name = ArrayName(one.run, "result", one.place)
            expected: np.ndarray | None = self.ours.record[name]
            theirs, turn = self.matching.results[one.place]
            seen = turn(np.asarray(trace.results["" if theirs == "output" else theirs]))
            place, before, own = "the output" if one.place == "output" else f"output {one.place}", order, ""
        else:
            call = self.ours.calls[one.run, one.place]
            source = call.inputs[one.number]
            expected, own = self.ours.source(one.run, source), source.name
            array = trace.inputs[one.yours][one.number]
            if expected is None:
                return None
            found = next(turns(expected.shape, self.layouts[0], array.shape, self.layouts[1]), None)
            layout, seen = (self.layouts[1], array) if found is None else (self.layouts[0], found(array))
            theirs_call = self.theirs.calls[one.run, one.yours]
            other, known = theirs_call.inputs[one.number], self.matching.arrays.get(source.name, ("", None))
            if (
                known[1] is not None
                and known[0] == other.name
                and not other.moved
                and array.size == prod(known[1].shape)
            ):
                # As it was matched: the two may flatten a map in other orders.
                seen = known[1](array.reshape(known[1].shape)).reshape(expected.shape)
            place = f"the input of {self._place(one)}"
            maker = other.name.partition("/")[2]
            if other.name.startswith("tap/") and maker in self.localised.fused.get(one.run, ()):
                # An activation in a layer of yours, which the reference has behind it.
                place = self._called(self.ours.calls[one.run, self._ours_of(maker)], self.theirs.calls[one.run, maker])
            before = order[: next(i for i, other in enumerate(order) if other.name == one.place)]
        assert expected is not None
        sources = dict(self._sources(one.run, before, own, expected))
        made = dict(self._made(before, sources))
        for words, array, behind_it, activation in self._before_activation(one.run):
            if behind_it in sources:
                sources[words] = array
                made[behind_it] = Activation(name=activation), (words,)
        return GlueEvidence(
            training=one.run == "train",
            place=place,
            backend=self.backend,
            sources=sources,
            made=made,
            inherited={name: array for name, array in self.inherited.items() if name in sources},
            reference=_last(expected, self.layouts[0], None),
            yours=_last(seen, layout, None),
            limit=one.limit * norm(expected),
        )

    def _sources(
        self, run: Pass, before: Sequence[LayerCall], own: str, expected: np.ndarray
    ) -> Iterator[tuple[str, np.ndarray]]:
        """What there was before, nearest first; from further away what has the shape of the result."""
        seen: set[str] = set()
        for call in reversed(before):
            for source in (*reversed(call.outputs), *call.inputs):
                near = len(seen) < _NEAREST
                # What the reference has a layer for, and yours plain code, is to be explained by what comes before it.
                if source.name in seen or (source.name == own and not self._known(run, own)):
                    continue
                array = self.ours.whole(run, source.name)
                if array is None or array.dtype.kind != "f" or not (near or array.shape == expected.shape):
                    continue
                seen.add(source.name)
                yield _words(source.name), _last(array, self.layouts[0], None)
        for name in self.ours.record:
            if name.kind == "given" and f"given/{name.place}" not in seen:
                array = self.ours.record[name]
                if array.dtype.kind == "f":
                    yield f"the model's input {name.place}", _last(array, self.layouts[0], None)

    def _known(self, run: Pass, source: str) -> bool:
        """Whether it is what a layer gave that yours has too, or of which it is known what it does."""
        kind, _, place = source.partition("/")
        call = self.ours.calls.get((run, place))
        if kind != "tap" or call is None:
            return kind == "given"
        return call.leaf and (place in self.pair or call.operation is not None)

    def _before_activation(self, run: Pass) -> Iterator[tuple[str, np.ndarray, str, str]]:
        """Of layers that have an activation in the reference, and none in yours: the words for what yours gives, that
        array, the words for the reference's, and the activation."""
        for one, two in self.matching.calls:
            ours = self.ours.calls.get((run, one))
            if two not in self.localised.fused.get(run, ()) or ours is None:
                continue
            expected = self.ours.whole(run, ours.outputs[0].name)
            if expected is None:
                continue
            made = self.localised.traces[run].outputs[two][0]
            turn = next(turns(expected.shape, self.layouts[0], made.shape, self.layouts[1]), None)
            for name in FUSED if turn is not None else ():
                if turn is not None and _same(expected, activate(name, turn(made))):
                    before = _last(turn(made), self.layouts[0], None)
                    yield f"{two} before its activation", before, _words(ours.outputs[0].name), name
                    break

    def _made(
        self, before: Sequence[LayerCall], sources: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, tuple[Operation, tuple[str, ...]]]]:
        """Sources that layers without arrays gave, which yours has not got as layers."""
        for call in before:
            operation = from_data(call.operation)
            if operation is None or call.arrays or call.name in self.pair or len(call.outputs) != 1:
                continue
            inputs = tuple(_words(source.name) for source in call.inputs)
            if call.outputs[0].name != f"tap/{call.name}":
                continue  # flattened, or as it was
            if all(name in sources for name in (_words(call.outputs[0].name), *inputs)):
                yield _words(call.outputs[0].name), (operation, inputs)

    def _of_blocks(self, one: Added, evidence: GlueEvidence) -> Iterator[Finding]:
        """Whether layers without a counterpart stand before the place: what is left without them."""
        trace = self.localised.traces[one.run]
        for which, names in enumerate(self.matching.unmatched):
            calls = [call for (run, _), call in (self.ours, self.theirs)[which].calls.items() if run == one.run]
            position = {call.name: i for i, call in enumerate(calls)}
            end = position.get((one.place, one.yours)[which], len(calls))
            matched = {pair[which] for pair in self.matching.calls}
            start = max((i for i, c in enumerate(calls[:end]) if c.name in matched and c.leaf), default=-1)
            alone = [c for c in calls[start + 1 : end] if c.name in names]
            if not alone:
                continue
            words = ", ".join(f"`{call.name}`" for call in alone[:3]) + (", …" if len(alone) > 3 else "")
            if which == 1:
                # Without them it would get what they get.
                arrays = [a for call in alone for a in trace.inputs.get(call.name, ()) if a.size == evidence.yours.size]
                left = [_left(evidence.reference, a, self.layouts) for a in arrays]
                yours, ours, cause = f"runs {words} before it", "has no such layer", "block_extra"
            else:
                sources = [self.ours.source(one.run, s) for call in alone for s in call.inputs]
                left = [_left(evidence.yours, a, (self.layouts[0],) * 2) for a in sources if a is not None]
                yours, ours, cause = "has no such layer", f"runs {words} before it", "block_missing"
            elsewhere = self._elsewhere(alone, which)
            if elsewhere:
                cause = "block_order"
                others = ", ".join(f"`{name}`" for name in elsewhere[:3]) + (", …" if len(elsewhere) > 3 else "")
                yours, ours = (f"runs {others} elsewhere", ours) if which == 0 else (yours, f"runs {others} elsewhere")
            if left and min(left) < np.inf:
                yield Finding(
                    cause=cause,
                    place=evidence.place,
                    yours=yours,
                    reference=ours,
                    remedy="",
                    before=one.added,
                    after=min(left),
                    # What is one layer of a kind that needs no arrays has a name of its own.
                    cost=0.8 if any(call.arrays for call in alone) else 2.5,
                )

    def _elsewhere(self, alone: Sequence[LayerCall], which: int) -> list[str]:
        """Layers of the other model that hold the arrays of these, and have no counterpart where they are run."""
        held = {name["name"] for call in alone for name in call.arrays.values()}
        pairs = ((one, two) if which == 0 else (two, one) for one, (two, _) in self.matching.parameters.items())
        theirs = {there for here, there in pairs if here in held}
        side = (self.theirs, self.ours)[which]
        found = [
            call.name
            for (_, name), call in side.calls.items()
            if name in self.matching.unmatched[1 - which] and {one["name"] for one in call.arrays.values()} & theirs
        ]
        return list(dict.fromkeys(found))

    def _explain_parameter(self, one: Added) -> Explained | None:
        """A running statistic, a gradient, or what came back to an output."""
        if one.part == "cotangent":
            return self._explain_way_back(one)
        owner = self.owner(one.place)
        if owner is None:
            return Explained(place=self._place(one), best=None)
        ours, theirs = owner
        outputs = Added(
            run=one.run,
            part="layer",
            place=ours.name,
            yours=theirs.name,
            added=one.added,
            inherited=None,
            limit=one.limit,
        )
        evidence = self._layer_evidence(outputs)
        if evidence is None:
            return Explained(place=theirs.layer, best=None)
        trace = self.localised.traces[one.run]
        if one.part == "statistic":
            evidence = replace(evidence, statistics=self._statistics(one.run, ours, theirs, trace))
        else:
            evidence = replace(evidence, backward=self._way_back(one.run, ours, theirs, trace))
        return _answer(self._called(ours, theirs), explain_layer(evidence))

    def _statistics(self, run: Pass, ours: LayerCall, theirs: LayerCall, trace: Trace) -> tuple[Statistics, Statistics]:
        first, second = {}, {}
        for role, held in ours.arrays.items():
            name = ArrayName(run, "stat", held["name"])
            if name in self.ours.record:
                first[role] = held_of(held).canonical(self.ours.record[name])
        for role, held in theirs.arrays.items():
            if held["name"] in trace.statistics:
                second[role] = held_of(held).canonical(trace.statistics[held["name"]])
        sides = self._side(0, ours, ()), self._side(1, theirs, ())
        return (
            Statistics(before={role: sides[0].arrays[role] for role in first}, after=first),
            Statistics(before={role: sides[1].arrays[role] for role in second}, after=second),
        )

    def _way_back(
        self, run: Pass, ours: LayerCall, theirs: LayerCall, trace: Trace
    ) -> tuple[Backward, Backward] | None:
        name = ArrayName(run, "cotangent", ours.name)
        if name not in self.ours.record:
            return None
        cotangent = _last(self.ours.record[name], self.layouts[0], ours)
        gradients: list[dict[str, np.ndarray]] = [{}, {}]
        for role, held in ours.arrays.items():
            if (of := ArrayName(run, "grad", held["name"])) in self.ours.record:
                gradients[0][role] = held_of(held).canonical(self.ours.record[of])
        for role, held in theirs.arrays.items():
            if held["name"] in trace.gradients:
                gradients[1][role] = held_of(held).canonical(trace.gradients[held["name"]])
        first, second = (Backward(cotangent=cotangent, of_inputs=(), of_arrays=found) for found in gradients)
        return first, second

    def _explain_way_back(self, one: Added) -> Explained | None:
        """Nothing, or a part, of what should come back to an output."""
        trace = self.localised.traces[one.run]
        expected = self.ours.record[ArrayName(one.run, "cotangent", _numbered(one.place, one.number))]
        got = trace.cotangents[one.yours][one.number]
        place = self._place(one)
        if got is None or not np.any(got):
            finding = Finding(
                cause="detached",
                place=place,
                yours="gets no gradient from what follows it",
                reference="does",
                remedy=_DETACHED.get(self.backend.partition(":")[0], ""),
                before=one.added,
                after=0.0,
            )
            return Explained(place=place, best=finding)
        mine = next(turns(expected.shape, self.layouts[0], got.shape, self.layouts[1]), None)
        back = got if mine is None else mine(got)
        scale = float(np.vdot(expected, back) / np.vdot(expected, expected)) if expected.shape == back.shape else 0.0
        left = distance(back, scale * expected) / norm(expected) if scale else 1.0
        if left <= EXPLAINED[str(expected.dtype)]:
            finding = Finding(
                cause="gradient_scaled",
                place=place,
                yours=f"gets {scale:.6g} times the gradient from what follows it",
                reference="gets it as it is",
                remedy="",
                before=one.added,
                after=left,
            )
            return Explained(place=place, best=finding)
        return Explained(place=place, best=None)


_DETACHED = {
    "torch": "Look for .detach(), .data, torch.no_grad() or a way through NumPy behind it.",
    "keras": "Look for keras.ops.stop_gradient, or a way through NumPy, behind it.",
    "flax": "Look for jax.lax.stop_gradient behind it.",
}


def _may_be_fused(answer: Explained) -> bool:
    """Whether what was found has to do with an activation, or nothing was."""
    return answer.best is None or "activation" in answer.best.cause


def _rank(answer: Explained) -> float:
    """Of answers to one question, the plainest first; an activation that is another is less than one in addition."""
    if answer.best is None:
        return np.inf
    return answer.best.cost + (0.5 if answer.best.cause in ("activation_extra", "activation_missing") else 0.0)


def _answer(place: str, findings: Sequence[Finding]) -> Explained:
    """The finding that leaves least; of those that leave nothing but rounding the plainest."""
    ranked = sorted(findings, key=lambda found: (not _explains(found), found.cost if _explains(found) else found.after))
    best = ranked[0] if ranked and _explains(ranked[0]) else None
    # The same cause with another in addition is no other answer.
    first = set(best.cause.split(AND)) if best else set()
    others = [found for found in ranked if best is None or not first <= set(found.cause.split(AND))]
    return Explained(place=place, best=best, runner_up=others[0] if others else None, others=tuple(others[1:]))


def _explains(found: Finding) -> bool:
    return found.after <= 1e-3 * found.before


def _with_padding(operation: Operation | None, padding: Operation | None) -> Operation | None:
    """A layer and the one that pads before it as one; None where no layer does so."""
    if not isinstance(padding, Pad) or not isinstance(operation, Conv | Pool) or operation.padding == "same":
        return None
    both = tuple((a + c, b + d) for (a, b), (c, d) in zip(padding.padding, operation.padding, strict=True))
    if isinstance(operation, Conv):
        return replace(operation, padding=both)
    whole = operation.mode == "average" and not any(map(any, operation.padding))
    return replace(operation, padding=both, counted=True) if whole else None


def _words(source: str) -> str:
    """What a finding calls an array."""
    kind, _, place = source.partition("/")
    return {"tap": place, "into": f"the input of {place}", "given": f"the model's input {place}"}[kind]


def _numbered(name: str, number: int) -> str:
    return f"{name}[{number}]" if number else name


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and distance(a, b) <= SAME_VALUES * norm(a)


def _last(array: np.ndarray, layout: str, call: LayerCall | None) -> np.ndarray:
    """Channels last."""
    operation = from_data(call.operation) if call is not None else None
    rows = isinstance(operation, Conv) and len(operation.strides) == 1
    if layout == "channels_first" and (array.ndim >= 4 or (rows and array.ndim == 3)):
        return np.moveaxis(array, 1, -1)
    return array


def _left(expected: np.ndarray, array: np.ndarray, layouts: Sequence[str]) -> float:
    """How far an array is from another, channels last, in the layout that is nearest."""
    size = norm(expected) or 1.0
    return min(
        (
            distance(turn(array), expected) / size
            for turn in turns(expected.shape, "channels_last", array.shape, layouts[1])
        ),
        default=np.inf,
    )
