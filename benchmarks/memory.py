"""Memory of this process, for the benchmarks."""

import threading
from pathlib import Path


def resident() -> int:
    """Bytes of this process that are in memory and its own, not those of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peak:
    """The largest resident set while a block runs, sampled every millisecond."""

    def __enter__(self) -> "Peak":
        self.bytes, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident())
