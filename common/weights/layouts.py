"""How the axes of a kernel are laid out elsewhere, and the way to canonical kernels and back.

Canonical are HWIO for convolutions, so (height, width, 1, channels) for depthwise ones, and (in, out) for dense layers,
whose rows come in the order height, width, channel where they read a flattened map.
"""

from typing import Literal

import numpy as np

from common.architectures.layers import Dense, Layer, Shape

# With OIHW a flattened map has its channels first too. HWCM is TensorFlow's name for the kernel of a depthwise
# convolution, a multiplier (here 1) behind the channels: all others are HWIO there.
Layout = Literal["HWIO", "OIHW", "HWCM"]

# Axes of a native kernel, put into canonical order.
_AXES: dict[Layout, dict[str, tuple[int, ...]]] = {
    "HWIO": {"conv": (0, 1, 2, 3), "depthwise": (0, 1, 2, 3), "dense": (0, 1)},
    "OIHW": {"conv": (2, 3, 1, 0), "depthwise": (2, 3, 1, 0), "dense": (1, 0)},
    "HWCM": {"conv": (0, 1, 2, 3), "depthwise": (0, 1, 3, 2), "dense": (0, 1)},
}


def canonical_shape(shape: Shape, kind: str, role: str, layout: Layout, stored_as: str | None = None) -> Shape | None:
    """The canonical shape of a native array; None where it has another number of axes.

    `stored_as` is the kind of layer that the array is stored for, where that is not its own `kind`: some keep a dense
    layer as a convolution whose window is the whole map.
    """
    if role != "kernel":
        return shape if len(shape) == 1 else None
    order = _AXES[layout].get(stored_as or kind, ())
    if len(order) != len(shape):
        return None
    found = tuple(shape[axis] for axis in order)
    if kind == "dense" and stored_as == "conv":
        height, width, inputs, outputs = found
        return (height * width * inputs, outputs)
    return found


def to_canonical(
    array: np.ndarray, layer: Layer, role: str, layout: Layout, stored_as: str | None = None
) -> np.ndarray:
    """A native array with its axes in canonical order; a view where possible."""
    if role != "kernel":
        return array
    kind = stored_as or layer.kind
    if isinstance(layer, Dense) and kind == "dense" and layout == "OIHW" and layer.flattened is not None:
        height, width, channels = layer.flattened
        return array.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    found = array.transpose(_AXES[layout][kind])
    # The window of a convolution over the whole map is the map flattened: rows in the order height, width, channel.
    return found.reshape(-1, found.shape[-1]) if layer.kind == "dense" and kind == "conv" else found


def to_native(array: np.ndarray, layer: Layer, role: str, layout: Layout, stored_as: str | None = None) -> np.ndarray:
    """The inverse of `to_canonical`."""
    if role != "kernel":
        return array
    kind = stored_as or layer.kind
    if isinstance(layer, Dense):
        if kind == "conv":
            array = array.reshape(*(layer.flattened or (1, 1, layer.in_features)), layer.out_features)
        elif layout == "OIHW" and layer.flattened is not None:
            return array.reshape(*layer.flattened, -1).transpose(3, 2, 0, 1).reshape(array.shape[-1], -1)
    order = _AXES[layout][kind]
    return array.transpose([order.index(axis) for axis in range(len(order))])
