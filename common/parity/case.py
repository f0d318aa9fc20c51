"""What a check runs: the case, the records that each backend makes of it, and the files they are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from common import architectures, images
from common import weights as canonical
from common.architectures import Spec, running
from common.architectures.layers import output_shapes
from common.errors import InputError, RecipeError, RecordError
from common.files import written
from common.parity import steps
from common.parity.levels import DRAWS, ORDERS
from common.parity.names import MODES, Mode
from common.parity.orders import orders
from common.parity.recording import RecordNetwork
from common.parity.subjects import passes
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe

DTYPES = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is checked: a network, its weights and its input.

    Raises `InputError` for a size the network cannot take, `RecipeError` for optimiser steps it cannot be trained by.
    """

    variant: str
    spec: Spec
    size: tuple[int, int] = (64, 64)  # height, width
    batch: int = 2
    photos: tuple[Path, ...] = ()  # random noise where there are none
    weights: canonical.Weights | None = None  # random ones where none are given
    seed: int = 0
    dtypes: tuple[str, ...] = DTYPES
    modes: tuple[Mode, ...] = MODES
    recipe: TrainingRecipe = steps.RECIPE  # of mode steps, which takes its `steps` of `batch` images each

    def __post_init__(self) -> None:
        size = f"{self.size[0]}x{self.size[1]}"
        stride = self.spec.output_stride
        if min(self.size) < stride:
            raise InputError(
                f"size {size} is too small for {self.variant}, whose strides multiply to {stride}; "
                f"use --size {stride} or more"
            )
        trains = "steps" in self.modes
        training = trains or "train" in passes(self.modes)
        layers = running(self.spec, training)
        shapes = output_shapes(layers, (*self.size, self.spec.in_channels))
        for layer in layers if training else ():
            if layer.kind == "norm" and self.batch * prod(shapes[layer.path][:-1]) < 2:
                raise InputError(
                    f"batch {self.batch} of size {size} leaves one value per channel at {layer.path}, which has no "
                    "variance; use --mode eval, a larger --batch or a larger --size"
                )
        if trains and not self.recipe.steps:
            raise RecipeError(f"steps={self.recipe.steps!r}; expected how many optimiser steps to take, as --steps 20")
        if trains and (last := self.spec.layers[-1]).kind not in ("dense", "softmax"):
            raise RecipeError(f"{self.variant} ends with {last.path} and has no classes to learn; leave out mode steps")

    def title(self, source: str) -> str:
        """What the network is run on, in words; `source` is what the images show."""
        images = f"{self.batch} crops of {source}" if self.photos else source
        return f"{images}, {self.size[0]}x{self.size[1]}, batch {self.batch}, seed {self.seed}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it, as JSON data."""
        return {
            "size": list(self.size),
            "batch": self.batch,
            "seed": self.seed,
            "recipe": recipes.to_dict(self.training) if "steps" in self.modes else None,
        }

    @property
    def training(self) -> TrainingRecipe:
        """The recipe with the size of the batches that it gets here."""
        return self.recipe.replace(batch_size=self.batch)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One record to be made. `values` says to which precision weights and images are rounded beforehand."""

    name: str
    dtype: str
    values: str
    modes: tuple[Mode, ...]
    draws: int = 0
    orders: int = 0


def tasks(case: Case, *, reference: bool, soft: bool) -> list[Task]:
    """The records that one backend makes of a case.

    Only the reference measures the response, and the exact value of the float32 network. `soft`: some column rounds
    inside a float64 network, and is held to the float32 response.
    """
    draws = DRAWS if reference else 0
    # Sums of integers are exact in any order: one shows whether an image is seen by another.
    made = [Task(name="exact", dtype="float32", values="integers", modes=("exact",), orders=1)]
    measured: dict[str, Any] = {"modes": case.modes, "draws": draws, "orders": ORDERS}
    if "float64" in case.dtypes:
        made.append(Task(name="float64", dtype="float64", values="float64", **measured))
    if "float32" in case.dtypes or (reference and soft):
        made.append(Task(name="float32", dtype="float32", values="float32", **measured))
    if "float32" in case.dtypes and reference and "eval" in case.modes:
        made.append(Task(name="truth", dtype="float64", values="float32", modes=("eval",)))
    return made


def step_count(case: Case, task: Task) -> int:
    """Of how many steps a process tells while it makes a record; its import comes once and beside."""
    runs = passes(task.modes)
    # Beside the work itself: build and load of each, and once write.
    of_passes = 2 + len(runs) if runs else 0
    other = task.draws + len(orders(case.batch)[: task.orders])
    of_steps = 4 + (case.recipe.steps or 0) * (1 + other) if "steps" in task.modes else 0
    return 1 + of_passes + of_steps + other


class Inputs:
    """Weights and images of a case, written once to `folder` for every backend to read. Raises `ParityError`."""

    def __init__(self, case: Case, folder: Path, wanted: Sequence[Task]) -> None:
        self.case = case
        self.folder = folder
        spec = case.spec
        shapes = output_shapes(running(spec, training=False), (*case.size, spec.in_channels))
        classes = shapes[architectures.output(spec).path][-1]
        batch = images.batch(case.photos, case.batch, case.size, spec.in_channels, classes, case.seed)
        batches = _batches(case, classes) if any("steps" in task.modes for task in wanted) else None
        self.source = batch.source
        self._digests: dict[str, dict[str, str]] = {}
        weights = case.weights if case.weights is not None else canonical.randomize(spec, case.seed)
        for values in {task.values: None for task in wanted}:
            if values == "integers":
                pixels = images.integers(case.batch, case.size, spec.in_channels, case.seed)
                exact = replace(batch, images=pixels)
                self._write(values, canonical.integers(spec.exact_twin, case.seed), {"inputs": exact})
            else:
                of_steps = {"batches": batches} if batches is not None else {}
                self._write(values, weights, {"inputs": batch} | of_steps)

    def request(self, task: Task, backend: str, threads: int, output: Path) -> RecordNetwork:
        """What a backend's process is asked, for the record that the task names."""
        case, exact = self.case, task.values == "integers"
        trains = "steps" in task.modes
        digests = self._digests[task.values]
        facts: dict[str, Any] = {
            "variant": case.variant,
            "seed": case.seed,
            "inputs": digests["inputs"],
            "weights": digests["weights"],
            "source": "random integers" if exact else self.source,
        }
        if trains:
            facts |= {"recipe": recipes.to_dict(case.training), "batches": digests["batches"]}
        return RecordNetwork(
            facts=facts,
            subject=architectures.to_dict(case.spec.exact_twin if exact else case.spec),
            dtype=task.dtype,
            modes=task.modes,
            recipe=case.training if trains else None,
            weights=self.path("weights", task.values),
            inputs=self.path("inputs", task.values),
            batches=self.path("batches", task.values) if trains else None,
            backend=backend,
            threads=threads,
            output=output,
            draws=task.draws,
            orders=task.orders,
        )

    def path(self, what: str, values: str) -> Path:
        """The file of the ``weights``, ``inputs`` or ``batches`` that were rounded to `values`."""
        return self.folder / f"{what}-{values}.safetensors"

    def _write(self, values: str, weights: canonical.Weights, batches: Mapping[str, images.Batch]) -> None:
        dtype = "float64" if values == "float64" else "float32"
        # safetensors writes the memory as it lies: of a transposed view that would be another array.
        contents = {"weights": {name: weights[name].astype(dtype, order="C") for name in weights}}
        for what, batch in batches.items():
            contents[what] = {"images": batch.images.astype(dtype), "labels": batch.labels}
        for what, content in contents.items():
            with written(self.path(what, values), RecordError) as beside:
                save_file(content, beside)
        self._digests[values] = {what: canonical.digest(content) for what, content in contents.items()}


def _batches(case: Case, classes: int) -> images.Batch:
    """The batches of all optimiser steps, (steps, N, H, W, C), of crops that are all different."""
    number = case.recipe.steps or 0
    batch = images.batch(case.photos, number * case.batch, case.size, case.spec.in_channels, classes, case.seed)
    return replace(
        batch,
        images=batch.images.reshape(number, case.batch, *batch.images.shape[1:]),
        labels=batch.labels.reshape(number, case.batch),
    )
