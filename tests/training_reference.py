"""What the tests of training in every framework share: the recipe written in NumPy, recipes, batches, and comparing.

Imports no framework: the gradients come from the one under test.
"""

import numpy as np

from common import weights as canonical
from common.architectures import find
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch

# Between them every option of the update, each with a value that shows.
RECIPES = {
    "nesterov": TrainingRecipe(
        nesterov=True,
        weight_decay=0.05,
        decay_norms_and_biases=False,
        label_smoothing=0.1,
        clip_norm=0.5,
        ema_decay=0.8,
        schedule="cosine",
        warmup_steps=2,
        steps=6,
    ),
    "decoupled sgd": TrainingRecipe(weight_decay=0.3, decay="decoupled", decay_norms_and_biases=False, clip_norm=1e3),
    "no momentum": TrainingRecipe(weight_decay=0.05, momentum=0.0, schedule="linear", steps=6),
    "adamw": TrainingRecipe(
        optimizer="adamw",
        learning_rate=0.01,
        beta1=0.8,
        beta2=0.95,
        eps=1e-3,
        weight_decay=0.5,
        decay="decoupled",
        decay_norms_and_biases=False,
        ema_decay=0.6,
        warmup_steps=3,
    ),
    "coupled adam": TrainingRecipe(
        optimizer="adamw", learning_rate=0.01, eps=1e-6, weight_decay=0.05, label_smoothing=0.2, clip_norm=0.3
    ),
}


def noise(recipe, spec, steps=6, count=8, size=8, dtype="float64", seed=0):
    """Batches of noise, with the rates of the recipe."""
    generator = np.random.default_rng(seed)
    return [
        Minibatch(
            images=generator.standard_normal((count, size, size, spec.in_channels)).astype(dtype),
            labels=generator.integers(0, spec.classes, count),
            learning_rate=recipe.learning_rate_at(step, steps),
        )
        for step in range(steps)
    ]


def trained(trainer, batches):
    """The arrays after every step, and its loss."""
    history = []

    def after(measured):
        history.append(trainer.arrays() | {"loss": np.float64(measured.loss)})
        return True

    trainer.fit(batches, after)
    return history


def relative(a, b):
    return np.linalg.norm(np.ravel(a - b)) / max(np.linalg.norm(np.ravel(b)), 1e-300)


def same(found, expected):
    """Bitwise, type and all."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name


def reference(recipe, spec, batches, passed):
    """The arrays after every step, and its loss, by the update of common/training/recipe.py.

    `passed(weights, batch, smoothing)` is the framework's: loss and gradients of one pass in training mode, whose
    running statistics it puts into `weights`.
    """
    weights = dict(canonical.randomize(spec))
    names = [name for layer in spec.layers for name in layer.parameters]
    statistics = [name for layer in spec.layers for name in layer.statistics]
    first, second, average = ({name: np.zeros_like(weights[name]) for name in names} for _ in range(3))
    history = []
    for t, batch in enumerate(batches, 1):
        rate, loss, gradients = batch.learning_rate, *passed(weights, batch, recipe.label_smoothing)
        if recipe.clip_norm is not None:
            norm = np.sqrt(sum(np.sum(gradients[name] ** 2) for name in names))
            gradients = {n: g * (recipe.clip_norm / max(norm, recipe.clip_norm)) for n, g in gradients.items()}
        for name in names:
            before, gradient = weights[name], gradients[name]
            decays = recipe.decay_norms_and_biases or name.endswith(".kernel")
            decay = recipe.weight_decay if decays else 0.0
            if recipe.decay == "coupled":
                gradient = gradient + decay * before
            if recipe.optimizer == "sgd":
                velocity = first[name] = recipe.momentum * first[name] + gradient
                step = gradient + recipe.momentum * velocity if recipe.nesterov else velocity
            else:
                first[name] = recipe.beta1 * first[name] + (1 - recipe.beta1) * gradient
                second[name] = recipe.beta2 * second[name] + (1 - recipe.beta2) * gradient**2
                unbiased = first[name] / (1 - recipe.beta1**t), second[name] / (1 - recipe.beta2**t)
                step = unbiased[0] / (np.sqrt(unbiased[1]) + recipe.eps)
            weights[name] = before - rate * step
            if recipe.decay == "decoupled":
                weights[name] = weights[name] - rate * decay * before
            share = (recipe.ema_decay or 0.0) if t > 1 else 0.0
            average[name] = share * average[name] + (1 - share) * weights[name]
        kept = {"param": weights}
        if recipe.optimizer == "adamw":
            kept |= {"moment1": first, "moment2": second}
        elif recipe.momentum:
            kept["velocity"] = first
        if recipe.ema_decay is not None:
            kept["ema"] = average
        arrays = {f"{kind}/{name}": values[name] for kind, values in kept.items() for name in names}
        history.append(arrays | {f"stat/{name}": weights[name] for name in statistics} | {"loss": np.asarray(loss)})
    return history


UNUSED = find("resnet20").replace(
    blocks=(2,), widths=(4,), stem_width=4, in_channels=1, shortcut="projection", unused_projection=True
)
# Decay of both kinds, over kernels, norms and biases.
DECAYING = {name: RECIPES[name].replace(decay_norms_and_biases=True) for name in ("nesterov", "decoupled sgd", "adamw")}


def check_unused_arrays_stay(begun, recipe):
    """`begun` makes a trainer of a recipe and a spec, in float64 and with `canonical.randomize(spec)`."""
    before = canonical.randomize(UNUSED)
    trainer = begun(recipe, spec=UNUSED)
    trainer.fit(noise(recipe, UNUSED, steps=2), lambda measured: True)
    after = trainer.export()
    unused = {name for layer in UNUSED.layers if layer.unused for name in layer.arrays}
    assert len(unused) == 10
    assert {name for name in before if np.array_equal(before[name], after[name])} == unused
