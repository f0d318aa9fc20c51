"""AlexNet as a Keras functional model, with the layer names of Caffe's: ``conv1``, …, ``conv5``, ``fc6``, …, ``fc8``.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.alexnet import GROUPED, KERNELS, NORMED, POOLED, VARIANTS, AlexNetSpec
from common.checkpoints import Given
from common.names.alexnet import KERAS_NAMES
from resnet_keras import applications
from resnet_keras.layers import AdaptivePooling2D, LocalResponseNormalization, conv2d, max_pool2d


def _alexnet(x: Any, spec: AlexNetSpec, data_format: str, kernel_initializer: Any) -> Any:
    """Everything between the input and the output of the network."""
    initial: dict[str, Any] = {"kernel_initializer": kernel_initializer}
    layout: dict[str, Any] = {"data_format": data_format}  # said to every layer, whatever the user's keras.json says
    norm = partial(
        LocalResponseNormalization, spec.lrn_size, spec.lrn_alpha, spec.lrn_beta, spec.lrn_k, data_format=data_format
    )
    for i, (width, kernel) in enumerate(zip(spec.widths, KERNELS, strict=True), start=1):
        strides, padding = (4, spec.padding) if i == 1 else (1, kernel // 2)
        groups = spec.groups if i in GROUPED else 1
        options: dict[str, Any] = {"padding": padding, "groups": groups, "name": f"conv{i}"}
        x = conv2d(x, width, kernel, strides, **options, **layout, **initial)
        x = layers.Activation("relu", name=f"relu{i}")(x)
        if i in NORMED and spec.lrn == "before_pool":
            x = norm(name=f"norm{i}")(x)
        if i in POOLED:
            side = spec.last_pool if i == POOLED[-1] else 3
            x = max_pool2d(x, side, 2, padding=spec.pool_padding, **layout, name=f"pool{i}")
        if i in NORMED and spec.lrn == "behind_pool":
            x = norm(name=f"norm{i}")(x)

    if spec.head_pool in ("average", "max"):
        pool = layers.GlobalAveragePooling2D if spec.head_pool == "average" else layers.GlobalMaxPooling2D
        x = pool(**layout, name="pool")(x)
    if spec.head == "none":
        return x
    if spec.map_size:
        op = "average" if spec.head_pool == "adaptive" else "max"
        x = AdaptivePooling2D(spec.map_size, op, **layout, name="pool")(x)
    x = layers.Flatten(**layout, name="flatten")(x)
    first = len(KERNELS) + 1
    for i, (features, rate) in enumerate(zip(spec.hidden, spec.dropout, strict=True), start=first):
        if rate and spec.dropout_place == "before":
            x = layers.Dropout(rate, name=f"drop{i}")(x)
        x = layers.Dense(features, **initial, name=f"fc{i}")(x)
        if spec.dense_activation == "relu":
            x = layers.Activation("relu", name=f"relu{i}")(x)
        if rate and spec.dropout_place == "behind":
            x = layers.Dropout(rate, name=f"drop{i}")(x)
    x = layers.Dense(spec.classes, **initial, name=f"fc{first + len(spec.hidden)}")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="prob")(x)
    return x


def layer_names(spec: AlexNetSpec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_NAMES.layers(spec))


def from_spec(
    spec: AlexNetSpec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "alexnet",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`."""
    return applications.assembled(
        spec,
        partial(_alexnet, spec=spec, data_format=data_format, kernel_initializer=kernel_initializer),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, with the arguments of keras.applications, which has none."""
    return applications.builder(variant, VARIANTS[variant].with_head(head="softmax"))
