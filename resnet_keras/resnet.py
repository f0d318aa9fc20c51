"""ResNet as a Keras functional model, from `identity_block` and `conv_block`, with the classic layer names.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
Layers are named as in Caffe's ResNet and the Keras ResNet-50 after it: stages count from 2, blocks are a, b, c, …
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.layers import Padding
from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.checkpoints import Given
from common.names.resnet import KERAS_CLASSIC, block_names
from resnet_keras import applications
from resnet_keras.layers import UnbiasedBatchNormalization, ZeroPadShortcut, channel_axis, conv2d


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common."""

    spec: ResNetSpec = VARIANTS["resnet50.keras_applications"]
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
    padding: Padding,
    strides: int = 1,
    dilation_rate: int = 1,
    groups: int = 1,
) -> Any:
    return conv2d(
        x,
        filters,
        kernel_size,
        strides,
        padding=padding,
        dilation_rate=dilation_rate,
        groups=groups,
        use_bias=style.spec.conv_bias,
        kernel_initializer=style.kernel_initializer,
        data_format=style.data_format,
        name=name,
    )


def _norm(x: Any, name: str, style: Style) -> Any:
    spec = style.spec
    biased = spec.running_variance == "biased"
    layer = layers.BatchNormalization if biased else UnbiasedBatchNormalization
    # Keras' momentum is the share of the old value that is kept, as the spec's; PyTorch's is the share of the new.
    return layer(axis=style.axis, momentum=spec.bn_momentum, epsilon=spec.bn_eps, name=name)(x)


def _relu(x: Any, name: str) -> Any:
    return layers.Activation("relu", name=name)(x)


def _residual(
    x: Any,
    shortcut: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    where: str,
    strides: int,
    style: Style,
    dilation_rates: tuple[int, int],
) -> Any:
    """Branch 2 of a block, its addition to the shortcut, and the ReLU after it."""
    spec = style.spec
    bottleneck = len(filters) == 3
    kernels = (1, kernel_size, 1) if bottleneck else (kernel_size, kernel_size)
    strided = int(spec.stride_in == "conv2")  # v1 strides on the first convolution of a bottleneck, v1.5 on the 3x3
    for i, letter in enumerate("abc"[: len(filters)]):
        x = _conv(
            x,
            filters[i],
            kernels[i],
            f"res{where}_branch2{letter}",
            style,
            padding=spec.block_padding,
            strides=strides if i == strided else 1,
            # The convolution whose stride was taken away keeps the old dilation; what follows reads its denser output.
            dilation_rate=1 if kernels[i] == 1 else dilation_rates[i > strided],
            groups=spec.groups if bottleneck and i == 1 else 1,
        )
        if spec.norm:
            x = _norm(x, f"bn{where}_branch2{letter}", style)
        if i < len(filters) - 1:
            x = _relu(x, f"res{where}_branch2{letter}_relu")
    x = layers.Add(name=f"res{where}")([x, shortcut])
    return _relu(x, f"res{where}_relu")


def identity_block(
    x: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    stage: int,
    block: str,
    *,
    style: Style = Style(),
    dilation_rates: tuple[int, int] = (1, 1),
) -> Any:
    """A block whose shortcut is its input.

    `filters` are two for a basic block and three for a bottleneck; `style` gives the conventions (padding, bias,
    norm, groups) and the data format; `dilation_rates` apply up to and after the convolution that may be strided.
    """
    return _residual(x, x, kernel_size, filters, f"{stage}{block}", 1, style, dilation_rates)


def conv_block(
    x: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    stage: int,
    block: str,
    strides: int = 2,
    *,
    style: Style = Style(),
    dilation_rates: tuple[int, int] = (1, 1),
) -> Any:
    """A block whose shortcut changes the shape: a 1x1 projection, or zero padding if `spec` says so.

    Arguments as for `identity_block`.
    """
    where = f"{stage}{block}"
    if style.spec.shortcut == "zero_pad":
        pad = ZeroPadShortcut(filters[-1], strides, data_format=style.data_format, name=f"res{where}_branch1")
        shortcut = pad(x)
    else:
        shortcut = _conv(x, filters[-1], 1, f"res{where}_branch1", style, padding="valid", strides=strides)
        if style.spec.shortcut_norm:
            shortcut = _norm(shortcut, f"bn{where}_branch1", style)
    return _residual(x, shortcut, kernel_size, filters, where, strides, style, dilation_rates)


def _pool(x: Any, style: Style) -> Any:
    padding, layout = style.spec.pool_padding, {"data_format": style.data_format}
    # Zeros never win a maximum after a ReLU, so that explicit padding is neutral here.
    explicit = {"symmetric": (1, 1), "ceil": (0, 1)}
    if padding in explicit:
        x = layers.ZeroPadding2D((explicit[padding],) * 2, **layout, name="pool1_pad")(x)
        padding = "valid"
    return layers.MaxPooling2D(3, strides=2, padding=padding, **layout, name="pool1")(x)


def _resnet(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network."""
    spec, layout = style.spec, {"data_format": style.data_format}
    stem: dict[str, Any] = {"padding": spec.stem_padding, "strides": spec.stem_stride}
    x = _conv(x, spec.stem_width, spec.stem_kernel, "conv1", style, **stem)
    if spec.norm:
        x = _norm(x, "bn_conv1", style)
    x = _relu(x, "conv1_relu")
    if spec.stem_pool:
        x = _pool(x, style)

    dilation = 1
    for s, (count, width, stage_strides) in enumerate(zip(spec.blocks, spec.widths, spec.stage_strides, strict=True)):
        inner, outer = spec.inner_width(width), width * spec.expansion
        filters = (inner, inner, outer) if spec.block == "bottleneck" else (inner, outer)
        for b, block in enumerate(block_names(count)):
            strides = stage_strides if b == 0 else 1
            before = dilation
            if b == 0 and s > 0 and spec.replace_stride_with_dilation[s - 1]:
                dilation *= 2
            options: dict[str, Any] = {"style": style, "dilation_rates": (before, dilation)}
            if strides != 1 or x.shape[style.axis] != outer:
                x = conv_block(x, 3, filters, s + 2, block, strides, **options)
            else:
                x = identity_block(x, 3, filters, s + 2, block, **options)

    if spec.head_pool == "flatten":
        x = layers.Flatten(**layout, name="flatten")(x)
    elif spec.head_pool != "none":
        pool = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[spec.head_pool]
        x = pool(**layout, name="pool5")(x)
    if spec.head != "none":
        x = layers.Dense(spec.classes, kernel_initializer=style.kernel_initializer, name=f"fc{spec.classes}")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="prob")(x)
    return x


def layer_names(spec: ResNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_CLASSIC.layers(spec))


def from_spec(
    spec: ResNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "resnet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_resnet, style=Style(spec, data_format, kernel_initializer)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    return applications.builder(variant, VARIANTS[variant].replace(**CONVENTIONS["keras_applications"]))
