"""EfficientNet as a Keras functional model, with the layer names of keras.applications: ``block1a_dwconv``, ….

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.efficientnet import CONVENTIONS, VARIANTS, Block, EfficientNetSpec
from common.checkpoints import Given
from common.names.efficientnet import KERAS_APPLICATIONS, normalization
from resnet_keras import applications
from resnet_keras.layers import (
    ACTIVATIONS,
    Affine,
    Normalization,
    UnbiasedBatchNormalization,
    channel_axis,
    conv2d,
    depthwise_conv2d,
    stochastic_depth,
)

# As in keras.applications: normal over fan_out, which of a depthwise convolution is that of one channel.
CONV_KERNEL_INITIALIZER = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="truncated_normal")
DENSE_KERNEL_INITIALIZER = keras.initializers.VarianceScaling(1 / 3, mode="fan_out", distribution="uniform")


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common."""

    spec: EfficientNetSpec
    data_format: str  # every layer is given it, whatever the user's keras.json says
    kernel_initializer: Any

    def conv(self, x: Any, filters: int, kernel_size: int, strides: int, name: str, **options: Any) -> Any:
        initial = {"kernel_initializer": self.kernel_initializer or CONV_KERNEL_INITIALIZER}
        own: dict[str, Any] = {"padding": self.spec.padding, "data_format": self.data_format, "name": name}
        return conv2d(x, filters, kernel_size, strides, **own, **initial, **options)

    def depthwise(self, x: Any, kernel_size: int, strides: int, name: str) -> Any:
        initial = {"depthwise_initializer": self.kernel_initializer or CONV_KERNEL_INITIALIZER}
        own: dict[str, Any] = {"padding": self.spec.padding, "data_format": self.data_format, "name": name}
        return depthwise_conv2d(x, kernel_size, strides, use_bias=False, **own, **initial)

    def norm(self, x: Any, name: str) -> Any:
        spec = self.spec
        if not spec.norm:
            return x
        layer = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
        options = {"axis": channel_axis(self.data_format), "momentum": spec.bn_momentum, "epsilon": spec.bn_eps}
        return layer(**options, name=name)(x)

    def activation(self, x: Any, name: str) -> Any:
        return layers.Activation(ACTIVATIONS[self.spec.activation], name=name)(x)

    def gated(self, x: Any, block: Block, name: str) -> Any:
        """Squeeze and excitation: each channel times a number in 0 … 1 that all channels' averages give."""
        pool = layers.GlobalAveragePooling2D(keepdims=True, data_format=self.data_format, name=f"{name}se_squeeze")
        se = self.conv(pool(x), block.squeezed, 1, 1, f"{name}se_reduce")
        se = self.activation(se, f"{name}se_reduce_activation")
        se = self.conv(se, block.expanded, 1, 1, f"{name}se_expand")
        gate = layers.Activation(ACTIVATIONS[self.spec.gate_activation], name=f"{name}se_expand_activation")
        return layers.Multiply(name=f"{name}se_excite")([x, gate(se)])

    def block(self, x: Any, block: Block, name: str) -> Any:
        """An inverted residual block: wide inside, narrow outside; nothing bends behind the projection."""
        shortcut = x
        if block.expanded != block.in_channels:
            x = self.conv(x, block.expanded, 1, 1, f"{name}expand_conv", use_bias=False)
            x = self.activation(self.norm(x, f"{name}expand_bn"), f"{name}expand_activation")
        x = self.depthwise(x, block.kernel, block.stride, f"{name}dwconv")
        x = self.activation(self.norm(x, f"{name}bn"), f"{name}activation")
        if block.squeezed:
            x = self.gated(x, block, name)
        x = self.conv(x, block.out_channels, 1, 1, f"{name}project_conv", use_bias=False)
        x = self.norm(x, f"{name}project_bn")
        if not block.residual:
            return x
        if block.drop:
            x = stochastic_depth(block.drop, f"{name}drop")(x)
        return layers.Add(name=f"{name}add")([x, shortcut])


def _efficientnet(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network."""
    spec, layout = style.spec, {"data_format": style.data_format}
    if spec.input_mean:
        x = Affine((1 / 255,) * spec.in_channels, (0.0,) * spec.in_channels, **layout, name="rescaling")(x)
        numbers: dict[str, Any] = {"mean": spec.input_mean, "std": spec.input_std, "stored": normalization(spec)}
        x = Normalization(**numbers, axis=channel_axis(style.data_format), name="normalization")(x)
    x = style.conv(x, spec.stem_width, 3, 2, "stem_conv", use_bias=False)
    x = style.activation(style.norm(x, "stem_bn"), "stem_activation")
    names = KERAS_APPLICATIONS.layers(spec)
    for blocks in spec.stages:
        for block in blocks:
            x = style.block(x, block, names[f"{block.path}.project"].removesuffix("project_conv"))
    x = style.conv(x, spec.head_width, 1, 1, "top_conv", use_bias=False)
    x = style.activation(style.norm(x, "top_bn"), "top_activation")
    if spec.head_pool != "none":
        pools = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}
        x = pools[spec.head_pool](**layout, name=names["head.pool"])(x)
    if spec.head == "none":
        return x
    if spec.dropout:
        x = layers.Dropout(spec.dropout, name="top_dropout")(x)
    initial = style.kernel_initializer or DENSE_KERNEL_INITIALIZER
    x = layers.Dense(spec.classes, kernel_initializer=initial, name="predictions")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="predictions_softmax")(x)
    return x


def layer_names(spec: EfficientNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_APPLICATIONS.layers(spec))


def from_spec(
    spec: EfficientNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = None,
    name: str = "efficientnet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`.

    Without a `kernel_initializer` it starts as keras.applications' does.
    """
    return applications.assembled(
        spec,
        partial(_efficientnet, style=Style(spec, data_format, kernel_initializer)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications.

    Without weights it only divides the images by 255, as there; with published ones it takes their mean and deviation
    as well.
    """
    bare = {"input_mean": (0.0,) * 3, "input_std": (1.0,) * 3}
    spec = VARIANTS[variant].replace(**(CONVENTIONS["keras_applications"] | bare))
    return applications.builder(variant, spec, name=variant.replace("_", ""))
