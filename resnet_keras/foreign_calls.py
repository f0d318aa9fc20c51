"""The calls of the layers in anybody's Keras model: what they are called, and one pass watched and steered."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras.src import backend as keras_backend  # masks and the place of its dropout are nowhere public

from common.errors import ModelError
from common.foreign.protocol import Call, Forced, Layout
from resnet_keras.foreign_engines import Engine, Heard
from resnet_keras.foreign_operations import Given, described

# Arguments of a layer that are no arrays of the network's.
_ASIDE = ("training", "mask")
_NOISE = (
    *(
        keras.layers.Dropout,
        keras.layers.SpatialDropout1D,
        keras.layers.SpatialDropout2D,
        keras.layers.SpatialDropout3D,
    ),
    *(keras.layers.GaussianNoise, keras.layers.GaussianDropout, keras.layers.AlphaDropout),
)


def inside(layer: Any) -> list[Any]:
    """The layers right inside one; of a functional model also the operations of its graph, in its order."""
    operations = layer.operations if isinstance(layer, keras.Function) else []
    known = {id(one) for one in operations}
    layers = [one for one in layer._layers if id(one) not in known]
    return [one for one in (*operations, *layers) if not isinstance(one, keras.layers.InputLayer)]


def paths(model: Any) -> dict[str, Any]:
    """The layers in a model and the operations of its graphs by their paths, as "block1/conv"; shared ones once."""
    found: dict[str, Any] = {}
    seen = {id(model)}

    def walk(layer: Any, before: str) -> None:
        for one in inside(layer):
            if id(one) in seen:
                continue
            seen.add(id(one))
            path, number = f"{before}{one.name}", 2
            while path in found:  # two layers of one name, as a subclassed model may have
                path, number = f"{before}{one.name}~{number}", number + 1
            found[path] = one
            if isinstance(one, keras.layers.Layer):
                walk(one, f"{path}/")

    walk(model, "")
    # A layer without layers in it is the one call that there is.
    return found or {model.name: model}


@dataclass
class _Frame:
    """A layer that is at work."""

    path: str
    leaf: bool = True


@dataclass(kw_only=True)
class Watch:
    """One pass. Arrays stay the framework's until it is over."""

    engine: Engine
    layout: Layout
    layers: Mapping[str, Any]  # by path
    names: Mapping[int, str]  # of the variables, by identity
    training: bool
    gradients: bool = False
    forced: Mapping[str, Forced] = field(default_factory=dict)
    recorded: bool = True
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    cotangents: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    failed: str | None = None  # the layer in which an exception was raised, with its class

    def __post_init__(self) -> None:
        self._known = {id(layer): path for path, layer in self.layers.items()}
        self._counts: Counter[str] = Counter()
        self._stack: list[_Frame] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the model runs. Layers of other models are called as ever."""
        layer, operation = keras.layers.Layer, keras.Operation
        of_layer, of_operation = layer.__call__, operation.__call__
        dropout = keras_backend.random.dropout

        def call_layer(one: Any, *args: Any, **kwargs: Any) -> Any:
            path = self._known.get(id(one))
            if self.training and _is_noise(one, path is not None):
                # As in eval mode: what it gets, in its own dtype.
                kwargs["training"] = False
            return of_layer(one, *args, **kwargs) if path is None else self._called(of_layer, one, path, args, kwargs)

        def call_operation(one: Any, *args: Any, **kwargs: Any) -> Any:
            path = None if isinstance(one, layer) else self._known.get(id(one))
            if path is None:
                return of_operation(one, *args, **kwargs)
            return self._called(of_operation, one, path, args, kwargs)

        layer.__call__, operation.__call__ = call_layer, call_operation
        if self.training:
            # That of a recurrent cell's or an attention's own, and of `keras.random.dropout`.
            keras_backend.random.dropout = lambda inputs, *args, **kwargs: inputs
        try:
            yield
        finally:
            layer.__call__, operation.__call__ = of_layer, of_operation
            keras_backend.random.dropout = dropout
            self._stack.clear()

    def _called(self, original: Any, layer: Any, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._stack:
            self._stack[-1].leaf = False
        frame = _Frame(path)
        self._stack.append(frame)
        try:
            given = self._arrays([*args, *(value for name, value in kwargs.items() if name not in _ASIDE)])
            if given is None or not self.recorded:
                return original(layer, *args, **kwargs)
            self._counts[path] += 1
            name = path if self._counts[path] == 1 else f"{path}#{self._counts[path]}"
            forced = self.forced.get(name, Forced())
            if forced.inputs:
                replaced = iter(self._given(name, "input", given, forced.inputs))
                args = tuple(self._replaced(value, replaced) for value in args)
                kwargs = {
                    key: value if key in _ASIDE else self._replaced(value, replaced) for key, value in kwargs.items()
                }
            outputs = original(layer, *args, **kwargs)
            results = self._arrays([outputs])
            if results is None:
                return outputs
            self.inputs[name], self.outputs[name] = given, results
            shapes = Given(shapes=[tuple(one.shape) for one in given], layout=self.layout)
            self.calls.append(described(layer, name, path, frame.leaf, shapes, self.names))
            if forced.outputs or self.gradients:
                outputs = self._replaced(outputs, iter(self._passed(name, results, forced)))
            return outputs
        except Exception:
            self.failed = self.failed or f"layer {path} ({type(layer).__name__})"
            raise
        finally:
            self._stack.pop()

    def _is_array(self, leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray | keras.Variable) or keras.ops.is_tensor(leaf)

    def _arrays(self, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """The arrays in the arguments or outputs of a layer; None where one has no value, as in a traced function."""
        leaves = [leaf for value in values for leaf in keras.tree.flatten(value)]
        if any(isinstance(leaf, keras.KerasTensor) for leaf in leaves):
            return None
        arrays = tuple(
            keras.ops.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray | keras.Variable) else leaf
            for leaf in leaves
            if self._is_array(leaf)
        )
        return arrays if all(self.engine.concrete(one) for one in arrays) else None

    def _replaced(self, structure: Any, replacements: Iterator[Any]) -> Any:
        """The structure with other arrays in it."""
        return keras.tree.map_structure(lambda leaf: next(replacements) if self._is_array(leaf) else leaf, structure)

    def _given(self, name: str, role: str, arrays: Sequence[Any], forced: Sequence[np.ndarray | None]) -> list[Any]:
        return [
            array if by is None else self._one(array, self._like(name, role, array, by), None, None)
            for array, by in zip(arrays, (*forced, *[None] * len(arrays)), strict=False)
        ]

    def _passed(self, name: str, results: Sequence[Any], forced: Forced) -> list[Any]:
        none = [None] * len(results)
        heard: list[np.ndarray | None] = list(none)
        if self.gradients:
            self.cotangents[name] = heard
        passed = []
        given = zip(results, (*forced.outputs, *none), (*forced.cotangents, *none), strict=False)
        for number, (array, by, cotangent) in enumerate(given):
            passed.append(
                self._one(
                    array,
                    self._like(name, "output", array, by),
                    self._listener(heard, number),
                    self._like(name, "cotangent", array, cotangent),
                )
            )
        return passed

    def _listener(self, heard: list[np.ndarray | None], number: int) -> Heard:
        def hear(came: Any) -> None:
            heard[number] = self.engine.array(came)

        return hear

    def _one(self, array: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
        """An array in the place of another, with its mask."""
        if by is not None and tuple(by.shape) != tuple(array.shape):
            instead = by  # no gradient passes it
        elif self.gradients and "float" in keras_backend.standardize_dtype(array.dtype):
            instead = self.engine.passed(array, by, heard, cotangent)
        elif by is not None:
            instead = by
        else:
            return array
        if (mask := keras_backend.get_keras_mask(array)) is not None:
            keras_backend.set_keras_mask(instead, mask)
        return instead

    def _like(self, name: str, role: str, array: Any, by: np.ndarray | None) -> Any:
        if by is None:
            return None
        if by.ndim != len(array.shape):
            raise ModelError(f"{name}: an {role} of shape {tuple(array.shape)} cannot be replaced by one of {by.shape}")
        # A copy: a tensor may share the array's memory.
        return keras.ops.convert_to_tensor(np.array(by), dtype=keras_backend.standardize_dtype(array.dtype))


def _is_noise(layer: Any, known: bool) -> bool:
    """Whether a layer does nothing but draw at random in training mode: Keras' own, and what is called as such are."""
    if isinstance(layer, _NOISE):
        return True
    kind = type(layer).__name__
    named = kind.startswith(("Random", "DropPath", "StochasticDepth", "DropBlock"))
    return known and named and not layer.weights
