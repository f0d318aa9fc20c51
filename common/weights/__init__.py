"""Canonical weights: a mapping from canonical name to NumPy array, names and shapes as the layer walk gives them.

Convolution kernels are HWIO, dense kernels (in, out), everything else is a vector of channels. On disk: safetensors
with the spec in the metadata.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from math import prod, sqrt
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common import architectures
from common.architectures import Spec
from common.architectures.layers import INPUT, Dense, Layer, Shape, ZeroPadShortcut
from common.errors import SpecError, WeightsError
from common.files import opened, reason, views, written
from common.parity.levels import EXACT_INTEGER

Weights = Mapping[str, np.ndarray]
Scheme = Literal["kaiming_fan_out", "glorot_uniform", "lecun_normal"]

FORMAT = "resnet-parity weights 2"  # in the metadata of a canonical file


class LazyWeights(Mapping[str, np.ndarray]):
    """Weights that are read or converted one tensor at a time, so that a port never holds a third copy."""

    def __init__(self, getters: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._getters = getters

    def __getitem__(self, name: str) -> np.ndarray:
        return self._getters[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._getters)

    def __len__(self) -> int:
        return len(self._getters)


def shapes(spec: Spec) -> dict[str, Shape]:
    """Every canonical name of the spec's weights with its shape, in walk order."""
    return {name: shape for layer in spec.layers for name, shape in layer.arrays.items()}


def validate(spec: Spec, weights: Weights, *, finite: bool = True) -> None:
    """Check that `weights` are exactly those of `spec`: names, shapes, floating point and, unless told not to, finite.

    Raises `WeightsError` naming the tensors that are missing, unexpected, misshapen or not finite.
    """
    expected = shapes(spec)
    check_names("the weights are not this spec's", weights, expected)
    for name, shape in expected.items():
        array = weights[name]
        if array.shape != shape:
            raise WeightsError(f"{name} has shape {array.shape}; the spec expects {shape}")
        if not np.issubdtype(array.dtype, np.floating):
            raise WeightsError(f"{name} has dtype {array.dtype}; expected a floating-point type")
        if finite and not np.isfinite(array).all():
            bad = int(np.size(array) - np.isfinite(array).sum())
            raise WeightsError(f"{name} has {bad} values that are NaN or infinite, of {array.size}")


def check_names(
    subject: str, found: Iterable[str], expected: Iterable[str], error: type[WeightsError] = WeightsError
) -> None:
    """Raise `error`, beginning with `subject`, unless both have the same names; it lists at most four each."""
    found, expected = dict.fromkeys(found), dict.fromkeys(expected)
    parts = []
    for what, names in (
        ("missing", [name for name in expected if name not in found]),
        ("unexpected", [name for name in found if name not in expected]),
    ):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        parts += [f"{what} {', '.join(names[:4])}{more}"] if names else []
    if parts:
        raise error(f"{subject}: {'; '.join(parts)}")


