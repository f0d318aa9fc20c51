"""Data sets: scikit-learn's digits, CIFAR, MNIST and its like, and folders of photographs. Nothing is downloaded."""

from pathlib import Path

from common.datasets import cifar, digits, folder, idx
from common.datasets.base import Dataset, Examples, Records, Seen, Subset
from common.errors import DataError
from common.files import reason

__all__ = ["Dataset", "Examples", "Records", "Subset", "open"]

_KNOWN = (
    "digits, CIFAR-10 or -100 (the .tar.gz or its folder), MNIST or Fashion-MNIST (a folder of IDX files), or images "
    "by class (DIR/CLASS/*, or DIR/train/CLASS/* and DIR/test/CLASS/*)"
)


def open(name: str, *, skip_bad: bool = False, seen: Seen = lambda done, total: None) -> Dataset:
    """The data set of this name, ``digits``, or in this folder or archive, told by what is in it.

    Raises `DataError` for one that is missing, damaged or of no known form, and for images that cannot be read unless
    `skip_bad`: then they are left out and the notes say which. `seen` is told how many of how many images of a folder
    were looked at.
    """
    if name == "digits":
        return digits.load()
    path = Path(name)
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {reason(error)}") from None
    if not there:
        raise DataError(f"{name}: no such folder or archive; expected {_KNOWN}")
    files = cifar.find(path)
    if files is not None:
        return cifar.load(files)
    if idx.find(path):
        return idx.load(path)
    if folder.find(path):
        return folder.load(path, skip_bad=skip_bad, seen=seen)
    raise DataError(f"{name}: holds no data set of a known form; expected {_KNOWN}")
