"""Container: what `torch.save` wrote before 1.6, pickles with the storages behind them, without PyTorch.

The format has no checksum. Its storages are little-endian whatever machine wrote them.
"""

import pickle
import struct
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.checkpoints.containers import Source, item_size, raw_type, source
from common.checkpoints.containers.pickled import MOST_BYTES, shown
from common.checkpoints.containers.state_dict import (
    Storage,
    mapped,
    storage_type,
    tensors_in,
    unpickled,
)
from common.errors import CheckpointError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAGIC_OPCODE = pickle.dumps(_MAGIC, protocol=2)[2:-1]
_TAR = slice(257, 262)


def recognises(path: Path) -> bool:
    """PyTorch's magic number, pickled. A tar or a bare pickle too, to be refused with a reason."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(512)
        if head[:1] != b"\x80":
            return head[_TAR] == b"ustar"
        if _is_ours(head):
            return True
        file.seek(-1, 2)
        return 2 <= head[1] <= 5 and file.read(1) == b"." if len(head) > 2 else False


def read(path: Path) -> Source:
    """Raises `CheckpointError`."""
    file = mapped(path)
    head = file[:512].tobytes()
    if head[_TAR] == b"ustar":
        raise CheckpointError("a tar archive: PyTorch's format of before 2017; load it with PyTorch and save it again")
    if not _is_ours(head):
        # Reading it says what it asks for, if that is code.
        unpickled(BytesIO(file[:MOST_BYTES].tobytes()), lambda identity: identity)
        raise CheckpointError("a bare pickle, not a PyTorch file; save a state_dict with torch.save")
    stream = BytesIO(file[:MOST_BYTES].tobytes())
    storages: dict[str, tuple[str, int]] = {}
    starts: dict[str, int] = {}

    def values(key: str, first: int, numel: int) -> np.ndarray:
        dtype = raw_type(storages[key][0]).newbyteorder("<")
        start = starts[key] + first * dtype.itemsize
        return file[start : start + numel * dtype.itemsize].view(dtype)

    def persistent(identity: Any) -> Storage:
        match identity:
            case ("storage", named, str(key), _, int(numel), view) if 0 <= numel < 2**63:
                dtype = storage_type(named)
                if storages.setdefault(key, (dtype, numel)) != (dtype, numel):
                    raise CheckpointError(f"storage {shown(key)} is described in two ways; make the file again")
                match view:
                    case None:
                        first, count = 0, numel
                    case (_, int(first), int(count)) if 0 <= first <= first + count <= numel:
                        pass
                    case _:
                        raise CheckpointError(f"a view reaches out of storage {shown(key)}; make the file again")
                return Storage(dtype=dtype, numel=count, values=partial(values, key, first, count))
        raise CheckpointError("its pickle asks for more than storages, as a whole pickled model does; refused")

    for what, expected in (("magic number", _MAGIC), ("protocol version", _PROTOCOL)):
        if unpickled(stream, persistent) != expected:
            raise CheckpointError(f"the {what} is not {expected}; fetch or make the file again")
    unpickled(stream, persistent)  # sizes of types on the machine that wrote it
    root = unpickled(stream, persistent)
    keys = unpickled(stream, persistent)
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise CheckpointError("its list of storages is not that of its tensors; fetch or make the file again")
    starts |= _starts(file, stream, [str(key) for key in keys], storages)
    tensors, notes = tensors_in(root)
    return source("PyTorch, before 1.6", tensors, notes=notes)


def _is_ours(head: bytes) -> bool:
    # The protocol is the caller's of torch.save to choose; from 4 on, a frame comes before the number.
    return head[:1] == b"\x80" and _MAGIC_OPCODE in head[:32]


def _starts(
    file: np.ndarray, stream: IO[bytes], keys: list[str], storages: dict[str, tuple[str, int]]
) -> dict[str, int]:
    """Where the elements of each storage begin. Raises `CheckpointError` where the file is not exactly those."""
    at, starts = stream.tell(), {}
    for key in keys:
        dtype, numel = storages[key]
        counted = file[at : at + 8].tobytes()
        starts[key] = at + 8
        at += 8 + numel * item_size(dtype)
        if len(counted) < 8 or at > file.size:
            raise CheckpointError(f"the file ends at byte {file.size}, inside of its storages; fetch it again")
        if counted != struct.pack("<Q", numel):
            raise CheckpointError(f"a storage counts another number of elements than the {numel} of its tensor")
    if at != file.size:
        raise CheckpointError(f"{file.size - at} bytes follow the last storage; fetch or make the file again")
    return starts
