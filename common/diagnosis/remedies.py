"""What to write so that yours does as the reference does, in the framework of yours."""

from collections.abc import Mapping
from typing import Any

from common.diagnosis.arithmetic import ALPHA, LEAKY, Pads

# By the cause and the framework; "" for all others. A template whose facts are not known says nothing.
_TORCH, _KERAS, _FLAX, _ANY = "torch", "keras", "flax", ""
_REMEDIES: Mapping[str, Mapping[str, str]] = {
    "padding:same": {
        _TORCH: "In PyTorch pad {torch_pads} before a {layer} without padding.",
        _KERAS: "In Keras give padding='same'.",
        _FLAX: "In Flax give padding='SAME'.",
        _ANY: "Pad by {pads}.",
    },
    "padding:even": {
        _TORCH: "In PyTorch give padding={symmetric}.",
        _KERAS: "In Keras pad by {pads} (ZeroPadding2D) before a {layer} with padding='valid'.",
        _FLAX: "In Flax give padding={pads}.",
        _ANY: "Pad by {pads}.",
    },
    "padding:uneven": {
        _TORCH: "In PyTorch pad {torch_pads} before a {layer} without padding.",
        _KERAS: "In Keras pad by {pads} (ZeroPadding2D) before a {layer} with padding='valid'.",
        _FLAX: "In Flax give padding={pads}.",
        _ANY: "Pad by {pads}.",
    },
    "padding:none": {
        _TORCH: "In PyTorch give padding=0.",
        _KERAS: "In Keras give padding='valid'.",
        _FLAX: "In Flax give padding='VALID'.",
        _ANY: "Do not pad.",
    },
    "padding_mode": {
        _TORCH: "In PyTorch give padding_mode='{padding_mode}'.",
        _ANY: "Pad with what the reference pads with: {padding_mode}.",
    },
    "stride": {
        _TORCH: "In PyTorch give stride={strides}.",
        _KERAS: "In Keras give strides={strides}.",
        _FLAX: "In Flax give strides={strides}.",
        _ANY: "Give strides of {strides}.",
    },
    "dilation": {
        _TORCH: "In PyTorch give dilation={dilation}.",
        _KERAS: "In Keras give dilation_rate={dilation}.",
        _FLAX: "In Flax give kernel_dilation={dilation}.",
        _ANY: "Give a dilation of {dilation}.",
    },
    "groups": {
        _TORCH: "In PyTorch give groups={groups}.",
        _KERAS: "In Keras give groups={groups}.",
        _FLAX: "In Flax give feature_group_count={groups}.",
        _ANY: "Convolve in {groups} groups.",
    },
    "kernel_transposed": {
        _TORCH: "A convolution's kernel is (out, in, height, width) in PyTorch, a dense layer's weight (out, in).",
        _KERAS: "A convolution's kernel is (height, width, in, out) in Keras, a dense layer's (in, out).",
        _FLAX: "A convolution's kernel is (height, width, in, out) in Flax, a dense layer's (in, out).",
        _ANY: "Transpose the kernel when it is loaded.",
    },
    "kernel_flipped": {_ANY: "Do not flip the kernel: layers of all frameworks correlate."},
    "groups_interleaved": {_ANY: "Group g reads channels g * in / groups onwards, and makes g * out / groups onwards."},
    "flatten_order": {
        _TORCH: "Flatten the map in the reference's order (x.permute before it), or permute the rows as loaded.",
        _ANY: "Flatten the map in the reference's order (transpose it first), or permute the kernel's rows as loaded.",
    },
    "bias_missing": {
        _TORCH: "In PyTorch give bias=True, and load it.",
        _KERAS: "In Keras give use_bias=True, and load it.",
        _FLAX: "In Flax give use_bias=True, and load it.",
        _ANY: "Add the bias.",
    },
    "bias_twice": {_ANY: "Add the bias once."},
    "bias_extra": {
        _TORCH: "In PyTorch give bias=False.",
        _KERAS: "In Keras give use_bias=False.",
        _FLAX: "In Flax give use_bias=False.",
        _ANY: "Leave the bias out.",
    },
    "index_shifted": {_ANY: "Count the entries of the table as the reference does."},
    "eps": {
        _TORCH: "In PyTorch give the norm eps={eps:g}.",
        _KERAS: "In Keras give the norm epsilon={eps:g}.",
        _FLAX: "In Flax give the norm epsilon={eps:g}.",
        _ANY: "Give the norm an eps of {eps:g}.",
    },
    "momentum": {
        _TORCH: "In PyTorch give BatchNorm momentum={new:g}, the share of the new value.",
        _KERAS: "In Keras give BatchNormalization momentum={old:g}, the share of the old value.",
        _FLAX: "In Flax give BatchNorm momentum={old:g}, the share of the old value.",
        _ANY: "Keep {old:g} of the old statistics in a step.",
    },
    "variance_unbiased": {_ANY: "Keep the biased variance, the mean square over N."},
    "variance_unbiased:norm": {
        _TORCH: "In PyTorch give x.var unbiased=False.",
        _ANY: "Divide the sum of squares by N, not by N - 1.",
    },
    "variance_biased": {_ANY: "Keep N / (N - 1) times the batch's variance."},
    "variance_form": {_ANY: "Divide by sqrt(variance + eps)."},
    "batch_statistics": {
        _TORCH: "In PyTorch call model.eval().",
        _KERAS: "In Keras call the layer with training=False.",
        _FLAX: "In Flax give BatchNorm use_running_average=True.",
        _ANY: "Use the running statistics in eval mode.",
    },
    "running_statistics": {
        _TORCH: "In PyTorch call model.train(), and leave the norm in it.",
        _KERAS: "In Keras call the layer with training=True, and leave it trainable.",
        _FLAX: "In Flax give BatchNorm use_running_average=False.",
        _ANY: "Use the batch's statistics in training mode.",
    },
    "statistics_not_updated": {
        _TORCH: "In PyTorch give track_running_stats=True and a momentum, and call model.train().",
        _KERAS: "In Keras call the layer with training=True, and leave it trainable.",
        _FLAX: "In Flax apply with mutable=['batch_stats'], and keep what it returns.",
        _ANY: "Update the running statistics in training mode.",
    },
    "scale_bias_swapped": {_ANY: "Load the scale as the scale and the bias as the bias."},
    "mean_var_swapped": {_ANY: "Load the running mean as the mean and the running variance as the variance."},
    "scale_missing": {
        _TORCH: "In PyTorch give affine=True (elementwise_affine of a LayerNorm), and load the weight.",
        _KERAS: "In Keras give scale=True, and load gamma.",
        _FLAX: "In Flax give use_scale=True, and load the scale.",
        _ANY: "Multiply by the scale.",
    },
    "norm_axes": {_ANY: "Take the statistics over the axes that the reference takes them over."},
    "norm_not_centred": {_ANY: "Subtract the mean where the reference does."},
    "never_loaded": {_ANY: "Load the reference's {roles} into it."},
    "array_differs": {_ANY: "Look at how its {roles} came to be loaded."},
    "activation": {
        _TORCH: "In PyTorch {torch_activation}.",
        _KERAS: "In Keras {keras_activation}.",
        _FLAX: "In Flax {flax_activation}.",
        _ANY: "Use {activation}.",
    },
    "activation_missing": {
        _TORCH: "In PyTorch {torch_activation} behind it.",
        _KERAS: "In Keras {keras_activation} behind it.",
        _FLAX: "In Flax {flax_activation} behind it.",
        _ANY: "Put {activation} behind it.",
    },
    "activation_extra": {
        _KERAS: "In Keras give the layer activation=None, and call none behind it.",
        _ANY: "Leave the activation out.",
    },
    "activation_before_addition": {_ANY: "Compute {expression}."},
    "average_for_maximum": {
        _TORCH: "In PyTorch use a pool of the {mode}.",
        _KERAS: "In Keras use {keras_pool}.",
        _FLAX: "In Flax use {flax_pool}.",
        _ANY: "Take the {mode} of a window.",
    },
    "pool_window": {
        _TORCH: "In PyTorch give kernel_size={window}.",
        _KERAS: "In Keras give pool_size={window}.",
        _FLAX: "In Flax give window_shape={window}.",
        _ANY: "Give a window of {window}.",
    },
    "pool_counted": {
        _TORCH: "In PyTorch give count_include_pad={counted}.",
        _KERAS: "In Keras {keras_counted}.",
        _FLAX: "In Flax give count_include_pad={counted}.",
        _ANY: "Count the borders as the reference does.",
    },
    "pool_ceil": {
        _TORCH: "In PyTorch give ceil_mode={ceil}.",
        _ANY: "Pad behind, so that as many windows fit as in the reference.",
    },
    "lrn": {
        _TORCH: "In PyTorch give LocalResponseNorm({size}, alpha={torch_alpha:g}, beta={beta:g}, k={k:g}).",
        _KERAS: "tf.nn.local_response_normalization takes depth_radius={radius}, bias={k:g}, alpha={plain_alpha:g}, "
        "beta={beta:g}.",
        _ANY: "Divide by ({k:g} + {plain_alpha:g} * the sum of squares of {size} channels) ** {beta:g}.",
    },
    "gate": {_ANY: "Compute {expression}."},
    "softmax_twice": {_ANY: "Take the softmax once: here, or in the loss or the output."},
    "softmax_missing": {_ANY: "Take the softmax of it."},
    "softmax_extra": {_ANY: "Leave the softmax out."},
    "softmax_axis": {
        _TORCH: "In PyTorch give dim={axis}.",
        _ANY: "Give axis={axis}.",
    },
    "dropout_on": {
        _TORCH: "In PyTorch call model.eval(), and give F.dropout training=self.training.",
        _KERAS: "In Keras call the layer with training=False.",
        _FLAX: "In Flax give Dropout deterministic=True.",
        _ANY: "Pass on what dropout gets in eval mode.",
    },
    "scale_factor": {_ANY: "Multiply by {factor:g}."},
    "branch_missing": {_ANY: "Compute {expression}."},
    "branch_extra": {_ANY: "Compute {expression}."},
    "branch_other": {_ANY: "Compute {expression}."},
    "order": {_ANY: "Compute {expression}."},
    "merge": {_ANY: "Compute {expression}."},
    "expression": {_ANY: "Compute {expression}."},
    "axes_swapped": {_ANY: "Transpose it as the reference does."},
    "input_bgr": {_ANY: "Give the channels in the reference's order: x[..., ::-1] of images with channels last."},
    "input_range": {_ANY: "Give {form}."},
    "input_normalised": {_ANY: "Give {form}."},
    "input_transposed": {_ANY: "Give images of (N, height, width, C), as they lie."},
    "precision:tf32": {
        _TORCH: "In PyTorch set torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32 to False.",
        _KERAS: "Call tf.config.experimental.enable_tensor_float_32_execution(False).",
        _FLAX: "Set jax_default_matmul_precision to 'highest'.",
    },
    "precision": {
        _TORCH: "In PyTorch look for autocast, .half(), .bfloat16() or a cast in it.",
        _KERAS: "In Keras look at the layer's dtype policy.",
        _FLAX: "In Flax look at the layer's dtype and param_dtype.",
        _ANY: "Look for a cast in it.",
    },
    "detached": {
        _TORCH: "In PyTorch look for detach(), torch.no_grad(), .data or requires_grad=False.",
        _KERAS: "In Keras look for stop_gradient and trainable=False.",
        _FLAX: "In Flax look for jax.lax.stop_gradient.",
        _ANY: "Let the gradient pass.",
    },
    "gradient_scaled": {_ANY: "Look for a custom gradient, or a mean where the reference has a sum."},
    "straight_through": {_ANY: "Look for a custom gradient, or a stop_gradient of x - f(x)."},
    "statistics_detached": {_ANY: "Let the gradient pass through the {statistics} too."},
    "gradient_at_zero": {_ANY: "Look for a custom gradient: at 0 it is {at_zero:g} in the reference."},
}

