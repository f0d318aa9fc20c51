"""DenseNet as a Flax linen module. No community has names for one: modules are called as the layers of the spec are.

Huang et al., "Densely Connected Convolutional Networks", 2016 (arXiv:1608.06993). Variables are
``params/stem.conv/kernel``, ``params/blocks.0.layers.0/conv1/kernel``, ``batch_stats/transitions.0/norm/mean``.

    model = DenseNet121(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits, updates = model.apply(variables, images, mutable=["batch_stats"])  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the blocks' outputs
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.densenet import VARIANTS, DenseNetSpec
from common.architectures.layers import output_shapes
from common.checkpoints import Given
from common.errors import InputError
from common.names.densenet import CANONICAL_FLAX
from resnet_flax import building
from resnet_flax.layers import ModuleDef, avg_pool, conv_layer, max_pool, no_norm, norm_layer, tap

Dtype = Any


class DenseLayer(nn.Module):
    """Norm, ReLU and a 1x1 convolution, the same with a 3x3 one: `growth_rate` channels, behind those of its input."""

    spec: DenseNetSpec
    conv: ModuleDef
    norm: ModuleDef
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        y = self.norm(name="norm1")(x)
        y = tap(self, "relu1", nn.relu(y))
        y = self.conv(spec.bottleneck * spec.growth_rate, 1, name="conv1")(y)
        y = self.norm(name="norm2")(y)
        y = tap(self, "relu2", nn.relu(y))
        y = self.conv(spec.growth_rate, 3, name="conv2")(y)
        if spec.dropout:
            y = nn.Dropout(spec.dropout, deterministic=not self.train, name="dropout")(y)
        return tap(self, "concat", jnp.concatenate([x, y], axis=-1))


class Transition(nn.Module):
    """Norm, ReLU, a 1x1 convolution to fewer channels, and a pool that halves the map."""

    spec: DenseNetSpec
    conv: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec = self.spec
        width = spec.transition_width(x.shape[-1])
        x = self.norm(name="norm")(x)
        x = tap(self, "relu", nn.relu(x))
        x = self.conv(width, 1, padding=spec.transition_padding, name="conv")(x)
        average = partial(avg_pool, count_padding=False)
        pool = average if spec.transition_pool == "average" else max_pool
        return tap(self, "pool", pool(x, 2, 2, padding="valid"))


class DenseNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout,
    where `spec` has some, asks for random numbers called ``dropout``. `axis_name` averages batch statistics over that
    axis of a `pmap` or `shard_map`. The blocks' outputs are sown as ``stages`` in the collection ``intermediates``.
    Initialised as by torchvision: convolutions Kaiming-normal over fan_in, the dense layer uniform, biases zero.
    Raises `InputError` for images whose shape the network cannot take.
    """

    spec: DenseNetSpec
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        spec = self.spec
        if x.ndim != 4 or x.shape[-1] != spec.in_channels:
            raise InputError(f"images have shape {x.shape}; expected (N, height, width, {spec.in_channels})")
        output_shapes(spec.layers, x.shape[1:])  # raises where the size does not fit; XLA would average no pixels

        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        plain: ModuleDef = partial(conv_layer, kernel_init=kaiming, **dtypes)
        conv = partial(plain, padding="symmetric", use_bias=spec.conv_bias)
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            axis_name=self.axis_name,
            **dtypes,
        )
        norm = norm if spec.norm else no_norm

        x = plain(spec.stem_width, 7, 2, padding=spec.stem_padding, use_bias=False, name="stem.conv")(x)
        x = norm(name="stem.norm")(x)
        x = tap(self, "stem.relu", nn.relu(x))
        x = tap(self, "stem.pool", max_pool(x, 3, 2, padding=spec.pool_padding))
        for b, count in enumerate(spec.blocks):
            for i in range(count):
                x = DenseLayer(spec, conv, norm, train, name=f"blocks.{b}.layers.{i}")(x)
            self.sow("intermediates", "stages", x)
            if b < len(spec.blocks) - 1:
                x = Transition(spec, conv, norm, name=f"transitions.{b}")(x)

        # A dense layer begins with its activation, so that the last one's output has had none.
        x = norm(name="head.norm")(x)
        x = tap(self, "head.relu", nn.relu(x))
        if spec.head_pool != "none":
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head != "none":
            # Uniform within 1 / sqrt(fan_in), as PyTorch's dense layers are.
            kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            x = nn.Dense(spec.classes, kernel_init=kernel_init, name="head.fc", **dtypes)(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def native_paths(spec: DenseNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {path: tuple(name.split("/")) for path, name in CANONICAL_FLAX.layers(spec).items()}


def from_spec(
    spec: DenseNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> DenseNet:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = DenseNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., DenseNet]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
