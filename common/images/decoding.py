"""Photographs, decoded upright and in RGB, whatever file they are in and however damaged it is."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common.errors import InputError
from common.files import reason

MOST_PIXELS = 89_478_485  # of a photograph, and of a resized one: a quarter of a gigabyte, as Pillow's own limit

T = TypeVar("T")


def sample_photos() -> list[Path]:
    """The two photographs that scikit-learn ships (the extra `data`); none where it is not installed."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        return []
    return sorted((Path(package.origin).parent / "datasets" / "images").glob("*.jpg"))


def read(path: Path) -> Image.Image:
    """A photograph upright and in RGB. Raises `InputError` for a file that is no image, or damaged."""
    return _guarded(_decoded, path)


def examine(path: Path) -> tuple[int, int]:
    """The height and width of a photograph as `read` gives it, all of the file decoded, but JPEG at an eighth of its
    size, which is faster. Raises `InputError` where `read` would."""
    return _guarded(_examined, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps a damaged file from warning, on standard error, of what the exception says."""
    # The filters of warnings are the whole process's: changed in two threads at once, they may stay so.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _guarded(open_: Callable[[Path], T], path: Path) -> T:
    try:
        with quiet():
            return open_(path)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that Pillow can read") from None
    # Of a damaged file Pillow's decoders raise whatever they stumble over.
    except Exception as error:
        raise InputError(f"{path}: the image cannot be read: {reason(error)}") from None


def _examined(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        width, height = image.size
    _decoded(path, quick=True)
    return (width, height) if turned else (height, width)


def _decoded(path: Path, quick: bool = False) -> Image.Image:
    with Image.open(path) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"its {image.width} x {image.height} pixels are more than {MOST_PIXELS}")
        if quick:
            image.draft(None, (1, 1))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion of 16-bit values clips them to 255.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {upright.mode}, without a known white; save it with 8 bits")
        return upright.convert("RGB")
