"""Evidence of layers for the tests of a diagnosis: what PyTorch, JAX and Keras compute, never what NumPy does here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.diagnosis.evidence import Backward, LayerEvidence, Side, Statistics
from common.foreign.operations import Operation

Tensor = torch.Tensor
Arrays = Mapping[str, np.ndarray]
LIMIT = 1e-13  # of a layer's norm


def drawn(*shape: int, seed: int = 0, low: float | None = None) -> np.ndarray:
    """Normal values; from `low` on uniform ones."""
    generator = np.random.default_rng([seed, *shape])
    return generator.standard_normal(shape) if low is None else generator.uniform(low, low + 1, shape)


def first(x: np.ndarray) -> Tensor:
    """An image as PyTorch has it."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def last(x: Tensor) -> np.ndarray:
    """And back."""
    return np.ascontiguousarray(np.moveaxis(x.detach().numpy(), 1, -1))


def weight(kernel: np.ndarray) -> Tensor:
    """A kernel as PyTorch has it: (out, in, ...)."""
    axes = range(kernel.ndim - 2)
    return torch.from_numpy(np.ascontiguousarray(kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *axes)))


def tensor(x: np.ndarray | None) -> Any:
    return None if x is None else torch.from_numpy(np.ascontiguousarray(x))


def conv(x: np.ndarray, arrays: Arrays, before: tuple[int, ...] = (), **settings: Any) -> np.ndarray:
    """torch.nn.functional.conv, of pixels padded `before` as F.pad has them."""
    call = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    return last(call(F.pad(first(x), before), weight(arrays["kernel"]), tensor(arrays.get("bias")), **settings))


def norm(x: np.ndarray, arrays: Arrays, *, training: bool = False, eps: float = 1e-5) -> np.ndarray:
    """A batch norm."""
    roles = ("mean", "var", "scale", "bias")
    mean, var, scale, bias = (tensor(None if arrays.get(role) is None else arrays[role].copy()) for role in roles)
    return last(F.batch_norm(first(x), mean, var, scale, bias, training=training, eps=eps))


def norm_arrays(channels: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Of a batch norm, none of them at its default."""
    roles = {"scale": 0.5, "bias": -0.4, "mean": -0.6, "var": 0.3}
    return {role: drawn(channels, seed=seed + at, low=low) for at, (role, low) in enumerate(roles.items())}


def evidence(
    operation: Operation | None,
    inputs: Any,
    reference: np.ndarray,
    yours: np.ndarray,
    arrays: Arrays | None = None,
    own: Arrays | None = None,
    *,
    backend: str = "torch",
    training: bool = False,
    said: Operation | None = None,
    statistics: tuple[Statistics, Statistics] | None = None,
    backward: tuple[Backward, Backward] | None = None,
    limit: float | None = None,
) -> LayerEvidence:
    """Evidence of one layer; arrays of yours are the reference's where none are given."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    arrays = {} if arrays is None else arrays

    def side(of: str, operation: Operation | None, output: np.ndarray, own: Arrays) -> Side:
        return Side(backend=of, layer="layer", kind="Layer", operation=operation, arrays=own, outputs=(output,))

    return LayerEvidence(
        training=training,
        inputs=inputs,
        reference=side("torch", operation, reference, arrays),
        yours=side(backend, said, yours, arrays if own is None else own),
        limit=LIMIT * float(np.linalg.norm(reference)) if limit is None else limit,
        statistics=statistics,
        backward=backward,
    )


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A planted fault, and how it has to be named."""

    name: str
    cause: str
    make: Callable[[], Any]  # the evidence
    says: str = ""  # a part of what yours does, in words
    remedy: str = ""  # a part of the remedy
