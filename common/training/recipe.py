"""The recipe of a training: every choice that changes the path of the weights, each with one meaning in all frameworks.

The update of a parameter p with gradient g at learning rate η, as `TrainingRecipe` means it:

1. g is the gradient of the mean loss over the global batch: the cross-entropy of the network's output and, weighted by
   `auxiliary_weights`, that of every auxiliary one. It is scaled by ``clip_norm / max(norm, clip_norm)`` where
   `clip_norm` is set; norm is the Euclidean norm over all parameters together.
2. Coupled decay adds ``weight_decay * p`` to g (L2 regularisation); decoupled decay subtracts ``η * weight_decay * p``
   from p (Loshchilov and Hutter 2019, arXiv:1711.05101), p being the value before the step in both.
3. ``sgd``: ``v = momentum * v + g``; ``p -= η * v``, or with Nesterov ``p -= η * (g + momentum * v)``. Velocities begin
   at zero and do not contain η (Sutskever et al. 2013, in PyTorch's form).
   ``adamw``: ``m = β1 m + (1-β1) g``; ``v = β2 v + (1-β2) g²``; ``p -= η * m̂ / (sqrt(v̂) + eps)`` with
   ``m̂ = m / (1-β1^t)`` and ``v̂ = v / (1-β2^t)``, t counting from 1 (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1).
4. The moving average of the weights is the weights after the first step, then
   ``a = ema_decay * a + (1-ema_decay) * p``. Running statistics are not averaged again.

Where the network has dropout, which values a step drops follows from the seed, the layer and the image's place in the
training alone (common/training/dropout.py): the same ones in all frameworks, however many processes share a batch, and
in a run that goes on.
"""

import json
import tomllib
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from math import cos, pi
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from common.errors import ParityError, RecipeError
from common.fields import Between, Bound, Checked, Count, Natural, NotNegative, Positive, Share
from common.files import reason
from common.training import augmentation as augmentations
from common.training.augmentation import Augmentation, Crop, Flip, Jitter, Normalise, Resize, ResizedCrop

