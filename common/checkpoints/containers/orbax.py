"""Container: the folder of an orbax checkpoint, read through tensorstore, which orbax itself writes it with.

Every array is a zarr store under its path, joined by dots; by default all of them are inside one OCDBT database, whose
manifest is `manifest.ocdbt`. `_METADATA` holds the tree. A run has a folder for every step, a step one for every item.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from common.checkpoints.containers import Source, Stored
from common.checkpoints.containers.trees import DTYPES, variables
from common.errors import CheckpointError
from common.files import reason

_TREE, _MANIFEST, _STEP = "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"
_STEP_NAME = re.compile(r"(?:.*[^0-9])?([0-9]+)")
_UNFINISHED = ".orbax-checkpoint-tmp"
_USUAL_ITEMS = ("default", "state", "params", "model")

# Arrays are compressed, zeros to almost nothing: they may have so many times the bytes of their folder, and not more.
_MOST_RATIO, _ALWAYS = 16, 2**26
_MOST_TREE_BYTES = 2**24
_MOST_FILES = 200_000
_LONGEST_KEY = 256
_CACHE = {"cache_pool": {"total_bytes_limit": 2**24}}  # of the nodes of the database, which every array needs


def recognises(path: Path) -> bool:
    """Whether a folder is a checkpoint, or a run's or step's folder with one in it."""
    try:
        return path.is_dir() and ((path / _STEP).is_file() or _is_item(path) or bool(_steps(path) or _items(path)))
    except OSError:
        return False


def read(path: Path) -> Source:
    """The arrays of the newest step. Raises `CheckpointError` for a folder that is damaged or leads out of itself."""
    try:
        folder, notes = _newest(path)
        size = _bytes_in(folder)
        opened = _opened(folder, _metadata(folder))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {reason(error)}") from None
    stores = {name: _result(name, store.result) if store is not None else None for name, store in opened.items()}
    claimed = sum(_claimed(store) for store in stores.values() if store is not None)
    if claimed > _ALWAYS + _MOST_RATIO * size:
        raise CheckpointError(f"its arrays claim {claimed} bytes, in a folder of {size}; is it whole?")
    leaves = {name: _stored(name, store) if store is not None else None for name, store in stores.items()}
    return variables(leaves, "orbax", notes)


def _is_item(folder: Path) -> bool:
    return (folder / _TREE).is_file() or (folder / _MANIFEST).is_file()


def _folders(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and _UNFINISHED not in entry.name:
            yield Path(entry.path)


def _items(folder: Path) -> list[Path]:
    return [child for child in _folders(folder) if _is_item(child)]


def _steps(folder: Path) -> dict[int, Path]:
    """The steps that a run has kept, by number."""
    found = [(match, child) for child in _folders(folder) if (match := _STEP_NAME.fullmatch(child.name))]
    return {int(match[1]): child for match, child in found if _is_item(child) or _items(child)}


def _newest(path: Path) -> tuple[Path, list[str]]:
    """The folder with the arrays, and what was chosen on the way there."""
    notes = []
    if not _is_item(path) and (steps := _steps(path)):
        path = steps[max(steps)]
        notes.append(f"step {max(steps)}, the newest of {len(steps)}")
    if _is_item(path):
        return path, notes
    items = {child.name: child for child in _items(path)}
    usual = [name for name in _USUAL_ITEMS if name in items]
    if not usual and len(items) != 1:
        held = f"the items {', '.join(items)}; expected one, or one called state" if items else "no item with arrays"
        raise CheckpointError(f"the folder holds {held}")
    name = usual[0] if usual else next(iter(items))
    return items[name], notes


def _bytes_in(folder: Path) -> int:
    """Size of all files in a folder, none of which may be elsewhere."""
    total = count = 0
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry, count = Path(parent, name), count + 1
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()) or count > _MOST_FILES:
                raise CheckpointError(
                    f"{entry.relative_to(folder)} is a link or no file, or one of more than {_MOST_FILES}; nothing "
                    "outside of the folder is read"
                )
            total += entry.stat().st_size
    return total


def _metadata(folder: Path) -> Mapping[str, Any]:
    """What `_METADATA` says; nothing where it is not there, as orbax once wrote it."""
    path = folder / _TREE
    if not path.exists():
        return {}
    if path.stat().st_size > _MOST_TREE_BYTES:
        raise CheckpointError(f"{_TREE} is larger than {_MOST_TREE_BYTES} bytes; no tree of weights is")
    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{_TREE} is damaged: {reason(error)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("tree_metadata"), dict):
        raise CheckpointError(f"{_TREE} has no tree_metadata; is the folder whole?")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _opened(folder: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path of every leaf -> its store, about to open; None for what is no array."""
    base: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/"}
    if (folder / _MANIFEST).exists():
        base = {"driver": "ocdbt", "base": base}
    context = tensorstore.Context(_CACHE)
    if tree:
        driver = "zarr3" if tree.get("use_zarr3") is True else "zarr"
        stores = {name: (key, driver) for name, key in _leaves(tree["tree_metadata"])}
    else:
        stores = _listed(base, context)
    # Orbax leaves out what equals the fill value unless it says otherwise. Then what is missing was lost.
    whole = {"fill_missing_data_reads": False} if tree.get("store_array_data_equal_to_fill_value") is True else {}
    opened: dict[str, Any] = {}
    for name, (key, driver) in stores.items():
        spec = {"driver": driver, "kvstore": base | {"path": f"{base.get('path', '')}{key}/"}, **whole}
        start = partial(tensorstore.open, spec, open=True, read=True, context=context)
        opened[name] = _result(name, start) if key else None
    return opened


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, key of the store) of every leaf of `tree_metadata`; no key for what is no array."""
    seen = set()
    for row in tree.values():
        try:
            keys = [part["key"] for part in row["key_metadata"]]
            kind, skipped = row["value_metadata"]["value_type"], row["value_metadata"].get("skip_deserialize", False)
        except (TypeError, KeyError, AttributeError):
            raise CheckpointError(f"{_TREE} is damaged: an entry is not a list of keys and a type") from None
        if not keys or not all(map(_is_name, keys)):
            shown = "/".join(map(str, keys))[:80]
            raise CheckpointError(f"{_TREE} names an array {shown!r}; expected short printable names, without slashes")
        name = "/".join(keys)
        if name in seen:
            raise CheckpointError(f"{_TREE} is damaged: {name} is there twice")
        seen.add(name)
        if not skipped:  # an empty dict, or None
            yield name, "" if kind == "string" else ".".join(keys)


def _is_name(key: Any) -> bool:
    """Whether a key may stand in the path of a store, and in a message."""
    printable = isinstance(key, str) and key.isprintable() and len(key) <= _LONGEST_KEY
    return printable and not set(key) & set("/\\") and key not in ("", ".", "..")


def _listed(base: Mapping[str, Any], context: tensorstore.Context) -> dict[str, tuple[str, str]]:
    """The stores of a database without a tree: path -> (key, driver)."""
    stores = {}
    for key in _result("the folder", lambda: tensorstore.KvStore.open(base, context=context).result().list().result()):
        store, _, last = key.decode(errors="replace").rpartition("/")
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(last)
        if driver and _is_name(store):
            stores[store.replace(".", "/")] = store, driver
    return stores


def _claimed(store: Any) -> int:
    """Bytes that reading an array takes: its own, or those of a chunk, which may be larger."""
    chunks = store.chunk_layout.read_chunk.shape, store.chunk_layout.write_chunk.shape
    itemsize: int = DTYPES.get(store.dtype.name, 0)
    return itemsize * max(prod(map(int, shape)) for shape in (store.shape, *filter(None, chunks)))


def _stored(name: str, store: Any) -> Stored:
    return Stored(shape=tuple(store.shape), dtype=store.dtype.name, read=partial(_read, name, store))


def _read(name: str, store: Any) -> np.ndarray:
    array: np.ndarray = _result(name, lambda: store.read().result())
    return array.view(np.uint16) if store.dtype.name == "bfloat16" else array


def _result(name: str, call: Callable[[], Any]) -> Any:
    """What a call of tensorstore returns, whose errors are of many types and tell of their whole way."""
    try:
        return call()
    except Exception as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)[:300]}") from None
