"""Container: msgpack as `flax.serialization` writes it.

Flax adds two kinds of extension, 1 for an array and 3 for a scalar of NumPy's: shape, name of the dtype, and bytes,
packed once more. An array beyond `CHUNK` bytes is a map of flat pieces, and a list is a map from "0", "1", …
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Source, Stored, raw_type
from common.checkpoints.containers.trees import DTYPES, variables
from common.errors import CheckpointError
from common.files import reason, written
from common.weights import Weights

CHUNK = 2**30  # bytes of the largest array that Flax writes in one piece
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3  # types of extension
# More than any train state has; without bounds a small file of nothing but headers would fill the memory.
_MOST_VALUES = 200_000
_MOST_IN_ONE = 20_000
_MOST_AXES = 32
_LONGEST_KEY = 256
_HEAD = 2 * _LONGEST_KEY


@dataclass(frozen=True, kw_only=True)
class _Array:
    shape: Shape
    dtype: str
    data: bytes


class _Checked:
    """What the library calls for every map, list and extension that it has unpacked. Raises `CheckpointError`."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        self._left -= len(pairs) + 1
        if self._left < 0:
            raise CheckpointError(f"more than {_MOST_VALUES} values: no weights")
        found: dict[str, Any] = {}
        for key, value in pairs:
            if not _is_name(key):
                raise CheckpointError("a map from something else than short printable names; is the file whole?")
            if key in found:
                raise CheckpointError(f"{key} is there twice in one map")
            found[key] = value
        return found

    def list(self, values: list[Any]) -> dict[str, Any]:
        return self.map([(str(index), value) for index, value in enumerate(values)])

    def extension(self, code: int, data: bytes) -> _Array | None:
        if code not in (_ARRAY, _SCALAR):
            return None
        match msgpack.unpackb(data, max_array_len=_MOST_AXES, max_map_len=0, max_ext_len=0):
            case [[*shape], str(dtype), bytes(content)] if _is_name(dtype):
                if all(type(size) is int and size >= 0 for size in shape):
                    return _Array(shape=tuple(shape), dtype=dtype, data=content)
        raise CheckpointError("an array is not a list of shape, dtype and bytes")


def recognises(path: Path) -> bool:
    """Whether the file begins as a map from names, which is all that msgpack has for a mark."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker()
        unpacker.feed(file.read(_HEAD))
    try:
        return unpacker.read_map_header() > 0 and _is_name(unpacker.unpack())
    except Exception:  # the library's many
        return False


def read(path: Path) -> Source:
    """The arrays of a file by path: the library unpacks all of it. Raises `CheckpointError` for one that is damaged."""
    checked = _Checked()
    try:
        tree = msgpack.unpackb(
            path.read_bytes(),
            object_pairs_hook=checked.map,
            list_hook=checked.list,
            ext_hook=checked.extension,
            max_array_len=_MOST_IN_ONE,
            max_map_len=_MOST_IN_ONE,
        )
    except CheckpointError:
        raise
    except msgpack.ExtraData:
        raise CheckpointError("more bytes follow its value; expected one map, to the end") from None
    except Exception as error:  # the library's own have no root in common
        raise CheckpointError(f"no whole msgpack ({reason(error)}); fetch or make the file again") from None
    if not isinstance(tree, dict):
        raise CheckpointError("its value is no map; expected one, to the end")
    leaves: dict[str, Stored | None] = {}
    for name, leaf in _leaves(tree):
        if name in leaves:
            raise CheckpointError(f"{name} is there twice")
        leaves[name] = _stored(name, leaf)
    return variables(leaves, "msgpack")


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """Write `tensors` as `flax.serialization.msgpack_serialize` does, byte for byte, one at a time."""
    tree: dict[str, Any] = {}
    for name in tensors:
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = partial(tensors.__getitem__, name)
    with written(path, CheckpointError) as beside, beside.open("wb") as file:
        _write_tree(file, msgpack.Packer(default=_packed), tree)


def _is_name(key: object) -> bool:
    return isinstance(key, str) and 0 < len(key) <= _LONGEST_KEY and key.isprintable()


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a tree; an array in pieces is one leaf."""
    for key, node in tree.items():
        if isinstance(node, dict) and _CHUNKED not in node:
            yield from _leaves(node, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", node


def _stored(name: str, leaf: Any) -> Stored | None:
    """The array that a leaf is, in one piece or several; None for anything else."""
    if isinstance(leaf, dict):
        shape, pieces = _chunked(name, leaf)
    elif isinstance(leaf, _Array):
        shape, pieces = leaf.shape, [leaf]
    else:
        return None
    dtype = pieces[0].dtype
    itemsize = DTYPES.get(dtype, 0)
    fitting = all(len(piece.data) == prod(piece.shape) * itemsize for piece in pieces)
    total = sum(len(piece.data) for piece in pieces)
    if itemsize and (not fitting or total != prod(shape) * itemsize or max(shape, default=0) > 2**40):
        raise CheckpointError(f"{name} is said to be {dtype} {shape}, {prod(shape) * itemsize} bytes, and has {total}")
    return Stored(shape=shape, dtype=dtype, read=partial(_read, pieces, shape))


def _chunked(name: str, leaf: Mapping[str, Any]) -> tuple[Shape, list[_Array]]:
    """Shape and pieces of an array that was too large for one."""
    sizes, pieces = (_listed(leaf.get(key)) for key in ("shape", "chunks"))
    flat = [piece for piece in pieces if isinstance(piece, _Array) and len(piece.shape) == 1]
    one_dtype = len({piece.dtype for piece in flat}) == 1
    if len(flat) != len(pieces) or not one_dtype or not all(type(size) is int and size >= 0 for size in sizes):
        raise CheckpointError(
            f"{name} is said to be in pieces; they are not flat arrays of one dtype, or have no shape"
        )
    return tuple(sizes), flat


def _listed(node: Any) -> list[Any]:
    return [node.get(str(index)) for index in range(len(node))] if isinstance(node, dict) else [None]


def _read(pieces: list[_Array], shape: Shape) -> np.ndarray:
    """An array, a view of the bytes that were unpacked; only pieces must be copied together."""
    flat = [np.frombuffer(piece.data, raw_type(piece.dtype)) for piece in pieces]
    return (flat[0] if len(flat) == 1 else np.concatenate(flat)).reshape(shape)


def _write_tree(file: BinaryIO, packer: msgpack.Packer, tree: Mapping[str, Any]) -> None:
    file.write(packer.pack_map_header(len(tree)))
    for key in sorted(tree):
        file.write(packer.pack(key))
        if isinstance(tree[key], dict):
            _write_tree(file, packer, tree[key])
        else:
            file.write(packer.pack(_in_pieces(np.ascontiguousarray(tree[key]()))))


def _in_pieces(array: np.ndarray) -> Any:
    if array.nbytes <= CHUNK:
        return array
    step, flat = max(CHUNK // array.itemsize, 1), array.reshape(-1)
    pieces = [flat[start : start + step] for start in range(0, flat.size, step)]
    return {_CHUNKED: True, "shape": _as_map(array.shape), "chunks": _as_map(pieces)}


def _as_map(values: Any) -> dict[str, Any]:
    return {str(index): value for index, value in enumerate(values)}


def _packed(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(_ARRAY, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
