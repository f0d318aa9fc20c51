"""What a layer does, in words: the verbs of a finding."""

from collections.abc import Sequence
from typing import Any

from common.diagnosis.remedies import activation_words
from common.foreign.operations import (
    Activation,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    LayerNorm,
    LocalResponseNorm,
    Merge,
    Operation,
    Padding,
    Pool,
    Softmax,
)

_MODES = {"max": "maximum", "average": "average"}


def one(values: Sequence[int]) -> Any:
    """A number that is the same for all axes, else those of each."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def padding(value: Padding) -> str:
    """What a layer does that pads so."""
    if value == "same":
        return "pads as SAME does"
    if not any(map(any, value)):
        return "does not pad"
    if len(set(value)) > 1:
        return f"pads by {', '.join(f'{before} and {behind}' for before, behind in value)} on its axes in turn"
    before, behind = value[0]
    return f"pads symmetrically, by {before}" if before == behind else f"pads by {before} before and {behind} behind"


def mode(value: str) -> str:
    """Of a pool."""
    return f"takes the {_MODES[value]}"


def setting(operation: Operation, name: str) -> str:
    """What a layer does by one of its settings."""
    value = getattr(operation, name)
    match operation, name:
        case _, "padding":
            return padding(value)
        case _, "strides":
            return f"steps by {one(value)}"
        case Conv(), "dilation":
            return f"dilates by {one(value)}"
        case Conv(), "groups":
            return "convolves in one group" if value == 1 else f"convolves in {value} groups"
        case Conv(), "padding_mode":
            return f"pads with {'zeros' if value == 'zeros' else f'the image ({value})'}"
        case Pool(), "window":
            return f"takes windows of {one(value)}"
        case Pool(), "counted":
            return "counts the borders as zeros" if value else "leaves the borders out of the average"
        case Pool(), "ceil":
            return "lets a window hang over the end" if value else "leaves out a window that hangs over the end"
        case ((Pool() | GlobalPool()), "mode"):
            return mode(value)
        case LayerNorm(), "axes":
            return f"norms the last {value} axes" if value > 1 else "norms the last axis"
        case LayerNorm(), "centred":
            return "subtracts the mean" if value else "does not subtract the mean"
        case LocalResponseNorm(), "size":
            return f"sums the squares of {value} channels"
        case LocalResponseNorm(), "mean":
            return "divides alpha by the size" if value else "does not divide alpha by the size"
        case LocalResponseNorm(), ("alpha" | "beta" | "k"):
            return f"has {'an alpha' if name == 'alpha' else f'a {name}'} of {value:g}"
        case Softmax(), "axis":
            return f"takes the softmax over axis {value}"
        case Flatten(), "channels":
            return f"flattens with its channels {value}"
        case Merge(), "how":
            return {
                "add": "adds",
                "multiply": "multiplies",
                "subtract": "subtracts",
                "concatenate": "concatenates",
            }.get(value, f"takes the {value}")
        case _, "eps":
            return f"has an eps of {value:g}"
        case _, "groups":
            return f"norms {value} groups" if value > 1 else "norms all channels as one group"
    return f"has {name} {value}"


def doing(operation: Operation) -> str:
    """What a layer does, in short."""
    match operation:
        case Activation():
            return "has no activation" if operation.name == "identity" else f"takes {activation(operation)}"
        case Pool():
            return f"takes the {_MODES[operation.mode]} of windows of {one(operation.window)}"
        case GlobalPool():
            return f"takes the {_MODES[operation.mode]} of all pixels"
        case Softmax():
            return "takes the softmax"
        case Dense():
            return "is a dense layer"
        case Embedding():
            return "looks up rows of a table"
        case Merge() | Flatten():
            return setting(operation, "how" if isinstance(operation, Merge) else "channels")
    return f"computes {type(operation).__name__}"


def activation(operation: Activation) -> str:
    """What people call it."""
    return activation_words(operation.name, operation.slope)
