"""The commands of training: train, evaluate, plot."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common import architectures, checkpoints, datasets
from common.architectures import Spec
from common.backends import columns as backend
from common.backends.columns import COLUMNS, cores, resolve
from common.commands.terminal import check_writable, counting, err, examples, native_silence, out
from common.datasets import Dataset
from common.errors import InputError
from common.training import recipe as recipes
from common.training import run as runs
from common.training.recipe import PRESETS, TrainingRecipe
from common.training.run import Event, Observer, Outcome, Plan, Run
from common.training.trainer import SINGLE, Replica

app = typer.Typer()
_PANEL = "Train"

_DATA = "digits, or a folder: CIFAR-10 or -100, MNIST or Fashion-MNIST, or images by class."
_RECIPE = f"One of {', '.join(PRESETS)}, or a .toml or .json file."
Data = Annotated[str, typer.Option("--data", metavar="digits|DIR", help=_DATA)]
BackendName = Annotated[str, typer.Option("--backend", help=f"One of {', '.join(COLUMNS)}.")]
Recipe = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE|PRESET", help=_RECIPE, show_default="the one made for the data")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One field of the recipe, as lr=0.05; repeatable."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the framework.", show_default="one per core")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare images; 0: this one does.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")]


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity train resnet20 --data digits --backend flax --out runs/flax",
        "resnet-parity train resnet20 --data digits --backend flax --out runs/flax --resume",
    ),
)
@native_silence()
def train(
    variant: Annotated[str, typer.Argument(help="A named variant, with as many channels and classes as the data.")],
    output: Annotated[Path, typer.Option("--out", metavar="RUN", help="The folder of the run.")],
    name: BackendName = "torch",
    data: Data = "digits",
    recipe: Recipe = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in RUN.")] = False,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to begin with, as final.safetensors of another run.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Steps between checkpoints.", show_default="an epoch's")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="So many checkpoints stay.")] = 3,
    threads: Threads = None,
    workers: Workers = 0,
    skip_bad: SkipBad = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="One of several processes that the framework's launcher started.")
    ] = False,
) -> None:
    """Train a network natively in one framework; a run that was killed goes on with --resume."""
    column = resolve(name)
    dataset = _opened(data, skip_bad)
    chosen = recipes.changed(_recipe(recipe, dataset, output if resume else None), settings or [])
    plan = Plan(
        variant=variant,
        spec=_fitting(architectures.find(variant), variant, dataset, chosen),
        dataset=dataset,
        data=_absolute(data),
        recipe=chosen,
        backend=column,
        init=init.absolute() if init else _begun_with(output) if resume else None,
    )
    replica = _join(column) if distributed else SINGLE
    begun = resume and (output / runs.FILE).exists()
    if begun:
        runs.check_same(output, plan)
    elif plan.init is not None:
        checkpoints.load_for(plan.spec, plan.init)  # refused before anything is made
    if resume and not begun and output.exists() and any(output.iterdir()):
        runs.facts(output)  # says what is missing
    threads = threads or max(1, cores() // (replica.count if distributed else 1))
    engine = backend.start_here(column, threads)
    for note in dataset.notes if replica.rank == 0 else ():
        _say(note)
    run = Run(
        plan=plan,
        folder=output,
        backend=engine,
        replica=replica,
        workers=workers,
        keep=keep,
        every=checkpoint_every,
    )
    if not begun and replica.rank == 0:
        runs.begin(output, plan, {"versions": engine.describe(), "threads": threads, "processes": replica.count})
    with _stoppable() as stopped, _progress(plan, replica) as show:
        result = run.train(Observer(step=show, warn=_say, stop=lambda: bool(stopped)))
    if replica.rank == 0:
        _report(plan, output, result, stopped)
    if stopped == [signal.SIGINT]:
        raise typer.Exit(130)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity evaluate --weights runs/flax/final.safetensors --data digits --backend keras"),
)
@native_silence()
def evaluate(
    weights: Annotated[str, typer.Option(metavar="FILE", help="A checkpoint of any format, a URL or a name.")],
    name: BackendName = "torch",
    data: Data = "digits",
    recipe: Recipe = None,
    settings: Settings = None,
    threads: Threads = None,
    workers: Workers = 0,
    skip_bad: SkipBad = False,
) -> None:
    """Measure loss and accuracy of any checkpoint on a data set's test images, resized and normalised by a recipe."""
    from common.checkpoints import load_fetched
    from common.sources.downloads import fetch

    column = resolve(name)
    dataset = _opened(data, skip_bad)
    # Of the test images, even where a training by this recipe holds some others out.
    chosen = recipes.changed(_recipe(recipe, dataset, None).replace(validation=0), settings or [])
    found = load_fetched(fetch(weights))
    _fits(found.spec, weights, dataset)
    engine = backend.start_here(column, threads or cores())
    trainer = engine.trainer(found.spec, chosen, "float32")
    trainer.load(found.weights)
    started = time.perf_counter()
    # Of a batch that is larger than all test images, the rest would be padding.
    sized = chosen.replace(batch_size=min(chosen.batch_size, chosen.validation or len(dataset.test)))
    measured = trainer.evaluate(runs.evaluation(dataset, sized, workers=workers))
    seconds = time.perf_counter() - started
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


