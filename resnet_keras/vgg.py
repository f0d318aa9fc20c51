"""VGG as a Keras functional model, with the layer names of keras.applications: ``block1_conv1``, …, ``predictions``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.vgg import CONVENTIONS, VARIANTS, VGGSpec
from common.checkpoints import Given
from common.names.vgg import KERAS_APPLICATIONS
from resnet_keras import applications
from resnet_keras.layers import AdaptivePooling2D, UnbiasedBatchNormalization, channel_axis


def _vgg(x: Any, spec: VGGSpec, data_format: str, kernel_initializer: Any) -> Any:
    """Everything between the input and the output of the network."""
    initial = {"kernel_initializer": kernel_initializer}
    layout = {"data_format": data_format}  # said to every layer, whatever the user's keras.json says
    norm = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
    for b, (count, width, pointwise) in enumerate(zip(spec.convs, spec.widths, spec.pointwise, strict=True), start=1):
        for i in range(1, count + 1):
            kernel_size = 1 if pointwise and i == count else 3
            # "same" is symmetric at stride 1. The bias stays under a norm, where it does nothing.
            conv = layers.Conv2D(width, kernel_size, padding="same", **layout, **initial, name=f"block{b}_conv{i}")
            x = conv(x)
            if spec.norm:
                options = {"momentum": spec.bn_momentum, "epsilon": spec.bn_eps, "name": f"block{b}_bn{i}"}
                x = norm(axis=channel_axis(data_format), **options)(x)
            x = layers.Activation("relu", name=f"block{b}_relu{i}")(x)
        x = layers.MaxPooling2D(2, strides=2, **layout, name=f"block{b}_pool")(x)

    if spec.head_pool in ("average", "max"):
        pool = layers.GlobalAveragePooling2D if spec.head_pool == "average" else layers.GlobalMaxPooling2D
        x = pool(**layout, name="pool")(x)
    if spec.head == "none":
        return x
    if spec.map_size:
        op = "average" if spec.head_pool == "adaptive" else "max"
        x = AdaptivePooling2D(spec.map_size, op, **layout, name="pool")(x)
    x = layers.Flatten(**layout, name="flatten")(x)
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
    return dict(KERAS_APPLICATIONS.layers(spec))


def from_spec(
    spec: VGGSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "vgg",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_vgg, spec=spec, data_format=data_format, kernel_initializer=kernel_initializer),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    return applications.builder(variant, VARIANTS[variant].replace(**CONVENTIONS["keras_applications"]))
