"""What people get wrong in what has no window: activations, softmax, local response norms, dropout, constants."""

from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np

from common.diagnosis import arithmetic, words
from common.diagnosis.remedies import of_activation
from common.diagnosis.trials import FEWEST, Change, Goal, Trial, Work, changed, plain
from common.foreign.operations import Activation, LocalResponseNorm, Softmax

# Default slopes of leaky ReLU in the frameworks.
_SLOPES = (0.01, 0.2, 0.3)
# Those of ten of a hundred that people put behind a layer.
_COMMON = ("relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "leaky_relu")
_IDENTITY = Activation(name="identity")
# Dropout's rate against the share of zeros, in standard deviations of that share.
_DEVIATIONS = 6.0


def activation_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of a layer that is an activation."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, Activation)
    for other in _activations(operation):
        yield changed(work, _activation_change(operation, other), operation=other)
    solved = _slope(x, goal, operation.name)
    if solved is not None:
        change = _activation_change(operation, solved)
        yield changed(work, replace(change, cost=change.cost + 0.3), operation=solved)


def _activations(known: Activation) -> Iterator[Activation]:
    """All others."""
    for name in arithmetic.ACTIVATIONS:
        slopes = _SLOPES if name == "leaky_relu" else (None,)
        for slope in slopes:
            other = Activation(name=name, slope=slope)
            if other != known and not (name == known.name and known.slope is None and slope == arithmetic.LEAKY):
                yield other


def _activation_change(known: Activation, other: Activation) -> Change:
    """What yours does with another activation in the place of one."""
    missing, extra = other.name == "identity", known.name == "identity"
    cause = "activation_missing" if missing else "activation_extra" if extra else "activation"
    return Change(
        cause=cause,
        yours=words.doing(other) if not missing else "takes no activation",
        reference=words.doing(known) if not extra else "none",
        facts=of_activation(known.name, known.slope),
        cost=_cost(other),
        slot="activation",
    )


def _cost(other: Activation) -> float:
    """What is common costs less: of values that two activations treat alike it is the likelier one."""
    order = list(arithmetic.ACTIVATIONS)
    return 1.0 + order.index(other.name) / 50


def _slope(x: np.ndarray, goal: Goal, name: str) -> Activation | None:
    """Leaky ReLU or ELU of a slope that is solved from what yours makes of negative values."""
    if x.shape != goal.yours.shape or name not in {"relu", "leaky_relu", "elu", "identity"}:
        return None
    below = x < 0
    if below.sum() < FEWEST:
        return None
    over, given = goal.yours[below], x[below]
    if name == "elu":
        given = np.expm1(given)
    square = float(np.vdot(given, given))
    slope = float(np.vdot(given, over)) / square if square else 0.0
    nice = next((one for one in plain(slope) if abs(one - slope) <= goal.relative * 100), slope)
    return None if not nice else Activation(name="elu" if name == "elu" else "leaky_relu", slope=nice)


def behind(work: Work, goal: Goal, *, single: bool) -> Iterator[Trial]:
    """What yours may do behind the layer, or leave out there; of pairs only what is common."""
    fused = work.activation
    if fused is not None:
        yield changed(work, _activation_change(fused, _IDENTITY), activation=None)
        for other in _activations(fused):
            if other.name != "identity" and (single or other.name in _COMMON):
                yield changed(work, _activation_change(fused, other), activation=other)
    elif not isinstance(work.operation, Activation):
        for name in arithmetic.ACTIVATIONS if single else _COMMON:
            for slope in _SLOPES if name == "leaky_relu" and single else (None,):
                if name != "identity":
                    other = Activation(name=name, slope=slope)
                    yield changed(work, _activation_change(_IDENTITY, other), activation=other)
    if single and goal.same_shape:
        yield from _factor(work, goal)
        yield from dropout(work, goal)


def _factor(work: Work, goal: Goal) -> Iterator[Trial]:
    """A constant times what the reference computes."""
    output = goal.reference
    square = float(np.vdot(output, output))
    if not square or output.size < FEWEST:
        return
    factor = float(np.vdot(output, goal.yours)) / square
    for at, one in enumerate(plain(factor)):
        if one not in (0.0, 1.0):
            change = Change(
                cause="scale_factor",
                yours=f"computes {_factor_words(one)} times as much",
                reference="once",
                cost=1.5 + at / 10,
                facts={"factor": 1 / one},
            )
            yield changed(work, change, after=(*work.after, lambda x, one=one: x * one))


def _factor_words(factor: float) -> str:
    """A number, and the root or fraction that it may be."""
    for under in range(2, 4097):
        if abs(factor - sqrt(under)) <= 1e-12 * factor and sqrt(under) % 1:
            return f"sqrt({under})"
        if abs(factor * sqrt(under) - 1) <= 1e-12 and sqrt(under) % 1:
            return f"1 / sqrt({under})"
        if abs(factor * under - 1) <= 1e-12:
            return f"1 / {under}"
    return f"{factor:.6g}"


def dropout(work: Work, goal: Goal) -> Iterator[Trial]:
    """Zeros among what the reference computes, at random, and all else by one factor."""
    output, yours = goal.reference, goal.yours
    there = output != 0
    zero = there & (yours == 0)
    share, count = float(zero.sum()) / max(int(there.sum()), 1), int(there.sum())
    if not 0.005 < share < 0.995 or not (there & ~zero).any():
        return
    factor = float(np.median(yours[there & ~zero] / output[there & ~zero]))
    mask = np.where(zero, 0.0, factor)
    # Zeros by the sign are an activation's.
    alike = min(float((output[zero] < 0).mean()), float((output[zero] > 0).mean()))
    if alike == 0.0 and 0 < float((output[there] < 0).mean()) < 1:
        return
    if not goal.explained(goal.left(output * mask)):
        return
    whole = _blocks(zero)
    rate = 1 - 1 / factor if factor > 1 else share
    cells = count / max(whole[1], 1)
    if abs(share - rate) > _DEVIATIONS * sqrt(max(rate * (1 - rate), 0.01) / cells):
        return
    change = Change(
        cause="dropout_on",
        yours=f"drops {rate:.3g} of the {whole[0]}" + ("" if factor > 1.001 else " and does not scale the rest"),
        reference="none",
        cost=1.6,
    )
    yield changed(work, change, function=lambda work: output * mask, activation=None, after=())


def _blocks(zero: np.ndarray) -> tuple[str, int]:
    """What is dropped at once, and of how many values: an image, a channel, or a value."""
    axes = tuple(range(1, zero.ndim))
    if zero.ndim > 1 and np.array_equal(zero.all(axis=axes), zero.any(axis=axes)):
        return "images", zero.size // len(zero)
    axes = tuple(range(1, zero.ndim - 1))
    if axes and np.array_equal(zero.all(axis=axes), zero.any(axis=axes)):
        return "channels", int(np.prod(zero.shape[1:-1]))
    return "values", 1


def softmax_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of a softmax."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, Softmax)
    axis = operation.axis

    def of(cause: str, yours: str, reference: str, function: Any, cost: float = 1.0, **facts: Any) -> Trial:
        change = Change(cause=cause, yours=yours, reference=reference, facts=facts, cost=cost, slot="softmax")
        return changed(work, change, function=function)

    yield of("softmax_missing", "takes no softmax", "takes one", lambda work: x)
    yield of("softmax_twice", "takes the softmax twice", "once", lambda work: _softmax(_softmax(x, axis), axis))
    for other in range(-x.ndim, 0):
        if other != axis % x.ndim - x.ndim:
            yours, reference = words.setting(Softmax(axis=other), "axis"), words.setting(operation, "axis")
            yield of("softmax_axis", yours, reference, lambda work, other=other: _softmax(x, other), axis=axis)
    logs = "takes the logarithm of the softmax"
    yield of("softmax_missing", logs, "the softmax itself", lambda work: np.log(_softmax(x, axis)), 1.2)
    sigmoid = Activation(name="sigmoid")
    yield of("activation", "takes the sigmoid", "the softmax", lambda work: arithmetic.activate(sigmoid.name, x), 1.2)


_softmax = arithmetic.softmax


def response_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of a local response norm: x / (k + alpha s) ** beta, of which any one number can be solved."""
    operation, x, yours = work.operation, work.inputs[0], goal.yours
    assert isinstance(operation, LocalResponseNorm)
    if x.shape != yours.shape:
        return
    facts = _facts_of_response(operation)

    def of(other: LocalResponseNorm, name: str, cost: float = 1.0) -> Trial:
        change = Change(
            cause="lrn",
            yours=words.setting(other, name),
            reference=words.setting(operation, name),
            cost=cost,
            facts=facts,
            slot=name,
        )
        return changed(work, change, operation=other)

    yield of(replace(operation, mean=not operation.mean), "mean")
    for size in range(1, min(2 * operation.size + 2, 2 * x.shape[-1])):
        if size != operation.size:
            yield of(replace(operation, size=size), "size")
    rows = x.reshape(-1, x.shape[-1])
    sums = arithmetic.neighbours(rows, operation.size).ravel()
    given, over = rows.ravel(), yours.ravel()
    kept = (given != 0) & (over != 0) & (given * over > 0)
    if kept.sum() < FEWEST:
        return
    # Where the squares weigh most.
    strong = np.flatnonzero(kept)[np.argsort(sums[kept])[-1024:]]
    ratio, sums = given[strong] / over[strong], sums[strong]
    alpha = operation.alpha / operation.size if operation.mean else operation.alpha
    base = ratio ** (1 / operation.beta)
    solved = {
        "alpha": (base - operation.k) / sums * (operation.size if operation.mean else 1),
        "k": base - alpha * sums,
        "beta": np.log(ratio) / np.log(operation.k + alpha * sums),
    }
    for name, values in solved.items():
        for at, value in enumerate(plain(float(np.median(values)))):
            if value > 0:
                yield of(replace(operation, **{name: value}), name, 1.1 + at / 10)  # type: ignore[arg-type]


def _facts_of_response(operation: LocalResponseNorm) -> dict[str, Any]:
    size, alpha = operation.size, operation.alpha
    return {
        "size": size,
        "radius": (size - 1) // 2,
        "torch_alpha": alpha if operation.mean else alpha * size,
        "plain_alpha": alpha / size if operation.mean else alpha,
        "beta": operation.beta,
        "k": operation.k,
    }
