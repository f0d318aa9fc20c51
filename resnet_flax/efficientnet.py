"""EfficientNet as a Flax linen module. No community has weights under names of its own: its modules are called as the
layers of the spec are.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019 (arXiv:1905.11946).
Variables are ``params/stages.1.blocks.0.expand/kernel``, ``params/head.fc/bias``, ``batch_stats/stem.norm/mean``.

    model = EfficientNetB0(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits = model.apply(variables, images, rngs={"dropout": key})  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the last stage's output at each resolution
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.efficientnet import VARIANTS, Block, EfficientNetSpec
from common.architectures.layers import output_shapes
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import ACTIVATIONS, ModuleDef, affine, conv_layer, no_norm, norm_layer, stochastic_depth, tap

Dtype = Any


class EfficientNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout and
    stochastic depth ask for random numbers called ``dropout``. `axis_name` averages batch statistics over that axis of
    a `pmap` or `shard_map`. The last stage's output at each resolution is sown as ``stages`` in the collection
    ``intermediates``. Initialised as by torchvision: convolutions Kaiming-normal over fan_out, a depthwise one's of all
    channels; the dense layer uniform in ±1 / sqrt(classes), biases zero. Raises `InputError` for images whose shape the
    network cannot take.
    """

    spec: EfficientNetSpec
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
        conv: ModuleDef = partial(conv_layer, padding=spec.padding, kernel_init=kernel_init, **dtypes)
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            axis_name=self.axis_name,
            **dtypes,
        )
        norm = norm if spec.norm else no_norm
        act, gate_act = ACTIVATIONS[spec.activation], ACTIVATIONS[spec.gate_activation]

        def gated(x: jax.Array, block: Block) -> jax.Array:
            """Squeeze and excitation: each channel times a number in 0 … 1 that all channels' averages give."""
            y = tap(self, f"{block.path}.squeeze_pool", jnp.mean(x, axis=(1, 2), keepdims=True))
            y = conv(block.squeezed, 1, name=f"{block.path}.squeeze")(y)
            y = tap(self, f"{block.path}.squeeze_act", act(y))
            y = conv(block.expanded, 1, name=f"{block.path}.excite")(y)
            return tap(self, f"{block.path}.gate", x * tap(self, f"{block.path}.excite_act", gate_act(y)))

        def mbconv(x: jax.Array, block: Block) -> jax.Array:
            """Wide inside, narrow outside; nothing bends behind the projection."""
            path, shortcut = block.path, x
            if block.expanded != block.in_channels:
                x = conv(block.expanded, 1, use_bias=False, name=f"{path}.expand")(x)
                x = norm(name=f"{path}.expand_norm")(x)
                x = tap(self, f"{path}.expand_act", act(x))
            depthwise = {"feature_group_count": block.expanded, "use_bias": False, "name": f"{path}.depthwise"}
            x = conv(block.expanded, block.kernel, block.stride, **depthwise)(x)
            x = norm(name=f"{path}.depthwise_norm")(x)
            x = tap(self, f"{path}.depthwise_act", act(x))
            if block.squeezed:
                x = gated(x, block)
            x = conv(block.out_channels, 1, use_bias=False, name=f"{path}.project")(x)
            x = norm(name=f"{path}.project_norm")(x)
            if not block.residual:
                return x
            if block.drop:
                x = stochastic_depth(block.drop, train=train, name=f"{path}.drop")(x)
            return tap(self, f"{path}.add", x + shortcut)

        first = spec.layers[0]
        if first.kind == "affine":
            x = tap(self, first.path, affine(jnp.asarray(x, self.dtype), first.scale, first.shift))  # type: ignore[attr-defined]
        x = conv(spec.stem_width, 3, 2, use_bias=False, name="stem.conv")(x)
        x = norm(name="stem.norm")(x)
        x = tap(self, "stem.act", act(x))
        for s, blocks in enumerate(spec.stages):
            for block in blocks:
                x = mbconv(x, block)
            if s in spec.levels:
                self.sow("intermediates", "stages", x)
        x = conv(spec.head_width, 1, use_bias=False, name="head.conv")(x)
        x = norm(name="head.norm")(x)
        x = tap(self, "head.act", act(x))
        if spec.head_pool != "none":
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train, name="head.dropout")(x)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")
        x = nn.Dense(spec.classes, kernel_init=uniform, name="head.fc", **dtypes)(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def native_paths(spec: EfficientNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: EfficientNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> EfficientNet:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = EfficientNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., EfficientNet]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
