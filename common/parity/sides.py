"""What is diagnosed against what: the model of a function, a record, a checkpoint, a named variant of ours."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors.numpy import save_file

from common import architectures, checkpoints, images
from common import weights as canonical
from common.architectures import Spec
from common.backends.columns import COLUMNS, cores, resolve
from common.backends.process import BackendProcess
from common.diagnosis.evidence import Finding
from common.errors import BackendMissing, ModelError, SpecError
from common.foreign.files import Reference
from common.foreign.protocol import Inputs, Layout
from common.parity.elsewhere import Elsewhere
from common.parity.hosts import Ask, Host, Recorded, in_layout
from common.parity.matching import match
from common.parity.models import ModelsResult, compare_hosts
from common.parity.names import Mode
from common.parity.native import Column, network
from common.parity.record import Record, is_record
from common.parity.spec_fields import as_spec
from common.weights import Weights

_SIZE = (64, 64)  # of the photographs that a checkpoint is diagnosed on
_IMAGES = 2


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two, and what it brings along."""

    host: Host
    inputs: Inputs | None = None
    spec: Spec | None = None  # of a network of ours
    named: bool = False  # a variant: its weights are the other's


class Sides:
    """Makes hosts of what the command line names; a context manager, with which their processes end."""

    def __init__(self, progress: Callable[[str, str], None] = lambda name, step: None) -> None:
        self._stack = ExitStack()
        self._progress = progress
        self._process: BackendProcess | None = None

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="resnet-parity-")))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def diagnose(
        self,
        yours: str,
        against: str,
        *,
        inputs: Inputs | None = None,
        modes: tuple[Mode, ...] | None = None,
        dtypes: tuple[str, ...] = ("float64", "float32"),
    ) -> ModelsResult:
        """Compare what `yours` names with what `against` names, the reference, and say where and why they differ.

        Raises `ModelError` for what cannot be run or does not belong together, `RecordError`, `WeightsError` and
        `SpecError` for files and names that are not what they should be.
        """
        theirs, reference = self._side(yours), self._side(against)
        for side in (theirs, reference):
            if isinstance(side.host, Recorded):
                dtypes = tuple(dtype for dtype in dtypes if dtype == side.host.found.manifest.dtype)
        if not dtypes:
            raise ModelError(f"{yours} and {against} are records in different dtypes; make one of them again")
        giving = next((side for side in (theirs, reference) if inputs is None and side.inputs is not None), None)
        if giving is not None and giving.inputs is not None:
            inputs = in_layout(giving.inputs, giving.host.layout, reference.host.layout)
        if inputs is None:
            spec = reference.spec or theirs.spec
            if spec is None:
                raise ModelError(f"{yours} gives no inputs; return (model, inputs), or give --inputs FILE")
            inputs = _photographs(spec)
        if reference.named:
            reference = self._ported(reference, theirs, inputs)
        column = reference.host
        trial = None
        if isinstance(column, Column) and reference.spec is not None:
            trial = self._trial(column, reference.spec, theirs.host.layout)
        return compare_hosts(
            [reference.host, theirs.host], inputs, modes=modes, dtypes=dtypes, progress=self._progress, as_spec=trial
        )

    def _side(self, text: str) -> Side:
        """The model of a function, a record, a variant or a checkpoint."""
        if ".py:" in text:
            host = self._stack.enter_context(Elsewhere(Reference.parse(text), cores(), progress=self._progress))
            host.make()
            return Side(host=host, inputs=host.inputs)
        path = Path(text)
        if path.is_file() and is_record(path):
            recorded = Recorded(Record.read(path), path.name)
            return Side(host=recorded, inputs=recorded.inputs)
        if not path.exists():
            try:
                spec = architectures.find(text)
            except SpecError as error:
                if ":" not in text:  # nor a name of published weights
                    raise ModelError(f"{text!r} is no file, and no variant either: {error}") from None
            else:
                return Side(host=self._column(text, spec, canonical.randomize(spec)), spec=spec, named=True)
        found = checkpoints.read(text)
        return Side(host=self._column(path.name, found.spec, found.weights), spec=found.spec)

    def _column(self, name: str, spec: Spec, weights: Weights) -> Column:
        """A network of ours in the first backend that is installed."""
        if self._process is None:
            self._process = self._stack.enter_context(BackendProcess(_backend(), cores()))
        path = self._folder / f"{len(list(self._folder.iterdir()))}.safetensors"
        save_file({key: np.ascontiguousarray(weights[key]) for key in weights}, path)
        column = Column(name, network(spec, path), self._process, self._folder)
        column.backend = self._process.name
        return column

    def _ported(self, variant: Side, other: Side, inputs: Inputs) -> Side:
        """The variant with the weights of the other model, of which order and shapes say where they belong."""
        column, spec = variant.host, variant.spec
        assert isinstance(column, Column)
        assert spec is not None
        if isinstance(other.host, Column) and other.spec is not None:
            if canonical.shapes(other.spec) != canonical.shapes(spec):
                raise ModelError(f"the weights of {other.host.name} are not those of {column.name}: other shapes")
            spec_only = replace(column.network, weights=other.host.network.weights)
            column.network = spec_only
            return variant
        self._progress(column.name, "weights")
        ask = Ask(inputs=inputs, dtype="float64", modes=("eval",))
        dtype = other.host.found.manifest.dtype if isinstance(other.host, Recorded) else "float64"
        turned = Ask(inputs=in_layout(inputs, column.layout, other.host.layout), dtype=dtype, modes=("eval",))
        with other.host.at_work(dtype):
            theirs = other.host.record(turned)
        classes = _classes(theirs)
        if classes is not None and spec.classes not in (None, classes):
            spec = spec.replace(classes=classes)
            column = self._column(column.name, spec, canonical.randomize(spec))
        ours = column.record(ask)
        found = match(ours, theirs).parameters
        weights = {name.place: name for name in theirs if name.kind == "weight"}
        missing = [name for name in _floating(ours) if name not in found]
        if missing:
            raise ModelError(
                f"{len(missing)} parameters of {column.name} have no counterpart in {other.host.name}, first "
                f"{missing[0]}: is it another network?"
            )
        values = {name: turn(theirs[weights[own]]).astype(np.float64) for name, (own, turn) in found.items()}
        column.network = replace(column.network, values=values)
        return Side(host=column, spec=spec)

    def _trial(
        self, column: Column, spec: Spec, layout: Layout
    ) -> Callable[[Ask, tuple[Record, Record], int], Finding | None]:
        process = self._process
        assert process is not None

        def trial(ask: Ask, views: tuple[Record, Record], defects: int) -> Finding | None:
            own = replace(ask, inputs=in_layout(ask.inputs, layout, column.layout))
            return as_spec(spec, column.network, process, own, views, defects)

        return trial


def _floating(found: Record) -> list[str]:
    names = [name for name in found if name.kind == "weight"]
    return [name.place for name in names if found[name].dtype.kind == "f"]


def _classes(found: Record) -> int | None:
    """As many as the one output of a classifier has."""
    results = [array for name, array in found.arrays.items() if name.kind == "result"]
    return results[0].shape[-1] if len(results) == 1 and len(results[0].shape) == 2 else None


def _photographs(spec: Spec) -> Inputs:
    height, width = spec.input_size or _SIZE
    batch = images.batch(tuple(images.sample_photos()), _IMAGES, (height, width), spec.in_channels, 1)
    return [batch.images]


def _backend() -> str:
    """The first that is installed. Raises `BackendMissing`."""
    for name in COLUMNS:
        try:
            return resolve(name)
        except BackendMissing:
            continue
    raise BackendMissing("no framework is installed; run: pip install 'resnet-parity[torch]'")
