"""Container: safetensors, one file, or several with the index that Hugging Face writes beside them.

A folder stands for the ``model.safetensors`` in it, or for the index in it.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from common.checkpoints.containers import Source, Stored, raw_type, source
from common.checkpoints.containers.pickled import shown
from common.checkpoints.containers.state_dict import (
    aligned,
    little,
    renamed,
)
from common.errors import CheckpointError
from common.files import DTYPES, Entry, entries, written
from common.weights import Weights, contiguous

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TYPES = {"BF16": "bfloat16", **{name: np.dtype(dtype).name for name, dtype in DTYPES.items()}}
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


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return head[:1] == b"{" and head[8:] != b"{"


def read(path: Path) -> Source:
    """Raises `CheckpointError`."""
    if path.is_dir():
        path = path / SINGLE if (path / SINGLE).is_file() else path / INDEX
    sharded = _is_index(path)
    stored, metadata = (_indexed if sharded else _tensors)(path)
    tensors, notes = renamed(stored)
    container = "safetensors, sharded" if sharded else "safetensors"
    return source(container, tensors, metadata=metadata, notes=notes)


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """One file, `metadata` in its header."""
    with written(path, CheckpointError) as beside:
        arrays = contiguous(tensors)
        save_file({name: little(arrays[name], name) for name in arrays}, beside, dict(metadata))


def _tensors(path: Path) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """Tensors and metadata of one file."""
    found, metadata = entries(path, CheckpointError)
    for name, entry in found.items():
        if entry.dtype not in _TYPES:
            raise CheckpointError(
                f"{shown(name)} is stored as {shown(entry.dtype)}, which is not read here; store it as F32"
            )
        if len(entry.shape) > _MOST_AXES or max(entry.shape, default=0) > 2**40:
            raise CheckpointError(f"{shown(name)} has a shape that is none; fetch or make the file again")
    tensors = {
        name: Stored(
            shape=entry.shape, dtype=_TYPES[entry.dtype], read=partial(_read, entry, raw_type(_TYPES[entry.dtype]))
        )
        for name, entry in found.items()
    }
    return tensors, metadata


def _read(entry: Entry, dtype: np.dtype) -> np.ndarray:
    return aligned(entry.raw.view(dtype).reshape(entry.shape))


def _indexed(path: Path) -> tuple[dict[str, Stored], Mapping[str, str]]:
    """The tensors of all files that an index names, each in the file that it is listed in."""
    if path.stat().st_size > _MOST_JSON:
        raise CheckpointError(f"an index of more than {_MOST_JSON} bytes")
    try:
        listed = json.loads(path.read_bytes())["weight_map"]
    # Of JSON that is something else, the look-up raises its own.
    except (ValueError, RecursionError, KeyError, TypeError):
        listed = None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError("the index has no weight_map from tensors to files; fetch or make it again")
    shards = sorted(set(listed.values()))
    if len(shards) > _MOST_SHARDS:
        raise CheckpointError(f"the index names {len(shards)} files; expected at most {_MOST_SHARDS}")
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        try:
            inside, about = _tensors(_shard(path.parent, shard))
        except CheckpointError as error:
            raise CheckpointError(f"{shown(shard)}: {error}") from None
        here = {name for name, file_name in listed.items() if file_name == shard}
        if here != inside.keys():
            some = ", ".join(map(shown, sorted(here ^ inside.keys())[:4]))
            raise CheckpointError(f"the index and {shown(shard)} do not agree on what is in it: {some}")
        tensors |= inside
        metadata |= about
    return {name: tensors[name] for name in listed}, metadata


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
