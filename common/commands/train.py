"""The commands of training: train, evaluate, plot."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common import architectures, checkpoints, datasets
from common.architectures import Spec
from common.backends.columns import COLUMNS, cores, resolve, start_here
from common.backends.protocol import Backend
from common.checkpoints import Checkpoint
from common.commands.options import grouped
from common.commands.terminal import check_writable, counting, err, examples, native_silence, out, say, stoppable
from common.datasets import Dataset
from common.errors import InputError
from common.images import Preprocessing
from common.training import augmentation as augmentations
from common.training import recipe as recipes
from common.training import run as runs
from common.training.augmentation import Normalise
from common.training.recipe import PRESETS, TrainingRecipe
from common.training.run import Event, Observer, Outcome, Plan, Run
from common.training.trainer import SINGLE, Replica

app = typer.Typer()
_PANEL = "Train"

_DATA = "digits, or a folder: CIFAR-10 or -100, MNIST or Fashion-MNIST, or images by class."
_RECIPE = f"One of {', '.join(PRESETS)}, or a .toml or .json file."
_ENLARGED = 4
_SETTING = "One field of the recipe, as lr=0.05 or augmentation.crop.pad=4; repeatable."


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a network is trained or evaluated on, and by which recipe."""

    data: Annotated[str, typer.Option("--data", metavar="digits|DIR", help=_DATA)] = "digits"
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE|PRESET", help=_RECIPE, show_default="the one made for the data"),
    ] = None
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=_SETTING)] = None
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False

    @property
    def sized(self) -> bool:
        """Whether it says of what size the network's images are."""
        names = [one.partition("=")[0] for one in self.settings or []]
        # As augmentation.size, augmentation.resize.size, augmentation.resized_crop.
        return bool(self.recipe) or any(
            name == "augmentation" or (name.startswith("augmentation.") and "size" in name) for name in names
        )

    @property
    def prepared(self) -> bool:
        """Whether it says how images become examples."""
        return bool(self.recipe) or any(one.startswith("augmentation") for one in self.settings or [])

    def open(self) -> Dataset:
        """The data set, its images counted on the terminal."""
        with counting("looking at images") as seen:
            return datasets.open(self.data, skip_bad=self.skip_bad, seen=seen)

    def by(self, default: TrainingRecipe | str, **changes: Any) -> TrainingRecipe:
        """The recipe that is named, else this one or the preset of this name; then `changes`, then the settings."""
        named = self.recipe or default
        chosen = recipes.find(named) if isinstance(named, str) else named
        return recipes.changed(chosen.replace(**changes), self.settings or [])


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What does the work, and with how much of this machine."""

    name: Annotated[str, typer.Option("--backend", help=f"One of {', '.join(COLUMNS)}.")] = "torch"
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the framework.", show_default="one per core")
    ] = None
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images; 0: this one does.")] = 0

    def start(self, column: str, processes: int = 1) -> tuple[Backend, int]:
        """The backend of this column, in this process, and its threads: of this machine's cores an equal share."""
        threads = self.threads or max(1, cores() // processes)
        return start_here(column, threads), threads


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Which checkpoints a run writes, and whether it goes on from one."""

    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in RUN.")] = False
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Steps between checkpoints.", show_default="an epoch's")
    ] = None
    keep: Annotated[int, typer.Option(min=1, help="So many checkpoints stay.")] = 3


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity train resnet20 --data digits --backend flax --out runs/flax",
        "resnet-parity train resnet20 --data digits --backend flax --out runs/flax --resume",
    ),
)
@native_silence()
@grouped
def train(
    variant: Annotated[str, typer.Argument(help="A named variant, with as many channels and classes as the data.")],
    output: Annotated[Path, typer.Option("--out", metavar="RUN", help="The folder of the run.")],
    engine: Engine,
    material: Material,
    keeping: Keeping,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to begin with, as final.safetensors of another run.")
    ] = None,
    print_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Print the mean loss of every so many steps, as 100.")
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes that the framework's launcher started.")
    ] = False,
) -> None:
    """Train a network natively in one framework; a run that was killed goes on with --resume."""
    column = resolve(engine.name)
    dataset = material.open()
    before = runs.facts(output) if keeping.resume and (output / runs.FILE).exists() else None
    earlier = runs.recipe_of(output, before) if before else None
    recipe = material.by(earlier or dataset.recipe)
    spec = architectures.find(variant)
    if not before:
        recipe = _sized(recipe, spec, dataset, material)
    begun_with = Path(before["init"]) if before and before["init"] else None
    if begun_with and earlier:
        normalised = augmentations.normalisation(earlier.augmentation)
        recipe = _normalised(recipe, normalised) if normalised else recipe
    elif init:
        recipe = _normalised_for(init, recipe, dataset)
    plan = Plan(
        variant=variant,
        spec=fitting(spec, variant, dataset, recipe),
        dataset=dataset,
        data=absolute(material.data),
        recipe=recipe,
        backend=column,
        init=init.absolute() if init else begun_with,
    )
    replica = _join(column) if distributed else SINGLE
    if before:
        runs.check_same(output, plan)
    elif plan.init is not None:
        checkpoints.read_for(plan.spec, plan.init)  # refused before anything is made
    if keeping.resume and not before and output.exists() and any(output.iterdir()):
        runs.facts(output)  # says what is missing
    started, threads = engine.start(column, replica.count)
    for note in dataset.notes if replica.rank == 0 else ():
        say(note)
    run = Run(
        plan=plan,
        folder=output,
        backend=started,
        replica=replica,
        workers=engine.workers,
        keep=keeping.keep,
        every=keeping.checkpoint_every,
    )
    if not before and replica.rank == 0:
        runs.begin(output, plan, {"versions": started.describe(), "threads": threads, "processes": replica.count})
    with stoppable() as stopped, _progress(plan, replica, print_every) as show:
        result = run.train(Observer(step=show, warn=say, stop=lambda: bool(stopped)))
    if replica.rank == 0:
        _report(plan, output, result, stopped)
    if stopped == [signal.SIGINT]:
        raise typer.Exit(130)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity evaluate --weights runs/flax/final.safetensors --data digits --backend keras"),
)
@native_silence()
@grouped
def evaluate(
    weights: Annotated[str, typer.Option(metavar="FILE", help="A checkpoint of any format, a URL or a name.")],
    engine: Engine,
    material: Material,
) -> None:
    """Measure loss and accuracy of any checkpoint on a data set's test images.

    They are resized and normalised as the checkpoint says, or by a recipe where one is given or it says nothing.
    """
    column = resolve(engine.name)
    dataset = material.open()
    # Of the test images, even where a training by this recipe holds some others out.
    recipe = material.by(dataset.recipe, validation=0)
    found = checkpoints.read(weights)
    _check_fits(found, weights, dataset)
    recipe = _sized(recipe, found.spec, dataset, material)
    preprocessing = _own(found, material, dataset)
    if preprocessing is not None:
        say(f"images prepared as {weights} says: {preprocessing}")
    started, _ = engine.start(column)
    trainer = started.trainer(found.spec, recipe, "float32")
    trainer.load(found.weights)
    clock = time.perf_counter()
    # Of a batch that is larger than all test images, the rest would be padding.
    sized = recipe.replace(batch_size=min(recipe.batch_size, recipe.validation or len(dataset.test)))
    batches = runs.evaluation(dataset, sized, workers=engine.workers, preprocessing=preprocessing)
    measured = trainer.evaluate(batches)
    seconds = time.perf_counter() - clock
    out().print(
        f"{weights} on {dataset.name} by {column}: accuracy {measured.accuracy:.2%} "
        f"({measured.correct:,} of {measured.count:,}), loss {measured.loss:.4f}, "
        f"{measured.count / seconds:,.0f} images/s"
    )


@app.command(rich_help_panel=_PANEL, epilog=examples("resnet-parity plot runs/flax runs/torch -o curves.png"))
def plot(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="A .png, .svg or .pdf file.")],
) -> None:
    """Draw the curves of several runs over each other: loss of every step, accuracy on the test images."""
    from common.report import curves

    check_writable(output)
    curves.draw(folders, output)
    out().print(f"{output}: {len(folders)} runs")


def absolute(data: str) -> str:
    """What names the data, as a folder of runs keeps it."""
    return str(Path(data).absolute()) if Path(data).exists() else data


def fitting(spec: Spec, variant: str, dataset: Dataset, recipe: TrainingRecipe) -> Spec:
    """The variant with the channels and classes of the data. Raises `InputError` for images it cannot take."""
    size = augmentations.output(recipe.augmentation, dataset.size)
    if size is None:
        usual = max(spec.default_size)
        raise InputError(f"the images of {dataset.name} differ in size; choose one, as --set augmentation.size={usual}")
    found = f"the images of {dataset.name} are {size[0]}x{size[1]}"
    if spec.input_size and size != spec.input_size:
        height, width = spec.input_size
        hint = f"resize them, as --set augmentation.size={height}" if height == width else "choose other data"
        raise InputError(f"{found}; {variant} takes {height}x{width} alone: {hint}")
    if min(size) < (least := architectures.least_size(spec)):
        raise InputError(
            f"{found}, too small for {variant}, which takes {least}x{least} or more; enlarge them, as "
            f"--set augmentation.size={least}"
        )
    return spec.with_head(classes=len(dataset.classes)).replace(in_channels=dataset.channels)


def _sized(recipe: TrainingRecipe, spec: Spec, dataset: Dataset, material: Material) -> TrainingRecipe:
    """The recipe that was made for the data, at the one size that the network takes, where it takes one only.

    Not where the user says how; and nothing is enlarged more than four times, as digits of 8 pixels are for LeNet.
    """
    if material.sized or not spec.input_size or dataset.size is None:
        return recipe
    height, width = spec.input_size
    if height != width or height > _ENLARGED * min(dataset.size):
        return recipe
    size = None if spec.input_size == dataset.size else height
    return recipe.replace(augmentation=augmentations.sized(recipe.augmentation, size))


def _check_fits(found: Checkpoint, weights: str, dataset: Dataset) -> None:
    """Raise `InputError` unless the network takes the data's channels and tells the same classes apart."""
    spec = found.spec
    if spec.in_channels != dataset.channels:
        raise InputError(
            f"{weights} takes {spec.in_channels} channels; {dataset.name} has {dataset.channels}: "
            "convert it with --in-channels, or choose other data"
        )
    if spec.head == "none":
        raise InputError(f"{weights} has no classifier, so nothing can be counted; give weights that have one")
    if spec.classes != len(dataset.classes):
        raise InputError(
            f"{weights} tells {spec.classes} classes apart; {dataset.name} has {len(dataset.classes)}: "
            "choose other data"
        )
    if found.class_names != dataset.classes and sorted(found.class_names) == sorted(dataset.classes):
        place = next(n for n, name in enumerate(dataset.classes) if found.class_names[n] != name)
        raise InputError(
            f"{weights} has the classes of {dataset.name} in another order: class {place} is "
            f"{found.class_names[place]!r} there and {dataset.classes[place]!r} here; choose other data"
        )


def _own(found: Checkpoint, material: Material, dataset: Dataset) -> Preprocessing | None:
    """How a checkpoint wants its images, where the user says nothing of it and they are photographs.

    A foreign format only guesses it, from what its community does with photographs of any size.
    """
    guessed = found.origin.format != checkpoints.CANONICAL and dataset.size is not None
    return None if material.prepared or guessed or dataset.channels != 3 else found.preprocessing


def _normalised_for(init: Path, recipe: TrainingRecipe, dataset: Dataset) -> TrainingRecipe:
    """The recipe with the normalisation that the weights to begin with want, where it says nothing itself."""
    wanted = checkpoints.read(init).preprocessing
    if wanted is None or augmentations.normalisation(recipe.augmentation) or dataset.channels != 3:
        return recipe
    if wanted.channel_order != "RGB" or wanted.scale != 255:
        say(f"{init} wants its images {wanted}; a recipe has no words for that, and normalises as {dataset.name} does")
        return recipe
    return _normalised(recipe, Normalise(mean=wanted.mean, std=wanted.std))


def _normalised(recipe: TrainingRecipe, by: Normalise) -> TrainingRecipe:
    """The recipe with this normalisation, where it says nothing itself."""
    if augmentations.normalisation(recipe.augmentation):
        return recipe
    return recipe.replace(augmentation=(*recipe.augmentation, by))


def _join(column: str) -> Replica:
    package = COLUMNS[column].backend.partition(".")[0]
    os.environ.update(COLUMNS[column].environment)
    replica: Replica = import_module(f"{package}.distributed").join()
    return replica


@contextmanager
def _progress(plan: Plan, replica: Replica, every: int | None) -> Iterator[Callable[[Event], None]]:
    """A bar with loss, accuracy, images/s and time left, and a line for every epoch; lines alone without a terminal.

    With `every` a line for every so many steps too, counted from the training's first: the mean of their losses.
    """
    console = err()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[doing]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or replica.rank > 0,
    )
    losses: list[float] = []

    def say(line: str) -> None:
        if replica.rank == 0:
            bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    with bar:
        task: Any = bar.add_task(f"{plan.variant} {plan.backend}", total=None, doing="starting")

        def show(event: Event) -> None:
            m = event.measured
            doing = f"loss {m.loss:.4f}  acc {m.accuracy:6.2%}  {event.images_per_second:,.0f} images/s"
            bar.update(task, total=event.steps, completed=event.step, doing=doing)
            if event.evaluated is not None:
                say(
                    f"epoch {event.epoch:5.1f}  loss {m.loss:.4f}  {event.part} loss {event.evaluated.loss:.4f}  "
                    f"accuracy {event.evaluated.accuracy:7.2%}  {event.images_per_second:8,.0f} images/s"
                )
            elif every:
                losses.append(m.loss)
                if event.step % every == 0:
                    say(f"epoch {event.epoch:5.1f}  step {event.step:7,}  loss {sum(losses) / len(losses):.4f}")
                    losses.clear()

        yield show


def _report(plan: Plan, output: Path, result: Outcome, stopped: list[int]) -> None:
    if not result.finished:
        why = f"{signal.Signals(stopped[0]).name}" if stopped else "another process"
        say(f"stopped by {why} after step {result.step} of {result.steps}, checkpoint written; go on with --resume")
        return
    assert result.test is not None
    averaged = f", averaged weights {result.ema.accuracy:.2%}" if result.ema else ""
    out().print(
        f"{output}: {plan.variant} on {plan.dataset.name} by {plan.backend}, {result.steps:,} steps"
        f"{f' ({result.resumed:,} of them before)' if result.resumed else ''}: "
        f"accuracy {result.test.accuracy:.2%}{averaged}, loss {result.test.loss:.4f}, {result.seconds:.1f} s; "
        f"weights in {result.weights}"
    )
