"""Weights as they are passed around: a mapping from canonical name to array, checked against a spec, and digested."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.errors import WeightsError
from common.files import views

Weights = Mapping[str, np.ndarray]


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


def layer_arrays(spec: Spec) -> Iterator[tuple[Layer, str, Shape]]:
    """(layer, canonical name, shape) of every array of the spec, in walk order."""
    for layer in spec.layers:
        for name, shape in layer.arrays.items():
            yield layer, name, shape


def role_of(name: str, layer: Layer) -> str:
    """What an array is in its layer, from its canonical name: kernel, bias, scale, mean or var."""
    return name.removeprefix(f"{layer.path}.")


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


def suspicious(spec: Spec, weights: Weights) -> list[str]:
    """What a careful person would want to know of these numbers before using them, one line each."""
    found = []
    for layer, name, _ in layer_arrays(spec):
        array, role = weights[name], role_of(name, layer)
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            found.append(f"{name}: {bad} of {array.size} values are NaN or infinite")
        elif role == "scale" and not array.any():
            found.append(f"{name}: all zero; the branch before it adds nothing")
        elif role == "kernel" and not array.any():
            found.append(f"{name}: all zero")
        elif role == "var" and (array <= 0).any():
            found.append(f"{name}: {int((array <= 0).sum())} of {array.size} running variances are not above 0")
    return found


def digest(arrays: Weights) -> str:
    """A digest of names, shapes, dtypes and values, the same for the same arrays in any order."""

    def of_one(name: str) -> bytes:
        array = np.asarray(arrays[name], order="C")
        one = blake2b(f"{name} {array.dtype.str} {array.shape};".encode(), digest_size=16)
        one.update(array.reshape(-1).view(np.uint8).data)
        return one.digest()

    with ThreadPoolExecutor() as pool:
        return blake2b(b"".join(pool.map(of_one, sorted(arrays))), digest_size=16).hexdigest()


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
