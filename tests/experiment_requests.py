"""What tests of the experiment ask of a backend's process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import weights as canonical
from common.training import degradation, pipeline
from common.training.run import Observer, Plan, Run
from common.training.trainer import SINGLE, Minibatch


class Double:
    """A backend that trains in float64, whatever it is asked for."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def trainer(self, spec: Any, recipe: Any, dtype: str, replica: Any = SINGLE) -> Any:
        return self._backend.trainer(spec, recipe, "float64", replica)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


@dataclass(frozen=True, kw_only=True)
class FirstSteps:
    """A run in float64: the losses of its steps, and the norms of the gradients before the first."""

    plan: Plan
    folder: Path

    def perform(self, backend: Any, clock: Any) -> tuple[list[float], dict[str, float]]:
        self.folder.mkdir(parents=True)
        losses: dict[int, float] = {}
        run = Run(plan=self.plan, folder=self.folder, backend=Double(backend))
        run.train(Observer(step=lambda event: losses.setdefault(event.step, event.measured.loss)))
        start = canonical.init(self.plan.spec, self.plan.recipe.seed)
        return list(losses.values()), degradation.gradient_norms(backend, self.plan, start, "float64")


@dataclass(frozen=True, kw_only=True)
class NormsByAStep:
    """By path, how far one step of gradient descent at rate 1 moves every kernel; and `gradient_norms`."""

    plan: Plan

    def perform(self, backend: Any, clock: Any) -> tuple[dict[str, float], dict[str, float]]:
        plan, start = self.plan, canonical.init(self.plan.spec, self.plan.recipe.seed)
        trainer = backend.trainer(plan.spec, plan.recipe, "float64")
        trainer.load(start)
        ((images, labels),) = pipeline.training_batches(plan.dataset, plan.recipe, start=0, stop=1)
        trainer.fit([Minibatch(images=images, labels=labels, learning_rate=1.0)], lambda measured: True)
        after = trainer.export()
        moved = {
            path: float(np.linalg.norm(after[name] - start[name].astype(np.float64)))
            for path, name in degradation.kernels(plan.spec).items()
        }
        return moved, degradation.gradient_norms(backend, plan, start, "float64")
