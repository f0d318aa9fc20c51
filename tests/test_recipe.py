import json
import math
import re
import tomllib
from pathlib import Path

import pytest

from common.errors import RecipeError
from common.training import augmentation as augmentations
from common.training import recipe as recipes
from common.training.augmentation import CentreCrop, Crop, Flip, Jitter, Normalise, Resize, ResizedCrop
from common.training.recipe import PRESETS, TrainingRecipe

FULL = TrainingRecipe(
    optimizer="adamw",
    learning_rate=0.003,
    clip_norm=1.5,
    decay="decoupled",
    schedule="multistep",
    milestones=(30, 60),
    warmup_steps=5,
    steps=90,
    ema_decay=0.99,
    augmentation=(
        Resize(size=40),
        CentreCrop(size=36),
        ResizedCrop(),
        Flip(),
        Crop(size=32, pad=4),
        Jitter(brightness=1.5, hue=0.5),
        Normalise(mean=(0.5, 0.4, 0.3), std=(0.25, 1.0, 2.0)),
    ),
)


@pytest.mark.parametrize("recipe", [*PRESETS.values(), FULL], ids=[*PRESETS, "full"])
def test_a_recipe_comes_back_from_toml_and_json_as_it_was(recipe, tmp_path):
    for path, text in (
        (tmp_path / "a.toml", recipes.to_toml(recipe)),
        (tmp_path / "a.json", json.dumps(recipes.to_dict(recipe))),
    ):
        path.write_text(text)
        assert recipes.find(str(path)) == recipe
    assert recipes.from_dict(tomllib.loads(recipes.to_toml(recipe))) == recipe