Optimizer = Literal["sgd", "adamw"]
Decay = Literal["coupled", "decoupled"]
Schedule = Literal["constant", "step", "multistep", "cosine", "linear"]
Precision = Literal["float32", "bfloat16"]
_SOME = Bound("a list of one or more numbers of at least 0", bool)


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe(Checked):
    """See the module's text for the exact meaning. Raises `RecipeError` naming the field for an invalid value."""

    error: ClassVar[type[ParityError]] = RecipeError
    title: ClassVar[str] = "a recipe"

    optimizer: Optimizer = "sgd"
    learning_rate: Positive = 0.1  # at the top of the schedule
    momentum: Share = 0.9  # of sgd
    nesterov: bool = False
    beta1: Share = 0.9  # of adamw
    beta2: Share = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    decay: Decay = "coupled"
    decay_norms_and_biases: bool = True  # False: kernels alone decay
    label_smoothing: Share = 0.0  # share of the target spread evenly over all classes
    # Of the cross-entropies of auxiliary outputs: one for all, or one for each in the order of `architectures.outputs`
    # (0.3: Szegedy et al. 2014, arXiv:1409.4842, section 5).
    auxiliary_weights: Annotated[tuple[NotNegative, ...], _SOME] = (0.3,)
    clip_norm: Positive | None = None

    schedule: Schedule = "constant"
    step_epochs: Positive = 30.0  # `step`: every so many epochs the rate is multiplied by gamma
    milestones: tuple[int, ...] = ()  # `multistep`: at these steps
    gamma: Positive = 0.1
    warmup_epochs: NotNegative = 0.0  # the rate first rises linearly, from rate / steps of the warm-up
    warmup_steps: Natural = 0  # the same in steps; one of both

    epochs: Positive = 90.0
    steps: Count | None = None  # in place of epochs
    batch_size: Count = 256  # of one step, over all processes
    ema_decay: Between | None = None
    precision: Precision = "float32"  # of the network's arithmetic; parameters are float32 in both
    zero_gamma: bool = False  # the last norm's scale of every block begins at zero
    seed: Natural = 0  # of initial weights, order, augmentation and dropout
    # So many training examples, the last of a fixed permutation, are held out and evaluated after every epoch, the test
    # images at the end alone.
    validation: Natural = 0
    augmentation: Augmentation = ()  # the steps by which an image becomes an example, in their order

    def __post_init__(self) -> None:
        super().__post_init__()
        augmentations.check(self.augmentation)
        self.require("nesterov", not self.nesterov or self.momentum > 0, "momentum above 0 with it")
        both = self.warmup_steps and self.warmup_epochs
        self.require("warmup_steps", not both, f"0 beside warmup_epochs={self.warmup_epochs}; set one of them to 0")
        rising = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        self.require("milestones", rising, "rising numbers of steps")
        multistep = self.schedule == "multistep"
        self.require("milestones", bool(self.milestones) == multistep, "some with multistep alone")

    def replace(self, **changes: Any) -> "TrainingRecipe":
        """The same recipe with other values; a step of the ``augmentation`` may be a mapping of its fields."""
        return from_dict(asdict(self) | changes)

    def loss_weights(self, outputs: int) -> tuple[float, ...]:
        """What the cross-entropy of each of so many outputs counts in a step's loss, the network's own first.

        Raises `RecipeError` where there are weights for another number of auxiliary ones.
        """
        auxiliary, count = self.auxiliary_weights, outputs - 1
        if len(auxiliary) == 1:
            return (1.0, *auxiliary * count)
        self.require("auxiliary_weights", len(auxiliary) == count, f"one for all, or {count}, one for each")
        return (1.0, *auxiliary)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps in all; at least one."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))

    def learning_rate_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0. Every backend is given this number; none computes one."""
        total = self.total_steps(steps_per_epoch)
        warmup = self.warmup_steps or round(self.warmup_epochs * steps_per_epoch)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "step":
            return self.learning_rate * self.gamma ** (step // max(1, round(self.step_epochs * steps_per_epoch)))
        if self.schedule == "multistep":
            return self.learning_rate * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + cos(pi * done)) / 2
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        return self.learning_rate


def shared(batch_size: int, count: int, among: str) -> int:
    """How many examples of a batch each of `count` ``processes`` or ``devices`` takes. Raises `RecipeError`."""
    if batch_size % count:
        raise RecipeError(f"batch_size={batch_size}; expected a multiple of the {count} {among} that share it")
    return batch_size // count


# He et al. 2015 (arXiv:1512.03385), section 3.4: SGD, batch 256, 0.1 divided by 10 when the error plateaus, here at 30
# and 60 of 90 epochs as in the public reimplementations; section 4.2 for CIFAR-10.
PRESETS: dict[str, TrainingRecipe] = {
    "imagenet2015": TrainingRecipe(
        weight_decay=1e-4,
        schedule="step",
        augmentation=(ResizedCrop(size=224), Flip(), Jitter(brightness=0.4, contrast=0.4, saturation=0.4)),
    ),
    "cifar2015": TrainingRecipe(
        weight_decay=1e-4,
        schedule="multistep",
        milestones=(32_000, 48_000),
        steps=64_000,
        batch_size=128,
        validation=5_000,
        augmentation=(Crop(pad=4), Flip()),
    ),
    "fashion_mnist_224": TrainingRecipe(
        learning_rate=0.05, batch_size=128, epochs=10, momentum=0.0, augmentation=(Resize(size=224),)
    ),
    # As it goes from tutorial to tutorial: three epochs, so that the rate never comes to its first tenth.
    "cifar10_step": TrainingRecipe(
        learning_rate=0.001,
        schedule="step",
        step_epochs=10,
        epochs=3,
        batch_size=8,
        augmentation=(
            Resize(size=256),
            Flip(),
            Crop(size=64),
            Jitter(brightness=0.5, contrast=0.5, hue=0.3),
            Normalise(mean=(0.5,), std=(0.5,)),
        ),
    ),
    "digits": TrainingRecipe(
        learning_rate=0.1,
        nesterov=True,
        weight_decay=5e-4,
        decay_norms_and_biases=False,
        schedule="cosine",
        warmup_epochs=2,
        label_smoothing=0.1,
        epochs=20,
        batch_size=64,
        augmentation=(Crop(pad=1),),
    ),
}


def find(name: str) -> TrainingRecipe:
    """A preset by name, or the recipe in a TOML or JSON file. Raises `RecipeError`."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix in (".toml", ".json") or path.exists():
        return read(path)
    near = get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}; or a .toml or .json file"
    raise RecipeError(f"unknown recipe {name!r}; {hint}")


def read(path: Path) -> TrainingRecipe:
    """The recipe in a TOML or JSON file, told by its name. Raises `RecipeError` naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
        return from_dict(json.loads(text) if path.suffix == ".json" else tomllib.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be used as a recipe: {reason(error)}") from None


def to_dict(recipe: TrainingRecipe) -> dict[str, Any]:
    """A recipe as data of JSON and TOML; what is none is left out, since TOML has no such value."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if one is not None}
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    data: dict[str, Any] = plain(asdict(recipe))
    return data


def from_dict(data: Any) -> TrainingRecipe:
    """The recipe that `to_dict` wrote; fields left out take their defaults. Raises `RecipeError`."""
    return TrainingRecipe.from_data(data)


def to_toml(recipe: TrainingRecipe) -> str:
    """A recipe as TOML text: numbers, strings, booleans and lists are written as in JSON, none needs more."""
    data = to_dict(recipe)
    tables = [("", {name: value for name, value in data.items() if name != "augmentation"})]
    tables += [("[[augmentation]]", step) for step in data["augmentation"]]
    lines: list[str] = []
    for title, values in tables:
        lines += ["", title] if title else []
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def changed(recipe: TrainingRecipe, settings: list[str]) -> TrainingRecipe:
    """The recipe with settings of the command line, ``name=value``; ``lr`` is short for the learning rate, and
    ``augmentation.…`` is as common/training/augmentation.py has it.

    Raises `RecipeError`.
    """
    changes: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise RecipeError(f"--set {setting}: expected NAME=VALUE, as lr=0.05")
        try:
            value: Any = None if text == "none" else json.loads(text)
        except ValueError:
            value = text
        if name.startswith("augmentation."):
            inner[name.partition(".")[2]] = value
        else:
            changes[{"lr": "learning_rate"}.get(name, name)] = value
    # All together: one alone may contradict what it replaces.
    made = recipe.replace(**changes)
    return made.replace(augmentation=augmentations.changed(made.augmentation, inner)) if inner else made
