"""ResNet with pre-activation as a Keras functional model, with the layer names of keras.applications:
``conv2_block1_preact_bn``, ``conv2_block1_0_conv``, …, ``post_bn``, ``predictions``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.resnet_v2 import CONVENTIONS, VARIANTS, ResNetV2Spec
from common.checkpoints import Given
from common.names.resnet_v2 import KERAS_APPLICATIONS
from resnet_keras import applications
from resnet_keras.layers import UnbiasedBatchNormalization, channel_axis, conv2d, max_pool2d


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common."""

    spec: ResNetV2Spec
    data_format: str  # every layer is given it, whatever the user's keras.json says
    kernel_initializer: Any


def _conv(
    x: Any, filters: int, kernel_size: int, strides: int, name: str, style: Style, *, normed: bool = False
) -> Any:
    """A convolution; with a bias unless a norm follows it."""
    return conv2d(
        x,
        filters,
        kernel_size,
        strides,
        padding="symmetric",
        use_bias=style.spec.conv_bias and not normed,
        kernel_initializer=style.kernel_initializer,
        data_format=style.data_format,
        name=name,
    )


def _norm_relu(x: Any, bn_name: str, relu_name: str, style: Style) -> Any:
    spec = style.spec
    if spec.norm:
        layer = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
        options = {"momentum": spec.bn_momentum, "epsilon": spec.bn_eps, "name": bn_name}
        x = layer(axis=channel_axis(style.data_format), **options)(x)
    return layers.Activation("relu", name=relu_name)(x)


def residual_block_v2(x: Any, filters: int, strides: int, conv_shortcut: bool, name: str, style: Style) -> Any:
    """A block: 1x1, 3x3 and 1x1 convolutions, a norm and a ReLU before each; nothing behind the addition."""
    spec = style.spec
    strides1, strides2 = (strides, 1) if spec.stride_in == "conv1" else (1, strides)
    preact = _norm_relu(x, f"{name}_preact_bn", f"{name}_preact_relu", style)
    # A projection reads what is normalised and activated, an identity what is not.
    shortcut = x
    if conv_shortcut:
        shortcut = _conv(preact, filters * spec.expansion, 1, strides, f"{name}_0_conv", style)
    elif strides > 1:
        shortcut = layers.MaxPooling2D(1, strides=strides, data_format=style.data_format, name=f"{name}_0_pool")(x)

    x = _conv(preact, filters, 1, strides1, f"{name}_1_conv", style, normed=spec.norm)
    x = _norm_relu(x, f"{name}_1_bn", f"{name}_1_relu", style)
    x = _conv(x, filters, 3, strides2, f"{name}_2_conv", style, normed=spec.norm)
    x = _norm_relu(x, f"{name}_2_bn", f"{name}_2_relu", style)
    x = _conv(x, filters * spec.expansion, 1, 1, f"{name}_3_conv", style)
    return layers.Add(name=f"{name}_out")([shortcut, x])


def _pool(x: Any, style: Style) -> Any:
    padding, layout = style.spec.pool_padding, {"data_format": style.data_format}
    if padding != "zeros":
        return max_pool2d(x, 3, 2, padding=padding, **layout, name="pool1_pool")
    # No ReLU stands before it: these zeros win over negative values, where a pool's own padding never wins.
    x = layers.ZeroPadding2D(1, **layout, name="pool1_pad")(x)
    return layers.MaxPooling2D(3, strides=2, **layout, name="pool1_pool")(x)


def _resnet_v2(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network."""
    spec = style.spec
    x = _conv(x, spec.stem_width, spec.stem_kernel, spec.stem_stride, "conv1_conv", style)
    if spec.stem_pool:
        x = _pool(x, style)
    for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
        for b in range(count):
            name = f"conv{s + 2}_block{b + 1}"
            x = residual_block_v2(x, width, spec.stride(s, b), conv_shortcut=b == 0, name=name, style=style)
    x = _norm_relu(x, "post_bn", "post_relu", style)

    if spec.head_pool != "none":
        pool = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[spec.head_pool]
        x = pool(data_format=style.data_format, name="avg_pool")(x)
    if spec.head != "none":
        x = layers.Dense(spec.classes, kernel_initializer=style.kernel_initializer, name="predictions")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="predictions_softmax")(x)
    return x


def layer_names(spec: ResNetV2Spec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_APPLICATIONS.layers(spec))


def from_spec(
    spec: ResNetV2Spec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "resnet_v2",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_resnet_v2, style=Style(spec, data_format, kernel_initializer)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, as keras.applications has it."""
    return applications.builder(variant, VARIANTS[variant].replace(**CONVENTIONS["keras_applications"]))
