"""Weights for comparing implementations: random values that no default equals, and integers that round nothing."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt

import numpy as np

from common.architectures import Spec
from common.architectures.layers import INPUT, Conv, Dense, DepthwiseConv, Layer, Shape, ZeroPadShortcut
from common.errors import WeightsError
from common.weights.arrays import layer_arrays, role_of

# Every integer up to here is a float32: sums that stay below are exact in any order.
EXACT_INTEGER = 2**24
# Mean square of an activation of standard normal values; of a sigmoid the variance, a seventh of it: what all images
# have in common tells none apart. SiLU's is 0.356, and of large values 1/2 as of a ReLU: with less than that they would
# grow with every layer, the more the larger they are.
_MEAN_SQUARES = {"relu": 1 / 2, "relu6": 1 / 2, "tanh": 0.394, "scaled_tanh": 0.750, "sigmoid": 0.0434, "silu": 1 / 2}
_OF_A_GATE = 0.293  # mean square of a sigmoid


def randomize(spec: Spec, seed: int = 0, *, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Weights for comparing implementations: every value of every tensor is distinct, random and not a default.

    Kernels keep the variance of what they read, so that the network neither dies out nor overflows at any depth.
    Values use all bits of float64: a backend that stores weights in float32 cannot hide.
    """
    damped, squares = before_addition(spec), _mean_squares(spec)
    # What n branches add must not grow with n: the logits of ResNet-152 would leave nothing of a float32 softmax.
    damping = 1 / sqrt(max(len(damped), 1))

    def drawn(row: tuple[Layer, str, Shape]) -> tuple[str, np.ndarray]:
        layer, name, shape = row
        generator = generator_for(seed, name)
        factor = damping if layer.path in damped else 1.0
        match role_of(name, layer):
            case "kernel":
                gain = 1 / squares[layer.inputs[0]]
                gain = gain if isinstance(layer, Conv) else max(gain / 2, 1.0)
                value = generator.standard_normal(shape) * (sqrt(gain / fans(shape, layer)[0]) * factor)
            case "scale":
                value = generator.uniform(0.5, 1.5, shape) * factor
            case "var":
                value = generator.uniform(0.5, 1.5, shape)
            case _:
                value = generator.normal(0.0, 0.2, shape)
        return name, value.astype(dtype, copy=False)

    # Every array has a stream of its own, and NumPy lets go of the interpreter while it fills one.
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(drawn, layer_arrays(spec)))


def integers(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Small integer weights under which float32 computes the network exactly, whatever the order of its sums.

    `spec` is one without rounding layers (`exact_twin`), its images integers in 0 … 15. A bound on the values of every
    channel is carried through the walk; each kernel gets as many entries of ±1 as a budget allows that grows evenly
    from the image to the last layer. Raises `WeightsError` if a sum could still reach 2^24.
    """
    limit, entries = float(EXACT_INTEGER), 8
    bounds: dict[str, np.ndarray] = {INPUT: np.full(spec.in_channels, 15.0)}
    weights: dict[str, np.ndarray] = {}
    branch_ends = before_addition(spec)
    # Longer sums would lie beyond both ends of a ReLU6, and show nothing behind it.
    clipped = {layer.inputs[0] for layer in spec.layers if layer.kind == "relu6"}
    for index, layer in enumerate(spec.layers):
        bound = bounds[layer.inputs[0]]
        if layer.shares and isinstance(layer, Conv | Dense):
            bounds[layer.path] = _reach(weights[layer.uses["kernel"]], bound) + 3
        elif isinstance(layer, Conv | Dense):
            budget = 2 ** (4 + 18 * (index + 1) / len(spec.layers))
            count = int(np.clip(budget // np.median(bound), 1, 1 if layer.path in clipped else entries))
            for name, shape in layer.arrays.items():
                generator = generator_for(seed, name)
                if not name.endswith(".kernel"):
                    weights[name] = generator.integers(1, 4, shape).astype(np.float32)
                    continue
                # A branch adds to a quarter of the channels, or the sums would double with every block.
                share = 0.25 if layer.path in branch_ends else 1.0
                depthwise = isinstance(layer, DepthwiseConv)
                weights[name], reach = _integer_kernel(generator, shape, bound, count, share, depthwise)
                bounds[layer.path] = reach + 3
        elif layer.kind == "add":
            bounds[layer.path] = bound + bounds[layer.inputs[1]]
        elif layer.kind == "concat":
            bounds[layer.path] = np.concatenate([bounds[path] for path in layer.inputs])
        elif layer.kind == "relu6":
            bounds[layer.path] = np.minimum(bound, 6)
        elif isinstance(layer, ZeroPadShortcut):
            bounds[layer.path] = np.pad(bound, (0, layer.channels - bound.size))
        elif layer.kind == "flatten":
            pixels = next(x.in_features for x in spec.layers if isinstance(x, Dense) and layer.path in x.inputs)
            bounds[layer.path] = np.tile(bound, pixels // bound.size)
        elif layer.exact or getattr(layer, "op", None) == "max":
            bounds[layer.path] = bound
        else:
            raise WeightsError(f"{layer.path}, a layer of kind {layer.kind}, rounds integers; an exact twin has none")
    worst = max(bounds, key=lambda path: float(bounds[path].max()))
    if bounds[worst].max() >= limit:
        raise WeightsError(f"integer weights may reach {bounds[worst].max():.0f} at {worst}; the limit is {limit:.0f}")
    return weights


def generator_for(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for every tensor, so that no value depends on the order or number of the others."""
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))


