"""Batches to compare implementations on: crops of photographs, noise, and integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.images.decoding import read

# Mean and deviation of the ImageNet training set in RGB, of values in 0 … 1.
IMAGENET_MEAN = np.array((0.485, 0.456, 0.406))
IMAGENET_STD = np.array((0.229, 0.224, 0.225))

_LONGEST = 8  # side of a resized photograph, in sides of the crop


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Images (N, H, W, C), labels (N,), and in words where they come from."""

    images: np.ndarray
    labels: np.ndarray
    source: str


def batch(
    paths: Sequence[Path], count: int, size: tuple[int, int], channels: int, classes: int, seed: int = 0
) -> Batch:
    """A batch of `count` crops of (height, width) from the photographs, and random labels below `classes`.

    Each photograph's first crop is its centre; further ones are random. The part of a grey level that a photograph's
    rounding took away is drawn at random. Values are normalised with ImageNet's mean and deviation; channels beyond
    the third are those of further crops. Without photographs: normal noise.
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
            _crop(photo, size, generator, centre=index < len(photos) and part == 0) for part in range(crops_per_image)
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


def _crop(photo: Image.Image, size: tuple[int, int], generator: np.random.Generator, *, centre: bool) -> np.ndarray:
    """A normalised crop: from the centre, or from a random place."""
    spare = photo.height - size[0], photo.width - size[1]
    top, left = (n // 2 if centre else int(generator.integers(0, n + 1)) for n in spare)
    pixels = np.asarray(photo)[top : top + size[0], left : left + size[1]]
    # A sky has patches of exactly one colour. A convolution makes exact ties of them, and where the largest of equals
    # lies for a max-pool is decided by rounding alone: one ulp would send a gradient to another pixel.
    levels = pixels + generator.uniform(-0.5, 0.5, pixels.shape)
    values: np.ndarray = (levels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return values
