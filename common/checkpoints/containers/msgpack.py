"""Container: msgpack as `flax.serialization` writes it, read by its headers: no array is touched until it is asked for.

msgpack.org/specification: every value begins with a byte that says its kind and, for the larger ones, in how many bytes
its size follows. Flax adds two kinds of extension: 1, an array, and 3, a scalar of NumPy's; both hold a list of
shape, name of the dtype, and bytes. An array beyond `CHUNK` bytes is a map of flat pieces.
"""

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Source, Stored
from common.checkpoints.containers.trees import DTYPES, variables
from common.errors import CheckpointError
from common.files import reason, written
from common.weights import Weights

CHUNK = 2**30  # bytes of the largest array that Flax writes in one piece
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY, _SCALAR = 1, 3  # types of extension

# Kind -> (first byte, largest size) of the form whose first byte holds the size, and the first bytes of the forms with
# a size in 1, 2, 4 or 8 bytes after it. For an integer the size is its value.
_FORMS: dict[str, tuple[tuple[int, int] | None, dict[int, int]]] = {
    "integer": ((0x00, 127), {1: 0xCC, 2: 0xCD, 4: 0xCE, 8: 0xCF}),
    "map": ((0x80, 15), {2: 0xDE, 4: 0xDF}),
    "list": ((0x90, 15), {2: 0xDC, 4: 0xDD}),
    "text": ((0xA0, 31), {1: 0xD9, 2: 0xDA, 4: 0xDB}),
    "bytes": (None, {1: 0xC4, 2: 0xC5, 4: 0xC6}),
    "extension": (None, {1: 0xC7, 2: 0xC8, 4: 0xC9}),
}
_SHORT = {short[0] + n: (kind, n) for kind, (short, _) in _FORMS.items() if short for n in range(short[1] + 1)}
_LONG = {first: (kind, width) for kind, (_, forms) in _FORMS.items() for width, first in forms.items()}
_FIXED_EXTENSION = {0xD4 + power: 2**power for power in range(5)}
# What no variable is: nil, false, true, floats, negative integers. First byte -> bytes after it.
_OTHER = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_OTHER |= dict.fromkeys(range(0xE0, 0x100), 0)

# More than any train state has; without bounds a small file of nothing but headers would fill the memory.
_MOST_VALUES = 200_000
_MOST_DEPTH = 32
_MOST_AXES = 32
_LONGEST_KEY = 256


@dataclass(frozen=True, kw_only=True)
class _Array:
    """An array in the file: its bytes begin at `offset`."""

    shape: Shape
    dtype: str
    offset: int
    size: int


