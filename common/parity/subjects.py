"""What can be recorded, and what a record says of it: subjects.

A subject offers arrays by name, can move its weights and images by an ulp, take its images in another order, and run.
A specification with weights in a backend is one: its passes, and its optimiser steps. Whatever else is one can be
recorded and compared as well: nothing beyond this module asks for a specification.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from math import prod
from typing import Protocol

import numpy as np

from common import weights as canonical
from common.architectures import Spec, running
from common.architectures.layers import INPUT, Layer, Shape, output_shapes
from common.backends.messages import Clock
from common.backends.protocol import Backend
from common.parity import steps
from common.parity.names import ArrayName, Mode, Pass
from common.parity.record import Array
from common.training import dropout
from common.training.recipe import TrainingRecipe

Keep = Callable[[ArrayName, np.ndarray], None]


_MOST_POSITIONS = 64  # batches that are looked at for one that shows all of a network with random layers


class Subject(Protocol):
    """Something that is run again and again, each time from the same beginning."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All that it computes, in the order in which their values come about: what differs first is to blame."""
        ...

    def not_restored(self) -> list[str]:
        """Names of the weights that do not come back bitwise after loading and exporting them."""
        ...

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        """Compute every array and hand it to `keep`, as soon as it is there.

        With `draw` weights and images are moved by -1, 0 or +1 ulp at random, another way for every number; with
        `order`, a permutation (N,), every batch is taken in that order, and arrays of images are put back in the first.
        """
        ...


class SpecPasses:
    """The passes of a specification in a backend: modes eval, train, grad and exact."""

    def __init__(
        self,
        backend: Backend,
        spec: Spec,
        weights: canonical.Weights,
        images: np.ndarray,
        labels: np.ndarray,
        modes: tuple[Mode, ...],
        seed: int,
        clock: Clock,
    ) -> None:
        """`seed` is that of the masks of dropout in training mode."""
        self.arrays = arrays_of_passes(spec, modes, images.shape)
        self._backend, self._spec, self._weights, self._clock = backend, spec, weights, clock
        self._images, self._labels, self._modes = images, labels, modes
        self._seed = seed
        self._trains = "train" in passes(modes)
        self._first = _first_position(spec, images.shape, seed) if self._trains else 0
        with clock.step("build"):
            self._model = backend.build(spec, str(images.dtype))
        self._loaded: int | None = -1  # the draw whose weights the model holds; a pass leaves them as they are

    def not_restored(self) -> list[str]:
        with self._clock.step("load"):
            self._load(None)
            return _lost(self._spec, self._weights, self._backend.export(self._model), str(self._images.dtype))

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        images, labels, back = self._images, self._labels, None
        positions = self._first + np.arange(len(labels))
        plain = draw is None and order is None
        if draw is not None:
            images = canonical.perturb_array(images, draw, "input")
        if order is not None:
            images, labels, positions, back = images[order], labels[order], positions[order], np.argsort(order)
        masks = dropout.masks(self._spec, images.shape[1:3], self._seed, positions) if self._trains else None
        self._load(draw)
        for run in passes(self._modes):
            with self._clock.step(run) if plain else nullcontext():
                arrays = self._backend.run(
                    self._model,
                    images,
                    labels,
                    training=run == "train",
                    gradients="grad" in self._modes and run != "exact",
                    masks=masks if run == "train" else None,
                )
            for text, array in arrays.items():
                name = ArrayName.parse(f"{run}/{text}")
                of_images = name.kind == "tap" or name.place == INPUT
                keep(name, array[back] if back is not None and of_images else array)

    def _load(self, draw: int | None) -> None:
        if draw != self._loaded:
            weights = self._weights if draw is None else canonical.perturb(self._weights, seed=draw)
            self._backend.load(self._model, weights)
            self._loaded = draw


def _first_position(spec: Spec, images: tuple[int, ...], seed: int) -> int:
    """The first position in the training at which every mask keeps something of the batch: stochastic depth leaves
    nothing of a branch that it leaves out of all images, and nothing is shown by that."""
    count = images[0]
    for first in range(0, _MOST_POSITIONS * count, count):
        masks = dropout.masks(spec, (images[1], images[2]), seed, first + np.arange(count))
        if all(mask.any() for mask in masks.values()):
            return first
    return 0


class SpecSteps:
    """The optimiser steps of a specification in a backend: mode steps. Images are (steps, N, H, W, C)."""

    def __init__(
        self,
        backend: Backend,
        spec: Spec,
        weights: canonical.Weights,
        images: np.ndarray,
        labels: np.ndarray,
        recipe: TrainingRecipe,
        clock: Clock,
    ) -> None:
        self.arrays = arrays_of_steps(spec, recipe, images.shape[1:])
        self._spec, self._weights, self._clock = spec, weights, clock
        self._images, self._labels, self._recipe = images, labels, recipe
        with clock.step("build"):
            self._trainer = backend.trainer(spec, recipe, str(images.dtype))

    def not_restored(self) -> list[str]:
        with self._clock.step("load"):
            self._trainer.load(self._weights)
            return _lost(self._spec, self._weights, self._trainer.export(), str(self._images.dtype))

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        images, labels = self._images, self._labels
        positions = np.arange(labels.size).reshape(labels.shape)
        plain = draw is None and order is None
        if draw is not None:
            images = canonical.perturb_array(images, draw, "batches")
        if order is not None:
            images, labels, positions = images[:, order], labels[:, order], positions[:, order]
        # An image keeps its masks in whatever order.
        masks = [dropout.masks(self._spec, images.shape[2:4], self._recipe.seed, row) for row in positions]
        rates = steps.rates(self._recipe, str(images.dtype), draw)
        with self._clock.step("load") if plain else nullcontext():
            self._trainer.load(self._weights if draw is None else canonical.perturb(self._weights, seed=draw))

        def keep_and_tell(name: ArrayName, array: np.ndarray) -> None:
            if name.kind == "loss":
                self._clock.tell(f"{name.step} of {self._recipe.steps} steps done")
            keep(name, array)

        with self._clock.step("steps") if plain else nullcontext():
            steps.take(self._trainer, images, labels, rates, keep_and_tell, masks)


