"""Every layer of the vocabulary alone: the cases, and what each computes, in plain NumPy."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from common.architectures.layers import (
    ACTIVATIONS,
    Affine,
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    DepthwiseConv,
    Gate,
    GlobalPool,
    Layer,
    LocalResponseNorm,
    MaxPool,
    Pad,
    StochasticDepth,
)

EVEN, ODD = (8, 6), (7, 9)


@dataclass(frozen=True)
class Case:
    layer: Layer
    channels: tuple[int, ...]  # of each input
    pixel: bool = False  # whether the second input is of one

    @property
    def name(self):
        return self.layer.path

    def shapes(self, size):
        return [(1, 1, c) if self.pixel and i else (*size, c) for i, c in enumerate(self.channels)]

    def drawn(self, size, dtype="float64"):
        """Inputs, arrays by role, slopes of the output, and a mask of two images: one kept, one not. Of integers in
        float32."""
        generator = np.random.default_rng([*size, *self.name.encode()])

        def values(shape):
            if dtype == "float32":
                return generator.integers(-9, 10, shape).astype(dtype)
            return generator.standard_normal(shape)

        inputs = [values((2, *shape)) for shape in self.shapes(size)]
        shapes = self.layer.trained | self.layer.averaged
        arrays = {role: np.abs(values(shape)) if role == "var" else values(shape) for role, shape in shapes.items()}
        slopes = values((2, *self.layer.output_shape(*self.shapes(size))))
        return inputs, arrays, slopes, np.array([True, False]).reshape(2, 1, 1, 1)


def _cases():
    def made(kind, name, channels=(4,), pixel=False, **options):
        name = f"{kind.kind}: {name}"
        return Case(kind(path=name, inputs=("x",) * len(channels), **options), channels, pixel)

    def conv(name, **options):
        return made(Conv, name, in_channels=4, out_channels=6, **({"stride": 1} | options))

    def depthwise(name, **options):
        return made(DepthwiseConv, name, in_channels=4, **({"stride": 1} | options))

    yield conv("symmetric at stride 2", kernel=3, stride=2, padding="symmetric")
    yield conv("same at stride 2", kernel=3, stride=2, padding="same", bias=True)
    yield conv("2 around at stride 3", kernel=5, stride=3, padding=2, bias=True)
    yield conv("1x7", kernel=(1, 7), padding="symmetric")
    yield conv("7x1", kernel=(7, 1), padding="symmetric", bias=True)
    yield conv("1x7 at stride 2", kernel=(1, 7), stride=2, padding="symmetric")
    yield conv("2x3 same", kernel=(2, 3), padding="same")
    yield conv("3x2 same at stride 2", kernel=(3, 2), stride=2, padding="same")
    yield conv("3x1 in groups, valid", kernel=(3, 1), groups=2, padding="valid", bias=True)
    yield conv("1x3 dilated", kernel=(1, 3), dilation=2, padding="symmetric")
    yield conv("1x1 with 1 around", kernel=1, padding=1, bias=True)
    yield depthwise("symmetric at stride 2", kernel=3, stride=2, padding="symmetric")
    yield depthwise("same at stride 2", kernel=5, stride=2, padding="same", bias=True)
    yield depthwise("same", kernel=3, padding="same")
    yield depthwise("1x3 with 1 around", kernel=(1, 3), padding=1, bias=True)
    for padding in ("symmetric", "same", "valid", "ceil", 1):
        yield made(MaxPool, f"3x3 at stride 2, {padding}", kernel=3, stride=2, padding=padding)
    yield made(MaxPool, "3x3 symmetric", kernel=3, stride=1, padding="symmetric")
    yield made(MaxPool, "2x2 at stride 2, ceil", kernel=2, stride=2, padding="ceil")
    yield made(MaxPool, "2x2 at stride 3, ceil", kernel=2, stride=3, padding="ceil")
    yield made(MaxPool, "1x1 at stride 2", kernel=1, stride=2, padding="valid")
    yield made(Pad, "by 1", amount=1)
    yield made(Pad, "by 3", amount=3)
    yield made(MaxPool, "3x2 at stride 2, same", kernel=(3, 2), stride=2, padding="same")
    for counts in (False, True):
        words = "counted" if counts else "not counted"
        for padding in ("symmetric", "same", "ceil", 1):
            options = {"padding": padding, "count_padding": counts}
            yield made(AveragePool, f"3x3 at stride 2, {padding}, {words}", kernel=3, stride=2, **options)
        yield made(AveragePool, f"3x3 same, {words}", kernel=3, stride=1, padding="same", count_padding=counts)
        yield made(AveragePool, f"3x3 sym, {words}", kernel=3, stride=1, padding="symmetric", count_padding=counts)
    yield made(AveragePool, "2x2 at stride 2", kernel=2, stride=2, padding="valid", count_padding=True)
    yield made(AveragePool, "2x3 same", kernel=(2, 3), stride=1, padding="same", count_padding=True)
    for size, k in ((5, 2.0), (4, 1.0)):
        yield made(LocalResponseNorm, f"of {size}", channels=(7,), size=size, alpha=0.3, beta=0.75, k=k)
    for kind in ACTIVATIONS.values():
        yield made(kind, "alone")
    yield made(Concat, "of three", channels=(3, 1, 4))
    yield made(Gate, "alone", channels=(4, 4), pixel=True)
    yield made(GlobalPool, "average", op="average", keep=True)
    yield made(GlobalPool, "maximum", op="max", keep=True)
    yield made(StochasticDepth, "alone", rate=0.3)
    yield made(Affine, "alone", channels=(3,), scale=(0.458, 0.448, 0.45), shift=(-0.03, -0.088, -0.188))
    for variance in ("biased", "unbiased"):
        options = {"eps": 1e-3, "momentum": 0.9, "running_variance": variance, "scale": False}
        layer = BatchNorm(path=f"norm: without scale, {variance}", inputs=("x",), channels=4, **options)
        yield Case(layer, (4,))


CASES = {case.name: case for case in _cases()}
EXACT = {name: case for name, case in CASES.items() if case.layer.exact or case.layer.kind in ("conv", "depthwise")}


def starts(size, side, stride, dilation, padding):
    """The first pixel of every window along an axis, put down one by one."""
    extent = dilation * (side - 1) + 1
    if padding == "ceil":
        found = [0]
        while found[-1] + extent < size and found[-1] + stride < size:
            found.append(found[-1] + stride)
        return found
    if padding == "same":
        count = -(-size // stride)
        missing = max((count - 1) * stride + extent - size, 0)
        return [i * stride - missing // 2 for i in range(count)]
    before = {"valid": 0, "symmetric": (extent - 1) // 2}.get(padding, padding)
    return list(range(-before, size + before - extent + 1, stride))


def windows(x, layer):
    """(N, rows, columns, height, width, C), and which of these cells are in the map and which in its padding."""
    height, width = layer.kernel if isinstance(layer.kernel, tuple) else (layer.kernel,) * 2
    rows, columns = (
        np.array(starts(size, side, layer.stride, layer.dilation, layer.padding))[:, None]
        + layer.dilation * np.arange(side)
        for size, side in ((x.shape[1], height), (x.shape[2], width))
    )
    places = rows[:, None, :, None], columns[None, :, None, :]
    inside = [(place >= 0) & (place < size) for place, size in zip(places, x.shape[1:3], strict=True)]
    clipped = [np.clip(place, 0, size - 1) for place, size in zip(places, x.shape[1:3], strict=True)]
    return x[:, clipped[0], clipped[1]], (inside[0] & inside[1])[..., None]


def defined(layer, inputs, arrays, mask, training=True):
    """The output of a layer, by its definition. Of complex numbers too, all that is compared being real."""
    x, *others = inputs
    match layer.kind:
        case "conv" | "depthwise":
            cells, inside = windows(x, layer)
            groups = x.shape[-1] // arrays["kernel"].shape[2]
            parts = zip(
                np.split(np.where(inside, cells, 0), groups, axis=-1),
                np.split(arrays["kernel"], groups, axis=-1),
                strict=True,
            )
            y = np.concatenate([np.tensordot(cells, kernel, 3) for cells, kernel in parts], axis=-1)
            return y + arrays.get("bias", 0)
        case "pad":
            return np.pad(x, [(0, 0), (layer.amount,) * 2, (layer.amount,) * 2, (0, 0)])
        case "max_pool":
            cells, inside = windows(x, layer)
            cells = np.where(inside, cells, -np.inf).reshape(*cells.shape[:3], -1, x.shape[-1])
            return np.take_along_axis(cells, cells.real.argmax(axis=3, keepdims=True), axis=3)[:, :, :, 0]
        case "average_pool":
            cells, inside = windows(x, layer)
            counted = layer.count_padding and layer.padding != "ceil"
            counts = inside.size / prod(inside.shape[:2]) if counted else inside.sum(axis=(2, 3))
            return np.where(inside, cells, 0).sum(axis=(3, 4)) / counts
        case "lrn":
            y = np.empty_like(x)
            for c in range(x.shape[-1]):
                first, last = max(c - layer.size // 2, 0), c + (layer.size - 1) // 2
                y[..., c] = x[..., c] / (layer.k + layer.alpha * (x[..., first : last + 1] ** 2).sum(-1)) ** layer.beta
            return y
        case "relu":
            return np.where(x.real > 0, x, 0)
        case "relu6":
            return np.where(x.real > 6, 6, np.where(x.real > 0, x, 0))
        case "tanh":
            return np.tanh(x)
        case "scaled_tanh":
            return 1.7159 * np.tanh(2 * x / 3)
        case "sigmoid":
            return 1 / (1 + np.exp(-x))
        case "silu":
            return x / (1 + np.exp(-x))
        case "concat":
            return np.concatenate(inputs, axis=-1)
        case "gate":
            return x * others[0]
        case "global_pool":
            if layer.op == "average":
                return x.mean(axis=(1, 2), keepdims=True)
            pixels = x.reshape(len(x), -1, 1, x.shape[-1])
            return np.take_along_axis(pixels, pixels.real.argmax(axis=1, keepdims=True), axis=1)
        case "stochastic_depth":
            return np.where(mask, x / (1 - layer.rate), 0) if training else x
        case "affine":
            return x * np.array(layer.scale) + np.array(layer.shift)
        case "norm":
            mean = x.mean(axis=(0, 1, 2)) if training else arrays["mean"]
            var = ((x - mean) ** 2).mean(axis=(0, 1, 2)) if training else arrays["var"]
            return (x - mean) / (var + layer.eps) ** 0.5 * arrays.get("scale", 1) + arrays["bias"]
    raise AssertionError(layer.kind)


def differentiated(layer, inputs, arrays, slopes, mask):
    """The slopes in every input and trained array, each value moved by itself: the imaginary part of a function of
    x + ih is h times its derivative, without a difference that rounds."""
    step, found = 1e-30, {}
    given = {f"input{i}": x.astype(complex) for i, x in enumerate(inputs)}
    given |= {role: arrays[role].astype(complex) for role in layer.trained}
    for name, array in given.items():
        slope = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            array[place] += step * 1j
            moved = [given[f"input{i}"] for i in range(len(inputs))]
            y = defined(layer, moved, arrays | {role: given[role] for role in layer.trained}, mask)
            slope[place] = (y.imag * slopes).sum() / step
            array[place] = array[place].real
        found[name] = slope
    return found


def reading(**changes):
    return lambda layer, inputs, arrays, mask: defined(replace(layer, **changes), inputs, arrays, mask)


# What else one could take a layer for: name -> (case, size of the image, what it computes then).
WRONG = {
    "SAME for symmetric": ("conv: symmetric at stride 2", EVEN, reading(padding="same")),
    "symmetric for SAME": ("depthwise: same at stride 2", EVEN, reading(padding="symmetric")),
    "the other axis": (
        *("conv: 7x1", ODD),
        lambda layer, x, arrays, mask: defined(
            replace(layer, kernel=(1, 7)), x, arrays | {"kernel": arrays["kernel"].swapaxes(0, 1)}, mask
        ),
    ),
    "a kernel turned": (
        *("depthwise: symmetric at stride 2", ODD),
        lambda layer, x, arrays, mask: defined(layer, x, {"kernel": arrays["kernel"].swapaxes(0, 1)}, mask),
    ),
    "ceil for SAME": ("max_pool: 3x3 at stride 2, ceil", ODD, reading(padding="same")),
    "ceil for floor": ("max_pool: 3x3 at stride 2, ceil", EVEN, reading(padding="valid")),
    "zeros around a maximum": (
        *("max_pool: 3x3 at stride 2, 1", ODD),
        lambda layer, x, arrays, mask: np.maximum(defined(layer, x, arrays, mask), 0),
    ),
    "borders counted": ("average_pool: 3x3 same, not counted", ODD, reading(count_padding=True)),
    "borders not counted": ("average_pool: 3x3 at stride 2, 1, counted", EVEN, reading(count_padding=False)),
    "alpha divided": ("lrn: of 5", ODD, reading(alpha=0.3 / 5)),
    "alpha times the size": ("lrn: of 5", ODD, reading(alpha=0.3 * 5)),
    "k of 1": ("lrn: of 5", ODD, reading(k=1.0)),
    "a radius for a size": ("lrn: of 5", ODD, reading(size=11)),
    "an even window the other way round": (
        *("lrn: of 4", ODD),
        lambda layer, x, arrays, mask: defined(layer, [x[0][..., ::-1]], arrays, mask)[..., ::-1],
    ),
    "tanh as it is": ("scaled_tanh: alone", EVEN, lambda layer, x, arrays, mask: np.tanh(x[0])),
    "relu for silu": ("silu: alone", EVEN, lambda layer, x, arrays, mask: np.maximum(x[0], 0)),
    "another order": ("concat: of three", EVEN, lambda layer, x, arrays, mask: np.concatenate(x[::-1], axis=-1)),
    "one gate for all": ("gate: alone", EVEN, lambda layer, x, *_: x[0] * x[1].mean(axis=-1, keepdims=True)),
    "a mask for every value": (
        *("stochastic_depth: alone", EVEN),
        lambda layer, x, arrays, mask: defined(layer, x, arrays, np.indices(x[0].shape).sum(axis=0) % 2 == 0),
    ),
    "a depth that is not scaled": ("stochastic_depth: alone", EVEN, lambda layer, x, _, mask: np.where(mask, x[0], 0)),
    "shifted before it is scaled": (
        *("affine: alone", EVEN),
        lambda layer, x, arrays, mask: (x[0] + np.array(layer.shift)) * layer.scale,
    ),
    "running statistics in training": (
        *("norm: without scale, biased", EVEN),
        lambda layer, x, arrays, mask: defined(layer, x, arrays, mask, training=False),
    ),
}
