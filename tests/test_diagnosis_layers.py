"""A fault planted in one layer is named, and no other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.diagnosis.causes import AND, CAUSES, title
from common.diagnosis.evidence import Backward, Statistics
from common.diagnosis.layers import explain_layer
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalPool,
    GroupNorm,
    LayerNorm,
    LocalResponseNorm,
    Merge,
    Pool,
    Softmax,
)
from tests.diagnosis_evidence import Fault, conv, drawn, evidence, first, last, norm, norm_arrays, tensor, weight

X = drawn(2, 12, 12, 8)
ARRAYS = {"kernel": drawn(3, 3, 8, 16), "bias": drawn(16)}
SQUARE = {"kernel": drawn(3, 3, 8, 8, seed=1)}
GROUPED = {"kernel": drawn(3, 3, 2, 8, seed=2), "bias": drawn(8, seed=2)}
NORM = norm_arrays(8)
ROWS = drawn(4, 48)
DENSE = {"kernel": drawn(48, 20), "bias": drawn(20, seed=3)}


def plain_conv(stride=1, pad=1, dilation=1, groups=1):
    return Conv(strides=(stride,) * 2, padding=((pad, pad),) * 2, dilation=(dilation,) * 2, groups=groups)


def of_conv(change, arrays=ARRAYS, own=None, operation=None, backend="torch", said=None, x=X, **settings):
    """A convolution padded by 1; `change` makes yours, in PyTorch, of the image."""
    settings = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1, **settings}

    def make():
        known = plain_conv(settings["stride"], settings["padding"], settings["dilation"], settings["groups"])
        reference = conv(x, arrays, **settings)
        return evidence(operation or known, x, reference, change(x), arrays, own, backend=backend, said=said)

    return make


def other(**arrays):
    return {**ARRAYS, **arrays}


def of_norm(change, operation=None, own=None, training=False, backend="torch", said=None):
    def make():
        known = operation or BatchNorm(eps=1e-5, momentum=0.9, unbiased=True)
        reference = norm(X, NORM, training=training)
        return evidence(known, X, reference, change(X), NORM, own, training=training, backend=backend, said=said)

    return make


def of_rows(change, own=None, arrays=DENSE, operation=None):
    def make():
        reference = ROWS @ arrays["kernel"] + arrays.get("bias", 0.0)
        return evidence(operation or Dense(), ROWS, reference, np.asarray(change(ROWS)), arrays, own)

    return make


def linear(x, kernel, bias=None):
    return F.linear(tensor(x), tensor(kernel.T), tensor(bias)).numpy()


def of(operation, call, wrong, x=X, backend="torch", arrays=None, own=None):
    """A layer without arrays: both calls are of a tensor with channels first."""

    def make():
        inputs = x if isinstance(x, tuple) else (x,)
        reference, yours = (one(*(first(each) for each in inputs)) for one in (call, wrong))
        turned = [last(one) if one.ndim > 2 else one.detach().numpy() for one in (reference, yours)]
        return evidence(operation, inputs, *turned, arrays, own, backend=backend)

    return make


def of_activation(name, call, wrong, **settings):
    return of(Activation(name=name), call, wrong, x=3 * X, **settings)


def of_tokens(operation, call, wrong, scaled=True, own=None):
    """A norm of tokens of 24 channels."""
    x = drawn(3, 10, 24)
    arrays = {"scale": drawn(24, low=0.5), "bias": drawn(24)} if scaled else {}

    def make():
        scale, bias = tensor(arrays.get("scale")), tensor(arrays.get("bias"))
        reference, yours = (one(tensor(x), scale, bias).numpy() for one in (call, wrong))
        return evidence(operation, x, reference, yours, arrays, own)

    return make


def layer_norm(eps=1e-5):
    return lambda x, scale, bias: F.layer_norm(x, (24,), scale, bias, eps)


def in_training(momentum=0.9, unbiased=True, yours=None, operation=None):
    """What two batch norms keep after a pass, the outputs equal."""

    def make():
        layers = [torch.nn.BatchNorm2d(8, momentum=0.1, dtype=torch.float64) for _ in range(2)]
        for one in layers:
            one.running_mean[:], one.running_var[:] = tensor(NORM["mean"]), tensor(NORM["var"])
        before = {"mean": NORM["mean"], "var": NORM["var"]}
        layers[1].momentum = 1 - momentum
        output = last(layers[0](first(X)))
        layers[1](first(X))
        after = [{"mean": one.running_mean.numpy(), "var": one.running_var.numpy()} for one in layers]
        if not unbiased:
            count = X.size // 8
            batch = (after[1]["var"] - momentum * NORM["var"]) * (count - 1) / count
            after[1]["var"] = momentum * NORM["var"] + batch
        if yours:
            after[1] = yours(after[1])
        return evidence(
            operation or BatchNorm(eps=1e-5, momentum=0.9, unbiased=True),
            X,
            output,
            output,
            NORM,
            training=True,
            statistics=tuple(Statistics(before=before, after=one) for one in after),
        )

    return make


def on_the_way_back(operation, call, wrong, arrays=None, x=X, training=False):
    """What two layers of one output make of a cotangent; both calls are of tensors with channels last."""

    def make():
        back, inputs = drawn(*x.shape, seed=7), []
        rows, outputs = [], []
        for one in (call, wrong):
            image = tensor(x).requires_grad_()
            held = {role: tensor(array.copy()).requires_grad_() for role, array in (arrays or {}).items()}
            output = one(image, **held)
            grads = torch.autograd.grad(output, [image, *held.values()], tensor(back), allow_unused=True)
            grads = [None if grad is None else grad.numpy() for grad in grads]
            rows.append(
                Backward(
                    cotangent=back,
                    of_inputs=(grads[0],),
                    of_arrays={
                        role: np.zeros_like(arrays[role]) if grad is None else grad
                        for role, grad in zip(held, grads[1:], strict=True)
                    },
                )
            )
            outputs.append(output.detach().numpy())
            inputs.append(x)
        return evidence(operation, x, *outputs, arrays, training=training, backward=tuple(rows))

    return make


def in_jax(call):
    """Computed in JAX in float64; an image with channels last."""

    def wrong(x):
        jax = pytest.importorskip("jax")
        with jax.enable_x64(True):
            return np.asarray(call(jax, jax.numpy.asarray(x)))

    return wrong


def jax_same(x, stride=1, kernel=ARRAYS["kernel"]):
    def call(jax, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        made = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=numbers)
        return made + ARRAYS["bias"]

    return in_jax(call)(x)


def flax_average(x):
    """Flax counts the borders unless it is told not to."""

    def call(jax, x):
        nn = pytest.importorskip("flax.linen")
        return nn.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME")

    return in_jax(call)(x)


def keras_average(x):
    keras = pytest.importorskip("keras")
    pooled = keras.ops.average_pool(x, 3, 2, "same", data_format="channels_last")
    return keras.ops.convert_to_numpy(pooled)


def map_rows(shape, axes):
    """Rows of a kernel for a map flattened in another order."""
    return DENSE["kernel"][np.arange(48).reshape(shape).transpose(axes).ravel()]


GENERATOR = torch.Generator().manual_seed(5)


def dropped(x, rate=0.3, channels=False):
    mask = torch.rand((*x.shape[:2], 1, 1) if channels else x.shape, generator=GENERATOR, dtype=x.dtype) >= rate
    return x * mask / (1 - rate)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def batch_norm_by_hand(x, scale, bias, detached):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
    if detached:
        mean, var = mean.detach(), var.detach()
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + bias


IMAGE = {"kernel": drawn(7, 7, 3, 16), "bias": drawn(16)}
GROUPS = {"groups": 4, "arrays": GROUPED}
CONVOLUTIONS = [
    Fault(
        name="SAME at stride 2",
        cause="padding",
        make=of_conv(lambda x: jax_same(x, 2), stride=2),
        says="pads as SAME does",
        remedy="In PyTorch give padding=1.",
    ),
    Fault(
        name="symmetric where SAME is meant",
        cause="padding",
        make=lambda: evidence(
            Conv(strides=(2, 2), padding="same", dilation=(1, 1)),
            X,
            jax_same(X, 2),
            conv(X, ARRAYS, stride=2, padding=1),
            ARRAYS,
        ),
        says="pads symmetrically, by 1",
        remedy="In PyTorch pad (0, 1, 0, 1) before a convolution without padding.",
    ),
    Fault(
        name="no padding",
        cause="padding",
        make=of_conv(lambda x: conv(x, ARRAYS), backend="keras:tensorflow"),
        says="does not pad",
        remedy="In Keras pad by ((1, 1), (1, 1)) (ZeroPadding2D) before a convolution with padding='valid'.",
    ),
    Fault(
        name="padding before alone",
        cause="padding",
        make=of_conv(lambda x: conv(x, ARRAYS, before=(2, 0, 2, 0))),
        says="pads by 2 before and 0 behind",
    ),
    Fault(
        name="padding of one axis",
        cause="padding",
        make=of_conv(lambda x: conv(x, ARRAYS, before=(1, 1, 2, 0))),
        says="on its axes in turn",
    ),
    Fault(
        name="padding with the image",
        cause="padding_mode",
        make=of_conv(
            lambda x: last(
                F.conv2d(
                    F.pad(first(x), (1, 1, 1, 1), mode="reflect"), weight(ARRAYS["kernel"]), tensor(ARRAYS["bias"])
                )
            )
        ),
        says="reflect",
    ),
    Fault(
        name="stride", cause="stride", make=of_conv(lambda x: conv(x, ARRAYS, stride=2, padding=1)), says="steps by 2"
    ),
    Fault(
        name="dilation",
        cause="dilation",
        make=of_conv(lambda x: conv(x, ARRAYS, dilation=2, padding=2)),
        says="dilates by 2",
    ),
    Fault(
        name="height and width exchanged",
        cause="kernel_transposed",
        make=of_conv(lambda x: conv(x, other(kernel=ARRAYS["kernel"].transpose(1, 0, 2, 3)), padding=1)),
        says="height and width",
    ),
    Fault(
        name="inputs and outputs exchanged",
        cause="kernel_transposed",
        make=of_conv(lambda x: conv(x, {"kernel": SQUARE["kernel"].transpose(0, 1, 3, 2)}, padding=1), arrays=SQUARE),
        says="inputs and outputs",
    ),
    Fault(
        name="reshaped for transposed",
        cause="kernel_transposed",
        make=of_conv(
            lambda x: conv(x, other(kernel=ARRAYS["kernel"].transpose(3, 2, 0, 1).reshape(3, 3, 8, 16)), padding=1)
        ),
        says="reshaped",
    ),
    Fault(
        name="flipped kernel",
        cause="kernel_flipped",
        make=of_conv(lambda x: conv(x, other(kernel=ARRAYS["kernel"][::-1, ::-1]), padding=1)),
    ),
    Fault(
        name="a transposed convolution",
        cause="kernel_flipped",
        make=of_conv(lambda x: last(F.conv_transpose2d(first(x), weight(SQUARE["kernel"]), padding=1)), arrays=SQUARE),
        says="flips its kernel, its inputs and outputs exchanged",
    ),
    Fault(
        name="flipped in the arrays of yours",
        cause="kernel_flipped",
        make=of_conv(
            lambda x: conv(x, other(kernel=ARRAYS["kernel"][::-1, ::-1]), padding=1),
            own=other(kernel=ARRAYS["kernel"][::-1, ::-1]),
        ),
    ),
    Fault(
        name="groups read in turn",
        cause="groups_interleaved",
        make=of_conv(lambda x: conv(x[..., [0, 4, 1, 5, 2, 6, 3, 7]], GROUPED, padding=1, groups=4), **GROUPS),
        says="reads the channels",
    ),
    Fault(
        name="groups made in turn",
        cause="groups_interleaved",
        make=of_conv(lambda x: conv(x, GROUPED, padding=1, groups=4)[..., [0, 2, 4, 6, 1, 3, 5, 7]], **GROUPS),
        says="makes the channels",
    ),
    Fault(name="no bias", cause="bias_missing", make=of_conv(lambda x: conv(x, other(bias=None), padding=1))),
    Fault(
        name="bias twice",
        cause="bias_twice",
        make=of_conv(lambda x: conv(x, ARRAYS, padding=1) + ARRAYS["bias"]),
        says="twice",
    ),
    Fault(
        name="a bias too many",
        cause="bias_extra",
        make=of_conv(
            lambda x: conv(x, {**SQUARE, "bias": DENSE["bias"][:8]}, padding=1),
            arrays=SQUARE,
            own={**SQUARE, "bias": DENSE["bias"][:8]},
        ),
        remedy="bias=False",
    ),
    Fault(
        name="a ReLU behind it",
        cause="activation_extra",
        make=of_conv(lambda x: np.maximum(conv(x, ARRAYS, padding=1), 0.0), backend="keras:jax"),
        says="takes ReLU",
    ),
    Fault(
        name="zeros in the bias",
        cause="never_loaded",
        make=of_conv(lambda x: conv(x, other(bias=None), padding=1), own=other(bias=np.zeros(16))),
        says="zeros, in bias",
    ),
    Fault(
        name="a kernel as PyTorch draws it",
        cause="never_loaded",
        make=lambda: _fresh(),
        says="uniform as PyTorch draws them",
    ),
    Fault(
        name="another kernel",
        cause="array_differs",
        make=of_conv(
            lambda x: conv(x, other(kernel=ARRAYS["kernel"] * 1.001 + 0.01), padding=1),
            own=other(kernel=ARRAYS["kernel"] * 1.001 + 0.01),
        ),
        says="another kernel",
    ),
    Fault(
        name="BGR into the stem",
        cause="input_bgr",
        make=of_conv(
            lambda x: conv(x[..., ::-1], IMAGE, padding=3, stride=2), arrays=IMAGE, padding=3, stride=2, x=X[..., :3]
        ),
    ),
    Fault(
        name="two faults: padding and bias",
        cause="padding+bias_missing",
        make=of_conv(lambda x: jax_same(x, 2) - ARRAYS["bias"], stride=2),
    ),
    Fault(
        name="two faults: flipped, with a ReLU",
        cause="kernel_flipped+activation_extra",
        make=of_conv(lambda x: np.maximum(conv(x, other(kernel=ARRAYS["kernel"][::-1, ::-1]), padding=1), 0.0)),
    ),
    Fault(
        name="no words of either, and a fused ReLU missing",
        cause="activation_missing",
        make=lambda: evidence(None, X, np.maximum(conv(X, ARRAYS, padding=1), 0), conv(X, ARRAYS, padding=1), ARRAYS),
        remedy="F.relu(x) behind it",
    ),
    Fault(
        name="words that are not true",
        cause="padding",
        make=of_conv(lambda x: conv(x, ARRAYS, padding=1), operation=plain_conv(2, 3), padding=0, dilation=1),
        says="pads symmetrically, by 1",
    ),
    Fault(
        name="a convolution over time",
        cause="padding",
        make=lambda: evidence(
            Conv(strides=(1,), padding=((2, 0),), dilation=(1,)),
            X[:, 0],
            conv(X[:, 0], {"kernel": ARRAYS["kernel"][0]}, before=(2, 0)),
            conv(X[:, 0], {"kernel": ARRAYS["kernel"][0]}, padding=1),
            {"kernel": ARRAYS["kernel"][0]},
        ),
        says="pads symmetrically, by 1",
    ),
]


def _fresh():
    torch.manual_seed(3)
    layer = torch.nn.Conv2d(8, 16, 3, padding=1, dtype=torch.float64)
    kernel = layer.weight.detach().permute(2, 3, 1, 0).numpy()
    own = other(kernel=kernel)
    return evidence(plain_conv(), X, conv(X, ARRAYS, padding=1), conv(X, own, padding=1), ARRAYS, own)


DENSES = [
    Fault(
        name="a dense kernel transposed",
        cause="kernel_transposed",
        make=lambda: evidence(Dense(), ROWS, linear(ROWS, _square()), linear(ROWS, _square().T), {"kernel": _square()}),
    ),
    Fault(
        name="a dense kernel reshaped",
        cause="kernel_transposed",
        make=of_rows(lambda x: linear(x, DENSE["kernel"].T.reshape(48, 20), DENSE["bias"])),
        says="reshaped",
    ),
    Fault(
        name="rows of a map flattened with channels last",
        cause="flatten_order",
        make=of_rows(lambda x: linear(x, map_rows((3, 4, 4), (1, 2, 0)), DENSE["bias"])),
    ),
    Fault(
        name="rows of a map turned",
        cause="flatten_order",
        make=of_rows(lambda x: linear(x, map_rows((3, 4, 4), (0, 2, 1)), DENSE["bias"])),
        says="3 x 4 x 4",
    ),
    Fault(name="a dense layer's bias", cause="bias_missing", make=of_rows(lambda x: linear(x, DENSE["kernel"]))),
    Fault(
        name="a table shifted",
        cause="index_shifted",
        make=lambda: evidence(
            Embedding(),
            np.array([[1, 5, 3]]),
            F.embedding(torch.tensor([[1, 5, 3]]), tensor(ROWS.T)).numpy(),
            F.embedding(torch.tensor([[2, 6, 4]]), tensor(ROWS.T)).numpy(),
            {"table": ROWS.T},
        ),
    ),
    Fault(
        name="a table scaled",
        cause="scale_factor",
        make=lambda: evidence(
            Embedding(),
            np.array([[1, 5, 3]]),
            F.embedding(torch.tensor([[1, 5, 3]]), tensor(DENSE["kernel"])).numpy(),
            F.embedding(torch.tensor([[1, 5, 3]]), tensor(DENSE["kernel"])).numpy() * np.sqrt(20),
            {"table": DENSE["kernel"]},
        ),
        says="sqrt(20)",
    ),
]


def _square():
    return drawn(48, 48, seed=9)


def keras_norm(x):
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build(x.shape)
    layer.set_weights([NORM[role] for role in ("scale", "bias", "mean", "var")])
    return keras.ops.convert_to_numpy(layer(x, training=False))


NORMS = [
    Fault(
        name="Keras' eps",
        cause="eps",
        make=of_norm(keras_norm, backend="keras:tensorflow"),
        says="has an eps of 0.001",
        remedy="In Keras give the norm epsilon=1e-05.",
    ),
    Fault(name="an eps of 1.1e-5", cause="eps", make=of_norm(lambda x: norm(x, NORM, eps=1.1e-5)), says="1.1e-05"),
    Fault(
        name="batch statistics in eval mode",
        cause="batch_statistics",
        make=of_norm(lambda x: norm(x, NORM, training=True)),
        remedy="model.eval()",
    ),
    Fault(
        name="running statistics in training mode",
        cause="running_statistics",
        make=of_norm(lambda x: norm(x, NORM), training=True),
    ),
    Fault(
        name="unbiased in training mode",
        cause="variance_unbiased",
        make=of_norm(
            lambda x: norm(
                x, {**NORM, "mean": x.mean((0, 1, 2)), "var": tensor(x).reshape(-1, 8).var(0, unbiased=True).numpy()}
            ),
            training=True,
        ),
    ),
    Fault(
        name="scale and bias exchanged",
        cause="scale_bias_swapped",
        make=of_norm(lambda x: norm(x, {**NORM, "scale": NORM["bias"], "bias": NORM["scale"]})),
    ),
    Fault(
        name="mean and variance exchanged",
        cause="mean_var_swapped",
        make=lambda: evidence(
            BatchNorm(eps=1e-5, momentum=0.9),
            X,
            norm(X, {**NORM, "mean": -NORM["mean"] + 1}),
            norm(X, {**NORM, "mean": NORM["var"], "var": -NORM["mean"] + 1}),
            {**NORM, "mean": -NORM["mean"] + 1},
        ),
    ),
    Fault(
        name="no scale",
        cause="scale_missing",
        make=of_norm(lambda x: norm(x, {**NORM, "scale": None})),
    ),
    Fault(
        name="statistics never loaded",
        cause="never_loaded",
        make=of_norm(
            lambda x: norm(x, {**NORM, "mean": np.zeros(8), "var": np.ones(8)}),
            own={**NORM, "mean": np.zeros(8), "var": np.ones(8)},
        ),
        says="in mean and var",
    ),
    Fault(
        name="a standard deviation for the variance",
        cause="variance_form",
        make=of_norm(lambda x: norm(x, {**NORM, "var": np.sqrt(NORM["var"])})),
    ),
    Fault(
        name="every image by itself",
        cause="norm_axes",
        make=of_norm(
            lambda x: last(F.instance_norm(first(x), weight=tensor(NORM["scale"]), bias=tensor(NORM["bias"]))),
            training=True,
        ),
    ),
    Fault(
        name="eps, and no bias",
        cause="bias_missing+eps",
        make=of_norm(lambda x: norm(x, {**NORM, "bias": None}, eps=1e-3)),
    ),
    Fault(
        name="a norm without words, and a ReLU behind",
        cause="activation_extra",
        make=lambda: evidence(None, X, norm(X, NORM), np.maximum(norm(X, NORM), 0.0), NORM),
    ),
    Fault(
        name="a layer norm's eps",
        cause="eps",
        make=of_tokens(LayerNorm(eps=1e-5), layer_norm(1e-5), layer_norm(1e-6)),
        says="1e-06",
    ),
    Fault(
        name="a layer norm that is unbiased",
        cause="variance_unbiased",
        make=of_tokens(
            LayerNorm(eps=1e-5),
            layer_norm(),
            lambda x, scale, bias: (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * scale + bias,
        ),
    ),
    Fault(
        name="a root mean square",
        cause="norm_not_centred",
        make=of_tokens(
            LayerNorm(eps=1e-5),
            layer_norm(),
            lambda x, scale, bias: F.rms_norm(x, (24,), scale, 1e-5) + bias,
        ),
    ),
    Fault(
        name="a layer norm over the tokens too",
        cause="norm_axes",
        make=of_tokens(
            LayerNorm(eps=1e-5),
            layer_norm(),
            lambda x, scale, bias: F.layer_norm(x, (10, 24), eps=1e-5) * scale + bias,
        ),
        says="last 2 axes",
    ),
    Fault(
        name="another number of groups",
        cause="norm_axes",
        make=of(
            GroupNorm(eps=1e-5, groups=2),
            lambda x: F.group_norm(x, 2),
            lambda x: F.group_norm(x, 4),
        ),
        says="norms 4 groups",
    ),
    Fault(
        name="torch's momentum for Keras'",
        cause="momentum",
        make=in_training(momentum=0.1),
        says="keeps 0.1",
    ),
    Fault(name="Keras' momentum", cause="momentum", make=in_training(momentum=0.99), says="keeps 0.99"),
    Fault(name="a biased variance kept", cause="variance_biased", make=in_training(unbiased=False)),
    Fault(
        name="momentum and a biased variance",
        cause="momentum+variance_biased",
        make=in_training(momentum=0.99, unbiased=False),
    ),
    Fault(
        name="statistics that stay",
        cause="statistics_not_updated",
        make=in_training(yours=lambda after: {"mean": NORM["mean"], "var": NORM["var"]}),
    ),
]
POOL = Pool(mode="max", window=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
AVERAGE = Pool(mode="average", window=(3, 3), strides=(1, 1), padding=((1, 1), (1, 1)), counted=False)
LRN = LocalResponseNorm(size=5, alpha=0.1, beta=0.75, k=2.0, mean=True)


def response(size=5, alpha=0.1, beta=0.75, k=2.0):
    return lambda x: F.local_response_norm(x, size, alpha, beta, k)


def max_pool(x):
    return F.max_pool2d(x, 3, 2, 1)


POOLS = [
    Fault(
        name="average for maximum",
        cause="average_for_maximum",
        make=of(POOL, max_pool, lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
        says="takes the average",
    ),
    Fault(
        name="SAME in a pool",
        cause="padding",
        make=of(POOL, max_pool, lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-1e300), 3, 2)),
        says="SAME",
    ),
    Fault(
        name="zeros around a maximum",
        cause="padding_mode",
        make=of(POOL, max_pool, lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), x=X - 1),
    ),
    Fault(
        name="a window over the end",
        cause="pool_ceil",
        make=of(
            Pool(mode="max", window=(3, 3), strides=(2, 2), padding=((0, 0), (0, 0))),
            lambda x: F.max_pool2d(x, 3, 2),
            lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        ),
    ),
    Fault(
        name="Flax counts the borders",
        cause="pool_counted",
        make=lambda: evidence(
            AVERAGE,
            X,
            last(F.avg_pool2d(first(X), 3, 1, 1, count_include_pad=False)),
            flax_average(X),
            backend="flax",
        ),
        remedy="In Flax give count_include_pad=False.",
    ),
    Fault(
        name="Keras' SAME leaves the borders out, and pads behind",
        cause="padding+pool_counted",
        make=lambda: evidence(
            Pool(mode="average", window=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), counted=True),
            X,
            last(F.avg_pool2d(first(X), 3, 2, 1)),
            keras_average(X),
            backend="keras:tensorflow",
        ),
    ),
    Fault(
        name="a window of 2",
        cause="pool_window",
        make=of(POOL, max_pool, lambda x: F.max_pool2d(x, 2, 2)),
        says="windows of 2",
    ),
    Fault(
        name="the maximum of all pixels",
        cause="average_for_maximum",
        make=of(GlobalPool(mode="average"), lambda x: x.mean((2, 3)), lambda x: x.amax((2, 3))),
    ),
    Fault(
        name="channels first",
        cause="flatten_order",
        make=of(Flatten(channels="first"), lambda x: x.flatten(1), lambda x: x.permute(0, 2, 3, 1).flatten(1)),
        says="channels last",
    ),
    Fault(
        name="subtracted for added",
        cause="merge",
        make=of(Merge(how="add"), torch.add, torch.sub, x=(X, drawn(*X.shape, seed=4))),
    ),
    Fault(
        name="concatenated in another order",
        cause="order",
        make=of(
            Merge(how="concatenate"),
            lambda x, y: torch.cat((x, y), 1),
            lambda x, y: torch.cat((y, x), 1),
            x=(X, drawn(*X.shape, seed=4)),
        ),
    ),
    Fault(
        name="ReLU before the addition",
        cause="activation_before_addition",
        make=of(
            Merge(how="add"),
            lambda x, y: F.relu(x + y),
            lambda x, y: x + F.relu(y),
            x=(X, drawn(*X.shape, seed=4)),
        ),
    ),
    Fault(name="alpha not divided", cause="lrn", make=of(LRN, response(), response(alpha=0.5)), says="does not divide"),
    Fault(name="another alpha", cause="lrn", make=of(LRN, response(), response(alpha=0.02)), says="alpha of 0.02"),
    Fault(name="another beta", cause="lrn", make=of(LRN, response(), response(beta=0.5)), says="beta of 0.5"),
    Fault(name="another k", cause="lrn", make=of(LRN, response(), response(k=1.0)), says="k of 1"),
    Fault(name="another size", cause="lrn", make=of(LRN, response(), response(size=3)), says="3 channels"),
    Fault(
        name="a radius for a size, alpha as it is",
        cause="lrn",
        make=of(LRN, response(), response(size=7, alpha=0.1 * 7)),
        says="7 channels",
    ),
]
ACTIVATIONS = [
    Fault(
        name="the tanh form of GELU",
        cause="activation",
        make=of_activation("gelu", F.gelu, lambda x: F.gelu(x, approximate="tanh"), backend="flax"),
        says="takes the tanh form of GELU",
        remedy="In Flax use nn.gelu(x, approximate=False).",
    ),
    Fault(name="no ReLU", cause="activation_missing", make=of_activation("relu", F.relu, lambda x: x)),
    Fault(name="ReLU6", cause="activation", make=of_activation("relu", F.relu, F.relu6), says="ReLU6"),
    Fault(
        name="leaky, of 0.2",
        cause="activation",
        make=of_activation("leaky_relu", F.leaky_relu, lambda x: F.leaky_relu(x, 0.2)),
        says="0.2",
    ),
    Fault(
        name="leaky, of 0.07",
        cause="activation",
        make=of_activation("leaky_relu", F.leaky_relu, lambda x: F.leaky_relu(x, 0.07)),
        says="leaky ReLU of 0.07",
    ),
    Fault(name="SiLU", cause="activation", make=of_activation("relu", F.relu, F.silu), says="silu".upper()[0:1]),
    Fault(
        name="the hard sigmoid of a gate",
        cause="activation",
        make=of_activation("sigmoid", torch.sigmoid, F.hardsigmoid),
        says="hard sigmoid",
    ),
    Fault(
        name="no words of an activation",
        cause="activation",
        make=lambda: evidence(None, 3 * X, F.mish(tensor(3 * X)).numpy(), F.silu(tensor(3 * X)).numpy()),
        says="SiLU",
    ),
    Fault(
        name="softmax twice",
        cause="softmax_twice",
        make=lambda: evidence(
            Softmax(), ROWS, tensor(ROWS).softmax(-1).numpy(), tensor(ROWS).softmax(-1).softmax(-1).numpy()
        ),
    ),
    Fault(
        name="no softmax",
        cause="softmax_missing",
        make=lambda: evidence(Softmax(), ROWS, tensor(ROWS).softmax(-1).numpy(), ROWS),
    ),
    Fault(
        name="softmax over images",
        cause="softmax_axis",
        make=lambda: evidence(Softmax(), ROWS, tensor(ROWS).softmax(-1).numpy(), tensor(ROWS).softmax(0).numpy()),
    ),
    Fault(
        name="dropout on",
        cause="dropout_on",
        make=of(Dropout(rate=0.3), lambda x: x, dropped),
        says="drops 0.3 of the values",
    ),
    Fault(
        name="dropout of channels",
        cause="dropout_on",
        make=of(Dropout(rate=0.5), lambda x: x, lambda x: dropped(x, 0.5, channels=True), x=drawn(4, 5, 5, 32)),
        says="channels",
    ),
    Fault(
        name="bfloat16 inside a convolution",
        cause="precision",
        make=of_conv(
            lambda x: last(
                F.conv2d(
                    first(x).bfloat16(),
                    weight(ARRAYS["kernel"]).bfloat16(),
                    tensor(ARRAYS["bias"]).bfloat16(),
                    padding=1,
                ).double()
            )
        ),
        says="bfloat16",
    ),
    Fault(
        name="float32 inside a convolution",
        cause="precision",
        make=of_conv(
            lambda x: (
                last(F.conv2d(first(x).float(), weight(ARRAYS["kernel"]).float(), padding=1).double()) + ARRAYS["bias"]
            )
        ),
        says="float32",
    ),
    Fault(
        name="float16 inside a dense layer",
        cause="precision",
        make=of_rows(
            lambda x: (tensor(x).half() @ tensor(DENSE["kernel"]).half() + tensor(DENSE["bias"]).half()).double()
        ),
        says="float16",
    ),
    Fault(
        name="TF32 products",
        cause="precision",
        make=of_rows(lambda x: _tf32(x) @ _tf32(DENSE["kernel"]) + DENSE["bias"]),
        says="TF32",
    ),
    Fault(
        name="float32 inside a norm",
        cause="precision",
        make=of_norm(
            lambda x: norm(x.astype(np.float32), {k: v.astype(np.float32) for k, v in NORM.items()}).astype(float)
        ),
        says="float32",
    ),
]


def _tf32(x):
    """Ten bits behind the point, by the bits of a float32: half added, the rest cut off (no ties in random values)."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _weightless(x, scale, bias):
    return F.layer_norm(x, (8,), scale, bias)


