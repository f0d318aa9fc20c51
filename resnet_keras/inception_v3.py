"""Inception v3 as a Keras functional model, with the layer names of keras.applications in a process that has made
nothing before: ``conv2d``, ``conv2d_1``, …, ``mixed0``, …, ``predictions``, whatever this process has made. Numbers go
on behind those of a user's own layers that the model is built upon.

Only the Keras API: the same file runs on TensorFlow, JAX and PyTorch. The model follows the global dtype policy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
from keras import layers

from common.architectures.inception_v3 import CONVENTIONS, VARIANTS, InceptionV3Spec, Pool
from common.architectures.layers import TRANSFORM_SCALE, TRANSFORM_SHIFT, Padding
from common.checkpoints import Given
from common.names.inception_v3 import KERAS_APPLICATIONS
from resnet_keras import applications
from resnet_keras.layers import (
    Affine,
    UnbiasedBatchNormalization,
    average_pool2d,
    channel_axis,
    conv2d,
    max_pool2d,
)


@dataclass(frozen=True)
class Style:
    """What the layers of one network have in common; they are called by their places in the walk."""

    spec: InceptionV3Spec
    data_format: str  # every layer is given it, whatever the user's keras.json says
    kernel_initializer: Any
    names: dict[str, str]

    def conv(
        self,
        x: Any,
        filters: int,
        kernel_size: int | tuple[int, int] = 1,
        strides: int = 1,
        *,
        padded: bool = True,
        path: str,
    ) -> Any:
        """A convolution, a norm and a ReLU; padded where it does not stride."""
        spec, names = self.spec, self.names
        padding: Padding = "symmetric" if padded and strides == 1 else "valid"
        options = {
            "data_format": self.data_format,
            "use_bias": not spec.norm,
            "kernel_initializer": self.kernel_initializer,
        }
        x = conv2d(x, filters, kernel_size, strides, padding=padding, **options, name=names[f"{path}.conv"])
        if spec.norm:
            layer = layers.BatchNormalization if spec.running_variance == "biased" else UnbiasedBatchNormalization
            averaged = {"momentum": spec.bn_momentum, "epsilon": spec.bn_eps, "scale": spec.bn_scale}
            x = layer(axis=channel_axis(self.data_format), **averaged, name=names[f"{path}.norm"])(x)
        return layers.Activation("relu", name=names[f"{path}.relu"])(x)

    def pool(self, x: Any, op: Pool, path: str) -> Any:
        """That of a module which does not halve."""
        options: dict[str, Any] = {"padding": "symmetric", "data_format": self.data_format, "name": self.names[path]}
        if op == "max":
            return max_pool2d(x, 3, 1, **options)
        # torchvision's average counts the zeros at the borders; Keras', as that of the first network, does not.
        return average_pool2d(x, 3, 1, count_padding=self.spec.count_padding, **options)

    def halved(self, x: Any, path: str) -> Any:
        return layers.MaxPooling2D(3, 2, data_format=self.data_format, name=self.names[path])(x)

    def concat(self, branches: list[Any], path: str) -> Any:
        return layers.Concatenate(axis=channel_axis(self.data_format), name=self.names[path])(branches)


def inception_a(x: Any, pool_features: int, path: str, style: Style) -> Any:
    """1x1, 5x5, two 3x3 and a pool, side by side."""
    c, conv = style.spec.width, style.conv
    branch1x1 = conv(x, c(64), path=f"{path}.branch1x1")
    branch5x5 = conv(x, c(48), path=f"{path}.branch5x5_1")
    branch5x5 = conv(branch5x5, c(64), 5, path=f"{path}.branch5x5_2")
    branch3x3dbl = conv(x, c(64), path=f"{path}.branch3x3dbl_1")
    branch3x3dbl = conv(branch3x3dbl, c(96), 3, path=f"{path}.branch3x3dbl_2")
    branch3x3dbl = conv(branch3x3dbl, c(96), 3, path=f"{path}.branch3x3dbl_3")
    branch_pool = style.pool(x, style.spec.branch_pool, f"{path}.pool")
    branch_pool = conv(branch_pool, pool_features, path=f"{path}.branch_pool")
    return style.concat([branch1x1, branch5x5, branch3x3dbl, branch_pool], f"{path}.concat")


def inception_b(x: Any, path: str, style: Style) -> Any:
    """Halves the map: 3x3, two 3x3 and a pool."""
    c, conv = style.spec.width, style.conv
    branch3x3 = conv(x, c(384), 3, 2, path=f"{path}.branch3x3")
    branch3x3dbl = conv(x, c(64), path=f"{path}.branch3x3dbl_1")
    branch3x3dbl = conv(branch3x3dbl, c(96), 3, path=f"{path}.branch3x3dbl_2")
    branch3x3dbl = conv(branch3x3dbl, c(96), 3, 2, path=f"{path}.branch3x3dbl_3")
    return style.concat([branch3x3, branch3x3dbl, style.halved(x, f"{path}.pool")], f"{path}.concat")


def inception_c(x: Any, channels_7x7: int, path: str, style: Style) -> Any:
    """1x1, 7x7 and two 7x7 as rows and columns, and a pool; kernels are (height, width)."""
    width, c7, conv = style.spec.width(192), channels_7x7, style.conv
    branch1x1 = conv(x, width, path=f"{path}.branch1x1")
    branch7x7 = conv(x, c7, path=f"{path}.branch7x7_1")
    branch7x7 = conv(branch7x7, c7, (1, 7), path=f"{path}.branch7x7_2")
    branch7x7 = conv(branch7x7, width, (7, 1), path=f"{path}.branch7x7_3")
    branch7x7dbl = conv(x, c7, path=f"{path}.branch7x7dbl_1")
    branch7x7dbl = conv(branch7x7dbl, c7, (7, 1), path=f"{path}.branch7x7dbl_2")
    branch7x7dbl = conv(branch7x7dbl, c7, (1, 7), path=f"{path}.branch7x7dbl_3")
    branch7x7dbl = conv(branch7x7dbl, c7, (7, 1), path=f"{path}.branch7x7dbl_4")
    branch7x7dbl = conv(branch7x7dbl, width, (1, 7), path=f"{path}.branch7x7dbl_5")
    branch_pool = style.pool(x, style.spec.branch_pool, f"{path}.pool")
    branch_pool = conv(branch_pool, width, path=f"{path}.branch_pool")
    return style.concat([branch1x1, branch7x7, branch7x7dbl, branch_pool], f"{path}.concat")


def inception_d(x: Any, path: str, style: Style) -> Any:
    """Halves the map: 3x3, 7x7 with 3x3 and a pool."""
    c, conv = style.spec.width, style.conv
    branch3x3 = conv(x, c(192), path=f"{path}.branch3x3_1")
    branch3x3 = conv(branch3x3, c(320), 3, 2, path=f"{path}.branch3x3_2")
    branch7x7x3 = conv(x, c(192), path=f"{path}.branch7x7x3_1")
    branch7x7x3 = conv(branch7x7x3, c(192), (1, 7), path=f"{path}.branch7x7x3_2")
    branch7x7x3 = conv(branch7x7x3, c(192), (7, 1), path=f"{path}.branch7x7x3_3")
    branch7x7x3 = conv(branch7x7x3, c(192), 3, 2, path=f"{path}.branch7x7x3_4")
    return style.concat([branch3x3, branch7x7x3, style.halved(x, f"{path}.pool")], f"{path}.concat")


def inception_e(x: Any, pool: Pool, path: str, style: Style) -> Any:
    """1x1, 3x3 and two 3x3 that end in a row beside a column, and a pool."""
    c, conv = style.spec.width, style.conv
    branch1x1 = conv(x, c(320), path=f"{path}.branch1x1")
    branch3x3 = conv(x, c(384), path=f"{path}.branch3x3_1")
    row = conv(branch3x3, c(384), (1, 3), path=f"{path}.branch3x3_2a")
    column = conv(branch3x3, c(384), (3, 1), path=f"{path}.branch3x3_2b")
    branch3x3 = style.concat([row, column], f"{path}.branch3x3")
    branch3x3dbl = conv(x, c(448), path=f"{path}.branch3x3dbl_1")
    branch3x3dbl = conv(branch3x3dbl, c(384), 3, path=f"{path}.branch3x3dbl_2")
    row = conv(branch3x3dbl, c(384), (1, 3), path=f"{path}.branch3x3dbl_3a")
    column = conv(branch3x3dbl, c(384), (3, 1), path=f"{path}.branch3x3dbl_3b")
    branch3x3dbl = style.concat([row, column], f"{path}.branch3x3dbl")
    branch_pool = style.pool(x, pool, f"{path}.pool")
    branch_pool = conv(branch_pool, c(192), path=f"{path}.branch_pool")
    return style.concat([branch1x1, branch3x3, branch3x3dbl, branch_pool], f"{path}.concat")


def _auxiliary(x: Any, style: Style) -> Any:
    """Logits of the last map at a stride of 16, of 17x17 at least."""
    c, layout = style.spec.width, {"data_format": style.data_format}
    x = layers.AveragePooling2D(5, 3, **layout, name="aux_pool")(x)
    x = style.conv(x, c(128), path="aux.conv0")
    x = style.conv(x, c(768), 5, padded=False, path="aux.conv1")
    x = layers.GlobalAveragePooling2D(**layout, name="aux_avg_pool")(x)
    return layers.Dense(style.spec.classes, kernel_initializer=style.kernel_initializer, name="aux_predictions")(x)


def _inception_v3(x: Any, style: Style) -> Any:
    """Everything between the input and the output of the network, or its list of outputs."""
    spec, layout = style.spec, {"data_format": style.data_format}
    c, conv = spec.width, style.conv
    if spec.transform_input:
        x = Affine(TRANSFORM_SCALE, TRANSFORM_SHIFT, **layout, name="transform_input")(x)
    x = conv(x, c(32), 3, 2, path="stem.1a")
    x = conv(x, c(32), 3, padded=False, path="stem.2a")
    x = conv(x, c(64), 3, path="stem.2b")
    x = style.halved(x, "stem.pool1")
    x = conv(x, c(80), path="stem.3b")
    x = conv(x, c(192), 3, padded=False, path="stem.4a")
    x = style.halved(x, "stem.pool2")
    for path, features in zip(spec.blocks[0], spec.pool_features, strict=True):
        x = inception_a(x, features, path, style)
    halving, *others = spec.blocks[1]
    x = inception_b(x, halving, style)
    for path, channels in zip(others, spec.channels_7x7, strict=True):
        x = inception_c(x, channels, path, style)
    auxiliary = [_auxiliary(x, style)] if spec.aux else []
    halving, *others = spec.blocks[2]
    x = inception_d(x, halving, style)
    for path, pool in zip(others, spec.wide_pools, strict=True):
        x = inception_e(x, pool, path, style)

    if spec.head_pool != "none":
        pools = {"average": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}
        x = pools[spec.head_pool](**layout, name="avg_pool")(x)
    if spec.head == "none":
        return x
    if spec.dropout:
        x = layers.Dropout(spec.dropout, name="dropout")(x)
    x = layers.Dense(spec.classes, kernel_initializer=style.kernel_initializer, name="predictions")(x)
    if spec.head == "softmax":
        x = layers.Activation("softmax", name="predictions_softmax")(x)
    return [x, *auxiliary] if auxiliary else x


def layer_names(spec: InceptionV3Spec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return dict(KERAS_APPLICATIONS.layers(spec))


def _behind(input_tensor: Any, names: dict[str, str]) -> dict[str, str]:
    """The names, with numbers behind those of the layers that `input_tensor` comes from: a model has each name once."""
    last: dict[str, int] = {}
    for layer in keras.Model(keras.utils.get_source_inputs(input_tensor), input_tensor).layers:
        kind, number = _split(layer.name)
        last[kind] = max(number, last.get(kind, 0))
    found = {}
    for path, name in names.items():
        kind, number = _split(name)
        found[path] = f"{kind}_{number + last[kind] + 1}" if kind in last else name
    return found


def _split(name: str) -> tuple[str, int]:
    """``conv2d_7``: conv2d, 7; ``conv2d``: conv2d, 0."""
    kind, _, number = name.rpartition("_")
    return (kind, int(number)) if kind and number.isdecimal() else (name, 0)


def from_spec(
    spec: InceptionV3Spec,
    *,
    input_tensor: Any = None,
    input_shape: tuple[int | None, ...] | None = None,
    data_format: str = "channels_last",
    weights: Given | None = None,
    kernel_initializer: Any = "glorot_uniform",
    name: str = "inception_v3",
) -> keras.Model:
    """The functional model of `spec`; arguments and errors are those of `applications.assembled`.

    With auxiliary logits it has two outputs: its own and these. A functional model has no mode: in eval mode too.
    """
    names = layer_names(spec)
    if input_tensor is not None:
        names = _behind(input_tensor, names)
    return applications.assembled(
        spec,
        partial(_inception_v3, style=Style(spec, data_format, kernel_initializer, names)),
        input_tensor=input_tensor,
        input_shape=input_shape,
        data_format=data_format,
        weights=weights,
        name=name,
    )


def builder(variant: str) -> Callable[..., keras.Model]:
    """The public function that makes a named variant, in the convention of keras.applications."""
    return applications.builder(variant, VARIANTS[variant].replace(**CONVENTIONS["keras_applications"]))
