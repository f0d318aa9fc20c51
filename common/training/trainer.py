"""What a framework offers to train a network: the protocol between the run and the backends.

The run (common/training/run.py) owns the folder, the data, the schedule, the metrics and the checkpoints' places; a
backend (resnet_X/training.py) owns the model, the optimiser and the loop, in its framework's own form.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from common.architectures import Spec, logits, output, outputs
from common.errors import TrainingError
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """This process's examples of one step, and the learning rate of that step.

    The batches of all processes have one size. In an evaluation a label of -1 is padding, counted nowhere.
    """

    images: np.ndarray  # (N, H, W, C), float32 or float64
    labels: np.ndarray  # (N,), int64
    learning_rate: float = 0.0
    masks: Masks = field(default_factory=dict)  # of every dropout in the network, for a step; none in an evaluation


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a step, or an evaluation, measured over the global batch."""

    loss: float  # the mean that was minimised, label smoothing included; without it in an evaluation; nothing of decay
    correct: int  # examples whose largest output is their label's
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.count else 0.0


@dataclass(frozen=True, kw_only=True)
class Replica:
    """This process among those that train one network together."""

    rank: int = 0
    count: int = 1


SINGLE = Replica()
Kept = Callable[[np.ndarray], np.ndarray]


def loss_weights(spec: Spec, recipe: TrainingRecipe) -> tuple[float, ...]:
    """What the cross-entropy of each output counts in a step's loss, in the order of `architectures.outputs`.

    Raises `TrainingError` for a network without classes to learn, and as `TrainingRecipe.loss_weights`.
    """
    if logits(spec) is None:
        raise TrainingError(
            f"the network ends in {output(spec).path} and has no classifier to train; give the spec a head of logits"
        )
    return recipe.loss_weights(len(outputs(spec, training=True)))


class Trainer(Protocol):
    """A network in training; `Backend.trainer(spec, recipe, dtype)` makes one, with weights still to be loaded."""

    def load(self, weights: Weights) -> None:
        """Begin with canonical weights: parameters and running statistics set, the optimiser at zero."""
        ...

    def fit(self, batches: Iterable[Minibatch], after: Callable[[Measured], bool]) -> None:
        """Take an optimiser step for every batch, until they end or `after` returns False.

        `after` is called at the end of every step. While it runs, and when `fit` has returned, `save`, `export`,
        `arrays` and `evaluate` give the state after exactly this step. A framework may take batches ahead of the step
        it is at. Of several replicas one that says False ends it for all, at the same step.
        """
        ...

    def evaluate(self, batches: Iterable[Minibatch], *, ema: bool = False) -> Measured:
        """The mean loss (no smoothing) and the number of correct ones, in eval mode; `ema`: of the averaged weights.
        May be called while `after` runs, and changes nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Write the whole state in the framework's own format into an existing empty `folder`: model, optimiser, moving
        average, random numbers. Every process calls it with the same folder, and it returns when all is written.

        Raises `OSError` where the system refuses, a full disk included; in the other processes `TrainingError`.
        """
        ...

    def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote, bit by bit as if nothing had happened. Raises `CheckpointError`."""
        ...

    def export(self, *, ema: bool = False) -> Weights:
        """Canonical weights; with `ema` the averaged parameters and the model's running statistics."""
        ...

    def arrays(self, kept: Kept = np.array) -> dict[str, np.ndarray]:
        """The state in canonical names and layouts and the dtype it was computed in: ``param/<name>``,
        ``stat/<name>``, for every parameter ``velocity/<name>`` with sgd and momentum, ``moment1/<name>`` and
        ``moment2/<name>`` with adamw (as common/training/recipe.py defines them), ``ema/<name>`` where there is a
        moving average. `kept` makes of each array, which the next step writes over, what is kept: a copy."""
        ...