def passes(modes: tuple[Mode, ...]) -> tuple[Pass, ...]:
    """The passes through the network that these modes need; gradients are taken in both."""
    if "exact" in modes:
        return ("exact",)
    both: tuple[Pass, ...] = ("eval", "train")
    return tuple(run for run in both if run in modes or "grad" in modes)


def arrays_of_passes(spec: Spec, modes: tuple[Mode, ...], batch: Shape) -> tuple[Array, ...]:
    """Every array of these modes for a batch (N, H, W, C): every pass forward, then each one's gradients from the last
    layer back to the input."""
    count, *image = batch
    layers = {run: running(spec, run == "train") for run in passes(modes)}
    found: list[Array] = []
    for run in passes(modes):
        if run == "exact" or run in modes:
            outputs = output_shapes(layers[run], tuple(image))
            for layer in layers[run]:
                shape = (count, *outputs[layer.path])
                found.append(
                    Array(name=f"{run}/tap/{layer.path}", shape=shape, layer=layer.path, rounds=not layer.exact)
                )
        if run != "exact" and run in modes:
            found.append(Array(name=f"{run}/loss", shape=(), layer=""))
        if run == "train" and run in modes:
            for layer in layers[run]:
                found += [
                    Array(name=f"{run}/stat/{name}", shape=shape, layer=layer.path)
                    for name, shape in layer.statistics.items()
                ]
    for run in passes(modes) if "grad" in modes else ():
        terms, shown = _terms(layers[run], batch), dict(_showing(layers[run]))
        found += [
            Array(
                name=f"{run}/grad/{name}",
                shape=shape,
                layer=layer.path,
                terms=terms.get(name, 1),
                rounds=shown.get(layer.path) == name,
            )
            for layer, name, shape in _backward(layers[run])
        ]
    inputs = [Array(name=f"{run}/grad/{INPUT}", shape=batch, layer=INPUT) for run in passes(modes) if "grad" in modes]
    return (*found, *inputs)


def arrays_of_steps(spec: Spec, recipe: TrainingRecipe, batch: Shape) -> tuple[Array, ...]:
    """Every array of the recipe's steps of a batch (N, H, W, C): within a step the loss, the statistics of the way
    forward, what the optimiser makes of the gradients from the last layer back to the first, the parameters, and their
    averages."""
    terms = _terms(spec.layers, batch)
    kinds = (*steps.moments(recipe), "param", *(["ema"] if recipe.ema_decay is not None else []))
    found: list[Array] = []
    last = recipe.steps or 0
    for number in range(1, last + 1):

        def array(kind: str, layer: str, name: str, shape: Shape, number: int = number) -> Array:
            kept = (steps.SAMPLE,) if number < last and prod(shape) > steps.SAMPLE else shape
            text = str(ArrayName(number, kind, name))
            return Array(name=text, shape=kept, layer=layer, terms=terms.get(name, 1))

        found.append(array("loss", "", "", ()))
        found += [
            array("stat", layer.path, name, shape) for layer in spec.layers for name, shape in layer.statistics.items()
        ]
        for kind in kinds:
            found += [array(kind, layer.path, name, shape) for layer, name, shape in _backward(spec.layers)]
    return tuple(found)


def _backward(layers: Iterable[Layer]) -> Iterator[tuple[Layer, str, Shape]]:
    """Every parameter, in the order in which gradients come about."""
    trained = [(layer, name, shape) for layer in layers for name, shape in layer.parameters.items()]
    yield from reversed(trained)


def _terms(layers: Iterable[Layer], batch: Shape) -> dict[str, int]:
    """How many terms the gradient of a bias sums over: one for every image and pixel of the outputs it is added to."""
    count, *image = batch
    shapes = output_shapes(layers, tuple(image))
    terms: dict[str, int] = {}
    for layer in layers:
        if (name := layer.uses.get("bias")) is not None:
            terms[name] = terms.get(name, 0) + count * prod(shapes[layer.path][:-1])
    return terms


def _showing(layers: Iterable[Layer]) -> Iterator[tuple[str, str]]:
    """By path of a layer that rounds, the parameter whose gradient shows a product before a bias is added: the first,
    but for a norm that has a bias alone."""
    for layer in layers:
        first = next(iter(layer.parameters), None)
        if first is not None and first != layer.uses.get("bias") and not layer.exact:
            yield layer.path, first


def _lost(spec: Spec, weights: canonical.Weights, exported: Mapping[str, np.ndarray], dtype: str) -> list[str]:
    """Names of the weights that did not come back bitwise."""
    lost = [
        name
        for name in canonical.shapes(spec)
        if name not in exported or not np.array_equal(exported[name], weights[name].astype(dtype))
    ]
    return [*lost, *(name for name in exported if name not in weights)]
