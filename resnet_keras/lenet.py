"""LeNet-5 as a Keras functional model: ``conv1``, ``pool1``, ``conv2``, ``pool2``, ``fc1``, ``fc2``, ``fc3``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.layers import Padding
from common.architectures.lenet import VARIANTS, LeNetSpec
from common.checkpoints import Given
from common.names.lenet import KERAS_NAMES
from resnet_keras import applications
from resnet_keras.layers import ACTIVATIONS, average_pool2d, conv2d, max_pool2d


def _lenet(x: Any, spec: LeNetSpec, data_format: str, kernel_initializer: Any) -> Any:
    """Everything between the input and the output of the network."""
    initial: dict[str, Any] = {"kernel_initializer": kernel_initializer}
    layout: dict[str, Any] = {"data_format": data_format}  # said to every layer, whatever the user's keras.json says
    pool = partial(average_pool2d, count_padding=False) if spec.pool == "average" else max_pool2d
    for i, width in enumerate(spec.widths, start=1):
        padding: Padding | int = spec.padding if i == 1 else "valid"
        x = conv2d(x, width, 5, padding=padding, **layout, **initial, name=f"conv{i}")
        x = _activated(x, spec.conv_activation, f"conv{i}")
        x = pool(x, 2, 2, padding=spec.pool_padding, **layout, name=f"pool{i}")

    if spec.head_pool in ("average", "max"):
        pooling = layers.GlobalAveragePooling2D if spec.head_pool == "average" else layers.GlobalMaxPooling2D
        x = pooling(**layout, name="pool")(x)
    if spec.head == "none":
        return x
    x = layers.Flatten(**layout, name="flatten")(x)
    for i, features in enumerate(spec.hidden, start=1):
        x = layers.Dense(features, **initial, name=f"fc{i}")(x)
        x = _activated(x, spec.dense_activation, f"fc{i}")
    x = layers.Dense(spec.classes, **initial, name=f"fc{len(spec.hidden) + 1}")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="softmax")(x)
    return x


def _activated(x: Any, activation: str, name: str) -> Any:
    if activation == "none":
        return x
    return layers.Activation(ACTIVATIONS[activation], name=f"{name}_{activation}")(x)  # type: ignore[index]


def layer_names(spec: LeNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_NAMES.layers(spec))


def from_spec(
    spec: LeNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "lenet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_lenet, spec=spec, data_format=data_format, kernel_initializer=kernel_initializer),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, with the arguments of keras.applications, which has none."""
    return applications.builder(variant, VARIANTS[variant].with_head(head="softmax"))
