"""The experiment that says why residuals: plain and residual networks of 20 and 56 layers, trained by one recipe.

He et al. 2015 (arXiv:1512.03385), section 4.2 and figure 6: a deeper plain network is worse on its own training set, a
deeper residual one is not. Each network is trained from every seed, all by the machinery of `common.training.run`.

The experiment is a folder: ``experiment.json`` (what is trained, and how), and in ``runs/`` the folder of every run,
``plain20-0`` for seed 0, with ``gradients.json`` beside what any run has. A process for each run that is under way
holds the framework; this one holds none.
"""

import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoints
from common import weights as canonical
from common.architectures import Spec
from common.backends.messages import Clock
from common.backends.process import BackendProcess
from common.backends.protocol import Backend
from common.errors import ParityError, TrainingError
from common.files import reason, written
from common.training import dropout, metrics, pipeline
from common.training import recipe as recipes
from common.training import run as runs
from common.training.recipe import PRESETS, TrainingRecipe
from common.training.run import Event, Observer, Plan, Run

# The shallow and the deep one of each kind.
KINDS = {"plain": ("plain20", "plain56"), "residual": ("resnet20", "resnet56")}
NETWORKS = tuple(name for pair in KINDS.values() for name in pair)
SEEDS = (0, 1, 2)

# SGD, momentum, decay and crops as in the paper's section 4.2. The rate is a fifth of the paper's, at which the plain
# network of 56 layers learns nothing of the digits and the residual one little (docs/degradation.md).
DIGITS = PRESETS["digits"].replace(
    learning_rate=0.02,
    nesterov=False,
    weight_decay=1e-4,
    decay_norms_and_biases=True,
    label_smoothing=0.0,
    epochs=40,
)

FILE = "experiment.json"
GRADIENTS = "gradients.json"
FINAL = "final.safetensors"
_FORMAT = "resnet-parity experiment 1"
_NAME = "degradation"
_LOOK = 0.1  # seconds between two looks at whether to stop


@dataclass(frozen=True, kw_only=True)
class Training:
    """One of the experiment's runs."""

    plan: Plan
    folder: Path

    @property
    def seed(self) -> int:
        return self.plan.recipe.seed

    @property
    def title(self) -> str:
        return f"{self.plan.variant}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end. Its gradients are written last."""
        return (self.folder / GRADIENTS).exists()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a finished run measured: errors, as shares, by epoch, and the norms of kernels' gradients by layer."""

    training: Training
    part: str  # what `test` was measured on: "test", or "validation" where the recipe holds images out
    train: tuple[float, ...]  # the mean over the epoch's steps, of examples as the recipe prepares them
    test: tuple[float, ...]  # after the epoch, in eval mode
    start: Mapping[str, float]  # by path of the layer, in the order of the walk
    end: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a request to train ended: at its end or told to stop, and what a person should hear of."""

    finished: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a network from where its folder stands, and measure its gradients at the start and the end.

    After every epoch the clock is told. SIGTERM ends it after the step it is at, with a checkpoint.
    """

    training: Training
    threads: int

    def perform(self, backend: Backend, clock: Clock) -> Answer:
        plan, folder = self.training.plan, self.training.folder
        if not (folder / runs.FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)  # a killed process had come no further than making it
            runs.begin(folder, plan, {"versions": backend.describe(), "threads": self.threads, "processes": 1})
        warnings: list[str] = []

        def tell(event: Event) -> None:
            if event.evaluated is not None:
                clock.tell(f"epoch {event.epoch:.0f}, loss {event.measured.loss:.3f}")

        with _stoppable() as stopped:
            observer = Observer(step=tell, warn=warnings.append, stop=lambda: bool(stopped))
            # One checkpoint is enough to go on from.
            result = Run(plan=plan, folder=folder, backend=backend, keep=1).train(observer)
        if result.weights is None:
            return Answer(finished=False, warnings=tuple(warnings))
        clock.tell("gradients")
        start = canonical.init(plan.spec, plan.recipe.seed, zero_gamma=plan.recipe.zero_gamma)
        end = checkpoints.read_for(plan.spec, result.weights).weights
        norms = {
            "start": gradient_norms(backend, plan, start),
            "end": gradient_norms(backend, plan, end),
        }
        with written(folder / GRADIENTS, TrainingError) as beside:
            beside.write_text(json.dumps(norms, indent=1) + "\n", encoding="utf-8")
        return Answer(finished=True, warnings=tuple(warnings))


def gradient_norms(
    backend: Backend, plan: Plan, weights: canonical.Weights, dtype: str = "float32"
) -> dict[str, float]:
    """By path of every layer with a kernel, in the order of the walk: the Euclidean norm of the gradient of the mean
    cross-entropy of the training's first batch, in training mode, with respect to that kernel."""
    ((images, labels),) = pipeline.training_batches(plan.dataset, plan.recipe, start=0, stop=1)
    masks = dropout.masks(plan.spec, images.shape[1:3], plan.recipe.seed, np.arange(len(labels)))
    model = backend.build(plan.spec, dtype)
    backend.load(model, weights)
    arrays = backend.run(model, images, labels, training=True, gradients=True, masks=masks)
    return {
        path: float(np.linalg.norm(arrays[f"grad/{name}"].astype(np.float64)))
        for path, name in kernels(plan.spec).items()
    }


