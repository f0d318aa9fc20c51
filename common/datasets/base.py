"""What every data set is to the rest: examples by number, and what their pixels are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from common.architectures.layers import Shape
from common.errors import DataError
from common.files import reason

Seen = Callable[[int, int], None]  # is told how many images of how many were looked at


class Examples(ABC):
    """Images and labels by number. Cheap to hold and to pickle: worker processes get a copy."""

    labels: np.ndarray  # (N,), int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """The image (H, W, C) in uint8, and its label. Raises `DataError` for a file that is unreadable by now."""
        return self.images(np.array([range(len(self))[index]]))[0], int(self.labels[index])

    def checksum(self) -> str:
        """Of what they are and in what order, as far as that is told without reading the images."""
        return sha256(self.labels.astype("<i8").tobytes()).hexdigest()

    @abstractmethod
    def images(self, indices: np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        """The images of these numbers, (H, W, C) in uint8; one array where all have one size. Raises `DataError`."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set, its test part apart from the training part."""

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int] | None  # height and width; None where images differ
    mean: tuple[float, ...]  # by channel, of values 0 … 1
    std: tuple[float, ...]
    recipe: str  # the preset that was made for it, or for what is most like it
    notes: tuple[str, ...] = ()  # what a person should know, as the files that were left out


@dataclass(frozen=True, eq=False)
class Bytes:
    """Bytes as rows of one length: in a file, mapped, and pickled as its place; or in memory."""

    source: Path | np.ndarray
    offset: int
    shape: tuple[int, int]

    @cached_property
    def rows(self) -> np.ndarray:
        """(rows, length) in uint8, read-only."""
        if isinstance(self.source, np.ndarray):
            return self.source
        try:
            return np.memmap(self.source, np.uint8, "r", self.offset, self.shape)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.source}: cannot be read: {reason(error)}") from None

    def __reduce__(self) -> tuple[type["Bytes"], tuple[Path | np.ndarray, int, tuple[int, int]]]:
        return Bytes, (self.source, self.offset, self.shape)

    @classmethod
    def of(cls, rows: np.ndarray) -> "Bytes":
        """Rows that are in memory."""
        return cls(rows, 0, rows.shape)


@dataclass(frozen=True, eq=False)
class Records(Examples):
    """Images of one size, each a row of some array: `skip` bytes, then the pixels."""

    parts: tuple[Bytes, ...]
    labels: np.ndarray
    shape: Shape  # of an image: height, width, channels
    skip: int = 0
    planar: bool = False  # channel after channel, as CIFAR

    def images(self, indices: np.ndarray) -> np.ndarray:
        height, width, channels = self.shape
        rows = np.empty((len(indices), height * width * channels), np.uint8)
        first = 0
        for part in self.parts:
            count = part.shape[0]
            inside = (indices >= first) & (indices < first + count)
            rows[inside] = part.rows[indices[inside] - first, self.skip :]
            first += count
        if self.planar:
            return np.ascontiguousarray(rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))
        return rows.reshape(-1, *self.shape)


class Subset(Examples):
    """Some examples of others, in an order of their own."""

    def __init__(self, whole: Examples, indices: np.ndarray) -> None:
        self.labels = whole.labels[indices]
        self._whole, self._indices = whole, indices

    def images(self, indices: np.ndarray) -> Sequence[np.ndarray] | np.ndarray:
        return self._whole.images(self._indices[indices])


def fixed_permutation(count: int) -> np.ndarray:
    """The numbers below `count` in an order that never changes: whoever splits a data set splits it alike.

    The order of the first words of the bit generator Philox with key 0 (Salmon et al. 2011). NumPy keeps the words of
    its bit generators for good, unlike what is made of them, as its shuffles.
    """
    return np.argsort(np.random.Philox(key=0).random_raw(count), kind="stable")


def check_labels(labels: np.ndarray, classes: int, where: str) -> np.ndarray:
    """`labels` as int64. Raises `DataError` for one that is no class."""
    if wrong := np.flatnonzero((labels < 0) | (labels >= classes)).tolist():
        raise DataError(
            f"{where}: label {labels[wrong[0]]} of example {wrong[0]} is out of range; expected 0 to {classes - 1}"
            f"{f' ({len(wrong)} such labels)' if len(wrong) > 1 else ''}"
        )
    return labels.astype(np.int64)


def lines(names: Iterable[object], most: int = 100) -> str:
    """As `few`, but of many more, and each in a line of its own below a message."""
    listed = [str(name) for name in names]
    more = [f"and {len(listed) - most} more"] if len(listed) > most else []
    return "".join(f"\n  {line}" for line in [*listed[:most], *more])


def few(names: Iterable[object], most: int = 3) -> str:
    """A few names of many, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
