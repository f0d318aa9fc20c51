"""The levels of docs/numerics.md applied to records: which arrays are one function's, which are not, and where first.

Level L0 holds records of integer networks to equality, L1 float64 records to the one-ulp response, L2 float32 records
to theirs. All pairs are compared, not a star. Nothing here runs a network or imports a framework.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import inf, isnan
from statistics import median_low
from typing import Any

import numpy as np

from common.backends.columns import COLUMNS, cores
from common.errors import RecordError
from common.parity.gate import Gate, Level, OrderDependence, Verdict
from common.parity.levels import DECIDABLE, PRECISION_FACTOR, UNIT, ZERO_SHARE
from common.parity.names import KINDS, ArrayName
from common.parity.record import Array, Record, distance, norm


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two backends' difference in one array, what it is held against, and what comes of it."""

    tensor: ArrayName
    pair: tuple[str, str]
    level: Level
    distance: float  # ‖a - b‖
    norm: float  # ‖reference‖
    response: float  # the limit over RESPONSE_FACTOR: ρ of the pair; 0 at level L0
    verdict: Verdict
    ordered: bool = True  # whether both were run in other orders too; a single image has none

    @property
    def error(self) -> float:
        """Relative to the norm of the reference; absolute where that is zero."""
        return self.distance / self.norm if self.norm else self.distance

    @property
    def ratio(self) -> float:
        """The distance in responses."""
        return self.distance / self.response if self.response else (0.0 if self.distance == 0 else inf)


_SEVERITY: tuple[Verdict, ...] = ("reported", "same", "undecided", "different")


def rank(difference: Difference) -> tuple[int, float]:
    """How much a difference matters in a report: first by its verdict, then by its size."""
    return _SEVERITY.index(difference.verdict), difference.ratio


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A defect of one record by itself, that would let a comparison pass by accident."""

    backend: str
    tensor: ArrayName | str  # an array, or a weight by its canonical name
    what: str

    @property
    def section(self) -> str:
        """That of the array, or ``weights``."""
        return "weights" if isinstance(self.tensor, str) else self.tensor.section

    @property
    def place(self) -> str:
        """The canonical name."""
        return self.tensor if isinstance(self.tensor, str) else self.tensor.label


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A backend's own float32 rounding error in one array, ‖float32 - float64‖ / ‖float64‖, beside the others'."""

    backend: str
    tensor: ArrayName
    error: float
    median: float  # the lower median of all backends
    response: float  # the float32 one-ulp response of the reference, relative as well

    @property
    def ratio(self) -> float:
        """The error in medians, or in responses where those are larger."""
        return self.error / max(self.median, self.response, UNIT["float32"])

    @property
    def passed(self) -> bool:
        return self.ratio <= PRECISION_FACTOR


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome of comparing the records of one network, dtype and input."""

    level: Level
    variant: str
    subject: Mapping[str, Any]  # what was run, as data
    dtype: str
    backends: tuple[str, ...]
    modes: tuple[str, ...]
    differences: tuple[Difference, ...]
    problems: tuple[Problem, ...] = ()
    order_dependent: tuple[OrderDependence, ...] = ()
    precision: tuple[Precision, ...] = ()
    # Columns known to round inside a float64 network: where they do, as measured.
    float32_inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing differs, is undecided or is unfit."""
        return any(d.verdict == "same" for d in self.differences) and not self.differs

    @property
    def first(self) -> Difference | None:
        """The first array that differs: in order of execution forward, then of gradients' way back, then of steps."""
        return next((d for d in self.differences if d.verdict == "different"), None)

    @property
    def odd_one_out(self) -> str | None:
        """The backend that alone disagrees where a difference first shows; None where that cannot be told."""
        if self.problems:
            culprits = {problem.backend for problem in self.problems}
            return culprits.pop() if len(culprits) == 1 else None
        if self.order_dependent:
            culprits = {found.backend for found in self.order_dependent}
            return culprits.pop() if len(culprits) == 1 else None
        if self.first is None:
            imprecise = {p.backend for p in self.precision if not p.passed}
            return imprecise.pop() if len(imprecise) == 1 else None
        there = [d for d in self.differences if d.tensor == self.first.tensor]
        differing = [set(d.pair) for d in there if d.verdict == "different"]
        suspects = set.intersection(*differing)
        # Two that agree with each other are needed to say who is wrong.
        agree = [d for d in there if d.verdict == "same" and not suspects & set(d.pair)]
        return suspects.pop() if len(suspects) == 1 and agree else None

    def of(self, first: str, second: str) -> "Comparison":
        """What concerns these two backends."""
        pair = {first, second}
        return replace(
            self,
            differences=tuple(d for d in self.differences if set(d.pair) == pair),
            problems=tuple(p for p in self.problems if p.backend in pair),
            order_dependent=tuple(o for o in self.order_dependent if o.backend in pair),
            precision=tuple(p for p in self.precision if p.backend in pair),
        )

    @property
    def differs(self) -> bool:
        """Whether some array is not the same, is undecided or imprecise, or unfit."""
        return (
            bool(self.problems or self.order_dependent)
            or any(d.verdict in ("different", "undecided") for d in self.differences)
            or not all(p.passed for p in self.precision)
        )

    def worst(self) -> list[Difference]:
        """For every section and pair the difference that matters most: by its verdict, then by its ratio."""
        worst: dict[tuple[str, tuple[str, str]], Difference] = {}
        for d in self.differences:
            key = (d.tensor.section, d.pair)
            if key not in worst or rank(d) > rank(worst[key]):
                worst[key] = d
        return list(worst.values())


