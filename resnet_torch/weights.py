"""Canonical weights and PyTorch's tensors: names and layouts, keyed by the kind of a layer and the role of an array.

Works for every family: which module a layer is comes from the family's `nodes`.
"""

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import architectures
from common.architectures.layers import Conv, Dense, Layer, Shape
from common.errors import WeightsError
from common.names.roles import PYTORCH
from common.weights import LazyWeights, Weights, check_names, role_of


class Slot(NamedTuple):
    """The place of one canonical array in a PyTorch model."""

    native: str  # its name in `state_dict`
    native_shape: Shape
    view: Callable[[Tensor], Tensor]  # of the native tensor, its axes in canonical order
    shape: Shape  # the canonical one, where a flattened map is a single axis and three in the view


def slots(spec: architectures.Spec) -> dict[str, Slot]:
    """Canonical name of every array of the spec -> its slot."""
    table: dict[str, Slot] = {}
    for layer, module in _modules(spec):
        for name, shape in layer.arrays.items():
            role = role_of(name, layer)
            native_shape, view = _layout(layer, role, shape)
            table[name] = Slot(PYTORCH.array(module, layer.kind, role), native_shape, view, shape)
    return table


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Set every parameter and statistic of a model of this package, cast to its dtype, one array at a time.

    Raises `WeightsError` naming the tensors that are missing, unexpected, of another shape, or not floating-point.
    Wrong names leave the model untouched; of wrong arrays only those are left out.
    """
    table, state = _bijection(model)
    check_names("the weights are not this model's", weights, table)
    wrong: list[str] = []
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch cannot mark a tensor read-only, and warns of arrays that are. These are only read.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        for name, slot in table.items():
            array, native = weights[name], slot.view(state[slot.native])
            if array.shape != slot.shape:
                wrong.append(f"{name} has shape {array.shape}, expected {slot.shape}")
            elif not np.issubdtype(array.dtype, np.floating):
                wrong.append(f"{name} has dtype {array.dtype}, expected a floating-point type")
            else:
                native.copy_(torch.from_numpy(array).reshape(native.shape))
    if wrong:
        raise WeightsError(f"{len(wrong)} tensors do not fit this model: {'; '.join(wrong[:4])}")


def export_weights(model: nn.Module) -> Weights:
    """The model's parameters and statistics in canonical names and layouts, bitwise.

    The arrays are views of the model's memory wherever it is the CPU's: copy what has to outlive the next step.
    Raises `WeightsError` if the model holds tensors that its spec does not have, or lacks some.
    """
    table, state = _bijection(model)

    def getter(slot: Slot) -> Callable[[], np.ndarray]:
        return lambda: canonical(slot, state[slot.native])

    return LazyWeights({name: getter(slot) for name, slot in table.items()})


def canonical(slot: Slot, native: Tensor) -> np.ndarray:
    """A native tensor, or one laid out like it, as the canonical array of the slot; a view where possible."""
    return slot.view(native.detach()).reshape(slot.shape).cpu().numpy()


def _layout(layer: Layer, role: str, shape: Shape) -> tuple[Shape, Callable[[Tensor], Tensor]]:
    """The native shape of an array and the view that puts its axes into canonical order."""
    if role != "kernel":
        return shape, _as_it_is
    if isinstance(layer, Conv):
        height, width, inputs, outputs = shape
        return (outputs, inputs, height, width), _oihw_as_hwio
    if isinstance(layer, Dense) and layer.flattened is not None:
        # torch.flatten leaves the channels outermost; canonical weights have them innermost.
        height, width, channels = layer.flattened
        return shape[::-1], lambda t: t.unflatten(1, (channels, height, width)).permute(2, 3, 1, 0)
    return shape[::-1], torch.t


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _oihw_as_hwio(kernel: Tensor) -> Tensor:
    return kernel.permute(2, 3, 1, 0)


def _modules(spec: architectures.Spec) -> Iterable[tuple[Layer, str]]:
    nodes = import_module(f"{__package__}.{spec.family}").nodes(spec)
    return ((layer, nodes[layer.path].module) for layer in spec.layers if layer.arrays)


def _bijection(model: nn.Module) -> tuple[dict[str, Slot], dict[str, Any]]:
    """The model's slots and its tensors; raises `WeightsError` unless each tensor has one slot or is ignored."""
    spec = _spec(model)
    table, state = slots(spec), model.state_dict()
    # How many batches a norm has seen changes nothing it computes here.
    native = (name for name in state if not PYTORCH.ignored.fullmatch(name))
    check_names("the model is not its spec's", native, (slot.native for slot in table.values()))
    for slot in table.values():
        if (found := state[slot.native].shape) != slot.native_shape:
            raise WeightsError(f"the model is not its spec's: {slot.native} is {tuple(found)}, not {slot.native_shape}")
    return table, state


def _spec(model: nn.Module) -> architectures.Spec:
    return model.spec  # type: ignore[return-value]
