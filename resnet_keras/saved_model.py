"""A TensorFlow SavedModel in a comparison: what it returns in float32, and nothing else."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelError
from common.foreign.protocol import Forced, Inputs, Layout, Loss, Runner, Trace
from resnet_keras.foreign import first_line, results

# Keras' name of what `model.export` wrote, and TensorFlow's of what it serves by default.
_ENDPOINTS = ("serve", "serving_default")


def is_one(model: Any) -> bool:
    """Whether this is what `tf.saved_model.load` returns, or a layer of Keras' that holds it. Imports nothing."""
    names = {f"{cls.__module__}.{cls.__name__}" for cls in type(model).__mro__}
    loaded = any(name.startswith("tensorflow.python.") and name.endswith("AutoTrackable") for name in names)
    return (loaded and hasattr(model, "signatures")) or any(name.endswith(".TFSMLayer") for name in names)


def adapt(model: Any) -> "SavedModelAdapter":
    """A SavedModel: its folder, what was loaded from it, or a `TFSMLayer`.

    Raises `ModelError` where there is none, or none that can be called.
    """
    import tensorflow as tf

    if isinstance(model, str | Path):
        path = Path(model)
        if not any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            raise ModelError(f"{path} is no SavedModel; give a folder with a saved_model.pb")
        try:
            return SavedModelAdapter(tf.saved_model.load(str(path)), path.name)
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    if hasattr(model, "call_endpoint_fn"):
        return SavedModelAdapter(model._reloaded_obj, model.name, model.call_endpoint_fn)
    return SavedModelAdapter(model, "SavedModel")


class SavedModelAdapter:
    """A SavedModel by its function that is served."""

    def __init__(self, loaded: Any, title: str, function: Any = None) -> None:
        self._loaded = loaded
        self._function = function or _served(loaded, title)
        self.title = title
        self.backend = "tensorflow"
        self.layout: Layout = "channels_last"
        self.lacks = frozenset({"layers", "gradients", "training", "float64"})

    def describe(self) -> dict[str, str]:
        """Versions of what decides the numbers, and the device."""
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices()
        return {name: importlib.metadata.version(name) for name in ("tensorflow", "numpy")} | {
            "python": platform.python_version(),
            "device": str(devices[0].device_type).lower(),
        }

    def at_work(self, dtype: str) -> AbstractContextManager[Runner]:
        """In float32. Raises `ModelError` for float64."""
        return self._at_work(dtype)

    @contextmanager
    def _at_work(self, dtype: str) -> Iterator[Runner]:
        if dtype != "float32":
            raise ModelError(f"{self.title} is a SavedModel, whose graph has its dtypes; compare in float32")
        runner = SavedModelRunner(self._loaded, self._function, self.title)
        before = runner.values()
        try:
            yield runner
        finally:
            if runner.loaded:
                runner.load(before)


class SavedModelRunner:
    """A SavedModel that can be called."""

    def __init__(self, loaded: Any, function: Any, title: str) -> None:
        variables = getattr(loaded, "variables", None) or getattr(function, "variables", None) or ()
        self._variables: dict[str, Any] = {}
        for variable in variables:
            name = wanted = variable.name.removesuffix(":0")
            number = 2
            while name in self._variables:
                name, number = f"{wanted}~{number}", number + 1
            self._variables[name] = variable
        self._function = function
        self._title = title
        self.loaded = False
        self.trained: Mapping[str, bool] = {name: bool(one.trainable) for name, one in self._variables.items()}

    def values(self) -> dict[str, np.ndarray]:
        """All variables by name, copied."""
        return {name: np.array(one.numpy()) for name, one in self._variables.items()}

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Set variables by name. Raises `ModelError` for one that there is not."""
        for name, array in values.items():
            if name not in self._variables:
                raise ModelError(f"{self._title} has no array {name}; it has {', '.join(self._variables)}")
            self._variables[name].assign(array)
        self.loaded = True

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        """What it returns. Raises `ModelError` for anything more."""
        import tensorflow as tf

        if training or gradients or forced:
            raise ModelError(f"{self._title} is a SavedModel, of which outputs in eval mode alone can be compared")
        try:
            outputs = self._call(inputs)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{self._title} raised {type(error).__name__}: {first_line(error)}") from error
        flat = results(outputs, lambda value: isinstance(value, tf.Tensor), self._title)
        return Trace(results={name: np.array(value.numpy()) for name, value in flat.items()})

    def _call(self, inputs: Inputs) -> Any:
        import tensorflow as tf

        def tensor(array: Any, spec: Any) -> Any:
            array = np.array(array)
            if spec is not None:
                return tf.cast(tf.constant(array), spec.dtype)
            return tf.constant(array.astype("float32") if np.issubdtype(array.dtype, np.floating) else array)

        by_place = {str(place): one for place, one in enumerate(inputs)}
        named = dict(inputs) if isinstance(inputs, Mapping) else by_place
        places, keywords = _signature(self._function)
        if keywords and not places:
            # A signature takes its inputs by name alone, in no order.
            if not isinstance(inputs, Mapping) and len(named) == len(keywords) == 1:
                named = dict(zip(keywords, named.values(), strict=True))
            if set(named) != set(keywords):
                raise ModelError(
                    f"{self._title} takes its inputs by name ({', '.join(keywords)}); give these in a dict"
                )
            return self._function(**{name: tensor(array, keywords[name]) for name, array in named.items()})
        if isinstance(inputs, Mapping):
            return self._function({name: tensor(array, None) for name, array in named.items()})
        tensors = [tensor(array, None) for array in named.values()]
        # What Keras wrote takes one structure.
        return self._function(*tensors) if len(tensors) == 1 or len(places) == len(tensors) else self._function(tensors)

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """Raises `ModelError`."""
        raise ModelError(f"{self._title} is a SavedModel, which cannot be trained; compare its outputs")


def _served(loaded: Any, title: str) -> Any:
    signatures = dict(loaded.signatures)
    for name in _ENDPOINTS:
        if callable(getattr(loaded, name, None)):
            return getattr(loaded, name)
        if name in signatures:
            return signatures[name]
    if len(signatures) == 1:
        return next(iter(signatures.values()))
    if callable(loaded):
        return loaded
    found = f"signatures {', '.join(signatures)}" if signatures else "no signature"
    raise ModelError(f"{title} is a SavedModel with {found}; save it with one, serving_default")


def _signature(function: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a concrete function takes by place and by name; nothing where it is not one alone."""
    places, keywords = getattr(function, "structured_input_signature", None) or ((), {})
    return tuple(places), dict(sorted(keywords.items()))