def compare(records: Sequence[Record], *, float32: Record | None = None, truth: Record | None = None) -> Comparison:
    """Compare records of one network on one input, in one dtype.

    The one-ulp response comes from the first record that carries one, the reference. `float32`, a float32 record of
    the same network with its response, is what columns are held to that round inside a float64 network. `truth`, a
    float64 record of exactly the weights and input of these float32 records, shows each backend's own rounding error.
    Raises `RecordError` where there is nothing to compare, or no response to hold it against.
    """
    _check_comparable(records)
    first = records[0].manifest
    if float32 is not None:
        _check_same(records[0], float32, {})
    if truth is not None:
        _check_same(records[0], truth, {"weights": "weights", "inputs": "inputs"})
    reference = next((r for r in records if r.response), records[0])
    level: Level = "L0" if "exact" in first.modes else "L1" if first.dtype == "float64" else "L2"
    if level != "L0" and not reference.response:
        raise RecordError(
            f"{reference.path}: no record carries a one-ulp response to hold differences against; "
            "make one of them again without --no-response"
        )
    labels = _labels(records)
    soft = {label for label, record in labels.items() if level == "L1" and not _honours_float64(record)}
    if soft and float32 is None:
        raise RecordError(
            f"{', '.join(sorted(soft))} rounds to float32 inside a float64 network and is held to level L2; "
            "give a float32 record of the reference too"
        )
    modes = tuple(mode for mode in first.modes if all(mode in r.manifest.modes for r in records))
    if "steps" in modes:
        for other in records[1:]:
            _check_same_recipe(records[0], other)
    # All that any of them says it holds: what another lacks is missing there.
    described = ((name, array) for record in records for name, array in record.arrays.items())
    expected = {
        name: array for name, array in described if name.mode in modes and KINDS[name.kind].compared and array.compared
    }
    problems = [
        Problem(backend=label, tensor=weight, what="did not come back bitwise after loading and exporting it")
        for label, record in labels.items()
        for weight in record.manifest.not_restored
    ]
    problems += [
        Problem(backend=label, tensor=name, what="became NaN or infinite where weights and images moved by an ulp")
        for label, record in {**labels, f"{reference.manifest.backend} in float32": float32}.items()
        if record is not None
        for name, change in record.response.items()
        if isnan(change)
    ]
    exact = truth if level == "L2" and truth is not None and "eval" in truth.manifest.modes else None

    def measure(name: ArrayName) -> _Measured:
        return _measure(name, expected[name], labels, reference, exact)

    # NumPy lets go of the interpreter while it works on large arrays.
    with ThreadPoolExecutor(cores()) as pool:
        measured = dict(zip(expected, pool.map(measure, expected), strict=True))
    problems += [problem for found in measured.values() for problem in found.problems]
    norms = {name: found.norm for name, found in measured.items()}
    flips = {(name.run, pair) for name, found in measured.items() for pair in found.flips}
    gate = Gate(level, reference, float32, labels, soft, expected, norms, flips)
    dependent = [found for label in labels if (found := gate.order_dependence(label))]
    judged = tuple(
        Difference(tensor=name, pair=pair, distance=apart, norm=found.norm, **vars(gate.judge(name, pair, apart)))
        for name, found in measured.items()
        for pair, apart in found.distances.items()
    )
    if not judged and not problems:
        raise RecordError("the records have no arrays in common: nothing was compared")
    return Comparison(
        level=level,
        variant=first.variant,
        subject=first.subject,
        dtype=first.dtype,
        backends=tuple(labels),
        modes=modes,
        differences=judged,
        problems=tuple(problems),
        order_dependent=tuple(dependent),
        precision=tuple(p for name, found in measured.items() for p in _precision(name, found, reference)),
        float32_inside={label: rounded_to_float32(labels[label]) for label in sorted(soft)},
    )


