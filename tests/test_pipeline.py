"""The input pipeline: a batch is a function of data, recipe and step, whoever prepares it, and for whatever share."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from common import datasets, images
from common.datasets import Dataset, Examples, Records
from common.datasets.base import Bytes
from common.errors import DataError, RecipeError, TrainingError
from common.training import augment, pipeline, streams
from common.training.augment import DRAWS
from common.training.recipe import Augmentation, TrainingRecipe
from common.training.trainer import Replica

COUNT, TESTED, BATCH = 100, 21, 12  # eight batches in an epoch, four images left over
PLAIN = TrainingRecipe(batch_size=BATCH)
RNG = np.random.default_rng(1)


def numbered(count):
    """Images of 4 x 5 pixels whose label is their number: an order can be read off the labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 60), np.uint8)
    return Records((Bytes.of(pixels),), np.arange(count), (4, 5, 3))


DATA = Dataset(
    name="numbers",
    train=numbered(COUNT),
    test=numbered(TESTED),
    classes=tuple(str(n) for n in range(COUNT)),
    channels=3,
    size=(4, 5),
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
    recipe="digits",
)
AUGMENTED = PLAIN.replace(augmentation={"pad": 2, "flip": True, "color_jitter": 0.3})


def batches(recipe=AUGMENTED, start=0, stop=8, data=DATA, **options):
    return list(pipeline.training_batches(data, recipe, start=start, stop=stop, **options))


def numbers(made):
    return np.concatenate([labels for _, labels in made])


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def joined(parts):
    """The batches of all replicas put together again."""
    return [tuple(np.concatenate(arrays) for arrays in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]


class TestOrder:
    def test_an_epoch_holds_no_image_twice_and_all_but_its_tail(self):
        assert pipeline.steps_per_epoch(DATA, PLAIN) == 8
        for epoch in range(4):
            seen = numbers(batches(start=8 * epoch, stop=8 * epoch + 8))
            assert len(seen) == len(set(seen.tolist())) == 96

    def test_an_epoch_holds_every_image_once_where_the_batch_divides(self):
        recipe = PLAIN.replace(batch_size=20)
        for epoch in range(3):
            seen = numbers(batches(recipe, start=5 * epoch, stop=5 * epoch + 5))
            assert sorted(seen.tolist()) == list(range(COUNT))

    def test_the_tail_differs_between_epochs(self):
        left = [set(range(COUNT)) - set(numbers(batches(start=8 * e, stop=8 * e + 8)).tolist()) for e in range(12)]
        assert len(set.union(*left)) > 20

    def test_every_epoch_and_every_seed_has_an_order_of_its_own(self):
        # Neighbouring seeds too: a shuffle seeded with seed + epoch would give them the same orders, one epoch apart.
        orders = {
            numbers(batches(PLAIN.replace(seed=seed), start=8 * epoch, stop=8 * epoch + 8)).tobytes()
            for seed in (0, 1, 2, 2**40)
            for epoch in range(4)
        }
        assert len(orders) == 16

    def test_the_shuffle_leaves_no_trace_of_the_order_before(self):
        seen = np.stack([numbers(batches(start=8 * epoch, stop=8 * epoch + 8)) for epoch in range(30)])
        # Where an image stands is uniform: the mean place of 30 has a deviation of 29 / sqrt(30) = 5.3.
        assert abs(seen.mean(axis=0) - 49.5).max() < 5 * 5.3
        assert abs(np.corrcoef(seen[0], np.arange(96))[0, 1]) < 0.35

    def test_the_images_are_those_of_the_labels(self):
        for made, labels in batches(PLAIN):
            expected = (DATA.train.images(labels) / 255 - DATA.mean) / DATA.std
            assert np.allclose(made, expected, atol=1e-6)
            assert (made.dtype, labels.dtype, made.shape) == (np.float32, np.int64, (BATCH, 4, 5, 3))

    def test_float64_holds_the_values_of_float32(self):
        single, double = batches(stop=2), batches(stop=2, dtype="float64")
        assert all(made.dtype == np.float64 for made, _ in double)
        assert same(single, double)

    def test_the_bytes_never_change(self):
        # The first batches of two epochs, on every machine and with every release of NumPy.
        recipe = TrainingRecipe(batch_size=64, augmentation=Augmentation(pad=1, flip=True), seed=7)
        digits = datasets.open("digits")
        assert pipeline.steps_per_epoch(digits, recipe) == 22
        digest = sha256()
        for start in (0, 22):
            for made, labels in batches(recipe, start, start + 2, digits):
                digest.update(np.ascontiguousarray(made).tobytes() + labels.tobytes())
        assert digest.hexdigest()[:16] == "115aad6140d6ab33"


class TestResume:
    @settings(max_examples=25, deadline=None)
    @given(start=st.integers(0, 30), length=st.integers(0, 6))
    def test_a_start_at_any_step_gives_what_a_run_from_the_beginning_gives(self, start, length):
        assert same(batches(start=start, stop=start + length), self.whole()[start : start + length])

    cached = None

    @classmethod
    def whole(cls):
        cls.cached = cls.cached or batches(stop=36)
        return cls.cached

    def test_steps_before_the_start_are_not_computed(self):
        class Watched(Examples):
            def __init__(self, whole):
                self.labels, self.whole, self.touched = whole.labels, whole, []

            def images(self, indices):
                self.touched += indices.tolist()
                return self.whole.images(indices)

        watched = Watched(DATA.train)
        made = batches(start=1_000_003, stop=1_000_005, data=Dataset(**(vars(DATA) | {"train": watched})))
        assert watched.touched == numbers(made).tolist()

    @pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 3), (3, 6)])
    def test_on_another_number_of_processes_each_remaining_image_is_seen_exactly_once(self, before, after):
        recipe = PLAIN.replace(batch_size=12)
        first = [batches(recipe, 0, 3, replica=Replica(rank=r, count=before)) for r in range(before)]
        rest = [batches(recipe, 3, 8, replica=Replica(rank=r, count=after)) for r in range(after)]
        seen = np.concatenate([numbers(made) for made in first + rest])
        assert len(seen) == len(set(seen.tolist())) == 96
        assert set(seen.tolist()) == set(numbers(batches(recipe)).tolist())


