"""What the layers of Flax say that they do, in the words of common/foreign/operations.py. linen and nnx have the same
layers under nearly the same names, and the same settings in them."""

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from common.foreign.operations import BatchNorm, Conv, Dense, Dropout, Embedding, GroupNorm, LayerNorm, Operation
from common.foreign.protocol import Held

Inputs = tuple[Any, ...]


def operation_of(module: Any, method: str, inputs: Inputs, package: ModuleType) -> Operation | None:
    """What `method` of `module` says that it does; None for what is not known, as where a subclass has its own.

    `package` is `flax.linen` or `flax.nnx`.
    """
    for base in type(module).__mro__:
        name = base.__name__
        if (name, method) in _KNOWN and base is getattr(package, name, None):
            own = getattr(type(module), method) is not getattr(base, method)
            return None if own else _KNOWN[name, method](module, inputs)
    return None


def arrays_of(module: Any, method: str, names: Mapping[str, str], package: ModuleType) -> dict[str, Held]:
    """The arrays of a layer by role; `names` are those in the model, by those in the layer."""
    if not isinstance(module, package.Embed):
        return {own: Held(name=name) for own, name in names.items()}
    roles = {"embedding": ("table", None) if method == "__call__" else ("kernel", (1, 0))}
    placed = {own: roles.get(own, (own, None)) for own in names}
    return {role: Held(name=names[own], axes=axes) for own, (role, axes) in placed.items()}


def _conv(module: Any, inputs: Inputs) -> Operation | None:
    rank = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
    padding = _padding(module.padding, rank)
    if padding is None or module.mask is not None or set(_broadcast(module.input_dilation, rank)) != {1}:
        return None
    return Conv(
        strides=_broadcast(module.strides, rank),
        padding=padding,
        dilation=_broadcast(module.kernel_dilation, rank),
        groups=module.feature_group_count,
    )


def _padding(padding: Any, rank: int) -> Any:
    if isinstance(padding, str):
        return {"SAME": "same", "VALID": ((0, 0),) * rank}.get(padding.upper())
    return tuple((side, side) if isinstance(side, int) else tuple(side) for side in _broadcast(padding, rank))


def _dense(module: Any, inputs: Inputs) -> Operation:
    return Dense()


def _dense_general(module: Any, inputs: Inputs) -> Operation | None:
    """A plain one has one axis of features, the last."""
    features = _tuple(module.features if hasattr(module, "features") else module.out_features)
    batch = module.batch_dims if hasattr(module, "batch_dims") else module.batch_axis
    last = _axes(module.axis, inputs) == (inputs[0].ndim - 1,)
    return Dense() if len(features) == 1 and last and not batch else None


def _einsum(module: Any, inputs: Inputs) -> Operation | None:
    left, comma, rest = (module.einsum_str or "").replace(" ", "").partition(",")
    kernel, arrow, right = rest.partition("->")
    if not (comma and arrow) or len(kernel) != 2 or kernel[0] == kernel[1] or kernel[1] in left:
        return None
    plain = left.endswith(kernel[0]) and kernel[0] not in left[:-1] and right == left[:-1] + kernel[1]
    return Dense() if plain else None


def _embed(module: Any, inputs: Inputs) -> Operation:
    return Embedding()


def _batch_norm(module: Any, inputs: Inputs) -> Operation | None:
    if _axes(module.axis, inputs) != (inputs[0].ndim - 1,):
        return None
    return BatchNorm(eps=float(module.epsilon), momentum=float(module.momentum))


def _layer_norm(module: Any, inputs: Inputs) -> Operation | None:
    return _over_last_axes(module, inputs, centred=True)


def _rms_norm(module: Any, inputs: Inputs) -> Operation | None:
    return _over_last_axes(module, inputs, centred=False)


def _over_last_axes(module: Any, inputs: Inputs, *, centred: bool) -> Operation | None:
    axes, rank = _axes(module.reduction_axes, inputs), inputs[0].ndim
    if axes != tuple(range(rank - len(axes), rank)) or axes != _axes(module.feature_axes, inputs):
        return None
    return LayerNorm(eps=float(module.epsilon), axes=len(axes), centred=centred)


def _group_norm(module: Any, inputs: Inputs) -> Operation | None:
    rank, channels = inputs[0].ndim, inputs[0].shape[-1]
    if module.reduction_axes is not None and _axes(module.reduction_axes, inputs) != tuple(range(1, rank)):
        return None
    return GroupNorm(eps=float(module.epsilon), groups=module.num_groups or channels // module.group_size)


def _instance_norm(module: Any, inputs: Inputs) -> Operation | None:
    if _axes(module.feature_axes, inputs) != (inputs[0].ndim - 1,):
        return None
    return GroupNorm(eps=float(module.epsilon), groups=inputs[0].shape[-1])


def _dropout(module: Any, inputs: Inputs) -> Operation:
    return Dropout(rate=float(module.rate))


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)


def _broadcast(value: Any, rank: int) -> tuple[Any, ...]:
    if isinstance(value, Iterable):
        return tuple(value)
    return (1 if value is None else value,) * rank


def _axes(axes: Any, inputs: Inputs) -> tuple[int, ...]:
    """Counted from the front, in order."""
    return tuple(sorted(axis % inputs[0].ndim for axis in _tuple(axes)))


_KNOWN: dict[tuple[str, str], Callable[[Any, Inputs], Operation | None]] = {
    ("Conv", "__call__"): _conv,
    ("Dense", "__call__"): _dense,
    ("Linear", "__call__"): _dense,
    ("DenseGeneral", "__call__"): _dense_general,
    ("LinearGeneral", "__call__"): _dense_general,
    ("Einsum", "__call__"): _einsum,
    ("Embed", "__call__"): _embed,
    ("Embed", "attend"): _dense,
    ("BatchNorm", "__call__"): _batch_norm,
    ("LayerNorm", "__call__"): _layer_norm,
    ("RMSNorm", "__call__"): _rms_norm,
    ("GroupNorm", "__call__"): _group_norm,
    ("InstanceNorm", "__call__"): _instance_norm,
    ("Dropout", "__call__"): _dropout,
}
