"""Photographs prepared here and by torchvision and timm: the same bits."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from common import images
from common.images import PRESETS, Preprocessing, preprocess
from common.sources.known_weights import table

torchvision = pytest.importorskip("torchvision")
transforms = pytest.importorskip("torchvision.transforms")

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
    # Ten ResNets, eight VGGs, four DenseNets, eight EfficientNets, AlexNet.
    assert len(variants) == 31
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