AFFINE = {"scale": NORM["scale"], "bias": NORM["bias"]}
BACKWARD = [
    Fault(
        name="detached",
        cause="detached",
        make=on_the_way_back(Activation(name="silu"), F.silu, lambda x: F.silu(x.detach()) + 0 * x),
        says="lets no gradient through to its input",
    ),
    Fault(
        name="a frozen scale",
        cause="detached",
        make=on_the_way_back(
            LayerNorm(eps=1e-5), _weightless, lambda x, scale, bias: _weightless(x, scale.detach(), bias), AFFINE
        ),
        says="`scale`",
    ),
    Fault(
        name="half the gradient",
        cause="gradient_scaled",
        make=on_the_way_back(Activation(name="silu"), F.silu, lambda x: F.silu(x) / 2 + F.silu(x).detach() / 2),
        says="0.5 times",
    ),
    Fault(
        name="statistics as constants",
        cause="statistics_detached",
        make=on_the_way_back(
            BatchNorm(eps=1e-5, momentum=0.9),
            lambda x, scale, bias: batch_norm_by_hand(x, scale, bias, False),
            lambda x, scale, bias: batch_norm_by_hand(x, scale, bias, True),
            AFFINE,
            training=True,
        ),
        says="mean and variance",
    ),
    Fault(
        name="straight through",
        cause="straight_through",
        make=on_the_way_back(Activation(name="silu"), F.silu, lambda x: x + (F.silu(x) - x).detach()),
    ),
    Fault(
        name="a gradient at zero",
        cause="gradient_at_zero",
        make=on_the_way_back(
            Activation(name="relu"), F.relu, lambda x: torch.maximum(x, torch.zeros_like(x)), x=np.maximum(X, 0.0)
        ),
        says="0.5",
    ),
]
FAULTS = [*CONVOLUTIONS, *DENSES, *NORMS, *POOLS, *ACTIVATIONS, *BACKWARD]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_a_layer_is_named_first(fault):
    made = fault.make()
    found = explain_layer(made)
    assert found, "no hypothesis explains it"
    best = found[0]
    assert set(best.cause.split(AND)) == set(fault.cause.split(AND)), [one.sentence for one in found]
    assert fault.says in best.yours
    assert fault.remedy in best.remedy
    assert best.after <= 1e-3 * best.before or best.cause == "precision"
    assert len(found) <= 6
    assert title(best.cause)


