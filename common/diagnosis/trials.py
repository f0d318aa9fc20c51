"""How hypotheses are tried: the reference's layer is changed, computed, and held against what yours computes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf, isfinite
from typing import Any

import numpy as np

from common.diagnosis import arithmetic
from common.diagnosis.causes import AND, CAUSES
from common.diagnosis.evidence import Finding
from common.diagnosis.remedies import remedy
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    GlobalPool,
    LayerNorm,
    LocalResponseNorm,
    Operation,
    Pool,
)
from common.parity.levels import EXPLAINED, EXPLAINED_SHARE

# Pairs of changes that are tried where no single one explains it.
MOST_PAIRS = 6000
# Findings that a search comes to, and those among them that leave something.
MOST, NEXT_BEST = 4, 2
# A number is not solved for from fewer values than these: one of fewer proves nothing.
FEWEST = 8
# A sample has so many rows or channels of the greatest difference, and as many evenly spread.
_ROWS, _CHANNELS = 128, 4
_ORDER = list(CAUSES)
# Causes whose numbers are fitted to what yours computes.
_SOLVED = frozenset({"scale_factor", "input_range", "input_normalised"})


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that yours does otherwise. The sentences of `Finding`; `facts` are what its remedy speaks of."""

    cause: str
    yours: str
    reference: str
    cost: float = 1.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    slot: str = ""  # what it sets: two changes of one thing are no pair; "" for the cause


Changes = tuple[Change, ...]


