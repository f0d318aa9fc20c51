"""The commands for models of the user's own: compare-models and diagnose; and a record of one."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from common.backends.columns import cores
from common.commands.terminal import DIFFERENT, check_writable, choices, examples, out, progress_bar
from common.errors import InputError, ModelError
from common.files import reason
from common.foreign.files import Reference, as_inputs
from common.foreign.protocol import Inputs, Layout
from common.parity import record as records
from common.parity.case import DTYPES
from common.parity.elsewhere import Elsewhere
from common.parity.hosts import Ask, Host, cast, in_layout
from common.parity.levels import DRAWS, ORDERS
from common.parity.models import LAYOUTS, compare_hosts
from common.parity.names import MODES, Mode
from common.parity.sides import Sides
from common.report import json as json_report
from common.report import models as tables

app = typer.Typer()
_PANEL = "Prove that networks are the same function"
_MODEL = "FILE.py:FUNCTION, a function without arguments that returns a model, or a model and its inputs."
InputsFile = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE", help="Arrays to call the models with, .npy or .npz.")
]
Match = Annotated[
    list[str] | None,
    typer.Option("--match", metavar="NAME=NAME", help="A layer or parameter of the first, and of the other."),
]
ModelModes = Annotated[
    str | None,
    typer.Option("--mode", help=f"Of {','.join(MODES)}, separated by commas.", show_default="all that the models can"),
]
Layouts = Annotated[
    str | None,
    typer.Option(help="NCHW or NHWC for each model, separated by commas.", show_default="as the models' kinds have it"),
]


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity compare-models before.py:model after.py:model",
        "resnet-parity compare-models torch_vit.py:make flax_vit.py:make --json out.json",
    ),
)
def compare_models(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help=_MODEL + " Two or more.")],
    inputs: InputsFile = None,
    mode: ModelModes = None,
    dtype: Annotated[str, typer.Option(help="Of float64,float32.")] = ",".join(DTYPES),
    layouts: Layouts = None,
    match: Match = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Compare models of your own, each in a process of its own; say where and why they differ."""
    if len(models) < 2:
        raise InputError(f"{len(models)} model is named; a comparison needs at least two")
    dtypes = choices("dtype", dtype, DTYPES)
    check_writable(json)
    with hosted(models, layouts, inputs) as (hosts, given), progress_bar("comparing", None) as progress:
        table = _table(match)
        found = compare_hosts(
            hosts,
            given,
            tables=[table] * (len(hosts) - 1),
            modes=modes_of(mode),
            dtypes=dtypes,
            progress=progress,
        )
    out().print(tables.result(found))
    if json:
        json_report.write_models(json, found)
    if not found.passed:
        raise typer.Exit(DIFFERENT)


@app.command(
    rich_help_panel=_PANEL,
    epilog=examples(
        "resnet-parity diagnose port.py:model --against original.py:model",
        "resnet-parity diagnose port.py:model --against resnet50",
        "resnet-parity diagnose after.safetensors --against before.safetensors --json why.json",
    ),
)
def diagnose(
    yours: Annotated[
        str, typer.Argument(metavar="RECORD|CHECKPOINT|FILE.py:FUNCTION", help="What differs, or is to be looked at.")
    ],
    against: Annotated[
        str,
        typer.Option(
            metavar="VARIANT|RECORD|FILE.py:FUNCTION",
            help="What it should be. A variant gets the weights of yours.",
        ),
    ],
    inputs: InputsFile = None,
    mode: ModelModes = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Say where and why a model differs from another: the layer, the mistake, and what to write instead."""
    check_writable(json)
    with progress_bar("diagnosing", None) as progress, Sides(progress) as sides:
        found = sides.diagnose(
            yours, against, inputs=_read(inputs) if inputs is not None else None, modes=modes_of(mode)
        )
    out().print(tables.result(found))
    if json:
        json_report.write_models(json, found)
    if not found.passed:
        raise typer.Exit(DIFFERENT)


def record_model(
    reference: str, output: Path, dtype: str, mode: str | None, inputs: Path | None, *, response: bool
) -> None:
    """Make a record of a user's model. Raises `ModelError`."""
    check_writable(output)
    modes = modes_of(mode)
    with hosted([reference], None, inputs) as ((host,), given):
        needs = {"train": "training", "grad": "gradients"}
        chosen: tuple[Mode, ...] = tuple(m for m in modes or MODES if modes or needs.get(m) not in host.lacks)
        ask = Ask(
            inputs=cast(cast(given, "float32"), dtype),
            dtype=dtype,
            modes=chosen,
            draws=DRAWS if response else 0,
            orders=ORDERS,
        )
        with host.at_work(dtype):
            found = host.record(ask)
            records.write(output, found, found.manifest)
        versions = ", ".join(f"{key} {value}" for key, value in found.manifest.versions.items())
        out().print(f"{output}: {len(found)} arrays of {host.title} in {dtype} by {host.backend} ({versions})")


def is_reference(text: str) -> bool:
    """Whether it names a function in a file."""
    return ".py:" in text


def modes_of(mode: str | None) -> tuple[Mode, ...] | None:
    """The modes that the command line names."""
    return tuple(choices("mode", mode, MODES)) if mode else None  # type: ignore[arg-type]


@contextmanager
def hosted(models: Sequence[str], layouts: str | None, inputs: Path | None) -> Iterator[tuple[list[Host], Inputs]]:
    """The models of these functions, each in a process of its own, and what they are called with.

    Raises `ModelError` for a function that makes none, or where nobody gives inputs.
    """
    references = [Reference.parse(model) for model in models]
    wanted: list[Layout | None] = [None] * len(models)
    if layouts is not None:
        named = choices_of_layouts(layouts, len(models))
        wanted = [LAYOUTS[name] for name in named]
    given = _read(inputs) if inputs is not None else None
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(Elsewhere(reference, cores(), layout))
            for reference, layout in zip(references, wanted, strict=True)
        ]
        names = [str(reference) for reference in references]
        for number, host in enumerate(hosts):
            if names.count(names[number]) > 1:
                host.name = f"{names[number]} {number + 1}"
        # Importing a framework takes seconds: all at once.
        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(Elsewhere.make, hosts))
        for host, layout in zip(hosts, wanted, strict=True):
            if "layout" in host.lacks and layout is None:
                host.layout = hosts[0].layout
        if given is None:
            giving = next((host for host in hosts if host.inputs is not None), None)
            if giving is None or giving.inputs is None:
                raise ModelError(
                    f"{names[0]} returns a model and no inputs; return (model, inputs), or give --inputs FILE"
                )
            given = in_layout(giving.inputs, giving.layout, hosts[0].layout)
        yield list(hosts), given


def choices_of_layouts(layouts: str, count: int) -> list[str]:
    """One for each model. Raises `InputError`."""
    named = [part.strip() for part in layouts.split(",")]
    if len(named) != count or any(name not in LAYOUTS for name in named):
        raise InputError(f"--layouts {layouts}: expected {count} of {', '.join(LAYOUTS)}, separated by commas")
    return named


def _read(path: Path) -> Inputs:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as .npy or .npz: {reason(error)}") from None
    return as_inputs({name: found[name] for name in found.files} if hasattr(found, "files") else found)


def _table(match: Sequence[str] | None) -> dict[str, str]:
    table = {}
    for entry in match or ():
        first, equals, second = entry.partition("=")
        if not (first and equals and second):
            raise InputError(f"--match {entry}: expected NAME=NAME, of the first model and of the other")
        table[first] = second
    return table
