import json
import math
import tomllib

import pytest

from common.errors import RecipeError
from common.training import recipe as recipes
from common.training.recipe import PRESETS, Augmentation, TrainingRecipe

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
    augmentation=Augmentation(size=32, pad=4, flip=True, mean=(0.5,), std=(0.25,)),
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
    assert recipes.from_dict({"augmentation": {"pad": 2}}).augmentation == Augmentation(pad=2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("momentun=0.9", "did you mean 'momentum'?"),
        ("augmentation.flop=true", "unknown field 'flop' in a recipe's augmentation; did you mean 'flip'?"),
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
        ("augmentation.mean=[0.5]", "as many values as mean"),
        ("augmentation=3", "expected a table of fields"),
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
    assert (made.learning_rate, made.milestones, made.augmentation.size, made.clip_norm) == (1.0, (2, 4), 32, None)


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
