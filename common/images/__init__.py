"""Real input: photographs, decoded, cropped and normalised into a batch, the same bytes for every backend.

Pretrained weights expect their images prepared as those they were trained on: `PRESETS` say how, `preprocess` does it.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common.errors import InputError, ParityError
from common.fields import Checked, Count, Positive
from common.files import reason

# Mean and deviation of the ImageNet training set in RGB, of values in 0 … 1.
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406))
IMAGENET_STD = np.array((0.229, 0.224, 0.225))

_LONGEST = 8  # side of a resized photograph, in sides of the crop
_MOST_PIXELS = 89_478_485  # of a photograph, and of a resized one: a quarter of a gigabyte, as Pillow's own limit
_CLASS_NAMES = Path(__file__).parent / "imagenet_classes.txt"

T = TypeVar("T")
Interpolation = Literal["nearest", "bilinear", "bicubic"]
_FILTERS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Checked):
    """How a photograph becomes the input of a network: resized, cropped, scaled, normalised; the defaults are
    torchvision's for its first ImageNet weights. Raises `InputError` for values that make no image."""

    error: ClassVar[type[ParityError]] = InputError
    title: ClassVar[str] = "a preprocessing"

    crop: Count = 224  # side of the square from the centre; black around a smaller photograph
    resize: Count | None = 256  # of the shorter side; None: the whole photograph squeezed into the square
    interpolation: Interpolation = "bilinear"  # Pillow's, which averages when it shrinks, except nearest
    channel_order: Literal["RGB", "BGR"] = "RGB"
    scale: Positive = 255.0  # by which the values 0 … 255 are divided first
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # then subtracted, in the channel order
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)  # then divided by

    def __str__(self) -> str:
        if self.resize is None:
            shape = f"resized to {self.crop} x {self.crop}"
        else:
            shape = f"shorter side to {self.resize}, centre {self.crop} x {self.crop}"
        scaled = "" if self.scale == 1 else f" / {self.scale:g}"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        divided = "" if self.std == (1.0, 1.0, 1.0) else f" / ({std})"
        return f"{shape}, {self.interpolation}, {self.channel_order}{scaled} - ({mean}){divided}"


PRESETS = {
    "torchvision": Preprocessing(),
    "torchvision_v2": Preprocessing(resize=232),
    # timm resizes to the crop / crop_pct, rounded down: 0.875, and 0.95 in its newer recipes.
    "timm": Preprocessing(resize=256, interpolation="bicubic"),
    "timm_95": Preprocessing(resize=235, interpolation="bicubic"),
    # As Keras' documentation prepares an image: load_img(target_size=(224, 224)), whose default is nearest.
    "keras_caffe": Preprocessing(
        resize=None,
        interpolation="nearest",
        channel_order="BGR",
        scale=1.0,
        mean=(103.939, 116.779, 123.68),
        std=(1.0, 1.0, 1.0),
    ),
    # The example crops first and then resizes, with TensorFlow: the same picture, not the same bits.
    "flax": Preprocessing(resize=256, interpolation="bicubic"),
}


def preset_name(preprocessing: Preprocessing) -> str | None:
    """The name of the preset that this is; None where it is none."""
    return next((name for name, preset in PRESETS.items() if preset == preprocessing), None)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images (N, H, W, C), labels (N,), and in words where they come from."""

    images: np.ndarray
    labels: np.ndarray
    source: str


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
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"its {image.width} x {image.height} pixels are more than {_MOST_PIXELS}")
        if quick:
            image.draft(None, (1, 1))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion of 16-bit values clips them to 255.
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.mode in ("I", "F"):
            raise ValueError(f"its pixels are of mode {upright.mode}, without a known white; save it with 8 bits")
        return upright.convert("RGB")


def preprocess(image: Image.Image | Path | str, preprocessing: Preprocessing) -> np.ndarray:
    """A photograph as input (crop, crop, 3) in float32, to the bit as torchvision's transforms make it of a PIL image.

    A path is read as by `read`. Raises `InputError` for an unreadable photograph, and one too long to be resized.
    """
    photo = image.convert("RGB") if isinstance(image, Image.Image) else read(Path(image))
    try:
        small = resized(photo, preprocessing)
    except InputError as error:
        raise error if isinstance(image, Image.Image) else InputError(f"{image}: {error}") from None
    pixels = np.asarray(centre(small, preprocessing.crop))
    if preprocessing.channel_order == "BGR":
        pixels = pixels[..., ::-1]
    values = pixels.astype(np.float32) / preprocessing.scale
    values -= np.array(preprocessing.mean, np.float32)
    values /= np.array(preprocessing.std, np.float32)
    return values


@cache
def class_names(classes: int) -> list[str] | None:
    """What the outputs of a network of so many classes mean: ImageNet's names for 1000, otherwise unknown."""
    if classes != 1000:
        return None
    return _CLASS_NAMES.read_text(encoding="utf-8").splitlines()


