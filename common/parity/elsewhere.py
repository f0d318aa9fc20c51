"""A user's model in a process of its own: the host for models that are named on the command line."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from common.backends.columns import USER
from common.backends.process import BackendProcess
from common.foreign.files import Reference
from common.foreign.protocol import Forced, Inputs, Layout, Trace
from common.parity.hosts import Ask
from common.parity.record import Record
from common.parity.workshop import Begin, End, Force, Make, MakeRecord


class Elsewhere:
    """See `common.parity.hosts.Host`; a context manager. The function is called by `make`."""

    def __init__(
        self,
        reference: Reference,
        threads: int,
        layout: Layout | None = None,
        progress: Callable[[str, str], None] = lambda name, step: None,
    ) -> None:
        self.name = str(reference)
        self.title = self.name
        self.backend = ""
        self.layout: Layout = layout or "channels_last"
        self.lacks: frozenset[str] = frozenset()
        self.inputs: Inputs | None = None
        self._reference, self._asked, self._progress = reference, layout, progress
        self._folder = tempfile.TemporaryDirectory(prefix="resnet-parity-")
        self._process = BackendProcess(USER, threads, called=self.name)
        self._records = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.close()
        self._folder.cleanup()

    def make(self) -> None:
        """Call the user's function. Raises `ModelError`, or `BackendCrashed` if the process ends."""
        facts = self._process.ask(Make(reference=self._reference, layout=self._asked), self._tell)
        self.title, self.backend, self.lacks, self.inputs = facts.title, facts.backend, facts.lacks, facts.inputs
        self.layout = facts.layout

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[None]:
        self._process.ask(Begin(dtype=dtype), self._tell)
        try:
            yield
        finally:
            if self._process.alive:
                self._process.ask(End(), self._tell)

    def record(self, ask: Ask) -> Record:
        self._records += 1
        output = Path(self._folder.name) / f"{self._records}.safetensors"
        self._process.ask(MakeRecord(ask=ask, output=output), self._tell)
        return Record.read(output, self.name)

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        return self._process.ask(Force(ask=ask, training=training, forced=forced), self._tell)

    def _tell(self, step: str) -> None:
        self._progress(self.name, step)
