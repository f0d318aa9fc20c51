"""Defects planted in the Flax backend. What each must be caught by stands in catalogue.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resnet_flax import alexnet, densenet, efficientnet, googlenet, inception_v3, layers, resnet, resnet_v2, vgg
from tests.mutants.planting import in_loading, not_loaded, replaced


def _with(module: Any, **changes: Any) -> Any:
    """A layer that is made with some arguments changed."""
    return lambda *arguments, **options: module(*arguments, **(options | changes))


_max_pool = nn.max_pool

# `norm_layer` makes `nn.BatchNorm` where the variance is biased, and its own subclass where it is not.
default_momentum = replaced(layers, "BatchNorm", _with(layers.BatchNorm, momentum=0.99))
eps = replaced(layers, "BatchNorm", _with(layers.BatchNorm, epsilon=1.1e-5))
momentum_as_decay = replaced(layers, "BatchNorm", _with(layers.BatchNorm, momentum=0.1))
biased_variance = replaced(layers, "BatchNorm", nn.BatchNorm)
always_running_average = replaced(layers, "BatchNorm", _with(layers.BatchNorm, use_running_average=True))
gelu = replaced(resnet.nn, "relu", nn.gelu)
leaky_relu = replaced(resnet.nn, "relu", partial(nn.leaky_relu, negative_slope=1e-9))
average_pool = replaced(resnet.nn, "max_pool", nn.avg_pool)
same_padding = replaced(layers, "window_padding", lambda *window: "SAME")


def _stopped(x: Any, *arguments: Any, **options: Any) -> Any:
    return lax.stop_gradient(_max_pool(x, *arguments, **options))


gradient_stopped_at_the_pool = replaced(resnet.nn, "max_pool", _stopped)


@contextmanager
def bfloat16_in_one_layer(backend: Any) -> Iterator[None]:
    def narrowed(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        y = call(*arguments, **options)
        narrow = context.module.name == "conv_init" and y.dtype == jnp.float32
        return y.astype(jnp.bfloat16).astype(y.dtype) if narrow else y

    with nn.intercept_methods(narrowed):
        yield


@contextmanager
def float32_in_training_in_one_layer(backend: Any) -> Iterator[None]:
    """The stem's norm takes off the mean that float32 sums give."""

    def narrowed(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        norm, y = context.module, call(*arguments, **options)
        if norm.name != "bn_init" or norm.use_running_average or context.method_name != "__call__":
            return y
        x = arguments[0]
        return y + x.mean((0, 1, 2)) - x.astype(jnp.float32).mean((0, 1, 2)).astype(x.dtype)

    with nn.intercept_methods(narrowed):
        yield


fast_variance = replaced(layers, "BatchNorm", _with(layers.BatchNorm, use_fast_variance=True))


temperature = replaced(resnet.nn, "softmax", lambda x: jax.nn.softmax(x * (1 + 1e-9)))


@not_loaded
def last_gammas_stay_zero(weights: dict[str, Any]) -> dict[str, Any]:
    """The zero-initialised scale of a block's last norm is not loaded: the branch is gone."""
    name = "stages.0.blocks.0.norm3.scale"
    return weights | ({name: weights[name] * 0} if name in weights else {})


@in_loading
def variance_taken_for_deviation(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: array**0.5 if name.endswith(".var") else array for name, array in weights.items()}


@in_loading
def dense_bias_shifted(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"head.fc.bias": np.roll(weights["head.fc.bias"], 1)}


# Forms of ResNet.

_merge = resnet.Block.merge
relu_before_the_addition = replaced(resnet.Block, "merge", lambda block, y, x, last: _merge(block, nn.relu(y), x, last))


# VGG.

adaptive_windows_do_not_overlap = replaced(
    layers, "adaptive_windows", lambda size, cells: [(i * size // cells, (i + 1) * size // cells) for i in range(cells)]
)


class _OneRate(nn.Dropout):
    def __post_init__(self) -> None:
        self.rate = 0.5
        super().__post_init__()


one_rate_for_every_dropout = replaced(vgg.nn, "Dropout", _OneRate)


@in_loading
def dense_layers_share_the_first_bias(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"head.fc2.bias": weights["head.fc1.bias"]}


# ResNet with pre-activation.

eps_of_torchvision = replaced(resnet_v2, "norm_layer", _with(layers.norm_layer, eps=1e-5))


@in_loading
def projections_without_bias(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: array * 0 if name.endswith("shortcut.conv.bias") else array for name, array in weights.items()}


# DenseNet.


def _symmetric(*arguments: Any, padding: Any, **options: Any) -> Any:
    return layers.conv_layer(*arguments, padding="symmetric" if padding == "same" else padding, **options)


stem_padded_symmetrically = replaced(densenet, "conv_layer", _symmetric)
maximum_in_the_transition = replaced(
    densenet, "avg_pool", lambda x, kernel, stride, **_: layers.max_pool(x, kernel, stride, padding="valid")
)
# LeNet and AlexNet.


@in_loading
def rows_of_fc1_channels_first(weights: dict[str, Any]) -> dict[str, Any]:
    """Rows in the order of channel, height and width, as PyTorch's and Caffe's files have them."""
    kernel = weights["head.fc1.kernel"]
    rows = kernel.reshape(25, -1, kernel.shape[1]).swapaxes(0, 1)
    return weights | {"head.fc1.kernel": rows.reshape(kernel.shape)}


def _of_tensorflow(x: Any, **options: Any) -> Any:
    """With the default exponent of `tf.nn.local_response_normalization`."""
    return layers.local_response_norm(x, **(options | {"beta": 0.5}))


default_beta = replaced(alexnet, "local_response_norm", _of_tensorflow)
# EfficientNet.

_stochastic_depth, _norm_layer = efficientnet.stochastic_depth, efficientnet.norm_layer

one_rate_of_stochastic_depth = replaced(
    efficientnet, "stochastic_depth", lambda rate, **options: _stochastic_depth(0.5, **options)
)


def _of_the_head(**options: Any) -> Any:
    norm, head = _norm_layer(**options), _norm_layer(**(options | {"eps": 1e-5}))
    return lambda name: (head if name == "head.norm" else norm)(name=name)


head_norm_at_default_eps = replaced(efficientnet, "norm_layer", _of_the_head)


# Inception v3.

images_transformed_twice = replaced(
    inception_v3, "affine", lambda x, scale, shift: layers.affine(layers.affine(x, scale, shift), scale, shift)
)


# GoogLeNet.


@in_loading
def five_by_five_as_three_by_three(weights: dict[str, Any]) -> dict[str, Any]:
    """The windows of torchvision's weights, with a border of zeros."""
    inner = {
        name: np.pad(kernel[1:-1, 1:-1], [(1, 1), (1, 1), (0, 0), (0, 0)])
        for name, kernel in weights.items()
        if name.endswith(".branch3.kernel")
    }
    return weights | inner


auxiliary_windows_that_do_not_overlap = replaced(
    googlenet,
    "adaptive_pool",
    lambda x, cells, reduce: nn.avg_pool(x, sides := (x.shape[1] // cells[0], x.shape[2] // cells[1]), sides),
)


# Equivalents.

relu_as_maximum = replaced(resnet.nn, "relu", lambda x: jnp.where(x > 0, x, jnp.zeros_like(x)))
