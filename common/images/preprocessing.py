"""How a photograph becomes the input of a network: pretrained weights expect it as those they were trained on.

`PRESETS` say how, by name; `preprocess` does it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from common.errors import InputError, ParityError
from common.fields import Checked, Count, Positive
from common.images.decoding import MOST_PIXELS, read

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
    # Inception v3's: torchvision's weights take ImageNet's mean and deviation back in the network.
    "torchvision_299": Preprocessing(resize=342, crop=299),
    "timm_299": Preprocessing(resize=341, crop=299, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # What timm calls Inception's mean and deviation, in [-1, 1].
    "timm_95_inception": Preprocessing(resize=235, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # As Keras' documentation prepares an image: load_img(target_size=(224, 224)), whose default is nearest.
    "keras_caffe": Preprocessing(
        resize=None,
        interpolation="nearest",
        channel_order="BGR",
        scale=1.0,
        mean=(103.939, 116.779, 123.68),
        std=(1.0, 1.0, 1.0),
    ),
    # The same photograph in [-1, 1].
    "keras_tf": Preprocessing(
        resize=None, interpolation="nearest", scale=127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0)
    ),
    "keras_tf_299": Preprocessing(
        resize=None, crop=299, interpolation="nearest", scale=127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 1.0, 1.0)
    ),
    # As BVLC's networks expect an image; they squeeze it to 256 x 256 before the crop.
    "caffe": Preprocessing(channel_order="BGR", scale=1.0, mean=(104.0, 117.0, 123.0), std=(1.0, 1.0, 1.0)),
    # As torchvision's, for those of keras.applications that are fed what torchvision's are.
    "keras_torch": Preprocessing(resize=None, interpolation="nearest"),
    # As AdvProp's and EfficientNet-Lite's weights expect it: from -1 to 1.
    "timm_half": Preprocessing(resize=256, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    # For networks of keras.applications that normalise their images themselves.
    "keras_raw": Preprocessing(
        resize=None, interpolation="nearest", scale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
    ),
    # The example crops first and then resizes, with TensorFlow: the same picture, not the same bits.
    "flax": Preprocessing(resize=256, interpolation="bicubic"),
}


def preset_name(preprocessing: Preprocessing) -> str | None:
    """The name of the preset that this is; None where it is none."""
    return next((name for name, preset in PRESETS.items() if preset == preprocessing), None)


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


def resized(photo: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """A photograph before its crop. Raises `InputError` where that would take gigabytes."""
    if preprocessing.resize is None:
        size = (preprocessing.crop, preprocessing.crop)
    else:
        # torchvision rounds the longer side down.
        short = min(photo.size)
        width, height = (preprocessing.resize if n == short else preprocessing.resize * n // short for n in photo.size)
        size = (width, height)
    if size[0] * size[1] > MOST_PIXELS:
        raise InputError(
            f"a photograph of {photo.width} x {photo.height} pixels would be resized to {size[0]} x {size[1]}, more "
            f"than {MOST_PIXELS} pixels; crop it first"
        )
    return photo.resize(size, _FILTERS[preprocessing.interpolation])


def centre(photo: Image.Image, side: int) -> Image.Image:
    """The square in the middle; black around a photograph that is smaller."""
    # torchvision's rounding: half a pixel goes to the even side in a crop, and to the right and below in a border.
    left, top = (round((n - side) / 2) if n >= side else -((side - n) // 2) for n in photo.size)
    return photo.crop((left, top, left + side, top + side))
