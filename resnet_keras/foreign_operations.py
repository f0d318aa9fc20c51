"""What the layers of anybody's Keras model say they do, in the words of `common.foreign.operations`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
from keras import layers

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
    Operation,
    Pad,
    Padding,
    Pool,
    Softmax,
)
from common.foreign.protocol import Call, Held, Layout
from resnet_keras.layers import LocalResponseNormalization, UnbiasedBatchNormalization


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a layer was called with, and where the channels of images stand in its model."""

    shapes: Sequence[tuple[int, ...]]
    layout: Layout

    @property
    def rank(self) -> int:
        """Of the first array; 0 where there is none."""
        return len(self.shapes[0]) if self.shapes else 0

    @property
    def channels(self) -> int:
        """The axis of the channels of that array, counted from the end."""
        return 1 - self.rank if self.layout == "channels_first" and self.rank > 2 else -1

    @property
    def pixels(self) -> list[int]:
        """The axes of its pixels, counted from the end."""
        return [axis for axis in range(1 - self.rank, 0) if axis != self.channels] if self.rank > 2 else []

    def from_end(self, axis: int) -> int:
        """An axis of it, counted from the end."""
        return axis if axis < 0 else axis - self.rank


# Keras' words for what a layer holds, where they are others than ours. An RMSNormalization's "scale" is ours already.
_ROLES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
    "embeddings": "table",
}
_ACTIVATIONS: dict[str, Operation] = {
    "linear": Activation(name="identity"),
    "relu": Activation(name="relu"),
    "relu6": Activation(name="relu6"),
    "leaky_relu": Activation(name="leaky_relu", slope=0.2),
    "silu": Activation(name="silu"),
    "gelu": Activation(name="gelu"),
    "sigmoid": Activation(name="sigmoid"),
    "hard_sigmoid": Activation(name="hard_sigmoid"),
    "hard_silu": Activation(name="hard_silu"),
    "tanh": Activation(name="tanh"),
    "elu": Activation(name="elu", slope=1.0),
    "selu": Activation(name="selu"),
    "softplus": Activation(name="softplus"),
    "mish": Activation(name="mish"),
    "softmax": Softmax(),
}
# What a subclass may write anew and still be the layer that it is of.
_HARMLESS = {
    *("build", "get_config", "from_config", "compute_output_shape", "compute_output_spec", "compute_mask"),
    *("get_build_config", "build_from_config", "save_own_variables", "load_own_variables", "input_spec"),
}


def described(layer: Any, name: str, path: str, leaf: bool, given: Given, names: Mapping[int, str]) -> Call:
    """A call of a layer, or of an operation in a functional model's graph, with what it says of itself.

    `names` are those of the model's variables, by identity.
    """
    kind = type(layer).__name__
    if not isinstance(layer, layers.Layer):
        return Call(name=name, layer=path, kind=kind, leaf=leaf, operation=_of_graph(layer, given))
    known = next((cls for cls in type(layer).__mro__ if cls in _LAYERS), None)
    operation = _LAYERS[known](layer, given) if known and _as_it_is(layer, known) else None
    fused = layer.activation if isinstance(layer, _FUSED) else None
    if fused is not None and fused is not keras.activations.linear:
        kind = f"{kind}+{getattr(fused, '__name__', type(fused).__name__)}"
        operation = None
    return Call(
        name=name,
        layer=path,
        kind=kind,
        leaf=leaf,
        operation=operation,
        arrays=_arrays(layer, known is not None, names),
    )


def _as_it_is(layer: Any, known: type) -> bool:
    """Whether a layer computes as Keras' own one that it is of: a subclass may have another `call`, a layer may have
    low-rank additions to its kernel."""
    mine = {name for cls in type(layer).__mro__[: type(layer).__mro__.index(known)] for name in vars(cls)}
    changed = {name for name in mine - _HARMLESS if not name.startswith("__") and hasattr(known, name)}
    return not changed and not getattr(layer, "lora_enabled", False)


def _arrays(layer: Any, known: bool, names: Mapping[int, str]) -> dict[str, Held]:
    """The layer's own variables, not those of layers inside it."""
    arrays = {}
    for variable in own_variables(layer):
        if id(variable) in names:
            role = _ROLES.get(variable.name, variable.name) if known else variable.name
            shape = None
            if isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D) and role == "kernel":
                # (..., channels, multiplier): Keras writes a channel's outputs one after another.
                *window, channels, multiplier = variable.shape
                shape = (*window, 1, channels * multiplier)
            arrays[role] = Held(name=names[id(variable)], shape=shape)
    return arrays