def cost_of(changes: Sequence[Change]) -> float:
    """Of all together."""
    return sum(one.cost for one in changes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A layer that can be computed.

    A norm's statistics are arrays, so of a pass in training mode those of the batch; `stored` has the running ones
    then. `function` is for what no operation says.
    """

    operation: Operation
    inputs: tuple[np.ndarray, ...]
    arrays: Mapping[str, np.ndarray]
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)
    activation: Activation | None = None  # fused into the layer
    after: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()  # of each value, or of each pixel's channels
    function: Callable[["Work"], np.ndarray] | None = None

    def finished(self, output: np.ndarray) -> np.ndarray:
        """With what stands behind the operation."""
        if self.activation is not None:
            output = arithmetic.activate(self.activation.name, output, self.activation.slope)
        for one in self.after:
            output = one(output)
        return output

    def computed(self) -> np.ndarray:
        """The output."""
        if self.function is not None:
            return self.finished(self.function(self))
        return self.finished(arithmetic.compute(self.operation, self.inputs, self.arrays))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A layer with changes."""

    changes: tuple[Change, ...]
    work: Work

    @property
    def cost(self) -> float:
        return cost_of(self.changes)

    @property
    def key(self) -> frozenset[tuple[str, str]]:
        return frozenset((one.cause, one.yours) for one in self.changes)


class Goal:
    """What yours computes, to be made of what the reference computes."""

    def __init__(self, reference: np.ndarray, yours: np.ndarray, limit: float):
        kind = "float32" if "float32" in {str(reference.dtype), str(yours.dtype)} else "float64"
        self.reference, self.yours = reference.astype(np.float64), yours.astype(np.float64)
        self.relative = EXPLAINED[kind]
        self.limit = limit
        self.norm = float(np.linalg.norm(self.reference)) or 1.0
        self.same_shape = reference.shape == yours.shape

    @cached_property
    def before(self) -> float:
        """The difference as it is; infinite where the shapes differ."""
        return self.left(self.reference)

    def left(self, prediction: np.ndarray) -> float:
        """What a prediction leaves, of the reference's norm."""
        if prediction.shape != self.yours.shape:
            return inf
        left = float(np.linalg.norm(prediction - self.yours)) / self.norm
        return left if isfinite(left) else inf

    def explained(self, left: float) -> bool:
        """Whether that is rounding."""
        rounding = max(self.relative, self.limit / self.norm)
        return left <= rounding and (left <= EXPLAINED_SHARE * self.before or left * self.norm <= self.limit)

    def is_reference(self, prediction: np.ndarray) -> bool:
        """Whether it is what the reference computes, but for rounding."""
        if prediction.shape != self.reference.shape:
            return False
        left = float(np.linalg.norm(prediction - self.reference))
        return left <= max(self.relative * self.norm, self.limit)


Edits = Callable[[Work, Goal], Iterator[Trial]]


class Sample:
    """A small part of an output, of the places where the two differ most and of some others, borders among them."""

    def __init__(self, work: Work, goal: Goal):
        yours = goal.yours
        self.goal = goal
        self.image, self.at, self.channels, self.rows = 0, [], np.arange(0), np.arange(0)
        self.kernels: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.kind: type | None = None
        if yours.ndim < 2 or work.function is not None or not yours.size:
            return
        difference = np.abs(goal.reference - yours) if goal.same_shape else np.zeros(yours.shape)
        difference = np.nan_to_num(difference, nan=0.0, posinf=0.0)
        operation = work.operation
        if isinstance(operation, Conv):
            self.kind = Conv
            top = np.unravel_index(int(difference.argmax()), yours.shape)
            self.image = int(top[0])
            for size, place in zip(yours.shape[1:-1], top[1:-1], strict=True):
                some = {0, 1, size // 2, size - 2, size - 1, int(place)}
                self.at.append(np.array(sorted(one for one in some if 0 <= one < size)))
            self.channels = _most(difference.reshape(-1, yours.shape[-1]).max(axis=0), _CHANNELS)
            if operation.groups > 1:
                self.channels = np.arange(yours.shape[-1])
        elif isinstance(operation, Pool | GlobalPool):
            self.kind = Pool
            self.image = int(np.unravel_index(int(difference.argmax()), yours.shape)[0])
            self.channels = _most(difference.reshape(-1, yours.shape[-1]).max(axis=0), _CHANNELS)
        elif _by_rows(work) and yours.shape[:-1] == work.inputs[0].shape[:-1]:
            self.kind = type(operation)
            self.rows = _most(difference.reshape(-1, yours.shape[-1]).max(axis=1), _ROWS)
        self.wanted = self.of(yours)
        before = float(np.linalg.norm(self.wanted - self.of(goal.reference))) if goal.same_shape else 0.0
        each = goal.norm / max(np.sqrt(goal.reference.size), 1.0)
        self.limit = 1e-2 * before + 10 * goal.relative * each * float(np.sqrt(self.wanted.size))

    def of(self, output: np.ndarray) -> np.ndarray:
        """That part of an output."""
        if self.kind is Conv:
            output = output[self.image]
            for axis, at in enumerate(self.at):
                output = output.take(at, axis=axis)
            return np.asarray(output[..., self.channels])
        if self.kind is Pool:
            return np.asarray(output[self.image][..., self.channels])
        return output.reshape(-1, output.shape[-1])[self.rows] if self.kind else output

    def _some(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel's part that makes those channels. To gather it costs more than the product: it is kept, with the
        kernel, whose identity is not another's as long as it lives."""
        if id(kernel) not in self.kernels:
            self.kernels[id(kernel)] = kernel, kernel[..., self.channels]
        return self.kernels[id(kernel)][1]

    def predicted(self, work: Work) -> np.ndarray:
        """That part of a layer's output; computed alone where that can be."""
        operation, whole = work.operation, self.goal.yours.shape
        if work.function is None and self.kind is Conv and isinstance(operation, Conv):
            kernel, bias = work.arrays["kernel"], work.arrays.get("bias")
            if arithmetic.conv_shape(work.inputs[0], kernel, operation) != whole:
                raise ValueError("another shape")
            if operation.groups == 1 and not work.after:
                kernel, bias = self._some(kernel), bias if bias is None else bias[self.channels]
            x = work.inputs[0][self.image : self.image + 1]
            output = work.finished(arithmetic.conv(x, kernel, operation, bias=bias, at=self.at))[0]
            return np.asarray(output if output.shape[-1] == len(self.channels) else output[..., self.channels])
        if work.function is None and self.kind is Pool and isinstance(operation, Pool | GlobalPool):
            x = work.inputs[0][self.image : self.image + 1][..., self.channels]
            output = work.finished(arithmetic.compute(operation, (x,), {}))
            if output.shape[1:-1] != whole[1:-1]:
                raise ValueError("another shape")
            return np.asarray(output[0])
        if work.function is None and self.kind not in {None, Conv, Pool} and _by_rows(work):
            part = tuple(one.reshape(-1, one.shape[-1])[self.rows] for one in work.inputs)
            return work.finished(arithmetic.compute(operation, part, work.arrays))
        output = work.computed()
        if output.shape != whole:
            raise ValueError("another shape")
        return self.of(output)

    def left(self, work: Work) -> float:
        """What a hypothesis leaves of it; infinite where it makes no such output."""
        try:
            with np.errstate(all="ignore"):
                left = float(np.linalg.norm(self.predicted(work) - self.wanted))
        except (ValueError, KeyError, IndexError):
            return inf
        return left if isfinite(left) else inf


def _by_rows(work: Work) -> bool:
    """Whether every pixel's channels are computed of that pixel's alone."""
    operation = work.operation
    if isinstance(operation, LayerNorm):
        return operation.axes == 1
    return isinstance(operation, Activation | BatchNorm | Dense | LocalResponseNorm) and work.inputs[0].ndim > 1


def _most(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the greatest values, and as many evenly spread."""
    if len(values) <= 2 * count:
        return np.arange(len(values))
    spread = np.linspace(0, len(values) - 1, count).astype(np.intp)
    return np.union1d(np.argpartition(values, -count)[-count:], spread)


def search(base: Work, edits: Edits, goal: Goal, *, place: str, backend: str) -> list[Finding]:
    """Findings, best first: those that explain the difference, then the next best. None explains it where the list is
    empty."""
    sample = Sample(base, goal) if goal.yours.ndim >= 2 and goal.yours.size else None
    singles = _unique(edits(base, goal))
    lefts = [_left(trial, sample) for trial in singles]
    found = _proven(singles, lefts, sample, goal)
    tried = list(zip(lefts, singles, strict=True))
    if not any(goal.explained(left) for left, _ in found):
        pairs = list(_pairs(sorted(tried, key=lambda one: one[0]), edits, goal))
        found += _proven(pairs, [_left(trial, sample) for trial in pairs], sample, goal)
    return findings(((left, trial.changes) for left, trial in found), goal, place=place, backend=backend)


def findings(found: Iterable[tuple[float, Changes]], goal: Goal, *, place: str, backend: str) -> list[Finding]:
    """What was tried, with what each leaves, as findings, best first; none where none of them explains it."""
    rows = list(found)
    # What is solved for always leaves a little less.
    rows = [one for one in rows if goal.explained(one[0]) or not _fitted(one[1])]
    best = sorted((one for one in rows if goal.explained(one[0])), key=lambda one: (cost_of(one[1]), one[0]))
    if not best:
        return []
    rest = sorted((one for one in rows if not goal.explained(one[0]) and one[0] < inf), key=lambda one: one[0])
    chosen = _by_cause([*best, *rest])
    explaining = [one for one in chosen if goal.explained(one[0])]
    others = [one for one in chosen if not goal.explained(one[0])]
    kept = [*explaining[: MOST - min(NEXT_BEST, len(others))], *others[:NEXT_BEST]]
    return [as_finding(changes, left, goal, place=place, backend=backend) for left, changes in kept]


def as_finding(changes: Sequence[Change], left: float, goal: Goal, *, place: str, backend: str) -> Finding:
    """One finding of all changes together."""
    changes = sorted(changes, key=lambda one: _ORDER.index(one.cause.partition(AND)[0]))
    # Of two changes of one cause the first knows the reference as it is; the second is of what the first made of it.
    sentences = {one.cause: remedy(one.cause, backend, one.facts) for one in reversed(changes)}
    return Finding(
        cause=AND.join(dict.fromkeys(one.cause for one in changes)),
        place=place,
        yours=" and ".join(one.yours for one in changes),
        reference=" and ".join(one.reference for one in changes),
        remedy=" ".join(one for one in reversed(sentences.values()) if one),
        before=goal.before,
        after=left,
        cost=cost_of(changes),
    )


def _fitted(changes: Changes) -> bool:
    return any(one.cause in _SOLVED for one in changes)


def _by_cause(rows: Sequence[tuple[float, Changes]]) -> list[tuple[float, Changes]]:
    """The first of each cause: a second number for one eps is no second answer."""
    first: dict[tuple[str, ...], tuple[float, Changes]] = {}
    for row in rows:
        first.setdefault(tuple(sorted(one.cause for one in row[1])), row)
    return list(first.values())


def _unique(trials: Iterable[Trial]) -> list[Trial]:
    """Each once, at the lowest cost, with what is known of it from all."""
    kept: dict[frozenset[tuple[str, str]], Trial] = {}
    for trial in trials:
        known = kept.setdefault(trial.key, trial)
        if len(trial.changes) == 1:
            one, other = known.changes[0], trial.changes[0]
            both = replace(one, cost=min(one.cost, other.cost), facts={**other.facts, **one.facts})
            kept[trial.key] = replace(known, changes=(both,))
    return list(kept.values())


def _left(trial: Trial, sample: Sample | None) -> float:
    return 0.0 if sample is None else sample.left(trial.work)


def _proven(
    trials: Sequence[Trial], lefts: Sequence[float], sample: Sample | None, goal: Goal
) -> list[tuple[float, Trial]]:
    """What those leave of the whole that leave nothing of the sample, and the next best."""
    order = sorted(range(len(trials)), key=lambda at: (lefts[at], trials[at].cost))
    limit = 0.0 if sample is None else sample.limit
    passing = [at for at in order if lefts[at] <= limit]
    found: list[tuple[float, Trial]] = []
    for at in [
        *passing,
        *[one for one in order if lefts[one] > limit and not _fitted(trials[one].changes)][:NEXT_BEST],
    ]:
        if lefts[at] == inf:
            continue
        try:
            with np.errstate(all="ignore"):
                found.append((goal.left(trials[at].work.computed()), trials[at]))
        except (ValueError, KeyError, IndexError):
            continue
    return found


def _pairs(tried: Sequence[tuple[float, Trial]], edits: Edits, goal: Goal) -> Iterator[Trial]:
    """Each change with each other, the nearest first; at most `MOST_PAIRS`."""
    seen: set[frozenset[tuple[str, str]]] = set()
    for _, first in tried:
        if len(first.changes) > 1:
            continue
        try:
            with np.errstate(all="ignore"):
                seconds = list(edits(first.work, goal))
        except (ValueError, KeyError, IndexError):
            continue
        for second in seconds:
            slots = {one.slot or one.cause for one in second.changes}
            if len(second.changes) > 1 or (first.changes[0].slot or first.changes[0].cause) in slots:
                continue
            trial = Trial(changes=(*first.changes, *second.changes), work=second.work)
            if trial.key in seen:
                continue
            seen.add(trial.key)
            yield trial
            if len(seen) >= MOST_PAIRS:
                return


def changed(work: Work, change: Change, **settings: Any) -> Trial:
    """A trial of one change; `settings` are fields of `Work`."""
    return Trial(changes=(change,), work=replace(work, **settings))


def with_arrays(work: Work, **arrays: np.ndarray | None) -> dict[str, np.ndarray]:
    """A layer's arrays with some others; without those that are None."""
    return {role: one for role, one in {**work.arrays, **arrays}.items() if one is not None}


def plain(value: float) -> Iterator[float]:
    """A number that was solved for, as a person would have written it: with one digit, two, three, and as it is."""
    if not isfinite(value):
        return
    yield from dict.fromkeys([*(float(f"{value:.{digits}e}") for digits in range(3)), value])
