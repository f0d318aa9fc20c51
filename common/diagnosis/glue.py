"""Why plain code between layers differs: the reference's formula, and what in it yours has otherwise."""

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import replace
from itertools import permutations
from math import inf, pi, sqrt
from typing import Any

import numpy as np

from common.diagnosis import arithmetic, words
from common.diagnosis.coarse import precision_findings
from common.diagnosis.evidence import Finding, GlueEvidence
from common.diagnosis.expressions import (
    COMMON,
    PAIRED,
    Applied,
    Attention,
    Computed,
    Expression,
    Move,
    Part,
    Scale,
    Screen,
    Source,
    Values,
    found,
    moves,
    phrase,
)
from common.diagnosis.pointwise import dropout, response_edits, softmax_edits
from common.diagnosis.pools import flatten_edits, global_edits, pool_edits
from common.diagnosis.remedies import activation_words, of_activation
from common.diagnosis.trials import FEWEST, NEXT_BEST, Change, Changes, Goal, Trial, Work, cost_of, findings, plain
from common.foreign.operations import (
    Activation,
    Flatten,
    GlobalPool,
    LocalResponseNorm,
    Merge,
    Operation,
    Pool,
    Softmax,
)

# Pairs of changes that are tried where no single one explains it.
_MOST_PAIRS = 800
# What stands for the reference's value where no formula of it is known.
_VALUE = "what the reference has"
Edit = tuple[Changes, Expression]


@np.errstate(all="ignore")
def explain_glue(evidence: GlueEvidence) -> list[Finding]:
    """What makes of the reference's value that of yours: causes, best first, of which the first explains the
    difference to rounding and the last may leave some. Empty where no hypothesis explains it."""
    goal = Goal(evidence.reference, evidence.yours, evidence.limit)
    if goal.before * goal.norm <= goal.limit:
        return []
    values = Values(evidence.sources)
    known = _known(evidence, values, goal)
    if known is None:
        values.sources[_VALUE] = goal.reference
        known = Source(name=_VALUE)
    edits = _Edits(known, values, goal, evidence.backend)
    place, backend = evidence.place, evidence.backend
    screen = Screen(values, goal.yours, goal.reference)
    rows = _tried(edits.of(known), screen, goal)
    if not any(goal.explained(left) for left, _ in rows):
        rows += _tried(_pairs(edits, known), screen, goal)
    named = findings(rows, goal, place=place, backend=backend)
    if named:
        return named
    coarse = precision_findings(_as_work(known, values), goal, place=place, backend=backend)
    if coarse:
        return coarse
    other = found(goal.yours, values, is_it=lambda value: goal.explained(goal.left(value)), relative=goal.relative)
    if other is None or other == known:
        return []
    change = _formula(other, known)
    left = goal.left(values.once(other))
    return findings([(left, (change,)), *rows], goal, place=place, backend=backend)


def rebased(evidence: GlueEvidence) -> GlueEvidence:
    """With what the reference's formula makes of what yours has inherited: that is to be explained no more. The
    evidence itself where the formula is not known, or reads nothing of it."""
    values = Values(evidence.sources)
    known = _known(evidence, values, Goal(evidence.reference, evidence.reference, evidence.limit))
    if known is None or not evidence.inherited.keys() & set(_sources(known)):
        return evidence
    sources = {**evidence.sources, **evidence.inherited}
    try:
        with np.errstate(all="ignore"):
            reference = Values(sources).of(known)
    except (ValueError, IndexError):
        return evidence
    # Its own sources last: what another formula would read of them is still there.
    return replace(evidence, sources=sources, reference=reference, inherited={})


def _known(evidence: GlueEvidence, values: Values, goal: Goal) -> Expression | None:
    """The reference's formula, with that of layers in it which only the reference has."""
    known = _found(goal.reference, values, goal)
    if known is None:
        return None
    taken = {name for _, names in evidence.made.values() for name in names}
    whole = _written_out(known, evidence.made, taken, values, goal)
    try:
        with np.errstate(all="ignore"):
            return whole if goal.is_reference(values.of(whole)) else known
    except (ValueError, KeyError, IndexError):
        return known