def rounded_to_float32(record: Record) -> tuple[str, ...]:
    """The layers of a float64 record that compute in float32: there 29 bits of each value were lost.

    Told by an output, or a kernel's or scale's gradient, that holds float32 numbers only, and not zeros only; of
    arbitrary float64 values one in 2^29 is one. The gradient shows a product that is rounded before its bias is added.
    Layers that only pick values are left out.
    """
    lost: dict[str, None] = {}
    for name, described in record.arrays.items():
        array = record.get(name) if described.rounds else None
        if array is not None and array.any() and np.array_equal(array, array.astype(np.float32)):
            lost[described.layer] = None
    return tuple(lost)


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What is measured of one array in all records."""

    problems: tuple[Problem, ...]
    norm: float = 0.0  # of the reference
    distances: Mapping[tuple[str, str], float] = field(default_factory=dict)
    flips: frozenset[tuple[str, str]] = (
        frozenset()
    )  # pairs of which one has a zero in an output where the other has not
    errors: Mapping[str, float] = field(default_factory=dict)  # each backend's own, where an exact record is given


def _measure(
    name: ArrayName, described: Array, records: Mapping[str, Record], reference: Record, exact: Record | None
) -> _Measured:
    problems: list[Problem] = []
    arrays: dict[str, np.ndarray] = {}
    size = 0.0
    for label, record in records.items():
        what, array = _examine(record, name, described)
        if what:
            problems.append(Problem(backend=label, tensor=name, what=what))
        elif array is not None:
            arrays[label] = array
            if record is reference:
                size = norm(array)
    errors: dict[str, float] = {}
    if exact is not None and name.run == "eval" and name.is_output:
        what, true = _examine(exact, name, described)
        if what:
            problems.append(Problem(backend=f"{exact.manifest.backend} in float64", tensor=name, what=what))
        elif true is not None:
            true_size = norm(true)
            errors = {label: distance(array, true) / true_size for label, array in arrays.items()}
    distances = {(a, b): distance(arrays[a], arrays[b]) for a, b in combinations(arrays, 2)}
    flips = frozenset(
        (a, b) for a, b in distances if name.is_output and not np.array_equal(arrays[a] == 0, arrays[b] == 0)
    )
    return _Measured(problems=tuple(problems), norm=size, distances=distances, flips=flips, errors=errors)


def _honours_float64(record: Record) -> bool:
    column = COLUMNS.get(record.manifest.backend)
    return column is None or column.float64


def _examine(record: Record, name: ArrayName, described: Array) -> tuple[str | None, np.ndarray | None]:
    """What makes an array unfit for comparison, or the array; neither where it need not be there."""
    array = record.get(name)
    if array is None:
        return None if record.partial else "is missing", None
    if array.shape != described.shape:
        return f"has shape {array.shape}; expected {described.shape}", None
    # A column that is known to round inside a float64 network may hand out what it rounded.
    rounds = array.dtype == np.float32 and not _honours_float64(record)
    if array.dtype != record.manifest.dtype and not rounds:
        return f"is {array.dtype}; {record.manifest.dtype} was asked for", None
    if not np.isfinite(array).all():
        return "has values that are NaN or infinite", None
    zeros = 1 - np.count_nonzero(array) / max(array.size, 1)
    if zeros > ZERO_SHARE and not described.sparse:
        return f"is {zeros:.0%} zero, too empty to compare", None
    return None, array


def _precision(name: ArrayName, found: _Measured, reference: Record) -> list[Precision]:
    middle = median_low(found.errors.values()) if found.errors else 0.0
    response = reference.response.get(name, 0.0) / found.norm if found.norm else 0.0
    if not response <= DECIDABLE["float32"]:
        response = 0.0  # it would excuse anything
    return [
        Precision(backend=b, tensor=name, error=error, median=middle, response=response)
        for b, error in found.errors.items()
    ]


def _labels(records: Sequence[Record]) -> dict[str, Record]:
    """Names for the columns: the backend, with the file's name or path where one backend comes twice."""
    labels = [record.label for record in records]
    for part in ("stem", "path"):
        labels = [
            label
            if labels.count(label) == 1
            else f"{record.manifest.backend} ({record.path.stem if part == 'stem' else record.path})"
            for label, record in zip(labels, records, strict=True)
        ]
    return dict(zip(labels, records, strict=True))


