"""What goes with the weights of a training: their classes, how images are prepared, and where they came from."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import checkpoints
from common.images import PRESETS
from common.training import run

pytestmark = pytest.mark.training

ROOT = Path(__file__).parent.parent
RECIPE = ["--recipe", "digits", "--set", "batch_size=8", "--set", "steps=1", "--threads", "1"]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "common.commands", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def photographs(folder, names):
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 3)):
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = generator.integers(0, 256, (20 + n, 24, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data, and the folder of a run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    data, out = photographs(folder / "photos", ["cat", "dog", "owl"]), folder / "run"
    done = command("train", "resnet20", "--data", data, "--out", out, *RECIPE, "--set", "augmentation.size=16")
    assert done.returncode == 0, done.stderr
    return data, out


def test_weights_state_their_classes_their_preprocessing_and_their_origin(trained):
    found = checkpoints.read(trained[1] / "final.safetensors")
    assert found.class_names == ("cat", "dog", "owl")
    assert (found.preprocessing.crop, found.preprocessing.resize) == (16, 16)
    origin = found.origin.before
    assert origin.reference == "resnet20, initial weights of seed 0"
    assert origin.notes == ("trained for 1 steps on photos by torch",)


def test_evaluate_prepares_images_as_the_weights_say_and_by_a_recipe_where_it_is_given(trained, tmp_path):
    data, out = trained
    final = out / "final.safetensors"
    measured = {}
    other = tmp_path / "other.safetensors"
    caffe = {"preprocessing": replace(PRESETS["keras_caffe"], crop=16)}
    checkpoints.write(other, replace(checkpoints.read(final), **caffe))
    for name, arguments in {
        "own": ["--weights", final],
        "recipe": ["--weights", final, *RECIPE[:2], "--set", "augmentation.size=16"],
        "other": ["--weights", other],
    }.items():
        done = command("evaluate", "--data", data, *arguments)
        assert done.returncode == 0, done.stderr
        assert ("images prepared as" in done.stderr) == (name != "recipe")
        measured[name] = done.stdout.partition("accuracy")[2].partition(", ")[2].partition(",")[0]
    assert measured["own"] == measured["recipe"] != measured["other"]


def test_classes_in_another_order_are_refused(trained, tmp_path):
    data, out = trained
    mixed = tmp_path / "mixed.safetensors"
    found = checkpoints.read(out / "final.safetensors")
    checkpoints.write(mixed, replace(found, class_names=("cat", "owl", "dog")))
    done = command("evaluate", "--weights", mixed, "--data", data)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the classes of photos in another order: class 1 is 'owl' there and 'dog' here" in line


def test_a_training_from_given_weights_normalises_as_they_want(trained, tmp_path):
    data, _ = trained
    before, out = tmp_path / "before.safetensors", tmp_path / "run"
    found = checkpoints.read(trained[1] / "final.safetensors")
    mean, std = (0.4, 0.3, 0.2), (0.5, 0.6, 0.7)
    wanted = replace(found.preprocessing, mean=mean, std=std)
    checkpoints.write(before, replace(found, preprocessing=wanted))
    arguments = ["train", "resnet20", "--data", data, "--out", out, *RECIPE, "--set", "augmentation.size=16"]
    for more in ([], ["--resume"]):
        done = command(*arguments, "--init", before, *more)
        assert done.returncode == 0, done.stderr
    last = run.facts(out)["recipe"]["augmentation"][-1]
    assert last == {"step": "normalise", "mean": list(mean), "std": list(std)}
    after = checkpoints.read(out / "final.safetensors")
    assert after.preprocessing == wanted
    assert after.origin.before.notes[-2:] == ("trained for 1 steps on photos by torch",) * 2