def _found(value: np.ndarray, values: Values, goal: Goal) -> Expression | None:
    """The formula of a value; of rows of tokens also with tokens and channels exchanged."""
    own = Goal(value, value, goal.limit)
    turned = {}
    if value.ndim == 3 and value.shape[1] != value.shape[2]:
        shape = value.shape[0], value.shape[2], value.shape[1]
        turned = {f"{name} turned": name for name in values.names if values.sources[name].shape == shape}
    if not turned:
        return found(value, values, is_it=own.is_reference, relative=goal.relative)
    more = {one: values.sources[name].swapaxes(1, 2) for one, name in turned.items()}
    both = Values({**values.sources, **more})
    known = found(value, both, is_it=own.is_reference, relative=goal.relative)
    return None if known is None else _turned_back(known, turned, value.shape[1:])


def _turned_back(expression: Expression, turned: Mapping[str, str], shape: tuple[int, ...]) -> Expression:
    match expression:
        case Source() if expression.name in turned:
            move = Move(split=shape[::-1], axes=(1, 0), shape=shape)
            return Applied(do=move, of=(Source(name=turned[expression.name]),))
        case Applied():
            return Applied(do=expression.do, of=tuple(_turned_back(one, turned, shape) for one in expression.of))
    return expression


def _written_out(
    expression: Expression,
    made: Mapping[str, tuple[Operation, tuple[str, ...]]],
    taken: Set[str],
    values: Values,
    goal: Goal,
) -> Expression:
    """With what layers do that yours has not got, and what plain code makes for these to take."""
    match expression:
        case Source() if expression.name in made:
            operation, inputs = made[expression.name]
            rest = {name: one for name, one in made.items() if name != expression.name}
            parts = tuple(_written_out(Source(name=name), rest, taken, values, goal) for name in inputs)
            return Applied(do=operation, of=parts)
        case Source() if expression.name in taken and expression.name.startswith("the input of "):
            value = values.sources[expression.name]
            others = {name: x for name, x in values.sources.items() if name not in made and not _equal(x, value)}
            known = _found(value, Values(others), goal)
            return expression if known is None else _written_out(known, made, taken - {expression.name}, values, goal)
        case Applied():
            parts = tuple(_written_out(one, made, taken, values, goal) for one in expression.of)
            return Applied(do=expression.do, of=parts)
    return expression


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)


def _tried(edits: Iterator[tuple[Changes, Expression]], screen: Screen, goal: Goal) -> list[tuple[float, Changes]]:
    """What those leave of the whole that leave nothing of a part, and the next best."""
    tried: list[tuple[float, Changes, Expression]] = []
    seen: set[frozenset[tuple[str, str]]] = set()
    with np.errstate(all="ignore"):
        for changes, expression in edits:
            key = frozenset((one.cause, one.yours) for one in changes)
            if key not in seen:
                seen.add(key)
                tried.append((screen.left(expression), changes, expression))
    tried.sort(key=lambda one: (one[0], cost_of(one[1])))
    limit = max(1e-2 * min(goal.before, 1.0), 10 * goal.relative)
    passing = [one for one in tried if one[0] <= limit]
    others = [one for one in tried if limit < one[0] < inf][:NEXT_BEST]
    return [(_left(expression, screen.values, goal), changes) for _, changes, expression in (*passing, *others)]


def _left(expression: Expression, values: Values, goal: Goal) -> float:
    try:
        with np.errstate(all="ignore"):
            return goal.left(values.once(expression))
    except (ValueError, KeyError, IndexError):
        return inf


def _pairs(edits: "_Edits", known: Expression) -> Iterator[tuple[Changes, Expression]]:
    """Two changes of two things; only such as are common."""
    count = 0
    for (first,), expression in edits.of(known, wide=False):
        for (second,), both in edits.of(expression, wide=False):
            # An activation that the first put there is not the reference's to be another.
            put = "activation_extra" in {first.cause, second.cause}
            if put and first.cause.startswith("activation") and second.cause.startswith("activation"):
                continue
            if first.yours != second.yours and (first.slot or first.cause) != (second.slot or second.cause):
                yield (first, replace(second, reference=_of_known(second, known))), both
                count += 1
                if count >= _MOST_PAIRS:
                    return


def _of_known(change: Change, known: Expression) -> str:
    """A formula that the reference has, where it was said of one that was changed already."""
    return f"computes {phrase(known)}" if change.reference.startswith("computes ") else change.reference


def _as_work(known: Expression, values: Values) -> Work:
    """The formula for what rounds its inputs: its sources are they."""
    names = list(_sources(known))

    def computed(work: Work) -> np.ndarray:
        return Values(dict(zip(names, work.inputs, strict=True))).of(known)

    inputs = tuple(values.sources[name] for name in names)
    return Work(operation=Activation(name="identity"), inputs=inputs, arrays={}, function=computed)


