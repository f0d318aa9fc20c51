"""The public archives of CIFAR and MNIST written small, byte by byte, for the tests."""

import gzip
import io
import struct
import tarfile

import numpy as np


def idx(array):
    """An array of bytes as IDX."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", side) for side in array.shape)
    return header + np.ascontiguousarray(array, np.uint8).tobytes()


def mnist(folder, train, test, *, ending="", dot="-"):
    """The four files; `train` and `test` are (images, labels)."""
    for part, (images, labels) in (("train", train), ("t10k", test)):
        for name, array in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
            content = idx(array)
            path = folder / f"{part}-{name}-ubyte{ending}"
            path.write_bytes(gzip.compress(content, mtime=0) if ending == ".gz" else content)


def records(images, labels, coarse=None):
    """CIFAR's binary form: labels, then red, green and blue planes, of images (N, 32, 32, 3)."""
    columns = [labels] if coarse is None else [coarse, labels]
    heads = np.stack(columns, axis=1).astype(np.uint8)
    return np.concatenate([heads, planes(images)], axis=1).tobytes()


def planes(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


class Python2Pickle:
    """What Python 2's pickle writes for dictionaries, lists, strings, integers and arrays of bytes.

    Protocol 2 is what the data are published in; 0 is the text form. Python 3 writes neither: its strings are unicode.
    """

    def __init__(self, protocol):
        self.protocol = protocol
        self.out = bytearray(b"\x80\x02" if protocol == 2 else b"")
        self.memo = 0

    def dump(self, value):
        self.save(value)
        return bytes(self.out + b".")

    def put(self):
        self.memo += 1
        if self.protocol == 0:
            self.out += b"p%d\n" % self.memo
        else:
            self.out += b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)

    def save(self, value):
        if isinstance(value, dict):
            self.out += b"}" if self.protocol else b"(d"
            self.put()
            for key, item in value.items():
                self.save(key)
                self.save(item)
                self.out += b"s"
        elif isinstance(value, list):
            self.out += b"]" if self.protocol else b"(l"
            self.put()
            for item in value:
                self.save(item)
                self.out += b"a"
        elif isinstance(value, bytes):
            self.string(value)
        elif isinstance(value, str):
            self.string(value.encode("latin-1"))
        elif isinstance(value, bool):
            self.out += (b"\x89", b"\x88")[value] if self.protocol else b"I0%d\n" % value
        elif isinstance(value, int):
            small = self.protocol and 0 <= value < 256
            self.out += b"K" + bytes([value]) if small else b"I%d\n" % value
        elif value is None:
            self.out += b"N"
        elif isinstance(value, tuple):
            self.out += b"("
            for item in value:
                self.save(item)
            self.out += b"t"
        elif isinstance(value, np.ndarray):
            self.array(value)

    def string(self, value):
        if self.protocol == 0:
            # repr() of a byte string, as Python 2 writes it.
            self.out += b"S" + repr(value)[1:].encode("ascii") + b"\n"
        elif len(value) < 256:
            self.out += b"U" + bytes([len(value)]) + value
        else:
            self.out += b"T" + struct.pack("<i", len(value)) + value
        self.put()

    def array(self, array):
        self.out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        self.save((0,))
        self.string(b"b")
        self.out += b"tR"
        self.put()
        self.out += b"("
        self.save(1)
        self.save(array.shape)
        self.out += b"cnumpy\ndtype\n("
        self.string(array.dtype.str[1:].encode())
        self.save(0)
        self.save(1)
        self.out += b"tR"
        self.save((3, array.dtype.str[:1], None, None, None, -1, -1, 0))
        self.out += b"b"
        self.save(False)
        self.string(array.tobytes())
        self.out += b"tb"


def pickled(value, protocol=2):
    return Python2Pickle(protocol).dump(value)


def tar(files, *, folder="cifar", packed=True):
    """A .tar.gz or .tar of these files (name to content) in a folder, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if packed else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
