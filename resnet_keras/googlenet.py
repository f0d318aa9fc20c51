"""GoogLeNet as a Keras functional model, with torchvision's layer names without dots: ``inception3a_branch1_conv``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.googlenet import VARIANTS, GoogLeNetSpec, Module
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT
from common.checkpoints import Given
from common.names.googlenet import KERAS_NAMES
from resnet_keras import applications
from resnet_keras.layers import (
    AdaptivePooling2D,
    Affine,
    LocalResponseNormalization,
    UnbiasedBatchNormalization,
    channel_axis,
    conv2d,
    from_channels_last,
    max_pool2d,
)


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common."""

    spec: GoogLeNetSpec
    data_format: str  # every layer is given it, whatever the user's keras.json says
    kernel_initializer: Any

    def conv(self, x: Any, filters: int, name: str, kernel_size: int = 1, strides: int = 1) -> Any:
        """A convolution, its norm, if any, and a ReLU."""
        spec = self.spec
        padding = spec.stem_padding if strides > 1 else "symmetric"
        own: dict[str, Any] = {"padding": padding, "use_bias": not spec.norm, "name": f"{name}_conv"}
        initial = {"kernel_initializer": self.kernel_initializer, "data_format": self.data_format}
        x = conv2d(x, filters, kernel_size, strides, **own, **initial)
        if spec.norm:
            layer = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
            options = {"momentum": spec.bn_momentum, "epsilon": spec.bn_eps, "scale": spec.bn_scale}
            x = layer(axis=channel_axis(self.data_format), **options, name=f"{name}_bn")(x)
        return layers.Activation("relu", name=f"{name}_relu")(x)

    def pool(self, x: Any, pool_size: int, name: str) -> Any:
        return max_pool2d(x, pool_size, 2, padding=self.spec.pool_padding, data_format=self.data_format, name=name)

    def norm_of_responses(self, x: Any, name: str) -> Any:
        spec = self.spec
        if not spec.lrn:
            return x
        numbers = (spec.lrn_size, spec.lrn_alpha, spec.lrn_beta, spec.lrn_k)
        return LocalResponseNormalization(*numbers, data_format=self.data_format, name=name)(x)

    def dense(self, x: Any, features: int, name: str) -> Any:
        return layers.Dense(features, kernel_initializer=self.kernel_initializer, name=name)(x)

    def inception(self, x: Any, module: Module) -> Any:
        """Four branches of one input: 1x1, 3x3, 5x5 and a pool; their channels one after the other."""
        name, large = module.path, self.spec.large_kernel
        branch1 = self.conv(x, module.direct, f"{name}_branch1")
        branch2 = self.conv(x, module.reduce3, f"{name}_branch2_0")
        branch2 = self.conv(branch2, module.wide3, f"{name}_branch2_1", 3)
        branch3 = self.conv(x, module.reduce5, f"{name}_branch3_0")
        # torchvision's weights were made with windows of 3x3 here, and are of no use with the paper's 5x5.
        branch3 = self.conv(branch3, module.wide5, f"{name}_branch3_1", large)
        options: dict[str, Any] = {"padding": "symmetric", "data_format": self.data_format}
        branch4 = max_pool2d(x, 3, 1, **options, name=f"{name}_branch4_0")
        branch4 = self.conv(branch4, module.projection, f"{name}_branch4_1")
        axis = channel_axis(self.data_format)
        return layers.Concatenate(axis=axis, name=name)([branch1, branch2, branch3, branch4])

    def auxiliary(self, x: Any, name: str) -> Any:
        """A classifier of a map in the middle, which helps gradients to reach what is before it."""
        spec, layout = self.spec, {"data_format": self.data_format}
        width, hidden = spec.aux_widths
        if spec.aux_pool == "adaptive":
            x = AdaptivePooling2D(spec.aux_map, "average", **layout, name=f"{name}_pool")(x)
        else:
            x = layers.AveragePooling2D(5, 3, "valid", **layout, name=f"{name}_pool")(x)
        x = self.conv(x, width, f"{name}_conv")
        if spec.aux_pool == "window":
            # A model for images of any size does not know how many values there are to flatten.
            x = layers.Reshape(from_channels_last((*spec.aux_map, width), self.data_format), name=f"{name}_map")(x)
        x = layers.Flatten(**layout, name=f"{name}_flatten")(x)
        x = layers.Activation("relu", name=f"{name}_relu")(self.dense(x, hidden, f"{name}_fc1"))
        if spec.aux_dropout:
            x = layers.Dropout(spec.aux_dropout, name=f"{name}_dropout")(x)
        return self.dense(x, spec.classes, f"{name}_fc2")


def _googlenet(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network, or its outputs: the auxiliary ones behind its own,
    the last first."""
    spec, layout = style.spec, {"data_format": style.data_format}
    if spec.transform_input:
        x = Affine(TRANSFORM_SCALE, TRANSFORM_SHIFT, **layout, name="transform")(x)
    first, second, third = spec.stem
    x = style.conv(x, first, "conv1", 7, 2)
    x = style.norm_of_responses(style.pool(x, 3, "maxpool1"), "norm1")
    x = style.conv(x, second, "conv2")
    x = style.conv(x, third, "conv3", 3)
    x = style.pool(style.norm_of_responses(x, "norm2"), 3, "maxpool2")
    auxiliary = []
    for modules, side in zip(spec.modules, (3, spec.last_pool, None), strict=True):
        for module in modules:
            x = style.inception(x, module)
            if module.path in spec.auxiliary:
                auxiliary.append(style.auxiliary(x, spec.auxiliary[module.path]))
        if side is not None:
            x = style.pool(x, side, f"maxpool{module.stage}")

    if spec.head_pool != "none":
        pools = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}
        x = pools[spec.head_pool](**layout, name="avgpool")(x)
    if spec.head == "none":
        return x
    if spec.dropout:
        x = layers.Dropout(spec.dropout, name="dropout")(x)
    x = style.dense(x, spec.classes, "fc")
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="softmax")(x)
    return [x, *reversed(auxiliary)] if auxiliary else x


def layer_names(spec: GoogLeNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_NAMES.layers(spec))


def from_spec(
    spec: GoogLeNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "googlenet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`.

    With auxiliary heads it has a list of outputs, its own first, in every mode.
    """
    return applications.assembled(
        spec,
        partial(_googlenet, style=Style(spec, data_format, kernel_initializer)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, with the arguments of keras.applications, which has none. It has
    one output: what trains auxiliary heads comes from `from_spec`."""
    spec = VARIANTS[variant].replace(aux=False)
    return applications.builder(variant, spec.with_head(head="softmax"))
