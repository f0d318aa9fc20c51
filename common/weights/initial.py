"""Weights to start training from."""

from math import sqrt
from typing import Literal, get_args

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Layer, Shape
from common.errors import WeightsError
from common.weights.arrays import layer_arrays, role_of
from common.weights.random import before_addition, fans, generator_for

Scheme = Literal["kaiming_fan_out", "glorot_uniform", "lecun_normal"]


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
    zeroed = before_addition(spec) if zero_gamma else set()
    weights: dict[str, np.ndarray] = {}
    for layer, name, shape in layer_arrays(spec):
        role = role_of(name, layer)
        if role == "kernel":
            value = _initial_kernel(generator_for(seed, name), layer, shape, scheme)
        elif role in ("scale", "var"):
            value = np.full(shape, 0.0 if role == "scale" and layer.path in zeroed else 1.0)
        elif layer.kind == "dense" and scheme == "kaiming_fan_out":
            kernel = weights[f"{layer.path}.kernel"]
            value = generator_for(seed, name).uniform(-1, 1, shape) / sqrt(fans(kernel.shape, layer)[0])
        else:
            value = np.zeros(shape)
        weights[name] = value.astype(dtype)
    return weights


def _initial_kernel(generator: np.random.Generator, layer: Layer, shape: Shape, scheme: Scheme) -> np.ndarray:
    fan_in, fan_out = fans(shape, layer)
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
