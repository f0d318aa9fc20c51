"""The commands that prove: check, record, compare, and list and show what there is to prove."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from common import architectures, checkpoints, images
from common.architectures import Spec, running
from common.architectures.layers import output_shapes
from common.backends.columns import COLUMNS
from common.commands.models import InputsFile, is_reference, record_model
from common.commands.options import grouped
from common.commands.terminal import DIFFERENT, WRONG, check_writable, choices, examples, out, progress_bar
from common.errors import InputError, SpecError
from common.parity.case import DTYPES, Case
from common.parity.names import MODES
from common.parity.session import CheckResult, Session, compare_files, make_record
from common.parity.steps import RECIPE
from common.report import console as tables
from common.report import json as json_report
from common.report import junit as junit_report
from common.report import networks
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe, changed

app = typer.Typer()
_PANEL = "Prove that networks are the same function"
_USUAL_MODES = ",".join(MODES)
_MODES = (*MODES, "steps")
_USUAL_SIZE = (64, 64)  # cheap, and 2x2 pixels at the end of a network of stride 32
_SPEC = "A specification as a JSON file, instead of a named variant."
_SIZE = "Height and width of the images."
# Fields of a recipe that a check takes from elsewhere, or has no use for.
_NOT_OF_STEPS = {
    "batch_size": "every step takes --batch images",
    "seed": "weights, crops and labels follow from --seed",
    "epochs": "--steps says how many",
    "augmentation": "images are taken as they are",
}
SpecFile = Annotated[Path | None, typer.Option("--spec", metavar="FILE", help=_SPEC)]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How networks are run: on which weights, images and labels, in which modes."""

    mode: Annotated[str, typer.Option(help=f"Of {','.join(_MODES)}, separated by commas.")] = _USUAL_MODES
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help=_SIZE, show_default="64, or what the network takes")
    ] = None
    batch: Annotated[int, typer.Option(min=1, help="Images in the batch.")] = 2
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A photograph; may be repeated.", show_default="two"),
    ] = None
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Canonical weights.", show_default="random ones")
    ] = None
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of mode steps.", show_default="20")] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|PRESET",
            help="What mode steps trains by; its batch size, epochs and augmentation are not used there.",
            show_default="one for the check",
        ),
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A field of the recipe; may be repeated.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, crops and labels.")] = 0

    @cached_property
    def modes(self) -> list[str]:
        return choices("mode", self.mode, _MODES)

    def case(self, name: str, spec: Spec, dtypes: Sequence[str]) -> Case:
        """The case of one network. Raises `InputError` or `RecipeError` for options that do not fit it."""
        return Case(
            variant=name,
            spec=spec,
            size=_size(self.size) if self.size is not None else _usual_size(spec),
            batch=max(self.batch, len(self.image or [])),
            photos=tuple(self.image or images.sample_photos()),
            weights=checkpoints.read_for(spec, self.weights).weights if self.weights else None,
            seed=self.seed,
            dtypes=tuple(dtypes),
            modes=tuple(self.modes),  # type: ignore[arg-type]
            recipe=self._training,
        )

    @cached_property  # one file to read, however many networks
    def _training(self) -> TrainingRecipe:
        """The recipe of mode steps, with as many as are to be taken: those of a preset may be a whole training's."""
        given = {"--steps": self.steps, "--recipe": self.recipe, "--set": self.settings}
        if unused := [option for option, value in given.items() if value and "steps" not in self.modes]:
            raise InputError(f"{' and '.join(unused)} say what mode steps does; add --mode steps")
        named = {setting.partition("=")[0].partition(".")[0] for setting in self.settings or []}
        for field, instead in _NOT_OF_STEPS.items():
            if field in named:
                raise InputError(f"--set {field} means nothing in mode steps: {instead}")
        if self.steps and "steps" in named:
            raise InputError(f"both --steps {self.steps} and --set steps are given; give one of them")
        recipe = changed(recipes.find(self.recipe) if self.recipe else RECIPE, self.settings or [])
        return recipe if "steps" in named else recipe.replace(steps=self.steps or RECIPE.steps)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity check resnet50",
        "resnet-parity check resnet18 resnet50 --backends torch,flax --json out.json --junit out.xml",
        "resnet-parity check resnet18 --mode steps --steps 20 --set optimizer=adamw",
    ),
)
@grouped
def check(
    variants: Annotated[list[str] | None, typer.Argument(metavar="VARIANT", help="Named variants.")] = None,
    backends: Annotated[str, typer.Option(help=f"Of {', '.join(COLUMNS)}, separated by commas.")] = "torch,keras,flax",
    dtype: Annotated[
        str | None, typer.Option(help="Of float64,float32.", show_default="both; float64 with mode steps")
    ] = None,
    spec: SpecFile = None,
    *,
    conditions: Conditions,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JUnit XML.")] = None,
    timings: Annotated[bool, typer.Option("--timings", help="Show where the time went.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Backends at work at a time.", show_default="one per core")
    ] = None,
) -> None:
    """Check that backends compute the same function: every layer, gradient and statistic, or optimiser step."""
    names = choices("backends", backends, None)
    if len(names) < 2:
        raise InputError(f"--backends {backends} names one backend; a comparison needs at least two")
    dtypes = choices("dtype", dtype, DTYPES) if dtype else DTYPES[:1] if "steps" in conditions.modes else DTYPES
    cases = [conditions.case(name, found, dtypes) for name, found in _specs(variants or [], spec)]
    for path in (json, junit):
        check_writable(path)
    results: list[CheckResult] = []
    with Session(names, jobs) as session:
        for case in cases:
            with progress_bar(case.variant, session.step_count(case)) as progress:
                results.append(session.check(case, progress=progress))
            out().print(tables.result(results[-1]))
        if timings:
            out().print(tables.timings(session.processes, session.seconds))
    if json:
        json_report.write_json(json, results)
    if junit:
        junit_report.write_junit(junit, results)
    if any(not c.passed for result in results for c in result.comparisons):
        raise typer.Exit(DIFFERENT)
    if any(result.failures for result in results):
        raise typer.Exit(WRONG)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity record torch resnet50 -o before.safetensors",
        "resnet-parity record mine.py:model -o mine.safetensors",
    ),
)
@grouped
def record(
    backend: Annotated[
        str,
        typer.Argument(
            metavar="BACKEND|FILE.py:FUNCTION", help=f"One of {', '.join(COLUMNS)}; or what makes a model of your own."
        ),
    ],
    variant: Annotated[str | None, typer.Argument(help="A named variant.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write.")] = ...,  # type: ignore[assignment]
    dtype: Annotated[str, typer.Option(help="One of float64, float32.")] = "float64",
    spec: SpecFile = None,
    inputs: InputsFile = None,
    *,
    conditions: Conditions,
    response: Annotated[
        bool, typer.Option(help="Measure the one-ulp response; one of the records that are compared needs it.")
    ] = True,
) -> None:
    """Record what one backend computes, or a model of your own, to be compared later or elsewhere."""
    dtypes = choices("dtype", dtype, DTYPES)
    if len(dtypes) > 1:
        raise InputError(f"--dtype {dtype} names {len(dtypes)} types; a record has one")
    if is_reference(backend):
        if unused := [
            o for o, v in {"a variant": variant, "--spec": spec, "--weights": conditions.weights}.items() if v
        ]:
            raise InputError(f"{backend} makes the model itself; {' and '.join(unused)} would say of another")
        mode = conditions.mode if conditions.mode != _USUAL_MODES else None
        record_model(backend, output, dtype, mode, inputs, response=response)
        return
    if inputs is not None:
        raise InputError("--inputs is for a model of your own, FILE.py:FUNCTION; give --image")
    name, found = _one_spec(variant, spec)
    case = conditions.case(name, found, dtypes)
    check_writable(output)
    with progress_bar(name, None) as progress:
        made = make_record(case, backend, output, response=response, progress=progress)
    versions = ", ".join(f"{key} {value}" for key, value in made.manifest.versions.items())
    out().print(f"{output}: {len(made)} arrays of {name} in {dtypes[0]} by {made.manifest.backend} ({versions})")


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity compare before.safetensors after.safetensors"),
)
def compare(
    records: Annotated[list[Path], typer.Argument(metavar="FILE", help="Records, two or more.")],
) -> None:
    """Compare records, without any framework. The first one with a response is the reference."""
    compared = compare_files(records)
    for comparison in compared:
        out().print(tables.comparison(comparison))
    if not all(comparison.passed for comparison in compared):
        raise typer.Exit(DIFFERENT)