# What to call, by the framework.
_ACTIVATIONS: Mapping[str, Mapping[str, str]] = {
    _TORCH: {
        "gelu": "use F.gelu(x)",
        "gelu_tanh": "use F.gelu(x, approximate='tanh')",
        "leaky_relu": "use F.leaky_relu(x, {slope})",
        "elu": "use F.elu(x, {slope})",
        "hard_silu": "use F.hardswish(x)",
        "hard_sigmoid": "use F.hardsigmoid(x)",
        "quick_gelu": "use x * torch.sigmoid(1.702 * x)",
        "identity": "leave the activation out",
        "sigmoid": "use torch.sigmoid(x)",
        "tanh": "use torch.tanh(x)",
        "": "use F.{name}(x)",
    },
    _KERAS: {
        "gelu": "use keras.activations.gelu(x, approximate=False)",
        "gelu_tanh": "use keras.activations.gelu(x, approximate=True)",
        "leaky_relu": "use keras.activations.leaky_relu(x, negative_slope={slope})",
        "elu": "use keras.activations.elu(x, alpha={slope})",
        "quick_gelu": "use x * keras.ops.sigmoid(1.702 * x)",
        "identity": "leave the activation out",
        "": "use keras.activations.{name}(x)",
    },
    _FLAX: {
        "gelu": "use nn.gelu(x, approximate=False)",
        "gelu_tanh": "use nn.gelu(x, approximate=True)",
        "leaky_relu": "use nn.leaky_relu(x, negative_slope={slope})",
        "elu": "use nn.elu(x, alpha={slope})",
        "quick_gelu": "use x * nn.sigmoid(1.702 * x)",
        "mish": "use jax.nn.mish(x)",
        "identity": "leave the activation out",
        "": "use nn.{name}(x)",
    },
}


