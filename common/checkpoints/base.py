"""What every checkpoint format is made of: a container, which keeps tensors by name, and a naming, which says whose.

A container (`pytorch_file`, `safetensors_file`, `hdf5_file`, …) reads and writes bytes and knows no network. A naming
(`torchvision`, `huggingface`, `keras_applications`, `flax`, …) is a table from the layers of the walk to the names and
layouts of a community, and knows no file. Any naming may stand in any container that its community uses.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.errors import CheckpointError
from common.weights import LazyWeights, Weights

KernelLayout = Literal["HWIO", "OIHW"]

# Axes of a native kernel, put into canonical order, by number of axes; and back.
_TO_CANONICAL: dict[KernelLayout, dict[str, tuple[int, ...]]] = {
    "HWIO": {"conv": (0, 1, 2, 3), "dense": (0, 1)},
    "OIHW": {"conv": (2, 3, 1, 0), "dense": (1, 0)},
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: what its header says, and how to read it. `dtype` is NumPy's name of what `read` returns."""

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The content of a file, whatever names its tensors have. Nothing but headers has been read."""

    container: str  # for people: "PyTorch zip", "safetensors"
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was unwrapped or converted on the way, one line each


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """What the names alone show of a network; some communities' names of layers depend on it."""

    block: Literal["basic", "bottleneck"]
    blocks: tuple[int, ...]
    classes: int | None = None  # Keras' classic names have it in that of the classifier


class Container(Protocol):
    """A module that reads and writes one kind of file."""

    def recognises(self, path: Path) -> bool:
        """Whether the content of `path`, a file or a folder, looks like this container's; its name says nothing."""
        ...

    def read(self, path: Path) -> Source:
        """Names, shapes and types of what is inside. Raises `CheckpointError` for anything damaged or unsafe."""
        ...

    def write(self, path: Path, tensors: Weights, spec: Spec, naming: "Naming") -> None:
        """Write `tensors`, native names and layouts, beside `path` and rename. Raises `CheckpointError`."""
        ...


class Naming(Protocol):
    """A module-level object: the names and layouts of one community."""

    name: str  # as in `--to`
    title: str  # for people
    kernels: KernelLayout
    convention: Mapping[str, Any]  # the spec's fields that shapes cannot say, where they differ from the defaults

    def skeleton(self, tensors: Mapping[str, Stored]) -> Skeleton | None:
        """What the names show; None where they are not this naming's."""
        ...

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        """Native name of an array: `layer` a path of the walk (``stages.0.blocks.1.conv2``), `kind` conv, norm or
        dense, `role` kernel, bias, scale, mean or var. Total: any path of any walk has one."""
        ...

    def ignored(self, name: str) -> bool:
        """Whether a native tensor is known to belong to no layer (counters, optimiser state)."""
        ...


def widened_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16's bits, uint16: their upper half."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(array: np.ndarray) -> Stored:
    """A tensor that is in memory already."""
    return Stored(shape=array.shape, dtype=array.dtype.name, read=lambda: array)


def skeleton_of(spec: Spec) -> Skeleton:
    """The skeleton of a spec."""
    return Skeleton(block=spec.block, blocks=spec.blocks, classes=spec.classes)  # type: ignore[attr-defined]


def native_names(spec: Spec, naming: Naming) -> dict[str, tuple[str, Layer]]:
    """Canonical name of every array of the walk -> its native name and its layer. Raises `CheckpointError` if two
    arrays had one name."""
    skeleton = skeleton_of(spec)
    table: dict[str, tuple[str, Layer]] = {}
    taken: dict[str, str] = {}
    for layer in spec.layers:
        for name in layer.arrays:
            role = name.removeprefix(f"{layer.path}.")
            native = naming.array(layer.path, layer.kind, role, skeleton)
            if native in taken:
                raise CheckpointError(f"{naming.title} has one name, {native}, for {taken[native]} and {name}")
            taken[native] = name
            table[name] = native, layer
    return table


def canonical_shape(shape: Shape, kind: str, role: str, kernels: KernelLayout) -> Shape | None:
    """The canonical shape of a native array; None where it has another number of axes."""
    if role != "kernel":
        return shape if len(shape) == 1 else None
    order = _TO_CANONICAL[kernels].get(kind, ())
    return tuple(shape[axis] for axis in order) if len(order) == len(shape) else None


def to_canonical(array: np.ndarray, layer: Layer, role: str, kernels: KernelLayout) -> np.ndarray:
    """A native array with its axes in canonical order; a view where possible."""
    if role != "kernel":
        return array
    flattened: Shape | None = getattr(layer, "flattened", None)
    if kernels == "OIHW" and flattened is not None:
        # PyTorch flattens channels first; canonical kernels have them last.
        height, width, channels = flattened
        return array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.transpose(_TO_CANONICAL[kernels][layer.kind])


def to_native(array: np.ndarray, layer: Layer, role: str, kernels: KernelLayout) -> np.ndarray:
    """The inverse of `to_canonical`."""
    if role != "kernel":
        return array
    flattened: Shape | None = getattr(layer, "flattened", None)
    if kernels == "OIHW" and flattened is not None:
        return array.reshape(*flattened, -1).transpose(3, 2, 0, 1).reshape(array.shape[-1], -1)
    order = _TO_CANONICAL[kernels][layer.kind]
    return array.transpose([order.index(axis) for axis in range(len(order))])


def native_weights(spec: Spec, weights: Weights, naming: Naming) -> Weights:
    """Canonical weights under native names and in native layouts, converted one at a time."""

    def convert(name: str, layer: Layer) -> np.ndarray:
        return to_native(weights[name], layer, name.removeprefix(f"{layer.path}."), naming.kernels)

    names = native_names(spec, naming)
    return LazyWeights({native: partial(convert, name, layer) for name, (native, layer) in names.items()})


def native_layers(spec: Spec, naming: Naming) -> Iterator[tuple[Layer, dict[str, str]]]:
    """Every layer of the walk that holds arrays, with the native name of each by its role."""
    skeleton = skeleton_of(spec)
    for layer in spec.layers:
        roles = [name.removeprefix(f"{layer.path}.") for name in layer.arrays]
        if roles:
            yield layer, {role: naming.array(layer.path, layer.kind, role, skeleton) for role in roles}


def skeleton_from(convolutions: Iterable[tuple[int, int, int]]) -> Skeleton | None:
    """The skeleton that (stage, block, number of the convolution in it) of all blocks' convolutions show.

    Stages and blocks count from 0, convolutions from 1. None where there are none. Raises `CheckpointError` where a
    block or a stage is missing in between: the file is not whole.
    """
    stages: dict[int, set[int]] = {}
    most = 0
    for stage, block, conv in convolutions:
        stages.setdefault(stage, set()).add(block)
        most = max(most, conv)
    if not stages:
        return None
    for what, numbers in (("stages", set(stages)), *((f"blocks of stage {s}", b) for s, b in sorted(stages.items()))):
        # Not the difference to a whole range: a hostile name may hold any number.
        if max(numbers) >= len(numbers):
            gap = next(number for number in range(len(numbers)) if number not in numbers)
            raise CheckpointError(f"the {what} have a gap: number {gap} is missing, and {max(numbers)} is there")
    blocks = tuple(len(stages[stage]) for stage in sorted(stages))
    return Skeleton(block="bottleneck" if most >= 3 else "basic", blocks=blocks)
