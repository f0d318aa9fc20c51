"""Writing a file so that it is there whole or not at all, safetensors of which a bad one is one line, and the cache."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open

from common.errors import ParityError

# The types of safetensors that NumPy has.
DTYPES = {
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
    if dtype not in DTYPES:
        raise _foreign(name, dtype, error_type)
    array: np.ndarray = file.get_tensor(name)
    return array


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a safetensors file: its type as the format calls it, its shape, and its bytes in the mapped file."""

    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray


def entries(path: Path, error_type: type[ParityError]) -> tuple[dict[str, Entry], Mapping[str, str]]:
    """The tensors of the safetensors file at `path`, which stay in the mapped file, and its metadata.

    The library copies what it is asked for. Here it checks the header: types, shapes, and that every byte has its
    place. Raises `error_type`.
    """
    file = opened(path, error_type)
    content = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:start].tobytes())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = np.asarray(content[start + begin : start + end])
        found[name] = Entry(dtype=entry["dtype"], shape=tuple(entry["shape"]), raw=raw)
    return found, file.metadata() or {}


def views(path: Path, error_type: type[ParityError]) -> dict[str, Callable[[], np.ndarray]]:
    """The arrays of the safetensors file at `path`, as read-only views of the mapped file. Raises `error_type`."""

    def view(name: str, entry: Entry) -> np.ndarray:
        if entry.dtype not in DTYPES:
            raise _foreign(name, entry.dtype, error_type)
        return np.require(entry.raw.view(DTYPES[entry.dtype]), requirements=["A"]).reshape(entry.shape)

    return {name: partial(view, name, entry) for name, entry in entries(path, error_type)[0].items()}


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
