"""A PyTorch state_dict, whatever file it is in: its types, its strided tensors, and what tools wrap around it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Stored, pickled
from common.checkpoints.containers.pickled import Data, Inert, shown
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
_MOST_AXES = 32


@dataclass(frozen=True, kw_only=True)
class Storage:
    """A run of numbers in a file. `values` returns it flat, bfloat16 as uint16, and may be in another byte order."""

    dtype: str
    numel: int
    values: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor as a pickle describes it: a strided view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: Shape
    strides: tuple[int, ...]


def unpickled(stream: IO[bytes], persistent: Callable[[Any], Any]) -> Any:
    """What is pickled next in `stream`; `persistent` returns a `Storage`. Raises `CheckpointError`."""
    advice = "Where you trust it, load it with its own library and save model.state_dict() alone"
    return pickled.read(stream, _known, persistent, advice)


def _known(name: str) -> Any:
    """What stands for a name that PyTorch or a training script pickles; Python 2 and 3 have different ones."""
    return _MADE.get(name) or (Inert(name) if name in _HARMLESS or _TYPES.fullmatch(name) else None)


def _ordered_dict(*arguments: Any) -> Data:
    filled = Data()
    match arguments:
        case ([*_] as pairs,):  # how Python 2 pickles an OrderedDict
            taken = list(pairs)
            pairs.clear()  # or a small pickle that shows one list a million times would fill the memory
            for key, value in taken:
                filled[key] = value
    return filled


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    if len(rest) > 2 and rest[2]:
        raise CheckpointError("a tensor is a lazily negated or conjugated view; save a clone() of it")
    (offset,) = _counts((offset,))
    shape, strides = _counts(shape), _counts(strides)
    if len(shape) != len(strides) or not isinstance(storage, Storage):
        raise ValueError("a storage, and a stride for each axis")
    return _Tensor(storage=storage, offset=offset, shape=shape, strides=strides)


def _counts(values: Any) -> tuple[int, ...]:
    if len(values) > _MOST_AXES or not all(type(count) is int and 0 <= count < 2**63 for count in values):
        raise ValueError("counts are integers that are not negative")
    return tuple(values)


def _parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


def _subclass(rebuild: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    return rebuild(*arguments)


_MADE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("collections.OrderedDict", "collections.defaultdict", "collections.Counter"), _ordered_dict),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _tensor),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.autograd.variable.Variable": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.Size": _counts,
}
# What training scripts keep beside the weights. It is recognised to be skipped.
_HARMLESS = {
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "dict", "list", "bytearray")),
    *(f"torch._utils._rebuild_{what}" for what in ("tensor_v3", "qtensor", "sparse_tensor", "meta_tensor_no_storage")),
    "torch.Tensor",
    "torch.device",
    "torch.serialization._get_layout",
}
_TYPES = re.compile(r"torch\.((cuda|storage)\.)?\w+Storage|torch\.(bool|b?float\d+\w*|complex\d+|q?u?int\d+\w*)")


def mapped(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped. Raises `CheckpointError`."""
    try:
        if not path.stat().st_size:
            raise CheckpointError("the file is empty")
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {reason(error)}") from None


def storage_type(named: object) -> str:
    """NumPy's name of the elements of a storage of a pickled type. Raises `CheckpointError`."""
    name = named.name if isinstance(named, Inert) else ""
    dtype = STORAGES.get(name.rpartition(".")[2].removesuffix("Storage"))
    if dtype is None or not name.endswith("Storage"):
        raise CheckpointError(f"a tensor is stored as {shown(name) or 'no storage'}, which NumPy does not have")
    return dtype


def tensors_in(root: object) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The weights in a pickled object, and notes on what was around them.

    Where several keys hold weights, the plain ones come before a running average (`model` before `model_ema`).
    Raises `CheckpointError`.
    """
    notes: list[str] = []
    state = _unwrapped(root, notes)
    found = {name: value for name, value in state.items() if isinstance(value, _Tensor)}
    if left := [shown(name) for name in state if name not in found]:
        notes.append(f"left out what is no tensor: {_some(left)}")
    tensors = {str(name): _stored(str(name), tensor) for name, tensor in found.items()}
    tensors, more = renamed(tensors)
    return tensors, (*notes, *more)


def aligned(array: np.ndarray) -> np.ndarray:
    """Stored elements in this machine's byte order, where it can compute with them."""
    array = np.require(array, requirements=["A"])
    return array.astype(array.dtype.newbyteorder("="), copy=False)


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
    if any(isinstance(tensor, _Tensor) and isinstance(name, str) for name, tensor in value.items()):
        return True
    inner = (value.get(key) for key in (*_WRAPPERS, *_AVERAGES))
    return depth > 0 and any(isinstance(item, Mapping) and _holds_tensors(item, depth - 1) for item in inner)


def _kind(value: object) -> str:
    return shown(value.name) if isinstance(value, Inert) else type(value).__name__


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def _stored(name: str, tensor: _Tensor) -> Stored:
    """Raises `CheckpointError` for a tensor that reaches out of its storage, or is expanded beyond measure."""
    storage = tensor.storage
    if max(tensor.shape, default=0) > 2**40:
        raise CheckpointError(f"{shown(name)} claims an axis of {max(tensor.shape)}; refused")
    size = prod(tensor.shape)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    end = tensor.offset + sum((length - 1) * stride for length, stride in steps) + 1 if size else 0
    if end > storage.numel:
        raise CheckpointError(f"{shown(name)} reaches element {end} of a storage with {storage.numel}")
    if size > max(storage.numel, _MOST_EXPANDED):
        raise CheckpointError(f"{shown(name)} claims {size} elements of a storage with {storage.numel}; refused")
    return Stored(shape=tensor.shape, dtype=storage.dtype, read=partial(_read, tensor))


def _read(tensor: _Tensor) -> np.ndarray:
    storage = tensor.storage
    flat = storage.values()[tensor.offset :]
    # An axis of one element may have any stride, too long a one for NumPy as well.
    axes = zip(tensor.shape, tensor.strides, strict=True)
    strides = [stride * flat.itemsize if length > 1 else 0 for length, stride in axes]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    return aligned(view)


def little(array: np.ndarray, name: str) -> np.ndarray:
    """An array as it is written: contiguous and little-endian. Raises `CheckpointError` for a type of no storage."""
    if array.dtype.name not in WRITTEN:
        raise CheckpointError(f"{name} has dtype {array.dtype}; expected {', '.join(WRITTEN)}")
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")