def _sources(expression: Expression) -> list[str]:
    match expression:
        case Source():
            return [expression.name]
        case Applied():
            return list(dict.fromkeys(name for one in expression.of for name in _sources(one)))
    return []


def _formula(other: Expression, known: Expression) -> Change:
    """Another formula, of which it can be told at least what it reads otherwise."""
    mine, theirs = set(_sources(other)), set(_sources(known))
    cause = "expression"
    if mine < theirs:
        cause = "branch_missing"
    elif mine > theirs and _VALUE not in theirs:
        cause = "branch_extra"
    elif isinstance(other, Source) and isinstance(known, Source):
        cause = "branch_other"
    return _computes(cause, other, known, cost=2.0)


def _computes(cause: str, other: Expression, known: Expression, cost: float = 1.0, slot: str = "") -> Change:
    return Change(
        cause=cause,
        yours=f"computes {phrase(other)}",
        reference=f"computes {phrase(known)}",
        facts={"expression": phrase(known)},
        cost=cost,
        slot=slot,
    )


class _Edits:
    """What may be otherwise in a formula."""

    def __init__(self, known: Expression, values: Values, goal: Goal, backend: str):
        self.known, self.values, self.goal, self.backend = known, values, goal, backend

    def of(self, whole: Expression, *, wide: bool = True) -> Iterator[Edit]:
        """All single changes; `wide`: what is seldom, too."""
        yield from self._inside(whole, wide)
        yield from self._behind(whole, wide)

    def _inside(self, whole: Expression, wide: bool) -> Iterator[Edit]:
        """At every place of the formula."""
        for path, node in _nodes(whole):
            for cause, other, cost, change in self._at(node, path, wide):
                edited = _replaced(whole, path, other)
                if change is None:
                    change = _computes(cause, edited, self.known, cost, slot=f"{cause}{path}")
                yield (change,), edited

    def _at(
        self, node: Expression, path: tuple[int, ...], wide: bool
    ) -> Iterator[tuple[str, Expression, float, Change | None]]:
        """Cause, what stands there then, cost, and the change where it has words of its own."""
        if isinstance(node, Source):
            if wide and node.name != _VALUE:
                shape = self.values.sources[node.name].shape
                alike = (name for name in self.values.names if self.values.sources[name].shape == shape)
                others = [name for name in alike if name != node.name][:PAIRED]
                yield from (("branch_other", Source(name=name), 1.5, None) for name in others)
            return
        if not isinstance(node, Applied):
            return
        do, inner = node.do, node.of
        match do:
            case Activation():
                yield from _of_activation(node, do, path, wide, gated=self._gates(path))
                if self.backend.startswith("keras"):
                    yield from self._of_tensorflow(node, do, path)
                if isinstance(inner[0], Applied) and isinstance(inner[0].do, Merge):
                    yield from _moved_in(do, inner[0])
                if isinstance(inner[0], Applied) and isinstance(inner[0].do, Pool | GlobalPool):
                    pooled = inner[0]
                    # A maximum and an activation that grows may be told in either order.
                    before = Applied(do=do, of=pooled.of)
                    for cause, other, cost, change in _of_activation(before, do, path, wide, gated=self._gates(path)):
                        yield cause, Applied(do=pooled.do, of=(other,)), cost, change
                    swapped = Applied(do=pooled.do, of=(Applied(do=do, of=pooled.of),))
                    yield "order", swapped, 1.2, None
            case Merge():
                yield from self._of_merge(node, do, wide)
            case Scale():
                yield "scale_factor", inner[0], 1.0, None
            case Move():
                yield from self._of_move(node, do)
            case Attention():
                yield from _of_attention(node, do)
            case Pool() | GlobalPool() | Flatten() | Softmax() | LocalResponseNorm():
                yield from self._of_operation(node, path)

    def _of_tensorflow(
        self, node: Applied, do: Activation, path: tuple[int, ...]
    ) -> Iterator[tuple[str, Expression, float, Change | None]]:
        """GELU of float64 with constants in float32, as TensorFlow has it."""
        inner = node.of[0]
        ways: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"gelu": _erf_form, "gelu_tanh": _tanh_form}
        for at, (name, form) in enumerate(ways.items()):
            cause = "precision" if do.name == name else "activation"
            change = Change(
                cause=cause,
                yours=f"{words.doing(Activation(name=name))} with constants in float32, as TensorFlow does",
                reference=words.doing(do),
                facts=of_activation(do.name, do.slope),
                cost=1.1 + at / 50,
                slot=f"activation{path}",
            )
            value = Computed(words=change.yours, value=lambda form=form: form(self.values.of(inner)))  # type: ignore[misc]
            yield cause, value, change.cost, change

    def _gates(self, path: tuple[int, ...]) -> bool:
        """Whether what stands there is multiplied with something."""
        node: Expression = self.known
        for at in path[:-1]:
            if not isinstance(node, Applied) or at >= len(node.of):
                return False
            node = node.of[at]
        if not (path and isinstance(node, Applied) and node.do == Merge(how="multiply")):
            return False
        sizes = [self.values.of(one).size for one in node.of]
        return sizes[path[-1]] == min(sizes)

    def _of_merge(self, node: Applied, do: Merge, wide: bool) -> Iterator[tuple[str, Expression, float, Change | None]]:
        inner = node.of
        for at in range(len(inner)):
            rest = inner[:at] + inner[at + 1 :]
            kept = rest[0] if len(rest) == 1 else Applied(do=do, of=rest)
            missing = phrase(inner[at])
            change = Change(
                cause="gate" if do.how == "multiply" else "branch_missing",
                yours=f"leaves out {missing}",
                reference={"add": "adds it", "multiply": "multiplies by it"}.get(do.how, "has it"),
                facts={"expression": phrase(self.known)},
                cost=0.9,
                slot=f"left out {missing}",
            )
            yield "branch_missing", kept, 1.0, change
            if do.how == "add":
                twice = Applied(do=do, of=(*inner, inner[at]))
                yield "branch_extra", twice, 1.4, None
            here = inner[at]
            if isinstance(here, Applied) and isinstance(here.do, Activation) and do.how in {"add", "concatenate"}:
                bare = tuple(here.of[0] if place == at else one for place, one in enumerate(inner))
                after = Applied(do=here.do, of=(Applied(do=do, of=bare),))
                yield "activation_before_addition", after, 1.0, None
        for how in ("add", "multiply", "average", "maximum", "subtract"):
            if how != do.how and do.how != "concatenate":
                yield "merge", Applied(do=Merge(how=how), of=inner), 1.1, None
                if how == "subtract":
                    yield "merge", Applied(do=Merge(how=how), of=inner[::-1]), 1.1, None
        if do.how in {"concatenate", "subtract"} and 1 < len(inner) <= 5:
            for order in permutations(range(len(inner))):
                if order != tuple(range(len(inner))):
                    yield "order", Applied(do=do, of=tuple(inner[at] for at in order)), 1.0, None
        if do.how == "concatenate" and len(inner) > 5:
            yield "order", Applied(do=do, of=inner[::-1]), 1.0, None
        for at, one in enumerate(inner):
            for name in COMMON if wide else COMMON[:2]:
                changed = Applied(do=Activation(name=name), of=(one,))
                parts = tuple(changed if place == at else other for place, other in enumerate(inner))
                yield "activation_extra", Applied(do=do, of=parts), 1.3, None
        if do.how == "add" and wide:
            shape = self.goal.reference.shape
            alike = (name for name in self.values.names if self.values.sources[name].shape == shape)
            more = [Source(name=name) for name in alike if Source(name=name) not in inner][:PAIRED]
            yield from (("branch_extra", Applied(do=do, of=(*inner, one)), 1.3, None) for one in more)
            yield from self._factors(node, do)

    def _factors(self, node: Applied, do: Merge) -> Iterator[tuple[str, Expression, float, Change | None]]:
        """A factor of one of two that are added, solved for."""
        if node != self.known or len(node.of) != 2 or not self.goal.same_shape:
            return
        for at, other in ((0, 1), (1, 0)):
            x = np.broadcast_to(self.values.of(node.of[at]), self.goal.yours.shape)
            left = self.goal.yours - self.values.of(node.of[other])
            square = float(np.vdot(x, x))
            for factor in plain(float(np.vdot(x, left)) / square if square else 0.0):
                if factor not in (0.0, 1.0):
                    scaled = Applied(do=Scale(factor=factor), of=(node.of[at],))
                    parts = (scaled, node.of[other]) if at == 0 else (node.of[other], scaled)
                    yield "scale_factor", Applied(do=do, of=parts), 1.5, None

    def _of_move(self, node: Applied, do: Move) -> Iterator[tuple[str, Expression, float, Change | None]]:
        inner = self.values.of(node.of[0])
        for other in moves(node.of[0], inner.shape, (len(inner), *do.shape)):
            if isinstance(other, Applied) and isinstance(other.do, Move) and other != node:
                change = Change(
                    cause="axes_swapped",
                    yours=f"has the axes {_axes(other.do)} of {phrase(node.of[0])}",
                    reference=f"has {_axes(do)}",
                )
                yield "axes_swapped", other, 1.0, change
        if do.shape == inner.shape[1:]:
            yield "axes_swapped", node.of[0], 1.0, None

    def _of_operation(
        self, node: Applied, path: tuple[int, ...]
    ) -> Iterator[tuple[str, Expression, float, Change | None]]:
        """What people get wrong in a layer of that kind, here as plain code."""
        inputs = tuple(self.values.of(one) for one in node.of)
        own = self.values.of(node)
        goal = Goal(own, self.goal.yours, self.goal.limit) if not path else Goal(own, own, self.goal.limit)
        work = Work(operation=node.do, inputs=inputs, arrays={})  # type: ignore[arg-type]
        trials: Iterator[Trial]
        match node.do:
            case Pool():
                trials = pool_edits(work, goal, self.backend)
            case GlobalPool():
                trials = global_edits(work, goal)
            case Flatten():
                trials = flatten_edits(work, goal)
            case Softmax():
                trials = softmax_edits(work, goal)
            case _:
                trials = response_edits(work, goal)
        for trial in trials:
            change = trial.changes[0]
            one: Expression = Computed(words=change.yours, value=trial.work.computed)
            if trial.work.function is None and not trial.work.after and trial.work.inputs is inputs:
                one = Applied(do=trial.work.operation, of=node.of)
            yield change.cause, one, change.cost, change
        if isinstance(node.do, Pool) and set(node.do.strides) == {1}:
            yield "block_missing", node.of[0], 1.5, None

    def _behind(self, whole: Expression, wide: bool) -> Iterator[Edit]:
        """Of the value as a whole."""
        if not (isinstance(whole, Applied) and isinstance(whole.do, Activation)):
            for name in arithmetic.ACTIVATIONS if wide else COMMON[:4]:
                if name != "identity":
                    do = Activation(name=name)
                    change = Change(
                        cause="activation_extra",
                        yours=f"takes {activation_words(name)} of it",
                        reference="takes none",
                        cost=1.0 + list(arithmetic.ACTIVATIONS).index(name) / 50,
                        slot="behind",
                    )
                    yield (change,), Applied(do=do, of=(whole,))
        if not wide:
            return
        soft = Change(cause="softmax_extra", yours="takes the softmax of it", reference="takes none", cost=1.2)
        yield (soft,), Applied(do=Softmax(), of=(whole,))
        yield from self._solved(whole)
        shape = self.goal.reference.shape
        for other in moves(whole, shape, self.goal.yours.shape):
            assert isinstance(other, Applied)
            assert isinstance(other.do, Move)
            change = Change(
                cause="axes_swapped", yours=f"has its axes as {_axes(other.do)}", reference="as they are", cost=1.1
            )
            yield (change,), other

    def _solved(self, whole: Expression) -> Iterator[Edit]:
        """A constant, and dropout: of the reference's value itself."""
        goal = self.goal
        if not goal.same_shape or whole != self.known or goal.yours.size < FEWEST:
            return
        square = float(np.vdot(goal.reference, goal.reference))
        for at, factor in enumerate(plain(float(np.vdot(goal.reference, goal.yours)) / square if square else 0.0)):
            if factor not in (0.0, 1.0):
                change = Change(
                    cause="scale_factor",
                    yours=f"computes {factor:.6g} times as much",
                    reference="once",
                    cost=1.5 + at / 10,
                    facts={"factor": 1 / factor},
                )
                yield (change,), Applied(do=Scale(factor=factor), of=(whole,))
        work = Work(operation=Activation(name="identity"), inputs=(goal.reference,), arrays={})
        for trial in dropout(work, goal):
            yield trial.changes, Computed(words="dropout", value=trial.work.computed)


