"""Makes a record of subjects, inside a backend's process: as they are, in other orders of the batch, moved by ulps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common import architectures
from common import weights as canonical
from common.backends.messages import Clock
from common.backends.protocol import Backend
from common.parity import record
from common.parity.names import ArrayName, Mode
from common.parity.orders import orders
from common.parity.record import Manifest
from common.parity.subjects import Keep, SpecPasses, SpecSteps, Subject, passes
from common.training.recipe import TrainingRecipe


@dataclass(frozen=True, kw_only=True)
class RecordNetwork:
    """Run the network that `subject` describes, in every mode asked for, and write its record to `output`.

    `facts` are what the case says of it to the manifest. Weights, images and batches are safetensors files.
    """

    facts: Mapping[str, Any]
    subject: Mapping[str, Any]  # a specification as data
    dtype: str
    modes: tuple[Mode, ...]
    recipe: TrainingRecipe | None  # of mode steps
    weights: Path
    inputs: Path
    batches: Path | None  # of mode steps
    backend: str  # the column's name
    threads: int
    output: Path
    draws: int  # of the one-ulp response; 0 for none
    orders: int  # of the batch, at most; 0 for none

    def perform(self, backend: Backend, clock: Clock) -> None:
        spec = architectures.from_dict(dict(self.subject))
        # A tensor at a time: held whole, the weights of a large network are a gigabyte that nothing needs.
        weights = canonical.mapped(self.weights)
        images, labels = _batch(self.inputs, self.dtype)
        subjects: list[Subject] = []
        if passes(self.modes):
            subjects.append(SpecPasses(backend, spec, weights, images, labels, self.modes, self.facts["seed"], clock))
        if self.recipe is not None and self.batches is not None:
            batches = _batch(self.batches, self.dtype)
            subjects.append(SpecSteps(backend, spec, weights, *batches, self.recipe, clock))
        other_orders = orders(len(images))[: self.orders]
        recorded = record_subjects(subjects, other_orders, self.draws, clock)
        described = backend.describe()
        device = described.pop("device")
        manifest = Manifest(
            **self.facts,
            subject=dict(self.subject),
            dtype=self.dtype,  # type: ignore[arg-type]
            modes=self.modes,
            shape=images.shape,
            backend=self.backend,
            threads=self.threads,
            versions=described,
            device=device,
            arrays=tuple(array for subject in subjects for array in subject.arrays),
            draws=self.draws,
            response=_by_text(recorded.response),
            orders=len(other_orders),
            order_response=_by_text(recorded.order_response),
            not_restored=recorded.not_restored,
        )
        with clock.step("write"):
            record.write(self.output, recorded.arrays, manifest)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What was computed, and the largest change of every array by an ulp and by another order."""

    arrays: Mapping[ArrayName, np.ndarray]
    response: Mapping[ArrayName, float]
    order_response: Mapping[ArrayName, float]
    not_restored: tuple[str, ...]


def record_subjects(
    subjects: Sequence[Subject], other_orders: Sequence[np.ndarray], draws: int, clock: Clock
) -> Recorded:
    """Run every subject as it is, once in each of the orders, and once for each draw."""
    wanted = {ArrayName.parse(array.name) for subject in subjects for array in subject.arrays}
    arrays: dict[ArrayName, np.ndarray] = {}
    response: dict[ArrayName, float] = {}
    order_response: dict[ArrayName, float] = {}

    def keep(name: ArrayName, array: np.ndarray) -> None:
        if name in wanted:
            arrays[name] = array

    def largest(changes: dict[ArrayName, float]) -> Keep:
        def measure(name: ArrayName, array: np.ndarray) -> None:
            if name in arrays:
                change = record.distance(array, arrays[name])
                # A change that is no number stays one: `max` would drop it.
                changes[name] = float(np.maximum(changes.get(name, 0.0), change))

        return measure

    not_restored = dict.fromkeys(name for subject in subjects for name in subject.not_restored())
    for subject in subjects:
        subject.run(keep)
    for number, order in enumerate(other_orders, 1):
        with clock.step("order", f"{number} of {len(other_orders)}"):
            for subject in subjects:
                subject.run(largest(order_response), order=order)
    for draw in range(draws):
        with clock.step("response", f"{draw + 1} of {draws}"):
            for subject in subjects:
                subject.run(largest(response), draw=draw)
    return Recorded(arrays=arrays, response=response, order_response=order_response, not_restored=tuple(not_restored))


def _batch(path: Path, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    batch = load_file(path)
    return batch["images"].astype(dtype), batch["labels"]


def _by_text(changes: Mapping[ArrayName, float]) -> dict[str, float]:
    return {str(name): change for name, change in changes.items()}
