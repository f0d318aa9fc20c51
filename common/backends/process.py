"""One process for each backend.

A framework is loaded only in a process of its own, and at most one in a process: their threads, global settings and
native libraries disturb each other. The process that asks imports none of them. What runs inside is
common/backends/worker.py.
"""

import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

from common import errors
from common.backends.columns import PROCESSES, USER, environment, resolve
from common.backends.messages import Done, Failed, Request, Step
from common.errors import BackendCrashed, BackendError, ParityError

Answer = TypeVar("Answer")


class BackendProcess:
    """A process that holds one framework and does one request after another; a context manager.

    `threads` is the number of threads that the framework may use. `USER` for a name is a process for a user's model;
    errors then speak of it as `called`.
    """

    def __init__(self, name: str, threads: int = 1, called: str | None = None) -> None:
        """Start the process; it imports the framework while the caller goes on. Raises as `resolve`."""
        self.name = USER if name == USER else resolve(name)
        self.threads = threads
        self._called = called or f"backend {self.name}"
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self._step = "starting"
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "common.backends.worker", self.name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(PROCESSES[self.name], threads),
            # Ctrl-C goes to this process, which then ends the others in its own order.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def ask(self, request: Request[Answer], progress: Callable[[str], None] = lambda step: None) -> Answer:
        """Have the process perform `request` and wait for its answer; `progress` hears of each step it begins.

        Raises the `ParityError` that was raised in the process, or `BackendCrashed` if the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.perf_counter()
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._crashed() from None
        while True:
            try:
                message = pickle.load(self._process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise self._crashed() from None
            match message:
                case Step():
                    self._step = message.what
                    progress(message.what)
                case Failed():
                    raise _remote_error(self._called, message)
                case Done():
                    for what, seconds in message.seconds.items():
                        self.seconds[what] = self.seconds.get(what, 0.0) + seconds
                    self.seconds["in all"] = self.seconds.get("in all", 0.0) + time.perf_counter() - started
                    self.peak_bytes = max(self.peak_bytes, message.peak_bytes)
                    answer: Answer = message.answer
                    return answer

    def _crashed(self) -> BackendCrashed:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        last = f"its last output: {lines[-1][:300]}" if lines else "it printed nothing"
        return BackendCrashed(f"{self._called}: its process {how} while {self._step}; {last}")


def _remote_error(called: str, failed: Failed) -> ParityError:
    cls = getattr(errors, failed.kind, None)
    if cls is not None:
        error: ParityError = cls(failed.message)
        return error
    return BackendError(f"{called}: {failed.kind}: {failed.message}")