def family(backend: str) -> str:
    """The framework whose words its users know: "keras:jax" is Keras; "" for what is none of the three."""
    name = backend.partition(":")[0]
    return name if name in _ACTIVATIONS else _ANY


def remedy(cause: str, backend: str, facts: Mapping[str, Any]) -> str:
    """The sentence; "" where there is nothing to say."""
    rows = _REMEDIES.get(f"{cause}:{facts['detail']}" if "detail" in facts else cause, _REMEDIES.get(cause, {}))
    template = rows.get(family(backend), rows.get(_ANY, ""))
    try:
        return template.format(**facts)
    except KeyError:
        return ""


def of_padding(pads: Pads, *, same: bool, layer: str) -> dict[str, Any]:
    """Facts of the padding that the reference has."""
    symmetric = tuple(before for before, _ in pads)
    even = all(before == behind for before, behind in pads)
    detail = "none" if not any(map(any, pads)) else "same" if same and not even else "even" if even else "uneven"
    return {
        "detail": detail,
        "pads": pads,
        "torch_pads": tuple(pad for axis in reversed(pads) for pad in axis),
        "symmetric": symmetric[0] if len(set(symmetric)) == 1 else symmetric,
        "layer": layer,
    }


def of_activation(name: str, slope: float | None) -> dict[str, Any]:
    """Facts of the activation that the reference has."""
    facts: dict[str, Any] = {"activation": activation_words(name, slope)}
    slope = {"leaky_relu": LEAKY, "elu": ALPHA}.get(name) if slope is None else slope
    known = {"relu", "relu6", "silu", "selu", "softplus", "mish", "sigmoid", "tanh", "hard_sigmoid", "hard_silu"}
    for framework, calls in _ACTIVATIONS.items():
        call = calls.get(name, calls[""] if name in known else "")
        if call:
            facts[f"{framework}_activation"] = call.format(name=name, slope="" if slope is None else f"{slope:g}")
    return facts


_TITLES: Mapping[str, str] = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "leaky ReLU",
    "silu": "SiLU",
    "gelu": "GELU by the error function",
    "gelu_tanh": "the tanh form of GELU",
    "quick_gelu": "GELU as x * sigmoid(1.702 x)",
    "sigmoid": "the sigmoid",
    "hard_sigmoid": "the hard sigmoid",
    "old_hard_sigmoid": "Keras 2's hard sigmoid, 0.2 x + 0.5",
    "hard_silu": "hard SiLU",
    "elu": "ELU",
    "selu": "SELU",
    "scaled_tanh": "1.7159 tanh(2/3 x)",
    "identity": "no activation",
    "abs": "the absolute value",
    "square": "the square",
    "hard_tanh": "the hard tanh",
}


def activation_words(name: str, slope: float | None = None) -> str:
    """What people call it."""
    words = _TITLES.get(name, name)
    return words if slope is None else f"{words} of {slope:g}"
