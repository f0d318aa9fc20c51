"""What the operations of common/foreign/operations.py compute, in NumPy: the one arithmetic that hypotheses are put to.

Images are (N, ..., C) with any number of axes between. Everything is computed in float64; statistics of a norm are
arrays like any other, so that a pass in training mode is one with the statistics of its batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
    Pad,
    Pool,
    Softmax,
)

# Pixels before and behind, for every axis of the image.
Pads = tuple[tuple[int, int], ...]
# From here on a product per position of the kernel costs less than the copy of all windows that one product needs.
_MANY_CHANNELS = 16
_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def compute(operation: Operation, inputs: Sequence[np.ndarray], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a layer makes of its inputs, in eval mode.

    Raises `ValueError` where they do not fit together, `KeyError` where an array is missing.
    """
    x = inputs[0]
    match operation:
        case Conv():
            return conv(x, arrays["kernel"], operation, bias=arrays.get("bias"))
        case Dense():
            return _plus(x @ arrays["kernel"], arrays.get("bias"))
        case Embedding():
            return arrays["table"][x.astype(np.intp)]
        case BatchNorm():
            return normalise(x, arrays["mean"], arrays["var"], operation.eps, arrays)
        case LayerNorm() | GroupNorm():
            mean, var = moments(x, operation)
            return normalise(x, mean, var, operation.eps, arrays)
        case LocalResponseNorm():
            return local_response_norm(x, operation)
        case Pool():
            return pool(x, operation)
        case GlobalPool():
            axes = tuple(range(1, x.ndim - 1))
            best = np.max if operation.mode == "max" else np.mean
            return np.asarray(best(x, axis=axes, keepdims=operation.keep))
        case Activation():
            return activate(operation.name, x, operation.slope)
        case Softmax():
            return softmax(x, operation.axis)
        case Dropout():
            return x
        case Flatten():
            return (x if operation.channels == "last" else np.moveaxis(x, -1, 1)).reshape(len(x), -1)
        case Merge():
            return merge(operation.how, inputs)
        case Pad():
            return np.pad(x, ((0, 0), *operation.padding, (0, 0)))


