"""MNIST and what took its form, Fashion-MNIST first of all: IDX files (Y. LeCun), plain or compressed by gzip.

A file begins with two zeros, the type (8: unsigned byte) and the number of axes, then every axis as four bytes, the
largest first; values follow.
"""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

from common.datasets.base import Bytes, Dataset, Records, check_labels
from common.errors import DataError
from common.files import reason

_CLASSES = 10
_MOST_BYTES = 1 << 30
_DEFLATE = 1032  # the most that gzip packs into one byte


def find(folder: Path) -> dict[str, Path]:
    """The files of the format in a folder, by ``train-images`` and the like; empty where there is none."""
    found = {}
    for part in ("train", "t10k"):
        for kind, axes in (("images", 3), ("labels", 1)):
            # As published, and as other hands named them.
            names = (f"{part}-{kind}{dot}idx{axes}-ubyte{end}" for end in ("", ".gz") for dot in "-.")
            if path := next((folder / name for name in names if (folder / name).is_file()), None):
                found[f"{part}-{kind}"] = path.absolute()
    return found


def load(folder: Path) -> Dataset:
    """The data set in a folder with files of the format. Raises `DataError`."""
    files = find(folder)
    for name in (f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images", "labels")):
        if name not in files:
            raise DataError(f"{folder}: {name}-idx{3 if name.endswith('images') else 1}-ubyte is missing, plain or .gz")
    train, test = (_part(files[f"{part}-images"], files[f"{part}-labels"]) for part in ("train", "t10k"))
    if train.shape != test.shape:
        raise DataError(f"{folder}: images of {train.shape[:2]} to train on and of {test.shape[:2]} to test with")
    mean, std = _moments(train.parts[0])
    return Dataset(
        name=folder.resolve().name,
        train=train,
        test=test,
        classes=tuple(str(label) for label in range(_CLASSES)),
        channels=1,
        size=(train.shape[0], train.shape[1]),
        mean=(mean,),
        std=(std,),
        recipe="fashion_mnist_224",
    )


def _part(images: Path, labels: Path) -> Records:
    (count, *size), pixels = _read(images, 3)
    (labelled,), values = _read(labels, 1)
    if count != labelled:
        raise DataError(f"{images}: {count} images, and {labelled} labels in {labels.name}; fetch both again")
    rows = values.rows.reshape(-1)
    return Records((pixels,), check_labels(rows.astype(np.int64), _CLASSES, str(labels)), (size[0], size[1], 1))


def _read(path: Path, axes: int) -> tuple[tuple[int, ...], Bytes]:
    """The shape in a file's header, and the values behind it, an example a row. Raises `DataError`."""
    packed = path.suffix == ".gz"
    head = 4 + 4 * axes
    try:
        size = path.stat().st_size
        with gzip.open(path) if packed else path.open("rb") as file:
            header = file.read(head)
            if len(header) < head or header[:4] != bytes([0, 0, 8, axes]):
                expected = f"expected {bytes([0, 0, 8, axes]).hex()}, IDX of bytes with {axes} axes"
                raise DataError(f"{path}: begins with {header[:4].hex() or 'nothing'}; {expected}")
            shape = struct.unpack(f">{axes}I", header[4:])
            wanted, claimed = prod(shape), f"{' x '.join(map(str, shape))} values"
            if not wanted:
                raise DataError(f"{path}: its header says {claimed}; expected some")
            if not packed and size != head + wanted:
                raise DataError(f"{path}: {size} bytes; its header says {head} and {claimed}")
            # Before memory is taken for what a header claims.
            if wanted > min(_DEFLATE * size, _MOST_BYTES):
                raise DataError(f"{path}: its header says {claimed}, more than it can hold")
            rows = (shape[0], wanted // shape[0])
            if not packed:
                return shape, Bytes(path, head, rows)
            content = file.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {reason(error)}; fetch it again") from None
    if len(content) != wanted:
        found = "more" if len(content) > wanted else str(len(content))
        raise DataError(f"{path}: {found} values; its header says {claimed}")
    return shape, Bytes.of(np.frombuffer(content, np.uint8).reshape(rows))


def _moments(pixels: Bytes) -> tuple[float, float]:
    """Mean and deviation of all pixels, of values 0 … 1: 0.1307 and 0.3081 for MNIST, 0.2860 and 0.3530 for
    Fashion-MNIST, as both are usually normalised. From whole counts, so that every machine finds the same."""
    counts = np.zeros(256, np.int64)
    for first in range(0, len(pixels.rows), 4096):
        counts += np.bincount(pixels.rows[first : first + 4096].ravel(), minlength=256)
    total, first, second = (sum(int(n) * value**power for value, n in enumerate(counts)) for power in (0, 1, 2))
    variance = (total * second - first * first) / (255 * total) ** 2
    return first / (255 * total), variance**0.5 or 1.0
