"""Container: safetensors, one file, or several with the index that Hugging Face writes beside them.

A folder stands for the ``model.safetensors`` in it, or for the index in it. Headers are checked here, and not by the
library: it takes duplicate names, and cannot give bfloat16 to NumPy.
"""

import json
from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from common.checkpoints.containers import Source, Stored
from common.checkpoints.containers.state_dict import (
    BFLOAT16,
    item_size,
    little,
    mapped,
    raw_type,
    renamed,
    shown,
    widened,
    widened_type,
)
from common.errors import CheckpointError
from common.files import reason, written
from common.weights import Weights, contiguous

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip
_MOST_JSON = 2**23  # bytes of a header or an index; ResNet-152's header has some 100,000
_MOST_AXES = 32
_MOST_SHARDS = 1000


def recognises(path: Path) -> bool:
    """A length and a JSON header, an index that maps tensors to files, or a folder with one of the two."""
    if path.is_dir():
        return (path / SINGLE).is_file() or (path / INDEX).is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MOST_JSON:
            return True
        return head[:1] == b"{" and b'"weight_map"' in head + file.read(_MOST_JSON)


def read(path: Path) -> Source:
    """Raises `CheckpointError`."""
    if path.is_dir():
        path = path / SINGLE if (path / SINGLE).is_file() else path / INDEX
    file = mapped(path)
    sharded = file[:1].tobytes() == b"{" and file[8:9].tobytes() != b"{"
    stored, types, metadata = _indexed(path, file) if sharded else _tensors(file)
    tensors, notes = renamed(stored)
    if "bfloat16" in types:
        notes = (BFLOAT16, *notes)
    container = "safetensors, sharded" if sharded else "safetensors"
    return Source(container=container, tensors=tensors, metadata=metadata, notes=notes)


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """One file, `metadata` in its header."""
    with written(path, CheckpointError) as beside:
        arrays = contiguous(tensors)
        save_file({name: little(arrays[name], name) for name in arrays}, beside, dict(metadata))


def _tensors(file: np.ndarray) -> tuple[dict[str, Stored], set[str], Mapping[str, str]]:
    """Tensors, the types they are stored as, and metadata of one mapped file."""
    length = int.from_bytes(file[:8].tobytes(), "little")
    if length > min(_MOST_JSON, file.size - 8):
        raise CheckpointError(f"its header claims {length} bytes of a file with {file.size}; fetch or make it again")
    header = _object(file[8 : 8 + length], "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("its metadata are not names with strings; make the file again")
    data, ranges, tensors, types = file[8 + length :], [], {}, set()
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"its header does not say type, shape and place of {shown(name)}; make it again")
        if dtype not in _DTYPES:
            raise CheckpointError(f"{shown(name)} is stored as {shown(dtype)}, which is not read here; store it as F32")
        if len(shape) > _MOST_AXES or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise CheckpointError(f"{shown(name)} has a shape that is none; fetch or make the file again")
        stored = _DTYPES[dtype]
        if not 0 <= start <= end <= data.size or end - start != prod(shape) * item_size(stored):
            raise CheckpointError(
                f"{shown(name)} of shape {shown(tuple(shape))} lies at bytes {shown(start)} to {shown(end)} of "
                f"{data.size}: no room for it, or too much; fetch or make the file again"
            )
        ranges.append((start, end))
        types.add(stored)
        read = partial(_read, data[start:end], stored, tuple(shape))
        tensors[name] = Stored(shape=tuple(shape), dtype=widened_type(stored), read=read)
    _check_ranges(ranges, data.size)
    return tensors, types, metadata


def _check_ranges(ranges: list[tuple[int, int]], size: int) -> None:
    """Every byte belongs to one tensor."""
    at = 0
    for start, end in sorted(ranges):
        if start != at:
            what = "overlap" if start < at else "leave a gap"
            raise CheckpointError(f"the ranges of its tensors {what} at byte {start}; fetch or make the file again")
        at = end
    if at != size:
        raise CheckpointError(f"{size - at} bytes follow the last tensor; fetch or make the file again")


def _read(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return widened(raw.view(raw_type(dtype)).reshape(shape), dtype)


def _indexed(path: Path, file: np.ndarray) -> tuple[dict[str, Stored], set[str], Mapping[str, str]]:
    """The tensors of all files that an index names, each in the file that it is listed in."""
    if file.size > _MOST_JSON:
        raise CheckpointError(f"an index of {file.size} bytes; expected at most {_MOST_JSON}")
    listed = _object(file, "the index").get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError("the index has no weight_map from tensors to files; make it again")
    shards = sorted(set(listed.values()))
    if len(shards) > _MOST_SHARDS:
        raise CheckpointError(f"the index names {len(shards)} files; expected at most {_MOST_SHARDS}")
    tensors: dict[str, Stored] = {}
    types: set[str] = set()
    metadata: dict[str, str] = {}
    for shard in shards:
        try:
            inside, more, about = _tensors(mapped(_shard(path.parent, shard)))
        except CheckpointError as error:
            raise CheckpointError(f"{shown(shard)}: {error}") from None
        here = {name for name, file_name in listed.items() if file_name == shard}
        if here != inside.keys():
            some = ", ".join(map(shown, sorted(here ^ inside.keys())[:4]))
            raise CheckpointError(f"the index and {shown(shard)} do not agree on what is in it: {some}")
        tensors |= inside
        types |= more
        metadata |= about
    return {name: tensors[name] for name in listed}, types, metadata


def _shard(folder: Path, name: str) -> Path:
    """A file in the index's own folder. Raises `CheckpointError` for any way out of it."""
    if not name.isprintable() or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError("not the plain name of a file in the folder of the index; refused")
    path = folder / name
    if not path.is_file():
        raise CheckpointError("there is no such file beside the index; fetch it too")
    home, target = folder.resolve(), path.resolve()
    # Hugging Face's cache keeps all files of a repository in one folder, and links to them from the folder of each
    # revision.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise CheckpointError("a link out of the folder of the index; refused")
    return path


def _object(raw: np.ndarray, what: str) -> dict[str, Any]:
    """A JSON object, its names unique. Raises `CheckpointError`."""
    try:
        found = json.loads(raw.tobytes().decode(), object_pairs_hook=_unique)
    except CheckpointError as error:
        raise CheckpointError(f"{what} {error}") from None
    except (ValueError, RecursionError) as error:
        said = reason(error) if isinstance(error, json.JSONDecodeError) else "no text, or nested too deep"
        raise CheckpointError(f"{what} is no JSON ({said}); fetch or make the file again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is a JSON {type(found).__name__}; expected an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"has {shown(name)} twice; refused")
        found[name] = value
    return found