def pads_of(operation: Conv | Pool, sizes: Sequence[int], window: Sequence[int]) -> Pads:
    """The pixels of a padding, which SAME makes of the image's size."""
    if operation.padding != "same":
        return operation.padding
    dilation = operation.dilation if isinstance(operation, Conv) else (1,) * len(sizes)
    totals = (
        max((-(-size // stride) - 1) * stride + (span - 1) * spread + 1 - size, 0)
        for size, span, stride, spread in zip(sizes, window, operation.strides, dilation, strict=True)
    )
    return tuple((total // 2, total - total // 2) for total in totals)


def conv_shape(x: np.ndarray, kernel: np.ndarray, operation: Conv) -> tuple[int, ...]:
    """The shape of a convolution's output. Raises `ValueError` where kernel and image do not fit together."""
    window, sizes = kernel.shape[:-2], x.shape[1:-1]
    if kernel.ndim != x.ndim or kernel.shape[-2] * operation.groups != x.shape[-1]:
        raise ValueError(f"a kernel of {kernel.shape} in {operation.groups} groups does not read {x.shape}")
    if kernel.shape[-1] % operation.groups:
        raise ValueError(f"{kernel.shape[-1]} channels cannot be made in {operation.groups} groups")
    pads = pads_of(operation, sizes, window)
    axes = zip(sizes, pads, window, operation.strides, operation.dilation, strict=True)
    counts = tuple((size + sum(pad) - (span - 1) * by - 1) // step + 1 for size, pad, span, step, by in axes)
    if min(counts) < 1:
        raise ValueError(f"a window of {window} does not fit into {sizes}")
    return (len(x), *counts, kernel.shape[-1])


def conv(
    x: np.ndarray,
    kernel: np.ndarray,
    operation: Conv,
    *,
    bias: np.ndarray | None = None,
    at: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """A convolution; `at` are the rows, columns, … of its output that are wanted, all of them otherwise."""
    axes, window, sizes = range(x.ndim - 2), kernel.shape[:-2], x.shape[1:-1]
    counts = conv_shape(x, kernel, operation)[1:-1]
    pads = pads_of(operation, sizes, window)
    if at is not None:
        for axis in axes:
            x = _gathered(x, axis, at[axis], window[axis], pads[axis], operation)
        x = x.transpose(0, *(1 + 2 * axis for axis in axes), *(2 + 2 * axis for axis in axes), x.ndim - 1)
        return _plus(_product(x, kernel, operation.groups), bias)
    if any(map(any, pads)):
        x = np.pad(x, ((0, 0), *pads, (0, 0)), mode=_MODES[operation.padding_mode])  # type: ignore[call-overload]

    def seen(offsets: tuple[int, ...]) -> np.ndarray:
        """What all windows see at one position of the kernel."""
        settings = zip(offsets, counts, operation.strides, operation.dilation, strict=True)
        spans = (slice(at * by, at * by + (count - 1) * step + 1, step) for at, count, step, by in settings)
        return x[(slice(None), *spans)]

    positions = list(product(*map(range, window)))
    if operation.groups == x.shape[-1] == kernel.shape[-1]:
        return _plus(sum(seen(one) * kernel[one][0] for one in positions), bias)
    if operation.groups == 1 and x.shape[-1] >= _MANY_CHANNELS:
        return _plus(sum(seen(one) @ kernel[one] for one in positions), bias)
    spans = tuple((span - 1) * by + 1 for span, by in zip(window, operation.dilation, strict=True))
    views = sliding_window_view(x, spans, axis=tuple(1 + axis for axis in axes))
    steps = [slice(None, None, step) for step in operation.strides]
    views = views[(slice(None), *steps, slice(None), *(slice(None, None, by) for by in operation.dilation))]
    return _plus(_product(np.moveaxis(views, x.ndim - 1, -1), kernel, operation.groups), bias)


def _gathered(x: np.ndarray, axis: int, at: np.ndarray, span: int, pad: tuple[int, int], operation: Conv) -> np.ndarray:
    """What windows see along an axis: in its place two, of the windows and of the positions in each."""
    place = 1 + 2 * axis
    size = x.shape[place]
    index = at[:, None] * operation.strides[axis] + np.arange(span) * operation.dilation[axis] - pad[0]
    if operation.padding_mode != "zeros":
        reached = np.pad(np.arange(size), pad, mode=_MODES[operation.padding_mode])  # type: ignore[call-overload]
        return np.asarray(x.take(reached[index + pad[0]], axis=place))
    inside = (index >= 0) & (index < size)
    taken = np.asarray(x.take(index, axis=place, mode="clip"))
    if not inside.all():
        taken *= inside.reshape(*index.shape, *(1,) * (x.ndim - place - 1))
    return taken


def _product(windows: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """Of windows (N, ..., *kernel's, C) and a kernel, as one matrix product per group."""
    axes = kernel.ndim - 2
    if groups == 1:
        return np.tensordot(windows, kernel, axes=(range(1 + axes, windows.ndim), range(axes + 1)))
    outer, positions = windows.shape[: 1 + axes], math.prod(kernel.shape[:axes])
    split = windows.reshape(math.prod(outer), positions, groups, kernel.shape[-2])
    parts = split.transpose(2, 0, 1, 3).reshape(groups, math.prod(outer), positions * kernel.shape[-2])
    weights = kernel.reshape(positions * kernel.shape[-2], groups, -1).transpose(1, 0, 2)
    return np.asarray((parts @ weights).transpose(1, 0, 2).reshape(*outer, kernel.shape[-1]))


def _plus(x: np.ndarray | int, bias: np.ndarray | None) -> np.ndarray:
    return np.asarray(x) if bias is None else x + bias


def pool_counts(sizes: Sequence[int], operation: Pool) -> list[int]:
    """How many windows there are on every axis. Raises `ValueError` where none fits."""
    window = operation.window
    pads = pads_of(operation, sizes, window)
    counts = []
    for size, (before, behind), span, step in zip(sizes, pads, window, operation.strides, strict=True):
        room = size + before + behind - span
        count = (-(-room // step) if operation.ceil else room // step) + 1
        # A window has to begin in the image, or in front of it.
        counts.append(count - 1 if operation.ceil and (count - 1) * step >= size + before else count)
    if min(counts) < 1:
        raise ValueError(f"a window of {window} does not fit into {sizes}")
    return counts


def pool(x: np.ndarray, operation: Pool) -> np.ndarray:
    """A pool. A window that hangs over the end counts only what is there, as PyTorch counts."""
    sizes, window = x.shape[1:-1], operation.window
    pads, counts = pads_of(operation, sizes, window), pool_counts(sizes, operation)
    ends = [(n - 1) * step + span for n, step, span in zip(counts, operation.strides, window, strict=True)]
    around = [(before, max(end - size - before, 0)) for end, size, (before, _) in zip(ends, sizes, pads, strict=True)]
    fill = -np.inf if operation.mode == "max" else 0.0
    padded = np.pad(x, ((0, 0), *around, (0, 0)), constant_values=fill)
    total: np.ndarray | None = None
    for offsets in product(*map(range, window)):
        settings = zip(offsets, counts, operation.strides, strict=True)
        spans = (slice(at, at + (count - 1) * step + 1, step) for at, count, step in settings)
        seen = padded[(slice(None), *spans)]
        if total is None:
            total = seen.copy()
        elif operation.mode == "max":
            np.maximum(total, seen, out=total)
        else:
            total += seen
    assert total is not None
    if operation.mode == "max":
        return total
    shares = np.ones(())
    for size, (before, behind), span, step, count in zip(sizes, pads, window, operation.strides, counts, strict=True):
        first = np.arange(count) * step - before
        low, high = (-before, size + behind) if operation.counted else (0, size)
        shares = np.multiply.outer(shares, np.minimum(first + span, high) - np.maximum(first, low))
    return total / shares[..., None]


def moments(x: np.ndarray, operation: BatchNorm | LayerNorm | GroupNorm) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (biased) that a norm takes of its input, in a shape that broadcasts to it; of a batch norm
    those of the batch, (C,)."""
    match operation:
        case BatchNorm():
            axes = tuple(range(x.ndim - 1))
            return x.mean(axis=axes), x.var(axis=axes)
        case LayerNorm():
            axes = tuple(range(x.ndim - operation.axes, x.ndim))
            if not operation.centred:
                return np.zeros(()), np.mean(x * x, axis=axes, keepdims=True)
            return x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
        case GroupNorm():
            parts = x.reshape(*x.shape[:-1], operation.groups, -1)
            axes = (*range(1, x.ndim - 1), x.ndim)
            mean, var = parts.mean(axis=axes, keepdims=True), parts.var(axis=axes, keepdims=True)
            shape = (len(x), *(1,) * (x.ndim - 2), x.shape[-1])
            return tuple(np.broadcast_to(one, (*one.shape[:-1], parts.shape[-1])).reshape(shape) for one in (mean, var))  # type: ignore[return-value]


def normalise(
    x: np.ndarray, mean: np.ndarray, var: np.ndarray, eps: float, arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * scale + bias, the last two where there are any."""
    normal = (x - mean) / np.sqrt(var + eps)
    scaled: np.ndarray = normal * arrays["scale"] if "scale" in arrays else normal
    return _plus(scaled, arrays.get("bias"))


def neighbours(x: np.ndarray, size: int) -> np.ndarray:
    """The sum of squares of `size` channels around each; of an even number one more in front."""
    squares = np.pad(x * x, ((0, 0),) * (x.ndim - 1) + ((size // 2, (size - 1) // 2),))
    total: np.ndarray = sum(squares[..., at : at + x.shape[-1]] for at in range(size))  # type: ignore[assignment]
    return total


def local_response_norm(x: np.ndarray, operation: LocalResponseNorm) -> np.ndarray:
    """A local response norm."""
    alpha = operation.alpha / operation.size if operation.mean else operation.alpha
    return np.asarray(x / (operation.k + alpha * neighbours(x, operation.size)) ** operation.beta)


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """A softmax over an axis."""
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=axis, keepdims=True)
    return shares


def merge(how: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Several arrays as one. Raises `ValueError` for a way that it does not know."""
    if how == "concatenate":
        return np.concatenate(inputs, axis=-1)
    ways: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "add": np.add,
        "average": np.add,
        "multiply": np.multiply,
        "maximum": np.maximum,
        "subtract": np.subtract,
    }
    if how not in ways:
        raise ValueError(f"arrays are merged by {', '.join(ways)} or concatenate, not {how}")
    total = inputs[0]
    for one in inputs[1:]:
        total = ways[how](total, one)
    return total / len(inputs) if how == "average" else total


_each_erf = np.frompyfunc(math.erf, 1, 1)


def _error_function(x: np.ndarray) -> np.ndarray:
    # NumPy has none; Python's is right to the last place.
    return np.asarray(_each_erf(x)).astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    powers = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, powers) / (1.0 + powers))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.logaddexp(0.0, x))


def _hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.clip(x / 6 + 0.5, 0.0, 1.0)


def _elu(x: np.ndarray, alpha: float) -> np.ndarray:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0)))


# Of SELU, as Klambauer et al. 2017 have them.
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934, 1.6732632423543772848
# The default slope of leaky_relu (PyTorch, Flax; Keras has 0.3), and elu's alpha.
LEAKY, ALPHA = 0.01, 1.0

# Behind those that layers name, such as nobody names who asks for the right one.
ACTIVATIONS: Mapping[str, Callable[[np.ndarray, float | None], np.ndarray]] = {
    "relu": lambda x, _: np.maximum(x, 0.0),
    "identity": lambda x, _: x,
    "relu6": lambda x, _: np.clip(x, 0.0, 6.0),
    "leaky_relu": lambda x, slope: np.where(x > 0, x, (LEAKY if slope is None else slope) * x),
    "silu": lambda x, _: x * _sigmoid(x),
    "gelu": lambda x, _: x * 0.5 * (1.0 + _error_function(x / math.sqrt(2))),
    "gelu_tanh": lambda x, _: x * 0.5 * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "sigmoid": lambda x, _: _sigmoid(x),
    "hard_sigmoid": lambda x, _: _hard_sigmoid(x),
    "hard_silu": lambda x, _: x * _hard_sigmoid(x),
    "tanh": lambda x, _: np.tanh(x),
    "elu": lambda x, slope: _elu(x, ALPHA if slope is None else slope),
    "selu": lambda x, _: _SELU_SCALE * _elu(x, _SELU_ALPHA),
    "softplus": lambda x, _: _softplus(x),
    "mish": lambda x, _: x * np.tanh(_softplus(x)),
    "quick_gelu": lambda x, _: x * _sigmoid(1.702 * x),
    "softsign": lambda x, _: x / (1.0 + np.abs(x)),
    "hard_tanh": lambda x, _: np.clip(x, -1.0, 1.0),
    "scaled_tanh": lambda x, _: 1.7159 * np.tanh(2 / 3 * x),
    "old_hard_sigmoid": lambda x, _: np.clip(0.2 * x + 0.5, 0.0, 1.0),
    "square": lambda x, _: x * x,
    "abs": lambda x, _: np.abs(x),
}


def activate(name: str, x: np.ndarray, slope: float | None = None) -> np.ndarray:
    """An activation by its name. Raises `ValueError` for one that is not known."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{name} is no activation known here")
    return ACTIVATIONS[name](x, slope)


def norm_pullback(
    x: np.ndarray,
    cotangent: np.ndarray,
    operation: BatchNorm | LayerNorm | GroupNorm,
    scale: np.ndarray | None,
    *,
    through_mean: bool = True,
    through_var: bool = True,
) -> np.ndarray:
    """What comes back to the input of a norm that takes its statistics of it, or only part of that: without the way
    through the mean, through the variance, or both."""
    mean, var = moments(x, operation)
    deviation = np.sqrt(var + operation.eps)
    normal = (x - mean) / deviation
    back = cotangent if scale is None else cotangent * scale

    def averaged(values: np.ndarray) -> np.ndarray:
        return moments(
            values, operation if not isinstance(operation, LayerNorm) else LayerNorm(eps=0.0, axes=operation.axes)
        )[0]

    total = back
    centred = not isinstance(operation, LayerNorm) or operation.centred
    if through_mean and centred:
        total = total - averaged(back)
    if through_var:
        total = total - normal * averaged(back * normal)
    return total / deviation
