"""Defects planted in the Keras backend. What each must be caught by stands in catalogue.py."""

from typing import Any

import keras
import numpy as np
from keras import layers, ops

from resnet_keras import efficientnet, googlenet, resnet, resnet_v2
from resnet_keras import layers as own
from tests.mutants.planting import after_build, in_loading, not_loaded, replaced


def _all(model: Any, kind: type) -> list[Any]:
    return [layer for layer in model.layers if isinstance(layer, kind)]


@after_build
def default_eps(model: Any) -> None:
    for norm in _all(model, layers.BatchNormalization):
        norm.epsilon = 1e-3


@after_build
def default_momentum(model: Any) -> None:
    for norm in _all(model, layers.BatchNormalization):
        norm.momentum = 0.99


@after_build
def frozen_norms(model: Any) -> None:
    """Running statistics in training too, as a Keras batch norm uses them once `trainable` is False."""
    for norm in _all(model, layers.BatchNormalization):
        norm.call = lambda inputs, training=None, exact=norm.call: exact(inputs, training=False)


@after_build
def relu6(model: Any) -> None:
    model.get_layer("res3a_branch2a_relu").activation = keras.activations.relu6


@after_build
def bfloat16_in_one_layer(model: Any) -> None:
    conv = model.get_layer("res3a_branch2b")
    if conv.compute_dtype == "float32":
        exact = conv.call
        conv.call = lambda x: exact(ops.cast(ops.cast(x, "bfloat16"), "float32"))


@after_build
def dropout_left_on(model: Any) -> None:
    conv = model.get_layer("res3a_branch2b")
    if conv.compute_dtype == "float64":
        exact = conv.call
        conv.call = lambda x: exact(keras.random.dropout(x, 0.1))


@after_build
def sigmoid_for_softmax(model: Any) -> None:
    if (prob := _named(model, "prob")) is not None:
        prob.activation = keras.activations.sigmoid


def _named(model: Any, name: str) -> Any:
    return next((layer for layer in model.layers if layer.name == name), None)


def _same_padded(conv: Any) -> Any:
    def padded(x: Any, filters: int, kernel_size: int, name: str, style: Any, **options: Any) -> Any:
        return conv(x, filters, kernel_size, name, style, **(options | {"padding": "same"}))

    return padded


same_padding_everywhere = replaced(resnet, "_conv", _same_padded(resnet._conv))

biased_variance = replaced(resnet, "UnbiasedBatchNormalization", layers.BatchNormalization)

unbiased_variance = replaced(resnet.layers, "BatchNormalization", resnet.UnbiasedBatchNormalization)


def _unrectified_stem(relu: Any) -> Any:
    return lambda x, name: layers.Activation("linear", name=name)(x) if name == "conv1_relu" else relu(x, name)


stem_without_relu = replaced(resnet, "_relu", _unrectified_stem(resnet._relu))


def _smoothed(from_logits: bool) -> Any:
    exact = keras.losses.CategoricalCrossentropy(from_logits=from_logits, label_smoothing=0.1)
    return lambda labels, outputs: exact(ops.one_hot(labels, outputs.shape[-1]), outputs)


label_smoothing = replaced(keras.losses, "SparseCategoricalCrossentropy", _smoothed)


@in_loading
def kernel_rotated(weights: dict[str, Any]) -> dict[str, Any]:
    """A true convolution instead of a cross-correlation: the kernel turned by half a turn."""
    name = "stages.0.blocks.0.conv2.kernel"
    return weights | {name: weights[name][::-1, ::-1]}


@in_loading
def means_swapped(weights: dict[str, Any]) -> dict[str, Any]:
    a, b = "stages.1.blocks.0.norm1.mean", "stages.1.blocks.0.norm1.var"
    return weights | ({a: weights[b], b: abs(weights[a])} if a in weights else {})


