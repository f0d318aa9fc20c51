"""How a defect is planted in a backend's process, for one record, and taken out again."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

Plant = Callable[[Any], Any]
Weights = Mapping[str, np.ndarray]


def after_build(change: Callable[[Any], None]) -> Plant:
    """The defect `change(model)`, made in every model that is built."""

    @contextmanager
    def plant(backend: Any) -> Iterator[None]:
        build = backend.build

        def built(spec: Any, dtype: str) -> Any:
            model = build(spec, dtype)
            change(model)
            return model

        with patch.object(backend, "build", built):
            yield

    return plant


def in_loading(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Plant:
    """A mapping that puts wrong weights into the model, and takes the right ones out again: no round trip shows it."""

    @contextmanager
    def plant(backend: Any) -> Iterator[None]:
        load = backend.load
        given: dict[str, np.ndarray] = {}

        def loaded(model: Any, weights: Weights) -> None:
            given.clear()
            given.update(weights)
            load(model, change(dict(given)))

        with patch.object(backend, "load", loaded), patch.object(backend, "export", lambda model: given):
            yield

    return plant


def not_loaded(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Plant:
    """Weights that are changed on their way into the model, and come out as they are there."""

    @contextmanager
    def plant(backend: Any) -> Iterator[None]:
        load = backend.load
        with patch.object(backend, "load", lambda model, weights: load(model, change(dict(weights)))):
            yield

    return plant


def replaced(target: Any, name: str, replacement: Any) -> Plant:
    """The attribute `name` of `target` replaced while the backend works."""

    @contextmanager
    def plant(backend: Any) -> Iterator[None]:
        with patch.object(target, name, replacement):
            yield

    return plant


def both(*plants: Plant) -> Plant:
    """Several changes at once."""

    @contextmanager
    def plant(backend: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for one in plants:
                stack.enter_context(one(backend))
            yield

    return plant


def crash(backend: Any) -> Any:
    """A process that ends in the middle of its work, as a fault in native code would end it."""
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(7)


def fail(backend: Any) -> Any:
    raise ZeroDivisionError("something that nobody foresaw\nwith a second line")


def chatter(backend: Any) -> Any:
    """Writes what looks like a reply, from Python and from below it, before it fails."""
    reply = '{"event": "done", "seconds": {}, "peak_bytes": 0}\n'
    print(reply, flush=True)
    os.write(1, reply.encode())
    return fail(backend)
