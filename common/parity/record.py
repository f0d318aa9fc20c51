"""Records: what one backend computed, as a file that can be compared anywhere, later, without any framework.

A record is a safetensors file. Its arrays have the names of common/parity/names.py; its metadata hold the manifest, and
with it all that a comparison needs to know of the subject: nothing that reads a record asks for a specification.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from safetensors.numpy import save_file

from common.errors import RecordError
from common.fields import Bound, Checked, Count, Counts, Natural
from common.files import opened, reason, tensor, written
from common.parity.names import ArrayName, Mode

_FORMAT = "resnet-parity record 2"

Responses = Annotated[
    dict[str, float],
    Bound("a norm by name of array", lambda d: all(isinstance(v, float) and not v < 0 for v in d.values())),
]


@dataclass(frozen=True, kw_only=True)
class Array(Checked):
    """An array that a subject computes, and what a comparison must know of it."""

    error = RecordError
    title = "an array of a record"

    name: Annotated[str, Bound("a name as eval/tap/stem.conv", lambda name: bool(_parsed(name)))]
    shape: tuple[Natural, ...]
    layer: str  # arrays of one layer are judged beside each other
    terms: Count = 1  # of the sums of gradients that its elements are, where these terms may be equal: a bias's
    rounds: bool = False  # whether its layer rounds, and it shows whether to float32
    sparse: bool = False  # whether it is compared even if it is nearly all zero
    compared: bool = True


def _parsed(name: str) -> ArrayName | None:
    try:
        return ArrayName.parse(name)
    except ValueError:
        return None


@dataclass(frozen=True, kw_only=True)
class Source(Checked):
    """Where an input of a layer comes from: an array of the record that has the same values."""

    error = RecordError
    title = "the source of an input"

    name: str  # without the pass: "tap/layer1.0.conv1"
    shape: tuple[Natural, ...]  # of the input, in the model's own layout
    moved: bool = False  # whether the channels were moved from one end to the other


@dataclass(frozen=True, kw_only=True)
class LayerCall(Checked):
    """A call of a layer of a user's model, as `common.foreign.protocol.Call`, and where its arrays are."""

    error = RecordError
    title = "a call of a layer"

    run: Literal["eval", "train"]
    name: str
    layer: str
    kind: str
    leaf: bool
    operation: dict[str, Any] | None = None
    arrays: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Source, ...] = ()
    outputs: tuple[Source, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest(Checked):
    """Where a record comes from, and what its arrays answer to rounding: `response` is the one-ulp response of every
    array, where it was measured, `order_response` the largest change in `orders` other orders of the batch."""

    error = RecordError
    title = "a manifest"

    backend: str
    variant: str  # what people call the network
    subject: dict[str, Any]  # what was run, as data: two records of one network have equal ones
    dtype: Literal["float64", "float32"]
    modes: Annotated[tuple[Mode, ...], Bound("a list of one or more modes", bool)]
    versions: dict[str, str]
    device: str
    threads: Count
    seed: Natural
    inputs: str  # digest of images and labels, as float64
    weights: str  # digest of the weights, as float64
    source: str  # what the images show, for people
    shape: Counts  # of the batch: (N, H, W, C); of a user's model, of its first input
    arrays: tuple[Array, ...]  # in the order in which their values come about
    recipe: dict[str, Any] = field(default_factory=dict)  # of mode steps
    batches: str = ""  # digest of the images and labels of all steps, as float64
    draws: Natural = 0
    response: Responses = field(default_factory=dict)
    orders: Natural = 0
    order_response: Responses = field(default_factory=dict)
    not_restored: tuple[str, ...] = ()  # weights that did not come back bitwise after load and export
    # Of a user's model: where its channels stand, which of its arrays are trained, and what was called.
    layout: Literal["", "channels_first", "channels_last"] = ""
    trained: tuple[str, ...] = ()
    calls: tuple[LayerCall, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("recipe", bool(self.recipe) or "steps" not in self.modes, "that of the steps")


class Record(Mapping[ArrayName, np.ndarray]):
    """What was computed, by name of array, and where it comes from. An array may be read when it is asked for.

    `path` is where it lies, or what people call it. Of a `partial` one an array that it does not describe is no lack.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        getters: Mapping[ArrayName, Callable[[], np.ndarray]],
        partial: bool = False,
    ) -> None:
        """Raises `ValueError` for a name in the manifest that is none."""
        self.path = path
        self.manifest = manifest
        self.partial = partial
        self.arrays = {ArrayName.parse(array.name): array for array in manifest.arrays}
        self.response = _by_name(manifest.response)
        self.order_response = _by_name(manifest.order_response)
        self._getters = getters

    @classmethod
    def read(cls, path: Path | str, called: str | None = None) -> Self:
        """The record at `path`, memory-mapped, and what people call it, where that is no path.

        Raises `RecordError` for a file that is no record or damaged.
        """
        path = Path(path)
        file = opened(path, RecordError)
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            found = metadata.get("format")
            raise RecordError(f"{path}: not a record: format is {found!r}, expected {_FORMAT!r}")

        def get(name: str) -> np.ndarray:
            try:
                return tensor(file, name, RecordError)
            except RecordError as error:
                raise RecordError(f"{path}: {error}") from None

        try:
            manifest = Manifest.from_data(json.loads(metadata.get("manifest", "")))
            return cls(
                Path(called or path), manifest, {ArrayName.parse(name): partial(get, name) for name in file.keys()}
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise RecordError(f"{path}: the manifest is damaged: {reason(error)}") from None

    def restricted(self, names: Set[ArrayName]) -> "Record":
        """What of it has one of these names; what else it describes is no lack."""
        arrays = tuple(array for name, array in self.arrays.items() if name in names)
        getters = {name: get for name, get in self._getters.items() if name in names}
        return Record(self.path, replace(self.manifest, arrays=arrays), getters, partial=True)

    @property
    def label(self) -> str:
        """What a column of it is called where its backend alone does not tell it from others."""
        return str(self.path) if self.manifest.layout else self.manifest.backend

    def __getitem__(self, name: ArrayName) -> np.ndarray:
        return self._getters[name]()

    def __iter__(self) -> Iterator[ArrayName]:
        return iter(self._getters)

    def __len__(self) -> int:
        return len(self._getters)


def is_record(path: Path) -> bool:
    """Whether a file says that it is a record, of whatever version."""
    try:
        metadata = opened(path, RecordError).metadata() or {}
    except RecordError:
        return False
    return str(metadata.get("format", "")).startswith(_FORMAT.rpartition(" ")[0])


def _by_name(responses: Mapping[str, float]) -> dict[ArrayName, float]:
    return {ArrayName.parse(name): change for name, change in responses.items()}


def write(path: Path | str, arrays: Mapping[ArrayName, np.ndarray], manifest: Manifest) -> None:
    """Write a record; beside the target first, then renamed. Raises `RecordError`."""
    metadata = {"format": _FORMAT, "manifest": json.dumps(asdict(manifest))}
    with written(Path(path), RecordError) as beside:
        save_file({str(name): np.asarray(array, order="C") for name, array in arrays.items()}, beside, metadata)


def norm(array: np.ndarray) -> float:
    """Euclidean norm over all values, summed in float64."""
    return distance(array, None)


def finite(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape, with zeros where both hold the same infinity."""
    if a.dtype.kind != "f" or not (same := np.isinf(a) & (a == b)).any():
        return a, b
    return np.where(same, 0, a), np.where(same, 0, b)


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