def fans(kernel: Shape, layer: Layer) -> tuple[int, int]:
    """(fan_in, fan_out) of a layer's HWIO or (in, out) kernel; groups already shorten its input axis.

    An input of a depthwise convolution feeds one channel, and its fan_out counts that one, as in Keras and timm;
    PyTorch counts all channels, as for any groups.
    """
    window = prod(kernel[:-2])
    return window * kernel[-2], window * (1 if isinstance(layer, DepthwiseConv) else kernel[-1])


def before_addition(spec: Spec) -> set[str]:
    """The layers that end the residual branch of a block: in what an addition reads first, the last one with arrays,
    before its gate, activation and dropout."""
    layers = {layer.path: layer for layer in spec.layers}
    found = set()
    for layer in spec.layers:
        if layer.kind == "add":
            last = layers[layer.inputs[0]]
            while not last.uses:
                last = layers[last.inputs[0]]
            found.add(last.shares or last.path)
    return found


def _mean_squares(spec: Spec) -> dict[str, float]:
    """About how large the squares are of what every layer gives, by path, where kernels keep the variance."""
    found = {INPUT: 1 / 2}
    for layer in spec.layers:
        inputs = [found[path] for path in layer.inputs]
        match layer.kind:
            case kind if kind in _MEAN_SQUARES:
                found[layer.path] = _MEAN_SQUARES[kind]
            case "conv" | "depthwise" | "dense" | "norm" | "add":
                found[layer.path] = 1.0
            case "gate":
                found[layer.path] = inputs[0] * _OF_A_GATE
            case "concat":
                found[layer.path] = sum(inputs) / len(inputs)
            case _:
                found[layer.path] = inputs[0]
    return found


def _integer_kernel(
    generator: np.random.Generator, shape: Shape, bound: np.ndarray, count: int, share: float, depthwise: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A kernel of zeros with `count` entries of ±1 for a `share` of the output channels, at least one; each entry
    anywhere in the window and on one of the input channels with the smaller half of the bounds. With it, the bounds on
    the output channels.

    A channel of a depthwise one has nothing but its one window: the first entry is +1, or the next ReLU would leave
    nothing of it, and of every other channel in the middle, where the window sees the smallest map."""
    kernel = np.zeros((prod(shape[:-2]), *shape[-2:]), dtype=np.float32)
    reach = np.zeros(shape[-1])
    groups = bound.size // shape[-2]
    of_group = bound.reshape(groups, -1)
    outputs = np.flatnonzero(generator.random(shape[-1]) < share)
    if not outputs.size:
        outputs = generator.integers(0, shape[-1], 1)
    group = outputs * groups // shape[-1]
    small = np.argsort(of_group, axis=1, kind="stable")[:, : -(-shape[-2] // 2)]
    for entry in range(count):
        channels = small[group, generator.integers(0, small.shape[1], outputs.size)]
        places = generator.integers(0, kernel.shape[0], outputs.size)
        if depthwise and entry == 0:
            places[::2] = kernel.shape[0] // 2
        signs = generator.choice((1, 1, -1), outputs.size)
        kernel[places, channels, outputs] = 1 if depthwise and entry == 0 else signs
        reach[outputs] += of_group[group, channels]
    return kernel.reshape(shape), reach


def _reach(kernel: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """The bounds on the output channels of a kernel, without its bias."""
    entries = np.abs(kernel).reshape(-1, *kernel.shape[-2:]).sum(axis=0)
    groups, outputs = bound.size // kernel.shape[-2], kernel.shape[-1]
    reach: np.ndarray = np.einsum(
        "io,oi->o", entries, bound.reshape(groups, -1)[np.arange(outputs) * groups // outputs]
    )
    return reach
