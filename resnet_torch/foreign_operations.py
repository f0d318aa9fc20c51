"""What PyTorch's own layers say they do, and the roles of the arrays they hold."""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

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
    Operation,
    Pad,
    Pool,
    Softmax,
)
from common.foreign.protocol import Held
from resnet_torch.layers import BiasedBatchNorm2d, SameAvgPool2d, SameConv2d, SameMaxPool2d

# How many axes of an input there are; which axis a softmax counts from the end depends on it.
Axes = int

_CONVS = nn.Conv1d, nn.Conv2d, nn.Conv3d
_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_INSTANCE_NORMS = nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d
_ZERO_PADS = nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d
_PADS = nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d
_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d

_KERNEL = {"weight": "kernel", "bias": "bias"}
_TABLE = {"weight": "table"}
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
# The role of an array, by a layer's own word for it.
_ROLES: tuple[tuple[tuple[type[nn.Module], ...], Mapping[str, str]], ...] = (
    ((*_CONVS, nn.Linear), _KERNEL),
    ((nn.Embedding,), _TABLE),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _NORM),
)
# The same by operators of an exported program, whose arguments have these words.
_ROLES_OF_OPERATORS: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _KERNEL),
    "embedding": _TABLE,
    **dict.fromkeys(("batch_norm", "layer_norm", "native_layer_norm", "rms_norm"), _NORM),
    **dict.fromkeys(("group_norm", "native_group_norm", "instance_norm"), _NORM),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_native_batch_norm_legit"), _NORM),
}


def operation_of(module: nn.Module, axes: Axes) -> Operation | None:
    """What a layer says it does, given an input of so many axes.

    None where it is none of PyTorch's own or of ours, or of a class that computes otherwise than the one it is made of.
    """
    known = next((cls for cls in type(module).__mro__ if cls in _OPERATIONS), None)
    if known is None or _changed(module, known):
        return None
    return _OPERATIONS[known](module, axes)


def arrays_of(module: nn.Module, names: Mapping[int, str], *, inside: bool) -> dict[str, Held]:
    """The arrays of a layer by role, by its own word for those whose role is not known; with `inside` also those of the
    modules in it. `names` are the model's, by the `id` of the tensor."""
    roles = next((roles for classes, roles in _ROLES if isinstance(module, classes)), {})
    own = [*module.named_parameters(recurse=inside), *module.named_buffers(recurse=inside)]
    return dict(_held(roles, ((word, names[id(one)], one) for word, one in own if _counts(one) and id(one) in names)))


def arrays_of_operator(operator: str, given: Iterable[tuple[str, str, Tensor]]) -> dict[str, Held]:
    """The same of an operator of an exported program: `given` are the words for its arguments, the names of the arrays
    that it is given there, and the arrays."""
    return dict(_held(_ROLES_OF_OPERATORS.get(operator, {}), ((*one, array) for *one, array in given)))


def _held(roles: Mapping[str, str], own: Iterable[Any]) -> Iterable[tuple[str, Held]]:
    for word, name, array in own:
        role = roles.get(word, word)
        # (out, in / groups, ...) as (..., in / groups, out).
        yield role, Held(name=name, axes=(*range(2, array.ndim), 1, 0) if role == "kernel" else None)


def _counts(array: Tensor) -> bool:
    return array.is_floating_point() or array.is_complex()