def _unknown():
    torch.manual_seed(0)
    conv_output = conv(X, ARRAYS, padding=1)
    return {
        "another function behind a convolution": evidence(
            plain_conv(), X, conv_output, np.sin(conv_output) * 1.3 + 0.1 * conv_output, ARRAYS
        ),
        "noise": evidence(plain_conv(), X, conv_output, conv_output + 1e-4 * drawn(*conv_output.shape, seed=8), ARRAYS),
        "small noise": evidence(
            plain_conv(), X, conv_output, conv_output + 1e-10 * drawn(*conv_output.shape, seed=8), ARRAYS
        ),
        "a convolution of other values, unknown": evidence(
            plain_conv(), X, conv_output, conv(X, other(kernel=drawn(3, 3, 8, 16, seed=5)), padding=1), ARRAYS
        ),
        "an activation of its own": evidence(Activation(name="relu"), X, F.relu(tensor(X)).numpy(), X * np.cos(X)),
        "a norm by the median": evidence(
            BatchNorm(eps=1e-5, momentum=0.9),
            X,
            norm(X, NORM),
            (X - np.median(X, (0, 1, 2))) / X.std((0, 1, 2)),
            NORM,
        ),
        "a median pool": evidence(
            POOL, X, last(max_pool(first(X))), last(first(X).unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).median(-1)[0])
        ),
        "an unknown layer": evidence(None, X, np.sin(X), np.cos(X)),
        "another shape": evidence(Dense(), ROWS, linear(ROWS, DENSE["kernel"], DENSE["bias"]), ROWS[:, :7], DENSE),
    }


