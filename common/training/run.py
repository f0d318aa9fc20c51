"""A run: one network trained by one recipe in one framework, in a folder of its own that a killed run goes on from.

The folder holds ``run.json`` (what is trained, how and with what), ``metrics.jsonl`` and TensorBoard's event files,
``checkpoints/``, and at the end ``final.safetensors``, canonical weights (``final-ema.safetensors`` too where the
recipe averages them).
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures import Spec, running
from common.backends.protocol import Backend
from common.checkpoints import Checkpoint, Origin
from common.datasets import Dataset, Examples
from common.errors import RecipeError, SpecError, TrainingError
from common.files import reason, written
from common.images import Preprocessing
from common.training import dropout, pipeline
from common.training import recipe as recipes
from common.training.metrics import Metrics, read
from common.training.recipe import TrainingRecipe
from common.training.snapshots import Snapshot, Snapshots
from common.training.trainer import SINGLE, Measured, Minibatch, Replica, Trainer

_FORMAT = "resnet-parity run 1"
FILE = "run.json"
# What a run that goes on must have in common with what was begun: another one of these would be another path.
_FIXED = ("spec", "data", "train", "test", "recipe", "backend", "init")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be trained. `init` are the weights to begin with; none are the recipe's own."""

    variant: str
    spec: Spec
    dataset: Dataset
    data: str  # as the user names it
    recipe: TrainingRecipe
    backend: str
    init: Path | None = None

    def facts(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "format": _FORMAT,
            "variant": self.variant,
            "spec": architectures.to_dict(self.spec),
            "data": self.data,
            "train": _described(self.dataset.train),
            "test": _described(self.dataset.test),
            "recipe": recipes.to_dict(self.recipe),
            "backend": self.backend,
            "init": str(self.init) if self.init else None,
        }