def test_fields_left_out_take_their_defaults():
    assert recipes.from_dict({}) == TrainingRecipe()
    crop = recipes.from_dict({"augmentation": [{"step": "crop", "pad": 2}]}).augmentation
    assert crop == (Crop(pad=2),)
    assert crop[0].size is None


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("momentun=0.9", "did you mean 'momentum'?"),
        ("augmentation.flop=true", "unknown setting augmentation.flop; did you mean 'flip'?"),
        ("augmentation.pad=2", "unknown setting augmentation.pad; expected one of size, resize.size,"),
        ("augmentation.crop.side=2", "unknown field 'side' in the step 'crop'; did you mean 'size'?"),
        ("augmentation.crop.pad=-1", "pad=-1 is not allowed in the step 'crop'; expected an integer of at least 0"),
        ("augmentation.crop=4", "augmentation.crop=4; expected true or false, or one of crop.size, crop.pad"),
        ("augmentation.size=0", "augmentation.size=0; expected an integer of at least 1, or none"),
        ("augmentation.size=true", "augmentation.size=True; expected an integer of at least 1, or none"),
        ("augmentation.resize=true", "field 'size' is missing in the step 'resize'"),
        ("augmentation.jitter.hue=0.6", "hue=0.6 is not allowed in the step 'jitter'; expected a number of 0 … 0.5"),
        ("augmentation.jitter.contrast=-1", "expected a number of at least 0"),
        ("augmentation.normalise.mean=[0.5]", "field 'std' is missing in the step 'normalise'"),
        ('augmentation=[{"step":"normalise","mean":[],"std":[]}]', "expected a list of one or more numbers"),
        ('augmentation=[{"step":"normalise","mean":[1],"std":[0]}]', "expected a list of one or more numbers above 0"),
        ('augmentation=[{"step":"normalise","mean":[1],"std":[1,1]}]', "as many values as mean=(1.0,)"),
        ('augmentation=[{"step":"flop"}]', "unknown step 'flop' of the augmentation; did you mean 'flip'?"),
        ('augmentation=[{"step":3}]', "unknown step 3 of the augmentation; expected one of resize, centre_crop,"),
        ('augmentation=[{"size":3}]', "field 'step' is missing in a step of the augmentation; expected one of resize,"),
        ('augmentation=["flip"]', "expected a list, each a table of fields, a step of the augmentation"),
        ('augmentation={"pad":4}', "expected a list, each a table of fields, a step of the augmentation"),
        ('augmentation=[{"step":"flip"},{"step":"flip"}]', "has the step 'flip' 2 times; expected it once"),
        (
            'augmentation=[{"step":"normalise","mean":[1],"std":[1]},{"step":"flip"}]',
            "normalises before its step 'flip'; put 'normalise' last",
        ),
        ("lr=fast", "learning_rate='fast' is not allowed in a recipe; expected a number"),
        ("lr=0", "learning_rate=0 is not allowed in a recipe; expected a number above 0"),
        ("lr=NaN", "learning_rate=nan is not allowed in a recipe; expected a number"),
        ("decay=both", "decay='both' is not allowed in a recipe; expected one of coupled, decoupled"),
        ("batch_size=2.5", "batch_size=2.5 is not allowed in a recipe; expected an integer of at least 1"),
        ("nesterov=1", "nesterov=1 is not allowed in a recipe; expected true or false"),
        ("epochs=0", "epochs=0 is not allowed in a recipe; expected a number above 0"),
        ("label_smoothing=1", "label_smoothing=1 is not allowed in a recipe; expected a share"),
        ("ema_decay=1", "ema_decay=1 is not allowed in a recipe; expected a number above 0 and below 1, or none"),
        ("clip_norm=-1", "clip_norm=-1 is not allowed in a recipe; expected a number above 0, or none"),
        ("milestones=[3]", "expected some with multistep alone"),
        ("augmentation=3", "expected a list, each a table of fields"),
        ("lr", "expected NAME=VALUE"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_the_field(setting, words):
    with pytest.raises(RecipeError) as raised:
        recipes.changed(TrainingRecipe(), [setting])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_file_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    for content in ("learning_rate = ", "[optimizer]\n", "learning_rate = 'x'"):
        path.write_text(content)
        with pytest.raises(RecipeError, match=r"mine\.toml"):
            recipes.find(str(path))
    with pytest.raises(RecipeError, match="did you mean 'digits'"):
        recipes.find("digit")
    with pytest.raises(RecipeError, match="No such file"):
        recipes.find(str(tmp_path / "none.toml"))


def test_settings_of_the_command_line_take_numbers_words_lists_and_none():
    settings = [
        "lr=1",
        "schedule=multistep",
        "milestones=[2,4]",
        "augmentation.size=32",
        "clip_norm=2",
        "clip_norm=none",
    ]
    made = recipes.changed(TrainingRecipe(), settings)
    assert (made.learning_rate, made.milestones, made.clip_norm) == (1.0, (2, 4), None)
    assert made.augmentation == (Resize(size=32), CentreCrop(size=32))


TUTORIAL = PRESETS["cifar10_step"].augmentation


def test_the_tutorials_preset_is_the_tutorials():
    recipe = PRESETS["cifar10_step"]
    half = Normalise(mean=(0.5,), std=(0.5,))
    jitter = Jitter(brightness=0.5, contrast=0.5, saturation=0.0, hue=0.3)
    assert recipe.augmentation == (Resize(size=256), Flip(), Crop(size=64, pad=0), jitter, half)
    assert (recipe.optimizer, recipe.momentum, recipe.nesterov, recipe.weight_decay) == ("sgd", 0.9, False, 0.0)
    assert (recipe.batch_size, recipe.total_steps(6250)) == (8, 18_750)
    longer = recipe.replace(epochs=25)
    at = [longer.learning_rate_at(epoch * 6250 - before, 6250) for epoch in (10, 20) for before in (1, 0)]
    assert at == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # A step that is missing comes to its usual place, and one that is there keeps its own.
        (["crop.pad=4"], (TUTORIAL[0], Flip(), Crop(size=64, pad=4), *TUTORIAL[3:])),
        (["resized_crop=true"], (TUTORIAL[0], ResizedCrop(), *TUTORIAL[1:])),
        (["flip=false", "jitter=none"], (TUTORIAL[0], TUTORIAL[2], TUTORIAL[4])),
        (
            ["jitter.saturation=2", "jitter.hue=0"],
            (*TUTORIAL[:3], Jitter(brightness=0.5, contrast=0.5, saturation=2), TUTORIAL[4]),
        ),
        (["normalise.mean=[1,2]", "normalise.std=[3,4]"], (*TUTORIAL[:4], Normalise(mean=(1, 2), std=(3, 4)))),
        (["size=32"], (TUTORIAL[0], Flip(), Crop(size=32), *TUTORIAL[3:])),
        (["size=299"], (Resize(size=299), Flip(), Crop(size=299), *TUTORIAL[3:])),
        (["size=none"], (Flip(), Crop(), *TUTORIAL[3:])),
        (["size=8", "crop=none", "resize=none"], (Resize(size=8), CentreCrop(size=8), Flip(), *TUTORIAL[3:])),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_settings_of_the_augmentation_name_the_step(settings, expected):
    made = recipes.changed(PRESETS["cifar10_step"], [f"augmentation.{one}" for one in settings]).augmentation
    assert made == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_any_preset_can_be_made_to_show_the_network_a_square(preset):
    steps = PRESETS[preset].augmentation
    for side in (7, 300):
        made = augmentations.sized(steps, side)
        for size in ((30, 50), (400, 320), None):
            assert augmentations.output(made, size) == augmentations.output(augmentations.tested(made), size)
            assert augmentations.output(made, size) == (side, side)
        assert augmentations.sized(augmentations.sized(steps, 300), side) == made or preset == "cifar10_step"
    assert augmentations.output(augmentations.sized(steps, None), (30, 50)) == (30, 50)


def test_a_file_may_write_the_steps_in_a_line_or_as_tables(tmp_path):
    line, tables = tmp_path / "line.toml", tmp_path / "tables.toml"
    line.write_text('augmentation = [{step = "flip"}, {step = "crop", pad = 4}]')
    tables.write_text('[[augmentation]]\nstep = "flip"\n[[augmentation]]\nstep = "crop"\npad = 4\n')
    for path in (line, tables):
        assert recipes.find(str(path)).augmentation == (Flip(), Crop(pad=4))


def test_an_image_to_test_with_undergoes_nothing_random():
    found = augmentations.tested(TUTORIAL)
    assert found == (Resize(size=256), CentreCrop(size=64), TUTORIAL[4])
    assert augmentations.tested((ResizedCrop(size=224), Flip())) == (Resize(size=256), CentreCrop(size=224))
    assert augmentations.tested((Crop(pad=4), ResizedCrop(), Jitter(hue=0.1))) == ()


def test_a_crop_that_does_not_fit_is_told_before_a_training():
    assert augmentations.output([Crop(size=40, pad=4)], (32, 60)) == (40, 40)
    with pytest.raises(RecipeError, match=r"crop of 41x41 does not fit into images of 32x60 with pad=4; resize them"):
        augmentations.output([Crop(size=41, pad=4)], (32, 60))


def rates(steps_per_epoch=10, **fields):
    made = TrainingRecipe(learning_rate=0.8, **fields)
    return [made.learning_rate_at(step, steps_per_epoch) for step in range(made.total_steps(steps_per_epoch))]


def test_every_schedule_gives_the_rates_it_is_named_after():
    assert rates(epochs=2) == [0.8] * 20
    assert rates(epochs=3, schedule="step", step_epochs=1, gamma=0.5) == [0.8] * 10 + [0.4] * 10 + [0.2] * 10
    assert rates(steps=5, schedule="multistep", milestones=(2, 3), gamma=0.5) == [0.8, 0.8, 0.4, 0.2, 0.2]
    assert rates(steps=4, schedule="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(steps=4, schedule="cosine") == pytest.approx(
        [0.4 * (1 + math.cos(math.pi * t / 4)) for t in range(4)], rel=1e-15
    )


def test_the_warm_up_rises_to_the_rate_before_any_schedule():
    assert rates(steps=8, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
    assert rates(epochs=2, warmup_epochs=0.4)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    warm = rates(steps=8, warmup_steps=4, schedule="cosine")
    assert warm[4] == 0.8
    assert warm[-1] < warm[-2] < 0.8
    # Milestones are counted from the first step, as in the paper.
    assert rates(steps=8, warmup_steps=4, schedule="multistep", milestones=(6,), gamma=0.5)[4:] == [0.8, 0.8, 0.4, 0.4]


def test_the_cifar_preset_is_the_papers():
    recipe = PRESETS["cifar2015"]
    assert recipe.total_steps(351) == 64_000
    at = [recipe.learning_rate_at(step, 351) for step in (0, 31_999, 32_000, 47_999, 48_000, 63_999)]
    assert at == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_the_page_on_training_shows_the_tutorials_augmentation():
    page = Path(__file__).parent.parent / "docs" / "training.md"
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert recipes.from_dict(tomllib.loads(block)).augmentation == TUTORIAL
