"""Photographs prepared for pretrained networks: every preset by its own arithmetic, and Keras' by Keras itself."""

import hashlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import images
from common.errors import InputError
from common.images import PRESETS, Preprocessing, preprocess

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


# Of the ramp (301, 257), made by torchvision 0.29.1's transforms (and, for Keras, by keras 3.15.1) with Pillow 13.
DIGESTS = {
    "torchvision": "d6d822734b4125a3",
    "torchvision_v2": "ed705edfb990c990",
    "timm": "b77f9dce2e0812c8",
    "timm_95": "b8f84bceee914e73",
    "timm_95_inception": "d2f595a56a646980",
    "keras_caffe": "b28c0f0844c5c52c",
    "keras_tf": "3b0dfd873f238996",
}


def ramp(width, height):
    """A photograph whose every pixel says where it is: red the column, green the row, blue both."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns % 256, rows % 256, (rows + columns) % 256], axis=-1).astype(np.uint8))


def plain(**changes):
    """A preprocessing that leaves values as they are."""
    return Preprocessing(**{"scale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)} | changes)


class TestPresets:
    @pytest.mark.parametrize("name", DIGESTS)
    def test_the_bits_are_those_of_the_library_it_is_named_after(self, name):
        values = preprocess(ramp(301, 257), PRESETS[name])
        assert (values.shape, values.dtype) == ((224, 224, 3), np.float32)
        assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16] == DIGESTS[name]

    def test_they_are_those_of_the_public_libraries(self):
        sizes = {name: (preset.resize, preset.crop, preset.interpolation) for name, preset in PRESETS.items()}
        assert sizes == {
            "torchvision": (256, 224, "bilinear"),
            "torchvision_v2": (232, 224, "bilinear"),
            "timm": (int(224 / 0.875), 224, "bicubic"),
            "timm_95": (int(224 / 0.95), 224, "bicubic"),
            "torchvision_299": (342, 299, "bilinear"),
            "timm_299": (int(299 / 0.875), 299, "bicubic"),
            "keras_tf_299": (None, 299, "nearest"),
            "timm_95_inception": (int(224 / 0.95), 224, "bicubic"),
            "keras_caffe": (None, 224, "nearest"),
            "keras_tf": (None, 224, "nearest"),
            "caffe": (256, 224, "bilinear"),
            "keras_torch": (None, 224, "nearest"),
            "timm_half": (int(224 / 0.875), 224, "bicubic"),
            "keras_raw": (None, 224, "nearest"),
            "flax": (256, 224, "bicubic"),
        }

    def test_in_words_they_are_one_line_that_says_all(self):
        assert str(PRESETS["torchvision_v2"]) == (
            "shorter side to 232, centre 224 x 224, bilinear, RGB / 255 - (0.485, 0.456, 0.406) / (0.229, 0.224, 0.225)"
        )
        assert str(PRESETS["keras_caffe"]) == ("resized to 224 x 224, nearest, BGR - (103.939, 116.779, 123.68)")

    @pytest.mark.parametrize(("preset", "module"), [("keras_caffe", "resnet"), ("keras_torch", "densenet")])
    @pytest.mark.parametrize("size", [(301, 257), (224, 224), (37, 61), (640, 427)])
    def test_keras_prepares_a_photograph_the_same_way(self, size, preset, module, tmp_path):
        keras = pytest.importorskip("keras")
        path = tmp_path / "photo.png"
        ramp(*size).save(path)
        image = keras.utils.load_img(path, target_size=(224, 224))
        prepare = getattr(keras.applications, module).preprocess_input
        expected = prepare(keras.utils.img_to_array(image)[None])[0]
        found = preprocess(path, PRESETS[preset])
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


class TestGeometry:
    @pytest.mark.parametrize(
        ("size", "crop", "left", "top"),
        [
            ((300, 256), 224, 38, 16),
            ((257, 256), 224, 16, 16),  # 16.5 goes to 16
            ((259, 256), 224, 18, 16),  # 17.5 goes to 18
            ((256, 301), 224, 16, 38),  # 38.5 goes to 38
            ((256, 256), 256, 0, 0),
        ],
    )
    def test_the_centre_is_cut_where_torchvision_cuts_it(self, size, crop, left, top):
        photo = ramp(*size)
        found = preprocess(photo, plain(resize=256, crop=crop))
        assert np.array_equal(found, np.asarray(photo)[top : top + crop, left : left + crop])

    @pytest.mark.parametrize(
        ("size", "resize", "left", "top"),
        [((20, 30), 20, 6, 1), ((21, 30), 21, 5, 1), ((30, 21), 21, 1, 5), ((31, 31), 31, 0, 0), ((30, 30), 30, 1, 1)],
    )
    def test_a_smaller_photograph_stands_in_the_middle_of_black(self, size, resize, left, top):
        photo = ramp(*size)
        found = preprocess(photo, plain(resize=resize, crop=32))
        expected = np.zeros((32, 32, 3))
        expected[top : top + size[1], left : left + size[0]] = np.asarray(photo)
        assert np.array_equal(found, expected)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((500, 375), (341, 256)), ((375, 500), (256, 341)), ((1000, 10), (25600, 256)), ((333, 500), (256, 384))],
    )
    def test_the_shorter_side_is_resized_and_the_longer_rounded_down(self, size, expected, monkeypatch):
        made = []
        resize = Image.Image.resize
        monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: made.append(resize(*a, **k)) or made[-1])
        preprocess(Image.new("RGB", size), PRESETS["torchvision"])
        assert [image.size for image in made] == [expected]

    def test_shrinking_averages(self):
        # Columns black and white in turn: their mean is grey, and one in two of them would be black or white.
        stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (512, 256))).convert("RGB")
        for interpolation in ("bilinear", "bicubic"):
            found = preprocess(stripes, plain(resize=64, crop=32, interpolation=interpolation))
            assert np.abs(found - 127.5).max() < 4
        assert set(preprocess(stripes, plain(resize=64, crop=32, interpolation="nearest")).flat) <= {0, 255}

    @given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 60), st.integers(1, 60) | st.none())
    @settings(max_examples=80, deadline=None)
    def test_every_size_gives_the_crop_asked_for(self, width, height, crop, resize):
        found = preprocess(ramp(width, height), Preprocessing(crop=crop, resize=resize))
        assert found.shape == (crop, crop, 3)
        assert np.isfinite(found).all()


class TestValues:
    @pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (1, 127, 254), (10, 20, 30)])
    def test_they_are_scaled_and_normalised_in_float32(self, colour):
        found = preprocess(Image.new("RGB", (256, 256), colour), PRESETS["torchvision"])
        expected = (np.float32(colour) / np.float32(255) - MEAN) / STD
        assert expected.dtype == np.float32
        assert (found == expected).all()

    def test_the_channel_order_turns_before_the_mean_is_subtracted(self):
        found = preprocess(Image.new("RGB", (9, 9), (10, 20, 30)), PRESETS["keras_caffe"])
        expected = np.float32([30, 20, 10]) - np.float32([103.939, 116.779, 123.68])
        assert (found == expected).all()

    def test_an_image_and_its_file_give_the_same(self, tmp_path):
        photo = ramp(300, 280)
        photo.save(tmp_path / "p.png")
        expected = preprocess(photo, PRESETS["timm"])
        for source in (tmp_path / "p.png", str(tmp_path / "p.png")):
            assert np.array_equal(preprocess(source, PRESETS["timm"]), expected)

    def test_a_photograph_lying_on_its_side_is_turned_first(self, tmp_path):
        photo, exif = ramp(300, 280), Image.Exif()
        exif[0x0112] = 6  # stored a quarter turn anticlockwise
        photo.rotate(90, expand=True).save(tmp_path / "p.png", exif=exif)
        assert np.array_equal(
            preprocess(tmp_path / "p.png", PRESETS["torchvision"]), preprocess(photo, PRESETS["torchvision"])
        )

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
    def test_an_image_of_another_mode_is_made_rgb(self, mode):
        photo = ramp(64, 64).convert("L").convert("LA") if mode == "LA" else ramp(64, 64).convert(mode)
        found = preprocess(photo, plain(resize=64, crop=64))
        assert np.array_equal(found, np.asarray(photo.convert("RGB")))


class TestRefused:
    @pytest.mark.parametrize(
        "changes",
        [
            {"crop": 0},
            {"resize": -1},
            {"interpolation": "lanczos"},
            {"channel_order": "GBR"},
            {"scale": 0.0},
            {"std": (1.0, 0.0, 1.0)},
            {"mean": (1.0, 2.0)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_preprocessing_that_makes_no_image(self, changes):
        with pytest.raises(InputError) as caught:
            Preprocessing(**changes)
        assert "expected" in str(caught.value)
        assert next(iter(changes)) in str(caught.value)

    def test_a_photograph_that_would_be_resized_to_gigabytes(self, tmp_path):
        path = tmp_path / "line.png"
        Image.new("RGB", (2_000, 1)).save(path)
        with pytest.raises(
            InputError, match=r"line\.png: a photograph of 2000 x 1 pixels would be resized to 512000 x 256"
        ):
            preprocess(path, PRESETS["torchvision"])
        assert preprocess(path, PRESETS["keras_caffe"]).shape == (224, 224, 3)

    @pytest.mark.parametrize("side", [9_460, 14_000, 60_000])
    def test_a_bomb(self, tmp_path, side):
        # A file of a few kilobytes whose zeros unpack to gigabytes; 9,460² is just above Pillow's own warning.
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        path = tmp_path / "bomb.png"
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
            + chunk(b"IEND", b"")
        )
        with pytest.raises(InputError) as caught:
            images.read(path)
        assert str(caught.value).startswith(f"{path}: the image cannot be read: ")
        assert "\n" not in str(caught.value)
        assert "pixels" in str(caught.value)

    def test_what_pillow_only_warns_of(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)  # it warns above that, and refuses above twice that
        ramp(10, 10).save(tmp_path / "p.png")
        with pytest.raises(InputError, match=r"exceeds limit of 99 pixels"):
            images.read(tmp_path / "p.png")

    def test_a_bomb_where_pillow_was_told_to_trust_everything(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        monkeypatch.setattr(images.decoding, "MOST_PIXELS", 99)
        ramp(10, 10).save(tmp_path / "p.png")
        with pytest.raises(InputError, match=r"its 10 x 10 pixels are more than 99"):
            images.read(tmp_path / "p.png")


class TestClassNames:
    def test_there_are_a_thousand_of_imagenet_in_its_order(self):
        names = images.class_names(1000)
        assert len(names) == 1000
        # The indices that everybody quotes.
        assert [names[n] for n in (0, 1, 207, 281, 619, 985, 999)] == [
            "tench",
            "goldfish",
            "golden retriever",
            "tabby",
            "lampshade",
            "daisy",
            "toilet tissue",
        ]
        assert all(name == name.strip() != "" for name in names)
        assert len(set(names)) == 1000

    @pytest.mark.parametrize("classes", [1, 10, 999, 1001, 21841])
    def test_other_numbers_have_none(self, classes):
        assert images.class_names(classes) is None
