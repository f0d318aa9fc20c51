"""Backends: the protocol a framework follows, the columns there are, and one process for each.

A framework is loaded only in a process of its own, and at most one in a process: their threads, global settings and
native libraries disturb each other. The process that asks imports none of them. What runs inside is
common/backends/worker.py.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from common import errors
from common.architectures import Spec
from common.errors import BackendCrashed, BackendError, BackendMissing, ParityError
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Replica, Trainer
from common.weights import Weights


class Backend(Protocol):
    """One framework, ready to run networks. `resnet_X.probe.start(threads)` returns one.

    It lives in a process of its own, sets the framework's global state there, and keeps nothing between models.
    """

    def describe(self) -> dict[str, str]:
        """Versions of everything that decides the numbers, and the device."""
        ...

    def build(self, spec: Spec, dtype: str) -> Any:
        """A native model whose parameters and computation are of `dtype` (float32 or float64)."""
        ...

    def load(self, model: Any, weights: Weights) -> None:
        """Set every parameter and statistic of the model, cast to its dtype; each native tensor exactly once."""
        ...

    def export(self, model: Any) -> Weights:
        """The model's parameters and statistics in canonical names and layouts, bitwise."""
        ...

    def save(self, spec: Spec, weights: Weights, path: Path) -> None:
        """Write a checkpoint in a format that only the framework itself can write, told by the end of `path`."""
        ...

    def trainer(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> Trainer:
        """A network to be trained by `recipe` in `dtype`; see `common.training.trainer.Trainer`.

        float64 is for proofs: no mixed precision then. Where there are several replicas, the process has joined the
        others before `start` (`resnet_X.distributed.join()`).
        """
        ...

    def run(
        self, model: Any, images: np.ndarray, labels: np.ndarray, *, training: bool, gradients: bool
    ) -> dict[str, np.ndarray]:
        """One pass over images (N, H, W, C) and labels (N,).

        Returns, in canonical layout and in the dtype it was computed in:

        - ``tap/<path>`` for every layer of the walk: its output, (N, H, W, C) or (N, features);
        - ``loss``: mean softmax cross-entropy for logits, mean negative log-likelihood for a softmax head, half the
          mean square of the output for no head;
        - with `training`: batch statistics are used, and ``stat/<name>`` are the running statistics after the pass;
        - with `gradients`: ``grad/<name>`` of the loss for every parameter, and ``grad/input``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a comparison: a framework, and for Keras the engine below it."""

    probe: str  # module whose start(threads) returns the Backend
    requires: tuple[str, ...]  # modules that must be installed
    extra: str  # of the distribution, that installs them
    environment: Mapping[str, str] = field(default_factory=dict)
    # False where the framework itself computes parts of a float64 network in float32 (NUMERICS: Keras 3 caps
    # backend.result_type at 32 bits on its jax and torch backends). Such a column is held to level L2.
    float64: bool = True


COLUMNS: dict[str, Column] = {
    "torch": Column(probe="resnet_torch.backend", requires=("torch",), extra="torch"),
    "keras:tensorflow": Column(
        probe="resnet_keras.backend",
        requires=("keras", "tensorflow"),
        extra="keras",
        environment={"KERAS_BACKEND": "tensorflow"},
    ),
    "keras:jax": Column(
        probe="resnet_keras.backend",
        requires=("keras", "jax"),
        extra="keras,flax",
        environment={"KERAS_BACKEND": "jax"},
        float64=False,
    ),
    "keras:torch": Column(
        probe="resnet_keras.backend",
        requires=("keras", "torch"),
        extra="keras,torch",
        environment={"KERAS_BACKEND": "torch"},
        float64=False,
    ),
    "flax": Column(probe="resnet_flax.backend", requires=("jax", "flax", "optax"), extra="flax"),
}
ALIASES = {"keras": "keras:tensorflow"}


def resolve(name: str) -> str:
    """The column's full name. Raises `BackendError` for an unknown one, `BackendMissing` for one not installed."""
    full = ALIASES.get(name, name)
    if full not in COLUMNS:
        near = get_close_matches(name, [*COLUMNS, *ALIASES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COLUMNS)}"
        raise BackendError(f"unknown backend {name!r}; {hint}")
    column = COLUMNS[full]
    missing = [module for module in column.requires if find_spec(module) is None]
    if missing:
        what = " and ".join(missing)
        raise BackendMissing(f"backend {full}: {what} not installed; run: pip install 'resnet-parity[{column.extra}]'")
    return full


def start_here(name: str, threads: int) -> Backend:
    """The backend in this very process, which must hold no other framework; for a training, which is a process's whole
    work. Raises as `resolve`, and `BackendError`."""
    column = COLUMNS[resolve(name)]
    # For a check TensorFlow's own kernels are used; a training may use the quicker ones, which are deterministic too.
    os.environ.update(_environment(column, threads) | {"TF_ENABLE_ONEDNN_OPTS": "1"})
    backend: Backend = import_module(column.probe).start(threads)
    return backend


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a process says when it has done what it was asked."""

    seconds: dict[str, float]  # by what the time went into
    peak_bytes: int  # of the whole process, so far


class BackendProcess:
    """A process that holds one framework and does one request after another; a context manager.

    `threads` is the number of threads that the framework may use.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        """Start the process; it imports the framework while the caller goes on. Raises as `resolve`."""
        self.name = resolve(name)
        self.threads = threads
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0
        self._step = "starting"
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "common.backends.worker", self.name, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(COLUMNS[self.name], threads),
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

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def ask(
        self, operation: str, arguments: Mapping[str, Any], progress: Callable[[str], None] = lambda step: None
    ) -> Reply:
        """Have the process do `operation` and wait for it; `progress` hears of each step it begins.

        Raises the `ParityError` that was raised in the process, or `BackendCrashed` if the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.perf_counter()
        try:
            self._process.stdin.write(json.dumps({"operation": operation, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._crashed() from None
        for line in self._process.stdout:
            message = json.loads(line)
            if message["event"] == "step":
                self._step = message["step"]
                progress(self._step)
            elif message["event"] == "done":
                reply = Reply(seconds=message["seconds"], peak_bytes=message["peak_bytes"])
                for what, seconds in reply.seconds.items():
                    self.seconds[what] = self.seconds.get(what, 0.0) + seconds
                self.seconds["in all"] = self.seconds.get("in all", 0.0) + time.perf_counter() - started
                self.peak_bytes = max(self.peak_bytes, reply.peak_bytes)
                return reply
            else:
                raise _remote_error(self.name, message)
        raise self._crashed()

    def _crashed(self) -> BackendCrashed:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        last = f"its last output: {lines[-1][:300]}" if lines else "it printed nothing"
        return BackendCrashed(f"backend {self.name}: its process {how} while {self._step}; {last}")


def _remote_error(name: str, message: Mapping[str, str]) -> ParityError:
    cls = getattr(errors, message["kind"], None)
    if cls is not None:
        error: ParityError = cls(message["message"])
        return error
    return BackendError(f"backend {name}: {message['kind']}: {message['message']}")


def _environment(column: Column, threads: int) -> dict[str, str]:
    """Settings that a framework reads when it is imported, so that they must be there before."""
    environment = os.environ | dict(column.environment)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(threads)
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "PYTHONUNBUFFERED": "1"}
    # The packages of this distribution must be found where the asking process found them.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    return environment


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