def resized(photo: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """A photograph before its crop. Raises `InputError` where that would take gigabytes."""
    if preprocessing.resize is None:
        size = (preprocessing.crop, preprocessing.crop)
    else:
        # torchvision rounds the longer side down.
        short = min(photo.size)
        width, height = (preprocessing.resize if n == short else preprocessing.resize * n // short for n in photo.size)
        size = (width, height)
    if size[0] * size[1] > _MOST_PIXELS:
        raise InputError(
            f"a photograph of {photo.width} x {photo.height} pixels would be resized to {size[0]} x {size[1]}, more "
            f"than {_MOST_PIXELS} pixels; crop it first"
        )
    return photo.resize(size, _FILTERS[preprocessing.interpolation])


def centre(photo: Image.Image, side: int) -> Image.Image:
    """The square in the middle; black around a photograph that is smaller."""
    # torchvision's rounding: half a pixel goes to the even side in a crop, and to the right and below in a border.
    left, top = (round((n - side) / 2) if n >= side else -((side - n) // 2) for n in photo.size)
    return photo.crop((left, top, left + side, top + side))


def batch(
    paths: Sequence[Path], count: int, size: tuple[int, int], channels: int, classes: int, seed: int = 0
) -> Batch:
    """A batch of `count` crops of (height, width) from the photographs, and random labels below `classes`.

    Each photograph's first crop is its centre; further ones are random. Values are normalised with ImageNet's mean
    and deviation; channels beyond the third are those of further crops. Without photographs: normal noise.
    Raises `InputError` for an unreadable photograph.
    """
    generator = np.random.default_rng([seed, count, *size])
    labels = generator.integers(0, classes, count)
    if not paths:
        return Batch(images=generator.standard_normal((count, *size, channels)), labels=labels, source="random noise")
    photos = [_cover(read(path), size) for path in paths]
    crops_per_image = -(-channels // 3)
    images = []
    for index in range(count):
        photo = photos[index % len(photos)]
        crops = [
            _crop(photo, size, None if index < len(photos) and part == 0 else generator)
            for part in range(crops_per_image)
        ]
        images.append(np.concatenate(crops, axis=-1)[..., :channels])
    return Batch(images=np.stack(images), labels=labels, source=", ".join(path.name for path in paths))


def integers(count: int, size: tuple[int, int], channels: int, seed: int = 0) -> np.ndarray:
    """Images of random integers 0 … 15, on which integer weights give exact sums (level L0)."""
    generator = np.random.default_rng([seed, count, *size])
    return generator.integers(0, 16, (count, *size, channels)).astype(np.float64)


def _cover(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resized so that a crop of `size` takes 7/8 of the tighter side, as 224 of 256."""
    scale = max(size[0] / photo.height, size[1] / photo.width) * 8 / 7
    # Only the middle of a very long photograph: the whole could take gigabytes.
    width, height = (min(side, _LONGEST * max(size) / scale) for side in photo.size)
    left, top = (photo.width - width) / 2, (photo.height - height) / 2
    return photo.resize(
        (max(round(width * scale), size[1]), max(round(height * scale), size[0])),
        Image.Resampling.BILINEAR,
        box=(left, top, left + width, top + height),
    )


def _crop(photo: Image.Image, size: tuple[int, int], generator: np.random.Generator | None) -> np.ndarray:
    """A normalised crop: from the centre, or from a random place."""
    spare = photo.height - size[0], photo.width - size[1]
    top, left = (n // 2 if generator is None else int(generator.integers(0, n + 1)) for n in spare)
    pixels = np.asarray(photo)[top : top + size[0], left : left + size[1]]
    values: np.ndarray = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return values
