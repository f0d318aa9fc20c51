"""Records: what one backend computed, as a file that can be compared anywhere, later, without any framework.

A record is a safetensors file. Its arrays are named ``<pass>/<kind>/<name>``: pass ``eval``, ``train`` or ``exact``
(integer weights, level L0), kind ``tap``, ``stat`` or ``grad``, and ``<pass>/loss``; those of mode steps are in
common/parity/steps.py. Its metadata hold the manifest.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from common import architectures
from common.architectures import Spec
from common.architectures.layers import INPUT, Shape, output_shapes
from common.errors import RecordError
from common.files import opened, reason, tensor, written
from common.parity import steps
from common.parity.levels import UNIT
from common.training import recipe as recipes
from common.training.recipe import TrainingRecipe

Mode = Literal["eval", "train", "grad", "steps", "exact"]
MODES: tuple[Mode, ...] = ("eval", "train", "grad")  # unless others are asked for

_FORMAT = "resnet-parity record 2"
# What a field of the manifest is in JSON, where it is no string.
_KINDS: dict[str, type] = {
    **dict.fromkeys(("spec", "versions", "response", "order_response", "recipe"), dict),
    **dict.fromkeys(("modes", "shape", "not_restored"), list),
    **dict.fromkeys(("threads", "seed", "draws", "orders"), int),
}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where a record comes from, and what its arrays answer to rounding: `response` is the one-ulp response of every
    array, where it was measured, `order_response` the largest change in `orders` other orders of the batch."""

    backend: str
    variant: str
    spec: dict[str, Any]
    dtype: str
    modes: tuple[Mode, ...]
    versions: dict[str, str]
    device: str
    threads: int
    seed: int
    inputs: str  # digest of images and labels, as float64
    weights: str  # digest of the weights, as float64
    source: str  # what the images show, for people
    shape: tuple[int, ...]  # of the batch: (N, H, W, C)
    recipe: dict[str, Any] = field(default_factory=dict)  # of mode steps; its `steps` are those taken
    batches: str = ""  # digest of the images and labels of all steps, as float64
    draws: int = 0
    response: dict[str, float] = field(default_factory=dict)
    orders: int = 0
    order_response: dict[str, float] = field(default_factory=dict)
    not_restored: tuple[str, ...] = ()  # weights that did not come back bitwise after load and export


class Record(Mapping[str, np.ndarray]):
    """A record on disk, memory-mapped: an array is read when it is asked for."""

    def __init__(self, path: Path | str) -> None:
        """Open the record at `path`. Raises `RecordError` for a file that is no record or damaged."""
        self.path = Path(path)
        self._file = opened(self.path, RecordError)
        metadata = self._file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            found = metadata.get("format")
            raise RecordError(f"{path}: not a record: format is {found!r}, expected {_FORMAT!r}")
        try:
            self.manifest = _manifest(json.loads(metadata.get("manifest", "")))
            self.spec: Spec = architectures.from_dict(self.manifest.spec)
            self.recipe = recipes.from_dict(self.manifest.recipe) if "steps" in self.manifest.modes else None
        except (TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}: the manifest is damaged: {reason(error)}") from None
        self._names = set(self._file.keys())
        if self.recipe is not None and (self.recipe.steps or 0) > len(self._names):
            raise RecordError(f"{path}: holds {len(self._names)} arrays, and should of {self.recipe.steps} steps")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        try:
            return tensor(self._file, name, RecordError)
        except RecordError as error:
            raise RecordError(f"{self.path}: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _manifest(data: Any) -> Manifest:
    """The manifest that `write` wrote as JSON. Raises `TypeError` or `ValueError` for one it cannot have written."""
    manifest = Manifest(**data)
    for part in fields(Manifest):
        value = getattr(manifest, part.name)
        kind = _KINDS.get(part.name, str)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{part.name} is {value!r}; expected a {kind.__name__}")
    if manifest.dtype not in UNIT:
        raise ValueError(f"dtype is {manifest.dtype!r}; expected one of {', '.join(UNIT)}")
    if not manifest.modes or not set(manifest.modes) <= set(get_args(Mode)):
        raise ValueError(f"modes are {manifest.modes}; expected some of {', '.join(get_args(Mode))}")
    if "steps" in manifest.modes and not manifest.recipe.get("steps"):
        raise ValueError(f"recipe is {manifest.recipe!r}; expected one with its number of steps")
    if len(manifest.shape) != 4 or not all(isinstance(n, int) and n > 0 for n in manifest.shape):
        raise ValueError(f"shape is {manifest.shape}; expected that of a batch, (N, H, W, C)")
    for responses in (manifest.response, manifest.order_response):
        for name, change in responses.items():
            if not isinstance(change, float) or change < 0:
                raise ValueError(f"the response of {name} is {change!r}; expected a norm")
    return replace(
        manifest,
        modes=tuple(manifest.modes),
        shape=tuple(manifest.shape),
        not_restored=tuple(manifest.not_restored),
    )


def write(path: Path | str, arrays: Mapping[str, np.ndarray], manifest: Manifest) -> None:
    """Write a record; beside the target first, then renamed. Raises `RecordError`."""
    metadata = {"format": _FORMAT, "manifest": json.dumps(asdict(manifest))}
    with written(Path(path), RecordError) as beside:
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, beside, metadata)


