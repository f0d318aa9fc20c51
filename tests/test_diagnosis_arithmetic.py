"""The arithmetic of hypotheses computes what PyTorch computes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.diagnosis import arithmetic
from common.diagnosis.precision import representable, rounded
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    GroupNorm,
    LayerNorm,
    LocalResponseNorm,
    Merge,
    Pad,
    Pool,
    Softmax,
)
from tests.diagnosis_evidence import conv, drawn, first, last, norm, norm_arrays, tensor, weight


def same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape
    assert np.linalg.norm(one - other) <= 1e-14 * np.linalg.norm(other)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("groups", [1, "some", "depthwise"])
@pytest.mark.parametrize(
    ("axes", "stride", "pad", "dilation"), [(2, 1, 1, 1), (2, 2, 0, 1), (2, 2, 2, 2), (1, 2, 1, 1)]
)
def test_a_convolution_is_pytorchs(channels, groups, axes, stride, pad, dilation):
    channels = channels if groups == 1 else 16
    groups = {1: 1, "some": 4, "depthwise": channels}[groups]
    made = channels if groups == channels else 8
    x, kernel = drawn(2, *(11, 12)[:axes], channels), drawn(*(3, 2)[:axes], channels // groups, made)
    arrays = {"kernel": kernel, "bias": drawn(made)}
    operation = Conv(strides=(stride,) * axes, padding=((pad, pad),) * axes, dilation=(dilation,) * axes, groups=groups)
    theirs = conv(x, arrays, stride=stride, padding=pad, dilation=dilation, groups=groups)
    ours = arithmetic.compute(operation, (x,), arrays)
    same(ours, theirs)
    at = [np.array([0, size // 2, size - 1]) for size in ours.shape[1:-1]]
    part = arithmetic.conv(x, kernel, operation, bias=arrays["bias"], at=at)
    same(part, theirs[:, at[0]] if axes == 1 else theirs[:, at[0]][:, :, at[1]])


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_convolution_pads_with_the_image_as_pytorchs_does(mode):
    x, kernel = drawn(2, 7, 8, 3), drawn(3, 3, 3, 4)
    layer = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False, padding_mode=mode, dtype=torch.float64)
    layer.weight.data = weight(kernel)
    operation = Conv(strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1), padding_mode=mode)
    theirs = last(layer(first(x)))
    same(arithmetic.conv(x, kernel, operation), theirs)
    at = [np.array([0, 6]), np.array([0, 3, 7])]
    same(arithmetic.conv(x, kernel, operation, at=at), theirs[:, at[0]][:, :, at[1]])


@pytest.mark.parametrize("size", [8, 9, 10])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_jaxs(size, stride):
    jax = pytest.importorskip("jax")
    x, kernel = drawn(2, size, size, 3), drawn(3, 3, 3, 4)
    with jax.enable_x64(True):
        theirs = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        theirs = np.asarray(theirs)
    operation = Conv(strides=(stride, stride), padding="same", dilation=(1, 1))
    same(arithmetic.compute(operation, (x,), {"kernel": kernel}), theirs)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "stride", "pad"), [(9, 3, 2, 1), (10, 3, 2, 1), (10, 2, 2, 0), (11, 3, 3, 1)]
)
def test_a_pool_is_pytorchs(mode, ceil, counted, size, window, stride, pad):
    x = drawn(2, size, size + 1, 3)
    axes = 2
    operation = Pool(
        mode=mode,
        window=(window,) * axes,
        strides=(stride,) * axes,
        padding=((pad, pad),) * axes,
        ceil=ceil,
        counted=counted,
    )
    if mode == "max":
        theirs = F.max_pool2d(first(x), window, stride, pad, ceil_mode=ceil)
    else:
        theirs = F.avg_pool2d(first(x), window, stride, pad, ceil_mode=ceil, count_include_pad=counted)
    same(arithmetic.compute(operation, (x,), {}), last(theirs))


_CALLS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_silu": F.hardswish,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
    "softsign": F.softsign,
    "hard_tanh": F.hardtanh,
    "abs": torch.abs,
    "square": torch.square,
}


@pytest.mark.parametrize("name", _CALLS)
def test_an_activation_is_pytorchs(name):
    x = 4 * drawn(3, 100)
    ours = arithmetic.compute(Activation(name=name), (x,), {})
    theirs = _CALLS[name](tensor(x)).numpy()
    assert np.linalg.norm(ours - theirs) <= 1e-14 * np.linalg.norm(theirs)


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_is_pytorchs(training):
    x, arrays = drawn(4, 5, 6, 7), norm_arrays(7)
    operation = BatchNorm(eps=1e-3, momentum=0.9)
    if training:
        mean, var = arithmetic.moments(x, operation)
        ours = arithmetic.compute(operation, (x,), {**arrays, "mean": mean, "var": var})
    else:
        ours = arithmetic.compute(operation, (x,), arrays)
    same(ours, norm(x, arrays, training=training, eps=1e-3))


def test_other_norms_are_pytorchs():
    x = drawn(2, 5, 6, 12)
    scale, bias = drawn(12, seed=1), drawn(12, seed=2)
    arrays = {"scale": scale, "bias": bias}
    layer = F.layer_norm(tensor(x), (12,), tensor(scale), tensor(bias), eps=1e-6)
    same(arithmetic.compute(LayerNorm(eps=1e-6), (x,), arrays), layer.numpy())
    group = F.group_norm(first(x), 4, tensor(scale), tensor(bias), eps=1e-6)
    same(arithmetic.compute(GroupNorm(eps=1e-6, groups=4), (x,), arrays), last(group))
    root = F.rms_norm(tensor(x), (12,), tensor(scale), eps=1e-6)
    same(arithmetic.compute(LayerNorm(eps=1e-6, centred=False), (x,), {"scale": scale}), root.numpy())
    wide = drawn(6, 12, seed=3)
    two = F.layer_norm(tensor(x), (6, 12), tensor(wide), tensor(wide), eps=1e-5)
    same(arithmetic.compute(LayerNorm(eps=1e-5, axes=2), (x,), {"scale": wide, "bias": wide}), two.numpy())


@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_local_response_norm_is_pytorchs(size):
    x = 3 * drawn(2, 4, 5, 9)
    theirs = F.local_response_norm(first(x), size, alpha=0.1, beta=0.7, k=2.0)
    operation = LocalResponseNorm(size=size, alpha=0.1, beta=0.7, k=2.0, mean=True)
    same(arithmetic.compute(operation, (x,), {}), last(theirs))


def test_what_is_left_is_pytorchs():
    x, kernel = drawn(3, 5), drawn(5, 4)
    dense = F.linear(tensor(x), tensor(kernel.T), tensor(kernel[0])).numpy()
    same(arithmetic.compute(Dense(), (x,), {"kernel": kernel, "bias": kernel[0]}), dense)
    index = np.array([[0, 2], [4, 1]])
    same(
        arithmetic.compute(Embedding(), (index,), {"table": kernel}), F.embedding(tensor(index), tensor(kernel)).numpy()
    )
    for axis in (-1, -2):
        same(arithmetic.compute(Softmax(axis=axis), (x,), {}), F.softmax(tensor(x), axis).numpy())
    image = drawn(2, 3, 4, 5)
    same(arithmetic.compute(GlobalPool(mode="average"), (image,), {}), first(image).mean((2, 3)).numpy())
    same(arithmetic.compute(GlobalPool(mode="max", keep=True), (image,), {}), last(first(image).amax((2, 3), True)))
    same(arithmetic.compute(Flatten(channels="first"), (image,), {}), first(image).flatten(1).numpy())
    same(arithmetic.compute(Flatten(channels="last"), (image,), {}), tensor(image).flatten(1).numpy())
    same(arithmetic.compute(Pad(padding=((1, 2), (0, 3))), (image,), {}), last(F.pad(first(image), (0, 3, 1, 2))))
    other = drawn(2, 3, 4, 5, seed=1)
    for how, call in {"add": torch.add, "multiply": torch.mul, "maximum": torch.maximum, "subtract": torch.sub}.items():
        same(arithmetic.compute(Merge(how=how), (image, other), {}), call(tensor(image), tensor(other)).numpy())
    joined = torch.cat((tensor(image), tensor(other)), -1).numpy()
    same(arithmetic.compute(Merge(how="concatenate"), (image, other), {}), joined)


@pytest.mark.parametrize("name", ["layer", "group", "batch"])
def test_what_comes_back_through_a_norm_is_pytorchs(name):
    x, back = drawn(4, 3, 3, 6), drawn(4, 3, 3, 6, seed=1)
    scale = drawn(6, low=0.5)
    image = tensor(x).requires_grad_()
    turned = image.permute(0, 3, 1, 2)
    calls = {
        "layer": (LayerNorm(eps=1e-5), lambda: F.layer_norm(image, (6,), tensor(scale))),
        "group": (GroupNorm(eps=1e-5, groups=2), lambda: F.group_norm(turned, 2, tensor(scale)).permute(0, 2, 3, 1)),
        "batch": (
            BatchNorm(eps=1e-5, momentum=0.9),
            lambda: F.batch_norm(turned, None, None, tensor(scale), training=True).permute(0, 2, 3, 1),
        ),
    }
    operation, call = calls[name]
    (theirs,) = torch.autograd.grad(call(), image, tensor(back))
    ours = arithmetic.norm_pullback(x, back, operation, scale)
    assert np.linalg.norm(ours - theirs.numpy()) <= 1e-13 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("name", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_a_value_is_rounded_as_pytorch_rounds_it(name, kind):
    x = drawn(1000).astype(np.float32).astype(np.float64)
    theirs = tensor(x).to(kind).to(torch.float64).numpy()
    assert np.array_equal(rounded(x, name), theirs)
    assert representable(theirs, name)
    assert not representable(drawn(1000), name)


def test_tf32_keeps_ten_bits_behind_the_point():
    assert rounded(np.array([1 + 2.0**-10, 1 + 2.0**-12, -math.pi]), "tf32").tolist() == [1 + 2.0**-10, 1.0, -3.140625]
