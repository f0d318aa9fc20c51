"""The commands on public checkpoints: inspect, convert, predict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.table import Table

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures import Spec
from common.checkpoints import Checkpoint, Written, formats
from common.checkpoints.inference import conventions
from common.checkpoints.prediction import Prediction, predict
from common.commands.terminal import choices, err, examples, out, progress_bar
from common.errors import InputError, SpecError
from common.files import reason
from common.images import PRESETS, Preprocessing, preset_name

app = typer.Typer()
_PANEL = "Move weights"

_SOURCE = "A checkpoint: a file or folder, a URL, or a name as torchvision:resnet50:IMAGENET1K_V2, hf://OWNER/REPO."
_CONVENTIONS = dict.fromkeys(name for family in architectures.families() for name in conventions(family))
_PREPROCESS = f"One of {', '.join(PRESETS)}, or fields of one's own as JSON."
Source = Annotated[str, typer.Argument(metavar="FILE", help=_SOURCE)]
Convention = Annotated[
    str | None,
    typer.Option(help=f"What shapes cannot say, by name: {', '.join(_CONVENTIONS)}.", show_default="the format's own"),
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="One field of the spec; may be repeated.")
]
Classes = Annotated[int | None, typer.Option(min=1, help="Make a new head for so many classes.")]
Preprocess = Annotated[
    str | None, typer.Option(metavar="PRESET|JSON", help=_PREPROCESS, show_default="what the weights say")
]
ClassNames = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Names of the classes, one a line.", show_default="what the weights say"),
]
InChannels = Annotated[int | None, typer.Option(min=1, help="Adapt the stem to so many input channels.")]


@app.command(rich_help_panel=_PANEL, epilog=examples("resnet-parity inspect resnet50.weights.h5"))
def inspect(file: Source, convention: Convention = None, changes: Changes = None) -> None:
    """Show what a checkpoint is: format, network, conventions assumed, parameters, suspicious values, digest."""
    found = _read(file, convention, changes)
    spec, origin = found.spec, found.origin
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("file", str(origin.path))
    table.add_row("format", f"{origin.format}, in {origin.container}")
    if origin.before is not None:
        table.add_row("made from", f"{origin.before.reference}: {origin.before.format}, in {origin.before.container}")
    table.add_row("network", _network(spec))
    parameters = sum(layer.parameter_count for layer in spec.layers)
    statistics = sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())
    table.add_row("parameters", f"{parameters:,} and {statistics:,} running statistics")
    table.add_row("dtypes", ", ".join(sorted({str(found.weights[name].dtype) for name in found.weights})))
    if found.preprocessing is not None:
        table.add_row("preprocessing", _told_preprocessing(found.preprocessing))
    if found.class_names:
        table.add_row("classes", f"{len(found.class_names)}: {_some(found.class_names)}")
    for whose in filter(None, (origin, origin.before)):
        if whose.assumed:
            shows = "nothing in the file shows these" if whose is origin else "when the file was made"
            table.add_row("assumed", f"{', '.join(_assignments(whose.assumed))} ({shows})")
    if origin.ignored:
        table.add_row("ignored", _some(origin.ignored))
    for note in origin.notes:
        table.add_row("note", note)
    table.add_row("digest", canonical.digest(found.weights))
    for line in canonical.suspicious(spec, found.weights) or ["nothing"]:
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
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help=f"One of {', '.join(formats())}.")] = None,
    convention: Convention = None,
    changes: Changes = None,
    classes: Classes = None,
    in_channels: InChannels = None,
    preprocess: Preprocess = None,
    class_names: ClassNames = None,
) -> None:
    """Convert a checkpoint into another format."""
    checkpoints.check_target(output, to)
    found = _read(file, convention, changes, classes=classes, in_channels=in_channels)
    found = _told(found, preprocess, class_names)
    _say_notes(found)
    written = checkpoints.write(output, found, to)
    out().print(
        f"{found.origin.path} ({found.origin.format}) -> {output} ({written.format}): {_network(found.spec)}, "
        f"digest {canonical.digest(found.weights)}"
    )
    _say_lost(written)


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
    preprocess: Preprocess = None,
    class_names: ClassNames = None,
    convention: Convention = None,
    changes: Changes = None,
) -> None:
    """Classify photographs with any checkpoint in any backend, or in all three side by side."""
    names = ["torch", "keras", "flax"] if backend == "all" else choices("backend", backend, None)
    if preprocess is not None:
        _preprocessing(preprocess)  # before anything is fetched
    found = _told(_read(weights, convention, changes), preprocess, class_names)
    _say_notes(found)
    with progress_bar("predict", None) as progress:
        prediction = predict(found, images, names, progress)
    _print_prediction(images, prediction, min(top, prediction.probabilities[0].shape[1]))


def _print_prediction(images: list[Path], prediction: Prediction, top: int) -> None:
    console = out()
    console.print(f"preprocessing: {_told_preprocessing(prediction.preprocessing)}")
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


def _read(reference: str, convention: str | None, changes: list[str] | None, **options: Any) -> Checkpoint:
    return checkpoints.read(reference, convention=convention, changes=_changes(changes or []), **options)


def _told(found: Checkpoint, preprocess: str | None, class_names: Path | None) -> Checkpoint:
    """The checkpoint with what a person says of it. Raises `InputError`."""
    if preprocess is not None:
        found = replace(found, preprocessing=_preprocessing(preprocess))
    if class_names is not None:
        found = replace(found, class_names=_class_names(class_names, found))
    return found


def _preprocessing(text: str) -> Preprocessing:
    """A preset by name, or one with fields of its own as JSON. Raises `InputError`."""
    if text in PRESETS:
        return PRESETS[text]
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(
            f"--preprocess {text} is unknown; expected one of {', '.join(PRESETS)}, or fields as JSON"
        ) from None
    return Preprocessing.from_data(fields)


def _class_names(path: Path, found: Checkpoint) -> tuple[str, ...]:
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    if len(names) != found.spec.classes or not all(name.isprintable() for name in names):
        raise InputError(f"{path}: {len(names)} names; the network tells {found.spec.classes} classes apart")
    return names


def _say_notes(found: Checkpoint) -> None:
    if found.origin.assumed:
        _say(f"assumed: {', '.join(_assignments(found.origin.assumed))}")
    for note in found.origin.notes:
        _say(note)


def _say_lost(written: Written) -> None:
    """What the file cannot hold, in one line, with the options that restore it."""
    lost, options = [], []
    if written.fields:
        lost.append("these conventions, and its readers assume others")
        options += [f"--set {one}" for one in _assignments(written.fields)]
    if written.preprocessing is not None:
        lost.append("how photographs are prepared")
        options.append(f"--preprocess {_written_preprocessing(written.preprocessing)}")
    if written.class_names:
        lost.append("the names of the classes")
        options.append("--class-names FILE")
    if lost:
        _say(f"{written.format} files do not hold {', nor '.join(lost)}; read it with: {' '.join(options)}")


def _say(line: str) -> None:
    err().print(line, markup=False, highlight=False, soft_wrap=True)


def _told_preprocessing(preprocessing: Preprocessing) -> str:
    name = preset_name(preprocessing)
    return f"{name}, {preprocessing}" if name else str(preprocessing)


def _written_preprocessing(preprocessing: Preprocessing) -> str:
    """As `--preprocess` takes it."""
    name = preset_name(preprocessing)
    usual = asdict(Preprocessing())
    fields = {field: value for field, value in asdict(preprocessing).items() if value != usual[field]}
    return name or quote(json.dumps(fields))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


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


def _assignments(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}".replace(" ", "")
        for name, value in fields.items()
    ]


def _network(spec: Spec) -> str:
    """The variant's name, or what tells the network from a named one."""
    variants = architectures.variants_of(spec.family)
    data = architectures.to_dict(spec)
    nearest = min(variants, key=lambda name: len(_differing(variants[name], data)))
    differing = _differing(variants[nearest], data)
    return f"{nearest} with {', '.join(_assignments(differing))}" if differing else nearest


def _differing(spec: Spec, data: dict[str, Any]) -> dict[str, Any]:
    known = architectures.to_dict(spec)
    return {name: value for name, value in data.items() if known[name] != value}