@pytest.mark.parametrize("name", _unknown())
def test_what_no_hypothesis_covers_is_not_explained(name):
    assert explain_layer(_unknown()[name]) == []


def test_paddings_that_are_the_same_are_no_hypotheses():
    # At an odd size SAME is symmetric: of a padding and a bias the bias alone is at fault.
    x = X[:, :11, :11]
    made = evidence(
        plain_conv(2), x, conv(x, ARRAYS, stride=2, padding=1), conv(x, other(bias=None), stride=2, padding=1), ARRAYS
    )
    found = explain_layer(made)
    assert found[0].cause == "bias_missing"
    assert all("SAME" not in one.yours for one in found)


def test_the_runner_up_leaves_something():
    made = of_conv(lambda x: jax_same(x, 2), stride=2)()
    best, runner_up, *_ = explain_layer(made)
    assert best.after < 1e-14
    assert runner_up.after > 1e-3
    assert best.sentence.startswith("`layer`: yours pads as SAME does, the reference pads symmetrically, by 1;")


def test_what_yours_says_of_itself_counts():
    # More than two settings at once, such as no pair explains.
    yours = conv(X, other(bias=None), before=(0, 2, 0, 2), stride=2, dilation=2)
    said = Conv(strides=(2, 2), padding=((0, 2), (0, 2)), dilation=(2, 2))
    own = {"kernel": ARRAYS["kernel"]}
    made = evidence(plain_conv(), X, conv(X, ARRAYS, padding=1), yours, ARRAYS, own, said=said)
    assert set(explain_layer(made)[0].cause.split(AND)) == {"padding", "stride", "dilation", "bias_missing"}


