"""The input pipeline: a batch is a function of data, recipe and step, whoever prepares it, and for whatever share."""

import colorsys
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from hashlib import sha256
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from common import datasets, images
from common.datasets import Dataset, Examples, Records
from common.datasets.base import Bytes
from common.errors import DataError, RecipeError, TrainingError
from common.training import augment, pipeline, streams
from common.training.augment import DRAWS
from common.training.augmentation import CentreCrop, Crop, Flip, Jitter, Normalise, Resize, ResizedCrop
from common.training.recipe import PRESETS, TrainingRecipe
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
JITTER = Jitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2)
AUGMENTED = PLAIN.replace(augmentation=(Crop(pad=2), Flip(), JITTER))


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
        recipe = TrainingRecipe(batch_size=64, augmentation=(Crop(pad=1), Flip()), seed=7)
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

    @pytest.mark.parametrize(
        ("steps", "crop", "resize"),
        [
            ((Resize(size=7), CentreCrop(size=4), Crop(pad=2), Flip(), JITTER), 4, 7),
            ((ResizedCrop(size=4),), 4, 5),
            ((Flip(), CentreCrop(size=3)), 3, 4),
            ((Crop(size=6, pad=1),), 6, 4),
        ],
    )
    def test_the_words_for_a_preprocessing_prepare_what_the_recipe_prepares(self, steps, crop, resize):
        recipe = PLAIN.replace(augmentation=steps)
        said = pipeline.preprocessing(DATA, recipe)
        assert (said.crop, said.resize, said.mean, said.std) == (crop, resize, DATA.mean, DATA.std)
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
        assert pipeline.preprocessing(grey, PLAIN.replace(augmentation=(CentreCrop(size=4),))) is None
        for steps in ((Resize(size=8), ResizedCrop(size=4)), (CentreCrop(size=4), Resize(size=8))):
            assert pipeline.preprocessing(DATA, PLAIN.replace(augmentation=steps)) is None

    def test_nothing_is_random(self):
        recipe = AUGMENTED.replace(augmentation=(Crop(size=4, pad=2), Flip(), JITTER))
        assert same(
            list(pipeline.evaluation_batches(DATA, recipe)),
            list(pipeline.evaluation_batches(DATA, recipe.replace(seed=9))),
        )

    def test_images_of_different_sizes_need_a_size(self):
        data = Dataset(**(vars(DATA) | {"size": None}))
        for steps in ((), (Resize(size=4), Crop(pad=1), ResizedCrop())):
            recipe = PLAIN.replace(augmentation=steps)
            with pytest.raises(RecipeError, match=r"images of numbers differ in size; set augmentation\.size"):
                pipeline.evaluation_batches(data, recipe)
        pipeline.evaluation_batches(data, PLAIN.replace(augmentation=(Crop(size=4),)))

    def test_a_crop_larger_than_the_images(self):
        with pytest.raises(RecipeError, match=r"a crop of 7x7 does not fit into images of 4x5 with pad=1; resize"):
            batches(PLAIN.replace(augmentation=(Crop(size=7, pad=1),)))

    def test_a_mean_for_other_channels(self):
        recipe = PLAIN.replace(augmentation=(Normalise(mean=(0.5, 0.5), std=(0.5, 0.5)),))
        with pytest.raises(RecipeError, match=r"augmentation.normalise.mean=\(0.5, 0.5\); expected 3 values .*or one"):
            batches(recipe)

    def test_the_recipes_own_normalisation_takes_the_place_of_the_datas(self):
        whole, each = (
            PLAIN.replace(augmentation=(Normalise(mean=(0.5,) * count, std=(0.25,) * count),)) for count in (1, 3)
        )
        assert same(batches(whole), batches(each))
        made, labels = batches(whole)[0]
        assert np.allclose(made, (DATA.train.images(labels) / 255 - 0.5) * 4, atol=1e-6)
        square = whole.replace(augmentation=(CentreCrop(size=4), *whole.augmentation))
        assert pipeline.preprocessing(DATA, square).std == (0.25, 0.25, 0.25)


