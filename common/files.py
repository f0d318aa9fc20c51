"""Writing a file so that it is there whole or not at all, safetensors of which a bad one is one line, and the cache."""

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from common.errors import ParityError

# The types of safetensors that NumPy has.
_DTYPES = {
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (64, 32, 16, 8)},
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BOOL": "?",
    "C64": "<c8",
}


def cache_folder() -> Path:
    """Where what can be had again is kept: $RESNET_PARITY_CACHE, or the user's cache folder."""
    asked = os.environ.get("RESNET_PARITY_CACHE")
    return Path(asked).expanduser() if asked else user_cache_path("resnet-parity")


@contextmanager
def written(path: Path, error_type: type[ParityError]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well, and goes away when it does not.

    Raises `error_type` where the file cannot be written, a full disk included.
    """
    beside: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        beside = Path(name)
        yield beside
        beside.chmod(0o666 & ~_umask())
        beside.replace(path)
    # safetensors has an exception of its own for what the system refuses, not derived from OSError.
    except (OSError, SafetensorError) as error:
        raise error_type(f"{path}: cannot be written: {reason(error)}; nothing was left there") from None
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def opened(path: Path, error_type: type[ParityError]) -> Any:
    """The safetensors file at `path`, memory-mapped. Raises `error_type` where it is missing or damaged."""
    try:
        # The system's own words for what is missing, a folder or not permitted; safetensors has odd ones.
        with path.open("rb"):
            return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise error_type(f"{path}: cannot be read as safetensors: {reason(error)}") from None


def tensor(file: Any, name: str, error_type: type[ParityError]) -> np.ndarray:
    """One array of an `opened` file. Raises `error_type` for a type that NumPy does not have, as bfloat16."""
    # Asked of the file: NumPy itself has bfloat16 as soon as some framework is imported, and cannot do much with it.
    dtype = file.get_slice(name).get_dtype()
    if dtype not in _DTYPES:
        raise _foreign(name, dtype, error_type)
    array: np.ndarray = file.get_tensor(name)
    return array


def views(path: Path, error_type: type[ParityError]) -> dict[str, Callable[[], np.ndarray]]:
    """The arrays of the safetensors file at `path`, as read-only views of the mapped file. Raises `error_type`.

    The library copies what it is asked for. Here it checks the header: names, types, and places in the file.
    """
    file = opened(path, error_type)
    content = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    header = json.loads(content[8 : 8 + length].tobytes())

    def view(name: str) -> np.ndarray:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise _foreign(name, entry["dtype"], error_type)
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        values: np.ndarray = np.asarray(content[start:end]).view(_DTYPES[entry["dtype"]])
        return np.require(values, requirements=["A"]).reshape(entry["shape"])

    return {name: partial(view, name) for name in file.keys()}


def reason(error: Exception) -> str:
    """The first line of an error, without its type: what a person wants to read of it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _foreign(name: str, dtype: str, error_type: type[ParityError]) -> ParityError:
    return error_type(f"{name} is stored as {dtype}, which NumPy does not have; store it as F32 or F64")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
