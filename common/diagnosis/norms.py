"""What people get wrong in norms."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from common.diagnosis import words
from common.diagnosis.arithmetic import moments, normalise
from common.diagnosis.linear import bias_edits
from common.diagnosis.trials import FEWEST, Change, Goal, Trial, Work, changed, plain, with_arrays
from common.foreign.operations import BatchNorm, GroupNorm, LayerNorm

# Values that an eps is solved from: those it moves most, by the least variance.
_VALUES = 4096


def norm_edits(work: Work, goal: Goal, *, wide: bool = True) -> Iterator[Trial]:
    """Of a norm of any kind; `wide`: what is seldom, too."""
    yield from _epsilons(work, goal)
    if wide:
        yield from _forms(work)
    yield from bias_edits(work)
    if "scale" in work.arrays:
        change = Change(cause="scale_missing", yours="does not scale", reference="scales", slot="scale")
        yield changed(work, change, arrays=with_arrays(work, scale=None))
        if "bias" in work.arrays:
            yield _swapped(work, "scale", "bias", "scale_bias_swapped", "has scale and bias exchanged")
    match work.operation:
        case BatchNorm():
            yield from _batch_norm(work, wide=wide)
        case LayerNorm() | GroupNorm():
            yield from _others(work)


def _swapped(work: Work, one: str, other: str, cause: str, yours: str) -> Trial:
    arrays = with_arrays(work, **{one: work.arrays[other], other: work.arrays[one]})
    return changed(work, Change(cause=cause, yours=yours, reference="as they are", slot=cause), arrays=arrays)


def _statistics(work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance that a norm uses."""
    operation = work.operation
    assert isinstance(operation, BatchNorm | LayerNorm | GroupNorm)
    if isinstance(operation, BatchNorm):
        return work.arrays["mean"], work.arrays["var"]
    return moments(work.inputs[0], operation)


def _epsilons(work: Work, goal: Goal) -> Iterator[Trial]:
    """Another eps, solved for: of x' = (x - mean) / sqrt(var + eps) all but that is known."""
    operation = work.operation
    assert isinstance(operation, BatchNorm | LayerNorm | GroupNorm)
    solved = [] if work.function is not None else list(plain(solved_eps(work, goal)))
    for at, eps in enumerate(solved):
        if eps >= 0 and eps != operation.eps:
            other = replace(operation, eps=eps)
            change = Change(
                cause="eps",
                yours=words.setting(other, "eps"),
                reference=words.setting(operation, "eps"),
                cost=1.0 + at / 10,
                facts={"eps": operation.eps},
            )
            yield changed(work, change, operation=other)


def _forms(work: Work) -> Iterator[Trial]:
    """Forms of the deviation, as those of another variance under the same root."""
    operation = work.operation
    assert isinstance(operation, BatchNorm | LayerNorm | GroupNorm)
    mean, var = _statistics(work)
    forms = {
        "divides by sqrt(variance) + eps": (np.sqrt(var) + operation.eps) ** 2,
        "divides by the variance + eps": (var + operation.eps) ** 2,
        "multiplies by sqrt(variance + eps)": 1 / (var + operation.eps),
        "takes the variance for 1 / variance": 1 / np.where(var == 0, np.inf, var) + operation.eps,
        "takes the standard deviation for the variance": np.sqrt(var) + operation.eps,
        "takes the larger of variance and eps": np.maximum(var, operation.eps),
    }
    for yours, divisor in forms.items():
        change = Change(
            cause="variance_form", yours=yours, reference="divides by sqrt(variance + eps)", cost=1.5, slot="var"
        )
        yield _with_statistics(work, change, mean, divisor - operation.eps)


def _with_statistics(work: Work, change: Change, mean: np.ndarray, var: np.ndarray) -> Trial:
    """A norm with other statistics."""
    operation = work.operation
    assert isinstance(operation, BatchNorm | LayerNorm | GroupNorm)
    if isinstance(operation, BatchNorm) and mean.ndim == 1:
        return changed(work, change, arrays=with_arrays(work, mean=mean, var=var))

    def normed(work: Work) -> np.ndarray:
        assert isinstance(work.operation, BatchNorm | LayerNorm | GroupNorm)
        return normalise(work.inputs[0], mean, var, work.operation.eps, work.arrays)

    return changed(work, change, function=normed)