def _erf_form(x: np.ndarray) -> np.ndarray:
    near = sqrt(2.0) * float(np.float32(sqrt(0.5)))
    return np.asarray(arithmetic.activate("gelu", x * near) / near)


def _tanh_form(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + float(np.float32(0.044715)) * x**3))))


def _of_activation(
    node: Applied, do: Activation, path: tuple[int, ...], wide: bool, *, gated: bool
) -> Iterator[tuple[str, Expression, float, Change | None]]:
    """Another activation, or none; in a gate that is the gate's."""
    inner = node.of[0]
    facts: dict[str, Any] = of_activation(do.name, do.slope)
    slopes = {"leaky_relu": (0.01, 0.2, 0.3, 0.1)}
    for at, name in enumerate(arithmetic.ACTIVATIONS):
        for slope in slopes.get(name, (None,)):
            other = Activation(name=name, slope=slope)
            if other == do or (not wide and name not in COMMON[:5] and name != "identity"):
                continue
            missing = name == "identity"
            cause = "gate" if gated else "activation_missing" if missing else "activation"
            change = Change(
                cause=cause,
                yours=f"takes no activation of {phrase(inner)}" if missing else words.doing(other),
                reference=words.doing(do),
                facts={**facts, "expression": phrase(node)},
                cost=1.0 + at / 50,
                slot=f"activation{path}",
            )
            yield cause, inner if missing else Applied(do=other, of=(inner,)), 1.0, change


