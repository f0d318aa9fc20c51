"""What a process of its own does with a user's model, and what it is asked."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.backends.messages import Clock
from common.errors import ModelError
from common.foreign.files import Reference, made
from common.foreign.protocol import Forced, Inputs, Layout, Trace
from common.parity import record
from common.parity.hosts import Ask, Here


class Workshop:
    """One model, at work in one dtype at a time."""

    def __init__(self) -> None:
        self.host: Here | None = None
        self.work = ExitStack()

    @property
    def model(self) -> Here:
        if self.host is None:
            raise ModelError("no model was made yet")
        return self.host


def start(threads: int) -> Workshop:
    """For a process that holds whatever the user's function imports."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    return Workshop()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model once it is made."""

    title: str
    backend: str
    layout: Layout
    lacks: frozenset[str]
    inputs: Inputs | None


@dataclass(frozen=True, kw_only=True)
class Make:
    """Call the user's function. Raises as `common.foreign.files.made`."""

    reference: Reference
    layout: Layout | None

    def perform(self, workshop: Any, clock: Clock) -> Facts:
        with clock.step("make"):
            model, inputs = made(self.reference)
            host = Here(model, layout=self.layout)
        workshop.host = host
        return Facts(title=host.title, backend=host.backend, layout=host.layout, lacks=host.lacks, inputs=inputs)


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Have the model at work in a dtype."""

    dtype: str

    def perform(self, workshop: Any, clock: Clock) -> None:
        with clock.step("build"):
            workshop.work.enter_context(workshop.model.at_work(self.dtype))


@dataclass(frozen=True, kw_only=True)
class End:
    """Put it away again."""

    def perform(self, workshop: Any, clock: Clock) -> None:
        workshop.work.close()


@dataclass(frozen=True, kw_only=True)
class MakeRecord:
    """Run it, and write its record to `output`."""

    ask: Ask
    output: Path

    def perform(self, workshop: Any, clock: Clock) -> None:
        with clock.step("record"):
            found = workshop.model.record(self.ask)
        with clock.step("write"):
            record.write(self.output, found, found.manifest)


@dataclass(frozen=True, kw_only=True)
class Force:
    """One pass with other arrays than its own."""

    ask: Ask
    training: bool
    forced: Mapping[str, Forced]

    def perform(self, workshop: Any, clock: Clock) -> Trace:
        with clock.step("localise"):
            found: Trace = workshop.model.forced(self.ask, self.training, self.forced)
        return found
