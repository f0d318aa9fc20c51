"""Which adapter a model has: told by its class, without importing any framework."""

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.foreign.protocol import Adapter

# By the module and name of a class that the model's class is or descends from.
_CLASSES = {
    ("torch.nn.modules.module", "Module"): "resnet_torch.foreign",
    ("torch.export.exported_program", "ExportedProgram"): "resnet_torch.foreign",
    ("keras.src.layers.layer", "Layer"): "resnet_keras.foreign",
    ("tensorflow.python.trackable.autotrackable", "AutoTrackable"): "resnet_keras.foreign",
    ("flax.linen.module", "Module"): "resnet_flax.foreign",
    ("flax.nnx.module", "Module"): "resnet_flax.foreign",
}
_KINDS = (
    "a torch.nn.Module, a torch.export program, a Keras model, a SavedModel, a linen module with its variables as "
    "(module, variables), an nnx.Module, an .onnx file or a function of arrays"
)


def adapter(model: Any) -> Adapter:
    """The adapter of a user's model. Raises `ModelError` for what is none, `BackendMissing` without its framework."""
    found = _module(model)
    if found is None:
        raise ModelError(f"{_in_words(model)} is no model; expected {_KINDS}")
    adapt: Adapter = import_module(found).adapt(model)
    return adapt


def _module(model: Any) -> str | None:
    if isinstance(model, str | PathLike):
        path = Path(model)
        if path.suffix == ".onnx":
            return "common.foreign.onnx"
        if path.suffix == ".pt2":
            return "resnet_torch.foreign"
        return "resnet_keras.foreign" if (path / "saved_model.pb").is_file() else None
    if is_linen(model):
        return "resnet_flax.foreign"
    for one in type(model).__mro__:
        if (found := _CLASSES.get((one.__module__, one.__name__))) is not None:
            return found
    return "common.foreign.functions" if callable(model) and not isinstance(model, type) else None


def is_linen(model: Any) -> bool:
    """Whether it is a linen module with its variables."""
    return (
        isinstance(model, tuple)
        and len(model) == 2
        and isinstance(model[1], Mapping)
        and any((c.__module__, c.__name__) == ("flax.linen.module", "Module") for c in type(model[0]).__mro__)
    )


def _in_words(model: Any) -> str:
    if isinstance(model, str | PathLike):
        return f"the path {str(model)!r}"
    if isinstance(model, type):
        return f"the class {model.__name__}, not an instance of it,"
    return "None" if model is None else f"a value of type {type(model).__name__}"
