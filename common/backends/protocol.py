"""The protocol that a framework follows: what `resnet_X/backend.py` offers to a check."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.architectures import Spec
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Replica, Trainer
from common.weights import Weights

# What the cross-entropy of the first auxiliary output counts in the loss of `run` (Szegedy et al. 2014,
# arXiv:1409.4842, section 5). The second's counts its square, the third's its cube: one in the place of another shows.
AUXILIARY_WEIGHT = 0.3


class Backend(Protocol):
    """One framework, ready to run networks. `resnet_X.backend.start(threads)` returns one.

    It lives in a process of its own, sets the framework's global state there, and keeps nothing between models.
    """

    def describe(self) -> dict[str, str]:
        """Versions of everything that decides the numbers, and the device."""
        ...

    def build(self, spec: Spec, dtype: str) -> Any:
        """A native model whose parameters and computation are of `dtype` (float32 or float64)."""
        ...

    def native(self, model: Any) -> Any:
        """What the framework's own users would call the model: what `common.foreign` takes."""
        ...

    def load(self, model: Any, weights: Weights) -> None:
        """Set every parameter and statistic of the model, cast to its dtype; each native tensor exactly once."""
        ...

    def export(self, model: Any) -> Weights:
        """The model's parameters and statistics in canonical names and layouts, bitwise."""
        ...

    def save(self, spec: Spec, weights: Weights, path: Path) -> None:
        """Write a checkpoint in a format that only the framework itself can write, told by the end of `path`."""
        ...

    def trainer(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> Trainer:
        """A network to be trained by `recipe` in `dtype`; see `common.training.trainer.Trainer`.

        float64 is for proofs: no mixed precision then. Where there are several replicas, the process has joined the
        others before `start` (`resnet_X.distributed.join()`).
        """
        ...

    def run(
        self,
        model: Any,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        training: bool,
        gradients: bool,
        masks: Masks | None = None,
    ) -> dict[str, np.ndarray]:
        """One pass over images (N, H, W, C) and labels (N,); with `training` the masks of every dropout.

        Returns, in canonical layout and in the dtype it was computed in:

        - ``tap/<path>`` for every layer that runs in this mode: its output, (N, H, W, C) or (N, features);
        - ``loss``: mean softmax cross-entropy for logits, mean negative log-likelihood for a softmax head, half the
          mean square of the output for no head; and `AUXILIARY_WEIGHT` ** i times that of auxiliary one i, from 1 on;
        - with `training`: batch statistics are used, and ``stat/<name>`` are the running statistics after the pass;
        - with `gradients`: ``grad/<name>`` of the loss for every parameter of these layers, and ``grad/input``.
        """
        ...
