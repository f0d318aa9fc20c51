"""What a user's own model is to a comparison: layers that are called in turn, and a runner that can be watched and
steered.

`resnet_X/foreign.py` has the adapter of each framework; a plain function and an ONNX file have theirs here. An adapter
knows its framework and nothing else: every array is handed over in the model's own layout and under the model's own
name, and which belongs to which of another model is found in `common.parity.matching`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from common.foreign.operations import Operation

# Where the channels of an image stand in arrays of four axes or more, the first of which counts images.
Layout = Literal["channels_first", "channels_last"]
# What a model is called with: arrays in order, or by name.
Inputs = Sequence[np.ndarray] | Mapping[str, np.ndarray]
# A loss of the user's own, in terms of the framework: of what the model returns, a scalar. None is the default: of
# every output the mean of y² / 2 + sin y, the first whole, each later one counting 0.3 of the one before it. The sine
# is there for a norm at the end, through which no gradient of a mean square passes: of its output that is always the
# same.
Loss = Callable[[Any], Any]
LATER_OUTPUT = 0.3


@dataclass(frozen=True, kw_only=True)
class Held:
    """An array that a layer holds: transposed by `axes`, then reshaped to `shape`, it has the layout that
    `common.foreign.operations` says its role has. None leaves it as it is."""

    name: str  # of the parameter or statistic in the model
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """The array in the layout of its role."""
        turned = array if self.axes is None else array.transpose(self.axes)
        return turned if self.shape is None else turned.reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a layer."""

    name: str  # the layer's, from its second call in a pass on with the call's number: "layer1.0.relu#2"
    layer: str  # its path in the model, as the framework's users write it: "layer1.0.conv1", "block/Dense_0"
    kind: str  # the name of its class: "Conv2d"
    leaf: bool = True  # False where other layers were called inside it: its output alone is of interest then
    operation: Operation | None = None  # what it says it does; None for what the adapter does not know
    # By role ("kernel", "bias", "scale", "mean", "var"), of a layer that is not known by the layer's own word for it.
    arrays: Mapping[str, Held] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Arrays that a call is given in the place of its own, each in the model's layout, or None for its own.

    Gradients pass as if nothing had been put there; but with `cotangents`, what comes back to an output is replaced
    too, after it was noted down. An array may have another shape than the layer's own, with as many axes, where an
    earlier layer strides or pads otherwise; no gradient passes it then.
    """

    inputs: tuple[np.ndarray | None, ...] = ()
    outputs: tuple[np.ndarray | None, ...] = ()
    cotangents: tuple[np.ndarray | None, ...] = ()


@dataclass(kw_only=True)
class Trace:
    """What one pass computed. Arrays are copies: nothing later changes them."""

    # In the order in which the calls ended. Their arrays are by the call's name, the array arguments of the layer in
    # order, keyword ones behind, and the array leaves of what it returned; what is not floating point among them too.
    calls: tuple[Call, ...] = ()
    inputs: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # as they came, before any were forced
    outputs: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)  # as computed, before any were forced
    # The model's own: by path in what it returned, as "0", "logits", "aux.1"; "" where that is one array.
    results: dict[str, np.ndarray] = field(default_factory=dict)
    changed_inputs: tuple[str, ...] = ()  # which of the model's inputs it changed in place, by name or position
    statistics: dict[str, np.ndarray] = field(default_factory=dict)  # after a pass in training mode
    loss: np.ndarray | None = None  # a scalar, with gradients
    gradients: dict[str, np.ndarray] = field(default_factory=dict)  # of trained parameters; zeros where none came
    of_inputs: dict[str, np.ndarray] = field(default_factory=dict)  # of floating-point inputs, by name or position
    # Of the outputs of calls: what came back to each; None where nothing did, or it is not floating point.
    cotangents: dict[str, tuple[np.ndarray | None, ...]] = field(default_factory=dict)


class Runner(Protocol):
    """A model at work in one dtype: a copy of the user's, or the user's own that is put back at the end."""

    # Every array that decides what it computes, by the model's name of it; True for what gradients are taken of.
    trained: Mapping[str, bool]

    def values(self) -> dict[str, np.ndarray]:
        """Those arrays, copied, in the dtype of the runner where they are floating point."""
        ...

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Set them, all or some."""
        ...

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        """One pass; statistics are as before at its end. In training mode dropout passes on what it gets, since no two
        frameworks draw alike; other randomness goes on from call to call, so that it shows.

        `forced` is by name of call. Floating-point inputs are cast to the runner's dtype. Raises `ModelError` where the
        model raises, in one line, with the layer that was at work.
        """
        ...

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """Steps of the user's own, on a model that is as it was at the end.

        `train` is given the model (in Flax linen also its variables) and returns a function of a batch's arrays that
        takes one step and may return the loss; a linen one returns the new variables, or these and the loss. Returns
        for each step all arrays by name, and under "" the loss where there is one.
        """
        ...


class Adapter(Protocol):
    """A user's model in its framework. `resnet_X.foreign.adapt(model)` makes one."""

    backend: str  # "torch", "keras:tensorflow", "flax", "onnxruntime", "function"
    title: str  # what people call the model: the name of its class
    layout: Layout
    # What of a model of this kind cannot be done: "layers", "gradients", "training", "float64".
    lacks: frozenset[str]

    def describe(self) -> dict[str, str]:
        """Versions of what decides the numbers, and the device, as ``device``."""
        ...

    def at_work(self, dtype: str) -> AbstractContextManager[Runner]:
        """The model in float64 or float32. At the end everything is as it was before: modes, generators, hooks,
        gradients, values, global settings.

        Raises `ModelError` where it cannot be had in that dtype, with what stands in the way. A user's float32 model is
        float32 as it is: what it rounds to bfloat16 inside stays so.
        """
        ...
