"""Container: PyTorch's zip, what `torch.save` has written since 1.6, read and written without PyTorch.

The tensors lie uncompressed in the archive: they are memory-mapped, and checked against the archive's CRC when they are
first read. Every entry that is used must be described alike in the directory and before its data, so that a changed
byte is found or is one that no value depends on.
"""

import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Source, pickled
from common.checkpoints.containers.state_dict import (
    WRITTEN,
    Storage,
    item_size,
    little,
    mapped,
    raw_type,
    shown,
    storage_type,
    tensors_in,
)
from common.errors import CheckpointError
from common.files import written
from common.weights import Weights

_HEAD = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3I2H")  # signature, …, length of the name, length of the extra field
_FIRST_NAMES = re.compile(rb"[^/]+/(data\.pkl|version|byteorder|\.format_version|data/\d+)")
_MOST_PICKLED = 2**25  # bytes; a state_dict with optimiser state of ResNet-152 has some 300,000
_ALIGNMENT = 64  # of the storages, as PyTorch writes them
# What zipfile raises for one damaged archive or another.
_DAMAGED = (
    BadZipFile,
    ValueError,
    NotImplementedError,
    EOFError,
    struct.error,
    OverflowError,
    LookupError,
    MemoryError,
)


@dataclass(frozen=True)
class _Entry:
    name: str
    start: int
    data: np.ndarray  # its bytes in the mapped file
    crc: int


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
    except _DAMAGED:
        return _FIRST_NAMES.match(head[_LOCAL.size :]) is not None


def read(path: Path) -> Source:
    """Raises `CheckpointError`."""
    entries = _entries(path)
    folders = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise CheckpointError(f"{len(folders)} entries named data.pkl in the archive; expected one")
    (folder,) = folders
    for name in ("version", ".format_version"):
        if name_in_folder := entries.get(f"{folder}{name}"):
            _checked(name_in_folder)
    order = _byte_order(entries.get(f"{folder}byteorder"))

    # The pickle names a storage once for each of its views; its checksum is wanted once.
    values = cache(lambda key, dtype: _values(entries[f"{folder}data/{key}"], raw_type(dtype, order)))

    def persistent(identity: Any) -> Storage:
        match identity:
            case ("storage", named, str(key), _, int(numel)) if 0 <= numel < 2**63:
                dtype = storage_type(named)
                entry = entries.get(f"{folder}data/{key}")
                if entry is None:
                    raise CheckpointError(f"the archive has no storage {shown(key)}; fetch or make the file again")
                if numel * item_size(dtype) != entry.data.size:
                    found = entry.data.size
                    raise CheckpointError(f"storage {shown(key)} holds {found} bytes, not {numel} elements of {dtype}")
                return Storage(dtype=dtype, numel=numel, values=partial(values, key, dtype))
        raise CheckpointError("its pickle asks for a storage in a way that is not known; fetch or make the file again")

    pickle = entries[f"{folder}data.pkl"]
    if pickle.data.size > _MOST_PICKLED:
        raise CheckpointError(f"data.pkl has {pickle.data.size} bytes; no state_dict has more than {_MOST_PICKLED}")
    root = pickled.read(BytesIO(_checked(pickle).data), persistent)
    tensors, notes = tensors_in(root)
    return Source(container="PyTorch zip", tensors=tensors, notes=notes)


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """A state_dict that `torch.load` takes with ``weights_only=True``, one tensor in memory at a time."""
    with written(path, CheckpointError) as beside, ZipFile(beside, "w", ZIP_STORED) as archive:
        described: dict[str, tuple[str, Shape]] = {}
        for key, name in enumerate(tensors):
            array = little(tensors[name], name)
            described[name] = array.dtype.name, array.shape
            _add(archive, f"archive/data/{key}", array.reshape(-1).view(np.uint8).data)
        # Last, since only now all shapes are known; readers look entries up by name.
        _add(archive, "archive/data.pkl", pickle_of(described, _storage))
        _add(archive, "archive/byteorder", b"little")
        _add(archive, "archive/version", b"3\n")


