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
from resnet_keras.layers import (
    UnbiasedBatchNormalization,
    UnusedBatchNormalization,
    UnusedConv2D,
    ZeroPadShortcut,
    average_pool2d,
    channel_axis,
    conv2d,
)


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


def _norm(name: str, style: Style) -> Any:
    spec = style.spec
    biased = spec.running_variance == "biased"
    layer = layers.BatchNormalization if biased else UnbiasedBatchNormalization
    # Keras' momentum is the share of the old value that is kept, as the spec's; PyTorch's is the share of the new.
    return layer(axis=style.axis, momentum=spec.bn_momentum, epsilon=spec.bn_eps, name=name)


def _relu(x: Any, name: str) -> Any:
    return layers.Activation("relu", name=name)(x)


def _squeeze_and_excite(x: Any, width: int, name: str, style: Style) -> Any:
    """A gate a channel, of what all pixels have in common (Hu et al. 2017, arXiv:1709.01507)."""
    layout = {"data_format": style.data_format}
    initial = {"kernel_initializer": style.kernel_initializer}
    gate = layers.GlobalAveragePooling2D(keepdims=True, **layout, name=f"{name}_squeeze")(x)
    gate = layers.Conv2D(width, 1, **layout, **initial, name=f"{name}_reduce")(gate)
    gate = _relu(gate, f"{name}_relu")
    gate = layers.Conv2D(x.shape[style.axis], 1, **layout, **initial, name=f"{name}_expand")(gate)
    gate = layers.Activation("sigmoid", name=f"{name}_sigmoid")(gate)
    return layers.Multiply(name=f"{name}_excite")([x, gate])


def _residual(
    x: Any,
    shortcut: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    stage: int,
    block: str,
    strides: int,
    style: Style,
    dilation_rates: tuple[int, int],
) -> Any:
    """Branch 2 of a block, its addition to the shortcut if there is one, and the ReLU after it."""
    spec, where = style.spec, f"{stage}{block}"
    bottleneck = len(filters) == 3
    kernels = (1, kernel_size, 1) if bottleneck else (kernel_size, kernel_size)
    strided = int(spec.stride_in == "conv2")  # v1 strides on the first convolution of a bottleneck, v1.5 on the 3x3
    norms: list[Any] = []
    shared = None
    if spec.shared == "conv" and not bottleneck and strides == 1 and x.shape[style.axis] == filters[-1]:
        # "same" is symmetric at stride 1.
        options = {"padding": "same", "dilation_rate": dilation_rates[0], "use_bias": spec.conv_bias}
        options |= {"kernel_initializer": style.kernel_initializer, "data_format": style.data_format}
        shared = layers.Conv2D(filters[0], kernel_size, **options, name=f"res{where}_branch2a")
    for i, letter in enumerate("abc"[: len(filters)]):
        if shared is not None:
            x = shared(x)
        else:
            x = _conv(
                x,
                filters[i],
                kernels[i],
                f"res{where}_branch2{letter}",
                style,
                padding=spec.block_padding,
                strides=strides if i == strided else 1,
                # The convolution whose stride was taken away keeps the old dilation; what follows reads its output.
                dilation_rate=1 if kernels[i] == 1 else dilation_rates[i > strided],
                groups=spec.groups if bottleneck and i == 1 else 1,
            )
        if spec.norm:
            again = i == 1 and (spec.shared == "norm" or shared is not None)
            norms.append(norms[0] if again else _norm(f"bn{where}_branch2{letter}", style))
            x = norms[-1](x)
        if i == len(filters) - 1 and spec.squeeze:
            x = _squeeze_and_excite(x, spec.squeeze[stage - 2], f"res{where}_se", style)
        if i < len(filters) - 1 or spec.relu_before_add:
            x = _relu(x, f"res{where}_branch2{letter}_relu")
    if shortcut is not None:
        x = layers.Add(name=f"res{where}")([x, shortcut])
    return _relu(x, f"res{where}_relu") if spec.relu_after_add else x


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
    """A block whose shortcut is its input, if it has one.

    `filters` are two for a basic block and three for a bottleneck; `style` gives the conventions (padding, bias,
    norm, groups) and the data format; `dilation_rates` apply up to and after the convolution that may be strided.
    """
    spec, where = style.spec, f"{stage}{block}"
    shortcut = None if spec.shortcut == "none" else x
    if spec.unused_projection:
        options = {"use_bias": spec.conv_bias, "kernel_initializer": style.kernel_initializer}
        unused = UnusedConv2D(filters[-1], 1, data_format=style.data_format, name=f"res{where}_branch1", **options)
        shortcut = unused(shortcut)
        if spec.shortcut_norm:
            shortcut = UnusedBatchNormalization(axis=style.axis, name=f"bn{where}_branch1")(shortcut)
    return _residual(x, shortcut, kernel_size, filters, stage, block, 1, style, dilation_rates)


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
    """A block whose shortcut changes the shape: a 1x1 projection, zero padding or none, as `spec` says.

    Arguments as for `identity_block`.
    """
    where, spec, shortcut = f"{stage}{block}", style.spec, None
    if spec.shortcut == "zero_pad":
        pad = ZeroPadShortcut(filters[-1], strides, data_format=style.data_format, name=f"res{where}_branch1")
        shortcut = pad(x)
    elif spec.shortcut == "projection":
        shortcut, left = x, strides
        if spec.shortcut_pool and strides > 1:
            options: dict[str, Any] = {"padding": "ceil", "count_padding": False, "data_format": style.data_format}
            shortcut, left = average_pool2d(x, 2, 2, **options, name=f"res{where}_branch1_pool"), 1
        shortcut = _conv(shortcut, filters[-1], 1, f"res{where}_branch1", style, padding="valid", strides=left)
        if spec.shortcut_norm:
            shortcut = _norm(f"bn{where}_branch1", style)(shortcut)
    return _residual(x, shortcut, kernel_size, filters, stage, block, strides, style, dilation_rates)


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
    strides = spec.stem_stride
    numbered = [(f"_{i}", width) for i, width in enumerate(spec.deep_stem, start=1)]
    for number, width in (*numbered, ("", spec.stem_width)):
        name, padding = f"conv1{number}", spec.stem_padding
        x = _conv(x, width, spec.stem_kernel, name, style, padding=padding, strides=strides)
        if spec.norm:
            x = _norm(f"bn_{name}", style)(x)
        x, strides = _relu(x, f"{name}_relu"), 1
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
