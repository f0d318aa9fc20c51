"""What a command says: results on standard output, everything else on standard error. And how one is stopped."""

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from common.errors import InputError

DIFFERENT, WRONG = 1, 2  # exit codes


def examples(*commands: str) -> str:
    """What the help of a command shows below its options, a line each."""
    return "\n\n".join(("Examples:" if len(commands) > 1 else "Example:", *commands))


def out() -> Console:
    """The console of results."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 132)


def err() -> Console:
    """The console of everything else."""
    return Console(stderr=True)


@contextmanager
def native_silence() -> Iterator[None]:
    """While a framework works in this process, what its C++ writes to the terminal is not shown; Python's own is."""
    python = (sys.stdout, sys.stderr)
    with tempfile.TemporaryFile() as nowhere, ExitStack() as stack:
        own = []
        for number, stream in enumerate(python, 1):
            stream.flush()
            kept = open(os.dup(number), "w", encoding=stream.encoding, errors="replace")  # noqa: SIM115
            own.append(stack.enter_context(kept))
            os.dup2(nowhere.fileno(), number)
        sys.stdout, sys.stderr = own
        try:
            yield
        finally:
            for number, stream in enumerate(own, 1):
                stream.flush()
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = python


@contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[str, str], None]]:
    """A bar with what each backend is doing; nothing where standard error is no terminal."""
    console = err()
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[doing]}", markup=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    doing: dict[str, str] = {}
    with bar:
        task = bar.add_task(title, total=total, doing="")

        def step(backend: str, what: str) -> None:
            doing[backend] = what
            bar.update(task, advance=1, doing=" | ".join(f"{b} {w}" for b, w in doing.items()))

        yield step


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of how many of how many things are done, once there are some; nothing without a terminal."""
    console = err()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def choices(option: str, text: str, allowed: list[str] | tuple[str, ...] | None) -> list[str]:
    """The parts of a list separated by commas, each one of `allowed` and named once. Raises `InputError`."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if allowed is not None and part not in allowed:
            raise InputError(f"--{option} {text}: {part!r} is unknown; expected some of {', '.join(allowed)}")
        if parts.count(part) > 1:
            raise InputError(f"--{option} {text}: {part!r} is named twice; name each once")
    return parts


def check_writable(path: Path | None) -> None:
    """Refuse a place that cannot be written before the long work, not after it. Raises `InputError`."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: cannot be written: {path.parent} is not a folder; make it first")
    if path is not None and path.is_dir():
        raise InputError(f"{path}: cannot be written: it is a folder; name a file")


def say(message: str) -> None:
    """One line on standard error."""
    err().print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def stoppable() -> Iterator[list[int]]:
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