def _opened(data: str, skip_bad: bool) -> Dataset:
    with counting("looking at images") as seen:
        return datasets.open(data, skip_bad=skip_bad, seen=seen)


def _recipe(given: str | None, dataset: Dataset, run: Path | None) -> TrainingRecipe:
    """The recipe that is named; of a run that goes on its own; else the data set's."""
    if given is None and run is not None and (run / runs.FILE).exists():
        return recipes.from_dict(runs.facts(run)["recipe"])
    return recipes.find(given or dataset.recipe)


def _begun_with(run: Path) -> Path | None:
    init = runs.facts(run)["init"] if (run / runs.FILE).exists() else None
    return Path(init) if init else None


def _absolute(data: str) -> str:
    return str(Path(data).absolute()) if Path(data).exists() else data


def _fitting(spec: Spec, variant: str, dataset: Dataset, recipe: TrainingRecipe) -> Spec:
    """The variant with the channels and classes of the data. Raises `InputError` for images it cannot take."""
    side = recipe.augmentation.size
    size = (side, side) if side else dataset.size
    if size is None:
        raise InputError(f"the images of {dataset.name} differ in size; choose one, as --set augmentation.size=224")
    if min(size) < spec.output_stride:
        raise InputError(
            f"the images of {dataset.name} are {size[0]}x{size[1]}, too small for {variant}, whose strides multiply to "
            f"{spec.output_stride}; enlarge them, as --set augmentation.size={spec.output_stride}"
        )
    return spec.replace(in_channels=dataset.channels, classes=len(dataset.classes))


def _fits(spec: Spec, weights: str, dataset: Dataset) -> None:
    """Raise `InputError` unless the network takes the data's channels and knows as many classes."""
    classes = spec.layers[-1].arrays.get(f"{spec.layers[-1].path}.bias", (None,))[0]
    if spec.in_channels != dataset.channels:
        raise InputError(
            f"{weights} takes {spec.in_channels} channels; {dataset.name} has {dataset.channels}: "
            "convert it with --in-channels, or choose other data"
        )
    if classes is not None and classes != len(dataset.classes):
        raise InputError(
            f"{weights} tells {classes} classes apart; {dataset.name} has {len(dataset.classes)}: choose other data"
        )


def _join(column: str) -> Replica:
    package = COLUMNS[column].backend.partition(".")[0]
    os.environ.update(COLUMNS[column].environment)
    replica: Replica = import_module(f"{package}.distributed").join()
    return replica


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end the training after the step it is at, with a checkpoint; a second one ends it at once."""
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        for one in before:
            signal.signal(one, signal.SIG_DFL)

    before = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _progress(plan: Plan, replica: Replica) -> Iterator[Callable[[Event], None]]:
    """A bar with loss, accuracy, images/s and time left, and a line for every epoch; lines alone without a terminal."""
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
    with bar:
        task: Any = bar.add_task(f"{plan.variant} {plan.backend}", total=None, doing="starting")

        def show(event: Event) -> None:
            m = event.measured
            doing = f"loss {m.loss:.4f}  acc {m.accuracy:6.2%}  {event.images_per_second:,.0f} images/s"
            bar.update(task, total=event.steps, completed=event.step, doing=doing)
            if event.evaluated is not None and replica.rank == 0:
                bar.console.print(
                    f"epoch {event.epoch:5.1f}  loss {m.loss:.4f}  {event.part} loss {event.evaluated.loss:.4f}  "
                    f"accuracy {event.evaluated.accuracy:7.2%}  {event.images_per_second:8,.0f} images/s",
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )

        yield show


def _report(plan: Plan, output: Path, result: Outcome, stopped: list[int]) -> None:
    if not result.finished:
        why = f"{signal.Signals(stopped[0]).name}" if stopped else "another process"
        _say(f"stopped by {why} after step {result.step} of {result.steps}, checkpoint written; go on with --resume")
        return
    assert result.test is not None
    averaged = f", averaged weights {result.ema.accuracy:.2%}" if result.ema else ""
    out().print(
        f"{output}: {plan.variant} on {plan.dataset.name} by {plan.backend}, {result.steps:,} steps"
        f"{f' ({result.resumed:,} of them before)' if result.resumed else ''}: "
        f"accuracy {result.test.accuracy:.2%}{averaged}, loss {result.test.loss:.4f}, {result.seconds:.1f} s; "
        f"weights in {result.weights}"
    )


def _say(message: str) -> None:
    err().print(message, markup=False, highlight=False, soft_wrap=True)
