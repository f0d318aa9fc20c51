"""ResNet as a Flax linen module, its variables laid out as in the imagenet example of the Flax repository.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385); names and initialisation after
github.com/google/flax, examples/imagenet/models.py: ``conv_init``, ``bn_init``, ``BottleneckResNetBlock_0/Conv_0``,
``conv_proj``, ``norm_proj``, ``Dense_0``, in the collections ``params`` and ``batch_stats``.

    model = ResNet50(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits, updates = model.apply(variables, images, mutable=["batch_stats"])  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    c2, c3, c4, c5 = state["intermediates"]["stages"]  # the stage outputs
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.layers import output_shapes
from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.checkpoints import Given
from common.errors import InputError
from common.names.resnet import FLAX_EXAMPLE
from resnet_flax import building
from resnet_flax.layers import ModuleDef, avg_pool, conv_layer, no_norm, norm_layer, tap, window_padding

Dtype = Any


class Block(nn.Module):
    """What both blocks share: the shortcut and the addition."""

    spec: ResNetSpec
    filters: int
    squeeze: int  # channels of squeeze and excitation; 0 for none
    strides: int
    dilations: tuple[int, int]  # of a 3x3 convolution up to the strided one, and after it
    conv: ModuleDef
    norm: ModuleDef
    shortcut_norm: ModuleDef

    @property
    def conv_strides(self) -> tuple[int, int]:
        """Strides of the first two convolutions. ResNet v1 strides on the first of a bottleneck, v1.5 on the 3x3."""
        return (self.strides, 1) if self.spec.stride_in == "conv1" else (1, self.strides)

    def shortcut(self, x: jax.Array, filters: int) -> jax.Array:
        # Not `x.shape != y.shape`: a single pixel keeps its shape under a stride, and would lose its projection.
        strides = self.strides
        if strides == 1 and x.shape[-1] == filters:
            if self.spec.unused_projection and self.is_initializing():
                self.project(x, filters, strides)
            return x
        if self.spec.shortcut == "zero_pad":
            x = x[:, ::strides, ::strides]
            return tap(self, "pad", jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])]))
        if self.spec.shortcut_pool and strides > 1:
            x = tap(self, "pool", avg_pool(x, 2, 2, padding="ceil", count_padding=False))
            strides = 1
        return self.project(x, filters, strides)

    def project(self, x: jax.Array, filters: int, strides: int) -> jax.Array:
        x = self.conv(filters, 1, strides, name="conv_proj")(x)
        return self.shortcut_norm(name="norm_proj")(x)

    def excite(self, y: jax.Array) -> jax.Array:
        """A gate a channel, of what all pixels have in common (Hu et al. 2017, arXiv:1709.01507)."""
        conv = partial(self.conv, use_bias=True)
        gate = tap(self, "se.pool", jnp.mean(y, axis=(1, 2), keepdims=True))
        gate = tap(self, "se.relu", nn.relu(conv(self.squeeze, 1, name="se_reduce")(gate)))
        gate = tap(self, "se.sigmoid", nn.sigmoid(conv(y.shape[-1], 1, name="se_expand")(gate)))
        return tap(self, "se.gate", y * gate)

    def merge(self, y: jax.Array, x: jax.Array, last: str) -> jax.Array:
        """What follows the last norm of the branch. `last` is the name of the ReLU before the addition."""
        if self.squeeze:
            y = self.excite(y)
        if self.spec.relu_before_add:
            y = tap(self, last, nn.relu(y))
        if self.spec.shortcut != "none":
            y = tap(self, "add", y + self.shortcut(x, y.shape[-1]))
        return tap(self, "relu", nn.relu(y)) if self.spec.relu_after_add else y


class ResNetBlock(Block):
    """Two 3x3 convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.conv_strides
        before, after = self.dilations
        dilation = after if self.spec.stride_in == "conv1" else before
        conv, norm = self.conv(self.filters, 3, first, before), self.norm()
        y = tap(self, "relu1", nn.relu(norm(conv(x))))
        shared = self.spec.shared
        alike = (x.shape[-1], first, before) == (self.filters, second, dilation)
        if shared != "conv" or not alike:
            conv = self.conv(self.filters, 3, second, dilation)
        if shared == "none" or (shared == "conv" and not alike):
            norm = self.norm(scale_init=nn.initializers.zeros)
        return self.merge(norm(conv(y)), x, "relu2")