class TestAugmentation:
    IMAGE = RNG.integers(0, 256, (10, 14, 3), np.uint8)
    MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    KEY = np.array([3, 4], np.uint64)

    def made(self, draws, *steps, image=IMAGE):
        """The pixels of one example, not normalised."""
        (values,) = augment.examples([image], steps, (0.0,), (1.0,), draws)
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
        (values,) = augment.examples([self.IMAGE], (), self.MEAN, self.STD, None)
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
            assert np.array_equal(self.made(draws[None], Crop(pad=pad)), padded[top : top + 10, left : left + 14])
        assert len(windows) == (2 * pad + 1) ** 2

    @pytest.mark.parametrize(("size", "pad"), [(6, 0), (10, 0), (3, 2), (12, 1)])
    def test_a_crop_of_a_size_is_any_window_of_it(self, size, pad):
        padded = np.pad(self.IMAGE, ((pad, pad), (pad, pad), (0, 0)))
        windows = {
            padded[top : top + size, left : left + size].tobytes()
            for top in range(10 + 2 * pad - size + 1)
            for left in range(14 + 2 * pad - size + 1)
        }
        found = {self.made(d[None], Crop(size=size, pad=pad)).tobytes() for d in pipeline.draws_at(self.KEY, 0, 1500)}
        assert found == windows

    def test_a_crop_that_does_not_fit(self):
        with pytest.raises(RecipeError, match=r"a crop of 13x13 does not fit into images of 10x14 with pad=1"):
            self.made(self.draws(), Crop(size=13, pad=1))

    def test_half_of_the_images_are_flipped(self):
        flipped = 0
        for draws in pipeline.draws_at(self.KEY, 0, 400):
            made = self.made(draws[None], Flip())
            assert np.array_equal(made, self.IMAGE) != np.array_equal(made, self.IMAGE[:, ::-1])
            flipped += np.array_equal(made, self.IMAGE[:, ::-1])
        assert abs(flipped - 200) < 5 * 10

    def test_each_jitter_of_its_own_factor_is_its_formula(self):
        image = self.IMAGE.astype(float)

        def grey(pixels):
            return (pixels @ [0.299, 0.587, 0.114])[..., None]

        for name, reference in (
            ("brightness", lambda pixels: 0),
            ("contrast", lambda pixels: round(grey(pixels).mean())),
            ("saturation", grey),
        ):
            for most, draw in ((0.4, 0.0), (0.4, 0.2), (0.4, 0.9), (1.5, 0.0), (1.5, 0.7)):
                low, high = max(0, 1 - most), 1 + most
                start = reference(image)
                expected = np.clip(start + (low + draw * (high - low)) * (image - start), 0, 255)
                made = self.made(self.draws(**{name: draw}), Jitter(**{name: most}))
                assert np.abs(made - expected).max() <= 2  # rounded down, and the grey in whole numbers

    @pytest.mark.parametrize(("hue", "draw"), [(0.5, 0.0), (0.3, 0.9), (0.25, 1.0), (0.1, 0.0), (0.4, 0.5)])
    def test_the_hue_turns_by_its_factor_of_a_circle(self, hue, draw):
        colours = [(one, 255, 255) for one in np.linspace(0, 1, 12, endpoint=False)]
        image = np.array([[colorsys.hsv_to_rgb(h, 0.8, 0.9) for h, _, _ in colours]] * 2)
        image = (image * 255).round().astype(np.uint8)
        made = self.made(self.draws(hue=draw), Jitter(hue=hue), image=image)
        turned = hue * (2 * draw - 1)
        for before, after in zip(image[0] / 255, made[0] / 255, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*before)
            found = colorsys.rgb_to_hsv(*after)
            assert abs((found[0] - h - turned + 0.5) % 1 - 0.5) < 0.015  # hues are 256
            assert found[1:] == pytest.approx((s, v), abs=0.02)

    @pytest.mark.parametrize("draw", [0.0, 0.3, 0.5, 0.998, 1.0])
    def test_the_hue_turns_in_whole_steps_towards_zero(self, draw):
        hues = np.array(Image.fromarray(self.IMAGE).convert("HSV"))
        hues[..., 0] += np.uint8(int(255 * 0.5 * (2 * draw - 1)) % 256)
        expected = Image.frombytes("HSV", (14, 10), hues.tobytes()).convert("RGB")
        assert np.array_equal(self.made(self.draws(hue=draw), Jitter(hue=0.5)), np.asarray(expected))

    def test_a_grey_image_has_neither_saturation_nor_hue(self):
        grey, jitter = self.IMAGE[..., :1], Jitter(contrast=0.4, saturation=0.4, hue=0.4)
        assert np.array_equal(self.made(self.draws(saturation=0.9, hue=0.9), jitter, image=grey), grey)
        assert not np.array_equal(self.made(self.draws(contrast=0.9), jitter, image=grey), grey)

    def test_the_jitters_come_in_every_order_equally_often(self):
        jitter = Jitter(brightness=0.9, contrast=0.9, saturation=0.9, hue=0.4)
        factors = {"brightness": 1.81, "contrast": 0.19, "saturation": 1.81, "hue": 0.36}
        orders = {}
        for order in permutations(factors):
            picture = Image.fromarray(self.IMAGE)
            for name in order:
                picture = augment.coloured(picture, name, factors[name])
            orders[np.asarray(picture).tobytes()] = order
        seen = Counter()
        for draws in pipeline.draws_at(self.KEY, 0, 2400):
            for name, draw in (("brightness", 0.95), ("contrast", 0.05), ("saturation", 0.95), ("hue", 0.95)):
                draws[getattr(augment, f"_{name.upper()}")] = draw
            seen[orders[self.made(draws[None], jitter).tobytes()]] += 1
        firsts = Counter(order[0] for order in seen.elements())
        assert len(set(orders.values())) == len(seen) == 24
        assert all(abs(count - 100) < 5 * 10 for count in seen.values())
        assert all(abs(count - 600) < 5 * 22 for count in firsts.values())

    def test_a_random_part_is_a_box_of_the_image_resized(self):
        # Both coordinates of a pixel can be read off it: rows in red, columns in green.
        rows, columns = np.mgrid[:120, :100]
        image = np.stack([2 * rows, 2 * columns, 0 * rows], axis=-1).astype(np.uint8)
        shares, ratios, corners = [], [], set()
        for draws in pipeline.draws_at(self.KEY, 0, 500):
            made = self.made(draws[None], ResizedCrop(size=16), image=image).astype(float) / 2
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
                assert self.made(draws[None], ResizedCrop(size=8), image=image).shape == (8, 8, 3)

    def test_a_random_part_without_a_size_is_resized_to_the_image(self):
        draws = pipeline.draws_at(self.KEY, 0, 1)
        assert self.made(draws, ResizedCrop()).shape == self.IMAGE.shape

    @pytest.mark.parametrize("training", [True, False])
    def test_a_resize_squeezes_nothing_and_the_middle_is_the_middle(self, training):
        draws = self.draws() if training else None
        small = Image.fromarray(self.IMAGE).resize((28, 20), Image.Resampling.BILINEAR)  # the shorter side, 10, to 20
        assert np.array_equal(self.made(draws, Resize(size=20)), np.asarray(small))
        made = self.made(draws, Resize(size=20), CentreCrop(size=20))
        assert np.array_equal(made, np.asarray(small.crop((4, 0, 24, 20))))
        assert np.array_equal(self.made(draws, CentreCrop(size=6)), self.IMAGE[2:8, 4:10])
        assert np.array_equal(self.made(draws, CentreCrop(size=14)), np.pad(self.IMAGE, ((2, 2), (0, 0), (0, 0))))

    def test_after_training_on_parts_an_image_is_tested_as_torchvision_does(self):
        (photo, *_) = images.sample_photos()
        (made,) = augment.examples(
            [np.asarray(images.read(photo))],
            (ResizedCrop(size=224), Flip()),
            tuple(images.IMAGENET_MEAN),
            tuple(images.IMAGENET_STD),
            None,
        )
        assert np.array_equal(made, images.preprocess(photo, images.PRESETS["torchvision"]))

    def test_the_steps_follow_each_other_in_the_order_of_the_recipe(self):
        draws = self.draws(top=0.0, left=0.99, flip=0.1, brightness=0.9)
        picture = Image.fromarray(self.IMAGE)
        resize, crop, flip, jitter = (Resize(size=12), Crop(size=9, pad=2), Flip(), Jitter(brightness=0.5))
        by_hand = {
            resize: lambda one: one.resize(
                (12 * one.width // min(one.size), 12 * one.height // min(one.size)), Image.Resampling.BILINEAR
            ),
            crop: lambda one: one.crop((one.width + 2 - 9, -2, one.width + 2, 7)),
            flip: ImageOps.mirror,
            jitter: lambda one: ImageEnhance.Brightness(one).enhance(1.4),
        }
        found = set()
        for order in permutations(by_hand):
            expected = picture
            for step in order:
                expected = by_hand[step](expected)
            made = self.made(draws, *order)
            assert np.array_equal(made, np.asarray(expected)), order
            found.add(made.tobytes())
        assert len(found) >= 4  # so that an order kept by the code could not pass

    def test_an_example_of_the_tutorials_preset_by_hand(self):
        image = RNG.integers(0, 256, (32, 32, 3), np.uint8)
        large = ImageOps.mirror(Image.fromarray(image).resize((256, 256), Image.Resampling.BILINEAR))
        part = large.crop((48, 96, 112, 160))
        for name, factor in (("brightness", 1.3), ("contrast", 0.8), ("hue", 0.24)):
            part = augment.coloured(part, name, factor)
        draws = self.draws(top=0.5, left=0.25, flip=0.1, brightness=0.8, contrast=0.3, hue=0.9)
        draws[0, [augment._FIRST, augment._SECOND, augment._THIRD]] = 0.0  # in the order of the fields
        made = self.made(draws, *PRESETS["cifar10_step"].augmentation, image=image)
        assert np.array_equal(made, np.asarray(part))

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
            augment.examples(pair, (), self.MEAN, self.STD, None)

    def test_an_image_is_not_changed(self):
        before = self.IMAGE.copy()
        self.made(pipeline.draws_at(self.KEY, 5, 1), Crop(pad=2), Flip(), JITTER)
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
        recipe = PLAIN.replace(batch_size=5, augmentation=(ResizedCrop(size=8), Flip(), JITTER))
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
