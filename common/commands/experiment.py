"""The command of experiments: trainings that together show something."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common import architectures
from common.backends.columns import COLUMNS, cores, resolve
from common.commands.options import grouped
from common.commands.terminal import err, examples, out, say, stoppable
from common.commands.train import Material, absolute, fitting
from common.errors import InputError
from common.training import degradation, pipeline
from common.training import recipe as recipes
from common.training.degradation import Answer, Training, Watcher
from common.training.recipe import TrainingRecipe
from common.training.run import Plan

app = typer.Typer()
_EXPERIMENTS = ("degradation",)


@app.command(
    rich_help_panel="Train",
    epilog=examples(
        "resnet-parity experiment degradation --backend torch --out runs/degradation",
        "resnet-parity experiment degradation --backend torch --out runs/degradation --resume",
        "resnet-parity experiment degradation --backend flax --data cifar-10-python.tar.gz --out runs/cifar",
    ),
)
@grouped
def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"Of {', '.join(_EXPERIMENTS)}.")],
    output: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the experiment.")],
    material: Material,
    backend: Annotated[str, typer.Option("--backend", help=f"One of {', '.join(COLUMNS)}.")] = "torch",
    seeds: Annotated[int, typer.Option(min=1, help="Each network is trained from so many seeds.")] = 3,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings at a time, which share the cores.", show_default="one per core"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in DIR where it stopped.")] = False,
) -> None:
    """Train plain and residual networks of 20 and 56 layers, and show why residuals: two figures and a table."""
    if name not in _EXPERIMENTS:
        near = get_close_matches(name, _EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(_EXPERIMENTS)}"
        raise InputError(f"unknown experiment {name!r}; {hint}")
    column = resolve(backend)
    begun = resume and output.is_dir() and any(output.iterdir())
    earlier = degradation.recipe_of(output) if begun else None
    members, recipe = members_of(output, material, column, seeds, earlier)
    if begun:
        degradation.check_same(members)
    facts = {"backend": column, "data": absolute(material.data), "recipe": recipes.to_dict(recipe)}
    if not begun:
        degradation.begin(output, facts)
    jobs = min(jobs or cores(), len(members))
    with stoppable() as stopped, _progress(f"{name} {column}", members, stopped) as watcher:
        finished = degradation.conduct(members, column, jobs, max(1, cores() // jobs), watcher)
    if not finished:
        done = sum(member.finished for member in members)
        why = signal.Signals(stopped[0]).name
        say(f"stopped by {why} with {done} of {len(members)} runs at their end; go on with --resume")
        if stopped == [signal.SIGINT]:
            raise typer.Exit(130)
        return
    _report(output, members, facts)


def members_of(
    output: Path, material: Material, column: str, seeds: int, earlier: TrainingRecipe | None
) -> tuple[list[Training], TrainingRecipe]:
    """All runs of the experiment, and the recipe of the first seed."""
    dataset = material.open()
    for note in dataset.notes:
        say(note)
    if earlier is not None:
        recipe = material.by(earlier)
    else:
        # Nothing is held out: as in the paper's figure, the test images are measured after every epoch.
        recipe = material.by(degradation.DIGITS if dataset.name == "digits" else dataset.recipe, validation=0)
    pipeline.steps_per_epoch(dataset, recipe)  # refuses a batch that is too large, before anything is made
    plans = [
        Plan(
            variant=variant,
            spec=fitting(architectures.find(variant), variant, dataset, recipe),
            dataset=dataset,
            data=absolute(material.data),
            recipe=recipe.replace(seed=recipe.seed + seed),
            backend=column,
        )
        for variant in degradation.NETWORKS
        for seed in range(seeds)
    ]
    return degradation.trainings(plans, output), recipe


@contextmanager
def _progress(title: str, members: Sequence[Training], stopped: list[int]) -> Iterator[Watcher]:
    """A bar of epochs with what each process is doing, and a line for every run that ends; lines alone without a
    terminal."""
    console = err()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    plan = members[0].plan
    epoch = pipeline.steps_per_epoch(plan.dataset, plan.recipe)
    epochs = -(-plan.recipe.total_steps(epoch) // epoch)
    doing: dict[int, str] = {}
    with bar:
        task = bar.add_task(title, total=epochs * len(members), doing="starting")

        def show(worker: int, member: Training, what: str) -> None:
            doing[worker] = f"{member.folder.name} {what}"
            done = sum(degradation.epochs_done(one) for one in members)
            bar.update(task, completed=done, doing=" | ".join(doing[n] for n in sorted(doing)))

        def ended(member: Training, answer: Answer) -> None:
            for warning in answer.warnings:
                bar.console.print(warning, markup=False, highlight=False, soft_wrap=True)
            if answer.finished:
                found = degradation.found(member)
                line = (
                    f"{member.plan.variant:8}  seed {member.seed}  training error {100 * found.train[-1]:6.2f} %  "
                    f"{found.part} error {100 * found.test[-1]:6.2f} %"
                )
                bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Watcher(told=show, ended=ended, stop=lambda: bool(stopped))


def _report(output: Path, members: Sequence[Training], facts: Mapping[str, Any]) -> None:
    from common.report import degradation as report

    found = [degradation.found(member) for member in members]
    paths = report.write(output, found, facts)
    console = out()
    console.print(report.table(found))
    for line in report.verdicts(found):
        console.print(line)
    console.print(f"{output}: {', '.join(path.name for path in paths)}", markup=False)
