"""Which processes train together, how they are joined, and what becomes of one whose others are gone.

The engines that are joined by an address (JAX, below Flax and Keras) ask a cluster manager that they know, or three
environment variables. Whatever is the framework's own is handed in.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from common.errors import ParityError, TrainingError
from common.files import reason
from common.training.trainer import Replica

# host:port of process 0, how many there are, and which one this is, counted from 0.
SETTINGS = ("RESNET_PARITY_COORDINATOR", "RESNET_PARITY_PROCESSES", "RESNET_PARITY_PROCESS")

# In the words of a collective that fails. One that fails while it is dispatched raises a bare ValueError.
_OF_OTHERS = ("Gloo", "gloo", "NCCL", "coordination", "DEADLINE_EXCEEDED")


def given() -> dict[str, str]:
    """Those of the variables that are set."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def join(initialize: Callable[..., None], timeout: int) -> None:
    """Join the others by JAX's `initialize`: those that the variables name, or the cluster that it knows.

    After `timeout` seconds without a sign of life a process counts as lost. Raises `TrainingError` where there are none
    to join; ends the process where they do not come.
    """
    address, *numbers = _complete()
    try:
        count, rank = (None if number is None else int(number) for number in numbers)
        with _waiting(2 * timeout):
            initialize(
                address,
                count,
                rank,
                initialization_timeout=4 * timeout,
                heartbeat_timeout_seconds=timeout,
                shutdown_timeout_seconds=4 * timeout,
            )
    except (RuntimeError, ValueError, TypeError) as error:  # the last of a JAX too old to know them all
        hint = f"are all processes running, and {address} reachable" if address else f"set {', '.join(SETTINGS)}"
        raise TrainingError(f"the other processes cannot be joined: {reason(error)}; {hint}?") from None


def _complete() -> list[str | None]:
    """All three in order, or three times None where none is set. Raises `TrainingError` where some are missing."""
    found = given()
    if found and len(found) < len(SETTINGS):
        missing = ", ".join(name for name in SETTINGS if name not in found)
        raise TrainingError(f"{missing} not set; set all of {', '.join(SETTINGS)}, or none where JAX knows the cluster")
    return [found.get(name) for name in SETTINGS]


@contextmanager
def _waiting(seconds: float) -> Iterator[None]:
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


@contextmanager
def together(replica: Replica, timeout: int) -> Iterator[None]:
    """Raises `TrainingError` where another process ends or does not answer. Any error within ends the others too."""
    try:
        yield
    except BaseException as error:
        if replica.count == 1:
            raise
        atexit.register(_leave)
        known = isinstance(error, RuntimeError | ValueError) and not isinstance(error, ParityError)
        if known and any(name in str(error) for name in _OF_OTHERS):
            raise lost(replica, timeout) from None
        raise


def lost(replica: Replica, timeout: int) -> TrainingError:
    """The error of a process whose others are gone."""
    return TrainingError(
        f"process {replica.rank} of {replica.count}: another process ended or did not answer within {timeout} s; its "
        "own output says why; start all of them again with --resume"
    )


def _leave() -> None:
    """End this process without JAX's own ending, which waits for the others, who wait for this one in a step."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(2)
