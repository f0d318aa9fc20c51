"""Texts among the attributes of an HDF5 object, read without libhdf5.

libhdf5 makes room for as many bytes as a text claims to have before it looks whether they are there, and goes round
for ever in a damaged heap. What follows is the little of the file format (HDF5 File Format Specification 3.0, sections
III.E, IV.A.1, IV.A.2.m and IV.A.2.q) that the names of Keras' layers need; all of it ends.
"""

import struct
from collections.abc import Iterator

import numpy as np

_ATTRIBUTE, _CONTINUATION = 0x0C, 0x10  # messages of an object header
_VARIABLE_LENGTH = 9  # class of a datatype
_MOST_BLOCKS = 100  # of one header
_LONGEST_HEAP = 1 << 16  # bytes; HDF5 makes them of 4096
_HEAP = struct.Struct("<4s4xQ")
_HEAP_OBJECT = struct.Struct("<H6xQ")
_REFERENCE = struct.Struct("<IQI")  # length of a text, the heap it is in, and its number there


def text_attribute(content: np.ndarray, address: int, name: str) -> str | None:
    """The text attribute `name` of the object whose header is at `address` of a file; None where there is none.

    Raises `ValueError` or `struct.error` where it is damaged, or is no text of variable length as h5py writes it.
    """
    for message in _messages(content, address):
        version, *sizes = struct.unpack_from("<BxHHH", message)  # of name, type and shape, which come in this order
        start = 9 if version == 3 else 8
        if message[start : start + sizes[0]].rstrip(b"\0") != name.encode():
            continue
        padding = 8 if version == 1 else 1
        name_size, type_size, shape_size = (-(-size // padding) * padding for size in sizes)
        datatype = start + name_size
        if message[datatype] & 0x0F != _VARIABLE_LENGTH:
            raise ValueError(f"the attribute {name} is no text of variable length")
        length, heap, number = _REFERENCE.unpack_from(message, datatype + type_size + shape_size)
        text = _heap_object(content, heap, number)
        if len(text) != length:
            raise ValueError(f"the attribute {name} has {len(text)} bytes, {length} expected")
        return text.rstrip(b"\0").decode()
    return None


def _messages(content: np.ndarray, address: int) -> Iterator[bytes]:
    """Every attribute in an object header, of either version of those."""
    start = _piece(content, address, 28)
    newer = start.startswith(b"OHDR")
    if newer:
        flags = start[5]
        at = 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        width = 1 << (flags & 3)
        blocks = [(address + at + width, int.from_bytes(start[at : at + width].ljust(width, b"\0"), "little"))]
        head = struct.Struct("<BHx2x" if flags & 4 else "<BHx")
    else:
        blocks = [(address + 16, int.from_bytes(start[8:12], "little"))]
        head = struct.Struct("<HH4x")
    for number, (where, size) in enumerate(blocks):  # grows by the continuations met
        block = _piece(content, where, size)
        # In the newer version, a continuation has a signature before it and a checksum after it.
        at, end = (4, len(block) - 4) if newer and number else (0, len(block))
        while at + head.size <= end:
            kind, length = head.unpack_from(block, at)
            message = block[at + head.size : at + head.size + length]
            if kind == _CONTINUATION and len(blocks) < _MOST_BLOCKS:
                blocks.append(struct.unpack_from("<QQ", message))
            elif kind == _ATTRIBUTE:
                yield message
            at += head.size + length


def _heap_object(content: np.ndarray, heap: int, number: int) -> bytes:
    """Object `number` of the global heap at address `heap`."""
    signature, size = _HEAP.unpack(_piece(content, heap, _HEAP.size))
    if signature != b"GCOL" or size > _LONGEST_HEAP:
        raise ValueError("a heap of texts is damaged")
    block = _piece(content, heap, size)
    at = _HEAP.size
    while at + _HEAP_OBJECT.size <= len(block):
        found, length = _HEAP_OBJECT.unpack_from(block, at)
        at += _HEAP_OBJECT.size
        if found == number:
            return block[at : at + length]
        at += -(-length // 8) * 8
    raise ValueError("a heap of texts is damaged")


def _piece(content: np.ndarray, start: int, size: int) -> bytes:
    return content[start : start + size].tobytes()
