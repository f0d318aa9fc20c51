"""Processes that prepare batches, each every so-many-th of them: `python -m common.training.loaders`.

They know nothing but a pipe: they end when its other end is gone, which in turn knows at once when they are. They
import no framework, and share no lock and no memory that a killed one could leave behind.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np

from common import errors
from common.errors import ParityError, TrainingError
from common.files import reason

_PIPE_BYTES = 1 << 20  # the most that Linux gives without asking


class Team:
    """Processes that prepare the batches `make(number)` for `numbers`, to be asked for one after the other.

    `make` is pickled.
    """

    def __init__(self, make: Callable[[int], Any], numbers: range, count: int) -> None:
        """Start `count` of them. Raises `TrainingError`."""
        self._first = numbers.start
        self._processes: list[subprocess.Popen[bytes]] = []
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            for _ in range(count):
                process = subprocess.Popen(
                    [sys.executable, "-m", "common.training.loaders"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pipesize=_PIPE_BYTES,
                    env=os.environ | {"PYTHONPATH": path},
                    # A signal to all processes of this group, as a launcher's SIGTERM, is for this one to answer: it
                    # may want more batches until it has written its checkpoint.
                    start_new_session=True,
                )
                self._processes.append(process)
            for first, process in enumerate(self._processes):
                assert process.stdin is not None
                # One that has ended already shows when it is asked for a batch.
                with suppress(BrokenPipeError), process.stdin as request:
                    pickle.dump((make, numbers[first::count]), request)
        except OSError as error:
            self.close()
            raise TrainingError(f"no process could be started to prepare images: {reason(error)}") from None

    def __call__(self, number: int) -> Any:
        """Batch `number`; the one before it must have been asked for last.

        Raises the `ParityError` that was raised in a process, and `TrainingError` for one that ended.
        """
        process = self._processes[(number - self._first) % len(self._processes)]
        assert isinstance(process.stdout, BufferedReader)
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise _ended(process)
        header = json.loads(line)
        if "error" in header:
            raise getattr(errors, header["error"], TrainingError)(header["message"])
        made = tuple(np.empty(shape, dtype) for shape, dtype in header["arrays"])
        for array in made:
            if array.nbytes and process.stdout.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise _ended(process)
        return made

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()


def _ended(process: subprocess.Popen[bytes]) -> TrainingError:
    code = process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return TrainingError(f"a process that prepares images {how}; where memory was short, use fewer workers")


def main() -> None:
    """Send the batches that are asked for at the start, until nobody reads them."""
    # What a library prints must not come between the batches.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    make, numbers = pickle.load(sys.stdin.buffer)
    with suppress(BrokenPipeError):
        try:
            for number in numbers:
                arrays = make(number)
                header = {"arrays": [(array.shape, array.dtype.str) for array in arrays]}
                _send(replies, json.dumps(header).encode() + b"\n")
                for array in arrays:
                    _send(replies, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except BrokenPipeError:
            raise
        except Exception as error:
            if not isinstance(error, ParityError):
                traceback.print_exc()
            message = reason(error) if isinstance(error, ParityError) else f"{type(error).__name__}: {reason(error)}"
            _send(replies, json.dumps({"error": type(error).__name__, "message": message}).encode() + b"\n")


def _send(stream: IO[bytes], content: bytes | memoryview) -> None:
    """All of it: the system may take less at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


if __name__ == "__main__":
    main()
