"""The command line: its groups of commands, and how it ends: 0 the same, 1 different, 2 wrong usage or bad input."""

import os
import sys
from typing import NoReturn

import typer

from common.commands import experiment, models, prove, train, weights
from common.commands.terminal import WRONG, err
from common.errors import ParityError

app = typer.Typer(
    help="One specification, three native implementations, and the proof that they are the same function.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (prove, models, weights, train, experiment):
    app.add_typer(group.app)


def main() -> None:
    """Run the command line, an error of ours as one line."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this, as a daemon's
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        app(prog_name="resnet-parity")
    except ParityError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        err().print("interrupted")
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    err().print(f"resnet-parity: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(WRONG)
