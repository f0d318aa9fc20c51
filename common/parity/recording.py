"""Makes a record, inside a backend's process: the network as the request gives it, in every mode asked for."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common import architectures
from common import weights as canonical
from common.architectures import Spec
from common.architectures.layers import INPUT
from common.backends.messages import Clock
from common.backends.protocol import Backend
from common.parity import record, steps
from common.parity.orders import orders
from common.parity.record import Manifest
from common.training import dropout
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe

Keep = Callable[[str, np.ndarray], None]


@dataclass(frozen=True, kw_only=True)
class MakeRecord:
    """Run a network as the case gives it, in every mode asked for, and write its record to `output`.

    `given` are the fields of `record.Manifest` that do not depend on the backend.
    """

    given: dict[str, Any]
    backend: str  # the column's name
    threads: int
    weights: Path
    inputs: Path
    batches: Path | None  # of mode steps
    output: Path
    draws: int  # of the one-ulp response; 0 for none
    orders: int  # of the batch, at most; 0 for none

    def perform(self, backend: Backend, clock: Clock) -> None:
        _make_record(self, backend, clock)


def _make_record(request: MakeRecord, backend: Backend, clock: Clock) -> None:
    given = request.given
    spec, modes = architectures.from_dict(given["spec"]), tuple(given["modes"])
    recipe = recipes.from_dict(given["recipe"]) if "steps" in modes else None
    arrays: dict[str, np.ndarray] = {}
    response: dict[str, float] = {}
    order_response: dict[str, float] = {}
    other_orders = orders(given["shape"][0])[: request.orders]

    def keep(name: str, array: np.ndarray) -> None:
        if name in wanted:
            arrays[name] = array

    def largest(responses: dict[str, float], order: np.ndarray | None = None) -> Keep:
        """Keeps in `responses` the largest change of every array, of images in another order put back in the first."""

        def measure(name: str, array: np.ndarray) -> None:
            if name in arrays:
                if order is not None and is_of_images(name):
                    array = array[np.argsort(order)]
                change = record.distance(array, arrays[name])
                # A change that is no number stays one: `max` would drop it.
                responses[name] = float(np.maximum(responses.get(name, 0.0), change))

        return measure

    # A tensor at a time: held whole, the weights of a large network are a gigabyte that nothing needs.
    weights = canonical.mapped(request.weights)
    wanted = record.expected_arrays(spec, modes, tuple(given["shape"]), recipe)
    subjects: list[_Network | _Training] = []
    if record.passes(modes):
        subjects.append(_Network(backend, spec, request, clock))
    if recipe is not None:
        subjects.append(_Training(backend, spec, recipe, request, clock))
    not_restored: dict[str, None] = {}
    for subject in subjects:
        with clock.step("load"):
            subject.load(weights)
            not_restored |= _not_restored(spec, weights, subject.export(), given["dtype"])
    for subject in subjects:
        subject.run(keep)
    for index, order in enumerate(other_orders):
        with clock.step("order", f"{index + 1} of {len(other_orders)}"):
            for subject in subjects:
                subject.load(weights)
                subject.run(largest(order_response, order), order=order)
    for draw in range(request.draws):
        with clock.step("response", f"{draw + 1} of {request.draws}"):
            for subject in subjects:
                subject.load(canonical.perturb(weights, seed=draw))
                subject.run(largest(response), draw=draw)
    described = backend.describe()
    device = described.pop("device")
    manifest = Manifest(
        **given,
        backend=request.backend,
        versions=described,
        device=device,
        threads=request.threads,
        draws=request.draws,
        response=response,
        orders=len(other_orders),
        order_response=order_response,
        not_restored=tuple(not_restored),
    )
    with clock.step("write"):
        record.write(request.output, arrays, manifest)


class _Network:
    """The passes of the modes eval, train, grad and exact."""

    def __init__(self, backend: Backend, spec: Spec, request: MakeRecord, clock: Clock) -> None:
        self._backend, self._spec, self._clock = backend, spec, clock
        self._seed = request.given["seed"]
        self._modes, dtype = tuple(request.given["modes"]), request.given["dtype"]
        self._images, self._labels = _batch(request.inputs, dtype)
        with clock.step("build"):
            self._model = backend.build(spec, dtype)

    def load(self, weights: canonical.Weights) -> None:
        self._backend.load(self._model, weights)

    def export(self) -> canonical.Weights:
        return self._backend.export(self._model)

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        """Hand every array to `keep`; with `draw` for images that are moved by an ulp, with `order` for images in
        another order, as the arrays are then."""
        images = self._images if draw is None else canonical.perturb_array(self._images, draw, "input")
        labels, positions = self._labels, np.arange(len(images))
        if order is not None:
            images, labels, positions = images[order], labels[order], positions[order]
        masks = dropout.masks(self._spec, images.shape[1:3], self._seed, positions)
        for run in record.passes(self._modes):
            with self._clock.step(run) if draw is None and order is None else nullcontext():
                arrays = self._backend.run(
                    self._model,
                    images,
                    labels,
                    training=run == "train",
                    gradients="grad" in self._modes and run != "exact",
                    masks=masks if run == "train" else None,
                )
            for name, array in arrays.items():
                keep(f"{run}/{name}", array)


class _Training:
    """The optimiser steps of mode steps."""

    def __init__(self, backend: Backend, spec: Spec, recipe: TrainingRecipe, request: MakeRecord, clock: Clock) -> None:
        self._spec, self._recipe, self._clock = spec, recipe, clock
        self._dtype = request.given["dtype"]
        self._images, self._labels = _batch(request.batches, self._dtype)
        with clock.step("build"):
            self._trainer = backend.trainer(spec, recipe, self._dtype)

    def load(self, weights: canonical.Weights) -> None:
        self._trainer.load(weights)

    def export(self) -> canonical.Weights:
        return self._trainer.export()

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        """As `_Network.run`, with `draw` for rates that are moved too; it tells of every step."""

        def keep_and_tell(name: str, array: np.ndarray) -> None:
            if name.endswith("/loss"):
                self._clock.tell(f"{steps.number(name)} of {self._recipe.steps} steps done")
            keep(name, array)

        images = self._images if draw is None else canonical.perturb_array(self._images, draw, "batches")
        labels, positions = self._labels, np.arange(self._labels.size).reshape(self._labels.shape)
        if order is not None:
            images, labels, positions = images[:, order], labels[:, order], positions[:, order]
        masks = [dropout.masks(self._spec, images.shape[2:4], self._recipe.seed, row) for row in positions]
        rates = steps.rates(self._recipe, self._dtype, draw)
        with self._clock.step("steps") if draw is None and order is None else nullcontext():
            steps.take(self._trainer, images, labels, rates, keep_and_tell, masks)


def is_of_images(name: str) -> bool:
    """Whether the first axis of an array is that of the images."""
    return name.split("/")[1] == "tap" or name.endswith(f"/grad/{INPUT}")


def _batch(path: Path | None, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    assert path is not None
    batch = load_file(path)
    return batch["images"].astype(dtype), batch["labels"]


def _not_restored(spec: Spec, weights: canonical.Weights, exported: canonical.Weights, dtype: str) -> dict[str, None]:
    """Names of the weights that did not come back bitwise, as a set in order."""
    lost = [
        name
        for name in canonical.shapes(spec)
        if name not in exported or not np.array_equal(exported[name], weights[name].astype(dtype))
    ]
    return dict.fromkeys([*lost, *(name for name in exported if name not in weights)])