def pickle_of(described: dict[str, tuple[str, Shape]], storage: Callable[[int, str, int], bytes]) -> bytes:
    """The pickle of an OrderedDict of contiguous tensors; `storage` gives the opcodes for (key, dtype, elements)."""
    ordered = b"ccollections\nOrderedDict\n)R"
    items = bytearray()
    for key, (name, (dtype, shape)) in enumerate(described.items()):
        strides = np.empty(shape, np.int8).strides
        items += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        items += storage(key, dtype, int(np.prod(shape, dtype=np.int64))) + integer(0)
        items += _integers(shape) + _integers(strides) + b"\x89" + ordered + b"tR"
    return b"\x80\x02" + ordered + b"(" + bytes(items) + b"u."


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    """The opcode that pushes an integer."""
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def storage_global(dtype: str) -> bytes:
    """The opcode that pushes the type of a storage."""
    return f"ctorch\n{WRITTEN[dtype]}Storage\n".encode()


def _storage(key: int, dtype: str, numel: int) -> bytes:
    return b"(" + text("storage") + storage_global(dtype) + text(str(key)) + text("cpu") + integer(numel) + b"tQ"


def _integers(values: Shape) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def _add(archive: ZipFile, name: str, data: bytes | memoryview) -> None:
    info = ZipInfo(name)  # of 1980: the same weights are the same file
    info.file_size = len(data)
    before = archive.start_dir + _LOCAL.size + len(name) + 4
    padding = -before % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w") as entry:
        entry.write(data)


def _entries(path: Path) -> dict[str, _Entry]:
    """Every entry of the archive by name. Raises `CheckpointError` unless all of them are what a writer leaves."""
    file = mapped(path)
    try:
        with ZipFile(path) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (*_DAMAGED, OSError):
        raise CheckpointError(
            "a damaged zip: its directory is missing or changed, as in a file that was not fetched whole; fetch it"
        ) from None
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise CheckpointError("carries code: a TorchScript program; refused. Save the module's state_dict() instead")
    entries: dict[str, _Entry] = {}
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        entry = _entry(file, info, end)
        if entry.name in entries:
            raise CheckpointError(f"two entries of the archive are named {shown(entry.name)}; refused")
        entries[entry.name] = entry
        end = entry.start
    if entries and all(entry.crc == 0 for entry in entries.values()):
        raise CheckpointError(
            "the archive has no CRCs: it was saved after torch.serialization.set_crc32_options(False); save it again"
        )
    return entries


def _entry(file: np.ndarray, info: ZipInfo, end: int) -> _Entry:
    """An entry whose data have to end before `end`, where the next one begins."""
    name, start = info.orig_filename, info.header_offset
    if info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise CheckpointError(f"{shown(name)} is compressed or encrypted, which PyTorch does not do; refused")
    data = start + _LOCAL.size
    if 0 <= start <= data <= end:
        signature, *_, crc, _, size, name_length, extra_length = _LOCAL.unpack(file[start:data].tobytes())
        data += name_length
        local_name = file[start + _LOCAL.size : min(data, end)].tobytes()
        data += extra_length
        # The header before the data has the CRC and the size too, or zeros where they follow the data.
        agrees = signature == _HEAD and local_name == name.encode() and crc in (0, info.CRC)
        if agrees and data + info.file_size <= end and size in (0, info.file_size, 2**32 - 1):
            return _Entry(name, start, file[data : data + info.file_size], info.CRC)
    raise CheckpointError(
        f"a damaged zip: {shown(name)} overlaps another entry, or is not what the directory says; fetch it again"
    )


def _checked(entry: _Entry) -> np.ndarray:
    """The bytes of an entry. Raises `CheckpointError` if they are not those that were written."""
    if zlib.crc32(entry.data.data) != entry.crc:
        raise CheckpointError(f"{shown(entry.name)} fails its CRC: the file was damaged; fetch or make it again")
    return entry.data


def _values(entry: _Entry, dtype: np.dtype[Any]) -> np.ndarray:
    return _checked(entry).view(dtype)


def _byte_order(entry: _Entry | None) -> Literal["<", ">"]:
    """NumPy's sign for the order that the archive states; PyTorch before 2.1 states none."""
    stated = "little" if entry is None else _checked(entry).tobytes().decode("latin-1")
    if stated not in ("little", "big"):
        raise CheckpointError(f"byteorder is {shown(stated)!r}; expected 'little' or 'big'")
    return "<" if stated == "little" else ">"