def _moved_in(do: Activation, merged: Applied) -> Iterator[tuple[str, Expression, float, Change | None]]:
    """An activation of a sum, as one of what is added."""
    inner = merged.of
    acted = tuple(Applied(do=do, of=(one,)) for one in inner)
    for at in range(len(inner)):
        parts = tuple(acted[place] if place == at else one for place, one in enumerate(inner))
        yield "activation_before_addition", Applied(do=merged.do, of=parts), 1.0, None
    yield "activation_before_addition", Applied(do=merged.do, of=acted), 1.0, None


def _of_attention(node: Applied, do: Attention) -> Iterator[tuple[str, Expression, float, Change | None]]:
    """Another scale, softmax over another axis, other heads, or keys for queries."""
    first = node.of[0]
    channels = first.do.count if isinstance(first, Applied) and isinstance(first.do, Part) else None

    def of(cause: str, yours: str, reference: str, other: Attention, cost: float = 1.0) -> Any:
        change = Change(cause=cause, yours=yours, reference=reference, cost=cost, facts={"axis": -1}, slot=cause)
        return cause, Applied(do=other, of=node.of), cost, change

    known = f"scales by {do.scale:.6g}"
    scales = {
        1.0: "does not scale q k^T",
        do.scale**2: "scales q k^T twice",
        1 / do.scale: "divides by the scale of q k^T",
    }
    if channels is not None:
        scales[1 / sqrt(channels)] = "scales q k^T by all channels, not those of a head"
    for scale, yours in scales.items():
        if abs(scale - do.scale) > 1e-12:
            yield of("scale_factor", yours, known, replace(do, scale=scale))
    single = float(np.float32(do.scale))
    if single != do.scale:
        said = "rounds the scale of q k^T to float32"
        yield of("precision", said, "does not", replace(do, scale=single))
    axis = "takes the softmax over the queries"
    yield of("softmax_axis", axis, "takes it over the keys", replace(do, axis=-2))
    turned = replace(do, in_turn=True)
    yield of("groups_interleaved", "has the channels of its heads in turn", "has them head by head", turned)
    for heads in (1, 2, 3, 4, 6, 8, 12, 16):
        if heads != do.heads:
            scale = do.scale * sqrt(heads / do.heads)
            said = f"has {do.heads} heads"
            yield of("groups", f"has {heads} heads", said, replace(do, heads=heads, scale=scale), 1.3)
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            yield "order", Applied(do=do, of=tuple(node.of[at] for at in order)), 1.1, None


def _axes(do: Move) -> str:
    """The order in which axes lie; those of a patch are split."""
    return "x".join(str(do.split[axis]) for axis in do.axes) + f" (axes {', '.join(str(1 + axis) for axis in do.axes)})"


def _nodes(expression: Expression, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Expression]]:
    """Every part of a formula, with the way to it."""
    yield path, expression
    if isinstance(expression, Applied):
        for at, one in enumerate(expression.of):
            yield from _nodes(one, (*path, at))


def _replaced(whole: Expression, path: tuple[int, ...], other: Expression) -> Expression:
    """The formula with another part there."""
    if not path:
        return other
    assert isinstance(whole, Applied)
    inner = list(whole.of)
    inner[path[0]] = _replaced(inner[path[0]], path[1:], other)
    return Applied(do=whole.do, of=tuple(inner))