def init(
    spec: Spec,
    seed: int = 0,
    scheme: Scheme = "kaiming_fan_out",
    *,
    zero_gamma: bool = False,
    dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Weights to start training from, the same numbers for every backend.

    `scheme`: ``kaiming_fan_out`` (He et al. 2015, arXiv:1502.01852: normal, variance 2 / fan_out; dense uniform in
    ±1 / sqrt(fan_in), as torchvision), ``glorot_uniform`` (Glorot and Bengio 2010: ±sqrt(6 / (fan_in + fan_out)),
    Keras) or ``lecun_normal`` (truncated normal, variance 1 / fan_in, Flax). `zero_gamma` sets the scale of the last
    norm before every addition to zero (Goyal et al. 2017, arXiv:1706.02677, section 5.1). Raises `WeightsError`
    for an unknown scheme.
    """
    if scheme not in get_args(Scheme):
        raise WeightsError(f"scheme={scheme!r} is unknown; expected one of {', '.join(get_args(Scheme))}")
    zeroed = _before_addition(spec) if zero_gamma else set()
    weights: dict[str, np.ndarray] = {}
    for layer, name, shape in _arrays(spec):
        role = name.removeprefix(f"{layer.path}.")
        if role == "kernel":
            value = _initial_kernel(_generator(seed, name), layer, shape, scheme)
        elif role in ("scale", "var"):
            value = np.full(shape, 0.0 if role == "scale" and layer.path in zeroed else 1.0)
        elif layer.kind == "dense" and scheme == "kaiming_fan_out":
            value = _generator(seed, name).uniform(-1, 1, shape) / sqrt(_fans(weights[f"{layer.path}.kernel"].shape)[0])
        else:
            value = np.zeros(shape)
        weights[name] = value.astype(dtype)
    return weights


def randomize(spec: Spec, seed: int = 0, *, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Weights for comparing implementations: every value of every tensor is distinct, random and not a default.

    Kernels keep the variance of what they read, so that the network neither dies out nor overflows at any depth.
    Values use all bits of float64: a backend that stores weights in float32 cannot hide.
    """
    damped = _before_addition(spec)
    # What n branches add must not grow with n: the logits of ResNet-152 would leave nothing of a float32 softmax.
    damping = 1 / sqrt(max(len(damped), 1))

    def drawn(row: tuple[Layer, str, Shape]) -> tuple[str, np.ndarray]:
        layer, name, shape = row
        generator = _generator(seed, name)
        factor = damping if layer.path in damped else 1.0
        match name.removeprefix(f"{layer.path}."):
            case "kernel":
                gain = 2 if layer.kind == "conv" else 1
                value = generator.standard_normal(shape) * (sqrt(gain / _fans(shape)[0]) * factor)
            case "scale":
                value = generator.uniform(0.5, 1.5, shape) * factor
            case "var":
                value = generator.uniform(0.5, 1.5, shape)
            case _:
                value = generator.normal(0.0, 0.2, shape)
        return name, value.astype(dtype, copy=False)

    # Every array has a stream of its own, and NumPy lets go of the interpreter while it fills one.
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(drawn, _arrays(spec)))


