"""Container: PyTorch's zip, what `torch.save` has written since 1.6, read and written without PyTorch.

The tensors lie uncompressed in the archive: they are memory-mapped, and checked against the archive's CRC when they are
first read. Python's zipfile reads the directory and holds each entry's own header to it, so that a changed byte is
found or is one that no value depends on.
"""

import re
import struct
import zlib
from collections.abc import Mapping
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Source, item_size, raw_type, source
from common.checkpoints.containers.pickled import MOST_BYTES, shown
from common.checkpoints.containers.state_dict import (
    WRITTEN,
    Storage,
    little,
    mapped,
    storage_type,
    tensors_in,
    unpickled,
)
from common.errors import CheckpointError
from common.files import written
from common.weights import Weights

_HEAD = b"PK\x03\x04"
_LOCAL_SIZE, _LENGTHS_AT = 30, 26  # bytes of an entry's own header, and where it says how long name and extra are
_FIRST_NAMES = re.compile(rb"[^/]+/(data\.pkl|version|byteorder|\.format_version|data/\d+)")
_ALIGNMENT = 64  # of the storages, as PyTorch writes them


def recognises(path: Path) -> bool:
    """A zip with a pickle named ``data.pkl`` in a folder, or what is left of one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(256)
    if not head.startswith(_HEAD):
        return False
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # zipfile's own, and whatever else damage makes it raise
        return _FIRST_NAMES.match(head[_LOCAL_SIZE:]) is not None


def read(path: Path) -> Source:
    """Raises `CheckpointError`."""
    file = mapped(path)
    entries = _entries(path, file.size)
    folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError(f"{len(folders)} entries named data.pkl in the archive; expected one")
    (folder,) = folders

    def text(name: str, missing: str) -> str:
        entry = entries.get(f"{folder}{name}")
        return missing if entry is None else _data(file, entry).tobytes().decode("latin-1")

    text("version", "")
    text(".format_version", "")
    order = text("byteorder", "little")  # PyTorch before 2.1 states none
    if order not in ("little", "big"):
        raise CheckpointError(f"byteorder is {shown(order)!r}; expected 'little' or 'big'")
    sign: Literal["<", ">"] = "<" if order == "little" else ">"

    # The pickle names a storage once for each of its views; its checksum is wanted once.
    values = cache(
        lambda key, dtype: _data(file, entries[f"{folder}data/{key}"]).view(raw_type(dtype).newbyteorder(sign))
    )

    def persistent(identity: Any) -> Storage:
        match identity:
            case ("storage", named, str(key), _, int(numel)) if 0 <= numel < 2**63:
                dtype = storage_type(named)
                entry = entries.get(f"{folder}data/{key}")
                if entry is None:
                    raise CheckpointError(f"the archive has no storage {shown(key)}; fetch or make the file again")
                if numel * item_size(dtype) != (found := entry.file_size):
                    raise CheckpointError(f"storage {shown(key)} holds {found} bytes, not {numel} elements of {dtype}")
                return Storage(dtype=dtype, numel=numel, values=partial(values, key, dtype))
        raise CheckpointError("its pickle asks for a storage in a way that is not known; fetch or make the file again")

    pickle = entries[f"{folder}data.pkl"]
    if pickle.file_size > MOST_BYTES:
        raise CheckpointError(f"data.pkl has {pickle.file_size} bytes; no state_dict has more than {MOST_BYTES}")
    tensors, notes = tensors_in(unpickled(BytesIO(_data(file, pickle).data), persistent))
    return source("PyTorch zip", tensors, notes=notes)


def _entries(path: Path, size: int) -> dict[str, ZipInfo]:
    """Every entry of the archive by name. Raises `CheckpointError` unless all of them are what a writer leaves."""
    try:
        with ZipFile(path) as archive:
            infos = archive.infolist()
            if any(info.filename.endswith("/constants.pkl") for info in infos):
                raise CheckpointError(
                    "carries code: a TorchScript program; refused. Save the module's state_dict() instead"
                )
            for info in infos:
                if info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                    name = shown(info.filename)
                    raise CheckpointError(f"{name} is compressed or encrypted, which PyTorch does not do; refused")
                archive.open(info).close()  # holds its own header to the directory
    except CheckpointError:
        raise
    except Exception:  # zipfile's own, and whatever else damage makes it raise
        raise CheckpointError(
            "a damaged zip: its directory is missing or changed, as in a file that was not fetched whole; fetch it"
        ) from None
    if sum(info.file_size for info in infos) > size:
        raise CheckpointError("a damaged zip: its entries are said to be larger than the file; fetch it again")
    if infos and all(info.CRC == 0 for info in infos):
        raise CheckpointError(
            "the archive has no CRCs: it was saved after torch.serialization.set_crc32_options(False); save it again"
        )
    entries: dict[str, ZipInfo] = {}
    for info in infos:
        if info.filename in entries:
            raise CheckpointError(f"two entries of the archive are named {shown(info.filename)}; refused")
        entries[info.filename] = info
    return entries


def _data(file: np.ndarray, entry: ZipInfo) -> np.ndarray:
    """The bytes of an entry in the mapped file. Raises `CheckpointError` if they are not those that were written."""
    lengths = struct.unpack_from("<2H", file.data, entry.header_offset + _LENGTHS_AT)
    start = entry.header_offset + _LOCAL_SIZE + sum(lengths)
    data = file[start : start + entry.file_size]
    if zlib.crc32(data.data) != entry.CRC or data.size != entry.file_size:
        raise CheckpointError(f"{shown(entry.filename)} fails its CRC: the file was damaged; fetch or make it again")
    return data


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """A state_dict that `torch.load` takes with ``weights_only=True``, one tensor in memory at a time."""
    with written(path, CheckpointError) as beside, ZipFile(beside, "w", ZIP_STORED) as archive:
        described: dict[str, tuple[str, Shape]] = {}
        for key, name in enumerate(tensors):
            array = little(tensors[name], name)
            described[name] = array.dtype.name, array.shape
            _add(archive, f"archive/data/{key}", array.reshape(-1).view(np.uint8).data)
        # Last, since only now all shapes are known; readers look entries up by name.
        _add(archive, "archive/data.pkl", _pickled(described))
        _add(archive, "archive/byteorder", b"little")
        _add(archive, "archive/version", b"3\n")


def _pickled(described: Mapping[str, tuple[str, Shape]]) -> bytes:
    """The pickle of an OrderedDict of contiguous tensors: opcodes of protocol 2. Storages are numbered in its order."""
    ordered = b"ccollections\nOrderedDict\n)R"
    items = bytearray()
    for key, (name, (dtype, shape)) in enumerate(described.items()):
        kind = f"ctorch\n{WRITTEN[dtype]}Storage\n".encode()
        numel = int(np.prod(shape, dtype=np.int64))
        storage = b"(" + _text("storage") + kind + _text(str(key)) + _text("cpu") + _integer(numel) + b"tQ"
        items += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _integer(0)
        items += _integers(shape) + _integers(np.empty(shape, np.int8).strides) + b"\x89" + ordered + b"tR"
    return b"\x80\x02" + ordered + b"(" + bytes(items) + b"u."


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Shape) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"


def _add(archive: ZipFile, name: str, data: bytes | memoryview) -> None:
    info = ZipInfo(name)  # of 1980: the same weights are the same file
    info.file_size = len(data)
    before = archive.start_dir + _LOCAL_SIZE + len(name) + 4
    padding = -before % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)
