"""How an image becomes an example, in NumPy and Pillow: the same bytes for every framework.

The random numbers of an example are `DRAWS` uniform ones, at a place in a counter-based stream (Philox 4x64, Salmon et
al. 2011) that its position in the training names. So an example can be made anywhere, alone, and comes out the same.
Each step has its own among them, wherever it stands in the list.
"""

from collections.abc import Sequence
from math import log

import numpy as np
from PIL import Image, ImageEnhance

from common import images as photographs
from common.errors import InputError, RecipeError
from common.images import Preprocessing
from common.training.augmentation import Augmentation, CentreCrop, Crop, Flip, Jitter, Resize, ResizedCrop, Step, tested

# Which number decides what. The attempts at a random part take two each, from `_PART` on.
_TOP, _LEFT, _FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _PART_TOP, _PART_LEFT, _PART = range(9)
_ATTEMPTS = 10
_HUE, _FIRST, _SECOND, _THIRD = range(_PART + 2 * _ATTEMPTS, _PART + 2 * _ATTEMPTS + 4)
DRAWS = 32  # eight blocks of the counter

_AREA = (0.08, 1.0)  # of a random part, as a share of the image
_RATIO = (3 / 4, 4 / 3)  # of its width to its height


def examples(
    images: Sequence[np.ndarray] | np.ndarray,
    steps: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    draws: np.ndarray | None,
) -> np.ndarray:
    """Images (H, W, C) in uint8 as examples (N, height, width, C) in float32: the steps in their order, then normalised
    by `mean` and `std`, of a value for all channels or one for each.

    `draws` (N, `DRAWS`) are uniform in [0, 1); without them nothing is random: images to test with. Raises
    `RecipeError` where the examples differ in size, one is too small for a crop, or their channels are not those of
    `mean`.
    """
    if draws is None:
        steps, draws = tested(steps), np.empty((len(images), 0))
    cut = [_done(image, steps, own) for image, own in zip(images, draws, strict=True)]
    if shapes := {image.shape for image in cut} - {cut[0].shape}:
        raise RecipeError(
            f"images of {cut[0].shape[:2]} and {shapes.pop()[:2]} pixels cannot share a batch; set augmentation.size"
        )
    channels = cut[0].shape[-1]
    if len(mean) not in (1, channels):
        raise RecipeError(f"the mean has {len(mean)} values; these images have {channels} channels")
    # To the bit as torchvision: divided by 255 first, then by the deviation, each rounded to float32.
    values = np.stack(cut).astype(np.float32)
    values /= np.float32(255)
    # By rows: NumPy is four times slower where the innermost axis has three values.
    rows = values.reshape(-1, values.shape[2] * values.shape[3])
    rows -= np.resize(np.array(mean, np.float32), rows.shape[1])  # which repeats them
    rows /= np.resize(np.array(std, np.float32), rows.shape[1])
    return values


def _done(image: np.ndarray, steps: Augmentation, draws: np.ndarray) -> np.ndarray:
    """The image after the steps, in uint8."""
    for step in steps:
        image = _step(image, step, draws)
    return image


def _step(image: np.ndarray, step: Step, draws: np.ndarray) -> np.ndarray:
    match step:
        case Resize(size=side) if side != min(image.shape[:2]):
            return _array(photographs.resized(_picture(image), Preprocessing(resize=side)))
        case CentreCrop(size=side) if (side, side) != image.shape[:2]:
            return _array(photographs.centre(_picture(image), side))
        case Crop():
            return _crop(image, step, draws)
        case ResizedCrop(size=side):
            return _part(image, (side, side) if side else image.shape[:2], draws)
        case Flip() if draws[_FLIP] < 0.5:
            return image[:, ::-1]
        case Jitter():
            return _jittered(image, step, draws)
        case _:
            return image


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


def _crop(image: np.ndarray, step: Crop, draws: np.ndarray) -> np.ndarray:
    """A random window of the image with black around it."""
    before, pad = image.shape, step.pad
    height, width = step.output((before[0], before[1])) or before[:2]
    if pad:
        padded = np.zeros((before[0] + 2 * pad, before[1] + 2 * pad, before[2]), np.uint8)
        padded[pad : pad + before[0], pad : pad + before[1]] = image
        image = padded
    top = int(draws[_TOP] * (image.shape[0] - height + 1))
    left = int(draws[_LEFT] * (image.shape[1] - width + 1))
    return image[top : top + height, left : left + width]


def _jittered(image: np.ndarray, step: Jitter, draws: np.ndarray) -> np.ndarray:
    """Its four changes in a random order, all of them equally likely; a grey image has neither saturation nor hue."""
    order = ["brightness", "contrast", "saturation", "hue"]
    for place, which in enumerate((_FIRST, _SECOND, _THIRD)):
        other = place + int(draws[which] * (len(order) - place))
        order[place], order[other] = order[other], order[place]
    picture = _picture(image)
    for name in order:
        most = getattr(step, name)
        if most and (picture.mode == "RGB" or name in ("brightness", "contrast")):
            low = -most if name == "hue" else max(0.0, 1 - most)
            high = most if name == "hue" else 1 + most
            picture = coloured(picture, name, low + (high - low) * draws[_JITTER[name]])
    return _array(picture)


_JITTER = {"brightness": _BRIGHTNESS, "contrast": _CONTRAST, "saturation": _SATURATION, "hue": _HUE}
_ENHANCE = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


def coloured(picture: Image.Image, name: str, factor: float) -> Image.Image:
    """An RGB or grey picture with its brightness, contrast or saturation multiplied, or an RGB one with its hue turned,
    by so much of a full turn: to the bit as torchvision does it of a PIL image."""
    if name != "hue":
        return _ENHANCE[name](picture).enhance(factor)
    hue, saturation, value = picture.convert("HSV").split()
    steps = int(255 * factor)  # towards zero; of 255 to a turn, though the hues are 256
    turned = hue.point([(one + steps) % 256 for one in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _picture(image: np.ndarray) -> Image.Image:
    if image.shape[-1] not in (1, 3):
        raise InputError(f"an image of {image.shape[-1]} channels; only grey and RGB can be resized and coloured")
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
