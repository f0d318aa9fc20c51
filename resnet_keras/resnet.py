"""ResNet as a Keras functional model, from `identity_block` and `conv_block`, with the classic layer names.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
Layers are named as in Caffe's ResNet and the Keras ResNet-50 after it: stages count from 2, blocks are a, b, c, …
"""

from collections.abc import Callable
from os import PathLike
from typing import Any

import keras
from keras import layers

from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.checkpoints.base import skeleton_of
from common.names.resnet import block_names, classic_layer
from resnet_keras import applications
from resnet_keras.layers import Subsample, UnbiasedBatchNormalization, ZeroPadShortcut
from resnet_keras.weights import load_file

_DEFAULT = VARIANTS["resnet50.keras_applications"]
_CHANNELS_LAST = {"data_format": "channels_last"}  # whatever the user's keras.json says


def _conv(
    x: Any,
    filters: int,
    kernel_size: int,
    name: str,
    spec: ResNetSpec,
    *,
    padding: str,
    strides: int = 1,
    dilation_rate: int = 1,
    groups: int = 1,
    kernel_initializer: Any = "glorot_uniform",
) -> Any:
    reach = dilation_rate * (kernel_size - 1) // 2
    if kernel_size == 1:
        padding = "valid"
    elif strides > 1 and dilation_rate > 1:
        # Conv2D takes a stride or a dilation, not both. Dilated windows at this stride read no other pixels than these.
        x = layers.ZeroPadding2D(reach, **_CHANNELS_LAST, name=f"{name}_pad")(x)
        x = Subsample(strides, padding == "same", name=f"{name}_subsample")(x)
        strides, dilation_rate, padding = 1, dilation_rate // strides, "valid"
    elif padding == "symmetric" and strides > 1:
        # "same" would put the odd row and column after the image at even sizes.
        x = layers.ZeroPadding2D(reach, **_CHANNELS_LAST, name=f"{name}_pad")(x)
        padding = "valid"
    elif padding == "symmetric":
        padding = "same"  # equal at stride 1, and no padded copy of the input
    return layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        groups=groups,
        use_bias=spec.conv_bias,
        kernel_initializer=kernel_initializer,
        **_CHANNELS_LAST,
        name=name,
    )(x)


def _norm(x: Any, name: str, spec: ResNetSpec) -> Any:
    biased = spec.running_variance == "biased"
    layer = layers.BatchNormalization if biased else UnbiasedBatchNormalization
    # Keras' momentum is the share of the old value that is kept, as the spec's; PyTorch's is the share of the new.
    return layer(axis=-1, momentum=spec.bn_momentum, epsilon=spec.bn_eps, name=name)(x)


def _relu(x: Any, name: str) -> Any:
    return layers.Activation("relu", name=name)(x)


def _residual(
    x: Any,
    shortcut: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    where: str,
    strides: int,
    spec: ResNetSpec,
    dilation_rates: tuple[int, int],
    kernel_initializer: Any,
) -> Any:
    """Branch 2 of a block, its addition to the shortcut, and the ReLU after it."""
    bottleneck = len(filters) == 3
    kernels = (1, kernel_size, 1) if bottleneck else (kernel_size, kernel_size)
    strided = int(spec.stride_in == "conv2")  # v1 strides on the first convolution of a bottleneck, v1.5 on the 3x3
    for i, letter in enumerate("abc"[: len(filters)]):
        x = _conv(
            x,
            filters[i],
            kernels[i],
            f"res{where}_branch2{letter}",
            spec,
            padding=spec.block_padding,
            strides=strides if i == strided else 1,
            # The convolution whose stride was taken away keeps the old dilation; what follows reads its denser output.
            dilation_rate=1 if kernels[i] == 1 else dilation_rates[i > strided],
            groups=spec.groups if bottleneck and i == 1 else 1,
            kernel_initializer=kernel_initializer,
        )
        if spec.norm:
            x = _norm(x, f"bn{where}_branch2{letter}", spec)
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
    spec: ResNetSpec = _DEFAULT,
    dilation_rates: tuple[int, int] = (1, 1),
    kernel_initializer: Any = "glorot_uniform",
) -> Any:
    """A block whose shortcut is its input.

    `filters` are two for a basic block and three for a bottleneck; `spec` gives the conventions (padding, bias,
    norm, groups); `dilation_rates` apply up to and after the convolution that may be strided.
    """
    return _residual(x, x, kernel_size, filters, f"{stage}{block}", 1, spec, dilation_rates, kernel_initializer)


