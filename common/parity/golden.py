"""Golden records: what a user's model computed once, in files that the same model is compared with later, as after an
upgrade of its framework.

Of a model there is one file for each dtype that it can be had in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ModelError, RecordError
from common.files import reason
from common.foreign.adapters import adapter
from common.foreign.files import as_inputs
from common.foreign.protocol import Forced, Inputs, Layout, Loss, Trace
from common.parity import record as records
from common.parity.hosts import Ask, Here, cast, in_layout
from common.parity.levels import DRAWS, ORDERS
from common.parity.matching import Matching
from common.parity.models import ModelsResult, chosen_modes, compare_hosts, layout_of
from common.parity.names import ArrayName, Mode
from common.parity.record import Record

_ALL_BUT_EVAL: dict[Mode, str] = {"train": "training", "grad": "gradients"}


def make_records(
    model: Any,
    *,
    inputs: Any,
    layout: str | None = None,
    modes: Sequence[Mode] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    loss: Loss | None = None,
    train: Callable[[Any], Callable[..., Any]] | None = None,
    batches: Sequence[Any] = (),
    response: bool = True,
) -> dict[str, Record]:
    """What a model computes, by dtype; the arguments are those of `compare_models`, for one model.

    Without `response` nothing can be compared with it: it shows that the model can be recorded. float64 is left out of
    a model that has no twin in it, where float32 is wanted too. Raises `ModelError`, `InputError`.
    """
    host = Here(model, layout=layout_of(layout))
    chosen = chosen_modes([host], None if modes is None else tuple(modes), bool(batches), [])
    given, all_batches = cast(as_inputs(inputs), "float32"), [cast(as_inputs(one), "float32") for one in batches]
    found: dict[str, Record] = {}
    for dtype in dtypes:
        ask = Ask(
            inputs=cast(given, dtype),
            dtype=dtype,
            modes=chosen,
            draws=DRAWS if response else 0,
            orders=ORDERS if response else 0,
            loss=loss,
            train=train,
            batches=tuple(cast(batch, dtype) for batch in all_batches),
        )
        try:
            with host.at_work(dtype):
                found[dtype] = host.record(ask)
        except ModelError:
            if dtype == "float32" or "float32" not in dtypes:
                raise
    return found


def file(stem: Path, dtype: str) -> Path:
    """Where the record of a dtype lies."""
    return stem.with_name(f"{stem.name}.{dtype}.safetensors")


def write(stem: Path, found: Mapping[str, Record]) -> None:
    """Write records of one model, in the place of all that were there under this name. Raises `RecordError`."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for dtype in ("float64", "float32"):
            file(stem, dtype).unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(f"{stem.parent}: records cannot be written there: {reason(error)}") from None
    for dtype, record in found.items():
        records.write(file(stem, dtype), record, record.manifest)


def compare_with_records(
    stem: Path,
    model: Any,
    *,
    inputs: Any,
    layout: str | None = None,
    matching: Mapping[str, str] | None = None,
    modes: Sequence[Mode] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    loss: Loss | None = None,
    train: Callable[[Any], Callable[..., Any]] | None = None,
    batches: Sequence[Any] = (),
) -> ModelsResult:
    """Compare a model with its golden records, which are the reference; the arguments are those of `make_records`.

    Raises `RecordError` where there is no record, or one of other inputs, modes or dtypes; `ModelError` and
    `InputError` as `compare_models`.
    """
    there = [dtype for dtype in dtypes if file(stem, dtype).is_file()]
    if not there:
        raise RecordError(
            f"{stem}: there is no record of this name in {' or '.join(dtypes)}; run pytest with --parity-record first"
        )
    notes: list[str] = []
    for dtype in dtypes:
        if dtype not in there:
            notes.append(_no_twin(stem, dtype, model, inputs, layout))
    recorded = _Recorded({dtype: file(stem, dtype) for dtype in there})
    now = _Kept(model, layout=layout_of(layout), name="now")
    versions = f"recorded with {recorded.made_by}, now with {_in_words(adapter(model).describe())}"
    notes = [versions, f"the record: {stem}.*", *notes]
    if "layout" in now.lacks and layout is None:
        now.layout = recorded.layout
    found = compare_hosts(
        [recorded, now],
        in_layout(cast(as_inputs(inputs), "float32"), now.layout, recorded.layout),
        tables=[matching],
        modes=None if modes is None else tuple(modes),
        dtypes=there,
        losses=[None, loss],
        trains=[None, train],
        batches=tuple(in_layout(cast(as_inputs(one), "float32"), now.layout, recorded.layout) for one in batches),
    )
    if len(found.comparisons) < len(there):
        # Less is proved than when it was recorded: that is a failure, not a note.
        raise ModelError(f"{now.title} was recorded in {' and '.join(there)}: {' '.join(found.notes)}")
    for dtype, record in now.kept.items():
        notes += [] if found.passed else _other_weights(recorded.records[dtype], record, found.pairs[0].matching)
    return replace(found, notes=(*dict.fromkeys(notes), *found.notes))


