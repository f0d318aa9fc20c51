"""Photographs in folders, one for each class: DIR/train/CLASS/* and DIR/test/CLASS/* (or val), or DIR/CLASS/* alone.

Without a test folder a fifth of each class is kept for it, at least one photograph: those whose names have the smallest
checksums (SHA-256). So the split is the same on every machine and in every year, and a photograph that is added moves
at most one other.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import PIL

from common import images
from common.backends.columns import cores
from common.datasets.base import Dataset, Examples, Seen, few, lines
from common.errors import DataError, InputError
from common.files import cache_folder, reason, written

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
_TESTS = ("test", "val", "validation")
Parts = dict[str, dict[str, list[str]]]  # file names by part and class


@dataclass(frozen=True, eq=False)
class Photographs(Examples):
    """Image files, by name below a folder."""

    root: Path
    names: tuple[str, ...]
    labels: np.ndarray

    def checksum(self) -> str:
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        return sha256(names + super().checksum().encode()).hexdigest()

    def images(self, indices: np.ndarray) -> list[np.ndarray]:
        return [self._image(self.root / self.names[index]) for index in indices]

    def _image(self, path: Path) -> np.ndarray:
        try:
            return np.asarray(images.read(path))
        except InputError as error:
            raise DataError(f"{error}; it could be read when the training began") from None


def find(folder: Path) -> bool:
    """Whether a folder holds folders of classes."""
    return any(_photographs(one) for one in _folders(folder)) or bool(_folders(folder / "train"))


def load(folder: Path, *, skip_bad: bool, seen: Seen) -> Dataset:
    """The photographs below a folder, in RGB.

    All are decoded once, in threads, since one that cannot be would end the training hours later: those are refused by
    name; with `skip_bad` they are left out, and `notes` says which. Those that could be read are remembered in the
    user's cache folder, by size and time of change. Raises `DataError`.
    """
    root = folder.absolute()
    found = _listed(root)
    names = [name for one in found.values() for names in one.values() for name in names]
    sizes, notes = _readable(root, names, skip_bad, seen)
    readable = {
        part: {label: [name for name in names if name in sizes] for label, names in one.items()}
        for part, one in found.items()
    }
    parts = readable if len(readable) == 2 else _split(root, readable["train"])
    classes = sorted(parts["train"])
    for part, one in parts.items():
        if empty := [label for label in classes if not one[label]]:
            raise DataError(
                f"{root}: no readable image to {part} with in class {few(empty)}; add some, or remove the class"
            )
    used = {sizes[name] for one in parts.values() for names in one.values() for name in names}
    return Dataset(
        name=root.name,
        train=_examples(root, parts["train"]),
        test=_examples(root, parts["test"]),
        classes=tuple(classes),
        channels=3,
        size=used.pop() if len(used) == 1 else None,
        mean=tuple(images.IMAGENET_MEAN.tolist()),
        std=tuple(images.IMAGENET_STD.tolist()),
        recipe="imagenet2015",
        notes=notes,
    )


def _listed(root: Path) -> Parts:
    """The files by part and class; of the training part alone where there is no other."""
    if not _folders(root / "train"):
        return {"train": _classes(root, root)}
    test = next((name for name in _TESTS if (root / name).is_dir()), None)
    if test is None:
        raise DataError(f"{root}: has train, and nothing to test with; expected one of {', '.join(_TESTS)} beside it")
    parts = {"train": _classes(root, root / "train"), "test": _classes(root, root / test)}
    for one, other, name in (("train", "test", test), ("test", "train", "train")):
        if missing := sorted(set(parts[one]) - set(parts[other])):
            raise DataError(f"{root / name}: has no folder for class {few(missing)}, which the other part has")
    return parts


def _classes(root: Path, folder: Path) -> dict[str, list[str]]:
    """The image files in the folders of a folder, by class, named from `root` on."""
    found = {one.name: _photographs(one) for one in _folders(folder)}
    if empty := [name for name, paths in found.items() if not paths]:
        raise DataError(
            f"{folder}: no image in the folder of class {few(empty)}; add some, or remove it; "
            f"images end in {', '.join(sorted(_ENDINGS))}"
        )
    if len(found) < 2:
        raise DataError(f"{folder}: {len(found)} folders of classes; expected two or more")
    return {name: [path.relative_to(root).as_posix() for path in paths] for name, paths in found.items()}


def _folders(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.is_dir()]


def _photographs(folder: Path) -> list[Path]:
    return [path for path in _inside(folder) if path.suffix.lower() in _ENDINGS and path.is_file()]


def _inside(folder: Path) -> list[Path]:
    """What is not hidden in a folder, in an order that no file system chooses."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {reason(error)}") from None


