"""Weights that a model and its port share, and how a fault gets into a port: another setting, or other weights."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Kernels are (height, width, in, out) and (in, out), a map is flattened as it lies channels last.
Weights = dict[str, np.ndarray]
Edit = Callable[[Weights], Weights]


class Plan:
    """What a port has otherwise: `plan("conv2.pad", 1)` is 1 where no fault says something else."""

    def __init__(self, changes: Mapping[str, Any] | None = None) -> None:
        self._changes = dict(changes or {})
        self.read: set[str] = set()

    def __call__(self, setting: str, default: Any) -> Any:
        self.read.add(setting)
        return self._changes.get(setting, default)

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self  # a copy of a model asks as well

    @property
    def unread(self) -> set[str]:
        """Changes that no model asked for: faults that were never planted."""
        return self._changes.keys() - self.read


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a network holds, and the images it is given, (height, width, channels)."""

    shapes: Mapping[str, tuple[int, ...]]
    image: tuple[int, int, int]
    pixels: bool = False  # of 0..1, and not normalised yet
    batch: int = 3

    def weights(self) -> Weights:
        """All distinct, random, and far from what a framework begins with."""
        return {name: _drawn(name, shape) for name, shape in self.shapes.items()}

    def images(self) -> np.ndarray:
        """A batch, channels last."""
        generator = np.random.default_rng(7)
        shape = (self.batch, *self.image)
        values = generator.uniform(0.0, 1.0, shape) if self.pixels else generator.normal(size=shape)
        return values.astype(np.float32)


def _drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    match name.rpartition(".")[2]:
        case "kernel":
            values = generator.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1]))
        case "scale" | "var":
            values = generator.uniform(0.5, 1.5, shape)
        case "mean":
            values = generator.uniform(0.2, 0.9, shape)  # variances, when they are exchanged
        case _:
            values = generator.normal(size=shape) * 0.3
    return values.astype(np.float32)


def conv(name: str, *shape: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
    """A convolution or dense layer: its kernel, with a bias maybe."""
    return {f"{name}.kernel": shape} | ({f"{name}.bias": shape[-1:]} if bias else {})


def norm(name: str, width: int, *, running: bool = True) -> dict[str, tuple[int, ...]]:
    roles = ("scale", "bias", "mean", "var") if running else ("scale", "bias")
    return {f"{name}.{role}": (width,) for role in roles}


def swapped(*pairs: tuple[str, str]) -> Edit:
    """Two arrays, each in the place of the other; an empty string stands for none."""

    def edit(weights: Weights) -> Weights:
        found = dict(weights)
        for one, other in pairs:
            found[one], found[other] = weights[other], weights[one]
        return found

    return edit


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """One array otherwise, of the same shape."""

    def edit(weights: Weights) -> Weights:
        other = np.ascontiguousarray(change(weights[name]))
        assert other.shape == weights[name].shape
        assert not np.array_equal(other, weights[name])
        return {**weights, name: other.astype(np.float32)}

    return edit


def initial(*names: str) -> Edit:
    """Arrays as a framework begins with: LeCun-normal kernels, ones and zeros."""

    def edit(weights: Weights) -> Weights:
        found = dict(weights)
        for name in names:
            shape = weights[name].shape
            values = np.full(shape, 1.0 if name.endswith(("scale", "var")) else 0.0)
            if name.endswith("kernel"):
                values = np.random.default_rng(5).normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
            found[name] = values.astype(np.float32)
        return found

    return edit


def bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded to it, ties to even."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A style: the module of this package, and the function there that makes the model of weights and a plan."""

    network: str
    module: str
    make: str


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One planted fault, and what the first answer to it must be."""

    name: str
    reference: str  # by the key of the catalogue's MODELS
    port: str
    cause: str
    layer: str  # by its name in the reference or the port; "" for the output
    plan: Mapping[str, Any] = field(default_factory=dict)
    weights: Edit | None = None
    modes: tuple[str, ...] = ("eval", "grad")
    dtypes: tuple[str, ...] = ("float64",)
    also: tuple[str, ...] = ()  # other causes that are as true
    why: str = ""  # they are


@dataclass(frozen=True, kw_only=True)
class Twice:
    """Two faults of one port, neither of which hides the other: of each the cause and the layer."""

    name: str
    reference: str
    port: str
    causes: tuple[tuple[str, str], tuple[str, str]]
    plan: Mapping[str, Any] = field(default_factory=dict)
    weights: Edit | None = None
    modes: tuple[str, ...] = ("eval", "grad")
