"""The commands on public checkpoints: inspect, convert, predict."""

import json
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from common import architectures, checkpoints
from common.architectures import Spec
from common.architectures.resnet import VARIANTS
from common.checkpoints import FORMATS, Checkpoint
from common.checkpoints.inference import NAMED_CONVENTIONS, UNSEEN
from common.checkpoints.prediction import PRESETS, Prediction, predict
from common.commands.terminal import choices, err, examples, out, progress_bar
from common.errors import InputError, SpecError
from common.sources.downloads import Fetched, fetch

app = typer.Typer()
_PANEL = "Move weights"

_SOURCE = "A checkpoint: a file or folder, a URL, or a name as torchvision:resnet50:IMAGENET1K_V2, hf://OWNER/REPO."
Source = Annotated[str, typer.Argument(metavar="FILE", help=_SOURCE)]
Convention = Annotated[
    str | None,
    typer.Option(
        help=f"What shapes cannot say, by name: {', '.join(NAMED_CONVENTIONS)}.", show_default="the format's own"
    ),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="One field of the spec; may be repeated.")
]
Classes = Annotated[int | None, typer.Option(min=1, help="Make a new head for so many classes.")]
InChannels = Annotated[int | None, typer.Option(min=1, help="Adapt the stem to so many input channels.")]


@app.command(rich_help_panel=_PANEL, epilog=examples("resnet-parity inspect resnet50.weights.h5"))
def inspect(file: Source, convention: Convention = None, changes: Changes = None) -> None:
    """Show what a checkpoint is: format, network, conventions assumed, parameters, suspicious values, digest."""
    _, found = _load(file, convention, changes)
    spec = found.spec
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("file", str(found.path))
    table.add_row("format", f"{found.format}, in {found.container}")
    table.add_row("network", _network(spec))
    parameters = sum(layer.parameter_count for layer in spec.layers)
    statistics = sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())
    table.add_row("parameters", f"{parameters:,} and {statistics:,} running statistics")
    table.add_row("dtypes", ", ".join(sorted({str(found.weights[name].dtype) for name in found.weights})))
    if found.assumed:
        table.add_row("assumed", f"{', '.join(_assignments(found.assumed))} (nothing in the file shows these)")
    if found.ignored:
        more = f" and {len(found.ignored) - 3} more" if len(found.ignored) > 3 else ""
        table.add_row("ignored", f"{', '.join(found.ignored[:3])}{more}")
    for note in found.notes:
        table.add_row("note", note)
    table.add_row("digest", checkpoints.digest(found.weights))
    for line in checkpoints.suspicious(spec, found.weights) or ["nothing"]:
        table.add_row("suspicious", line)
    out().print(table)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity convert resnet50.pth r50.msgpack",
        "resnet-parity convert hf://timm/resnet50.a1_in1k r50.weights.h5 --to keras_classic",
    ),
)
def convert(
    file: Source,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write; the end of its name says how.")],
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")] = None,
    convention: Convention = None,
    changes: Changes = None,
    classes: Classes = None,
    in_channels: InChannels = None,
) -> None:
    """Convert a checkpoint into another format."""
    checkpoints.check_target(output, to)
    _, found = _load(file, convention, changes, classes=classes, in_channels=in_channels)
    _say_notes(found)
    written = checkpoints.save(output, found.spec, found.weights, to)
    out().print(
        f"{found.path} ({found.format}) -> {output} ({written}): {_network(found.spec)}, "
        f"digest {checkpoints.digest(found.weights)}"
    )
    if written != checkpoints.CANONICAL:
        inside = checkpoints.load(output).spec
        differing = {
            name: getattr(found.spec, name) for name in UNSEEN if getattr(inside, name) != getattr(found.spec, name)
        }
        if differing:
            settings = " ".join(f"--set {one}" for one in _assignments(differing))
            err().print(
                f"{written} files do not state conventions, and this network has others than its readers assume; "
                f"read it with: {settings}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


@app.command(
    "predict",
    rich_help_panel=_PANEL,
    epilog=examples("resnet-parity predict cat.jpg --weights torchvision:resnet50:IMAGENET1K_V2 --backend all"),
)
def predict_command(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Photographs.")],
    weights: Annotated[str, typer.Option(metavar="FILE", help=_SOURCE)],
    backend: Annotated[str, typer.Option(help="torch, keras, flax, other columns, or all three: all.")] = "torch",
    top: Annotated[int, typer.Option(min=1, help="So many classes of each image.")] = 5,
    preprocess: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(PRESETS)}.", show_default="that of the weights or their format"),
    ] = None,
    convention: Convention = None,
    changes: Changes = None,
) -> None:
    """Classify photographs with any checkpoint in any backend, or in all three side by side."""
    names = ["torch", "keras", "flax"] if backend == "all" else choices("backend", backend, None)
    if preprocess is not None and preprocess not in PRESETS:
        raise InputError(f"--preprocess {preprocess} is unknown; expected one of {', '.join(PRESETS)}")
    fetched, found = _load(weights, convention, changes)
    _say_notes(found)
    with progress_bar("predict", None) as progress:
        prediction = predict(found, fetched.known, images, names, preprocess, progress)
    _print_prediction(images, prediction, min(top, prediction.probabilities[0].shape[1]))


