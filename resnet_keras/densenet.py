"""DenseNet as a Keras functional model, with the layer names of keras.applications: ``conv2_block1_1_conv``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.densenet import CONVENTIONS, VARIANTS, DenseNetSpec
from common.architectures.layers import Padding
from common.checkpoints import Given
from common.names.densenet import KERAS_APPLICATIONS
from resnet_keras import applications
from resnet_keras.layers import UnbiasedBatchNormalization, average_pool2d, channel_axis, conv2d, max_pool2d


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common."""

    spec: DenseNetSpec = VARIANTS["densenet121.keras_applications"]
    data_format: str = "channels_last"  # every layer is given it, whatever the user's keras.json says
    kernel_initializer: Any = "glorot_uniform"

    @property
    def axis(self) -> int:
        """That of the channels."""
        return channel_axis(self.data_format)


def _conv(
    x: Any,
    filters: int,
    kernel_size: int,
    name: str,
    style: Style,
    *,
    padding: Padding | int,
    strides: int = 1,
    use_bias: bool,
) -> Any:
    return conv2d(
        x,
        filters,
        kernel_size,
        strides,
        padding=padding,
        use_bias=use_bias,
        kernel_initializer=style.kernel_initializer,
        data_format=style.data_format,
        name=name,
    )


def _norm_relu(x: Any, norm: str, relu: str, style: Style) -> Any:
    spec = style.spec
    if spec.norm:
        biased = spec.running_variance == "biased"
        layer = layers.BatchNormalization if biased else UnbiasedBatchNormalization
        x = layer(axis=style.axis, momentum=spec.bn_momentum, epsilon=spec.bn_eps, name=norm)(x)
    return layers.Activation("relu", name=relu)(x)


def conv_block(x: Any, name: str, *, style: Style = Style()) -> Any:
    """A dense layer: norm, ReLU and a 1x1 convolution, the same with a 3x3 one, and what it gives behind `x`."""
    spec = style.spec
    inner = spec.bottleneck * spec.growth_rate
    new = _norm_relu(x, f"{name}_0_bn", f"{name}_0_relu", style)
    new = _conv(new, inner, 1, f"{name}_1_conv", style, padding="valid", use_bias=spec.conv_bias)
    new = _norm_relu(new, f"{name}_1_bn", f"{name}_1_relu", style)
    new = _conv(new, spec.growth_rate, 3, f"{name}_2_conv", style, padding="same", use_bias=spec.conv_bias)
    if spec.dropout:
        new = layers.Dropout(spec.dropout, name=f"{name}_dropout")(new)
    return layers.Concatenate(axis=style.axis, name=f"{name}_concat")([x, new])


def dense_block(x: Any, blocks: int, name: str, *, style: Style = Style()) -> Any:
    """So many dense layers, each of which reads what all before it gave."""
    for i in range(1, blocks + 1):
        x = conv_block(x, f"{name}_block{i}", style=style)
    return x


def transition_block(x: Any, name: str, *, style: Style = Style()) -> Any:
    """Norm, ReLU, a 1x1 convolution to fewer channels, and a pool that halves the map."""
    spec = style.spec
    filters = spec.transition_width(x.shape[style.axis])
    x = _norm_relu(x, f"{name}_bn", f"{name}_relu", style)
    x = _conv(x, filters, 1, f"{name}_conv", style, padding=spec.transition_padding, use_bias=spec.conv_bias)
    options: dict[str, Any] = {"padding": "valid", "data_format": style.data_format, "name": f"{name}_pool"}
    if spec.transition_pool == "max":
        return max_pool2d(x, 2, 2, **options)
    return average_pool2d(x, 2, 2, count_padding=False, **options)


def _pool(x: Any, style: Style) -> Any:
    padding, layout = style.spec.pool_padding, {"data_format": style.data_format}
    # Zeros never win a maximum after a ReLU, so that explicit padding is neutral here.
    explicit = {"symmetric": (1, 1), "ceil": (0, 1)}
    if padding in explicit:
        x = layers.ZeroPadding2D((explicit[padding],) * 2, **layout, name="pool1_pad")(x)
        padding = "valid"
    return layers.MaxPooling2D(3, strides=2, padding=padding, **layout, name="pool1")(x)


def _densenet(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network."""
    spec, layout = style.spec, {"data_format": style.data_format}
    x = _conv(x, spec.stem_width, 7, "conv1_conv", style, padding=spec.stem_padding, strides=2, use_bias=False)
    x = _norm_relu(x, "conv1_bn", "conv1_relu", style)
    x = _pool(x, style)
    for stage, blocks in enumerate(spec.blocks, start=2):
        x = dense_block(x, blocks, f"conv{stage}", style=style)
        if stage <= len(spec.blocks):
            x = transition_block(x, f"pool{stage}", style=style)
    # A dense layer begins with its activation, so that the last one's output has had none.
    x = _norm_relu(x, "bn", "relu", style)
    if spec.head_pool != "none":
        pool = layers.GlobalAveragePooling2D if spec.head_pool == "average" else layers.GlobalMaxPooling2D
        x = pool(**layout, name="avg_pool")(x)
    if spec.head != "none":
        x = layers.Dense(spec.classes, kernel_initializer=style.kernel_initializer, name="predictions")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="predictions_softmax")(x)
    return x


def layer_names(spec: DenseNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_APPLICATIONS.layers(spec))


def from_spec(
    spec: DenseNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "densenet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_densenet, style=Style(spec, data_format, kernel_initializer)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    return applications.builder(variant, VARIANTS[variant].replace(**CONVENTIONS["keras_applications"]))