def kernels(spec: Spec) -> dict[str, str]:
    """The name of the kernel of every layer that has one of its own, by path, in the order of the walk."""
    return {
        layer.path: layer.uses["kernel"]
        for layer in spec.layers
        if "kernel" in layer.uses and layer.uses["kernel"] in layer.parameters
    }


def trainings(plans: Sequence[Plan], folder: Path) -> list[Training]:
    """A run for every plan, in the experiment of `folder`."""
    return [Training(plan=plan, folder=folder / "runs" / f"{plan.variant}-{plan.recipe.seed}") for plan in plans]


def begin(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder of a new experiment. Raises `TrainingError` where there is something in it already."""
    runs.make_folder(folder, FILE, {"format": _FORMAT, "experiment": _NAME, **facts})


def recipe_of(folder: Path) -> TrainingRecipe:
    """The recipe, but for its seed, of the experiment in `folder`. Raises `TrainingError` where there is none."""
    try:
        data: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT or data["experiment"] != _NAME:
            raise TrainingError(
                f"{folder}: its {FILE} is of {data['format']!r}, {data['experiment']!r}; "
                f"expected {_FORMAT!r}, {_NAME!r}: give another --out"
            )
        found = recipes.from_dict(data["recipe"])
    except OSError as error:
        raise TrainingError(
            f"{folder}: not the folder of an experiment: {reason(error)}: {FILE}; give another --out"
        ) from None
    except (ValueError, KeyError, TypeError, ParityError) as error:
        if isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{folder}: its {FILE} is damaged; begin anew with another --out") from None
    return found


def check_same(members: Sequence[Training]) -> None:
    """Raise `TrainingError` unless all runs that were begun were begun with these plans."""
    for member in members:
        if (member.folder / runs.FILE).exists():
            runs.check_same(member.folder, member.plan)


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Who listens to the trainings, from several threads; `stop` is asked whether they shall end, resumable.

    `told` hears, by the number of the process, what it is doing; `ended` of every answer.
    """

    told: Callable[[int, Training, str], None] = lambda worker, training, what: None
    ended: Callable[[Training, Answer], None] = lambda training, answer: None
    stop: Callable[[], bool] = lambda: False


def conduct(members: Sequence[Training], column: str, jobs: int, threads: int, watcher: Watcher) -> bool:
    """Train all that is not finished, `jobs` runs at a time, each in a process of its own; whether all now are.

    Raises the first error of any of them, naming the run; the others end there, and go on from their last checkpoint.
    """
    # The deepest first, so that the processes end together.
    waiting = deque(sorted((m for m in members if not m.finished), key=lambda m: -len(m.plan.spec.layers)))
    processes: list[int] = []
    ending = False

    def work(number: int) -> None:
        with BackendProcess(column, threads) as process, _listed(process.pid, processes):
            while not (ending or watcher.stop()):
                try:
                    member = waiting.popleft()
                except IndexError:
                    return

                def hear(what: str, member: Training = member) -> None:
                    watcher.told(number, member, what)

                try:
                    answer = process.ask(Train(training=member, threads=threads), hear)
                except ParityError as error:
                    if ending or watcher.stop():
                        return  # told to end before it could answer
                    raise type(error)(f"{member.title}: {error}") from None
                watcher.ended(member, answer)

    with ThreadPoolExecutor(max(1, min(jobs, len(waiting)))) as pool:
        futures: list[Future[None]] = [pool.submit(work, number) for number in range(min(jobs, len(waiting)))]
        told = False
        try:
            while True:
                done, under_way = wait(futures, timeout=_LOOK, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if not under_way:
                    break
                if watcher.stop() and not told:
                    told = True
                    _send(processes, signal.SIGTERM)
        finally:
            ending = True
            if not told:
                _send(processes, signal.SIGKILL)
    return all(member.finished for member in members)


def found(training: Training) -> Found:
    """What a finished run measured. Raises `TrainingError` for files that are damaged."""
    plan, folder = training.plan, training.folder
    epoch = pipeline.steps_per_epoch(plan.dataset, plan.recipe)
    lines = metrics.read(folder)
    try:
        norms: Any = json.loads((folder / GRADIENTS).read_text(encoding="utf-8"))
        steps: dict[int, list[float]] = {}
        for line in lines:
            if line["kind"] == "train":
                steps.setdefault((line["step"] - 1) // epoch, []).append(1 - line["accuracy"])
        part = "validation" if plan.recipe.validation else "test"
        return Found(
            training=training,
            part=part,
            train=tuple(sum(errors) / len(errors) for errors in steps.values()),
            test=tuple(1 - line["accuracy"] for line in lines if line["kind"] == part),
            start=dict(norms["start"]),
            end=dict(norms["end"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{folder}: its measurements are damaged; remove the folder and --resume") from None


def epochs_done(training: Training) -> int:
    """How many epochs of a run have been evaluated."""
    part = "validation" if training.plan.recipe.validation else "test"
    try:
        return sum(line["kind"] == part for line in metrics.read(training.folder))
    except TrainingError:
        return 0


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in tuple(processes):
        with suppress(ProcessLookupError):
            os.kill(process, number)


@contextmanager
def _listed(process: int, processes: list[int]) -> Iterator[None]:
    """A process that may be sent signals, while it is surely there."""
    processes.append(process)
    try:
        yield
    finally:
        processes.remove(process)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGTERM is noted, and no longer ends this process."""
    stopped: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)