def expected_arrays(
    spec: Spec, modes: tuple[Mode, ...], batch: Shape, recipe: TrainingRecipe | None = None
) -> dict[str, Shape]:
    """Name and shape of every array that a record of these modes holds, in the order of the walk, then of the steps.

    `batch` is the shape of the images, (N, H, W, C); `recipe` is that of mode steps.
    """
    count, *image = batch
    outputs = output_shapes(spec.layers, tuple(image))
    expected: dict[str, Shape] = {}
    for run in passes(modes):
        if run == "exact" or run in modes:
            expected |= {f"{run}/tap/{layer.path}": (count, *outputs[layer.path]) for layer in spec.layers}
        if run != "exact" and run in modes:
            expected[f"{run}/loss"] = ()
        if run == "train" and run in modes:
            for layer in spec.layers:
                expected |= {f"{run}/stat/{name}": shape for name, shape in layer.statistics.items()}
        if run != "exact" and "grad" in modes:
            for layer in spec.layers:
                expected |= {f"{run}/grad/{name}": shape for name, shape in layer.parameters.items()}
            expected[f"{run}/grad/{INPUT}"] = batch
    return expected | (steps.expected(spec, recipe) if "steps" in modes and recipe is not None else {})


def passes(modes: tuple[Mode, ...]) -> tuple[str, ...]:
    """The passes through the network that these modes need; gradients are taken in both."""
    if "exact" in modes:
        return ("exact",)
    return tuple(run for run in ("eval", "train") if run in modes or "grad" in modes)


def norm(array: np.ndarray) -> float:
    """Euclidean norm over all values, summed in float64."""
    return distance(array, None)


def distance(a: np.ndarray, b: np.ndarray | None) -> float:
    """Euclidean norm of a - b, both of one shape, in float64."""
    # In the order of memory, if both have the same: a gradient may be a transposed view, slow to read in its own order.
    if b is None or a.strides == b.strides:
        order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
        a, b = a.transpose(order), None if b is None else b.transpose(order)
    a_flat, b_flat = a.reshape(-1), None if b is None else b.reshape(-1)
    total = 0.0
    # Piece by piece in cache: temporary arrays of the whole size take most of the time otherwise.
    buffer = np.empty(min(a.size, 2**15))
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is for the comparison to refuse
        for start in range(0, a.size, buffer.size or 1):
            piece = a_flat[start : start + buffer.size]
            difference = buffer[: piece.size]
            if b_flat is None:
                difference[...] = piece
            else:
                np.subtract(piece, b_flat[start : start + buffer.size], out=difference, dtype=np.float64)
            total += float(difference @ difference)
    return sqrt(total)
