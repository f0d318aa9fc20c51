"""LeNet-5 as a Flax linen module. No community has names for one: its modules are called as the layers of the spec are.

LeCun et al., "Gradient-based learning applied to document recognition", 1998. Variables are
``params/features.conv1/kernel``, ``params/head.fc1/bias``.

    model = LeNet5(num_classes=10)
    variables = model.init(jax.random.key(0), images)
    logits, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    stages = state["intermediates"]["stages"]  # the outputs of both pools
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from common.architectures.layers import Padding, output_shapes
from common.architectures.lenet import VARIANTS, LeNetSpec
from common.checkpoints import Given
from common.errors import InputError
from resnet_flax import building
from resnet_flax.layers import ACTIVATIONS, avg_pool, conv_layer, max_pool, tap, uniform_in_fan

Dtype = Any


class LeNet(nn.Module):
    """Images (N, height, width, channels) to logits (N, classes), or to what the head of `spec` gives.

    Computes in `dtype` and keeps parameters in `param_dtype`; float64 needs ``jax_enable_x64``. `train` changes
    nothing, and `axis_name` neither: the network has no norm and no dropout. The outputs of both pools are sown as
    ``stages`` in the collection ``intermediates``. Initialised as by PyTorch: weights and biases uniform in
    ±1 / sqrt(fan_in). Raises `InputError` for images whose shape the network cannot take.
    """

    spec: LeNetSpec
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
        window: dict[str, Any] = {"padding": spec.pool_padding}
        for i, width in enumerate(spec.widths, start=1):
            padding: Padding | int = spec.padding if i == 1 else "valid"
            initial = uniform_in_fan(25 * x.shape[-1])
            x = conv_layer(width, 5, padding=padding, **initial, **dtypes, name=f"features.conv{i}")(x)
            if spec.conv_activation != "none":
                x = tap(self, f"features.act{i}", ACTIVATIONS[spec.conv_activation](x))
            x = (
                avg_pool(x, 2, 2, count_padding=False, **window)
                if spec.pool == "average"
                else max_pool(x, 2, 2, **window)
            )
            x = tap(self, f"features.pool{i}", x)
            self.sow("intermediates", "stages", x)

        if spec.head_pool in ("average", "max"):
            x = tap(self, "head.pool", (jnp.mean if spec.head_pool == "average" else jnp.max)(x, axis=(1, 2)))
        if spec.head == "none":
            return x
        x = tap(self, "head.flatten", x.reshape(x.shape[0], -1))
        for i, features in enumerate(spec.hidden, start=1):
            x = nn.Dense(features, **uniform_in_fan(x.shape[-1]), **dtypes, name=f"head.fc{i}")(x)
            if spec.dense_activation != "none":
                x = tap(self, f"head.act{i}", ACTIVATIONS[spec.dense_activation](x))
        x = nn.Dense(spec.classes, **uniform_in_fan(x.shape[-1]), **dtypes, name="head.fc")(x)
        if spec.head == "softmax":
            x = tap(self, "head.softmax", nn.softmax(x))
        return x


def native_paths(spec: LeNetSpec) -> dict[str, tuple[str, ...]]:
    """Canonical path of every layer of the walk -> path of its module, or of its tap, in the linen module."""
    return {layer.path: (layer.path,) for layer in spec.layers}


def from_spec(
    spec: LeNetSpec,
    *,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
    axis_name: str | None = None,
    weights: Given | None = None,
) -> LeNet:
    """The module of any specification.

    With `weights`, a checkpoint of any known format that fits the spec, the module comes bound to these variables:
    call it as it is, or take ``model, variables = bound.unbind()``. Raises `WeightsError` for a file that cannot be
    read or holds the weights of another spec.
    """
    model = LeNet(spec=spec, dtype=dtype, param_dtype=param_dtype, axis_name=axis_name)
    return building.bound(model, weights)


def builder(variant: str) -> Callable[..., LeNet]:
    """The public function that makes a named variant."""
    spec = VARIANTS[variant]
    return building.builder(variant, spec, from_spec, "of tanh and average pools")