def _print_prediction(images: list[Path], prediction: Prediction, top: int) -> None:
    console = out()
    console.print(f"preprocessing: {prediction.preprocessing}")
    for index, image in enumerate(images):
        table = Table(box=None, pad_edge=False, title=str(image), title_justify="left")
        table.add_column("class")
        for backend in prediction.backends:
            table.add_column(backend, justify="right")
        for label in (-prediction.probabilities[0][index]).argsort(kind="stable")[:top]:
            shares = [f"{100 * probabilities[index, label]:.3f} %" for probabilities in prediction.probabilities]
            table.add_row(prediction.names[label], *shares)
        console.print(table)
    if len(prediction.backends) > 1:
        console.print(f"largest difference of an output between backends: {prediction.largest_difference:.1e}")


def _load(
    reference: str, convention: str | None, changes: list[str] | None, **options: Any
) -> tuple[Fetched, Checkpoint]:
    fetched = fetch(reference)
    for note in fetched.notes:
        err().print(note, markup=False, highlight=False, soft_wrap=True)
    found = checkpoints.load_fetched(fetched, convention=convention, changes=_changes(changes or []), **options)
    return fetched, found


def _say_notes(found: Checkpoint) -> None:
    if found.assumed:
        err().print(f"assumed: {', '.join(_assignments(found.assumed))}", markup=False, highlight=False, soft_wrap=True)
    for note in found.notes:
        err().print(note, markup=False, highlight=False, soft_wrap=True)


def _changes(assignments: list[str]) -> dict[str, Any]:
    """Fields from FIELD=VALUE; a value is JSON, or else text."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name in changes:
            raise SpecError(f"--set {assignment}: expected FIELD=VALUE, each field once")
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
    return changes


def _assignments(fields: Any) -> list[str]:
    return [
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}".replace(" ", "")
        for name, value in fields.items()
    ]


def _network(spec: Spec) -> str:
    """The variant's name, or what tells the network from a named one."""
    for name, known in VARIANTS.items():
        if known == spec:
            return name
    data = architectures.to_dict(spec)
    nearest = min(VARIANTS, key=lambda name: len(_differing(VARIANTS[name], data)))
    differing = _differing(VARIANTS[nearest], data)
    return f"{nearest} with {', '.join(_assignments(differing))}"


def _differing(spec: Spec, data: dict[str, Any]) -> dict[str, Any]:
    known = architectures.to_dict(spec)
    return {name: value for name, value in data.items() if known[name] != value}