def own_variables(layer: Any) -> list[Any]:
    """Those of a layer without those of its sublayers: Keras has no public word for them."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _padding(layer: Any, window: Sequence[int], dilation: Sequence[int]) -> Padding:
    if layer.padding == "same":
        return "same"
    if layer.padding == "causal":
        return (((window[0] - 1) * dilation[0], 0),)
    return ((0, 0),) * len(window)


def _conv(layer: Any, given: Given) -> Operation:
    return Conv(
        strides=tuple(layer.strides),
        padding=_padding(layer, layer.kernel_size, layer.dilation_rate),
        dilation=tuple(layer.dilation_rate),
        groups=layer.groups,
    )


def _depthwise(layer: Any, given: Given) -> Operation:
    return Conv(
        strides=tuple(layer.strides),
        padding=_padding(layer, layer.kernel_size, layer.dilation_rate),
        dilation=tuple(layer.dilation_rate),
        groups=int(layer.kernel.shape[-2]),
    )


def _pool(layer: Any, given: Given) -> Operation:
    window = tuple(layer.pool_size)
    return Pool(
        mode=layer.pool_mode,
        window=window,
        strides=tuple(layer.strides),
        padding=_padding(layer, window, window),
    )


def _global_max(layer: Any, given: Given) -> Operation:
    return GlobalPool(mode="max", keep=layer.keepdims)


def _global_average(layer: Any, given: Given) -> Operation:
    return GlobalPool(mode="average", keep=layer.keepdims)


def _batch_norm(layer: Any, given: Given) -> Operation:
    return BatchNorm(eps=layer.epsilon, momentum=layer.momentum)


def _unbiased_batch_norm(layer: Any, given: Given) -> Operation:
    return BatchNorm(eps=layer.epsilon, momentum=layer.momentum, unbiased=True)


def _local_response_norm(layer: Any, given: Given) -> Operation:
    return LocalResponseNorm(size=layer.size, alpha=layer.alpha, beta=layer.beta, k=layer.k, mean=False)


def _layer_norm(layer: Any, given: Given) -> Operation | None:
    last = _last_axes(layer.axis, given)
    if last is None or getattr(layer, "rms_scaling", False):
        return None
    return LayerNorm(eps=layer.epsilon, axes=last, centred=not isinstance(layer, layers.RMSNormalization))


def _last_axes(axis: Any, given: Given) -> int | None:
    """How many axes these are, if they are the last ones."""
    axes = sorted(given.from_end(one) for one in ([axis] if isinstance(axis, int) else axis))
    return len(axes) if axes == list(range(-len(axes), 0)) else None


def _group_norm(layer: Any, given: Given) -> Operation:
    return GroupNorm(eps=layer.epsilon, groups=layer.groups)


def _relu(layer: Any, given: Given) -> Operation | None:
    match float(layer.negative_slope), layer.max_value, float(layer.threshold):
        case 0.0, None, 0.0:
            return Activation(name="relu")
        case 0.0, 6, 0.0:
            return Activation(name="relu6")
        case slope, None, 0.0:
            return Activation(name="leaky_relu", slope=slope)
    return None


def _activation(layer: Any, given: Given) -> Operation | None:
    function = layer.activation
    name = getattr(function, "__name__", "")
    # A user's own function may be called as one of Keras' is.
    return _ACTIVATIONS.get(name) if function is getattr(keras.activations, name, None) else None


def _softmax(layer: Any, given: Given) -> Operation | None:
    return Softmax(axis=given.from_end(layer.axis)) if isinstance(layer.axis, int) else None


def _flatten(layer: Any, given: Given) -> Operation:
    # Keras puts the channels of an NCHW map behind before it flattens it, if it was told that they stand in front.
    as_they_lie = given.layout == "channels_first" and layer.data_format == "channels_last"
    return Flatten(channels="first" if as_they_lie else "last")


def _pad(layer: Any, given: Given) -> Operation:
    padding = layer.padding if isinstance(layer.padding[0], tuple | list) else (layer.padding,)
    return Pad(padding=tuple((before, after) for before, after in padding))


def _concatenate(layer: Any, given: Given) -> Operation | None:
    return Merge(how="concatenate") if given.from_end(layer.axis) == given.channels else None


def _merging(how: str) -> Callable[[Any, Given], Operation | None]:
    return lambda layer, given: Merge(how=how) if len(given.shapes) > 1 else None


_LAYERS: dict[type, Callable[[Any, Given], Operation | None]] = {
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), _conv),
    **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), _depthwise),
    layers.Dense: lambda layer, given: Dense(),
    layers.Embedding: lambda layer, given: Embedding(),
    layers.BatchNormalization: _batch_norm,
    UnbiasedBatchNormalization: _unbiased_batch_norm,
    LocalResponseNormalization: _local_response_norm,
    **dict.fromkeys((layers.LayerNormalization, layers.RMSNormalization), _layer_norm),
    layers.GroupNormalization: _group_norm,
    **dict.fromkeys((layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D), _pool),
    **dict.fromkeys((layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D), _pool),
    **dict.fromkeys((layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D), _global_max),
    **dict.fromkeys(
        (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D), _global_average
    ),
    layers.Activation: _activation,
    layers.ReLU: _relu,
    layers.LeakyReLU: lambda layer, given: Activation(name="leaky_relu", slope=float(layer.negative_slope)),
    layers.ELU: lambda layer, given: Activation(name="elu", slope=float(layer.alpha)),
    layers.Softmax: _softmax,
    layers.Identity: lambda layer, given: Activation(name="identity"),
    **dict.fromkeys(
        (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
        lambda layer, given: Dropout(rate=float(layer.rate)),
    ),
    layers.Flatten: _flatten,
    layers.Add: _merging("add"),
    layers.Multiply: _merging("multiply"),
    layers.Average: _merging("average"),
    layers.Maximum: _merging("maximum"),
    layers.Subtract: _merging("subtract"),
    layers.Concatenate: _concatenate,
    **dict.fromkeys((layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D), _pad),
}
# Those that apply an activation to what they computed.
_FUSED = (
    *(layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.DepthwiseConv1D, layers.DepthwiseConv2D, layers.Dense),
    *(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose, layers.EinsumDense),
    *(layers.SeparableConv1D, layers.SeparableConv2D),
)


def _of_graph(operation: Any, given: Given) -> Operation | None:
    """What an operation of `keras.ops` does that a functional model was built with."""
    if not type(operation).__module__.startswith("keras."):
        return None
    found = _GRAPH.get(type(operation).__name__)
    return found(operation, given) if found else None


def _mean(operation: Any, given: Given) -> Operation | None:
    return _reduced("average", operation, given)


def _max(operation: Any, given: Given) -> Operation | None:
    return _reduced("max", operation, given)


def _reduced(mode: Literal["max", "average"], operation: Any, given: Given) -> Operation | None:
    axes = [operation.axis] if isinstance(operation.axis, int) else operation.axis or ()
    over_pixels = bool(given.pixels) and sorted(map(given.from_end, axes)) == given.pixels
    return GlobalPool(mode=mode, keep=operation.keepdims) if over_pixels else None


_GRAPH: dict[str, Callable[[Any, Given], Operation | None]] = {
    "Add": _merging("add"),
    "Multiply": _merging("multiply"),
    "Maximum": _merging("maximum"),
    "Subtract": _merging("subtract"),
    "Concatenate": _concatenate,
    "Mean": _mean,
    "Max": _max,
    "Softmax": _softmax,
    "Relu": lambda operation, given: _ACTIVATIONS["relu"],
    "Relu6": lambda operation, given: _ACTIVATIONS["relu6"],
    "LeakyRelu": lambda operation, given: Activation(name="leaky_relu", slope=float(operation.negative_slope)),
    "Silu": lambda operation, given: _ACTIVATIONS["silu"],
    "Gelu": lambda operation, given: Activation(name="gelu_tanh" if operation.approximate else "gelu"),
    "Sigmoid": lambda operation, given: _ACTIVATIONS["sigmoid"],
    "HardSigmoid": lambda operation, given: _ACTIVATIONS["hard_sigmoid"],
    "HardSilu": lambda operation, given: _ACTIVATIONS["hard_silu"],
    "Tanh": lambda operation, given: _ACTIVATIONS["tanh"],
    "Elu": lambda operation, given: Activation(name="elu", slope=float(operation.alpha)),
    "Selu": lambda operation, given: _ACTIVATIONS["selu"],
    "Softplus": lambda operation, given: _ACTIVATIONS["softplus"],
}