def solved_eps(work: Work, goal: Goal) -> float:
    """The eps that makes of the layer's input what yours computes; NaN where none can."""
    x, yours = work.inputs[0], goal.yours
    if x.shape != yours.shape or not x.size:
        return float("nan")
    if not isinstance(work.operation, BatchNorm) and x.ndim < 2:
        return float("nan")
    mean, var = _statistics(work)
    var = np.broadcast_to(var, x.shape).ravel()
    # The variance is a channel's or an image's: values of the least one are next to each other.
    chosen = np.argpartition(var, _VALUES)[:_VALUES] if var.size > _VALUES else np.arange(var.size)
    if isinstance(work.operation, BatchNorm) and var.size > _VALUES:
        rows = x.size // x.shape[-1]
        channels = np.argsort(_statistics(work)[1])[: -(-_VALUES // rows)]
        chosen = (np.arange(rows)[:, None] * x.shape[-1] + channels).ravel()[:_VALUES]
    scale = np.broadcast_to(work.arrays.get("scale", np.ones(())), x.shape).ravel()[chosen]
    bias = np.broadcast_to(work.arrays.get("bias", np.zeros(())), x.shape).ravel()[chosen]
    centred = x.ravel()[chosen] - np.broadcast_to(mean, x.shape).ravel()[chosen]
    output = yours.ravel()[chosen]
    kept = np.abs(centred) > 0.5 * np.sqrt(var[chosen])
    if work.activation is not None:
        # What the activation leaves as it is.
        kept &= np.abs(work.finished(output) - output) == 0
        kept &= output > 0
    scaled = output - bias
    kept &= np.abs(scaled) > 1e-3 * (np.abs(output) + np.abs(bias))
    if kept.sum() < FEWEST:
        return float("nan")
    with np.errstate(all="ignore"):
        values = (centred[kept] * scale[kept] / scaled[kept]) ** 2 - var[chosen][kept]
    return float(np.median(values))


def _batch_norm(work: Work, *, wide: bool) -> Iterator[Trial]:
    operation, x, arrays = work.operation, work.inputs[0], work.arrays
    assert isinstance(operation, BatchNorm)
    if "mean" not in arrays or "var" not in arrays:
        return
    training = bool(work.stored)
    yield _swapped(work, "mean", "var", "mean_var_swapped", "has mean and variance exchanged")
    uncentred = Change(
        cause="norm_not_centred", yours="does not subtract the mean", reference="subtracts it", slot="mean"
    )
    yield changed(work, uncentred, arrays=with_arrays(work, mean=np.zeros_like(arrays["mean"])))
    mean, var = moments(x, operation)
    count = x.size / x.shape[-1]
    unbiased = var * (count / max(count - 1, 1))
    if training:
        change = Change(
            cause="running_statistics",
            yours="norms with its running statistics",
            reference="with those of the batch",
            slot="statistics",
        )
        yield changed(work, change, arrays=with_arrays(work, **work.stored))
        change = Change(
            cause="variance_unbiased",
            yours="norms with the unbiased variance of the batch",
            reference="with the biased one",
            facts={"detail": "norm"},
            slot="var",
        )
        yield changed(work, change, arrays=with_arrays(work, var=unbiased))
    else:
        for other, words_of in ((var, ""), (unbiased, ", the variance unbiased")):
            change = Change(
                cause="batch_statistics",
                yours=f"norms with the statistics of the batch{words_of}",
                reference="with its running ones",
                cost=1.5 if words_of else 1.0,
                slot="statistics",
            )
            yield changed(work, change, arrays=with_arrays(work, mean=mean, var=other))
    if x.ndim > 2 and wide:
        axes = tuple(range(1, x.ndim - 1))
        change = Change(
            cause="norm_axes",
            yours="norms every image by its own statistics",
            reference="all with the same",
            cost=1.5,
            slot="statistics",
        )
        yield _with_statistics(work, change, x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True))


def _others(work: Work) -> Iterator[Trial]:
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, LayerNorm | GroupNorm)
    mean, var = moments(x, operation)
    terms = _terms(x, operation)
    if terms > 1:
        change = Change(
            cause="variance_unbiased",
            yours="norms with the unbiased variance",
            reference="with the biased one",
            facts={"detail": "norm"},
            slot="var",
        )
        yield _with_statistics(work, change, mean, var * (terms / (terms - 1)))
    others: list[LayerNorm | GroupNorm] = []
    if isinstance(operation, LayerNorm):
        others += [replace(operation, axes=axes) for axes in range(1, x.ndim) if axes != operation.axes]
        yield _other(work, replace(operation, centred=not operation.centred), "norm_not_centred", "centred")
    divisors = [parts for parts in range(1, x.shape[-1] + 1) if x.shape[-1] % parts == 0]
    if x.ndim > 2 or isinstance(operation, GroupNorm):
        others += [GroupNorm(eps=operation.eps, groups=parts) for parts in divisors]
    if isinstance(operation, GroupNorm):
        others.append(LayerNorm(eps=operation.eps))
        if 1 < operation.groups < x.shape[-1]:
            yield _grouped_in_turn(work, operation)
    for other in others:
        if other != operation:
            yield _other(work, other, "norm_axes", "groups" if isinstance(other, GroupNorm) else "axes")


def _other(work: Work, other: LayerNorm | GroupNorm, cause: str, name: str) -> Trial:
    own = "groups" if isinstance(work.operation, GroupNorm) else name if name == "centred" else "axes"
    assert work.operation is not None
    yours, reference = words.setting(other, name), words.setting(work.operation, own)
    return changed(work, Change(cause=cause, yours=yours, reference=reference, slot="statistics"), operation=other)


def _grouped_in_turn(work: Work, operation: GroupNorm) -> Trial:
    x = work.inputs[0]
    order = np.arange(x.shape[-1]).reshape(-1, operation.groups).T.ravel()
    back = np.argsort(order)
    mean, var = moments(x[..., order], operation)
    change = Change(
        cause="groups_interleaved",
        yours="norms groups whose channels take turns",
        reference="groups of channels that are next to each other",
        slot="statistics",
    )
    return _with_statistics(work, change, mean[..., back], var[..., back])


def _terms(x: np.ndarray, operation: LayerNorm | GroupNorm) -> int:
    if isinstance(operation, LayerNorm):
        return int(np.prod(x.shape[x.ndim - operation.axes :]))
    return int(np.prod(x.shape[1:])) // operation.groups


def kept_share(before: np.ndarray, after: np.ndarray, new: np.ndarray) -> float:
    """The share of its old value that a statistic keeps where it takes the rest of a new one."""
    way = before - new
    square = float(np.vdot(way, way))
    return float(np.vdot(way, after - new)) / square if square else float("nan")


def facts_of_momentum(kept: float) -> dict[str, Any]:
    """What a remedy says of the share that is kept."""
    return {"old": round(kept, 9), "new": round(1 - kept, 9)}
