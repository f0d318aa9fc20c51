"""Inception v3 as a Flax linen module. No community has names for one: its modules are called as the layers of the
spec are.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015 (arXiv:1512.00567). Variables are
``params/stages.0.blocks.0.branch1x1.conv/kernel``, ``params/head.fc/bias``, ``batch_stats/stem.1a.norm/mean``.

    model = InceptionV3(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits, auxiliary = model.apply(variables, images, rngs={"dropout": key})  # training
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the last map at each resolution
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures import running
from common.architectures.inception_v3 import VARIANTS, InceptionV3Spec, Pool
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT, output_shapes
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import (
    ModuleDef,
    affine,
    avg_pool,
    conv_layer,
    max_pool,
    no_norm,
    norm_layer,
    tap,
    uniform_in_fan,
)

Dtype = Any


class InceptionV3(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives; in training to
    the pair of these and the auxiliary logits, where there are any.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. In training dropout
    asks for random numbers called ``dropout``. `axis_name` averages batch statistics over that axis of a `pmap` or
    `shard_map`. The last map at each resolution is sown as ``stages`` in the collection ``intermediates``. Initialised
    as by torchvision: kernels normal with a deviation of 0.1, of the auxiliary classifier 0.001; biases uniform in
    ±1 / sqrt(fan_in). Raises `InputError` for images whose shape the network cannot take.
    """

    spec: InceptionV3Spec
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array | tuple[jax.Array, ...]:
        spec, c = self.spec, self.spec.width
        if x.ndim != 4 or x.shape[-1] != spec.in_channels:
            raise InputError(f"images have shape {x.shape}; expected (N, height, width, {spec.in_channels})")
        # The arrays of the auxiliary branch are there from the start, whatever the mode.
        with_aux = spec.aux and (train or spec.aux_in_eval or self.is_initializing())
        output_shapes(running(spec, training=with_aux), x.shape[1:])  # raises where the size does not fit

        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = norm_layer(train=train, axis_name=self.axis_name, **spec.norm_options, **dtypes)
        norm = norm if spec.norm else no_norm
        # torchvision cuts off at 2, no multiple of the deviation: nothing.
        kernel_init = nn.initializers.normal(0.1)
        convolution: ModuleDef = partial(conv_layer, use_bias=not spec.norm, kernel_init=kernel_init, **dtypes)

        def conv(
            x: jax.Array,
            path: str,
            features: int,
            kernel: int | tuple[int, int] = 1,
            stride: int = 1,
            padded: bool = True,
        ) -> jax.Array:
            """A convolution, a norm and a ReLU; padded where it does not stride."""
            padding = "symmetric" if padded and stride == 1 else "valid"
            x = convolution(features, kernel, stride, padding=padding, name=f"{path}.conv")(x)
            x = norm(name=f"{path}.norm")(x)
            return tap(self, f"{path}.relu", nn.relu(x))

        def pool(x: jax.Array, op: Pool, path: str) -> jax.Array:
            """That of a module which does not halve."""
            if op == "max":
                return tap(self, path, max_pool(x, 3, 1, padding="symmetric"))
            # torchvision's average counts the zeros at the borders, that of the first network does not.
            return tap(self, path, avg_pool(x, 3, 1, padding="symmetric", count_padding=spec.count_padding))

        def halved(x: jax.Array, path: str) -> jax.Array:
            return tap(self, path, nn.max_pool(x, (3, 3), (2, 2)))

        def concat(path: str, *branches: jax.Array) -> jax.Array:
            return tap(self, path, jnp.concatenate(branches, axis=-1))

        def inception_a(x: jax.Array, path: str, pool_features: int) -> jax.Array:
            """1x1, 5x5, two 3x3 and a pool, side by side."""
            branch1x1 = conv(x, f"{path}.branch1x1", c(64))
            branch5x5 = conv(x, f"{path}.branch5x5_1", c(48))
            branch5x5 = conv(branch5x5, f"{path}.branch5x5_2", c(64), 5)
            branch3x3dbl = conv(x, f"{path}.branch3x3dbl_1", c(64))
            branch3x3dbl = conv(branch3x3dbl, f"{path}.branch3x3dbl_2", c(96), 3)
            branch3x3dbl = conv(branch3x3dbl, f"{path}.branch3x3dbl_3", c(96), 3)
            branch_pool = pool(x, spec.branch_pool, f"{path}.pool")
            branch_pool = conv(branch_pool, f"{path}.branch_pool", pool_features)
            return concat(f"{path}.concat", branch1x1, branch5x5, branch3x3dbl, branch_pool)

        def inception_b(x: jax.Array, path: str) -> jax.Array:
            """Halves the map: 3x3, two 3x3 and a pool."""
            branch3x3 = conv(x, f"{path}.branch3x3", c(384), 3, 2)
            branch3x3dbl = conv(x, f"{path}.branch3x3dbl_1", c(64))
            branch3x3dbl = conv(branch3x3dbl, f"{path}.branch3x3dbl_2", c(96), 3)
            branch3x3dbl = conv(branch3x3dbl, f"{path}.branch3x3dbl_3", c(96), 3, 2)
            return concat(f"{path}.concat", branch3x3, branch3x3dbl, halved(x, f"{path}.pool"))

        def inception_c(x: jax.Array, path: str, c7: int) -> jax.Array:
            """1x1, 7x7 and two 7x7 as rows and columns, and a pool; kernels are (height, width)."""
            branch1x1 = conv(x, f"{path}.branch1x1", c(192))
            branch7x7 = conv(x, f"{path}.branch7x7_1", c7)
            branch7x7 = conv(branch7x7, f"{path}.branch7x7_2", c7, (1, 7))
            branch7x7 = conv(branch7x7, f"{path}.branch7x7_3", c(192), (7, 1))
            branch7x7dbl = conv(x, f"{path}.branch7x7dbl_1", c7)
            branch7x7dbl = conv(branch7x7dbl, f"{path}.branch7x7dbl_2", c7, (7, 1))
            branch7x7dbl = conv(branch7x7dbl, f"{path}.branch7x7dbl_3", c7, (1, 7))
            branch7x7dbl = conv(branch7x7dbl, f"{path}.branch7x7dbl_4", c7, (7, 1))
            branch7x7dbl = conv(branch7x7dbl, f"{path}.branch7x7dbl_5", c(192), (1, 7))
            branch_pool = pool(x, spec.branch_pool, f"{path}.pool")
            branch_pool = conv(branch_pool, f"{path}.branch_pool", c(192))
            return concat(f"{path}.concat", branch1x1, branch7x7, branch7x7dbl, branch_pool)

        def inception_d(x: jax.Array, path: str) -> jax.Array:
            """Halves the map: 3x3, 7x7 with 3x3 and a pool."""
            branch3x3 = conv(x, f"{path}.branch3x3_1", c(192))
            branch3x3 = conv(branch3x3, f"{path}.branch3x3_2", c(320), 3, 2)
            branch7x7x3 = conv(x, f"{path}.branch7x7x3_1", c(192))
            branch7x7x3 = conv(branch7x7x3, f"{path}.branch7x7x3_2", c(192), (1, 7))
            branch7x7x3 = conv(branch7x7x3, f"{path}.branch7x7x3_3", c(192), (7, 1))
            branch7x7x3 = conv(branch7x7x3, f"{path}.branch7x7x3_4", c(192), 3, 2)
            return concat(f"{path}.concat", branch3x3, branch7x7x3, halved(x, f"{path}.pool"))

        def inception_e(x: jax.Array, path: str, op: Pool) -> jax.Array:
            """1x1, 3x3 and two 3x3 that end in a row beside a column, and a pool."""
            branch1x1 = conv(x, f"{path}.branch1x1", c(320))
            branch3x3 = conv(x, f"{path}.branch3x3_1", c(384))
            row = conv(branch3x3, f"{path}.branch3x3_2a", c(384), (1, 3))
            column = conv(branch3x3, f"{path}.branch3x3_2b", c(384), (3, 1))
            branch3x3 = concat(f"{path}.branch3x3", row, column)
            branch3x3dbl = conv(x, f"{path}.branch3x3dbl_1", c(448))
            branch3x3dbl = conv(branch3x3dbl, f"{path}.branch3x3dbl_2", c(384), 3)
            row = conv(branch3x3dbl, f"{path}.branch3x3dbl_3a", c(384), (1, 3))
            column = conv(branch3x3dbl, f"{path}.branch3x3dbl_3b", c(384), (3, 1))
            branch3x3dbl = concat(f"{path}.branch3x3dbl", row, column)
            branch_pool = conv(pool(x, op, f"{path}.pool"), f"{path}.branch_pool", c(192))
            return concat(f"{path}.concat", branch1x1, branch3x3, branch3x3dbl, branch_pool)

        def dense(x: jax.Array, path: str, deviation: float) -> jax.Array:
            inits = uniform_in_fan(x.shape[-1]) | {"kernel_init": nn.initializers.normal(deviation)}
            return nn.Dense(spec.classes, **inits, **dtypes, name=path)(x)

        def auxiliary(x: jax.Array) -> jax.Array:
            """Logits of the last map at a stride of 16, of 17x17 at least."""
            x = tap(self, "aux.pool", nn.avg_pool(x, (5, 5), (3, 3)))
            x = conv(x, "aux.conv0", c(128))
            x = conv(x, "aux.conv1", c(768), 5, padded=False)
            return dense(tap(self, "aux.average", jnp.mean(x, axis=(1, 2))), "aux.fc", 0.001)

        if spec.transform_input:
            x = tap(self, "stem.affine", affine(jnp.asarray(x, self.dtype), TRANSFORM_SCALE, TRANSFORM_SHIFT))
        x = conv(x, "stem.1a", c(32), 3, 2)
        x = conv(x, "stem.2a", c(32), 3, padded=False)
        x = conv(x, "stem.2b", c(64), 3)
        self.sow("intermediates", "stages", x)
        x = halved(x, "stem.pool1")
        x = conv(x, "stem.3b", c(80))
        x = conv(x, "stem.4a", c(192), 3, padded=False)
        self.sow("intermediates", "stages", x)
        x = halved(x, "stem.pool2")
        for path, features in zip(spec.blocks[0], spec.pool_features, strict=True):
            x = inception_a(x, path, features)
        self.sow("intermediates", "stages", x)
        halving, *others = spec.blocks[1]
        x = inception_b(x, halving)
        for path, channels in zip(others, spec.channels_7x7, strict=True):
            x = inception_c(x, path, channels)
        self.sow("intermediates", "stages", x)
        aux_logits = auxiliary(x) if with_aux else None
        halving, *others = spec.blocks[2]
        x = inception_d(x, halving)
        for path, op in zip(others, spec.wide_pools, strict=True):
            x = inception_e(x, path, op)
        self.sow("intermediates", "stages", x)

        if spec.head_pool != "none":
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        if spec.dropout:
            x = nn.Dropout(spec.dropout, deterministic=not train, name="head.dropout")(x)
        x = dense(x, "head.fc", 0.1)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x if aux_logits is None else (x, aux_logits)


def native_paths(spec: InceptionV3Spec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: InceptionV3Spec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> InceptionV3:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = InceptionV3(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., InceptionV3]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "in the convention of torchvision")
