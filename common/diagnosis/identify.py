"""What a layer does: as it says, or found out from what went in, what came out, and its arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

import numpy as np

from common.diagnosis import arithmetic
from common.diagnosis.norms import solved_eps
from common.diagnosis.trials import Goal, Sample, Work, plain
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalPool,
    GroupNorm,
    LayerNorm,
    LocalResponseNorm,
    Merge,
    Operation,
    Pool,
    Softmax,
)

# What a layer without words of its own may be: as AlexNet, Caffe and the frameworks' defaults have it.
_RESPONSES = tuple(
    LocalResponseNorm(size=size, alpha=alpha, beta=0.75, k=k, mean=mean)
    for size in (5, 3, 9, 11)
    for alpha in (1e-4, 1e-3, 1.0, 5e-4)
    for k in (1.0, 2.0)
    for mean in (True, False)
)
# What layers have for an activation of their own.
FUSED = ("relu", "relu6", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "leaky_relu", "elu", "hard_silu", "softplus")
_NORMS = 1e-5, 1e-3, 1e-6


def base_work(
    operation: Operation,
    inputs: tuple[np.ndarray, ...],
    arrays: Mapping[str, np.ndarray],
    training: bool,
) -> Work:
    """A layer as it computes in that mode: of a batch norm in training mode, with the statistics of its batch."""
    if isinstance(operation, BatchNorm) and (training or "mean" not in arrays or "var" not in arrays):
        mean, var = arithmetic.moments(inputs[0], operation)
        stored = {role: arrays[role] for role in ("mean", "var") if role in arrays}
        return Work(operation=operation, inputs=inputs, arrays={**arrays, "mean": mean, "var": var}, stored=stored)
    return Work(operation=operation, inputs=inputs, arrays=arrays)


def identified(
    operation: Operation | None,
    inputs: tuple[np.ndarray, ...],
    arrays: Mapping[str, np.ndarray],
    output: np.ndarray,
    *,
    training: bool,
    limit: float,
) -> Work | None:
    """The layer as something that can be computed, and that computes this output; None where it is nothing known.

    What it says of itself is believed where the output bears it out, with an activation fused behind it too.
    """
    goal = Goal(output, output, limit)
    candidates = _guesses(inputs, arrays, output) if operation is None else [operation]
    for one in candidates:
        if (work := _borne_out(one, inputs, arrays, goal, training)) is not None:
            return work
    return None if operation is None else identified(None, inputs, arrays, output, training=training, limit=limit)


def _borne_out(
    operation: Operation,
    inputs: tuple[np.ndarray, ...],
    arrays: Mapping[str, np.ndarray],
    goal: Goal,
    training: bool,
) -> Work | None:
    try:
        work = base_work(operation, inputs, arrays, training)
        sample = Sample(work, goal)
        for one in _versions(work, goal):
            if sample.left(one) <= sample.limit and goal.is_reference(one.computed()):
                return one
    except (ValueError, KeyError, IndexError):
        return None
    return None


def _versions(work: Work, goal: Goal) -> Iterator[Work]:
    """It, with another eps where it is a norm, and with an activation behind it."""
    yield work
    operation = work.operation
    if isinstance(operation, BatchNorm | LayerNorm | GroupNorm):
        for eps in plain(solved_eps(work, goal)):
            if eps >= 0:
                yield replace(work, operation=replace(operation, eps=eps))
    if not isinstance(operation, Activation | Softmax | Flatten | Pool | GlobalPool):
        for name in FUSED:
            fused = replace(work, activation=Activation(name=name))
            yield fused
            if isinstance(operation, BatchNorm | LayerNorm | GroupNorm):
                for eps in _NORMS:
                    yield replace(fused, operation=replace(operation, eps=eps))


def _guesses(
    inputs: tuple[np.ndarray, ...], arrays: Mapping[str, np.ndarray], output: np.ndarray
) -> Iterator[Operation]:
    """What it may be, by the roles of its arrays and the shapes that go in and come out."""
    x = inputs[0]
    if "table" in arrays:
        yield Embedding()
    kernel = arrays.get("kernel")
    if kernel is not None:
        if kernel.ndim == 2:
            yield Dense()
        elif kernel.ndim == x.ndim == output.ndim:
            yield from _convolutions(x, kernel, output)
    elif "mean" in arrays or "var" in arrays:
        yield BatchNorm(eps=1e-5, momentum=None)
    elif "scale" in arrays:
        yield from _norms(x, arrays["scale"])
    elif len(inputs) > 1:
        yield from (Merge(how=how) for how in ("add", "multiply", "concatenate", "average", "maximum", "subtract"))
    else:
        yield from without_arrays(x, output)


def _convolutions(x: np.ndarray, kernel: np.ndarray, output: np.ndarray) -> Iterator[Conv]:
    axes = x.ndim - 2
    groups = x.shape[-1] // max(kernel.shape[-2], 1)
    for step, by in product(range(1, 5), range(1, 4)):
        one = Conv(strides=(step,) * axes, padding="same", dilation=(by,) * axes, groups=groups)
        totals = [
            (count - 1) * step + (span - 1) * by + 1 - size
            for size, span, count in zip(x.shape[1:-1], kernel.shape[:-2], output.shape[1:-1], strict=True)
        ]
        yield one
        for more in range(step):
            pads = tuple(max(total + more, 0) for total in totals)
            yield replace(one, padding=tuple((pad // 2, pad - pad // 2) for pad in pads))
            yield replace(one, padding=tuple((pad - pad // 2, pad // 2) for pad in pads))
            yield replace(one, padding=tuple((0, pad) for pad in pads))
            yield replace(one, padding=tuple((pad, 0) for pad in pads))


def _norms(x: np.ndarray, scale: np.ndarray) -> Iterator[Operation]:
    eps = _NORMS[0]
    yield LayerNorm(eps=eps, axes=scale.ndim)
    yield LayerNorm(eps=eps, axes=scale.ndim, centred=False)
    if x.ndim > 2 and scale.ndim == 1:
        divisors = (parts for parts in range(1, x.shape[-1] + 1) if x.shape[-1] % parts == 0)
        yield from (GroupNorm(eps=eps, groups=parts) for parts in divisors)


def without_arrays(x: np.ndarray, output: np.ndarray) -> Iterator[Operation]:
    """What makes such an output of an input alone."""
    if output.shape == x.shape:
        yield from (Activation(name=name) for name in arithmetic.ACTIVATIONS)
        yield from (Activation(name="leaky_relu", slope=slope) for slope in (0.2, 0.3, 0.1))
        yield from (Softmax(axis=-axis) for axis in range(1, x.ndim))
        yield Dropout(rate=0.5)
    if x.ndim > 2 and output.ndim == x.ndim:
        axes = x.ndim - 2
        yield from (GlobalPool(mode=mode, keep=True) for mode in ("average", "max"))
        for size, step, mode in product((2, 3, 1, 5, 7), (2, 1, 3, x.shape[1]), ("max", "average")):
            for pads in dict.fromkeys(((0, 0), (size // 2, size // 2), (0, 1), (1, 0))):
                for ceil, counted in product((False, True), (False, True) if mode == "average" else (False,)):
                    yield Pool(
                        mode=mode,  # type: ignore[arg-type]
                        window=(size,) * axes,
                        strides=(step,) * axes,
                        padding=(pads,) * axes,
                        ceil=ceil,
                        counted=counted,
                    )
            for counted in (False, True) if mode == "average" else (False,):
                one = Pool(mode="max", window=(size,) * axes, strides=(step,) * axes, padding="same", counted=counted)
                yield one if mode == "max" else replace(one, mode="average")
    if x.ndim > 2 and output.ndim == 2:
        yield from (GlobalPool(mode=mode) for mode in ("average", "max"))
        yield from (Flatten(channels=channels) for channels in ("last", "first"))
    if output.shape == x.shape:
        yield from _RESPONSES
