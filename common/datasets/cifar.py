"""CIFAR-10 and CIFAR-100 (A. Krizhevsky 2009) as published: binary and python versions, the archive or its folder.

A binary file is a row of records: the label (CIFAR-100: the coarse one, then the fine one), then 32 x 32 bytes of red,
of green and of blue. A python file is a dictionary pickled by Python 2 with the same pixels in an array (N, 3072).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.datasets import pickled_arrays
from common.datasets.archive import Files
from common.datasets.base import Bytes, Dataset, Records, check_labels
from common.errors import DataError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class _Form:
    """One of the four archives."""

    name: str
    train: tuple[str, ...]
    test: str
    classes: int
    about: str  # the file with the names of the classes
    key: str = ""  # of these names, in a pickle
    labels: str = ""  # of the labels, in a pickle
    label_bytes: int = 0  # before the pixels of a binary record; the last is the label

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)


_FORMS = (
    _Form(
        name="CIFAR-10",
        train=tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
        test="test_batch.bin",
        classes=10,
        about="batches.meta.txt",
        label_bytes=1,
    ),
    _Form(
        name="CIFAR-10",
        train=tuple(f"data_batch_{n}" for n in range(1, 6)),
        test="test_batch",
        classes=10,
        about="batches.meta",
        key="label_names",
        labels="labels",
    ),
    _Form(
        name="CIFAR-100",
        train=("train.bin",),
        test="test.bin",
        classes=100,
        about="fine_label_names.txt",
        label_bytes=2,
    ),
    _Form(
        name="CIFAR-100",
        train=("train",),
        test="test",
        classes=100,
        about="meta",
        key="fine_label_names",
        labels="fine_labels",
    ),
)
# Of the training images, by channel; the figures that public recipes of each set use.
_MOMENTS = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_NAMES = {name for form in _FORMS for name in (*form.files, form.about)}


def find(path: Path) -> Files | None:
    """The files of CIFAR in a folder or an archive, if there are any. Raises `DataError` for a damaged archive."""
    files = Files(path, _NAMES)
    return files if _form(files) else None


def _form(files: Files) -> _Form | None:
    return next((form for form in _FORMS if files.names & set(form.files)), None)


def load(files: Files) -> Dataset:
    """The data set in these files. Raises `DataError`."""
    form = _form(files)
    if form is None:
        raise DataError(f"{files.path}: holds none of the files of CIFAR-10 or CIFAR-100")
    read = _binary if form.label_bytes else _pickled
    parts = {name: read(files, name, form) for name in form.files}
    counts = {name: len(parts[name][1]) for name in form.train}
    if len(set(counts.values())) > 1:
        # All published ones have as many: a file cut between two records shows by this alone.
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{files.path}: batches with different counts of images: {found}; fetch the archive again")
    train, test = (
        Records(
            tuple(parts[name][0] for name in names),
            np.concatenate([parts[name][1] for name in names]),
            (32, 32, 3),
            skip=form.label_bytes,
            planar=True,
        )
        for names in (form.train, (form.test,))
    )
    mean, std = _MOMENTS[form.name]
    return Dataset(
        name=form.name,
        train=train,
        test=test,
        classes=_classes(files, form),
        channels=3,
        size=(32, 32),
        mean=mean,
        std=std,
        recipe="cifar2015",
    )


def _binary(files: Files, name: str, form: _Form) -> tuple[Bytes, np.ndarray]:
    """Records, label and all, and the labels alone."""
    length = form.label_bytes + _PIXELS
    place = files.place(name)
    content = b"" if place and name in files.names else files.read(name)
    size = place.stat().st_size if place else len(content)
    if not size or size % length:
        raise DataError(f"{files.where(name)}: {size} bytes; expected records of {length}; fetch the archive again")
    shape = (size // length, length)
    records = Bytes(place, 0, shape) if place else Bytes.of(np.frombuffer(content, np.uint8).reshape(shape))
    return records, check_labels(records.rows[:, form.label_bytes - 1], form.classes, files.where(name))


def _pickled(files: Files, name: str, form: _Form) -> tuple[Bytes, np.ndarray]:
    """Pixels, and the labels."""
    where = files.where(name)
    batch = _dictionary(files, name)
    pixels, labels = batch.get("data"), batch.get(form.labels)
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        found = f"of shape {pixels.shape}" if isinstance(pixels, np.ndarray) else "missing"
        raise DataError(f"{where}: its array 'data' is {found}; expected (images, {_PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise DataError(f"{where}: holds no list of whole numbers as {form.labels!r}")
    if len(labels) != len(pixels):
        raise DataError(f"{where}: {len(pixels)} images and {len(labels)} labels; fetch the archive again")
    return Bytes.of(pixels), check_labels(np.array(labels, np.int64), form.classes, where)


def _classes(files: Files, form: _Form) -> tuple[str, ...]:
    if form.key:
        names = _dictionary(files, form.about).get(form.key)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{files.where(form.about)}: holds no list of names as {form.key!r}")
    else:
        names = files.read(form.about).decode("utf-8", "replace").split()
    if len(names) != form.classes:
        raise DataError(f"{files.where(form.about)}: {len(names)} names of classes; expected {form.classes}")
    return tuple(names)


def _dictionary(files: Files, name: str) -> dict[Any, Any]:
    batch = pickled_arrays.read(files.read(name), files.where(name))
    if not isinstance(batch, dict):
        raise DataError(f"{files.where(name)}: its pickle is no dictionary")
    # What Python 3 pickled again may have bytes for keys.
    return {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
