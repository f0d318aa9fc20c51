"""What is said between the process that asks and a backend's: requests, steps on the way, answers, errors.

They are pickled over pipes that only the two have. Both are ours, started from one interpreter, and trust each other.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from common.backends.protocol import Backend

Answer = TypeVar("Answer", covariant=True)


@dataclass(frozen=True)
class Step:
    """The process begins something."""

    what: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """The process has done what it was asked."""

    answer: Any
    seconds: dict[str, float]  # by what the time went into
    peak_bytes: int  # of the whole process, so far


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An exception was raised in the process: the name of its class and what it says, in one line."""

    kind: str
    message: str


class Clock:
    """Adds up the seconds spent on each thing, and tells the asking process what is being done."""

    def __init__(self, say: Callable[[Step], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    def tell(self, what: str) -> None:
        self._say(Step(what))

    @contextmanager
    def step(self, what: str, detail: str = "") -> Iterator[None]:
        self.tell(f"{what} {detail}".strip())
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


class Request(Protocol[Answer]):
    """What a backend's process is asked to do: a dataclass that can be pickled."""

    def perform(self, backend: Backend, clock: Clock) -> Answer:
        """Do it, inside the process, and return what it comes to."""
        ...
