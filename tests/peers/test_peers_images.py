"""Photographs prepared here and by torchvision and timm: the same bits."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common import images
from common.images import PRESETS, Preprocessing, preprocess
from common.sources.known_weights import table
from common.training import augment
from common.training.augmentation import CentreCrop, Crop, Flip, Jitter, Resize, ResizedCrop
from common.training.recipe import PRESETS as RECIPES

torchvision = pytest.importorskip("torchvision")
transforms = pytest.importorskip("torchvision.transforms")
functional = transforms.functional

# (width, height): taller, wider, square, odd, smaller than the crop in one direction and in both, just its size.
SIZES = [
    (300, 511),
    (511, 300),
    (224, 224),
    (256, 256),
    (231, 457),
    (225, 226),
    (100, 700),
    (61, 37),
    (224, 300),
    (1, 1),
]
SHAPES = [(256, 224), (232, 224), (235, 224), (224, 224), (64, 64), (65, 64), (33, 33), (50, 81), (51, 80), (7, 1)]
MODES = {
    "nearest": transforms.InterpolationMode.NEAREST,
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


def photos():
    full = [images.read(path) for path in images.sample_photos()]
    assert len(full) == 2
    return [*full, *(photo.resize(size) for photo in full for size in SIZES)]


def by_torchvision(photo, resize, crop, interpolation):
    transform = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=MODES[interpolation]),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    return transform(photo).permute(1, 2, 0).numpy()


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("resize", "crop"), SHAPES)
def test_a_photograph_has_the_bits_of_torchvisions_transforms(resize, crop, interpolation):
    for photo in photos():
        found = preprocess(photo, Preprocessing(resize=resize, crop=crop, interpolation=interpolation))
        assert_same_bits(found, by_torchvision(photo, resize, crop, interpolation))


def published():
    return [known for known in table() if known.reference.startswith("torchvision:")]


@pytest.mark.parametrize("known", published(), ids=lambda known: known.reference)
def test_the_preset_of_published_weights_has_the_bits_of_their_own_transform(known):
    _, variant, tag = known.reference.split(":")
    weights = torchvision.models.get_model_weights(variant)[tag]
    transform = weights.transforms()
    for photo in photos()[:6]:
        expected = transform(photo).permute(1, 2, 0).numpy()
        assert_same_bits(preprocess(photo, replace(PRESETS[known.preprocessing], **known.changes)), expected)


def test_the_table_holds_what_torchvision_publishes():
    here = {known.reference: known for known in published()}
    variants = {known.variant for known in here.values()}
    there = {
        f"torchvision:{variant}:{weights.name}": weights
        for variant in variants
        for weights in torchvision.models.get_model_weights(variant)
        if weights.name != "IMAGENET1K_FEATURES"  # of VGG-16 for detection: the arrays of its classifier are invalid
    }
    # Ten ResNets, eight VGGs, four DenseNets, eight EfficientNets, AlexNet, GoogLeNet, Inception v3.
    assert len(variants) == 33
    assert set(here) == set(there)
    for reference, weights in there.items():
        known, metrics = here[reference], weights.meta["_metrics"]["ImageNet-1K"]
        assert known.url == weights.url
        assert f"-{known.checksum.removeprefix('sha256:')}." in weights.url
        assert (known.top1, known.top5) == (metrics["acc@1"], metrics["acc@5"])


def test_the_class_names_are_those_of_torchvisions_weights():
    categories = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert images.class_names(1000) == categories


def test_the_presets_of_timms_weights_have_the_bits_of_timms_own_transform():
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    ours = [known for known in table() if known.reference.startswith("hf://timm/")]
    assert len(ours) > 20
    some = photos()[:5]
    for known in ours:
        name = known.reference.removeprefix("hf://timm/")
        config = timm.models.get_pretrained_cfg(name)
        assert config.hf_hub_id == f"timm/{name}"
        transform = create_transform(**resolve_data_config({}, pretrained_cfg=config.to_dict()))
        for photo in some:
            expected = transform(photo).permute(1, 2, 0).numpy()
            assert_same_bits(preprocess(photo, replace(PRESETS[known.preprocessing], **known.changes)), expected)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_people_convert_them_for_torchvision(mode, tmp_path):
    photo = images.read(images.sample_photos()[0]).resize((300, 257))
    image = photo.convert("L").convert("LA") if mode == "LA" else photo.convert(mode)
    path = tmp_path / ("p.tif" if mode in ("CMYK", "YCbCr") else "p.png")
    image.save(path)
    with Image.open(path) as opened:
        expected = by_torchvision(opened.convert("RGB"), 256, 224, "bilinear")
    assert_same_bits(preprocess(path, PRESETS["torchvision"]), expected)


class TestAugmentation:
    """Each step with the numbers drawn for it given: the generators differ, what is done with their numbers may not."""

    PHOTOS = (*photos()[::5], Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)))
    # Every colour of 32 levels.
    COLOURS = Image.fromarray(np.mgrid[:32, :32, :32].reshape(3, 128, 256).transpose(1, 2, 0).astype(np.uint8) * 8)

    @staticmethod
    def made(photo, *steps, mean=(0.0,), std=(1.0,), **draws):
        numbers = np.full((1, augment.DRAWS), 0.5)
        for name, value in draws.items():
            numbers[0, getattr(augment, f"_{name.upper()}")] = value
        pixels = np.asarray(photo)
        (values,) = augment.examples([pixels[..., None] if pixels.ndim == 2 else pixels], steps, mean, std, numbers)
        return values

    def assert_same(self, found, expected):
        assert_same_bits(found, functional.to_tensor(expected).permute(1, 2, 0).numpy())

    @pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
    def test_a_change_of_colour(self, name):
        theirs = getattr(functional, f"adjust_{name}")
        rng = np.random.default_rng(1)
        whole = (-0.5, -0.3, -1 / 255, -1e-9, 0.0, 1 / 255, 0.25, 0.5) if name == "hue" else (0.0, 0.5, 1.0, 1.5, 3.7)
        drawn = rng.uniform(-0.5, 0.5, 300) if name == "hue" else rng.uniform(0, 2.5, 100)
        for factor in map(float, (*whole, *drawn)):
            assert np.array_equal(augment.coloured(self.COLOURS, name, factor), theirs(self.COLOURS, factor)), factor
        for photo in self.PHOTOS:
            for factor in map(float, (*whole, *drawn[:3])):
                assert np.array_equal(augment.coloured(photo, name, factor), theirs(photo, factor)), factor

    def test_a_grey_image_keeps_its_saturation_and_hue_there_too(self):
        grey = self.PHOTOS[0].convert("L")
        jitter = Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
        found = self.made(
            grey, jitter, brightness=0.75, contrast=0.25, saturation=0.9, hue=0.9, first=0, second=0, third=0
        )
        expected = functional.adjust_contrast(functional.adjust_brightness(grey, 1.2), 0.8)
        self.assert_same(found, functional.adjust_hue(functional.adjust_saturation(expected, 1.32), 0.32))

    def test_the_jitter_draws_from_torchvisions_ranges(self):
        for most in (0.3, 1.0, 1.8):
            theirs = transforms.ColorJitter(most, most, most, min(most, 0.5))
            for name in ("brightness", "contrast", "saturation", "hue"):
                low, high = getattr(theirs, name)
                for draw in (0.0, 0.25, 1.0):
                    found = self.made(
                        self.COLOURS, Jitter(**{name: min(most, 0.5) if name == "hue" else most}), **{name: draw}
                    )
                    factor = low + draw * (high - low)
                    self.assert_same(found, getattr(functional, f"adjust_{name}")(self.COLOURS, factor))

    def test_resizes_crops_and_flips(self):
        for photo in self.PHOTOS:
            width, height = photo.size
            for side in (1, 32, 33, 256):
                self.assert_same(self.made(photo, Resize(size=side)), transforms.Resize(side)(photo))
                self.assert_same(self.made(photo, CentreCrop(size=side)), functional.center_crop(photo, side))
            self.assert_same(self.made(photo, Flip(), flip=0.2), functional.hflip(photo))
            self.assert_same(self.made(photo, Flip(), flip=0.7), photo)
            side = min(width, height)
            for size, pad in ((side, 0), (side, 4), (side // 2 + 1, 3)):
                top, left = int(0.3 * (height + 2 * pad - size + 1)), int(0.8 * (width + 2 * pad - size + 1))
                expected = functional.crop(functional.pad(photo, pad), top, left, size, size)
                self.assert_same(self.made(photo, Crop(size=size, pad=pad), top=0.3, left=0.8), expected)

    def test_a_random_part(self):
        draws = np.random.default_rng(2).random((20, augment.DRAWS))
        for photo in self.PHOTOS:
            for own in draws:
                height, width = augment._part_size(photo.height, photo.width, own)
                top = int(own[augment._PART_TOP] * (photo.height - height + 1))
                left = int(own[augment._PART_LEFT] * (photo.width - width + 1))
                expected = functional.resized_crop(photo, top, left, height, width, [64, 64])
                (found,) = augment.examples([np.asarray(photo)], (ResizedCrop(size=64),), (0.0,), (1.0,), own[None])
                self.assert_same(found, expected)

    def test_the_tutorials_preset(self):
        recipe = RECIPES["cifar10_step"]
        *steps, normalise = recipe.augmentation
        small = [photo.resize((32, 32)) for photo in self.PHOTOS]
        for photo in small:
            draws = {"flip": 0.1, "top": 0.9, "left": 0.2, "brightness": 0.1, "contrast": 0.8, "hue": 0.95}
            found = self.made(
                photo, *steps, mean=normalise.mean, std=normalise.std, **draws, first=0, second=0, third=0
            )
            image = functional.crop(
                functional.hflip(transforms.Resize(256)(photo)), int(0.9 * 193), int(0.2 * 193), 64, 64
            )
            image = functional.adjust_contrast(functional.adjust_brightness(image, 0.5 + 0.1), 0.5 + 0.8)
            image = functional.to_tensor(functional.adjust_hue(image, -0.3 + 0.95 * 0.6))
            expected = functional.normalize(image, [0.5] * 3, [0.5] * 3).permute(1, 2, 0).numpy()
            assert_same_bits(found, expected)
