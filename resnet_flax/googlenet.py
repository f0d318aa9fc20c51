"""GoogLeNet as a Flax linen module. No community has names for one: its modules are called as the spec's layers are.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842). Variables are
``params/inception3a.branch1/kernel``, ``params/head.fc/bias``, ``batch_stats/stem.conv1_norm/mean``.

    model = GoogLeNet(num_classes=10)
    variables = model.init({"params": key, "dropout": key}, images)
    logits, aux2, aux1 = model.apply(variables, images, rngs={"dropout": key})  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures import running
from common.architectures.googlenet import VARIANTS, GoogLeNetSpec, Module
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT, output_shapes
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import (
    adaptive_pool,
    affine,
    avg_pool,
    conv_layer,
    local_response_norm,
    max_pool,
    no_norm,
    norm_layer,
    tap,
    uniform_in_fan,
)

Dtype = Any


class GoogLeNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives; in training,
    where it has auxiliary heads, to a tuple of these and of theirs, the last first.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout
    asks for random numbers called ``dropout``. `axis_name` averages batch statistics over that axis of a `pmap` or
    `shard_map`. The outputs of the stages of Inception modules are sown as ``stages`` in the collection
    ``intermediates``. Initialised as by torchvision: kernels normal with a deviation of 0.01, biases uniform in
    ±1 / sqrt(fan_in). Raises `InputError` for images whose shape the network cannot take.
    """

    spec: GoogLeNetSpec
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array | tuple[jax.Array, ...]:
        spec = self.spec
        if x.ndim != 4 or x.shape[-1] != spec.in_channels:
            raise InputError(f"images have shape {x.shape}; expected (N, height, width, {spec.in_channels})")
        heads_run = spec.aux and (train or self.is_initializing())
        output_shapes(running(spec, heads_run), x.shape[1:])  # raises where the size does not fit

        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = norm_layer(
            train=train,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
            scale=spec.bn_scale,
            axis_name=self.axis_name,
            **dtypes,
        )
        norm = norm if spec.norm else no_norm

        def initial(fan_in: int) -> dict[str, Any]:
            return uniform_in_fan(fan_in) | {"kernel_init": nn.initializers.normal(0.01)}

        def conv(x: jax.Array, width: int, name: str, kernel: int = 1, strides: int = 1) -> jax.Array:
            """A convolution, its norm, if any, and a ReLU."""
            padding = spec.stem_padding if strides > 1 else "symmetric"
            options: dict[str, Any] = {"padding": padding, "use_bias": not spec.norm, "name": name}
            x = conv_layer(width, kernel, strides, **options, **initial(kernel**2 * x.shape[-1]), **dtypes)(x)
            return tap(self, f"{name}_relu", nn.relu(norm(name=f"{name}_norm")(x)))

        def dense(x: jax.Array, features: int, name: str) -> jax.Array:
            return nn.Dense(features, **initial(x.shape[-1]), **dtypes, name=name)(x)

        def pool(x: jax.Array, side: int, name: str) -> jax.Array:
            return tap(self, name, max_pool(x, side, 2, padding=spec.pool_padding))

        def norm_of_responses(x: jax.Array, name: str) -> jax.Array:
            numbers: dict[str, Any] = {"alpha": spec.lrn_alpha, "beta": spec.lrn_beta, "k": spec.lrn_k}
            return tap(self, name, local_response_norm(x, spec.lrn_size, **numbers)) if spec.lrn else x

        def inception(x: jax.Array, module: Module) -> jax.Array:
            """Four branches of one input: 1x1, 3x3, 5x5 and a pool; their channels one after the other."""
            path = module.path
            branch1 = conv(x, module.direct, f"{path}.branch1")
            branch2 = conv(x, module.reduce3, f"{path}.branch2_reduce")
            branch2 = conv(branch2, module.wide3, f"{path}.branch2", 3)
            branch3 = conv(x, module.reduce5, f"{path}.branch3_reduce")
            # torchvision's weights were made with windows of 3x3 here, and are of no use with the paper's 5x5.
            branch3 = conv(branch3, module.wide5, f"{path}.branch3", spec.large_kernel)
            branch4 = tap(self, f"{path}.branch4_pool", max_pool(x, 3, 1, padding="symmetric"))
            branch4 = conv(branch4, module.projection, f"{path}.branch4")
            return tap(self, f"{path}.concat", jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1))

        def auxiliary(x: jax.Array, path: str) -> jax.Array:
            """A classifier of a map in the middle, which helps gradients to reach what is before it."""
            width, hidden = spec.aux_widths
            if spec.aux_pool == "adaptive":
                x = adaptive_pool(x, spec.aux_map, jnp.mean)
            else:
                x = avg_pool(x, 5, 3, padding="valid", count_padding=False)
            x = conv(tap(self, f"{path}.pool", x), width, f"{path}.conv")
            x = dense(tap(self, f"{path}.flatten", x.reshape(x.shape[0], -1)), hidden, f"{path}.fc1")
            x = tap(self, f"{path}.relu1", nn.relu(x))
            if spec.aux_dropout:
                x = nn.Dropout(spec.aux_dropout, deterministic=not train, name=f"{path}.dropout")(x)
            return dense(x, spec.classes, f"{path}.fc2")

        if spec.transform_input:
            x = tap(self, "stem.affine", affine(jnp.asarray(x, self.dtype), TRANSFORM_SCALE, TRANSFORM_SHIFT))
        first, second, third = spec.stem
        x = conv(x, first, "stem.conv1", 7, 2)
        x = norm_of_responses(pool(x, 3, "stem.pool1"), "stem.lrn1")
        x = conv(x, second, "stem.conv2")
        x = conv(x, third, "stem.conv3", 3)
        x = pool(norm_of_responses(x, "stem.lrn2"), 3, "stem.pool2")
        aux = []
        for modules, side in zip(spec.modules, (3, spec.last_pool, None), strict=True):
            for module in modules:
                x = inception(x, module)
                if heads_run and module.path in spec.auxiliary:
                    aux.append(auxiliary(x, spec.auxiliary[module.path]))
            self.sow("intermediates", "stages", x)
            if side is not None:
                x = pool(x, side, f"{module.path}.pool")

        if spec.head_pool != "none":
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train, name="head.dropout")(x)
        x = dense(x, spec.classes, "head.fc")
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return (x, *reversed(aux)) if aux and train else x


def native_paths(spec: GoogLeNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: GoogLeNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> GoogLeNet:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = GoogLeNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., GoogLeNet]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
