"""VGG as a Keras functional model, with the layer names of keras.applications: ``block1_conv1``, …, ``predictions``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any

import keras
from keras import layers

from common.architectures.vgg import CONVENTIONS, VARIANTS, VGGSpec
from resnet_keras import applications
from resnet_keras.layers import AdaptivePooling2D, UnbiasedBatchNormalization
from resnet_keras.weights import load_file

_CHANNELS_LAST = {"data_format": "channels_last"}  # whatever the user's keras.json says


def _vgg(x: Any, spec: VGGSpec, kernel_initializer: Any) -> Any:
    """Everything between the input and the output of the network."""
    initial = {"kernel_initializer": kernel_initializer}
    norm = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
    for b, (count, width, pointwise) in enumerate(zip(spec.convs, spec.widths, spec.pointwise, strict=True), start=1):
        for i in range(1, count + 1):
            kernel_size = 1 if pointwise and i == count else 3
            # "same" is symmetric at stride 1. The bias stays under a norm, where it does nothing.
            conv = layers.Conv2D(
                width, kernel_size, padding="same", **_CHANNELS_LAST, **initial, name=f"block{b}_conv{i}"
            )
            x = conv(x)
            if spec.norm:
                name = f"block{b}_bn{i}"
                x = norm(axis=-1, momentum=spec.bn_momentum, epsilon=spec.bn_eps, name=name)(x)
            x = layers.Activation("relu", name=f"block{b}_relu{i}")(x)
        x = layers.MaxPooling2D(2, strides=2, **_CHANNELS_LAST, name=f"block{b}_pool")(x)

    if spec.head_pool in ("average", "max"):
        pool = layers.GlobalAveragePooling2D if spec.head_pool == "average" else layers.GlobalMaxPooling2D
        x = pool(**_CHANNELS_LAST, name="pool")(x)
    if spec.head == "none":
        return x
    if spec.map_size:
        x = AdaptivePooling2D(spec.map_size, "average" if spec.head_pool == "adaptive" else "max", name="pool")(x)
    x = layers.Flatten(**_CHANNELS_LAST, name="flatten")(x)
    for i, (features, rate) in enumerate(zip(spec.hidden, spec.dropout, strict=True), start=1):
        x = layers.Dense(features, **initial, name=f"fc{i}")(x)
        x = layers.Activation("relu", name=f"fc{i}_relu")(x)
        if rate:
            x = layers.Dropout(rate, name=f"fc{i}_dropout")(x)
    x = layers.Dense(spec.classes, **initial, name="predictions")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="predictions_softmax")(x)
    return x


def layer_names(spec: VGGSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    names = {"pool": "pool", "flatten": "flatten", "fc": "predictions", "softmax": "predictions_softmax"}
    table: dict[str, str] = {}
    for layer in spec.layers:
        where, *block, part = layer.path.split(".")
        kind = part.rstrip("0123456789")
        if where == "blocks":
            part = part.replace("norm", "bn")
            table[layer.path] = f"block{int(block[0]) + 1}_{part}"
        elif part in names:
            table[layer.path] = names[part]
        else:
            number = part.removeprefix(kind)
            table[layer.path] = f"fc{number}" if kind == "fc" else f"fc{number}_{kind}"
    return table


def from_spec(
    spec: VGGSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    weights: str | PathLike[str] | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "vgg",
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
    model = keras.Model(inputs, _vgg(images, spec, kernel_initializer), name=name)
    model.spec = spec
    if weights is not None:
        load_file(model, weights, free_fields=_FREE_FIELDS)
    return model


# Fields in which weights made for one spec still mean the same in another.
_FREE_FIELDS = {"head", "head_pool", "map_size", "input_size", "dropout", "bn_momentum", "running_variance"}


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    spec = VARIANTS[variant].replace(**CONVENTIONS["keras_applications"])
    return applications.builder(variant, spec, 224)
