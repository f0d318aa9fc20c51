"""Photographs into batches: the same bytes every time, right for every kind of file, one line for a bad one."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import images
from common.errors import InputError

# 24 x 16 pixels, each channel with a slope of its own, so that no turn and no swap goes unnoticed.
ROWS, COLUMNS = np.mgrid[:16, :24]
PIXELS = np.stack([10 * COLUMNS, 15 * ROWS, 100 + 3 * ROWS + 4 * COLUMNS], axis=-1).astype(np.uint8)
GREY = (8 * ROWS + 5 * COLUMNS).astype(np.uint8)


def pixels(path):
    image = images.read(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(call, path):
    """The message of the error raised, which is an `InputError`, one line, with the path in front."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.fixture
def photo(tmp_path):
    def save(image, name="photo.png", **options):
        path = tmp_path / name
        image.save(path, **options)
        return path

    return save


@pytest.fixture(scope="module")
def photos():
    return images.sample_photos()


class TestRead:
    # What has to be done to the upright pixels to store them as the orientation says (EXIF 2.3, tag 0x0112): the first
    # row and the first column stored are the visual side named.
    @pytest.mark.parametrize(
        ("orientation", "stored"),
        [
            (1, lambda p: p),
            (2, lambda p: p[:, ::-1]),  # top, right
            (3, lambda p: p[::-1, ::-1]),  # bottom, right
            (4, lambda p: p[::-1]),  # bottom, left
            (5, lambda p: p.swapaxes(0, 1)),  # left, top
            (6, lambda p: p.swapaxes(0, 1)[::-1]),  # right, top
            (7, lambda p: p.swapaxes(0, 1)[::-1, ::-1]),  # right, bottom
            (8, lambda p: p.swapaxes(0, 1)[:, ::-1]),  # left, bottom
        ],
    )
    def test_a_photograph_is_turned_upright(self, photo, orientation, stored):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = photo(Image.fromarray(np.ascontiguousarray(stored(PIXELS))), exif=exif)
        assert np.array_equal(pixels(path), PIXELS)

    @pytest.mark.parametrize("name", ["p.png", "p.bmp", "p.tif", "p.ppm", "p.webp"])
    def test_lossless_formats_give_the_very_pixels(self, photo, name):
        path = photo(Image.fromarray(PIXELS), name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.array_equal(pixels(path), PIXELS)

    @pytest.mark.parametrize(
        ("make", "name", "slack"),
        [
            (lambda: Image.fromarray(GREY), "grey.png", 0),
            (lambda: Image.fromarray(GREY), "grey.jpg", 6),
            (lambda: Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (24, 16), 9)]), "grey-alpha.png", 0),
            (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), "grey16.png", 0),
            (lambda: Image.fromarray(GREY.astype(np.uint16) * 257), "grey16.tif", 0),
        ],
        ids=["8 bits", "JPEG", "alpha", "16 bits PNG", "16 bits TIFF"],
    )
    def test_grey_becomes_three_equal_channels(self, photo, make, name, slack):
        found = pixels(photo(make(), name, **({"quality": 100} if name.endswith("jpg") else {})))
        assert (found == found[..., :1]).all()
        assert np.abs(found[..., 0].astype(int) - GREY).max() <= slack

    def test_black_and_white_becomes_0_and_255(self, photo):
        found = pixels(photo(Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE)))
        assert np.array_equal(found, np.repeat(np.where(GREY > 127, 255, 0)[..., None], 3, axis=-1))

    @pytest.mark.parametrize("name", ["p.gif", "p.png"])
    def test_a_palette_is_looked_up(self, photo, name):
        colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 99, 199]], dtype=np.uint8)
        expected = colours[(ROWS + COLUMNS) % 4]
        image = Image.fromarray(expected).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
        assert np.array_equal(pixels(photo(image, name)), expected)

    @pytest.mark.parametrize(("name", "slack"), [("p.tif", 1), ("p.jpg", 12)])
    def test_ink_is_turned_into_light(self, photo, name, slack):
        ink = Image.merge(
            "CMYK", [Image.fromarray(255 - PIXELS[..., c]) for c in range(3)] + [Image.new("L", (24, 16))]
        )
        found = pixels(photo(ink, name, **({"quality": 100, "subsampling": 0} if name.endswith("jpg") else {})))
        assert np.abs(found.astype(int) - PIXELS).max() <= slack

    def test_transparency_is_dropped_and_the_colours_below_stay(self, photo):
        alpha = Image.fromarray(GREY)
        image = Image.merge("RGBA", [*Image.fromarray(PIXELS).split(), alpha])
        assert np.array_equal(pixels(photo(image)), PIXELS)

    @pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
    def test_pixels_without_a_known_white_are_refused(self, photo, dtype, mode):
        path = photo(Image.fromarray(GREY.astype(dtype)), "p.tif")
        assert f"its pixels are of mode {mode}" in refused(lambda: images.read(path), path)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "not an image that Pillow can read"),
            (b"no image at all\n" * 100, "not an image that Pillow can read"),
            (b"\x89PNG\r\n\x1a\n", "not an image that Pillow can read"),
            (bytes(5000), "not an image that Pillow can read"),
        ],
        ids=["empty", "text", "PNG signature alone", "zeros"],
    )
    def test_a_file_that_is_no_image_is_called_that(self, tmp_path, content, expected):
        path = tmp_path / "photo.jpg"
        path.write_bytes(content)
        assert expected in refused(lambda: images.read(path), path)

    def test_a_missing_file_and_a_folder_are_called_that(self, tmp_path):
        missing = tmp_path / "none.jpg"
        assert refused(lambda: images.read(missing), missing).endswith("No such file or directory")
        assert refused(lambda: images.read(tmp_path), tmp_path).endswith("Is a directory")

    @pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF"])
    def test_a_truncated_file_is_refused(self, tmp_path, form):
        raw = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(raw, form)
        path = tmp_path / "photo"
        for share in (0.02, 0.3, 0.6, 0.9):
            path.write_bytes(raw.getvalue()[: int(raw.tell() * share)])
            refused(lambda: images.read(path), path)

    def test_an_image_that_would_fill_the_memory_is_refused(self, photo, monkeypatch):
        path = photo(Image.fromarray(PIXELS))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert "exceeds limit" in refused(lambda: images.read(path), path)

    @given(
        st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"]),
        st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=5),
        st.floats(0, 1),
    )
    @settings(max_examples=150, deadline=None)
    def test_any_damage_gives_an_image_or_one_line(self, tmp_path_factory, form, changes, kept):
        raw = io.BytesIO()
        try:
            Image.fromarray(PIXELS).save(raw, form)
        except (KeyError, OSError):  # Pillow was built without it
            return
        damaged = bytearray(raw.getvalue())
        for place, value in changes:
            damaged[place % len(damaged)] = value
        path = tmp_path_factory.getbasetemp() / "damaged"
        path.write_bytes(damaged[: int(len(damaged) * kept) if kept < 0.5 else None])
        try:
            images.read(path)
        except InputError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 - it may be an image still
            assert "\n" not in str(error)  # noqa: PT017


