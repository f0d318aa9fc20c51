"""A checkpoint: what any file of weights becomes, ours or foreign, and what every loader, builder and command takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np

from common.architectures import Spec
from common.errors import CheckpointError
from common.images import Preprocessing
from common.names import CANONICAL, differing
from common.weights import LazyWeights, Weights, init, shapes


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights come from, and what was made of them on the way."""

    path: Path | None = None  # the file that was read; None for weights that were made here
    reference: str = ""  # what a person wrote to have it
    format: str = CANONICAL  # whose names the tensors have
    container: str = ""  # the kind of file, for people
    assumed: Mapping[str, Any] = field(default_factory=dict)  # fields of the spec that nothing in the file shows
    ignored: tuple[str, ...] = ()  # tensors that belong to no layer
    notes: tuple[str, ...] = ()  # what was changed on the way, one line each
    before: "Origin | None" = None  # of a canonical file: where the weights in it came from

    def __str__(self) -> str:
        return str(self.path) if self.path else self.reference or "the weights"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A network's spec and weights, with what is known of the images it takes and the classes it knows.

    Read from a file, nothing but headers was read: a tensor is when it is asked for.
    """

    spec: Spec
    weights: Weights
    preprocessing: Preprocessing | None = None  # None where nobody knows
    class_names: tuple[str, ...] = ()  # empty where nobody knows
    origin: Origin = field(default_factory=Origin)

    def with_classes(self, classes: int) -> Self:
        """The same with a new head of another size, as it would be initialised for training; noted.

        Raises `CheckpointError` where there is no classifier.
        """
        if self.spec.head == "none":
            raise CheckpointError(f"{self.origin}: there is no classifier to give {classes} classes")
        if classes == self.spec.classes:
            return self
        spec = self.spec.with_head(classes=classes)
        names = differing(self.spec, spec)
        dtype = self.weights[next(iter(names))].dtype
        new = init(spec, dtype=str(dtype))
        before = self.spec.classes
        note = f"{', '.join(names)}: initialised anew for {classes} classes instead of {before}; train them before use"
        return replace(self._replaced(spec, {name: new[name] for name in names}, note), class_names=())

    def with_channels(self, channels: int) -> Self:
        """The same with what reads the image adapted to another number of channels, by timm's rule: one channel is the
        sum, more are repetitions scaled so that their sum stays; noted."""
        before = self.spec.in_channels
        if channels == before:
            return self
        spec = self.spec.replace(in_channels=channels)
        arrays, notes = {}, []
        for name, axis in differing(self.spec, spec).items():
            kernel = self.weights[name]
            if channels == 1:
                how, adapted = "the sum of", kernel.sum(axis=axis, keepdims=True)
            else:
                how = "repetitions of"
                repeated = np.concatenate([kernel] * ceil(channels / before), axis)
                adapted = repeated.take(range(channels), axis) * kernel.dtype.type(before / channels)
            arrays[name] = adapted.astype(kernel.dtype)
            notes.append(f"{name}: {how} its {before} input channels, for {channels}")
        return self._replaced(spec, arrays, *notes)

    def _replaced(self, spec: Spec, arrays: Mapping[str, np.ndarray], *notes: str) -> Self:
        getters = {
            name: partial((arrays if name in arrays else self.weights).__getitem__, name) for name in shapes(spec)
        }
        origin = replace(self.origin, notes=(*self.origin.notes, *notes))
        return replace(self, spec=spec, weights=LazyWeights(getters), origin=origin)