def _changed(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether it computes otherwise than the class that is known."""
    return any(
        name in vars(module) or getattr(type(module), name, None) is not getattr(known, name, None)
        for name in ("forward", "_conv_forward")
    )


def _each(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _conv(module: Any, axes: Axes) -> Operation:
    padding = module.padding
    if padding == "same":  # at stride 1 only, where PyTorch too puts the odd pixel behind
        whole = [dilation * (side - 1) for dilation, side in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = tuple((pixels // 2, pixels - pixels // 2) for pixels in whole)
    else:
        pairs = tuple((0, 0) if padding == "valid" else (pixels, pixels) for pixels in _pixels(module))
    return Conv(
        strides=tuple(module.stride),
        padding=pairs,
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
    )


def _pixels(module: Any) -> tuple[int, ...]:
    sides = len(module.kernel_size)
    return (0,) * sides if isinstance(module.padding, str) else tuple(module.padding)


def _same_conv(module: Any, axes: Axes) -> Operation:
    return Conv(strides=tuple(module.stride), padding="same", dilation=tuple(module.dilation), groups=module.groups)


def _batch_norm(module: Any, axes: Axes) -> Operation | None:
    if module.running_mean is None:  # it normalises by the batch in every mode
        return None
    # Theirs is the share of the new value. Taken in decimals, 0.1 gives 0.9.
    momentum = None if module.momentum is None else float(1 - Decimal(repr(module.momentum)))
    return BatchNorm(eps=module.eps, momentum=momentum, unbiased=not isinstance(module, BiasedBatchNorm2d))


def _instance_norm(module: Any, axes: Axes) -> Operation | None:
    return None if module.track_running_stats else GroupNorm(eps=module.eps, groups=module.num_features)


def _rms_norm(module: Any, axes: Axes) -> Operation:
    eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
    return LayerNorm(eps=eps, axes=len(module.normalized_shape), centred=False)


def _max_pool(count: int) -> Callable[[Any, Axes], Operation | None]:
    def of(module: Any, axes: Axes) -> Operation | None:
        if module.return_indices or set(_each(module.dilation, count)) != {1}:
            return None
        return _pool(module, count, "max")

    return of


def _avg_pool(count: int) -> Callable[[Any, Axes], Operation | None]:
    def of(module: Any, axes: Axes) -> Operation | None:
        if getattr(module, "divisor_override", None) is not None:
            return None
        return _pool(module, count, "average", counted=module.count_include_pad)

    return of


def _pool(module: Any, count: int, mode: Any, counted: bool = False) -> Pool:
    return Pool(
        mode=mode,
        window=_each(module.kernel_size, count),
        strides=_each(module.stride, count),
        padding=tuple((pixels, pixels) for pixels in _each(module.padding, count)),
        ceil=module.ceil_mode,
        counted=counted,
    )


def _same_pool(mode: Any) -> Callable[[Any, Axes], Operation]:
    def of(module: Any, axes: Axes) -> Operation:
        return Pool(
            mode=mode,
            window=_each(module.kernel_size, 2),
            strides=_each(module.stride, 2),
            padding="same",
            counted=getattr(module, "count_include_pad", False),
        )

    return of


def _global_pool(mode: Any, count: int) -> Callable[[Any, Axes], Operation | None]:
    def of(module: Any, axes: Axes) -> Operation | None:
        sizes = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * count
        if set(sizes) != {1} or getattr(module, "return_indices", False):
            return None
        return GlobalPool(mode=mode, keep=True)

    return of


def _activation(name: str) -> Callable[[Any, Axes], Operation]:
    return lambda module, axes: Activation(name=name)


def _softplus(module: Any, axes: Axes) -> Operation | None:
    return Activation(name="softplus") if (module.beta, module.threshold) == (1, 20) else None


def _softmax(module: Any, axes: Axes) -> Operation | None:
    if module.dim is None:
        return None
    if module.dim == 1 and axes >= 4:  # the channels of an image
        return Softmax(axis=-1)
    return Softmax(axis=module.dim - axes if module.dim >= 0 else module.dim)


def _embedding(module: Any, axes: Axes) -> Operation | None:
    return Embedding() if module.max_norm is None else None  # with it, rows are changed as they are read


def _flatten(module: Any, axes: Axes) -> Operation | None:
    return Flatten(channels="first") if (module.start_dim, module.end_dim) == (1, -1) else None


def _pad(module: Any, axes: Axes) -> Operation | None:
    if module.value != 0:
        return None
    # Theirs begins with the last axis.
    return Pad(padding=tuple(zip(module.padding[-2::-2], module.padding[::-2], strict=True)))


_OPERATIONS: dict[type[Any], Callable[[Any, Axes], Operation | None]] = {
    **dict.fromkeys(_CONVS, _conv),
    SameConv2d: _same_conv,
    nn.Linear: lambda module, axes: Dense(),
    nn.Embedding: _embedding,
    **dict.fromkeys((*_BATCH_NORMS, BiasedBatchNorm2d), _batch_norm),
    **dict.fromkeys(_INSTANCE_NORMS, _instance_norm),
    nn.LayerNorm: lambda module, axes: LayerNorm(eps=module.eps, axes=len(module.normalized_shape)),
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: lambda module, axes: GroupNorm(eps=module.eps, groups=module.num_groups),
    nn.LocalResponseNorm: lambda module, axes: LocalResponseNorm(
        size=module.size, alpha=module.alpha, beta=module.beta, k=module.k, mean=True
    ),
    **{cls: _max_pool(count) for count, cls in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), start=1)},
    **{cls: _avg_pool(count) for count, cls in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), start=1)},
    SameMaxPool2d: _same_pool("max"),
    SameAvgPool2d: _same_pool("average"),
    nn.AdaptiveAvgPool1d: _global_pool("average", 1),
    nn.AdaptiveAvgPool2d: _global_pool("average", 2),
    nn.AdaptiveAvgPool3d: _global_pool("average", 3),
    nn.AdaptiveMaxPool1d: _global_pool("max", 1),
    nn.AdaptiveMaxPool2d: _global_pool("max", 2),
    nn.AdaptiveMaxPool3d: _global_pool("max", 3),
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    nn.LeakyReLU: lambda module, axes: Activation(name="leaky_relu", slope=module.negative_slope),
    nn.SiLU: _activation("silu"),
    nn.GELU: lambda module, axes: Activation(name="gelu_tanh" if module.approximate == "tanh" else "gelu"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Hardsigmoid: _activation("hard_sigmoid"),
    nn.Hardswish: _activation("hard_silu"),
    nn.Tanh: _activation("tanh"),
    nn.ELU: lambda module, axes: Activation(name="elu", slope=module.alpha),
    nn.SELU: _activation("selu"),
    nn.Softplus: _softplus,
    nn.Mish: _activation("mish"),
    nn.Identity: _activation("identity"),
    nn.Softmax: _softmax,
    nn.Softmax2d: lambda module, axes: Softmax(axis=-1),
    **dict.fromkeys(_DROPOUTS, lambda module, axes: Dropout(rate=module.p)),
    nn.Flatten: _flatten,
    **dict.fromkeys((*_PADS, *_ZERO_PADS), _pad),
}
