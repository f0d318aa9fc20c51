"""How a defect is planted in a backend's process, for one record, and taken out again."""

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np

from common.backends.messages import Done

Plant = Callable[[Any], Any]
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A request performed with a defect at work: `plant` is ``module:function``, called with the backend."""

    request: Any
    plant: str

    def perform(self, backend: Any, clock: Any) -> Any:
        module, function = self.plant.split(":")
        with getattr(import_module(module), function)(backend):
            return self.request.perform(backend, clock)


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


@dataclass(frozen=True)
class Crash:
    """A process that ends in the middle of its work, as a fault in native code would end it."""

    def perform(self, backend: Any, clock: Any) -> None:
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(7)


@dataclass(frozen=True)
class Fail:
    def perform(self, backend: Any, clock: Any) -> None:
        raise ZeroDivisionError("something that nobody foresaw\nwith a second line")


@dataclass(frozen=True)
class Chatter:
    """Writes what looks like an answer, from Python and from below it, before it fails."""

    def perform(self, backend: Any, clock: Any) -> None:
        answer = pickle.dumps(Done(answer=None, seconds={}, peak_bytes=0))
        print(answer.decode("latin-1"), flush=True)
        os.write(1, answer)
        Fail().perform(backend, clock)