def integers(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Small integer weights under which float32 computes the network exactly, whatever the order of its sums.

    `spec` is one without rounding layers (`exact_twin`), its images integers in 0 … 15. A bound on the values of every
    channel is carried through the walk; each kernel gets as many entries of ±1 as a budget allows that grows evenly
    from the image to the last layer. Raises `WeightsError` if a sum could still reach 2^24.
    """
    limit, entries = float(EXACT_INTEGER), 8
    bounds: dict[str, np.ndarray] = {INPUT: np.full(spec.in_channels, 15.0)}
    weights: dict[str, np.ndarray] = {}
    before_addition = _before_addition(spec)
    for index, layer in enumerate(spec.layers):
        bound = bounds[layer.inputs[0]]
        if layer.kind in ("conv", "dense"):
            budget = 2 ** (4 + 18 * (index + 1) / len(spec.layers))
            count = int(np.clip(budget // np.median(bound), 1, entries))
            for name, shape in layer.arrays.items():
                generator = _generator(seed, name)
                if not name.endswith(".kernel"):
                    weights[name] = generator.integers(1, 4, shape).astype(np.float32)
                    continue
                # A branch adds to a quarter of the channels, or the sums would double with every block.
                share = 0.25 if layer.path in before_addition else 1.0
                weights[name], reach = _integer_kernel(generator, shape, bound, count, share)
                bounds[layer.path] = reach + 3
        elif layer.kind == "add":
            bounds[layer.path] = bound + bounds[layer.inputs[1]]
        elif isinstance(layer, ZeroPadShortcut):
            bounds[layer.path] = np.pad(bound, (0, layer.channels - bound.size))
        elif layer.kind == "flatten":
            pixels = next(x.in_features for x in spec.layers if isinstance(x, Dense) and layer.path in x.inputs)
            bounds[layer.path] = np.tile(bound, pixels // bound.size)
        else:
            bounds[layer.path] = bound
    worst = max(bounds, key=lambda path: float(bounds[path].max()))
    if bounds[worst].max() >= limit:
        raise WeightsError(f"integer weights may reach {bounds[worst].max():.0f} at {worst}; the limit is {limit:.0f}")
    return weights


def perturb(weights: Weights, seed: int) -> Weights:
    """The same weights with every value moved by -1, 0 or +1 unit in the last place, at random."""
    return LazyWeights({name: _perturbed(weights, name, seed) for name in weights})


def perturb_array(array: np.ndarray, seed: int, name: str) -> np.ndarray:
    """`array` with every value moved by -1, 0 or +1 unit in its last place, at random; zeros stay."""
    bits = array.view(f"i{array.itemsize}")
    # Of IEEE numbers the next larger one in magnitude has the next larger bit pattern.
    steps = _generator(seed, f"ulp of {name}").integers(-1, 2, array.shape, dtype=np.int8)
    steps[array == 0] = 0
    return (bits + steps).view(array.dtype)


def digest(arrays: Weights) -> str:
    """A digest of names, shapes, dtypes and values, the same for the same arrays in any order."""

    def of_one(name: str) -> bytes:
        array = np.asarray(arrays[name], order="C")
        one = blake2b(f"{name} {array.dtype.str} {array.shape};".encode(), digest_size=16)
        one.update(array.reshape(-1).view(np.uint8).data)
        return one.digest()

    with ThreadPoolExecutor() as pool:
        return blake2b(b"".join(pool.map(of_one, sorted(arrays))), digest_size=16).hexdigest()


def _checksums(arrays: Weights) -> dict[str, str]:
    """A checksum of every array, at the speed of memory: for accidents, not against forgers."""
    names = sorted(arrays)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(name, arrays[name]), names), strict=True))


def _checksum(name: str, array: np.ndarray) -> str:
    one = xxhash.xxh3_128(f"{name} {array.dtype.str} {array.shape};".encode())
    one.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return one.hexdigest()


def _header_checksum(metadata: Mapping[str, str]) -> str:
    told = [metadata.get(key, "") for key in ("format", "spec", "checksums")]
    return xxhash.xxh3_128(json.dumps(told).encode()).hexdigest()


def save(path: Path | str, spec: Spec, weights: Weights) -> None:
    """Write canonical weights; beside the target first, then renamed. Raises `WeightsError`.

    The metadata hold the spec, a checksum of every tensor and one of all that: `load` knows a changed file.
    """
    check_names("the weights are not this spec's", weights, shapes(spec))
    arrays = contiguous(weights)
    validate(spec, arrays)
    metadata = {"format": FORMAT, "spec": architectures.to_json(spec), "checksums": json.dumps(_checksums(arrays))}
    with written(Path(path), WeightsError) as beside:
        save_file(arrays, beside, metadata | {"header_checksum": _header_checksum(metadata)})


def load(path: Path | str, *, finite: bool = True) -> tuple[Spec, Weights]:
    """Spec and weights of a canonical file, memory-mapped: a tensor is read when it is asked for.

    Every tensor is checked against its checksum first. Raises `WeightsError` for a file that is missing, truncated,
    changed or no canonical file, for tensors that are not exactly those of the spec inside, and with `finite` for NaN
    and infinity.
    """
    path = Path(path)
    file = opened(path, WeightsError)
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise WeightsError(f"{path}: not a canonical weights file: format is {found!r}, expected {FORMAT!r}")
    try:
        spec = architectures.from_json(metadata.get("spec", ""))
        weights = mapped(path)
        validate(spec, weights, finite=finite)
        # Last: what can be named precisely has been by now.
        if metadata.get("header_checksum") != _header_checksum(metadata):
            raise WeightsError("the header was changed after it was written; fetch or make the file again")
        expected = json.loads(metadata["checksums"])
        changed = [name for name, checksum in _checksums(weights).items() if expected.get(name) != checksum]
        if changed:
            raise WeightsError(
                f"{len(changed)} tensors were changed after they were written, {changed[0]} first; "
                "fetch or make the file again"
            )
    except SpecError as error:
        raise WeightsError(f"{path}: the spec inside is damaged: {error}") from None
    except (WeightsError, SafetensorError) as error:
        raise WeightsError(f"{path}: {reason(error)}") from None
    return spec, weights


def contiguous(weights: Weights) -> dict[str, np.ndarray]:
    """All arrays in memory, contiguous; NumPy lets go of the interpreter while it copies.

    safetensors needs that: of a transposed view it writes the memory as it lies.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(weights, pool.map(lambda name: _contiguous(weights[name]), weights), strict=True))


