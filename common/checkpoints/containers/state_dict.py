"""A PyTorch state_dict, whatever file it is in: its types, its strided tensors, and what tools wrap around it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.checkpoints.containers import Stored, widened_bfloat16
from common.checkpoints.containers.pickled import Named, PickledTensor
from common.errors import CheckpointError
from common.files import reason

# Name of a storage's type -> NumPy's name of its elements, and bfloat16, which NumPy does not have.
STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Untyped": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
# The types that weights have, and the storages they are written in.
WRITTEN = {"float64": "Double", "float32": "Float", "float16": "Half", "int64": "Long"}
# A key under which training scripts keep the weights, the plain ones before their running averages.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
_AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
# What DistributedDataParallel, torch.compile and Lightning put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_AVERAGED = "n_averaged"
_MOST_EXPANDED = 2**22  # elements of a tensor that has more of them than its storage
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A run of numbers in a file. `values` returns it flat, bfloat16 as uint16, and may be in another byte order."""

    dtype: str
    numel: int
    values: Callable[[], np.ndarray]


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped. Raises `CheckpointError`."""
    try:
        if not path.stat().st_size:
            raise CheckpointError("the file is empty")
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {reason(error)}") from None


def shown(name: object) -> str:
    """A name from a file, fit to stand in a line that a person reads."""
    return "".join(c if c.isprintable() else "?" for c in str(name)[:80])


def storage_type(named: object) -> str:
    """NumPy's name of the elements of a storage of a pickled type. Raises `CheckpointError`."""
    name = named.name if isinstance(named, Named) else ""
    dtype = STORAGES.get(name.rpartition(".")[2].removesuffix("Storage"))
    if dtype is None or not name.endswith("Storage"):
        raise CheckpointError(f"a tensor is stored as {shown(name) or 'no storage'}, which NumPy does not have")
    return dtype


def item_size(dtype: str) -> int:
    """Bytes of an element."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def raw_type(dtype: str, order: Literal["<", ">"] = "<") -> np.dtype[Any]:
    """The type as which elements are stored, in a byte order."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder(order)


def widened(array: np.ndarray, dtype: str) -> np.ndarray:
    """Stored elements as NumPy's own type: aligned, of this machine's byte order, bfloat16 exactly as float32."""
    array = np.require(array, requirements=["A"])
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return widened_bfloat16(array) if dtype == "bfloat16" else array


def widened_type(dtype: str) -> str:
    """NumPy's name of what `widened` returns."""
    return "float32" if dtype == "bfloat16" else dtype


def tensors_in(root: object) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The weights in a pickled object, and notes on what was around them.

    Where several keys hold weights, the plain ones come before a running average (`model` before `model_ema`).
    Raises `CheckpointError`.
    """
    notes: list[str] = []
    state = _unwrapped(root, notes)
    pickled = {name: value for name, value in state.items() if isinstance(value, PickledTensor)}
    if left := [shown(name) for name in state if name not in pickled]:
        notes.append(f"left out what is no tensor: {_some(left)}")
    tensors = {str(name): _stored(str(name), tensor) for name, tensor in pickled.items()}
    if any(tensor.storage.dtype == "bfloat16" for tensor in pickled.values()):
        notes.append(BFLOAT16)
    tensors, more = renamed(tensors)
    return tensors, (*notes, *more)


BFLOAT16 = "bfloat16 was widened to float32, which is exact"


def renamed(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors without prefixes that tools have put before all of their names, and notes.

    Raises `CheckpointError` for a name that is none.
    """
    for name in tensors:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise CheckpointError(f"{shown(name)!r} is no name of a tensor: unprintable, or too long")
    notes = []
    kept = dict(tensors)
    if kept.pop(_AVERAGED, None) is not None:
        notes.append(f"left out {_AVERAGED}, a counter of torch's AveragedModel")
    while kept and (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in kept)), None)):
        kept = {name.removeprefix(prefix): tensor for name, tensor in kept.items()}
        notes.append(f"every name began with {prefix!r}, which was taken off")
    return kept, tuple(notes)


def _unwrapped(root: object, notes: list[str]) -> Mapping[Any, Any]:
    for _ in range(4):  # wrappers in wrappers: more than two have not been seen
        if not isinstance(root, Mapping):
            raise CheckpointError(f"holds a {_kind(root)}; expected a state_dict, tensors by name")
        keys = [key for key in (*_WRAPPERS, *_AVERAGES) if isinstance(root.get(key), Mapping)]
        keys = [key for key in keys if _holds_tensors(root[key], 3)]
        if not keys:
            break
        others = [f"weights under {key!r}" for key in keys[1:]]
        rest = [shown(key) for key in root if key not in keys]
        left = f"; left out: {_some([*others, *rest])}" if others or rest else ""
        notes.append(f"taken from under {keys[0]!r}{left}")
        root = root[keys[0]]
    if not isinstance(root, Mapping) or not _holds_tensors(root, 0):
        names = _some([shown(key) for key in root]) if isinstance(root, Mapping) and root else "nothing"
        raise CheckpointError(f"no tensors by name are inside; it holds {names}; expected a state_dict")
    return root


def _holds_tensors(value: Mapping[Any, Any], depth: int) -> bool:
    """Whether there are tensors by name in a dictionary, or under a wrapper in it."""
    if any(isinstance(tensor, PickledTensor) and isinstance(name, str) for name, tensor in value.items()):
        return True
    inner = (value.get(key) for key in (*_WRAPPERS, *_AVERAGES))
    return depth > 0 and any(isinstance(item, Mapping) and _holds_tensors(item, depth - 1) for item in inner)


def _kind(value: object) -> str:
    return shown(value.name) if isinstance(value, Named) else type(value).__name__


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _stored(name: str, tensor: PickledTensor) -> Stored:
    """Raises `CheckpointError` for a tensor that reaches out of its storage, or is expanded beyond measure."""
    storage = tensor.storage
    if not isinstance(storage, Storage):
        raise CheckpointError(f"{shown(name)} has no storage; fetch or make the file again")
    if max(tensor.shape, default=0) > 2**40:
        raise CheckpointError(f"{shown(name)} claims an axis of {max(tensor.shape)}; refused")
    size = prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    end = tensor.offset + sum((length - 1) * stride for length, stride in steps) + 1 if size else 0
    if end > storage.numel:
        raise CheckpointError(f"{shown(name)} reaches element {end} of a storage with {storage.numel}")
    if size > max(storage.numel, _MOST_EXPANDED):
        raise CheckpointError(f"{shown(name)} claims {size} elements of a storage with {storage.numel}; refused")
    return Stored(shape=tensor.shape, dtype=widened_type(storage.dtype), read=partial(_read, tensor))


def _read(tensor: PickledTensor) -> np.ndarray:
    storage: Storage = tensor.storage
    flat = storage.values()[tensor.offset :]
    # An axis of one element may have any stride, too long a one for NumPy as well.
    axes = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * flat.itemsize if length > 1 else 0 for length, stride in axes]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    return widened(view, storage.dtype)


def little(array: np.ndarray, name: str) -> np.ndarray:
    """An array as it is written: contiguous and little-endian. Raises `CheckpointError` for a type of no storage."""
    if array.dtype.name not in WRITTEN:
        raise CheckpointError(f"{name} has dtype {array.dtype}; expected {', '.join(WRITTEN)}")
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")
