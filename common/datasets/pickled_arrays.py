"""Pickles of plain data and arrays of bytes, as CIFAR has: read as data; nothing is imported, nothing is called."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from common.checkpoints.containers import pickled
from common.checkpoints.containers.pickled import Inert
from common.errors import CheckpointError, DataError

_ADVICE = "The published files ask for arrays of bytes alone"
_ENCODINGS = ("latin1", "latin-1")
_BYTES = ("u1", "|u1", "uint8", "B")
_DTYPE = Inert("numpy.dtype")
_NDARRAY = Inert("numpy.ndarray")


@dataclass
class _Array(Inert):
    """An array of bytes, filled by its state."""

    values: np.ndarray | None = None

    def build(self, *arguments: Any) -> None:
        match arguments:
            case ((_, (*shape,), dtype, fortran, str() | bytes() as content),) if dtype is _DTYPE and not fortran:
                data = content.encode("latin-1") if isinstance(content, str) else content
                # NumPy's own words for values that do not fill a shape are an error of the pickle.
                self.values = np.frombuffer(data, np.uint8).reshape([int(side) for side in shape])
            case _:
                raise CheckpointError("its pickle holds an array in a form that the published files do not have")


def _array(kind: Any, *rest: Any) -> _Array:
    if kind is not _NDARRAY:
        raise CheckpointError("its pickle makes something else than arrays of bytes; refused")
    return _Array("an array")


def _dtype(name: Any, *rest: Any) -> Inert:
    if name not in _BYTES:
        raise CheckpointError("its pickle makes something else than arrays of bytes; refused")
    return _DTYPE


def _encoded(text: str, encoding: str) -> bytes:
    if encoding not in _ENCODINGS:
        raise CheckpointError("its pickle makes something else than arrays of bytes; refused")
    return text.encode("latin-1")


# What NumPy and Python 2 and 3 call the parts of an array of bytes.
_KNOWN: dict[str, Any] = {
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encoded,
}


def read(content: bytes, where: str) -> Any:
    """The object that is pickled in `content`: arrays are NumPy's, strings of Python 2 latin-1 text.

    Raises `DataError`, naming `where`, for a damaged pickle and for one that asks for anything else.
    """
    try:
        return _filled(pickled.read(BytesIO(content), _KNOWN.get, lambda identity: identity, _ADVICE))
    except CheckpointError as error:
        raise DataError(f"{where}: {error}") from None


def _filled(value: Any) -> Any:
    """A dictionary with the arrays that were described in it; nothing deeper holds any."""
    if not isinstance(value, dict):
        return value
    return {key: item.values if isinstance(item, _Array) else item for key, item in value.items()}