class _Recorded:
    """A model that is there as records only, one for each dtype. See `common.parity.hosts.Host`."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """Raises `RecordError`."""
        self._paths = paths
        first = Record.read(next(iter(paths.values()))).manifest
        self.name = "recorded"
        self.made_by = _in_words(first.versions)
        self.title, self.backend = first.variant, first.backend
        self.layout: Layout = first.layout or "channels_last"
        self.lacks = frozenset(what for mode, what in _ALL_BUT_EVAL.items() if mode not in first.modes)
        self.records = {dtype: Record.read(path, self.name) for dtype, path in paths.items()}

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[None]:
        yield

    def record(self, ask: Ask) -> Record:
        path, found = self._paths[ask.dtype], self.records[ask.dtype]
        if not found.manifest.layout or found.manifest.dtype != ask.dtype:
            raise RecordError(f"{path}: not a record of a user's model in {ask.dtype}; make it again")
        if missing := [mode for mode in ask.modes if mode not in found.manifest.modes]:
            raise RecordError(f"{path} has no mode {', '.join(missing)}, which is asked for; record it again")
        _check_inputs(path, {name.place: found[name] for name in found if name.kind == "given"}, ask.inputs)
        return found

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        raise ModelError(f"{self.title} is a record, and cannot be run")


class _Kept(Here):
    """A model in this process, and what it computed."""

    def __init__(self, model: Any, *, layout: Layout | None, name: str) -> None:
        super().__init__(model, layout=layout, name=name)
        self.kept: dict[str, Record] = {}

    def record(self, ask: Ask) -> Record:
        self.kept[ask.dtype] = super().record(ask)
        return self.kept[ask.dtype]


def _in_words(versions: Mapping[str, str]) -> str:
    """The frameworks of a model and their versions."""
    known = ("torch", "keras", "tensorflow", "flax", "jax", "onnxruntime")
    found = [f"{name} {versions[name]}" for name in known if name in versions]
    return ", ".join(found) or f"numpy {versions.get('numpy', '?')}"


def _no_twin(stem: Path, dtype: str, model: Any, inputs: Any, layout: str | None) -> str:
    """A note that there is no record in this dtype, since the model has no twin in it. Raises `RecordError` if it has
    one: the gate would be weaker than the one that is asked for."""
    if dtype == "float64":
        try:
            make_records(model, inputs=inputs, layout=layout, modes=("eval",), dtypes=("float64",), response=False)
        except ModelError as error:
            return f"no float64 twin, so that level L1 is left out: {error}"
    raise RecordError(f"{file(stem, dtype)}: there is no record in {dtype}, and one in another dtype; record it again")


def _check_inputs(path: Path, recorded: Mapping[str, np.ndarray], inputs: Inputs) -> None:
    """Raises `RecordError`."""
    given = dict(inputs) if isinstance(inputs, Mapping) else {str(i): array for i, array in enumerate(inputs)}
    if given.keys() != recorded.keys():
        what = f"inputs {', '.join(recorded)} were recorded, and {', '.join(given)} are given"
    else:
        other = next((name for name, array in recorded.items() if not np.array_equal(array, given[name])), None)
        if other is None:
            return
        a, b = recorded[other].shape, given[other].shape
        what = f"input {other} has other values than the recorded one" if a == b else f"input {other} was {a}, is {b}"
    raise RecordError(f"{path}: {what}; make the inputs from a fixed seed or a file, or record again")


def _other_weights(recorded: Record, now: Record, matching: Matching) -> list[str]:
    """A note where the weights are not those that were recorded."""
    before, after = ({n.place: n for n in record if n.kind == "weight"} for record in (recorded, now))
    changed = [
        name
        for name, (own, turn) in matching.parameters.items()
        if name in before and own in after and not _equal(recorded, before[name], turn(now[after[own]]))
    ]
    if not changed:
        return []
    return [
        f"{len(changed)} of {len(before)} parameters and statistics are not the recorded ones, first {changed[0]}: "
        "make the model from the same weights"
    ]


def _equal(record: Record, name: ArrayName, array: np.ndarray) -> bool:
    return np.array_equal(record[name], array)
