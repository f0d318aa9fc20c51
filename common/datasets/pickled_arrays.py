"""Pickles of plain data and arrays of bytes, as CIFAR has: read as data; nothing is imported, nothing is called."""

from io import BytesIO
from typing import Any

import numpy as np

from common.checkpoints.containers.pickled import Machine, Named, refused, run
from common.errors import CheckpointError, DataError

_ARRAY, _DTYPE, _ENCODE = "_reconstruct", "dtype", "encode"
# What NumPy and Python 2 and 3 call the parts of an array of bytes.
_MEANING = {
    "numpy.core.multiarray._reconstruct": _ARRAY,
    "numpy._core.multiarray._reconstruct": _ARRAY,
    "numpy.ndarray": "ndarray",
    "numpy.dtype": _DTYPE,
    "_codecs.encode": _ENCODE,
}
_BYTES = ("u1", "|u1", "uint8", "B")


class _Dtype:
    """The type of bytes, the only one allowed."""


class _Array:
    """An array to be filled by its state."""

    values: np.ndarray | None = None


class _Arrays(Machine):
    """A machine that knows arrays of bytes and nothing else by name."""

    def __init__(self) -> None:
        super().__init__(lambda identity: identity)
        self._arrays: list[_Array] = []

    def known(self, name: str) -> Named:
        if name not in _MEANING:
            raise refused(name, "The published files ask for arrays of bytes alone")
        return Named(_MEANING[name])

    def made(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case Named(name="_reconstruct"), (Named(name="ndarray"), *_):
                return _Array()
            case Named(name="dtype"), (str(name), *_) if name in _BYTES:
                return _Dtype()
            case Named(name="encode"), (str(text), "latin1" | "latin-1"):
                return text.encode("latin-1")
        raise CheckpointError("its pickle makes something else than arrays of bytes; refused")

    def build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Array(), (_, (*shape,), _Dtype(), fortran, str() | bytes() as content) if not fortran:
                data = content.encode("latin-1") if isinstance(content, str) else content
                # NumPy's own words for values that do not fill a shape are an error of the pickle.
                target.values = np.frombuffer(data, np.uint8).reshape([int(side) for side in shape])
            case _Dtype(), _:
                pass
            case _:
                raise CheckpointError("its pickle holds an array in a form that the published files do not have")


def read(content: bytes, where: str) -> Any:
    """The object that is pickled in `content`: arrays are NumPy's, strings of Python 2 latin-1 text.

    Raises `DataError`, naming `where`, for a damaged pickle and for one that asks for anything else.
    """
    try:
        return _filled(run(BytesIO(content), _Arrays()))
    except CheckpointError as error:
        raise DataError(f"{where}: {error}") from None


def _filled(value: Any) -> Any:
    """A dictionary with the arrays that were described in it; nothing deeper holds any."""
    if not isinstance(value, dict):
        return value
    return {key: item.values if isinstance(item, _Array) else item for key, item in value.items()}
