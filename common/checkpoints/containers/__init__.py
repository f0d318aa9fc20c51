"""Containers: the kinds of file that keep tensors by name. A container reads and writes bytes and knows no network.

What the tensors are called, in which order they come and what stands beside them is the naming's; see `common.names`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from common.architectures.layers import Shape
from common.errors import CheckpointError, framework
from common.weights import Weights

# In the order in which a file is tried. A module is imported when it is asked: each needs a library of its own.
READ = ("safetensors", "pytorch", "pytorch_legacy", "hdf5", "orbax", "msgpack")
# By the end of a file's name: the container that writes it.
WRITTEN = {
    ".safetensors": "safetensors",
    ".pth": "pytorch",
    ".pt": "pytorch",
    ".bin": "pytorch",
    ".weights.h5": "hdf5",
    ".h5": "hdf5",
    ".msgpack": "msgpack",
}
# What a framework alone can write, from a network of its own (see `native`): the backend that does. A folder is orbax'.
BY_FRAMEWORK = {".keras": "keras", "": "flax"}
_LIBRARIES = {name: (name, "checkpoints") for name in ("h5py", "tensorstore", "msgpack")}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: what its header says, and how to read it. `dtype` is NumPy's name of what `read` returns."""

    shape: Shape
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The content of a file, whatever names its tensors have. Nothing but headers has been read."""

    container: str  # for people: "PyTorch zip", "safetensors"
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was unwrapped or converted on the way, one line each


class Container(Protocol):
    """A module that reads one kind of file."""

    def recognises(self, path: Path) -> bool:
        """Whether the content of `path`, a file or a folder, looks like this container's; its name says nothing."""
        ...

    def read(self, path: Path) -> Source:
        """Names, shapes and types of what is inside. Raises `CheckpointError` for anything damaged or unsafe."""
        ...


class Writer(Protocol):
    """A module that writes one kind of file."""

    def write(self, path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
        """Write `tensors` as they are and in their order, beside `path`, and rename. Raises `CheckpointError`.

        Safetensors alone keep `metadata`.
        """
        ...


def container_of(path: Path) -> Container:
    """The container that recognises what is at `path`. Raises `CheckpointError` where none does."""
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        for name in READ:
            if (module := cast(Container, _module(name))).recognises(path):
                return module
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    raise CheckpointError(
        f"{path}: not a checkpoint of a known format; expected safetensors, a PyTorch, HDF5, Keras or msgpack file, "
        "or an orbax folder"
    )


def suffix_of(path: Path) -> str:
    """The end of a file's name that says its kind, a key of `WRITTEN` or `BY_FRAMEWORK`. Raises `CheckpointError`."""
    known = [suffix for suffix in (*WRITTEN, *BY_FRAMEWORK) if suffix]
    suffix = next((suffix for suffix in known if path.name.endswith(suffix)), path.suffix)
    if suffix and suffix not in known:
        raise CheckpointError(
            f"{path}: no format goes by {suffix!r}; name the file one of {', '.join(known)}, or a folder"
        )
    return suffix


def writer_of(path: Path) -> Writer:
    """The container that writes a file of this name, one of `WRITTEN`."""
    return cast(Writer, _module(WRITTEN[suffix_of(path)]))


def _module(name: str) -> object:
    with framework(_LIBRARIES):
        return import_module(f"{__name__}.{name}")


def stored(array: np.ndarray) -> Stored:
    """A tensor that is in memory already."""
    return Stored(shape=array.shape, dtype=array.dtype.name, read=lambda: array)


def source(
    container: str,
    tensors: Mapping[str, Stored],
    *,
    metadata: Mapping[str, str] | None = None,
    notes: Iterable[str] = (),
) -> Source:
    """A `Source` of NumPy's types alone: what is stored as bfloat16, and reads as its bits, is read as float32."""
    narrow = {name: tensor for name, tensor in tensors.items() if tensor.dtype == "bfloat16"}
    wide = {
        name: Stored(shape=tensor.shape, dtype="float32", read=partial(_widened, tensor))
        for name, tensor in narrow.items()
    }
    found = (*notes, *([BFLOAT16] if narrow else []))
    return Source(container=container, tensors={**tensors, **wide}, metadata=metadata or {}, notes=found)


BFLOAT16 = "bfloat16 is read as float32, exactly"


def item_size(dtype: str) -> int:
    """Bytes of an element."""
    return raw_type(dtype).itemsize


def raw_type(dtype: str) -> np.dtype[Any]:
    """The type as which NumPy reads what is stored: bits of a bfloat16, which it does not have."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def _widened(tensor: Stored) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    return (tensor.read().astype(np.uint32) << 16).view(np.float32)