_TILE = 128  # elements: rows read and rows written of a tile fit the caches


def _contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in C order. A transposed one is copied tile by tile, in half the time that NumPy takes."""
    long = [axis for axis in range(array.ndim) if array.shape[axis] >= _TILE]
    if len(long) < 2 or array.flags.c_contiguous:
        return np.asarray(array, order="C")
    read, write = min(long, key=lambda axis: array.strides[axis]), max(long)
    if read == write:
        return np.asarray(array, order="C")
    copy = np.empty(array.shape, array.dtype)
    tile = [slice(None)] * array.ndim
    for i in range(0, array.shape[read], _TILE):
        tile[read] = slice(i, i + _TILE)
        for j in range(0, array.shape[write], _TILE):
            tile[write] = slice(j, j + _TILE)
            copy[tuple(tile)] = array[tuple(tile)]
    return copy


def mapped(path: Path | str) -> LazyWeights:
    """The arrays of any safetensors file, views of the mapped file. Raises `WeightsError`."""
    return LazyWeights(views(Path(path), WeightsError))


def _perturbed(weights: Weights, name: str, seed: int) -> Callable[[], np.ndarray]:
    return lambda: perturb_array(weights[name], seed, name)


def _arrays(spec: Spec) -> Iterator[tuple[Layer, str, Shape]]:
    for layer in spec.layers:
        for name, shape in layer.arrays.items():
            yield layer, name, shape


def _generator(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for every tensor, so that no value depends on the order or number of the others."""
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))


def _fans(kernel: Shape) -> tuple[int, int]:
    """(fan_in, fan_out) of an HWIO or (in, out) kernel; groups already shorten its input axis."""
    window = prod(kernel[:-2])
    return window * kernel[-2], window * kernel[-1]


def _initial_kernel(generator: np.random.Generator, layer: Layer, shape: Shape, scheme: Scheme) -> np.ndarray:
    fan_in, fan_out = _fans(shape)
    if scheme == "glorot_uniform":
        return generator.uniform(-1, 1, shape) * sqrt(6 / (fan_in + fan_out))
    if scheme == "lecun_normal":
        return _truncated_normal(generator, shape) * sqrt(1 / fan_in)
    if layer.kind == "dense":
        return generator.uniform(-1, 1, shape) / sqrt(fan_in)
    return generator.standard_normal(shape) * sqrt(2 / fan_out)


def _truncated_normal(generator: np.random.Generator, shape: Shape) -> np.ndarray:
    """Standard normal cut at two deviations and scaled back to unit variance, as JAX and Keras do."""
    values = generator.standard_normal(shape)
    while (outside := np.abs(values) > 2).any():
        values[outside] = generator.standard_normal(int(outside.sum()))
    return values / 0.87962566103423978


def _before_addition(spec: Spec) -> set[str]:
    """The layers that end the residual branch of a block: the first of what an addition reads."""
    return {layer.inputs[0] for layer in spec.layers if layer.kind == "add"}


def _integer_kernel(
    generator: np.random.Generator, shape: Shape, bound: np.ndarray, count: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """A kernel of zeros with `count` entries of ±1 for a `share` of the output channels, at least one; each entry
    anywhere in the window and on one of the input channels with the smaller half of the bounds. With it, the bounds
    on the output channels."""
    kernel = np.zeros((prod(shape[:-2]), *shape[-2:]), dtype=np.float32)
    reach = np.zeros(shape[-1])
    groups = bound.size // shape[-2]
    of_group = bound.reshape(groups, -1)
    outputs = np.flatnonzero(generator.random(shape[-1]) < share)
    if not outputs.size:
        outputs = generator.integers(0, shape[-1], 1)
    group = outputs * groups // shape[-1]
    small = np.argsort(of_group, axis=1, kind="stable")[:, : -(-shape[-2] // 2)]
    for _ in range(count):
        channels = small[group, generator.integers(0, small.shape[1], outputs.size)]
        places = generator.integers(0, kernel.shape[0], outputs.size)
        kernel[places, channels, outputs] = generator.choice((1, 1, -1), outputs.size)
        reach[outputs] += of_group[group, channels]
    return kernel.reshape(shape), reach