@app.command(
    "list",
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity list", "resnet-parity list 'resnet50*'"),
)
def list_variants(
    pattern: Annotated[str, typer.Argument(help="A part of a name, or a pattern with * and ?.")] = "*",
) -> None:
    """List the named variants."""
    names = architectures.matching(pattern)
    if not names:
        raise SpecError(f"no variant matches {pattern!r}; `resnet-parity list` shows all")
    out().print(networks.variants({name: architectures.find(name) for name in names}))


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity show resnet50", "resnet-parity show resnet18 --size 193x129"),
)
def show(
    variant: Annotated[str | None, typer.Argument(help="A named variant.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="N|HxW", help=_SIZE, show_default="what such a network is usually fed")
    ] = None,
    spec: SpecFile = None,
) -> None:
    """Show a variant's layers, shapes, parameters and multiply-adds."""
    _, found = _one_spec(variant, spec)
    out().print(networks.layers(found, found.default_size if size is None else _size(size)))


def _specs(variants: Sequence[str], path: Path | None) -> list[tuple[str, Spec]]:
    """The networks that the command line names, by variant or as a file."""
    found = [(name, architectures.find(name)) for name in variants]
    if path is not None:
        found.append((path.stem, architectures.read(path)))
    if not found:
        raise SpecError("no network is named; give a variant (`resnet-parity list` shows all) or --spec FILE")
    return found


def _one_spec(variant: str | None, path: Path | None) -> tuple[str, Spec]:
    if variant and path:
        raise SpecError(f"both variant {variant} and --spec {path} are given; give one of them")
    ((name, spec),) = _specs([variant] if variant else [], path)
    return name, spec


def _usual_size(spec: Spec) -> tuple[int, int]:
    """The usual one where the network takes it, in training too; else that of the images it is made for."""
    try:
        output_shapes(running(spec, training=True), (*_USUAL_SIZE, spec.in_channels))
    except InputError:
        return spec.default_size
    return _USUAL_SIZE


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"--size {text} is not a size; expected N or HxW in pixels, as 64 or 64x96")
    return int(parts[0]), int(parts[-1])
