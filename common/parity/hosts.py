"""A user's model where it runs: in this very process, or in one of its own, so that frameworks do not meet."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import ModelError, RecordError
from common.foreign.adapters import adapter
from common.foreign.protocol import Forced, Inputs, Layout, Loss, Runner, Trace
from common.parity.names import Mode
from common.parity.orders import orders
from common.parity.own import ModelPasses, ModelSteps, images_in, named, silent
from common.parity.record import Manifest, Record
from common.parity.recording import record_subjects
from common.parity.subjects import passes
from common.weights import LazyWeights, digest


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a model is run on, and what is to be recorded of it."""

    inputs: Inputs
    dtype: str
    modes: tuple[Mode, ...]
    draws: int = 0  # of the one-ulp response; 0 for none
    orders: int = 0  # of the batch, at most
    loss: Loss | None = None  # of mode grad; None for the usual one
    train: Callable[[Any], Callable[..., Any]] | None = None  # of mode steps
    batches: tuple[Inputs, ...] = field(default=())


class Host(Protocol):
    """A user's model, wherever it runs."""

    name: str  # what it is called in tables
    title: str  # the name of its class
    backend: str
    layout: Layout
    lacks: frozenset[str]

    def at_work(self, dtype: str) -> AbstractContextManager[None]:
        """The model in that dtype, while the block lasts. Raises `ModelError`."""
        ...

    def record(self, ask: Ask) -> Record:
        """Run it and keep what it computes. Raises `ModelError`."""
        ...

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        """One pass in which layers are given other arrays than their own. Raises `ModelError`."""
        ...


class Here:
    """A model in this process, which may hold other frameworks too."""

    def __init__(self, model: Any, *, layout: Layout | None = None, name: str | None = None) -> None:
        """Raises `ModelError` for what is no model."""
        self._adapter = adapter(model)
        self.title = self._adapter.title
        self.backend = self._adapter.backend
        self.lacks = self._adapter.lacks
        self.layout = layout or self._adapter.layout
        self.name = name or f"{self.backend} ({self.title})"
        self._runner: Runner | None = None

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[None]:
        with self._adapter.at_work(dtype) as runner:
            self._runner = runner
            try:
                yield
            finally:
                self._runner = None

    @property
    def runner(self) -> Runner:
        """What is at work. Raises `ModelError` where nothing is."""
        if self._runner is None:
            raise ModelError(f"{self.title} is not at work")
        return self._runner

    def record(self, ask: Ask) -> Record:
        runner = self.runner
        clock = silent()
        subjects: list[ModelPasses | ModelSteps] = []
        watched: ModelPasses | None = None
        if passes(ask.modes):
            watched = ModelPasses(runner, ask.inputs, ask.modes, ask.loss, clock, self.title)
            subjects.append(watched)
        if ask.train is not None and ask.batches:
            subjects.append(ModelSteps(runner, ask.batches, ask.train, clock, self.title))
        given = named(ask.inputs)
        other_orders = orders(images_in(ask.inputs))[: ask.orders]
        recorded = record_subjects(subjects, other_orders, ask.draws, clock)
        values = watched.values if watched is not None else runner.values()
        described = self._adapter.describe()
        device = described.pop("device")
        manifest = Manifest(
            backend=self.backend,
            variant=self.title,
            subject={"model": self.title},
            dtype=ask.dtype,  # type: ignore[arg-type]
            modes=ask.modes,
            versions=described,
            device=device,
            threads=int(described.get("threads", "1")),
            seed=0,
            inputs=_digest(given),
            weights=_digest(values),
            source="inputs of the user's own",
            shape=next(iter(given.values())).shape or (1,),
            arrays=tuple(array for subject in subjects for array in subject.arrays),
            recipe={"steps": len(ask.batches)} if ask.batches else {},
            draws=ask.draws,
            response={str(name): change for name, change in recorded.response.items()},
            orders=len(other_orders),
            order_response={str(name): change for name, change in recorded.order_response.items()},
            layout=self.layout,
            trained=tuple(name for name, trained in runner.trained.items() if trained),
            calls=watched.calls if watched is not None else (),
        )
        arrays = dict(recorded.arrays) | (dict(watched.extra()) if watched is not None else {})
        # Each by itself: who keeps some of them is not to keep all.
        return Record(Path(self.name), manifest, {name: partial(_itself, array) for name, array in arrays.items()})

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        return self.runner.run(
            ask.inputs, training=training, gradients="grad" in ask.modes, loss=ask.loss, forced=forced
        )


class Recorded:
    """A model that is there as a record of it alone: see `Host`. It cannot be run on anything else."""

    def __init__(self, found: Record, name: str) -> None:
        """Raises `RecordError` for a record of a network of ours, which holds no calls of layers."""
        manifest = found.manifest
        if not manifest.layout:
            raise RecordError(
                f"{found.path} is a record of a network of ours, by `record BACKEND VARIANT`; this takes one of a "
                "user's model, by `record FILE.py:FUNCTION`"
            )
        self.name, self.title, self.backend = name, manifest.variant, manifest.backend
        self.layout: Layout = manifest.layout
        self.modes = manifest.modes
        self.found = found
        needs = (("train", "training"), ("grad", "gradients"))
        self.lacks = frozenset({"layers", *(what for mode, what in needs if mode not in manifest.modes)})

    @property
    def inputs(self) -> Inputs:
        """What the model was called with."""
        given = {name.place: self.found[name] for name in self.found if name.kind == "given"}
        return list(given.values()) if all(name.isdecimal() for name in given) else given

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[None]:
        if dtype != self.found.manifest.dtype:
            raise ModelError(f"{self.name} is a record in {self.found.manifest.dtype}, not in {dtype}")
        yield

    def record(self, ask: Ask) -> Record:
        return Record(
            Path(self.name), self.found.manifest, {name: partial(self.found.__getitem__, name) for name in self.found}
        )

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        raise ModelError(f"{self.name} is a record, and cannot be run")


def _itself(array: np.ndarray) -> np.ndarray:
    return array


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """As float64, which is made of one array after another."""
    return digest(LazyWeights({name: partial(_double, array) for name, array in arrays.items()}))


def _double(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64, copy=False) if array.dtype.kind in "fV" else array


def in_layout(inputs: Inputs, given: str, wanted: str) -> Inputs:
    """Inputs whose images, floating-point arrays of four axes or more, have their channels where a model wants them."""
    if given == wanted:
        return inputs
    ends = (1, -1) if wanted == "channels_last" else (-1, 1)

    def moved(array: np.ndarray) -> np.ndarray:
        if array.ndim < 4 or array.dtype.kind != "f":
            return array
        return np.ascontiguousarray(np.moveaxis(array, *ends))

    if isinstance(inputs, Mapping):
        return {name: moved(array) for name, array in inputs.items()}
    return [moved(array) for array in inputs]


def cast(inputs: Inputs, dtype: str) -> Inputs:
    """Floating-point inputs in a dtype, others as they are."""

    def of_dtype(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype) if array.dtype.kind == "f" else array

    if isinstance(inputs, Mapping):
        return {name: of_dtype(array) for name, array in inputs.items()}
    return [of_dtype(array) for array in inputs]
