"""A user's own Keras model in another dtype, for as long as a pass takes; and everything put back behind it.

The model is not rebuilt from its configuration: only a model whose layers all have one could be, its arrays would have
to be matched, and what is shared would have to be found. The model itself is told another dtype, its variables hold
other arrays, and at the end both are as before. Between passes nothing of it differs from what the user made.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state  # the state of what draws without a seed generator is nowhere public

from common.errors import ModelError
from resnet_keras.foreign_engines import Engine
from resnet_keras.foreign_operations import own_variables


def all_layers(model: Any) -> list[Any]:
    """A model and every layer in it, the models that a Sequential hides too."""
    layers = model._flatten_layers()
    return [*layers, *(hidden for layer in layers if (hidden := getattr(layer, "_functional", None)) is not None)]


def differs(dtype: str, wanted: str) -> bool:
    """Whether what has a dtype is to have another one. Made float64 is all that is floating point; made float32 only
    what is float64, since a user's float32 model is float32 as it is."""
    return dtype != wanted and ("float" in dtype if wanted == "float64" else dtype == "float64")


def check(model: Any, title: str, dtype: str) -> None:
    """Raises `ModelError` for what cannot be had in a dtype."""
    if not model.built:
        raise ModelError(f"{title} is not built, so it has no weights yet; call it once on an input before")
    quantized = next((layer for layer in all_layers(model) if layer.quantization_mode is not None), None)
    if dtype == "float64" and quantized is not None:
        found = f"layer {quantized.name} of {title} is quantized ({quantized.quantization_mode})"
        raise ModelError(f"{found}, which has no float64 form; compare in float32")


@contextmanager
def in_dtype(
    model: Any, dtype: str, engine: Engine, holders: Mapping[int, tuple[Any, Any]], *, untraced: bool
) -> Iterator[None]:
    """A model at work in a dtype. `holders` are, by identity, variables and where they hold their values meanwhile;
    `untraced` where no function of the user's may be traced, since what it does is not what it will do."""
    with ExitStack() as undo:
        undo.enter_context(_global_dtype(dtype))
        undo.enter_context(engine.settings(dtype, untraced=untraced or bool(holders)))
        for variable, holder in holders.values():
            engine.put(undo, variable, holder)
            _set(undo, variable, "_dtype", dtype)
        for layer in all_layers(model):
            if differs(layer.compute_dtype, dtype) or differs(layer.variable_dtype, dtype):
                _set(undo, layer, "_dtype_policy", keras.DTypePolicy(dtype))
            if isinstance(layer, keras.Function):
                # A functional model casts what it is given to the dtypes of its inputs.
                for tensor in layer.inputs:
                    if differs(tensor.dtype, dtype):
                        _set(undo, tensor, "_dtype", dtype)
            if isinstance(layer, keras.layers.InputLayer) and differs(layer.dtype, dtype):
                _set(undo, layer, "_dtype", dtype)
            for name, value in list(vars(layer).items()):
                # Constants of a user's own, which TensorFlow does not multiply by another dtype.
                if _is_constant(value, engine) and differs(keras.backend.standardize_dtype(value.dtype), dtype):
                    _set(undo, layer, name, _cast(value, dtype))
        yield


def _is_constant(value: Any, engine: Engine) -> bool:
    return isinstance(value, np.ndarray) or (not isinstance(value, keras.Variable) and engine.concrete(value))


def _cast(value: Any, dtype: str) -> Any:
    return value.astype(dtype) if isinstance(value, np.ndarray) else keras.ops.cast(value, dtype)


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """An attribute, past what a layer does when one is set."""
    undo.callback(vars(owner).__setitem__, name, vars(owner)[name])
    vars(owner)[name] = value


@contextmanager
def _global_dtype(dtype: str) -> Iterator[None]:
    """That of constants, and of layers which are made in a call."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    try:
        if differs(floatx, dtype):
            keras.config.set_floatx(dtype)
        if differs(policy.compute_dtype, dtype) or differs(policy.variable_dtype, dtype):
            keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def weights(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model by name, in its order: the path of their layer in it, and their own name there."""
    owned: dict[int, str] = {}
    for path, layer in layers.items():
        if isinstance(layer, keras.layers.Layer):
            # Of two layers with one variable the first counts.
            owned = {id(one): f"{path}/{one.name}" for one in own_variables(layer)} | owned
    owned |= {id(one): one.name for one in own_variables(model)}
    named: dict[str, Any] = {}
    for variable in model.weights:
        name = wanted = owned.get(id(variable), variable.path)
        number = 2
        while name in named:  # a layer may give two of its own one name
            name, number = f"{wanted}~{number}", number + 1
        named[name] = variable
    return named


@contextmanager
def values_kept(variables: Sequence[Any], engine: Engine) -> Iterator[None]:
    """What is assigned to variables does not outlast this."""
    before = [engine.array(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


@contextmanager
def marks_kept(model: Any) -> Iterator[None]:
    """Neither do the losses that layers add in a pass, nor whether their arrays are trained."""
    layers = all_layers(model)
    losses = [(layer, list(layer._losses), set(layer._loss_ids), layer._called) for layer in layers]
    trained = [(layer, layer._trainable) for layer in layers]
    variables = [(variable, variable.trainable) for layer in layers for variable in own_variables(layer)]
    try:
        yield
    finally:
        for layer, added, ids, called in losses:
            layer._losses[:] = added
            layer._loss_ids.clear()
            layer._loss_ids.update(ids)
            layer._called = called
        for layer, was in trained:
            layer._trainable = was
        for variable, was in variables:
            if variable.trainable != was:
                variable.trainable = was


@contextmanager
def generators_kept(model: Any, engine: Engine) -> Iterator[None]:
    """Nor what was drawn at random."""
    states = [generator.state for layer in all_layers(model) for generator in layer._seed_generators]
    without = global_state.get_global_attribute("global_seed_generator")
    if without is not None:
        states.append(without.state)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with values_kept(states, engine), engine.generators_kept():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if without is None:
            global_state.set_global_attribute("global_seed_generator", None)


@contextmanager
def compiled_kept(model: Any) -> Iterator[None]:
    """Nor does what `compile` and `fit` leave in a model: its optimizer, its metrics, its traced functions."""
    owners = [one for one in (model, getattr(model, "optimizer", None)) if one is not None]
    attributes = [dict(vars(one)) for one in owners]
    lists = [(value, list(value)) for one in attributes for value in one.values() if type(value) is list]
    try:
        for name in ("train_function", "test_function", "predict_function"):
            if name in vars(model):
                # One that was traced before has its dropout and its variables.
                vars(model)[name] = None
        yield
    finally:
        for value, before in lists:
            value[:] = before
        for owner, was in zip(owners, attributes, strict=True):
            vars(owner).clear()
            vars(owner).update(was)