def _readable(
    root: Path, names: list[str], skip_bad: bool, seen: Seen
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Height and width of every image that can be read, and a note on the others."""
    sizes = _examined(root, names, seen)
    bad = [error for error in sizes.values() if isinstance(error, InputError)]
    count = f"{len(bad)} of {len(names)} images"
    if bad and not skip_bad:
        raise DataError(
            f"{count} cannot be read; repair or remove them, or leave them out with --skip-bad:{lines(bad)}"
        )
    notes = (f"left out {count}, which cannot be read:{lines(bad)}",) if bad else ()
    return {name: size for name, size in sizes.items() if not isinstance(size, InputError)}, notes


def _examined(root: Path, names: list[str], seen: Seen) -> dict[str, tuple[int, int] | InputError]:
    """Height and width of every image, or why it cannot be read: decoded, or as remembered of a file not changed since.

    Decoding ImageNet takes hours of a core, and each process of each start would.
    """
    memory = _Memory(root)

    def examined(name: str) -> tuple[int, int] | InputError:
        try:
            state = _state(root / name)
            size = memory.sizes.get((name, *state)) or images.examine(root / name)
        except InputError as error:
            return error
        now[name, *state] = size
        return size

    now: dict[tuple[str, int, int], tuple[int, int]] = {}
    sizes: dict[str, tuple[int, int] | InputError] = {}
    with images.quiet(), ThreadPool(cores()) as pool:
        for name, size in zip(names, pool.imap(examined, names, chunksize=16), strict=True):
            sizes[name] = size
            seen(len(sizes), len(names))
    if now != memory.sizes:
        memory.keep(now)
    return sizes


def _state(path: Path) -> tuple[int, int]:
    """A file's size and time of change. Raises `InputError`."""
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: the image cannot be read: {reason(error)}") from None
    return found.st_size, found.st_mtime_ns


class _Memory:
    """Of a folder's images that could be read: by name, size and time of change of the file, the image's size."""

    def __init__(self, root: Path) -> None:
        self._path = cache_folder() / f"images-{sha256(str(root).encode('utf-8', 'surrogateescape')).hexdigest()}.json"
        self.sizes: dict[tuple[str, int, int], tuple[int, int]] = {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["pillow"] == PIL.__version__:  # another one may read more, or less
                self.sizes = {(name, *state): (h, w) for name, *state, h, w in found["images"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass  # nothing is remembered, and all is looked at

    def keep(self, sizes: dict[tuple[str, int, int], tuple[int, int]]) -> None:
        content = {"pillow": PIL.__version__, "images": [[*key, *size] for key, size in sizes.items()]}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written(self._path, DataError) as beside:
                beside.write_text(json.dumps(content), encoding="utf-8")
        except (OSError, DataError):
            pass  # a cache that cannot be written, as in a container


def _split(root: Path, found: dict[str, list[str]]) -> Parts:
    """Each class in two."""
    if few_ones := [label for label, names in found.items() if len(names) < 2]:
        raise DataError(
            f"{root}: too few readable images to test with too in class {few(few_ones)}; expected two or more"
        )
    parts: Parts = {"train": {}, "test": {}}
    for label, names in found.items():
        by_checksum = sorted(names, key=lambda name: sha256(name.encode("utf-8", "surrogateescape")).digest())
        tested = set(by_checksum[: max(1, len(names) // 5)])
        parts["train"][label] = [name for name in names if name not in tested]
        parts["test"][label] = [name for name in names if name in tested]
    return parts


def _examples(root: Path, found: dict[str, list[str]]) -> Photographs:
    names = tuple(name for label in sorted(found) for name in found[label])
    counts = [len(found[label]) for label in sorted(found)]
    return Photographs(root, names, np.repeat(np.arange(len(counts)), counts))
