"""Optimiser steps are the same steps in three frameworks, and a defect in how one trains is named with its step."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import called, refused, run
from test_parity import explain

from common import architectures
from common.architectures.resnet import ResNetSpec
from common.backends.columns import ALIASES
from common.errors import RecipeError
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import Session
from common.parity.steps import RECIPE
from tests.mutants.bench import Bench
from tests.mutants.catalogue import OF_TRAINING, RECIPES, OfTraining

pytestmark = pytest.mark.slow

BLOCKS = {
    block: ResNetSpec(block=block, blocks=(1, 1), widths=(8, 16), stem_width=8, classes=10)
    for block in ("basic", "bottleneck")
}

# For defects in what is done with gradients: compiling the way to them takes most of the time.
TINY = ResNetSpec(block="basic", blocks=(1,), widths=(4,), stem_kernel=3, stem_width=4, stem_pool=False, classes=10)


def case(spec: ResNetSpec, size: int = 32, **changes: Any) -> Case:
    recipe = RECIPE.replace(**changes)
    photos = tuple(sample_photos())
    return Case(
        variant="tiny",
        spec=spec,
        size=(size, size),
        photos=photos,
        dtypes=("float64",),
        modes=("steps",),
        recipe=recipe,
    )


@pytest.mark.parametrize(
    ("block", "recipe"),
    [
        ("basic", "nesterov"),
        ("bottleneck", "adamw"),
        *(
            pytest.param(*pair, marks=pytest.mark.long)
            for pair in (("basic", "sgd"), ("basic", "adamw"), ("bottleneck", "sgd"))
        ),
    ],
)
def test_twenty_steps_are_the_same_in_three_frameworks(session: Session, block: str, recipe: str) -> None:
    result = session.check(case(BLOCKS[block], **RECIPES[recipe]))
    assert result.passed, explain(result)
    kinds = {d.tensor.kind for d in result.comparisons[-1].differences}
    moments = {"moment1", "moment2"} if recipe == "adamw" else {"velocity"}
    assert kinds == {"loss", "stat", "param"} | moments | ({"ema"} if "ema_decay" in RECIPES[recipe] else set())
    assert {d.tensor.step for d in result.comparisons[-1].differences} == set(range(1, 21))


@pytest.fixture(scope="module")
def bench(session: Session) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(session, stack)


@pytest.mark.training
@pytest.mark.parametrize("mutant", OF_TRAINING, ids=lambda mutant: mutant.name)
def test_a_defect_in_training_is_caught_at_its_step_and_kind_of_array(bench: Bench, mutant: OfTraining) -> None:
    compared = bench.check(case(TINY, steps=3, **RECIPES[mutant.recipe]), mutant.backend, mutant.path)[-1]
    assert compared.first is not None, "the defect was not caught"
    assert (compared.first.tensor.step, compared.first.tensor.section) == (mutant.step, f"steps, {mutant.kind}")
    assert compared.odd_one_out == ALIASES.get(mutant.backend, mutant.backend)
    assert not compared.problems


def test_every_defect_in_training_is_listed_once_in_each_of_the_three() -> None:
    names = [mutant.name for mutant in OF_TRAINING]
    assert len(set(names)) == len(names)
    assert {mutant.backend for mutant in OF_TRAINING} == {"torch", "keras", "flax"}


def test_in_float32_steps_are_held_to_the_float32_response(session: Session) -> None:
    result = session.check(replace(case(BLOCKS["basic"], steps=3), dtypes=("float32",)))
    assert result.passed, explain(result)
    compared = result.comparisons[-1]
    assert (compared.level, compared.dtype) == ("L2", "float32")
    assert {d.verdict for d in compared.differences if str(d.tensor) == "step01/loss"} == {"same"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"head": "none"}, "has no classes to learn"), ({"input_size": None}, "expected how many optimiser steps")],
)
def test_a_network_that_cannot_take_steps_is_refused(changes: dict[str, Any], says: str) -> None:
    steps = None if "input_size" in changes else 3
    with pytest.raises(RecipeError, match=says):
        case(BLOCKS["basic"].replace(**changes), steps=steps)


def test_check_takes_the_steps_it_is_told_and_writes_what_it_found(tmp_path: Path) -> None:
    spec, out = tmp_path / "tiny.json", tmp_path / "out.json"
    spec.write_text(architectures.to_json(TINY))
    options = ("--spec", spec, "--size", 32, "--mode", "steps", "--backends", "torch,keras")
    settings = ("--set", "steps=2", "--set", "lr=0.002", "--set", "nesterov=true")
    done = run("check", *options, *settings, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps of sgd, learning_rate 0.002" in done.stdout
    found = json.loads(out.read_text())
    (exact, entry) = found["checks"]
    assert (exact["recipe"], entry["dtype"]) == (None, "float64")
    assert entry["recipe"] | {"learning_rate": 0.002, "nesterov": True, "steps": 2, "batch_size": 2} == entry["recipe"]
    assert entry["modes"]["steps"]["torch | keras:tensorflow"]["ratio"] <= found["limit"]


@pytest.mark.long  # as those of passes, tests/test_cli.py
def test_records_of_steps_made_one_by_one_compare_as_the_check_does(tmp_path: Path) -> None:
    spec = tmp_path / "tiny.json"
    spec.write_text(architectures.to_json(TINY))
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    options = ("--spec", spec, "--size", 32, "--mode", "steps", "--steps", 2)
    for path, backend, *more in ((a, "torch"), (b, "keras", "--no-response")):
        made = run("record", backend, *options, "-o", path, *more)
        assert made.returncode == 0, made.stderr
    same = called("compare", a, b)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "steps, velocity" in same.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "3"], "--steps say what mode steps does; add --mode steps"),
        (["--set", "lr=1", "--recipe", "digits"], "--recipe and --set say what mode steps does"),
        (["--mode", "steps", "--recipe", "digit"], "did you mean 'digits'"),
        (["--mode", "steps", "--set", "momentum=2"], "momentum=2"),
        (["--mode", "steps", "--set", "speed=2"], "unknown field 'speed'"),
        (
            ["--mode", "steps", "--set", "batch_size=4"],
            "--set batch_size means nothing in mode steps: every step takes",
        ),
        (["--mode", "steps", "--set", "seed=4"], "weights, crops and labels follow from --seed"),
        (["--mode", "steps", "--set", "augmentation.flip=true"], "images are taken as they are"),
        (["--mode", "steps", "--set", "epochs=2"], "--steps says how many"),
        (["--mode", "steps", "--steps", "3", "--set", "steps=5"], "both --steps 3 and --set steps are given"),
        (["--mode", "steps", "--batch", "1", "--size", "32"], "leaves one value per channel"),
    ],
)
def test_wrong_options_of_steps_are_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    refused(called("check", "resnet18", *arguments), says)
