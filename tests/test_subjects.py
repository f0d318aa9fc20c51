"""Whatever offers its arrays by name, moves by an ulp and takes its images in another order can be recorded and
compared: here networks of NumPy, of which no specification knows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.backends.messages import Clock
from common.parity import record
from common.parity.compare import Comparison, compare
from common.parity.levels import DRAWS
from common.parity.names import ArrayName
from common.parity.orders import orders
from common.parity.record import Array, Manifest, Record
from common.parity.recording import record_subjects
from common.parity.subjects import Keep
from common.weights import perturb_array

IMAGES, FEATURES, UNITS = 4, 300, 6
Mean = Callable[[np.ndarray], np.ndarray]


class Centred:
    """A dense layer less its mean over the batch, and the gradient of half the sum of squares in its kernel."""

    arrays = (
        Array(name="train/tap/dense", shape=(IMAGES, UNITS), layer="dense", rounds=True),
        Array(name="train/tap/centre", shape=(IMAGES, UNITS), layer="centre", rounds=True),
        Array(name="train/grad/dense.kernel", shape=(FEATURES, UNITS), layer="dense"),
    )

    def __init__(self, mean: Mean) -> None:
        random = np.random.default_rng(0)
        self._kernel, self._images = random.normal(size=(FEATURES, UNITS)), random.normal(size=(IMAGES, FEATURES))
        self._mean = mean

    def not_restored(self) -> list[str]:
        return []

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        kernel, images = self._kernel, self._images
        if draw is not None:
            kernel, images = perturb_array(kernel, draw, "kernel"), perturb_array(images, draw, "input")
        order = np.arange(IMAGES) if order is None else order
        images, back = images[order], np.argsort(order)
        dense = images @ kernel
        centred = dense - self._mean(dense)
        keep(ArrayName("train", "tap", "dense"), dense[back])
        keep(ArrayName("train", "tap", "centre"), centred[back])
        keep(ArrayName("train", "grad", "dense.kernel"), images.T @ centred)


def one_after_another(x: np.ndarray) -> np.ndarray:
    total = np.zeros(x.shape[1])
    for row in x:
        total = total + row
    return total / len(x)


def in_float32(x: np.ndarray) -> np.ndarray:
    total = np.zeros(x.shape[1], np.float32)
    for row in x:
        total = total + row.astype(np.float32)
    return total.astype(np.float64) / len(x)


def recorded(folder: Path, backend: str, mean: Mean, draws: int) -> Record:
    subject = Centred(mean)
    found = record_subjects([subject], orders(IMAGES), draws, Clock(lambda step: None))
    facts: dict[str, Any] = {"versions": {}, "device": "cpu", "threads": 1, "seed": 0, "source": "random noise"}
    path = folder / f"{backend}.safetensors"
    manifest = Manifest(
        backend=backend,
        variant="centred",
        subject={"units": UNITS},
        dtype="float64",
        modes=("train", "grad"),
        inputs="1",
        weights="2",
        shape=(IMAGES, 1, 1, FEATURES),
        arrays=subject.arrays,
        draws=draws,
        response={str(name): change for name, change in found.response.items()},
        orders=len(orders(IMAGES)),
        order_response={str(name): change for name, change in found.order_response.items()},
        **facts,
    )
    record.write(path, found.arrays, manifest)
    return Record.read(path)


def compared(folder: Path, mean: Mean) -> Comparison:
    means = {"torch": one_after_another, "keras:tensorflow": lambda x: x.mean(0), "flax": mean}
    return compare(
        [recorded(folder, backend, one, DRAWS if backend == "torch" else 0) for backend, one in means.items()]
    )


@pytest.mark.parametrize("mean", [one_after_another, lambda x: x.sum(0) / IMAGES, lambda x: x[::-1].mean(0)])
def test_two_ways_to_a_mean_are_one_function(tmp_path: Path, mean: Mean) -> None:
    found = compared(tmp_path, mean)
    assert found.passed
    assert {str(d.tensor) for d in found.differences} == {array.name for array in Centred.arrays}


@pytest.mark.parametrize("mean", [in_float32, lambda x: x[: IMAGES // 2].mean(0)])
def test_a_mean_that_depends_on_the_order_is_found_with_its_layer_and_backend(tmp_path: Path, mean: Mean) -> None:
    found = compared(tmp_path, mean)
    assert not found.passed
    (dependent,) = found.order_dependent
    assert (dependent.backend, str(dependent.tensor)) == ("flax", "train/tap/centre")
    assert found.first is not None
    assert str(found.first.tensor) == "train/tap/centre"
    assert found.odd_one_out == "flax"
