"""What a backend's process tells the asking one while it works, and how long each thing took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Adds up the seconds spent on each thing, and tells the asking process what is being done."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    def tell(self, what: str) -> None:
        self._say({"event": "step", "step": what})

    @contextmanager
    def step(self, what: str, detail: str = "") -> Iterator[None]:
        self.tell(f"{what} {detail}".strip())
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started