class BottleneckResNetBlock(Block):
    """1x1, 3x3 and 1x1 convolutions, the second grouped in a ResNeXt."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = self.conv_strides
        before, after = self.dilations
        inner = self.spec.inner_width(self.filters)
        dilation = after if self.spec.stride_in == "conv1" else before
        norm = self.norm()
        y = self.conv(inner, 1, first)(x)
        y = tap(self, "relu1", nn.relu(norm(y)))
        y = self.conv(inner, 3, second, dilation, feature_group_count=self.spec.groups)(y)
        norm = norm if self.spec.shared == "norm" else self.norm()
        y = tap(self, "relu2", nn.relu(norm(y)))
        y = self.conv(self.filters * self.spec.expansion, 1)(y)
        # The third norm keeps its name where there is no second.
        y = self.norm(scale_init=nn.initializers.zeros, name="BatchNorm_2")(y)
        return self.merge(y, x, "relu3")


BLOCKS: dict[str, type[Block]] = {"basic": ResNetBlock, "bottleneck": BottleneckResNetBlock}


class ResNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In bfloat16 Flax
    computes batch statistics in float32, and keeps the running ones so. `axis_name` averages batch statistics over
    that axis of a `pmap` or `shard_map`. The stages' outputs are sown as ``stages`` in the collection
    ``intermediates``.
    Raises `InputError` for images whose shape the network cannot take.
    """

    spec: ResNetSpec
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
        conv: ModuleDef = partial(conv_layer, padding=spec.block_padding, use_bias=spec.conv_bias, **dtypes)
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            axis_name=self.axis_name,
            **dtypes,
        )
        shortcut_norm = norm if spec.shortcut_norm else no_norm
        norm = norm if spec.norm else no_norm

        strides = spec.stem_stride
        numbered = [(str(i), width) for i, width in enumerate(spec.deep_stem, start=1)]
        for number, width in (*numbered, ("", spec.stem_width)):
            name = f"init_{number}" if number else "init"
            x = conv(width, spec.stem_kernel, strides, padding=spec.stem_padding, name=f"conv_{name}")(x)
            x = norm(name=f"bn_{name}")(x)
            x, strides = tap(self, f"relu{number}", nn.relu(x)), 1
        if spec.stem_pool:
            # Padded with -inf.
            x = tap(self, "pool", nn.max_pool(x, (3, 3), (2, 2), window_padding(spec.pool_padding, 3, 2)))

        block_cls, dilation = BLOCKS[spec.block], 1
        for i, block_size in enumerate(spec.blocks):
            before = dilation
            dilation *= 2 if i > 0 and spec.replace_stride_with_dilation[i - 1] else 1
            for j in range(block_size):
                x = block_cls(
                    spec=spec,
                    filters=spec.widths[i],
                    squeeze=spec.squeeze[i] if spec.squeeze else 0,
                    strides=spec.stage_strides[i] if j == 0 else 1,
                    dilations=(before if j == 0 else dilation, dilation),
                    conv=conv,
                    norm=norm,
                    shortcut_norm=shortcut_norm,
                )(x)
            self.sow("intermediates", "stages", x)

        if spec.head_pool == "flatten":
            x = tap(self, "flatten", x.reshape(x.shape[0], -1))
        elif spec.head_pool != "none":
            x = tap(self, "global_pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head != "none":
            x = nn.Dense(spec.classes, **dtypes)(x)
        if spec.head == "softmax":
            x = tap(self, "softmax", nn.softmax(x))
        return x


def native_paths(spec: ResNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    modules = {path: tuple(name.split("/")) for path, name in FLAX_EXAMPLE.layers(spec).items()}
    return {layer.path: modules.get(layer.path) or tap_path(layer.path, modules) for layer in spec.layers}


def tap_path(layer: str, modules: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Path of what `tap` sows for a layer that is no module."""
    where, _, rest = layer.partition(".")
    if where != "stages":
        return ("global_pool" if layer == "head.pool" else rest,)
    _, stage, _, block, part = layer.split(".", 4)
    return modules[f"stages.{stage}.blocks.{block}.conv1"][0], part.removeprefix("shortcut.")


def from_spec(
    spec: ResNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> ResNet:
    """The module of any specification.

    With `weights` that fit the spec (a reference to a checkpoint of any known format, one that was read, or arrays by
    canonical name) the module comes bound to these variables: call it as it is, or take ``model, variables =
    bound.unbind()``. Raises `WeightsError` for a file that cannot be read or holds the weights of another spec.
    """
    model = ResNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., ResNet]:
    """The public function that makes a named variant, in the convention of the Flax example."""
    spec = VARIANTS[variant].replace(**CONVENTIONS["flax_examples"])
    return building.builder(variant, spec, from_spec, "in the convention of the Flax example")
