"""What every checkpoint format is made of: a container, which keeps tensors by name, and a naming, which says whose.

A container (`pytorch_file`, `safetensors_file`, `hdf5_file`, …) reads and writes bytes and knows no network. A naming
(`torchvision`, `huggingface`, `keras_applications`, `flax`, …) is a table from the layers of the walk to the names and
layouts of a community, and knows no file. Any naming may stand in any container that its community uses.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.checkpoints.containers import Stored
from common.errors import CheckpointError
from common.weights import LazyWeights, Weights

KernelLayout = Literal["HWIO", "OIHW"]

# Axes of a native kernel, put into canonical order, by number of axes; and back.
_TO_CANONICAL: dict[KernelLayout, dict[str, tuple[int, ...]]] = {
    "HWIO": {"conv": (0, 1, 2, 3), "dense": (0, 1)},
    "OIHW": {"conv": (2, 3, 1, 0), "dense": (1, 0)},
}


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """What the names alone show of a network; some communities' names of layers depend on it."""

    block: Literal["basic", "bottleneck"]
    blocks: tuple[int, ...]
    classes: int | None = None  # Keras' classic names have it in that of the classifier


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

    def usual(self, tensors: Mapping[str, Stored]) -> tuple[Mapping[str, Stored], tuple[str, ...]]:
        """The tensors with other spellings that this community has for a name replaced by the one used here, and a note
        on what a person should know of it."""
        ...

    def told(self, path: Path) -> tuple[str, ...]:
        """Notes on what files that this community writes beside its weights, which are at `path`, say of them."""
        ...

    # Writing

    metadata: Mapping[str, str]  # what the community's loaders look for, in a file that can hold it

    def ordered(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """Layers with arrays, in the order in which this community's files have them."""
        ...

    def counters(self, layer: Layer, scale: str) -> Mapping[str, np.ndarray]:
        """What its loaders want of a norm whose scale has the native name `scale`, and no network computes with."""
        ...

    def beside(self, path: Path, spec: Spec) -> Mapping[str, str]:
        """Files that belong beside weights at `path`: name -> text. Raises `CheckpointError` where they cannot be."""
        ...


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
    """What a file of this naming holds: native names, layouts and order, and counters; each made when asked for."""

    def convert(name: str, layer: Layer) -> np.ndarray:
        return to_native(weights[name], layer, name.removeprefix(f"{layer.path}."), naming.kernels)

    names = native_names(spec, naming)
    getters: dict[str, Callable[[], np.ndarray]] = {}
    for layer in naming.ordered([layer for layer in spec.layers if layer.arrays]):
        getters |= {names[name][0]: partial(convert, name, layer) for name in layer.arrays}
        if layer.kind == "norm":
            counters = naming.counters(layer, names[f"{layer.path}.scale"][0])
            getters |= {name: partial(counters.__getitem__, name) for name in counters}
    return LazyWeights(getters)


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
