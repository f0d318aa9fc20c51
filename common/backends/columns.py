"""The columns of a comparison: which there are, what each needs, and how its framework is started."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from common.backends.protocol import Backend
from common.errors import BackendError, BackendMissing


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a comparison: a framework, and for Keras the engine below it."""

    backend: str  # module whose start(threads) returns the Backend
    requires: tuple[str, ...]  # modules that must be installed
    extra: str  # of the distribution, that installs them
    environment: Mapping[str, str] = field(default_factory=dict)
    # False where the framework itself computes parts of a float64 network in float32 (docs/checks.md: Keras 3 caps
    # backend.result_type at 32 bits on its jax and torch backends). Such a column is held to level L2.
    float64: bool = True


COLUMNS: dict[str, Column] = {
    "torch": Column(backend="resnet_torch.backend", requires=("torch",), extra="torch"),
    "keras:tensorflow": Column(
        backend="resnet_keras.backend",
        requires=("keras", "tensorflow"),
        extra="keras",
        environment={"KERAS_BACKEND": "tensorflow"},
    ),
    "keras:jax": Column(
        backend="resnet_keras.backend",
        requires=("keras", "jax"),
        extra="keras,flax",
        environment={"KERAS_BACKEND": "jax"},
        float64=False,
    ),
    "keras:torch": Column(
        backend="resnet_keras.backend",
        requires=("keras", "torch"),
        extra="keras,torch",
        environment={"KERAS_BACKEND": "torch"},
        float64=False,
    ),
    "flax": Column(backend="resnet_flax.backend", requires=("jax", "flax", "optax"), extra="flax"),
}
ALIASES = {"keras": "keras:tensorflow"}
# Whose framework is not known before its function is called: a process for a user's own model.
USER = "model"
PROCESSES = COLUMNS | {USER: Column(backend="common.parity.workshop", requires=(), extra="")}


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
    os.environ.update(environment(column, threads) | {"TF_ENABLE_ONEDNN_OPTS": "1"})
    backend: Backend = import_module(column.backend).start(threads)
    return backend


def environment(column: Column, threads: int) -> dict[str, str]:
    """Settings that a framework reads when it is imported, so that they must be there before."""
    settings = os.environ | dict(column.environment)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        settings[name] = str(threads)
    settings |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "PYTHONUNBUFFERED": "1"}
    # What the asking process found, requests among them, is found where it found it.
    root = str(Path(__file__).resolve().parents[2])
    settings["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    return settings


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
