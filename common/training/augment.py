"""How an image becomes an example, in NumPy and Pillow: the same bytes for every framework.

The random numbers of an example are `DRAWS` uniform ones, at a place in a counter-based stream (Philox 4x64, Salmon et
al. 2011) that its position in the training names. So an example can be made anywhere, alone, and comes out the same.
"""

from collections.abc import Sequence
from math import log

import numpy as np
from PIL import Image, ImageEnhance

from common import images as photographs
from common.errors import InputError, RecipeError
from common.images import Preprocessing
from common.training.recipe import Augmentation

# Which number decides what. The attempts at a random part take two each, from `_PART` on.
_TOP, _LEFT, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _PART_TOP, _PART_LEFT, _PART = range(9)
_ATTEMPTS = 10
DRAWS = 32  # eight blocks of the counter

_AREA = (0.08, 1.0)  # of a random part, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # of its width to its height


def examples(
    images: Sequence[np.ndarray] | np.ndarray,
    augmentation: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    draws: np.ndarray | None,
) -> np.ndarray:
    """Images (H, W, C) in uint8 as examples (N, height, width, C) in float32, normalised.

    `draws` (N, `DRAWS`) are uniform in [0, 1); without them nothing is random: images to test with. Raises
    `RecipeError` where the examples differ in size or their channels are not those of `mean`.
    """
    cut = [_cut(image, augmentation, None if draws is None else draws[n]) for n, image in enumerate(images)]
    if shapes := {image.shape for image in cut} - {cut[0].shape}:
        raise RecipeError(
            f"images of {cut[0].shape[:2]} and {shapes.pop()[:2]} pixels cannot share a batch; set augmentation.size"
        )
    if len(mean) != cut[0].shape[-1]:
        raise RecipeError(f"augmentation.mean has {len(mean)} values; these images have {cut[0].shape[-1]} channels")
    # To the bit as torchvision: divided by 255 first, then by the deviation, each rounded to float32.
    values = np.stack(cut).astype(np.float32)
    values /= np.float32(255)
    # By rows: NumPy is four times slower where the innermost axis has three values.
    rows = values.reshape(-1, values.shape[2] * values.shape[3])
    rows -= np.tile(np.array(mean, np.float32), values.shape[2])
    rows /= np.tile(np.array(std, np.float32), values.shape[2])
    return values


def _cut(image: np.ndarray, augmentation: Augmentation, draws: np.ndarray | None) -> np.ndarray:
    """The image at its final size, in uint8."""
    side = augmentation.size
    if draws is None:
        return _middle(image, side, resize_before_crop(augmentation)) if side else image
    if augmentation.resized_crop:
        image = _part(image, (side, side) if side else image.shape[:2], draws)
    elif side:
        image = _middle(image, side, side)
    if augmentation.pad:
        image = _shifted(image, augmentation.pad, draws)
    if augmentation.flip and draws[_FLIP] < 0.5:
        image = image[:, ::-1]
    if augmentation.color_jitter:
        image = _jittered(image, augmentation.color_jitter, draws)
    return image


def resize_before_crop(augmentation: Augmentation) -> int:
    """What the shorter side of a test image is resized to, before the square of `size` is cut from its middle.

    What was trained on parts of images is tested on the middle of one, as 224 of 256.
    """
    side = augmentation.size or 0
    return round(side * 8 / 7) if augmentation.resized_crop else side


def _middle(image: np.ndarray, side: int, shorter: int) -> np.ndarray:
    """The square in the middle, once the shorter side has been resized."""
    if image.shape[:2] == (side, side) and side == shorter:
        return image
    preprocessing = Preprocessing(crop=side, resize=shorter)
    return _array(photographs.centre(photographs.resized(_picture(image), preprocessing), side))


def _part(image: np.ndarray, size: tuple[int, int], draws: np.ndarray) -> np.ndarray:
    """A random part of the image, resized to (height, width)."""
    height, width = _part_size(image.shape[0], image.shape[1], draws)
    top = int(draws[_PART_TOP] * (image.shape[0] - height + 1))
    left = int(draws[_PART_LEFT] * (image.shape[1] - width + 1))
    picture = _picture(image[top : top + height, left : left + width])
    return _array(picture.resize(size[::-1], Image.Resampling.BILINEAR))


def _part_size(height: int, width: int, draws: np.ndarray) -> tuple[int, int]:
    """Area and shape of a part as Szegedy et al. 2015 (arXiv:1409.4842, section 6) draw them, the logarithm of the
    ratio being uniform; where ten of them do not fit into the image, as much as fits of the nearest allowed shape."""
    for area, shape in draws[_PART : _PART + 2 * _ATTEMPTS].reshape(-1, 2):
        pixels = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        ratio = np.exp(log(_RATIO[0]) + (log(_RATIO[1]) - log(_RATIO[0])) * shape)
        part = round((pixels / ratio) ** 0.5), round((pixels * ratio) ** 0.5)
        if 0 < part[0] <= height and 0 < part[1] <= width:
            return part
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    return max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))


def _shifted(image: np.ndarray, pad: int, draws: np.ndarray) -> np.ndarray:
    """A random crop, of the size before, of the image with black around it."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    top, left = (int(draws[which] * (2 * pad + 1)) for which in (_TOP, _LEFT))
    return padded[top : top + height, left : left + width]


def _jittered(image: np.ndarray, most: float, draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast and, of a colour image, saturation, in this order, each by a factor of 1 ± `most`."""
    picture = _picture(image)
    for which, enhance in (
        (_BRIGHTNESS, ImageEnhance.Brightness),
        (_CONTRAST, ImageEnhance.Contrast),
        (_SATURATION, ImageEnhance.Color),
    ):
        if which != _SATURATION or picture.mode == "RGB":
            picture = enhance(picture).enhance(1 + most * (2 * draws[which] - 1))
    return _array(picture)


def _picture(image: np.ndarray) -> Image.Image:
    if image.shape[-1] not in (1, 3):
        raise InputError(f"an image of {image.shape[-1]} channels; only grey and RGB can be resized and coloured")
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
