"""What plain code between layers computes, as an expression of what layers gave it; found out from the values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from math import inf, isfinite, isqrt, prod, sqrt

import numpy as np

from common.diagnosis import arithmetic
from common.diagnosis.identify import without_arrays
from common.diagnosis.remedies import activation_words
from common.diagnosis.words import one as same_on_all_axes
from common.foreign.operations import (
    Activation,
    Dropout,
    Flatten,
    GlobalPool,
    LocalResponseNorm,
    Merge,
    Operation,
    Pool,
    Softmax,
)

# So many of the nearest sources are tried alone, in pairs, and in threes.
ALONE, PAIRED, TRIPLED = 24, 10, 6
# Values of a source that pairs are first held against.
_SAMPLE, _ROWS, _CHANNELS = 512, 64, 8
# What a candidate may leave of a part.
_NEAR = 1e-6
# Activations that plain code takes.
COMMON = ("relu", "silu", "gelu", "gelu_tanh", "relu6", "sigmoid", "tanh", "hard_sigmoid", "hard_silu", "leaky_relu")
_GATES = ("sigmoid", "hard_sigmoid", "relu", "tanh", "silu", "softplus")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """By a constant."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Move:
    """Reshaped to `split`, transposed by `axes`, and reshaped to `shape`: nothing is computed. Images are not moved:
    their number is left out of `split` and `shape`."""

    split: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Token:
    """One of a row of tokens."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the channels."""

    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Attention:
    """softmax(scale * q k^T) v, of heads that lie one after another in the channels, or take turns."""

    heads: int
    scale: float
    axis: int = -1
    in_turn: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """A value by its name."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Something done to values."""

    do: Operation | Scale | Move | Token | Part | Attention
    of: tuple["Expression", ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Computed:
    """What can be computed and has no name."""

    words: str
    value: Callable[[], np.ndarray]


Expression = Source | Applied | Computed


class Values:
    """Sources, and what expressions of them come to; each is computed once."""

    def __init__(self, sources: Mapping[str, np.ndarray]):
        self.sources = {name: x.astype(np.float64) for name, x in sources.items() if x.dtype.kind in "fiub"}
        self._known: dict[Expression, np.ndarray] = {}

    def of(self, expression: Expression) -> np.ndarray:
        """The value. Raises `ValueError` where shapes do not fit together."""
        match expression:
            case Source():
                return self.sources[expression.name]
            case Computed():
                return expression.value()
        if expression not in self._known:
            self._known[expression] = applied(expression.do, [self.of(one) for one in expression.of])
        return self._known[expression]

    def once(self, expression: Expression) -> np.ndarray:
        """The value, of which nothing is kept but what it is made of."""
        if isinstance(expression, Applied):
            return applied(expression.do, [self.of(one) for one in expression.of])
        return self.of(expression)

    @cached_property
    def names(self) -> list[str]:
        """Of sources, nearest first, without those that are another's values again."""
        kept: list[str] = []
        for name, x in self.sources.items():
            alike = (one for one in kept if self.sources[one].shape == x.shape)
            if not any(np.array_equal(self.sources[one], x) for one in alike):
                kept.append(name)
        return kept


def applied(do: Operation | Scale | Move | Token | Part | Attention, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Something done to values. Raises `ValueError` where shapes do not fit together."""
    x = inputs[0]
    match do:
        case Scale():
            return x * do.factor
        case Move():
            moved = x.reshape(len(x), *do.split).transpose(0, *(1 + axis for axis in do.axes))
            return moved.reshape(len(x), *do.shape)
        case Token():
            return np.asarray(x.take(do.index, axis=1))
        case Part():
            return np.asarray(x.take(range(do.start, do.start + do.count), axis=-1))
        case Attention():
            return attention(do, *inputs)
        case Merge() if do.how != "concatenate":
            return arithmetic.compute(do, _broadcast(inputs), {})
    return arithmetic.compute(do, inputs, {})


def _broadcast(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """With axes for pixels in those that have none: a gate of channels, for all pixels of a map."""
    most = max(one.ndim for one in inputs)
    return [
        one.reshape(len(one), *(1,) * (most - one.ndim), *one.shape[1:]) if 1 < one.ndim < most else one
        for one in inputs
    ]


def attention(do: Attention, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The core of attention, of (N, tokens, C)."""

    def heads(x: np.ndarray) -> np.ndarray:
        if do.in_turn:
            return x.reshape(*x.shape[:2], -1, do.heads).transpose(0, 3, 1, 2)
        return x.reshape(*x.shape[:2], do.heads, -1).transpose(0, 2, 1, 3)

    weights = arithmetic.softmax(do.scale * (heads(q) @ heads(k).swapaxes(-1, -2)), do.axis)
    mixed = weights @ heads(v)
    turned = mixed.transpose(0, 2, 3, 1) if do.in_turn else mixed.transpose(0, 2, 1, 3)
    return np.asarray(turned.reshape(*q.shape[:2], -1))


# In a formula.
_SHORT = {
    "gelu": "GELU",
    "gelu_tanh": "GELU's tanh form",
    "quick_gelu": "quick GELU",
    "scaled_tanh": "scaled tanh",
    "old_hard_sigmoid": "Keras 2's hard sigmoid",
}


def phrase(expression: Expression) -> str:
    """The formula, as one would write it."""
    match expression:
        case Source():
            return expression.name
        case Computed():
            return expression.words
    inner = [phrase(one) for one in expression.of]
    first = inner[0]
    match expression.do:
        case Activation() as do:
            return f"{_SHORT.get(do.name) or activation_words(do.name, do.slope).removeprefix('the ')}({first})"
        case Merge() as do:
            sign = {"add": " + ", "multiply": " * ", "subtract": " - "}.get(do.how)
            if sign is None:
                return f"{do.how}({', '.join(inner)})"
            return sign.join(_bracketed(one, text) for one, text in zip(expression.of, inner, strict=True))
        case Scale() as do:
            return f"{do.factor:.6g} * {_bracketed(expression.of[0], first)}"
        case Pool() as do:
            return f"{do.mode} pool of {same_on_all_axes(do.window)}({first})"
        case GlobalPool() as do:
            return f"{do.mode} of all pixels({first})"
        case Flatten() as do:
            return f"flatten, channels {do.channels}({first})"
        case Softmax():
            return f"softmax({first})"
        case LocalResponseNorm():
            return f"local response norm({first})"
        case Move() as do:
            return f"reshape({first})"
        case Token() as do:
            return f"token {do.index} of {first}"
        case Part() as do:
            return f"channels {do.start} to {do.start + do.count - 1} of {first}"
        case Attention() as do:
            return f"attention of {do.heads} heads({', '.join(inner)})"
    return f"{type(expression.do).__name__}({', '.join(inner)})"


def _bracketed(expression: Expression, text: str) -> str:
    sums = isinstance(expression, Applied) and isinstance(expression.do, Merge) and expression.do.how != "concatenate"
    return f"({text})" if sums else text


class Screen:
    """A small part of a value, and what expressions come to there, where that can be had without the rest."""

    def __init__(self, values: Values, wanted: np.ndarray, other: np.ndarray | None = None):
        """`wanted` is the value; where `other` differs from it most, the part has some of its places."""
        self.values, self.wanted = values, wanted
        self._parts: dict[str, tuple[Values, np.ndarray]] = {}
        difference = np.abs(wanted - other) if other is not None and other.shape == wanted.shape else None
        self._places = _places(wanted.size, _SAMPLE, None if difference is None else difference.ravel())
        channels = wanted.shape[-1] if wanted.ndim else 1
        rows = None if difference is None or not wanted.ndim else difference.reshape(-1, channels).max(axis=1)
        self._rows = _places(wanted.size // max(channels, 1), _ROWS, rows)

    def left(self, expression: Expression) -> float:
        """What is left of that part, relative to it; infinite where the shape is another."""
        try:
            values, wanted = self.part(_reach(expression))
            made = values.of(expression)
        except (ValueError, KeyError, IndexError):
            return inf
        if made.shape != wanted.shape:
            return inf
        left = float(np.linalg.norm(made - wanted)) / (float(np.linalg.norm(wanted)) or 1.0)
        return left if isfinite(left) else inf

    def part(self, reach: str) -> tuple[Values, np.ndarray]:
        """Sources and the value, cut to what an expression of that reach needs."""
        if reach == "whole":
            return self.values, self.wanted
        if reach not in self._parts:
            sources = {}
            for name, x in self.values.sources.items():
                with suppress(ValueError, IndexError):
                    sources[name] = self._cut(x, reach)
            self._parts[reach] = Values(sources), self._cut(self.wanted, reach)
        return self._parts[reach]

    def _cut(self, x: np.ndarray, reach: str) -> np.ndarray:
        shape = self.wanted.shape
        match reach:
            case "value":
                return np.asarray(np.broadcast_to(_broadcast([self.wanted, x])[1], shape).flat[self._places])
            case "row":
                return np.asarray(np.broadcast_to(x, (*shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])[self._rows])
            case "channel":
                if x.shape[-1] != shape[-1]:
                    raise ValueError("other channels")
                return x[:1, ..., :_CHANNELS]
        return x[:1]


def _places(count: int, most: int, difference: np.ndarray | None) -> np.ndarray:
    """Some of so many places, evenly spread, and those of the greatest difference."""
    spread = np.linspace(0, max(count - 1, 0), min(count, most)).astype(np.intp)
    if difference is None or count <= most:
        return spread
    return np.union1d(spread, np.argpartition(difference, -most)[-most:])


def _reach(expression: Expression) -> str:
    """What of its sources a value of an expression is made of: the value there, the channels there, the whole of a
    channel, of an image, or of all that was computed elsewhere."""
    if isinstance(expression, Source):
        return "value"
    if isinstance(expression, Computed):
        return "whole"
    inner = {_reach(one) for one in expression.of} - {"value"}
    match expression.do:
        case Activation() | Scale():
            own = "value"
        case Merge() as do:
            own = "row" if do.how == "concatenate" else "value"
        case LocalResponseNorm() | Part():
            own = "row"
        case Softmax() as do:
            own = "row" if do.axis == -1 else "image"
        case Pool() | GlobalPool():
            own = "channel"
        case _:
            own = "image"
    both = inner | ({own} - {"value"})
    if len(both) > 1:
        return "whole" if "whole" in both else "image"
    return both.pop() if both else "value"


def found(
    value: np.ndarray, values: Values, *, is_it: Callable[[np.ndarray], bool], relative: float
) -> Expression | None:
    """The simplest expression whose value `is_it`; None where it is none of those that are known here. `relative` is
    what rounding may leave of a part."""
    seen: set[Expression] = set()
    screen = Screen(values, value)
    limit = max(_NEAR, 10 * relative)
    for one in _candidates(value, values, screen, limit):
        if one in seen:
            continue
        seen.add(one)
        with np.errstate(all="ignore"):
            if screen.left(one) > limit:
                continue
        try:
            with np.errstate(all="ignore"):
                if is_it(values.once(one)):
                    return one
        except (ValueError, IndexError):
            continue
    return None


def _candidates(value: np.ndarray, values: Values, screen: Screen, limit: float) -> Iterator[Expression]:
    names = values.names[:ALONE]
    alike = [name for name in names if values.sources[name].shape == value.shape]
    yield from (Source(name=name) for name in alike)
    for name in alike:
        yield from _alone(Source(name=name), values.sources[name], value)
    yield from _sums(value, values, names, screen, limit)
    yield from _joined(value, names, screen, limit)
    for name in names:
        if values.sources[name].shape != value.shape:
            yield from _reshaped(Source(name=name), values.sources[name], value)
    yield from _attentions(value, values, names)
    yield from _pooled(value, values, names)


def _alone(source: Source, x: np.ndarray, value: np.ndarray) -> Iterator[Expression]:
    """Of one source of the same shape."""
    for operation in without_arrays(x, value):
        if isinstance(operation, Pool) and not _has_shape(x, operation, value.shape):
            continue
        if not isinstance(operation, Dropout):
            yield Applied(do=operation, of=(source,))
    square = float(np.vdot(x, x))
    if square:
        factor = float(np.vdot(x, value)) / square
        yield Applied(do=Scale(factor=_plain(factor)), of=(source,))
    yield from moves(source, x.shape, value.shape)


def _plain(factor: float) -> float:
    """A factor that was solved for, as it was written."""
    near = (
        float(f"{factor:.3g}"),
        *(1 / under for under in range(2, 65)),
        *(1 / sqrt(under) for under in range(2, 1025)),
    )
    return next((one for one in near if one and abs(factor / one - 1) < 1e-12), factor)


def moves(source: Expression, shape: tuple[int, ...], target: tuple[int, ...]) -> Iterator[Expression]:
    """All orders in which the axes of one may be put into the shape of the other; patches of an image too."""
    inner, wanted = shape[1:], target[1:]
    if len(shape) < 2 or shape[0] != target[0] or prod(inner) != prod(wanted) or len(inner) > 4:
        return
    for axes in sorted(permutations(range(len(inner)))):
        if axes != tuple(range(len(inner))) or inner != wanted:
            yield Applied(do=Move(split=inner, axes=axes, shape=wanted), of=(source,))
    if len(inner) == 3 and len(wanted) == 2:
        size = isqrt(max(wanted[1] // inner[2], 1))
        if size > 1 and size * size * inner[2] == wanted[1] and inner[0] % size == 0 and inner[1] % size == 0:
            split = (inner[0] // size, size, inner[1] // size, size, inner[2])
            for tokens in ((0, 2), (2, 0)):
                for order in permutations((1, 3, 4)):
                    yield Applied(do=Move(split=split, axes=(*tokens, *order), shape=wanted), of=(source,))


def _reshaped(source: Source, x: np.ndarray, value: np.ndarray) -> Iterator[Expression]:
    """Of one source of another shape, moved or in part."""
    if x.ndim > 2 and value.ndim == 2 and prod(x.shape[1:]) == value.shape[1]:
        yield Applied(do=Flatten(channels="last"), of=(source,))
        yield Applied(do=Flatten(channels="first"), of=(source,))
    yield from moves(source, x.shape, value.shape)
    if x.ndim == 3 and value.ndim == 2 and x.shape[2] == value.shape[1]:
        yield from (Applied(do=Token(index=index), of=(source,)) for index in (0, x.shape[1] - 1))
    if x.shape[:-1] == value.shape[:-1] and x.shape[-1] > value.shape[-1]:
        count = value.shape[-1]
        yield from (Applied(do=Part(start=at, count=count), of=(source,)) for at in range(0, x.shape[-1], count))


def _pooled(value: np.ndarray, values: Values, names: Sequence[str]) -> Iterator[Expression]:
    """A pool, of an activation maybe, flattened maybe."""
    for name in names:
        x, source = values.sources[name], Source(name=name)
        if x.ndim < 3:
            continue
        flat = value.ndim == 2 and x.ndim > 3
        likes = [value]
        if flat and value.shape[1] % x.shape[-1] == 0:
            pixels = value.shape[1] // x.shape[-1]
            rows = range(1, x.shape[1] + 1) if x.ndim == 4 else ()
            sides = [(one, pixels // one) for one in rows if pixels % one == 0 and pixels // one <= x.shape[2]]
            likes += [np.empty((len(x), *one, x.shape[-1])) for one in sides]
        for like in likes:
            for operation in without_arrays(x, like):
                if isinstance(operation, Pool) and not _has_shape(x, operation, like.shape):
                    continue
                if not isinstance(operation, Pool | GlobalPool | Flatten):
                    continue
                for activation in ("identity", *COMMON[:4]):
                    do = Activation(name=activation)
                    inner = source if activation == "identity" else Applied(do=do, of=(source,))
                    pooled = Applied(do=operation, of=(inner,))
                    if like is value:
                        yield pooled
                    else:
                        yield Applied(do=Flatten(channels="first"), of=(pooled,))
                        yield Applied(do=Flatten(channels="last"), of=(pooled,))


def _has_shape(x: np.ndarray, operation: Pool, shape: tuple[int, ...]) -> bool:
    try:
        return (len(x), *arithmetic.pool_counts(x.shape[1:-1], operation), x.shape[-1]) == shape
    except ValueError:
        return False


def _sums(
    value: np.ndarray, values: Values, names: Sequence[str], screen: Screen, limit: float
) -> Iterator[Expression]:
    """Sums, products and the like of two and three sources or activations of them, and activations of these."""
    terms = list(_terms(value, values, names))
    if not value.size or len(terms) < 2:
        return
    sampled, wanted = screen.part("value")
    most = limit * float(np.linalg.norm(wanted)) + 1e-300

    def near(part: np.ndarray) -> bool:
        return float(np.linalg.norm(part - wanted)) <= most

    parts = {term: sampled.of(term) for term in terms}
    plain = [term for term in terms if isinstance(term, Source)]
    three = list(combinations(plain[:TRIPLED], 3))
    with np.errstate(all="ignore"):
        for chosen in [*combinations(terms, 2), *three]:
            for how in ("add", "multiply", "subtract", "average", "maximum"):
                for order in (chosen, chosen[::-1]) if how == "subtract" else (chosen,):
                    total = arithmetic.merge(how, [parts[one] for one in order])
                    merged = Applied(do=Merge(how=how), of=order)
                    if near(total):
                        yield merged
                    if how in {"add", "multiply"} and all(isinstance(one, Source) for one in chosen):
                        for name in COMMON:
                            if near(arithmetic.activate(name, total)):
                                yield Applied(do=Activation(name=name), of=(merged,))
        for one, other in combinations(plain, 2):
            factors = np.linalg.lstsq(np.stack([parts[one], parts[other]], 1), wanted, rcond=None)[0]
            if near(factors[0] * parts[one] + factors[1] * parts[other]) and np.all(factors):
                scaled = (
                    term if abs(factor - 1) < 1e-12 else Applied(do=Scale(factor=_plain(float(factor))), of=(term,))
                    for term, factor in zip((one, other), factors, strict=True)
                )
                yield Applied(do=Merge(how="add"), of=tuple(scaled))


def _terms(value: np.ndarray, values: Values, names: Sequence[str]) -> Iterator[Expression]:
    """What a sum or product may be of: sources of the shape, or that broadcast to it, and activations of them."""
    fitting = []
    for name in names:
        x = values.sources[name]
        if x.ndim < 2 or x.ndim > value.ndim:
            continue
        shape = _broadcast([value, x])[1].shape
        if all(one in (1, size) for one, size in zip(shape, value.shape, strict=True)):
            fitting.append((Source(name=name), shape == value.shape))
    for at, (source, whole) in enumerate(fitting[:PAIRED]):
        yield source
        for name in (*COMMON[:4], "sigmoid") if whole and at < TRIPLED else () if whole else _GATES:
            yield Applied(do=Activation(name=name), of=(source,))


def _joined(value: np.ndarray, names: Sequence[str], screen: Screen, limit: float) -> Iterator[Expression]:
    """Channels of several sources, or of activations of them, one after another."""
    parts: list[Expression] = []
    start = 0
    if value.ndim < 2:
        return
    sampled, wanted = screen.part("row")
    while start < value.shape[-1]:
        part = next(_matching(wanted[:, start:], names, sampled, limit), None)
        if part is None:
            return
        parts.append(part)
        start += sampled.of(part).shape[-1]
    if len(parts) > 1:
        yield Applied(do=Merge(how="concatenate"), of=tuple(parts))


def _matching(wanted: np.ndarray, names: Sequence[str], sampled: Values, limit: float) -> Iterator[Expression]:
    """Sources whose channels these begin with, the widest first."""
    known = [name for name in names if name in sampled.sources]
    for name in sorted(known, key=lambda name: -sampled.sources[name].shape[-1]):
        count = sampled.sources[name].shape[-1]
        if count > wanted.shape[-1]:
            continue
        there = wanted[:, :count]
        for activation in ("identity", *COMMON[:2]):
            source = Source(name=name)
            one = source if activation == "identity" else Applied(do=Activation(name=activation), of=(source,))
            if np.linalg.norm(sampled.of(one) - there) <= limit * (np.linalg.norm(there) + 1e-300):
                yield one


def _attentions(value: np.ndarray, values: Values, names: Sequence[str]) -> Iterator[Expression]:
    """The core of attention, of three sources or of three parts of one."""
    if value.ndim != 3:
        return
    channels = value.shape[-1]
    alike = [Source(name=name) for name in names if values.sources[name].shape == value.shape][:4]
    threes: list[tuple[Expression, ...]] = list(permutations(alike, 3))
    for name in names[:4]:
        if values.sources[name].shape == (*value.shape[:-1], 3 * channels):
            source = Source(name=name)
            parts = [Applied(do=Part(start=at * channels, count=channels), of=(source,)) for at in range(3)]
            threes.append(tuple(parts))
    for three in threes:
        for heads in range(1, min(channels, 32) + 1):
            if channels % heads == 0:
                do = Attention(heads=heads, scale=1 / sqrt(channels / heads))
                yield Applied(do=do, of=three)
    for three in threes:
        for heads in range(1, min(channels, 32) + 1):
            if channels % heads == 0:
                for scale in (1.0, 1 / sqrt(channels)):
                    yield Applied(do=Attention(heads=heads, scale=scale), of=three)
