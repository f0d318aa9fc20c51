"""What a layer of anybody's model does, in words that all frameworks share: the settings that decide its output.

An adapter says of a layer what the layer says of itself; whether that is true is for `common.diagnosis` to find out.
Layouts: images (N, ..., C). Arrays by role: a convolution's `kernel` is (..., in / groups, out), a dense layer's
(in, out), an embedding's `table` (entries, width); `bias`, `scale`, `mean`, `var` are (C,), or of the shape that is
normalised.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

# Pixels before and behind, for every axis of the image; or as TensorFlow's SAME does, the odd pixel behind.
Padding = tuple[tuple[int, int], ...] | Literal["same"]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution, as deep learning has it: a correlation. Arrays: kernel, bias."""

    strides: tuple[int, ...]
    padding: Padding
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A matrix product over the last axis. Arrays: kernel, bias."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Rows of a table. Arrays: table."""


@dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """Arrays: scale, bias, mean, var."""

    eps: float
    momentum: float | None  # share of the old value that a step keeps; None for an average of all
    unbiased: bool = False  # whether N / (N - 1) times the batch's variance is kept


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Over the last `axes` axes. Arrays: scale, bias."""

    eps: float
    axes: int = 1
    centred: bool = True  # False for RMSNorm, which does not subtract the mean


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Over the pixels and a group of channels. Arrays: scale, bias."""

    eps: float
    groups: int


@dataclass(frozen=True, kw_only=True)
class LocalResponseNorm:
    """x / (k + alpha * s) ** beta, s the sum of squares of `size` channels, divided by `size` where `mean`."""

    size: int
    alpha: float
    beta: float
    k: float
    mean: bool


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Of windows. `counted`: borders count as zeros in an average. `ceil`: a window may hang over the end."""

    mode: Literal["max", "average"]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    ceil: bool = False
    counted: bool = False


@dataclass(frozen=True, kw_only=True)
class GlobalPool:
    """Over all pixels."""

    mode: Literal["max", "average"]
    keep: bool = False  # axes of one pixel are kept


@dataclass(frozen=True, kw_only=True)
class Activation:
    """By its usual name: relu, relu6, leaky_relu, silu, gelu, gelu_tanh, sigmoid, hard_sigmoid, hard_silu, tanh, elu,
    selu, softplus, mish, quick_gelu, identity. `slope` is that of leaky_relu below zero, and elu's alpha."""

    name: str
    slope: float | None = None


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Over an axis, counted from the end."""

    axis: int = -1


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Of a share of values."""

    rate: float


@dataclass(frozen=True, kw_only=True)
class Flatten:
    """Of a map to a row: channels first as they lie in NCHW, or last."""

    channels: Literal["first", "last"]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Of several arrays: add, multiply, concatenate, average, maximum, subtract."""

    how: str


@dataclass(frozen=True, kw_only=True)
class Pad:
    """Zeros around an image."""

    padding: tuple[tuple[int, int], ...]


Operation = (
    Conv
    | Dense
    | Embedding
    | BatchNorm
    | LayerNorm
    | GroupNorm
    | LocalResponseNorm
    | Pool
    | GlobalPool
    | Activation
    | Softmax
    | Dropout
    | Flatten
    | Merge
    | Pad
)
_BY_NAME: dict[str, type[Operation]] = {kind.__name__: kind for kind in Operation.__args__}


def to_data(operation: Operation | None) -> dict[str, Any] | None:
    """As JSON data."""
    return None if operation is None else {"operation": type(operation).__name__, **asdict(operation)}


def from_data(data: dict[str, Any] | None) -> Operation | None:
    """What `to_data` made data of. Raises `ValueError`."""
    if data is None:
        return None
    fields = {name: _tuples(value) for name, value in data.items() if name != "operation"}
    try:
        return _BY_NAME[data["operation"]](**fields)
    except (KeyError, TypeError):
        raise ValueError(f"{data!r} is no operation of a layer") from None


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(_tuples(one) for one in value) if isinstance(value, list) else value