@dataclass(frozen=True, kw_only=True)
class Event:
    """What a run tells while it works."""

    step: int
    steps: int  # in all
    epoch: float
    measured: Measured
    images_per_second: float  # since the epoch began, checkpoints left out
    # At the end of an epoch, on "test" images or on those held out, "validation".
    part: str | None = None
    evaluated: Measured | None = None


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Who listens to a run; `stop` is asked after every step whether it shall end there, resumable."""

    step: Callable[[Event], None] = lambda event: None
    warn: Callable[[str], None] = lambda message: None
    stop: Callable[[], bool] = lambda: False


QUIET = Observer()


@dataclass(kw_only=True)
class Outcome:
    """How a run ended: at its last step, or earlier because it was told to stop."""

    step: int
    steps: int
    test: Measured | None = None
    ema: Measured | None = None
    weights: Path | None = None
    resumed: int | None = None
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.weights is not None


@dataclass(kw_only=True)
class Run:
    """A plan under way in `folder`. `every` is the number of steps between checkpoints, an epoch's by default."""

    plan: Plan
    folder: Path
    backend: Backend
    replica: Replica = SINGLE
    workers: int = 0  # processes that prepare images
    keep: int = 3
    every: int | None = None

    def __post_init__(self) -> None:
        plan = self.plan
        self._observer = QUIET
        self._epoch = pipeline.steps_per_epoch(plan.dataset, plan.recipe)
        self._steps = plan.recipe.total_steps(self._epoch)
        # Refuses what cannot be batched or shared, before anything is made; nothing is read yet.
        pipeline.training_batches(plan.dataset, plan.recipe, start=0, stop=1, replica=self.replica)
        self._snapshots = Snapshots(self.folder / "checkpoints", self.keep)
        self._trainer: Trainer = self.backend.trainer(plan.spec, plan.recipe, "float32", self.replica)

    @property
    def _leading(self) -> bool:
        return self.replica.rank == 0

    def train(self, observer: Observer = QUIET) -> Outcome:
        """Train from the newest intact checkpoint, or from the beginning, to the end or until told to stop.

        Raises `TrainingError` for a loss that is not finite, naming the first layer that is not, and for a folder that
        cannot be written; the last good checkpoint stays.
        """
        started = time.perf_counter()
        self._observer = observer
        if self._leading:
            self._snapshots.folder.mkdir(parents=True, exist_ok=True)
            self._snapshots.clean()
        newest = self._snapshots.newest(self._observer.warn)
        step = self._begin(newest)
        result = Outcome(step=step, steps=self._steps, resumed=step or None)
        metrics = Metrics(self.folder, step) if self._leading else None
        # One stream for all epochs, since its worker processes take a while to start.
        batches = self._batches(step, self._steps)
        try:
            self._make_up(step, result, metrics)
            while step < self._steps:
                stop = min(self._steps, step + self._epoch - step % self._epoch)
                reached, last = self._fit(islice(batches, stop - step), step, metrics)
                result.step = reached
                if last is not None and not isfinite(last.measured.loss):
                    raise self._diverged(reached, last.measured.loss)
                if reached < stop:
                    self._save(reached)
                    return result
                step = reached
                for part in self._parts_after(step):
                    evaluated = self._evaluate(part, step, result, metrics)
                    if last is not None and self._leading:
                        self._observer.step(replace(last, part=part, evaluated=evaluated))
                if step == self._steps or not self.every:
                    self._save(step)
        finally:
            if metrics is not None:
                metrics.close()
        if result.test is None:  # resumed at its end
            self._evaluate("test", step, result, None)
        result.weights = self._finish()
        result.seconds = time.perf_counter() - started
        return result

    @property
    def _averaged(self) -> bool:
        return self.plan.recipe.ema_decay is not None

    def _begin(self, newest: Snapshot | None) -> int:
        if newest is not None:
            self._trainer.restore(newest.state)
            return newest.step
        self._trainer.load(self._initial())
        return 0

    def _initial(self) -> canonical.Weights:
        plan = self.plan
        if plan.init is not None:
            return checkpoints.read_for(plan.spec, plan.init).weights
        return canonical.init(plan.spec, plan.recipe.seed, zero_gamma=plan.recipe.zero_gamma)

    def _fit(
        self, batches: Iterable[Minibatch], start: int, metrics: Metrics | None, *, silent: bool = False
    ) -> tuple[int, Event | None]:
        """Take the steps after `start`; the step reached, and what was measured last."""
        step, last, began = start, None, time.perf_counter()

        def after(measured: Measured) -> bool:
            nonlocal step, last, began
            step += 1
            speed = (step - start) * measured.count / (time.perf_counter() - began)
            epoch = step / self._epoch
            last = Event(step=step, steps=self._steps, epoch=epoch, measured=measured, images_per_second=speed)
            if not isfinite(measured.loss):
                return False
            if silent:
                return True
            if metrics is not None:
                rate = self._rate(step - 1)
                values = _values(measured) | {"learning_rate": rate, "images_per_second": speed}
                metrics.add("train", step, {"epoch": epoch} | values)
            self._observer.step(last)
            if self.every and step % self.every == 0 and step < self._steps:
                paused = time.perf_counter()
                self._save(step)
                began += time.perf_counter() - paused
            return not self._observer.stop()

        self._trainer.fit(batches, after)
        return step, last

    def _batches(self, start: int, stop: int) -> Iterator[Minibatch]:
        plan = self.plan
        arrays = pipeline.training_batches(
            plan.dataset, plan.recipe, start=start, stop=stop, replica=self.replica, workers=self.workers
        )
        for step, (images, labels) in enumerate(arrays, start):
            share = len(labels)
            first = step * plan.recipe.batch_size + self.replica.rank * share
            masks = dropout.masks(plan.spec, images.shape[1:3], plan.recipe.seed, first + np.arange(share))
            yield Minibatch(images=images, labels=labels, learning_rate=self._rate(step), masks=masks)

    def _rate(self, step: int) -> float:
        return self.plan.recipe.learning_rate_at(step, self._epoch)

    def _parts_after(self, step: int) -> tuple[str, ...]:
        """The parts of the data to be evaluated after the epoch that ends with this step."""
        if not self.plan.recipe.validation:
            return ("test",)
        return ("validation", "test") if step == self._steps else ("validation",)

    def _make_up(self, step: int, result: Outcome, metrics: Metrics | None) -> None:
        """Evaluate what the metrics lack of the step that is gone on from: a process killed after it had written its
        checkpoint, at the end of an epoch, had not come to that."""
        if not step or (step % self._epoch and step < self._steps):
            return
        # Every process reads the same, since none can add an evaluation before all have taken part in it.
        there = {line["kind"] for line in read(self.folder) if line["step"] == step}
        for part in self._parts_after(step):
            if part not in there:
                self._evaluate(part, step, result, metrics)

    def _evaluate(self, part: str, step: int, result: Outcome, metrics: Metrics | None) -> Measured:
        """The weights on a part of the data, and their moving average, which `metrics` keeps; on the test images it is
        the result's too."""
        recipe = self.plan.recipe if part == "validation" else self.plan.recipe.replace(validation=0)

        def measured(*, ema: bool) -> Measured:
            return self._trainer.evaluate(evaluation(self.plan.dataset, recipe, self.replica, self.workers), ema=ema)

        found, averaged = measured(ema=False), measured(ema=True) if self._averaged else None
        if part == "test":
            result.test, result.ema = found, averaged
        if metrics is not None:
            metrics.add(part, step, {"epoch": step / self._epoch} | _values(found, averaged))
        return found

    def _save(self, step: int) -> None:
        with self._snapshots.writing(step, leading=self._leading) as folder:
            self._trainer.save(folder)

    def _finish(self) -> Path:
        path = self.folder / "final.safetensors"
        weights = self._trainer.export()
        averaged = self._trainer.export(ema=True) if self._averaged else None
        if self._leading:
            checkpoints.write(path, self._checkpoint(weights))
            if averaged is not None:
                checkpoints.write(self.folder / "final-ema.safetensors", self._checkpoint(averaged))
        return path

    def _checkpoint(self, weights: canonical.Weights) -> Checkpoint:
        """What was trained, with the classes of the data, how its images were prepared, and where it came from."""
        plan = self.plan
        begun = Origin(reference=f"{plan.variant}, initial weights of seed {plan.recipe.seed}")
        if plan.init is not None:
            begun = checkpoints.read_for(plan.spec, plan.init).origin
        while begun.before is not None:
            begun = begun.before
        trained = f"trained for {self._steps} steps on {plan.dataset.name} by {plan.backend}"
        # A folder may have a name that no file of weights may hold.
        named = all(name.isprintable() for name in plan.dataset.classes)
        return Checkpoint(
            spec=plan.spec,
            weights=weights,
            preprocessing=pipeline.preprocessing(plan.dataset, plan.recipe),
            class_names=plan.dataset.classes if named else (),
            origin=replace(begun, path=self.folder, notes=(*begun.notes, trained)),
        )

    def _diverged(self, step: int, loss: float) -> TrainingError:
        """The error of a step whose loss is not finite, with the place where it began.

        By now the weights are spoilt too. Training is deterministic: the steps from the last good checkpoint are taken
        again, up to the one before, and the batch is looked at layer by layer.
        """
        newest = self._snapshots.newest(self._observer.warn)
        start = self._begin(newest)
        self._fit(self._batches(start, step - 1), start, None, silent=True)
        weights = self._trainer.export()
        (batch,) = self._batches(step - 1, step)
        where = first_not_finite(self.backend, self.plan.spec, weights, batch)
        kept = f"the checkpoint of step {newest.step} is kept" if newest else "no checkpoint had been written yet"
        return TrainingError(
            f"the loss is {loss} at step {step}: {where}; {kept}: "
            "lower the learning rate, warm up longer or clip the gradient (--set lr=…, warmup_epochs=…, clip_norm=…)"
        )


