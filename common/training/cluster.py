"""Which processes train together, where no cluster manager says so: three environment variables, for JAX's engines."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import TrainingError

# host:port of process 0, how many there are, and which one this is, counted from 0.
SETTINGS = ("RESNET_PARITY_COORDINATOR", "RESNET_PARITY_PROCESSES", "RESNET_PARITY_PROCESS")


def given() -> dict[str, str]:
    """Those that are set."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def complete() -> list[str | None]:
    """All three in order, or three times None where none is set. Raises `TrainingError` where some are missing."""
    found = given()
    if found and len(found) < len(SETTINGS):
        missing = ", ".join(name for name in SETTINGS if name not in found)
        raise TrainingError(f"{missing} not set; set all of {', '.join(SETTINGS)}, or none where JAX knows the cluster")
    return [found.get(name) for name in SETTINGS]


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Around joining the others: where that takes longer, one line is said and the process ends with 2.

    Nothing can be raised: JAX waits in C++, and aborts the process with a stack trace when its own time is over.
    """

    def give_up() -> None:
        where = given().get(SETTINGS[0], "their coordinator")
        print(
            f"resnet-parity: the other processes did not join within {seconds:.0f} s; are all of them running, and is "
            f"{where} reachable from each?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