class TestReplicas:
    @pytest.mark.parametrize("count", [2, 3, 4, 12])
    def test_each_takes_its_part_of_the_same_batches(self, count):
        parts = [batches(start=6, stop=10, replica=Replica(rank=rank, count=count)) for rank in range(count)]
        assert same(joined(parts), batches(start=6, stop=10))

    @pytest.mark.parametrize("make", ["training_batches", "evaluation_batches"])
    def test_a_batch_that_cannot_be_shared_evenly(self, make):
        options = {"start": 0, "stop": 1} if make == "training_batches" else {}
        with pytest.raises(RecipeError, match=r"batch_size=12; expected a multiple of the 5 processes"):
            getattr(pipeline, make)(DATA, PLAIN, replica=Replica(rank=0, count=5), **options)

    def test_a_batch_larger_than_the_training_set(self):
        with pytest.raises(
            RecipeError, match=r"batch_size=101; numbers has 100 training images; set a smaller batch_size$"
        ):
            pipeline.steps_per_epoch(DATA, PLAIN.replace(batch_size=101))
        with pytest.raises(
            RecipeError, match=r"11 training images after 89 held out; set a smaller batch_size or validation$"
        ):
            batches(PLAIN.replace(validation=89))


class TestEvaluation:
    @pytest.mark.parametrize(("batch", "count"), [(12, 1), (12, 2), (12, 4), (21, 1), (7, 1), (40, 4)])
    def test_every_test_image_once_in_order_then_padding(self, batch, count):
        recipe = AUGMENTED.replace(batch_size=batch)
        parts = [
            list(pipeline.evaluation_batches(DATA, recipe, replica=Replica(rank=rank, count=count)))
            for rank in range(count)
        ]
        for part in parts:
            assert [made.shape for made, _ in part] == [(batch // count, 4, 5, 3)] * (-(-TESTED // batch))
        whole = joined(parts)
        labels = numbers(whole)
        assert labels.dtype == np.int64
        assert labels.tolist() == [*range(TESTED), *[-1] * (len(labels) - TESTED)]
        made = np.concatenate([one for one, _ in whole])
        assert np.allclose(made[:TESTED], (DATA.test.images(np.arange(TESTED)) / 255 - DATA.mean) / DATA.std, atol=1e-6)
        assert not made[TESTED:].any()

    def test_held_out_images_are_evaluated_in_place_of_the_test_and_never_trained_on(self):
        recipe = PLAIN.replace(validation=16)
        held = numbers(list(pipeline.evaluation_batches(DATA, recipe)))
        held = set(held[held >= 0].tolist())
        assert len(held) == 16
        assert pipeline.steps_per_epoch(DATA, recipe) == 7
        for epoch in range(2):
            trained = set(numbers(batches(recipe, 7 * epoch, 7 * epoch + 7)).tolist())
            assert trained == set(range(COUNT)) - held

    def test_the_same_images_are_held_out_whatever_the_seed(self):
        recipe = PLAIN.replace(validation=16)
        assert same(
            list(pipeline.evaluation_batches(DATA, recipe)),
            list(pipeline.evaluation_batches(DATA, recipe.replace(seed=5))),
        )

    def test_more_held_out_than_there_are(self):
        with pytest.raises(RecipeError, match="validation=100; numbers has 100 training images in all"):
            pipeline.evaluation_batches(DATA, PLAIN.replace(validation=COUNT))

    @pytest.mark.parametrize("augmentation", [{"size": 4}, {"size": 4, "resized_crop": True}, {"size": 7}])
    def test_the_words_for_a_preprocessing_prepare_what_the_recipe_prepares(self, augmentation):
        recipe = PLAIN.replace(augmentation=augmentation)
        said = pipeline.preprocessing(DATA, recipe)
        assert (said.crop, said.mean, said.std) == (augmentation["size"], DATA.mean, DATA.std)
        by_recipe, by_words = (
            list(pipeline.evaluation_batches(DATA, recipe, preprocessing=how)) for how in (None, said)
        )
        assert same(by_words, by_recipe)

    def test_images_are_prepared_as_the_weights_want_them(self):
        wanted = images.PRESETS["keras_caffe"]
        ((made, labels), _) = pipeline.evaluation_batches(DATA, PLAIN, preprocessing=wanted)
        pictures = [Image.fromarray(DATA.test[int(label)][0]) for label in labels]
        assert np.array_equal(made, np.stack([images.preprocess(picture, wanted) for picture in pictures]))

    def test_what_photographs_have_no_words_for(self):
        assert pipeline.preprocessing(DATA, PLAIN) is None  # 4 x 5 pixels
        grey = Dataset(**(vars(DATA) | {"channels": 1, "mean": (0.5,), "std": (0.5,)}))
        assert pipeline.preprocessing(grey, PLAIN.replace(augmentation={"size": 4})) is None

    def test_nothing_is_random(self):
        recipe = AUGMENTED.replace(augmentation={"pad": 2, "flip": True, "size": 4, "color_jitter": 0.5})
        assert same(
            list(pipeline.evaluation_batches(DATA, recipe)),
            list(pipeline.evaluation_batches(DATA, recipe.replace(seed=9))),
        )

    def test_images_of_different_sizes_need_a_size(self):
        data = Dataset(**(vars(DATA) | {"size": None}))
        with pytest.raises(RecipeError, match=r"images of numbers differ in size; set augmentation\.size"):
            pipeline.evaluation_batches(data, PLAIN)

    def test_a_mean_for_other_channels(self):
        with pytest.raises(RecipeError, match=r"augmentation.mean=\(0.5,\); expected 3 values"):
            batches(PLAIN.replace(augmentation={"mean": [0.5], "std": [0.5]}))


class TestAugmentation:
    IMAGE = RNG.integers(0, 256, (10, 14, 3), np.uint8)
    MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    KEY = np.array([3, 4], np.uint64)

    def made(self, draws, image=IMAGE, **fields):
        """The pixels of one example, its normalisation undone."""
        (values,) = augment.examples(
            [image], Augmentation(**fields), (0.0,) * image.shape[2], (1.0,) * image.shape[2], draws
        )
        assert values.dtype == np.float32
        pixels = values * 255
        assert np.abs(pixels - pixels.round()).max() < 1e-3
        return pixels.round().astype(np.uint8)

    def draws(self, **places):
        draws = np.full((1, DRAWS), 0.5)
        for name, value in places.items():
            draws[0, getattr(augment, f"_{name.upper()}")] = value
        return draws

    def test_the_numbers_of_a_position_do_not_depend_on_its_neighbours(self):
        whole = pipeline.draws_at(self.KEY, 1000, 8)
        assert whole.shape == (8, DRAWS)
        for place in range(8):
            assert np.array_equal(pipeline.draws_at(self.KEY, 1000 + place, 1)[0], whole[place])

    def test_the_numbers_are_uniform_and_positions_share_none(self):
        draws = pipeline.draws_at(self.KEY, 0, 5000)
        assert len(np.unique(draws)) == draws.size
        assert abs(draws.mean(axis=0) - 0.5).max() < 5 * (1 / 12 / 5000) ** 0.5
        assert abs(np.corrcoef(draws.T) - np.eye(DRAWS)).max() < 5 / 5000**0.5

    def test_normalised_values_are_those_of_the_formula_to_the_bit(self):
        (values,) = augment.examples([self.IMAGE], Augmentation(), self.MEAN, self.STD, None)
        single = [np.array(one, np.float32) for one in (self.MEAN, self.STD)]
        expected = (self.IMAGE.astype(np.float32) / np.float32(255) - single[0]) / single[1]
        assert values.tobytes() == expected.tobytes()

    @pytest.mark.parametrize("pad", [1, 4])
    def test_a_padded_crop_is_a_window_of_the_image_with_black_around_it(self, pad):
        padded = np.pad(self.IMAGE, ((pad, pad), (pad, pad), (0, 0)))
        windows = set()
        for draws in pipeline.draws_at(self.KEY, 0, 400):
            top, left = (int(draws[place] * (2 * pad + 1)) for place in (0, 1))
            windows.add((top, left))
            assert np.array_equal(self.made(draws[None], pad=pad), padded[top : top + 10, left : left + 14])
        assert len(windows) == (2 * pad + 1) ** 2

    def test_half_of_the_images_are_flipped(self):
        flipped = 0
        for draws in pipeline.draws_at(self.KEY, 0, 400):
            made = self.made(draws[None], flip=True)
            assert np.array_equal(made, self.IMAGE) != np.array_equal(made, self.IMAGE[:, ::-1])
            flipped += np.array_equal(made, self.IMAGE[:, ::-1])
        assert abs(flipped - 200) < 5 * 10

    def test_brightness_contrast_and_saturation_are_their_formulas(self):
        most, image = 0.4, self.IMAGE.astype(float)

        def grey(pixels):
            return (pixels @ [0.299, 0.587, 0.114])[..., None]

        for name, reference in (
            ("brightness", lambda pixels: 0),
            ("contrast", lambda pixels: round(grey(pixels).mean())),
            ("saturation", grey),
        ):
            for draw in (0.0, 0.2, 0.9):
                factor = 1 + most * (2 * draw - 1)
                start = reference(image)
                expected = np.clip(start + factor * (image - start), 0, 255)
                made = self.made(self.draws(**{name: draw}), color_jitter=most)
                assert np.abs(made - expected).max() <= 2  # rounded down, and the grey in whole numbers

    def test_a_grey_image_has_no_saturation(self):
        grey = self.IMAGE[..., :1]
        assert np.array_equal(self.made(self.draws(saturation=0.9), grey, color_jitter=0.4), grey)
        assert not np.array_equal(self.made(self.draws(contrast=0.9), grey, color_jitter=0.4), grey)

    def test_a_random_part_is_a_box_of_the_image_resized(self):
        # Both coordinates of a pixel can be read off it: rows in red, columns in green.
        rows, columns = np.mgrid[:120, :100]
        image = np.stack([2 * rows, 2 * columns, 0 * rows], axis=-1).astype(np.uint8)
        shares, ratios, corners = [], [], set()
        for draws in pipeline.draws_at(self.KEY, 0, 500):
            made = self.made(draws[None], image, size=16, resized_crop=True).astype(float) / 2
            assert made.shape == (16, 16, 3)
            # The middles of sixteen bins: the first and last are half a bin inside the box.
            height, width = (
                (made[-1, :, 0] - made[0, :, 0]).mean() * 16 / 15,
                (made[:, -1, 1] - made[:, 0, 1]).mean() * 16 / 15,
            )
            shares.append(height * width / image[..., 0].size)
            ratios.append(width / height)
            corners.add((round(made[0, 0, 0] - height / 32), round(made[0, 0, 1] - width / 32)))
        assert 0.06 < min(shares) < 0.12
        assert 0.9 < max(shares) <= 1.02
        assert 0.72 < min(ratios) < 0.80
        assert 1.25 < max(ratios) < 1.39
        assert abs(np.log(ratios).mean()) < 0.05  # as often wide as high
        assert 0.38 < np.mean(shares) < 0.58  # uniform between 0.08 and 1, the largest fit less often
        assert len(corners) > 300

    def test_a_random_part_of_a_very_long_image_fits(self):
        for shape in ((4, 400), (400, 4), (1, 1), (1, 50)):
            image = RNG.integers(0, 256, (*shape, 3), np.uint8)
            for draws in pipeline.draws_at(self.KEY, 0, 20):
                assert self.made(draws[None], image, size=8, resized_crop=True).shape == (8, 8, 3)

    def test_a_random_part_without_a_size_is_resized_to_the_image(self):
        draws = pipeline.draws_at(self.KEY, 0, 1)
        assert self.made(draws, resized_crop=True).shape == self.IMAGE.shape

    @pytest.mark.parametrize("training", [True, False])
    def test_a_size_squeezes_nothing_and_takes_the_middle(self, training):
        draws = self.draws() if training else None
        small = Image.fromarray(self.IMAGE).resize((28, 20), Image.Resampling.BILINEAR)  # the shorter side, 10, to 20
        assert np.array_equal(self.made(draws, size=20), np.asarray(small.crop((4, 0, 24, 20))))

    def test_after_training_on_parts_an_image_is_tested_as_torchvision_does(self):
        (photo, *_) = images.sample_photos()
        (made,) = augment.examples(
            [np.asarray(images.read(photo))],
            Augmentation(size=224, resized_crop=True, flip=True),
            tuple(images.IMAGENET_MEAN),
            tuple(images.IMAGENET_STD),
            None,
        )
        assert np.array_equal(made, images.preprocess(photo, images.PRESETS["torchvision"]))

    def test_the_steps_follow_each_other_as_the_recipe_says(self):
        draws = self.draws(top=0.0, left=0.99, flip=0.1, brightness=0.9)
        small = np.asarray(Image.fromarray(self.IMAGE).resize((16, 12), Image.Resampling.BILINEAR))[:, 2:14]
        assert np.array_equal(self.made(self.draws(), size=12), small)
        shifted = np.pad(small, ((3, 3), (3, 3), (0, 0)))[:12, 6:]
        bright = ImageEnhance.Brightness(Image.fromarray(np.ascontiguousarray(shifted[:, ::-1]))).enhance(1.4)
        made = self.made(draws, size=12, pad=3, flip=True, color_jitter=0.5)
        assert np.array_equal(made, np.asarray(bright))

    def test_one_example_is_that_of_a_batch(self):
        key = streams.key(AUGMENTED.seed, streams.AUGMENTATION)
        made, labels = batches(start=3, stop=4)[0]
        for place in range(BATCH):
            generator = np.random.Generator(np.random.Philox(key=key, counter=(3 * BATCH + place) * 8))
            image = DATA.train[labels[place]][0]
            (one,) = augment.examples(
                [image], AUGMENTED.augmentation, DATA.mean, DATA.std, generator.random((1, DRAWS))
            )
            assert np.array_equal(one, made[place])

    def test_examples_of_different_sizes(self):
        pair = [self.IMAGE, self.IMAGE[:, 1:]]
        with pytest.raises(RecipeError, match=r"\(10, 14\) and \(10, 13\) pixels cannot share a batch"):
            augment.examples(pair, Augmentation(), self.MEAN, self.STD, None)

    def test_an_image_is_not_changed(self):
        before = self.IMAGE.copy()
        self.made(pipeline.draws_at(self.KEY, 5, 1), pad=2, flip=True, color_jitter=0.5)
        assert np.array_equal(before, self.IMAGE)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(parent):
    """The processes that prepare images for `parent`, by number."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            mother = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if mother == str(parent) and b"common.training.loaders" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
from test_pipeline import DATA, AUGMENTED
from common.training import pipeline
made = pipeline.training_batches(DATA, AUGMENTED, start=0, stop=10**6, workers=2)
next(made)
print("begun", flush=True)
sys.stdin.readline()
print(json.dumps([next(made)[1].tolist() for _ in range(20)]), flush=True)
# It ends without having closed anything.
"""


class TestWorkers:
    @pytest.fixture
    def process(self, tmp_path):
        """A process in a group of its own that has taken a batch, and its two workers."""
        script = tmp_path / "train.py"
        script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        parent = subprocess.Popen([sys.executable, str(script)], text=True, start_new_session=True, **pipes)
        assert parent.stdout.readline() == "begun\n"
        workers = children(parent.pid)
        assert len(workers) == 2
        yield parent, workers
        parent.kill()
        parent.communicate()

    @pytest.mark.parametrize("workers", [1, 3])
    def test_any_number_of_them_gives_the_same_bytes(self, workers):
        assert same(batches(start=5, stop=16, workers=workers), batches(start=5, stop=16))

    def test_they_prepare_evaluations_too(self):
        alone = list(pipeline.evaluation_batches(DATA, PLAIN))
        assert same(list(pipeline.evaluation_batches(DATA, PLAIN, workers=5)), alone)  # two batches

    def test_photographs_of_all_sizes_make_the_same_batches(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for n in range(8):
                pixels = RNG.integers(0, 256, (9 + n, 20 - n, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / f"{n}.png")
        data = datasets.open(str(tmp_path))
        assert data.size is None
        recipe = PLAIN.replace(
            batch_size=5, augmentation={"size": 8, "resized_crop": True, "flip": True, "color_jitter": 0.4}
        )
        alone = batches(recipe, stop=4, data=data)
        assert {made.shape for made, _ in alone} == {(5, 8, 8, 3)}
        assert same(batches(recipe, stop=4, data=data, workers=2), alone)
        (tested,) = pipeline.evaluation_batches(data, recipe)
        assert tested[1].tolist() == [0, 1, -1, -1, -1]

    def test_an_error_inside_one_arrives_as_it_is(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for n in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / name / f"{n}.png")
        data = datasets.open(str(tmp_path))
        for path in tmp_path.glob("a/*"):
            path.unlink()
        for workers in (0, 1):
            with pytest.raises(DataError) as caught:
                batches(PLAIN.replace(batch_size=3), stop=4, data=data, workers=workers)
            assert str(caught.value).startswith(str(tmp_path / "a"))
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("taken", [1, 2, 5])
    def test_one_that_is_killed_ends_the_training_with_one_line(self, taken):
        made = pipeline.training_batches(DATA, PLAIN, start=0, stop=10**6, workers=2)
        list(islice(made, taken))
        os.kill(children(os.getpid())[0], signal.SIGKILL)
        with pytest.raises(
            TrainingError, match=r"a process that prepares images was killed by SIGKILL; .*fewer workers"
        ):
            for _ in made:
                pass
        assert not children(os.getpid())

    def test_leaving_off_ends_them(self):
        made = pipeline.training_batches(DATA, PLAIN, start=0, stop=10**6, workers=2)
        list(islice(made, 3))
        assert len(children(os.getpid())) == 2
        made.close()
        assert not children(os.getpid())

    def test_they_end_with_the_process_that_is_killed(self, process):
        parent, workers = process
        parent.kill()
        until(lambda: not any(running(pid) for pid in workers))

    def test_a_signal_to_the_whole_group_is_for_the_process_that_trains(self, process):
        parent, workers = process
        assert all(os.getpgid(pid) != os.getpgid(parent.pid) for pid in workers)

    def test_they_end_with_a_process_that_ends(self, process):
        parent, workers = process
        out, errors = parent.communicate("go on\n", timeout=60)
        assert json.loads(out) == [labels.tolist() for _, labels in batches(start=1, stop=21)]
        assert (parent.returncode, errors) == (0, "")
        until(lambda: not any(running(pid) for pid in workers))

    def test_a_process_that_cannot_be_started(self, monkeypatch):
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(TrainingError, match="no process could be started to prepare images: No such file"):
            batches(workers=2)


def test_preparing_batches_brings_no_framework_into_the_process():
    code = (
        "import sys; from test_pipeline import DATA, PLAIN; from common.training import pipeline;"
        "list(pipeline.evaluation_batches(DATA, PLAIN));"
        "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'orbax') if m in sys.modules])"
    )
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == "[]"
    assert not done.stderr