def test_float32_arrays_are_explained_within_their_rounding():
    x, arrays = X.astype(np.float32), {role: one.astype(np.float32) for role, one in ARRAYS.items()}
    made = evidence(
        plain_conv(2), x, conv(x, arrays, stride=2, padding=1), conv(x, arrays, (0, 1, 0, 1), stride=2), arrays
    )
    found = explain_layer(made)
    assert found[0].cause == "padding"
    assert "SAME" in found[0].yours
    assert found[0].after < 1e-6


def test_every_cause_of_the_table_of_faults_has_words():
    assert {one for fault in FAULTS for one in fault.cause.split(AND)} <= set(CAUSES)


def test_a_convolution_in_other_groups_is_named_by_what_yours_says():
    own = {"kernel": drawn(3, 3, 4, 16, seed=6), "bias": ARRAYS["bias"]}
    made = evidence(
        plain_conv(), X, conv(X, ARRAYS, padding=1), conv(X, own, padding=1, groups=2), ARRAYS, own,
        said=plain_conv(groups=2),
    )  # fmt: skip
    best = explain_layer(made)[0]
    assert best.cause == "groups"
    assert best.yours == "convolves in 2 groups"
    assert best.remedy == "In PyTorch give groups=1."


@pytest.mark.parametrize("seed", range(6))
def test_layers_that_differ_by_something_of_their_own_are_not_accused(seed):
    """Small ones too, where little can be told from the values."""
    generator = np.random.default_rng(seed)
    for size, channels in ((1, 2), (3, 3), (6, 4)):
        x = generator.standard_normal((2, size, size, channels))
        arrays = {"kernel": generator.standard_normal((1, 1, channels, channels))}
        wrong = {"kernel": generator.standard_normal((1, 1, channels, channels))}
        made = evidence(plain_conv(pad=0), x, conv(x, arrays), conv(x, wrong), arrays)
        assert explain_layer(made) == []
        norms = {**norm_arrays(channels), "scale": generator.standard_normal(channels)}
        other_norms = {role: one + 0.3 * generator.standard_normal(channels) ** 2 for role, one in norms.items()}
        known = BatchNorm(eps=1e-5, momentum=0.9)
        assert explain_layer(evidence(known, x, norm(x, norms), norm(x, other_norms), norms)) == []
        silu = F.silu(tensor(x)).numpy()
        assert explain_layer(evidence(Activation(name="silu"), x, silu, silu + 0.1 * np.sin(3 * x))) == []


def test_an_eps_is_solved_for_where_a_channel_has_few_values():
    x, arrays = drawn(2, 2, 2, 2048), norm_arrays(2048)
    known = BatchNorm(eps=1e-5, momentum=0.9)
    found = explain_layer(evidence(known, x, norm(x, arrays), norm(x, arrays, eps=1e-3), arrays))
    assert found[0].yours == "has an eps of 0.001"


def test_values_that_are_not_finite_are_not_explained():
    yours = conv(X, ARRAYS, padding=1)
    assert explain_layer(evidence(plain_conv(), X, yours, yours * np.nan, ARRAYS, limit=1e-12)) == []
    assert explain_layer(evidence(plain_conv(), X, yours * np.inf, yours, ARRAYS, limit=1e-12)) == []
    assert explain_layer(evidence(None, (), yours, yours + 1, limit=1e-12)) == []
