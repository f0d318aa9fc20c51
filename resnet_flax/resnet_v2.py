"""ResNet with pre-activation as a Flax linen module. No community has names for one: its modules are called as the
layers of the spec are.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (arXiv:1603.05027). Variables are
``params/stem.conv/kernel``, ``params/stages.0.blocks.0.conv1/kernel``, ``batch_stats/stages.0.blocks.0.norm1/mean``.

    model = ResNet50V2(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits, updates = model.apply(variables, images, mutable=["batch_stats"])  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    c2, c3, c4, c5 = state["intermediates"]["stages"]  # the last sum at each resolution
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.layers import output_shapes
from common.architectures.resnet_v2 import VARIANTS, ResNetV2Spec
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import ModuleDef, conv_layer, max_pool, no_norm, norm_layer, tap, zero_pad

Dtype = Any


class ResNetV2(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. `axis_name` averages
    batch statistics over that axis of a `pmap` or `shard_map`. The last sum at each resolution, before any norm and
    ReLU, is sown as ``stages`` in the collection ``intermediates``. Initialised as torchvision's ResNet: convolutions
    Kaiming-normal over fan_out, the dense layer uniform, biases of convolutions zero.
    Raises `InputError` for images whose shape the network cannot take.
    """

    spec: ResNetV2Spec
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
        conv: ModuleDef = partial(
            conv_layer, padding="symmetric", use_bias=spec.conv_bias, kernel_init=kernel_init, **dtypes
        )
        # Of a convolution that a norm follows.
        inner: ModuleDef = partial(conv, use_bias=spec.conv_bias and not spec.norm)
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            axis_name=self.axis_name,
            **dtypes,
        )
        norm = norm if spec.norm else no_norm

        def norm_relu(x: jax.Array, where: str, number: str = "") -> jax.Array:
            return tap(self, f"{where}.relu{number}", nn.relu(norm(name=f"{where}.norm{number}")(x)))

        def block(x: jax.Array, width: int, strides: int, project: bool, path: str) -> jax.Array:
            first, second = (strides, 1) if spec.stride_in == "conv1" else (1, strides)
            y = norm_relu(x, path, "1")
            # A projection reads what is normalised and activated, an identity what is not.
            if project:
                x = conv(width * spec.expansion, 1, strides, name=f"{path}.shortcut.conv")(y)
            elif strides > 1:
                x = tap(self, f"{path}.shortcut.pool", x[:, ::strides, ::strides])  # a max-pool of single pixels
            y = inner(width, 1, first, name=f"{path}.conv1")(y)
            y = inner(width, 3, second, name=f"{path}.conv2")(norm_relu(y, path, "2"))
            y = conv(width * spec.expansion, 1, name=f"{path}.conv3")(norm_relu(y, path, "3"))
            return tap(self, f"{path}.add", y + x)

        x = conv(spec.stem_width, spec.stem_kernel, spec.stem_stride, name="stem.conv")(x)
        if spec.stem_pool and spec.pool_padding == "zeros":
            # No ReLU stands before it: these zeros win over negative values, where a pool's own padding never wins.
            x = tap(self, "stem.pad", zero_pad(x, 1))
        if spec.stem_pool:
            padding = "valid" if spec.pool_padding == "zeros" else spec.pool_padding
            x = tap(self, "stem.pool", max_pool(x, 3, 2, padding=padding))
        for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
            for b in range(count):
                strides = spec.stride(s, b)
                if strides > 1:
                    self.sow("intermediates", "stages", x)
                x = block(x, width, strides, b == 0, f"stages.{s}.blocks.{b}")
        self.sow("intermediates", "stages", x)
        x = norm_relu(x, "head")

        if spec.head_pool != "none":
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head != "none":
            x = nn.Dense(
                spec.classes,
                kernel_init=_uniform(x.shape[-1]),
                bias_init=_uniform(x.shape[-1]),
                **dtypes,
                name="head.fc",
            )(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def _uniform(features: int) -> Callable[..., jax.Array]:
    """Initial values between ±1 / sqrt(features)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / features**0.5

    return init


def native_paths(spec: ResNetV2Spec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: ResNetV2Spec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> ResNetV2:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = ResNetV2(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., ResNetV2]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "as keras.applications has it, with logits")
