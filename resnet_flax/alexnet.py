"""AlexNet as a Flax linen module. No community has names for one: its modules are called as the layers of the spec are.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014 (arXiv:1404.5997), and Krizhevsky
et al. 2012. Variables are ``params/features.conv1/kernel``, ``params/head.fc1/bias``.

    model = AlexNet(num_classes=10)
    variables = model.init(jax.random.key(0), images, train=False)
    logits = model.apply(variables, images, rngs={"dropout": key})  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the pools' outputs
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.alexnet import GROUPED, KERNELS, NORMED, POOLED, VARIANTS, AlexNetSpec
from common.architectures.layers import output_shapes
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import adaptive_pool, conv_layer, local_response_norm, max_pool, tap, uniform_in_fan

Dtype = Any


class AlexNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout
    asks for random numbers called ``dropout``. `axis_name` changes nothing: the network has no statistics of a batch.
    The pools' outputs are sown as ``stages`` in the collection ``intermediates``. Initialised as by torchvision, which
    leaves it to PyTorch: weights and biases uniform in ±1 / sqrt(fan_in). Raises `InputError` for images whose shape
    the network cannot take.
    """

    spec: AlexNetSpec
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        spec = self.spec
        if x.ndim != 4 or x.shape[-1] != spec.in_channels:
            raise InputError(f"images have shape {x.shape}; expected (N, height, width, {spec.in_channels})")
        output_shapes(spec.layers, x.shape[1:])  # raises where the size does not fit

        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = partial(local_response_norm, size=spec.lrn_size, alpha=spec.lrn_alpha, beta=spec.lrn_beta, k=spec.lrn_k)
        for i, (width, kernel) in enumerate(zip(spec.widths, KERNELS, strict=True), start=1):
            strides, padding = (4, spec.padding) if i == 1 else (1, kernel // 2)
            groups = spec.groups if i in GROUPED else 1
            options: dict[str, Any] = {"padding": padding, "feature_group_count": groups, "name": f"features.conv{i}"}
            initial = uniform_in_fan(kernel**2 * x.shape[-1] // groups)
            x = conv_layer(width, kernel, strides, **options, **initial, **dtypes)(x)
            x = tap(self, f"features.relu{i}", nn.relu(x))
            if i in NORMED and spec.lrn == "before_pool":
                x = tap(self, f"features.lrn{i}", norm(x))
            if i in POOLED:
                side = spec.last_pool if i == POOLED[-1] else 3
                x = tap(self, f"features.pool{i}", max_pool(x, side, 2, padding=spec.pool_padding))
                self.sow("intermediates", "stages", x)
            if i in NORMED and spec.lrn == "behind_pool":
                x = tap(self, f"features.lrn{i}", norm(x))

        if spec.head_pool in ("average", "max"):
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        if spec.map_size:
            reduce = jnp.mean if spec.head_pool == "adaptive" else jnp.max
            x = tap(self, "head.pool", adaptive_pool(x, spec.map_size, reduce))
        x = tap(self, "head.flatten", x.reshape(x.shape[0], -1))
        for i, (features, rate) in enumerate(zip(spec.hidden, spec.dropout, strict=True), start=1):
            if rate and spec.dropout_place == "before":
                x = nn.Dropout(rate, deterministic=not train, name=f"head.dropout{i}")(x)
            x = nn.Dense(features, **uniform_in_fan(x.shape[-1]), **dtypes, name=f"head.fc{i}")(x)
            if spec.dense_activation == "relu":
                x = tap(self, f"head.relu{i}", nn.relu(x))
            if rate and spec.dropout_place == "behind":
                x = nn.Dropout(rate, deterministic=not train, name=f"head.dropout{i}")(x)
        x = nn.Dense(spec.classes, **uniform_in_fan(x.shape[-1]), **dtypes, name="head.fc")(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def native_paths(spec: AlexNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: AlexNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> AlexNet:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = AlexNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., AlexNet]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
