"""Defects planted in how PyTorch trains. What each must be caught by stands in catalogue.py."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from resnet_torch import optimizers, training
from tests.mutants.of_torch import biased_variance  # noqa: F401  of the layers, in training as ever
from tests.mutants.planting import replaced

_make, _from_spec, _fit, _step = (
    optimizers.make,
    training.from_spec,
    training.TorchTrainer.fit,
    training.TorchTrainer._step,
)


def _by(**changes: Any) -> Any:
    """The optimiser of another recipe."""
    return replaced(
        optimizers, "make", lambda model, spec, recipe, **o: _make(model, spec, recipe.replace(**changes), **o)
    )


def _optimizer(change: Callable[[torch.optim.Optimizer], None]) -> Any:
    """The optimiser changed after it was made."""

    def made(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = _make(*arguments, **options)
        change(optimizer)
        return optimizer

    return replaced(optimizers, "make", made)


def _norms(change: Callable[[nn.BatchNorm2d], None]) -> Any:
    def built(spec: Any, **options: Any) -> nn.Module:
        model = _from_spec(spec, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)
        return model

    return replaced(training, "from_spec", built)


decoupled_decay = _by(decay="decoupled")
coupled_decay = _by(decay="coupled")
decay_of_norms_and_biases = _by(decay_norms_and_biases=True)
without_nesterov = _by(nesterov=False)


@_optimizer
def dampening(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["dampening"] = 0.1


@_optimizer
def without_bias_correction(optimizer: torch.optim.Optimizer) -> None:
    def late(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        for state in optimizer.state.values():
            state["step"].fill_(1e6)

    optimizer.register_step_pre_hook(late)


clipped_by_the_norm_and_1e_6 = replaced(
    optimizers, "clip", lambda model, limit: clip_grad_norm_(model.parameters(), limit)
)
clipped_one_by_one = replaced(
    optimizers, "clip", lambda model, limit: [clip_grad_norm_(p, limit) for p in model.parameters()]
)


def _smoothed_over_others(output: Tensor, labels: Tensor, label_smoothing: float = 0.0, **options: Any) -> Tensor:
    """The share that smoothing takes from the label is spread over the other classes alone."""
    classes = output.shape[1]
    true = F.one_hot(labels, classes).to(output.dtype)
    targets = true * (1 - label_smoothing) + (1 - true) * label_smoothing / (classes - 1)
    return -(targets * F.log_softmax(output, 1)).sum(1).mean()


smoothing_over_the_other_classes = replaced(training.F, "cross_entropy", _smoothed_over_others)


@_norms
def momentum_as_decay(norm: nn.BatchNorm2d) -> None:
    norm.momentum = 1 - (norm.momentum or 0)


def _late(trainer: Any, batches: Any, after: Any) -> None:
    def shifted() -> Iterator[Any]:
        before = None
        for batch in batches:
            rate = batch.learning_rate if before is None else before
            before = batch.learning_rate
            yield training.Minibatch(images=batch.images, labels=batch.labels, learning_rate=rate)

    _fit(trainer, shifted(), after)


rate_of_the_step_before = replaced(training.TorchTrainer, "fit", _late)


def _average_first(trainer: Any, batch: Any) -> Any:
    """The average takes the weights in before the step."""
    average, trainer._average = trainer._average, None
    average.update_parameters(trainer._model)
    measured = _step(trainer, batch)
    trainer._average = average
    return measured


average_before_the_step = replaced(training.TorchTrainer, "_step", _average_first)


def _accumulating(trainer: Any, batches: Any, after: Any) -> None:
    """Gradients of the steps before are still there."""
    torch.optim.Optimizer.zero_grad(trainer._optimizer)
    trainer._optimizer.zero_grad = lambda: None
    _fit(trainer, batches, after)


gradients_not_zeroed = replaced(training.TorchTrainer, "fit", _accumulating)


def _forgetful(trainer: Any, batch: Any) -> Any:
    """A new optimiser for every step."""
    for state in trainer._optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    return _step(trainer, batch)


optimizer_made_anew = replaced(training.TorchTrainer, "_step", _forgetful)