GREY_LEVEL = 1 / 255 / 0.224  # the largest of a channel, in units of a normalised image


class TestBatch:
    def test_the_two_sample_photographs_are_found(self, photos):
        assert [path.name for path in photos] == ["china.jpg", "flower.jpg"]
        assert all(isinstance(path, Path) and path.is_file() for path in photos)

    def test_there_are_none_where_scikit_learn_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(images.decoding, "find_spec", lambda name: None)
        assert images.sample_photos() == []

    @pytest.mark.parametrize("channels", [1, 3, 5])
    @pytest.mark.parametrize("size", [(64, 64), (65, 64), (33, 97), (1, 1), (7, 3)])
    @pytest.mark.parametrize("source", ["photos", "noise"])
    def test_shapes_are_those_asked_for(self, photos, size, channels, source):
        batch = images.batch(photos if source == "photos" else [], 3, size, channels, 10)
        assert batch.images.shape == (3, *size, channels)
        assert batch.labels.shape == (3,)
        assert batch.images.dtype == np.float64
        assert np.isfinite(batch.images).all()

    @pytest.mark.parametrize("source", ["photos", "noise"])
    def test_a_batch_comes_again_by_seed_and_another_seed_gives_another(self, photos, source):
        paths = photos if source == "photos" else []
        first, again, other = (images.batch(paths, 4, (32, 40), 3, 1000, seed) for seed in (1, 1, 2))
        assert first.images.tobytes() == again.images.tobytes()
        assert first.labels.tolist() == again.labels.tolist()
        assert first.labels.tolist() != other.labels.tolist()
        # The first crop of a photograph is its centre, whatever the seed; further ones are random.
        equal = [np.abs(a - b).max() < GREY_LEVEL for a, b in zip(first.images, other.images, strict=True)]
        assert equal == ([True, True, False, False] if paths else [False] * 4)
        assert not any(np.array_equal(a, b) for a, b in zip(first.images, other.images, strict=True))

    def test_no_two_pixels_are_equal_where_a_photograph_is_of_one_colour(self, photo):
        # Equal ones would tie in a max-pool, and rounding alone would send a gradient one way or the other.
        image = images.batch([photo(Image.new("RGB", (50, 40), (255, 0, 51)))], 1, (8, 8), 3, 10).images[0]
        assert len(np.unique(image)) == image.size

    def test_no_two_images_of_a_batch_are_the_same(self, photos):
        batch = images.batch(photos, 6, (48, 48), 3, 10)
        assert len({image.tobytes() for image in batch.images}) == 6
        # Two photographs, not two crops of one: their means differ by far more than crops of one do.
        assert np.abs(batch.images[0].mean(axis=(0, 1)) - batch.images[1].mean(axis=(0, 1))).max() > 0.3

    def test_channels_beyond_the_third_are_another_crop(self, photos):
        image = images.batch(photos, 1, (48, 48), 5, 10).images[0]
        three = images.batch(photos, 1, (48, 48), 3, 10).images[0]
        assert np.array_equal(image[..., :3], three)
        assert not np.array_equal(image[..., 3], image[..., 0])

    @pytest.mark.parametrize("classes", [1, 2, 7, 1000])
    def test_labels_are_classes(self, photos, classes):
        labels = images.batch([], 200, (1, 1), 1, classes).labels
        assert labels.min() >= 0
        assert labels.max() < classes
        # 200 draws miss one of seven classes once in 10^12 times.
        assert len(np.unique(labels)) == classes or classes == 1000

    def test_values_are_normalised_with_the_mean_and_deviation_of_imagenet(self, photo):
        path = photo(Image.new("RGB", (50, 40), (255, 0, 51)))
        image = images.batch([path], 1, (8, 8), 3, 10).images[0]
        expected = (np.array([1.0, 0.0, 0.2]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        # But for the half of a grey level that the rounding of a photograph may have taken away.
        assert np.abs((image - expected) * [0.229, 0.224, 0.225]).max() <= 0.5 / 255 + 1e-12
        assert np.abs((image - expected).mean()) < 0.2 / 255 / 0.225

    def test_the_first_crop_is_the_middle_seven_eighths_of_the_shorter_side(self, photo):
        # 224 of 256 rows, and the middle of 512 columns, over which grey rises from left to right.
        ramp = np.broadcast_to((np.arange(512) // 2).astype(np.uint8), (256, 512))
        path = photo(Image.fromarray(np.ascontiguousarray(ramp)))
        image = images.batch([path], 1, (224, 224), 3, 10).images[0]
        found = np.round((image[..., 0] * 0.229 + 0.485) * 255)
        assert np.array_equal(found, ramp[16:240, 144:368])

    @pytest.mark.parametrize("shape", [(1, 1), (1, 30_000), (30_000, 1), (3, 9_000), (2, 3)])
    @pytest.mark.parametrize("size", [(32, 32), (33, 50)])
    def test_tiny_and_very_long_photographs_make_batches_in_little_memory(self, photo, shape, size, monkeypatch):
        made = []
        resize = Image.Image.resize
        monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: made.append(resize(*a, **k)) or made[-1])
        grey = (np.arange(shape[0])[:, None] + np.arange(shape[1])).astype(np.uint8)
        batch = images.batch([photo(Image.fromarray(grey))], 2, size, 3, 10)
        assert batch.images.shape == (2, *size, 3)
        assert np.isfinite(batch.images).all()
        assert max(max(image.size) for image in made) <= 10 * max(size)

    def test_the_source_names_the_photographs_or_the_noise(self, photos):
        assert images.batch(photos, 2, (8, 8), 3, 10).source == "china.jpg, flower.jpg"
        assert images.batch([], 2, (8, 8), 3, 10).source == "random noise"

    def test_noise_is_normal(self):
        noise = images.batch([], 4, (50, 50), 3, 10).images
        # 30,000 values: the mean scatters by 0.006, the variance by 0.008; six of them.
        assert abs(noise.mean()) < 0.036
        assert abs(noise.var() - 1) < 0.05

    def test_a_bad_photograph_among_good_ones_is_named(self, photos, tmp_path):
        bad = tmp_path / "bad.jpg"
        bad.write_bytes(b"")
        refused(lambda: images.batch([*photos, bad], 3, (16, 16), 3, 10), bad)