def evaluation(
    dataset: Dataset,
    recipe: TrainingRecipe,
    replica: Replica = SINGLE,
    workers: int = 0,
    preprocessing: Preprocessing | None = None,
) -> Iterator[Minibatch]:
    """The test images, or the training images that the recipe holds out, in order; prepared as the recipe says, or by
    `preprocessing`."""
    for images, labels in pipeline.evaluation_batches(
        dataset, recipe, replica=replica, workers=workers, preprocessing=preprocessing
    ):
        yield Minibatch(images=images, labels=labels)


def first_not_finite(backend: Backend, spec: Spec, weights: canonical.Weights, batch: Minibatch) -> str:
    """In words, the first layer of a pass in training mode that is not finite, or the first weight that is not."""
    for name in canonical.shapes(spec):
        if not np.isfinite(weights[name]).all():
            return f"the step before left {name} not finite"
    model = backend.build(spec, "float32")
    backend.load(model, weights)
    arrays = backend.run(model, batch.images, batch.labels, training=True, gradients=False, masks=batch.masks)
    for layer in running(spec, training=True):
        if not np.isfinite(arrays[f"tap/{layer.path}"]).all():
            return f"{layer.path} is the first layer whose output is not finite"
    return "no layer's output is, taken alone in float32: it overflows in the loss or in the recipe's precision"


