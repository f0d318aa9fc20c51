"""FILE.py:FUNCTION: a function of the user's that makes a model, and perhaps inputs for it."""

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelError
from common.files import reason
from common.foreign.adapters import is_linen
from common.foreign.protocol import Inputs


@dataclass(frozen=True)
class Reference:
    """A function in a file."""

    path: Path
    function: str

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Raises `ModelError` for what is not FILE.py:FUNCTION, or a file that is not there."""
        path, colon, function = text.rpartition(":")
        if not colon or not path.endswith(".py") or not function.isidentifier():
            raise ModelError(f"{text!r} names no function in a file; expected FILE.py:FUNCTION")
        if not Path(path).is_file():
            raise ModelError(f"{path}: there is no such file")
        return cls(Path(path).absolute(), function)

    def __str__(self) -> str:
        return f"{self.path.name}:{self.function}"


def made(reference: Reference) -> tuple[Any, Inputs | None]:
    """The model that the function makes, and the inputs that it gives with it.

    Raises `ModelError` where the file or the function raises, wants arguments, or returns nothing.
    """
    name = reference.path.stem
    # As `python FILE.py` has it: what lies beside the file can be imported.
    if (folder := str(reference.path.parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, reference.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise ModelError(f"{reference.path}: {type(error).__name__} on import: {_where(error, reference)}") from error
    function = getattr(module, reference.function, None)
    if not callable(function):
        there = [key for key, one in vars(module).items() if inspect.isfunction(one) and one.__module__ == name]
        raise ModelError(f"{reference.path} has no function {reference.function}; it has {', '.join(there) or 'none'}")
    wanted = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if wanted:
        raise ModelError(f"{reference} needs arguments ({', '.join(wanted)}); it is called with none")
    try:
        returned = function()
    except BaseException as error:
        raise ModelError(f"{reference} raises {type(error).__name__}: {_where(error, reference)}") from error
    if returned is None:
        raise ModelError(f"{reference} returns nothing; expected a model, or a model and its inputs")
    if isinstance(returned, tuple) and not is_linen(returned):
        if len(returned) != 2:
            raise ModelError(f"{reference} returns {len(returned)} things; expected a model, or a model and its inputs")
        return returned[0], as_inputs(returned[1])
    return returned, None


def as_inputs(given: Any) -> Inputs:
    """What a user calls inputs, one array, several, or a dictionary, as NumPy has them. Raises `ModelError`."""
    if isinstance(given, Mapping):
        return {str(name): _array(one) for name, one in given.items()}
    if isinstance(given, list | tuple):
        return [_array(one) for one in given]
    return [_array(given)]


def _array(value: Any) -> np.ndarray:
    detached = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        # asarray first: asked for a copy, PyTorch's and TensorFlow's tensors warn under NumPy 2.
        array = np.array(np.asarray(detached))
    except Exception as error:
        raise ModelError(f"an input of type {type(value).__name__} is no array: {reason(error)}") from None
    if array.dtype.kind not in "fiub" or array.size == 0:
        what = "is empty" if array.size == 0 else f"has values of type {array.dtype}"
        raise ModelError(f"an input of type {type(value).__name__} {what}; expected an array of numbers")
    return array


def _where(error: BaseException, reference: Reference) -> str:
    """What it says, and the last line of the user's file that led there."""
    found = error.__traceback__
    line = 0
    while found is not None:
        if found.tb_frame.f_code.co_filename == str(reference.path):
            line = found.tb_lineno
        found = found.tb_next
    said = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{said} (line {line})" if line else said
