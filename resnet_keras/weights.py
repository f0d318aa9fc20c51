"""Canonical weights into a Keras model and out of it. Names differ, and the layout of a depthwise kernel alone.

Nothing here knows a family: a layer's native name comes from the `layer_names` of its family's module, and those of its
arrays from the community's table of roles.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

from common import weights as canonical
from common.architectures import Spec
from common.architectures.layers import Layer
from common.errors import WeightsError
from common.names.roles import KERAS
from common.weights.layouts import canonical_shape, to_canonical, to_native
from resnet_keras.layers import Normalization


def load_weights(model: keras.Model, weights: canonical.Weights, spec: Spec | None = None) -> None:
    """Set every variable of `model` from canonical weights, cast to the variable's dtype; each exactly once.

    `spec` is needed only for a model that was not made here but read from a file. Raises `WeightsError` naming the
    tensors that are missing, unexpected or misshapen; nothing is changed then, unless a shape is that of weights which
    are converted one at a time.
    """
    targets = variables(model, spec)
    canonical.check_names("the weights are not this model's", weights, targets)
    layers = {name: layer for layer, name, _ in canonical.layer_arrays(spec_of(model, spec))}
    if isinstance(weights, dict):
        for name, variable in targets.items():
            _check_shape(name, weights[name], variable, layers[name])
    for name, variable in targets.items():
        array, layer = weights[name], layers[name]
        _check_shape(name, array, variable, layer)
        native = to_native(array, layer, canonical.role_of(name, layer), KERAS.layout)
        # `ops.array` copies on jax, where assigning a NumPy array would leave the variable sharing its memory.
        variable.assign(keras.ops.array(native, dtype=variable.dtype))


def export_weights(model: keras.Model, spec: Spec | None = None) -> canonical.Weights:
    """Parameters and running statistics of `model` under canonical names, bitwise, each read when it is asked for.

    An array may be a view that follows the model on as it trains; copy what is to be kept. `spec` is needed only for
    a model that was not made here but read from a file. Raises `WeightsError` where the model's layers are not the
    spec's.
    """
    turned = in_canonical_order(spec_of(model, spec))

    def getter(name: str, variable: Any) -> Callable[[], np.ndarray]:
        return lambda: turned[name](read(variable))

    return canonical.LazyWeights({name: getter(name, variable) for name, variable in variables(model, spec).items()})


def in_canonical_order(spec: Spec) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """By canonical name, what puts the axes of an array that is laid out as the Keras variable into canonical order."""
    return {
        name: partial(to_canonical, layer=layer, role=canonical.role_of(name, layer), layout=KERAS.layout)
        for layer, name, _ in canonical.layer_arrays(spec)
    }


def spec_of(model: keras.Model, spec: Spec | None = None) -> Spec:
    """`spec`, or that of a model made by this package. Raises `WeightsError` where there is neither."""
    found = spec or getattr(model, "spec", None)
    if found is None:
        raise WeightsError(f"model {model.name!r} carries no spec (it was read from a file or cloned); pass spec=")
    return found


def layer_names(spec: Spec) -> dict[str, str]:
    """Name of the Keras layer for every layer of the walk, by canonical path."""
    return importlib.import_module(f"{__package__}.{spec.family}").layer_names(spec)


def variables(model: keras.Model, spec: Spec | None = None) -> dict[str, Any]:
    """Every Keras variable of the model by canonical name, in walk order.

    Raises `WeightsError` where a layer is missing or a variable of the model has no canonical name.
    """
    spec = spec_of(model, spec)
    names = layer_names(spec)
    native = {layer.name: layer for layer in model.layers}
    wanted = (names[layer.path] for layer in spec.layers if layer.arrays)
    if absent := [name for name in wanted if name not in native]:
        raise WeightsError(f"the model is not its spec's: it has no layer {absent[0]}")
    found = {name: _variable(native[names[layer.path]], layer, name) for layer in spec.layers for name in layer.arrays}
    known = {id(variable) for variable in found.values()}
    # What the spec says in numbers is in variables as well where Keras' files have it, and no weights.
    known |= {id(variable) for layer in model.layers if isinstance(layer, Normalization) for variable in layer.weights}
    unnamed = [variable.path for variable in model.weights if id(variable) not in known]
    if unnamed:
        raise WeightsError(f"the model is not its spec's: it also has {unnamed[0]}")
    return found


def _variable(native: keras.layers.Layer, layer: Layer, name: str) -> Any:
    attribute = KERAS.array("", layer.kind, canonical.role_of(name, layer)).removeprefix("/")
    variable = getattr(native, attribute, None)
    if variable is None:
        raise WeightsError(f"the model is not its spec's: layer {native.name} has no {attribute}, for {name}")
    return variable


def _check_shape(name: str, array: np.ndarray, variable: Any, layer: Layer) -> None:
    role = canonical.role_of(name, layer)
    if array.shape != canonical_shape(tuple(variable.shape), layer.kind, role, KERAS.layout):
        raise WeightsError(f"{name} has shape {array.shape}; variable {variable.path} has {tuple(variable.shape)}")


def read(variable: Any) -> np.ndarray:
    """The variable as a read-only array: a view where the framework allows one (`convert_to_numpy` always copies)."""
    # PyTorch gives no array of a tensor that asks for gradients.
    tensor = keras.ops.stop_gradient(keras.ops.convert_to_tensor(variable))
    try:
        array = np.asarray(tensor)
    except TypeError:  # a PyTorch tensor that lives on another device
        array = keras.ops.convert_to_numpy(tensor)
    array.flags.writeable = False
    return array
