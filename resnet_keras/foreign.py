"""A user's own Keras model in a comparison: functional, sequential or subclassed, on each of Keras' backends; and a
TensorFlow SavedModel.

Importing this loads nothing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import resnet_keras
from common.errors import ModelError
from common.foreign.protocol import Adapter


def adapt(model: Any) -> Adapter:
    """A Keras 3 model or layer; or a SavedModel: its folder, what `tf.saved_model.load` made of it, or a `TFSMLayer`.

    Raises `ModelError` for anything else, and `BackendMissing` where Keras or TensorFlow is not installed.
    """
    with resnet_keras.framework():
        from resnet_keras import saved_model

        if isinstance(model, str | Path) or saved_model.is_one(model):
            return saved_model.adapt(model)
        import keras

        from resnet_keras.foreign_model import KerasAdapter
    if not isinstance(model, keras.layers.Layer):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        old = "; it is of Keras 2" if kind.startswith(("tf_keras.", "tensorflow.python.keras.")) else ""
        raise ModelError(f"{kind} is no model of Keras 3{old}; give a keras.Model, a keras.Layer or a SavedModel")
    return KerasAdapter(model)


def results(outputs: Any, arrays: Callable[[Any], bool], title: str) -> dict[str, Any]:
    """What a model returned, by path.

    Raises `ModelError` where there is something in it that is no array.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, one in value.items():
                walk(one, (*path, str(key)))
        elif isinstance(value, list | tuple):
            keys = getattr(value, "_fields", range(len(value)))
            for key, one in zip(keys, value, strict=True):
                walk(one, (*path, str(key)))
        elif arrays(value):
            flat[".".join(path)] = value
        elif value is not None:
            where = f" at {'.'.join(path)}" if path else ""
            raise ModelError(f"{title} returns a {type(value).__name__}{where}, not an array; return arrays alone")

    walk(outputs, ())
    if not flat:
        raise ModelError(f"{title} returns no array; return at least one")
    return flat


def first_line(error: Exception) -> str:
    """The first line of an exception that says something, without colours and TensorFlow's names of its functions."""
    aside = re.compile(r"\x1b\[[0-9;]*m|\{\{.*?\}\}|\[Op:\w+\]( name:.*)?")
    lines = (aside.sub("", line).strip() for line in str(error).splitlines())
    return next((line for line in lines if line and not line.endswith(".call().")), "no message").rstrip(".")