@in_loading
def groups_interleaved(weights: dict[str, Any]) -> dict[str, Any]:
    """Grouped kernels taken as if groups were innermost in the output channels."""
    name = "stages.0.blocks.0.conv2.kernel"
    kernel = weights[name]
    channels = kernel.shape[-1]
    return weights | {name: kernel[..., [i * 4 % channels + i * 4 // channels for i in range(channels)]]}


@not_loaded
def bias_not_loaded(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"head.fc.bias": weights["head.fc.bias"] * 0}


@in_loading
def dense_bias_shifted(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"head.fc.bias": np.roll(weights["head.fc.bias"], 1)}


# VGG.


def _strided(size: int, cells: int) -> list[tuple[int, int]]:
    """Windows of one size at one stride, which end where the map does."""
    stride = size // cells
    return [(i * stride, i * stride + size - (cells - 1) * stride) for i in range(cells)]


adaptive_pool_by_strides = replaced(own, "adaptive_windows", _strided)


@after_build
def pool_keeps_the_last_pixel(model: Any) -> None:
    """What ceil mode does where a pixel is left over: it gets a window of its own."""
    for pool in _all(model, layers.MaxPooling2D):
        pool.padding = "same"


@in_loading
def no_bias_under_a_norm(weights: dict[str, Any]) -> dict[str, Any]:
    """As in a port whose convolutions have none where a norm follows: in training mode it makes no difference."""
    return {name: array * 0 if ".conv" in name and name.endswith("bias") else array for name, array in weights.items()}


@after_build
def dropout_does_not_scale(model: Any) -> None:
    for dropout in _all(model, layers.Dropout):
        dropout.rate = 0.0


@after_build
def dropout_of_the_head_left_on(model: Any) -> None:
    for dropout in _all(model, layers.Dropout):
        dropout.call = lambda inputs, training=None, own=dropout.call: own(inputs, training=True)


# ResNet with pre-activation.


def _lowest_around_the_pool(x: Any, style: Any) -> Any:
    x = own.LowestPadding2D(1, data_format=style.data_format, name="pool1_pad")(x)
    return layers.MaxPooling2D(3, strides=2, data_format=style.data_format, name="pool1_pool")(x)


padding_never_wins = replaced(resnet_v2, "_pool", _lowest_around_the_pool)


def _strided_at_the_end(block: Any) -> Any:
    swapped = {"conv2_block2": 2, "conv3_block1": 1}
    return lambda x, filters, strides, conv_shortcut, name, style: block(
        x, filters, swapped.get(name, strides), conv_shortcut, name, style
    )


stride_at_the_end = replaced(resnet_v2, "residual_block_v2", _strided_at_the_end(resnet_v2.residual_block_v2))


# DenseNet.


@after_build
def no_relu_in_the_stem(model: Any) -> None:
    model.get_layer("conv1_relu").activation = keras.activations.linear


@after_build
def eps_of_torchvision(model: Any) -> None:
    for norm in _all(model, layers.BatchNormalization):
        norm.epsilon = 1e-5


# LeNet and AlexNet.


@after_build
def tanh_without_its_scale(model: Any) -> None:
    for layer in _all(model, layers.Activation):
        if layer.activation is own.scaled_tanh:
            layer.activation = keras.activations.tanh


@after_build
def radius_taken_for_size(model: Any) -> None:
    """TensorFlow's `depth_radius` is half of the window."""
    for norm in _all(model, own.LocalResponseNormalization):
        norm.size = 2 * norm.size + 1


# EfficientNet.


@after_build
def stochastic_depth_does_not_scale(model: Any) -> None:
    for dropout in _all(model, layers.Dropout):
        if dropout.noise_shape is not None:
            dropout.rate = 0.0


def _symmetric(conv: Any) -> Any:
    return lambda *arguments, **options: conv(*arguments, **(options | {"padding": "symmetric"}))


symmetric_padding_for_same = replaced(efficientnet, "conv2d", _symmetric(efficientnet.conv2d))


@in_loading
def gate_of_the_first_block_everywhere(weights: dict[str, Any]) -> dict[str, Any]:
    first, second = (f"stages.0.blocks.{b}.squeeze.kernel" for b in (0, 1))
    return weights | ({second: weights[first]} if first in weights else {})


# Inception v3.


@in_loading
def numbers_in_another_order(weights: dict[str, Any]) -> dict[str, Any]:
    """Layers of equal shapes, ranked in the file by another order than in the model."""
    one, other = (f"stages.2.blocks.1.{branch}.conv.kernel" for branch in ("branch3x3_2a", "branch3x3dbl_3a"))
    return weights | {one: weights[other], other: weights[one]}


@after_build
def gammas_that_are_not_there_are_zero(model: Any) -> None:
    for norm in _all(model, layers.BatchNormalization):
        norm.call = lambda inputs, training=None, exact=norm.call: exact(0 * inputs, training=training)


# GoogLeNet.

_max_pool2d = googlenet.max_pool2d


def _floored(*arguments: Any, **options: Any) -> Any:
    return _max_pool2d(*arguments, **(options | ({"padding": "valid"} if options["padding"] == "ceil" else {})))


pools_that_floor = replaced(googlenet, "max_pool2d", _floored)


@after_build
def alpha_divided_twice(model: Any) -> None:
    for norm in _all(model, own.LocalResponseNormalization):
        norm.alpha /= norm.size


# Equivalents.


@after_build
def addition_the_other_way_round(model: Any) -> None:
    for add in _all(model, layers.Add):
        exact = add.call
        add.call = lambda inputs, exact=exact: exact(inputs[::-1])