class _Scanner:
    """Goes through the headers of a file once. Raises `CheckpointError` for whatever Flax does not write."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self._values = 0

    def tree(self, depth: int = 0) -> Any:
        """The value at this place: a dict by key, an `_Array`, an int, or None for anything else."""
        self._values += 1
        if self._values > _MOST_VALUES or depth > _MOST_DEPTH:
            raise CheckpointError(f"more than {_MOST_VALUES} values, or nested deeper than {_MOST_DEPTH}: no weights")
        began = self.at
        kind, size = self.header()
        if kind == "map":
            return self._map(size, depth)
        if kind == "list":
            return {str(index): self.tree(depth + 1) for index in range(self._fitting(size))}
        if kind == "integer":
            return size
        if kind == "extension":
            return self._extension(size, began)
        self._skip(size)
        return None

    def header(self) -> tuple[str, int]:
        """Kind and size of the value at this place; what follows is its content."""
        first = self._take(1)[0]
        if first in _SHORT:
            return _SHORT[first]
        if first in _LONG:
            kind, width = _LONG[first]
            return kind, int.from_bytes(self._take(width))
        if first in _FIXED_EXTENSION:
            return "extension", _FIXED_EXTENSION[first]
        if first in _OTHER:
            return "other", _OTHER[first]
        raise CheckpointError(f"byte {self.at - 1} is {first:#04x}, with which no value of msgpack begins")

    def text(self) -> str:
        """The string at this place."""
        began = self.at
        kind, size = self.header()
        if kind != "text" or size > _LONGEST_KEY:
            raise CheckpointError(f"byte {began} begins a value of kind {kind}; expected a name")
        try:
            text = self._take(size).decode()
        except UnicodeDecodeError:
            text = ""
        if not text.isprintable() or not text:
            raise CheckpointError(f"the name at byte {began} is not printable text")
        return text

    def _map(self, size: int, depth: int) -> Any:
        tree: dict[str, Any] = {}
        for _ in range(self._fitting(2 * size) // 2):
            key = self.text()
            if key in tree:
                raise CheckpointError(f"{key} is there twice in one map")
            tree[key] = self.tree(depth + 1)
        return tree

    def _extension(self, size: int, began: int) -> _Array | None:
        kind = self._take(1)[0]
        end = self.at + self._fitting(size)
        if kind not in (_ARRAY, _SCALAR):
            self._skip(size)
            return None
        axes = self._expect("list") if self._expect("list") == 3 else _MOST_AXES + 1
        if axes > _MOST_AXES:
            raise CheckpointError(f"the array at byte {began} is not a list of shape, dtype and bytes")
        shape = tuple(self._expect("integer") for _ in range(axes))
        dtype, length = self.text(), self._expect("bytes")
        array = _Array(shape=shape, dtype=dtype, offset=self.at, size=length)
        self._skip(length)
        if self.at != end:
            raise CheckpointError(f"the array at byte {began} has {size} bytes in its header and others inside")
        return array

    def _expect(self, expected: str) -> int:
        began = self.at
        kind, size = self.header()
        if kind != expected:
            raise CheckpointError(f"byte {began} begins a value of kind {kind}; expected {expected}, in an array")
        return size

    def _fitting(self, size: int) -> int:
        """`size`, if so many bytes are left."""
        if size > len(self.data) - self.at:
            raise CheckpointError(
                f"{size} bytes are said to follow byte {self.at} and {len(self.data) - self.at} do; is the file whole?"
            )
        return size

    def _skip(self, size: int) -> None:
        self.at += self._fitting(size)

    def _take(self, size: int) -> bytes:
        self._skip(size)
        return self.data[self.at - size : self.at]


def recognises(path: Path) -> bool:
    """Whether the file begins as a map from names, which is all that msgpack has for a mark."""
    if not path.is_file():
        return False
    try:
        with _mapped(path) as data:
            scanner = _Scanner(data)
            kind, size = scanner.header()
            return kind == "map" and size > 0 and scanner.text() != ""
    except (OSError, ValueError):  # a CheckpointError is a ValueError, and so is a file of no bytes to mmap
        return False


def read(path: Path) -> Source:
    """The arrays of a file by path, memory-mapped. Raises `CheckpointError` for one that is damaged."""
    try:
        data = _mapped(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {reason(error)}") from None
    scanner = _Scanner(data)
    tree = scanner.tree()
    if not isinstance(tree, dict) or scanner.at != len(data):
        raise CheckpointError(f"a msgpack value ends at byte {scanner.at} of {len(data)}; expected one map, to the end")
    leaves: dict[str, Stored | None] = {}
    for name, leaf in _leaves(tree):
        if name in leaves:
            raise CheckpointError(f"{name} is there twice")
        leaves[name] = _stored(name, leaf, data)
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
        _write_tree(file, tree)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a tree; an array in pieces is one leaf."""
    for key, node in tree.items():
        if isinstance(node, dict) and _CHUNKED not in node:
            yield from _leaves(node, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", node


def _stored(name: str, leaf: Any, data: mmap.mmap) -> Stored | None:
    """The array that a leaf is, in one piece or several; None for anything else."""
    if isinstance(leaf, dict):
        shape, pieces = _chunked(name, leaf)
    elif isinstance(leaf, _Array):
        shape, pieces = leaf.shape, [leaf]
    else:
        return None
    dtype = pieces[0].dtype
    itemsize = DTYPES.get(dtype, 0)
    fitting = all(piece.size == prod(piece.shape) * itemsize for piece in pieces)
    total = sum(piece.size for piece in pieces)
    if itemsize and (not fitting or total != prod(shape) * itemsize or max(shape, default=0) > len(data)):
        raise CheckpointError(f"{name} is said to be {dtype} {shape}, {prod(shape) * itemsize} bytes, and has {total}")
    return Stored(shape=shape, dtype=dtype, read=partial(_read, data, pieces, shape))


def _chunked(name: str, leaf: Mapping[str, Any]) -> tuple[Shape, list[_Array]]:
    """Shape and pieces of an array that was too large for one."""
    sizes, pieces = (_listed(leaf.get(key)) for key in ("shape", "chunks"))
    flat = [piece for piece in pieces if isinstance(piece, _Array) and len(piece.shape) == 1]
    one_dtype = len({piece.dtype for piece in flat}) == 1
    if len(flat) != len(pieces) or not one_dtype or not all(type(size) is int for size in sizes):
        raise CheckpointError(
            f"{name} is said to be in pieces; they are not flat arrays of one dtype, or have no shape"
        )
    return tuple(sizes), flat


def _listed(node: Any) -> list[Any]:
    """One of Flax's lists: a map from "0", "1", …"""
    return [node.get(str(index)) for index in range(len(node))] if isinstance(node, dict) else [None]


def _read(data: mmap.mmap, pieces: list[_Array], shape: Shape) -> np.ndarray:
    """An array of the file, a view of it; only pieces must be copied together."""
    dtype = np.dtype("uint16" if pieces[0].dtype == "bfloat16" else pieces[0].dtype)
    flat = [np.frombuffer(data, dtype, piece.size // dtype.itemsize, piece.offset) for piece in pieces]
    return (flat[0] if len(flat) == 1 else np.concatenate(flat)).reshape(shape)


def _write_tree(file: BinaryIO, tree: Mapping[str, Any]) -> None:
    file.write(_head("map", len(tree)))
    for key in sorted(tree):
        _write_text(file, key)
        if isinstance(tree[key], dict):
            _write_tree(file, tree[key])
        else:
            _write_array(file, np.ascontiguousarray(tree[key]()))


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    if array.nbytes <= CHUNK:
        _write_piece(file, array)
        return
    file.write(_head("map", 3))
    _write_text(file, _CHUNKED)
    file.write(b"\xc3")  # true
    _write_text(file, "shape")
    _write_list(file, array.shape, lambda size: file.write(_head("integer", size)))
    _write_text(file, "chunks")
    step = max(CHUNK // array.itemsize, 1)
    flat = array.reshape(-1)
    _write_list(file, range(0, flat.size, step), lambda start: _write_piece(file, flat[start : start + step]))


def _write_list(file: BinaryIO, values: Any, write_one: Callable[[Any], object]) -> None:
    """Flax's lists are maps from "0", "1", …"""
    file.write(_head("map", len(values)))
    for index, value in enumerate(values):
        _write_text(file, str(index))
        write_one(value)


def _write_piece(file: BinaryIO, array: np.ndarray) -> None:
    head = _head("list", 3) + _head("list", array.ndim) + b"".join(_head("integer", size) for size in array.shape)
    name = array.dtype.name.encode()
    head += _head("text", len(name)) + name + _head("bytes", array.nbytes)
    file.write(_head("extension", len(head) + array.nbytes) + bytes([_ARRAY]) + head)
    file.write(array.reshape(-1).view(np.uint8).data)


def _write_text(file: BinaryIO, text: str) -> None:
    file.write(_head("text", len(text.encode())) + text.encode())


def _head(kind: str, size: int) -> bytes:
    """The shortest first bytes of a value."""
    short, forms = _FORMS[kind]
    if short and size <= short[1]:
        return bytes([short[0] + size])
    width = next(width for width in forms if size < 256**width)
    return bytes([forms[width]]) + size.to_bytes(width)