def begin(folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
    """Make the folder of a new run. Raises `TrainingError` where there is something in it already."""
    make_folder(folder, FILE, {**plan.facts(), **facts})


def make_folder(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Make a new folder with a JSON file of what is begun there. Raises `TrainingError` where something is in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainingError(f"{folder}: is there already and not empty; give another --out, or --resume to go on in it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be made: {reason(error)}") from None
    with written(folder / name, TrainingError) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def facts(folder: Path) -> dict[str, Any]:
    """What `begin` wrote of the run in `folder`. Raises `TrainingError`."""
    try:
        data: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise TrainingError(f"{folder}: the format of its {FILE} is {data['format']!r}, expected {_FORMAT!r}")
        missing = [name for name in ("variant", *_FIXED) if name not in data]
        if missing:
            raise TrainingError(f"{folder}: its {FILE} lacks {', '.join(missing)}")
    except OSError as error:
        raise TrainingError(f"{folder}: not the folder of a run: {reason(error)}: {FILE}") from None
    except (ValueError, KeyError, TypeError):
        raise TrainingError(f"{folder}: its {FILE} is damaged; the run cannot go on") from None
    found: dict[str, Any] = data
    return found


def recipe_of(folder: Path, facts: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe in the `facts` of the run in `folder`. Raises `TrainingError`."""
    try:
        return recipes.from_dict(facts["recipe"])
    except RecipeError as error:
        raise TrainingError(f"{folder}: was begun with another version's recipe: {error}; begin anew") from None


def check_same(folder: Path, plan: Plan) -> None:
    """Raise `TrainingError` unless the run in `folder` was begun with this plan.

    A version that lacked a field of today's computed what its default does.
    """
    begun = facts(folder)
    try:
        spec = architectures.from_dict(begun["spec"])
    except SpecError as error:
        raise TrainingError(f"{folder}: was begun with another version's spec: {error}; begin anew") from None
    begun |= {"spec": architectures.to_dict(spec), "recipe": recipes.to_dict(recipe_of(folder, begun))}
    begun, now = (json.loads(json.dumps(one)) for one in (begun, plan.facts()))
    for name in _FIXED:
        if begun[name] != now[name]:
            was, wanted = _differing(begun[name], now[name])
            hint = "leave it out to go on, or begin anew"
            if name in ("train", "test"):
                hint = f"what is in {plan.data} has changed since; bring it back to go on, or begin anew"
            raise TrainingError(f"{folder}: was begun with {name} {was}, not {wanted}; {hint}")


def _described(examples: Examples) -> dict[str, Any]:
    return {"images": len(examples), "checksum": examples.checksum()}


def _differing(begun: Any, now: Any) -> tuple[str, str]:
    """The two values, of tables only the first field that differs."""
    if isinstance(begun, dict) and isinstance(now, dict):
        key = next(key for key in [*begun, *now] if begun.get(key) != now.get(key))
        return f"{key}={begun.get(key)!r}", f"{key}={now.get(key)!r}"
    return repr(begun), repr(now)


def _values(measured: Measured, ema: Measured | None = None) -> dict[str, float]:
    values = {"loss": measured.loss, "accuracy": measured.accuracy}
    return values if ema is None else values | {"ema_loss": ema.loss, "ema_accuracy": ema.accuracy}
