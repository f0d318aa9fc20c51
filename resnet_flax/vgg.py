"""VGG as a Flax linen module. No community has names for one: its modules are called as the layers of the spec are.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014 (arXiv:1409.1556).
Variables are ``params/blocks.0.conv1/kernel``, ``params/head.fc1/bias``, ``batch_stats/blocks.0.norm1/mean``.

    model = VGG16(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits = model.apply(variables, images, rngs={"dropout": key})  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the blocks' outputs
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.layers import output_shapes
from common.architectures.vgg import VARIANTS, VGGSpec
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import ModuleDef, adaptive_pool, conv_layer, no_norm, norm_layer, tap

Dtype = Any


class VGG(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout
    asks for random numbers called ``dropout``. `axis_name` averages batch statistics over that axis of a `pmap` or
    `shard_map`. The blocks' outputs are sown as ``stages`` in the collection ``intermediates``. Initialised as by
    torchvision: convolutions Kaiming-normal over fan_out, dense layers normal with a deviation of 0.01, biases zero.
    Raises `InputError` for images whose shape the network cannot take.
    """

    spec: VGGSpec
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
        kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        # The bias stays under a norm, where it does nothing: torchvision's files have it.
        conv: ModuleDef = partial(conv_layer, padding="symmetric", kernel_init=kernel_init, **dtypes)
        dense: ModuleDef = partial(nn.Dense, kernel_init=nn.initializers.normal(0.01), **dtypes)
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            axis_name=self.axis_name,
            **dtypes,
        )
        norm = norm if spec.norm else no_norm

        for b, (count, width) in enumerate(zip(spec.convs, spec.widths, strict=True)):
            for i in range(1, count + 1):
                kernel = 1 if spec.pointwise[b] and i == count else 3
                x = conv(width, kernel, name=f"blocks.{b}.conv{i}")(x)
                x = norm(name=f"blocks.{b}.norm{i}")(x)
                x = tap(self, f"blocks.{b}.relu{i}", nn.relu(x))
            x = tap(self, f"blocks.{b}.pool", nn.max_pool(x, (2, 2), (2, 2)))
            self.sow("intermediates", "stages", x)

        if spec.head_pool in ("average", "max"):
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        if spec.map_size:
            reduce = jnp.mean if spec.head_pool == "adaptive" else jnp.max
            x = tap(self, "head.pool", adaptive_pool(x, spec.map_size, reduce))
        x = tap(self, "head.flatten", x.reshape(x.shape[0], -1))
        for i, (features, rate) in enumerate(zip(spec.hidden, spec.dropout, strict=True), start=1):
            x = dense(features, name=f"head.fc{i}")(x)
            x = tap(self, f"head.relu{i}", nn.relu(x))
            if rate:
                x = nn.Dropout(rate, deterministic=not train, name=f"head.dropout{i}")(x)
        x = dense(spec.classes, name="head.fc")(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def native_paths(spec: VGGSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: VGGSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> VGG:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = VGG(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., VGG]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
