"""Real input: photographs, decoded, cropped and normalised into a batch, the same bytes for every backend."""

from common.images.batches import IMAGENET_MEAN, IMAGENET_STD, Batch, batch, integers
from common.images.classes import class_names
from common.images.decoding import examine, quiet, read, sample_photos
from common.images.preprocessing import (
    PRESETS,
    Interpolation,
    Preprocessing,
    centre,
    preprocess,
    preset_name,
    resized,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PRESETS",
    "Batch",
    "Interpolation",
    "Preprocessing",
    "batch",
    "centre",
    "class_names",
    "examine",
    "integers",
    "preprocess",
    "preset_name",
    "quiet",
    "read",
    "resized",
    "sample_photos",
]