def _check_comparable(records: Sequence[Record]) -> None:
    if len(records) < 2:
        raise RecordError(f"{len(records)} record given; a comparison needs at least two")
    paths = [record.path.resolve() for record in records]
    for record in records:
        if paths.count(record.path.resolve()) > 1:
            raise RecordError(f"{record.path} is given twice; a record compared with itself shows nothing")
        if record.manifest.backend not in COLUMNS and not record.manifest.layout:
            known = ", ".join(COLUMNS)
            raise RecordError(f"{record.path}: backend {record.manifest.backend!r} is unknown; expected one of {known}")
    for other in records[1:]:
        _check_same(records[0], other, {"dtype": "dtypes", "weights": "weights", "inputs": "inputs"})


def _check_same(first: Record, other: Record, keys: Mapping[str, str]) -> None:
    a, b = first.manifest, other.manifest
    if found := _differing(a.subject, b.subject):
        raise RecordError(f"{first.path} and {other.path} are records of different networks: {found}")
    for key, what in keys.items():
        if getattr(a, key) != getattr(b, key):
            found = f"{getattr(a, key)} and {getattr(b, key)}"
            raise RecordError(f"{first.path} and {other.path} are records of different {what}: {found}")


def _check_same_recipe(first: Record, other: Record) -> None:
    """The same steps: recipes alike in every field, and the same batches."""
    a, b = first.manifest, other.manifest
    if found := _differing(a.recipe, b.recipe):
        raise RecordError(f"{first.path} and {other.path} are records of different recipes: {found}")
    _check_same(first, other, {"batches": "batches"})


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The fields that differ, in words; nothing where none does."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return ", ".join(f"{name} is {a.get(name)!r} and {b.get(name)!r}" for name in names)