def conv_block(
    x: Any,
    kernel_size: int,
    filters: tuple[int, ...],
    stage: int,
    block: str,
    strides: int = 2,
    *,
    spec: ResNetSpec = _DEFAULT,
    dilation_rates: tuple[int, int] = (1, 1),
    kernel_initializer: Any = "glorot_uniform",
) -> Any:
    """A block whose shortcut changes the shape: a 1x1 projection, or zero padding if `spec` says so.

    Arguments as for `identity_block`.
    """
    where = f"{stage}{block}"
    if spec.shortcut == "zero_pad":
        shortcut = ZeroPadShortcut(filters[-1], strides, name=f"res{where}_branch1")(x)
    else:
        options = {"padding": "valid", "strides": strides, "kernel_initializer": kernel_initializer}
        shortcut = _conv(x, filters[-1], 1, f"res{where}_branch1", spec, **options)
        if spec.shortcut_norm:
            shortcut = _norm(shortcut, f"bn{where}_branch1", spec)
    return _residual(x, shortcut, kernel_size, filters, where, strides, spec, dilation_rates, kernel_initializer)


def _pool(x: Any, padding: str) -> Any:
    # Zeros never win a maximum after a ReLU, so that explicit padding is neutral here.
    explicit = {"symmetric": (1, 1), "ceil": (0, 1)}
    if padding in explicit:
        x = layers.ZeroPadding2D((explicit[padding],) * 2, **_CHANNELS_LAST, name="pool1_pad")(x)
        padding = "valid"
    return layers.MaxPooling2D(3, strides=2, padding=padding, **_CHANNELS_LAST, name="pool1")(x)


def _resnet(x: Any, spec: ResNetSpec, kernel_initializer: Any) -> Any:
    """Everything between the input and the output of the network."""
    initial = {"kernel_initializer": kernel_initializer}
    stem = {"padding": spec.stem_padding, "strides": spec.stem_stride} | initial
    x = _conv(x, spec.stem_width, spec.stem_kernel, "conv1", spec, **stem)
    if spec.norm:
        x = _norm(x, "bn_conv1", spec)
    x = _relu(x, "conv1_relu")
    if spec.stem_pool:
        x = _pool(x, spec.pool_padding)

    dilation = 1
    for s, (count, width, stage_strides) in enumerate(zip(spec.blocks, spec.widths, spec.stage_strides, strict=True)):
        inner, outer = spec.inner_width(width), width * spec.expansion
        filters = (inner, inner, outer) if spec.block == "bottleneck" else (inner, outer)
        for b, block in enumerate(block_names(count)):
            strides = stage_strides if b == 0 else 1
            before = dilation
            if b == 0 and s > 0 and spec.replace_stride_with_dilation[s - 1]:
                dilation *= 2
            options: dict[str, Any] = {"spec": spec, "dilation_rates": (before, dilation)} | initial
            if strides != 1 or x.shape[-1] != outer:
                x = conv_block(x, 3, filters, s + 2, block, strides, **options)
            else:
                x = identity_block(x, 3, filters, s + 2, block, **options)

    if spec.head_pool == "flatten":
        x = layers.Flatten(**_CHANNELS_LAST, name="flatten")(x)
    elif spec.head_pool != "none":
        pool = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[spec.head_pool]
        x = pool(**_CHANNELS_LAST, name="pool5")(x)
    if spec.head != "none":
        x = layers.Dense(spec.classes, **initial, name=f"fc{spec.classes}")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="prob")(x)
    return x


def layer_names(spec: ResNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    skeleton = skeleton_of(spec)
    return {layer.path: classic_layer(layer.path, skeleton) for layer in spec.layers}


def from_spec(
    spec: ResNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    weights: str | PathLike[str] | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "resnet",
) -> keras.Model:
    """The functional model of `spec`, for images (batch, height, width, channels); its `spec` attribute is `spec`.

    `input_shape` (height, width, channels) defaults to any size, or the spec's own with a flattened head;
    `input_tensor` is a Keras tensor to build upon instead. `weights` is a canonical safetensors file.
    Raises `ValueError` for an input that the spec does not fit, `WeightsError` for weights that are not the spec's.
    """
    if input_tensor is not None:
        images = input_tensor
        sources = keras.utils.get_source_inputs(input_tensor)
        inputs = sources[0] if len(sources) == 1 else sources
    else:
        images = keras.Input(input_shape or (*(spec.input_size or (None, None)), spec.in_channels))
        inputs = images
    if len(images.shape) != 4 or images.shape[-1] != spec.in_channels:
        raise ValueError(
            f"the input has shape {tuple(images.shape)}; expected (batch, height, width, {spec.in_channels})"
        )
    if spec.input_size and tuple(images.shape[1:3]) != spec.input_size:
        raise ValueError(f"the input has shape {tuple(images.shape)}; the flattened head takes {spec.input_size} only")
    model = keras.Model(inputs, _resnet(images, spec, kernel_initializer), name=name)
    model.spec = spec
    if weights is not None:
        load_file(model, weights, free_fields=_FREE_FIELDS)
    return model


# Fields in which weights made for one spec still mean the same in another: the head's last step, its resolution,
# and what training alone does.
_FREE_FIELDS = {"head", "head_pool", "replace_stride_with_dilation", "bn_momentum", "running_variance"}


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    spec = VARIANTS[variant].replace(**CONVENTIONS["keras_applications"])
    return applications.builder(variant, spec, 224 if spec.output_stride > 8 else 32)
