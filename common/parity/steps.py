"""N optimiser steps, for the comparison: the recipe they follow, what is kept of each, and taking them.

Of every step are kept the loss and, after it, running statistics, the optimiser's state, parameters, and moving
averages where the recipe has them: arrays ``step07/<kind>/<name>`` and ``step07/loss``. The whole state of a large
network after each step would be tens of gigabytes, so that only the last step's is whole; of the others an array of
more than `SAMPLE` elements is so many of them, spread evenly.
"""

from collections.abc import Callable, Iterator, Sequence
from math import sqrt

import numpy as np

from common.parity.levels import UNIT
from common.parity.names import ArrayName
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.training.trainer import Measured, Minibatch, Trainer

# What `resnet-parity check --mode steps` takes its steps by. Everything that frameworks do differently is in it, and
# the rate is low enough for 20 steps of ResNet-50 on two random images: at 0.01 each multiplies what rounding
# changed by ten.
RECIPE = TrainingRecipe(
    learning_rate=0.0005,
    momentum=0.9,
    weight_decay=5e-4,
    decay="coupled",
    decay_norms_and_biases=False,
    label_smoothing=0.1,
    schedule="cosine",
    warmup_steps=5,
    steps=20,
)

SAMPLE = 4096

_GOLDEN = (5**0.5 - 1) / 2


def sample(array: np.ndarray) -> np.ndarray:
    """`SAMPLE` elements of a larger array, (SAMPLE,): one of each of so many equal parts, in the order of its axes."""
    parts = np.arange(SAMPLE)
    starts = np.arange(SAMPLE + 1) * array.size // SAMPLE
    # Scattered within their parts: a constant stride would meet the same few channels again and again.
    places = starts[:-1] + (parts * _GOLDEN % 1 * np.diff(starts)).astype(np.int64)
    sampled: np.ndarray = array[np.unravel_index(places, array.shape)]
    return sampled


def kept(array: np.ndarray, *, whole: bool) -> np.ndarray:
    """A copy of an array, or of a sample of one that is too large to be kept after every step."""
    return np.array(array) if whole or array.size <= SAMPLE else sample(array)


def moments(recipe: TrainingRecipe) -> tuple[str, ...]:
    """The kinds of arrays that the recipe's optimiser keeps beside the parameters."""
    if recipe.optimizer == "adamw":
        return ("moment1", "moment2")
    # Without momentum the velocity is the gradient, and an optimiser has no need to keep it.
    return ("velocity",) if recipe.momentum else ()


def rates(recipe: TrainingRecipe, dtype: str, seed: int | None = None) -> list[float]:
    """The learning rate of every step; an epoch of the recipe's schedule is one step.

    With `seed` as for the one-ulp response: AdamW divides by ``1 - beta ** t``, which is 0.001 at first, so that one
    rounding of the power is a thousand in what is left of it, and no other input of the steps shows that. The powers
    are moved by -1, 0 or +1 ulp of `dtype` at random. They scale the step, and so are a factor of its rate.
    """
    plain = [recipe.learning_rate_at(step, steps_per_epoch=1) for step in range(recipe.steps or 0)]
    if seed is None or recipe.optimizer != "adamw":
        return plain
    ulps = np.random.default_rng([seed, len(plain)]).integers(-1, 2, (len(plain), 2)) * UNIT[dtype]
    left = [(1 - recipe.beta1**t, 1 - recipe.beta2**t) for t in range(1, len(plain) + 1)]
    return [
        float(rate * sqrt((second + by_second) / second) * first / (first + by_first))
        for rate, (first, second), (by_first, by_second) in zip(plain, left, ulps, strict=True)
    ]


def take(
    trainer: Trainer,
    images: np.ndarray,
    labels: np.ndarray,
    learning_rates: Sequence[float],
    keep: Callable[[ArrayName, np.ndarray], None],
    masks: Sequence[Masks],
) -> None:
    """Take steps with a trainer that has its weights; hand `keep` every array of the state as it comes.

    `images` are (steps, N, H, W, C), `labels` (steps, N), `learning_rates` and `masks` of dropout one for each step.
    """
    last, done = len(images), 0

    def batches() -> Iterator[Minibatch]:
        for step, rate in enumerate(learning_rates):
            yield Minibatch(images=images[step], labels=labels[step], learning_rate=rate, masks=masks[step])

    def after(measured: Measured) -> bool:
        nonlocal done
        done += 1
        keep(ArrayName(done, "loss"), np.asarray(measured.loss, images.dtype))
        for name, array in trainer.arrays(lambda a: kept(a, whole=done == last)).items():
            kind, _, place = name.partition("/")
            keep(ArrayName(done, kind, place), array)
        return True

    trainer.fit(batches(), after)
