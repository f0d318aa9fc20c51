"""The main job: run one network in several backends on the same weights and images, and compare what they computed."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.backends.columns import COLUMNS, cores, resolve
from common.backends.messages import Request
from common.backends.process import BackendProcess
from common.diagnosis.evidence import Diagnosis
from common.errors import BackendCrashed, InputError, ParityError, RecordError
from common.parity.case import Case, Inputs, Task, step_count, tasks
from common.parity.compare import Comparison, compare
from common.parity.hosts import Ask
from common.parity.levels import DRAWS, ORDERS
from common.parity.matching import in_one_view
from common.parity.models import Pair, explain
from common.parity.names import MODES
from common.parity.native import Column, images_of, network
from common.parity.record import Record
from common.parity.spec_fields import as_spec

Progress = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found. `failures` are the backends that did not answer, each with its error."""

    variant: str  # what people call the network
    title: str  # what it was run on, for people
    facts: Mapping[str, Any]  # the same as data: size, batch, seed, the recipe of mode steps
    source: str  # what the images show
    comparisons: tuple[Comparison, ...]
    pairs: tuple[Pair, ...] = ()  # where they differ: what each layer adds, and why
    failures: Mapping[str, ParityError] = field(default_factory=dict)
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.failures and all(c.passed for c in self.comparisons)


class Session:
    """One process per backend, kept for any number of checks; a context manager.

    `names` are columns as on the command line; `jobs` of them work at a time (as many as there are cores, by default)
    and share the cores. Raises `BackendError` for an unknown name, `BackendMissing` for an absent framework,
    `InputError` for a name given twice.
    """

    def __init__(self, names: Sequence[str], jobs: int | None = None) -> None:
        self.columns = tuple(resolve(name) for name in names)
        for column in self.columns:
            if self.columns.count(column) > 1:
                raise InputError(f"backend {column} is named {self.columns.count(column)} times; name each once")
        # The response must come from a column that honours float64, if there is one.
        self.references = sorted(self.columns, key=lambda c: not COLUMNS[c].float64)
        self.soft = any(not COLUMNS[c].float64 for c in self.columns)
        self.jobs = min(jobs or cores(), len(self.columns))
        self.processes: dict[str, BackendProcess] = {}
        self.seconds: dict[str, float] = {}  # of this process, by what the time went into
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="resnet-parity-"))
        self._exit.callback(shutil.rmtree, self._folder, ignore_errors=True)
        for column in self.columns:
            self.process(column)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.close()
        self._exit.close()

    def check(self, case: Case, *, progress: Progress = lambda backend, step: None) -> CheckResult:
        """Run `case` in every backend and compare. `progress` hears of every step."""
        started = time.perf_counter()
        with self.prepared(case) as inputs:

            def outcome(column: str, reference: bool) -> dict[str, Record] | ParityError:
                try:
                    return self.run(column, inputs, reference, progress)
                except ParityError as error:
                    return error

            first = self.references[0]
            # Whoever takes longest begins, or works alone at the end: JAX compiles, the reference measures responses.
            begin = sorted(self.columns, key=lambda column: ("jax" not in COLUMNS[column].requires, column != first))
            with ThreadPoolExecutor(self.jobs) as pool:
                made = dict(zip(begin, pool.map(lambda column: outcome(column, column == first), begin), strict=True))
            outcomes = {column: made[column] for column in self.columns}
            reference = self._measured(outcomes, lambda column: outcome(column, True))
            records = {column: found for column, found in outcomes.items() if not isinstance(found, ParityError)}
            with self._timed("compare"):
                comparisons = compare_case(case, records, reference)
            with self._timed("explain"):
                explained = self.explain(inputs, comparisons, progress)
        return CheckResult(
            variant=case.variant,
            title=case.title(inputs.source),
            facts=case.facts,
            source=inputs.source,
            comparisons=tuple(comparisons),
            pairs=tuple(explained),
            failures={column: found for column, found in outcomes.items() if isinstance(found, ParityError)},
            versions={column: _versions(next(iter(made.values()))) for column, made in records.items()},
            seconds=time.perf_counter() - started,
        )

    def explain(
        self,
        inputs: Inputs,
        comparisons: Sequence[Comparison],
        progress: Progress = lambda backend, step: None,
        wrap: Mapping[str, Callable[[Request[Any]], Request[Any]]] | None = None,
    ) -> list[Pair]:
        """Of backends that differ, where each layer alone does, and why. `wrap` is what a backend's requests are put
        into."""
        case = inputs.case
        modes = tuple(mode for mode in case.modes if mode in MODES)
        failed = sorted((c for c in comparisons if not c.passed), key=lambda c: c.level == "L0")
        if not failed or not modes or not case.dtypes:
            return []
        failing = failed[0]
        dtype = case.dtypes[0] if failing.level == "L0" else failing.dtype
        odd = failing.odd_one_out
        # Whoever is alone is held against the others, not they against it.
        first = next((c for c in failing.backends if c != odd), failing.backends[0])
        others = [odd] if odd else [c for c in failing.backends if c != first and failing.of(first, c).differs]
        what = network(case.spec, inputs.path("weights", dtype))
        ask = Ask(
            inputs=[images_of(inputs.path("inputs", dtype), dtype)],
            dtype=dtype,
            modes=modes,
            draws=DRAWS,
            orders=ORDERS,
        )
        found = []
        for other in others:
            progress(other, "localise")
            hosts = [
                Column(c, what, self.process(c), inputs.folder, (wrap or {}).get(c, lambda request: request))
                for c in (first, other)
            ]
            try:
                pair, views = explain(hosts[0], hosts[1], (ask, replace(ask, draws=0)))
                diagnosis = pair.diagnosis or Diagnosis()
                other_spec = as_spec(case.spec, what, self.process(first), ask, views, len(diagnosis.defects))
                found.append(replace(pair, diagnosis=replace(diagnosis, as_spec=other_spec)))
            except ParityError as error:
                progress(other, f"not localised: {error}")
        return found

    def _measured(
        self,
        outcomes: dict[str, dict[str, Record] | ParityError],
        measure: Callable[[str], dict[str, Record] | ParityError],
    ) -> str:
        """The column whose records carry the response: where the first one gave no answer, the next is run again."""
        for column in self.references:
            if sum(not isinstance(found, ParityError) for found in outcomes.values()) < 2:
                break
            if not isinstance(outcomes[column], ParityError):
                if column != self.references[0]:
                    outcomes[column] = measure(column)
                if not isinstance(outcomes[column], ParityError):
                    return column
        return self.references[0]

    @contextmanager
    def prepared(self, case: Case) -> Iterator[Inputs]:
        """The weights and images of `case` on disk, in a folder that goes away at the end, the records with it."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            with self._timed("prepare"):
                inputs = Inputs(case, Path(folder), tasks(case, reference=True, soft=self.soft))
            yield inputs

    def run(
        self,
        column: str,
        inputs: Inputs,
        reference: bool,
        progress: Progress = lambda backend, step: None,
    ) -> dict[str, Record]:
        """The records one backend makes of a case, by the task's name. Raises what happens in its process."""
        made: dict[str, Record] = {}
        try:
            for task in tasks(inputs.case, reference=reference, soft=self.soft):
                output = inputs.folder / f"{column}-{task.name}.safetensors"
                process = self.process(column)
                request = inputs.request(task, column, process.threads, output)
                process.ask(request, lambda step, t=task: progress(column, f"{t.name}: {step}"))  # type: ignore[misc]
                made[task.name] = Record.read(output)
        except BackendCrashed:
            self.processes.pop(column).close()
            raise
        return made

    def step_count(self, case: Case) -> int:
        """How many steps `progress` will hear of, if all goes well."""
        return sum(
            step_count(case, task)
            for column in self.columns
            for task in tasks(case, reference=column == self.references[0], soft=self.soft)
        ) + sum(not self.processes[column].seconds for column in self.columns if column in self.processes)

    def process(self, column: str) -> BackendProcess:
        """The column's process; a new one where the last one ended."""
        if column not in self.processes:
            self.processes[column] = BackendProcess(column, threads=max(1, cores() // self.jobs))
        return self.processes[column]

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def make_record(case: Case, column: str, output: Path, *, response: bool = True, progress: Progress) -> Record:
    """Run `case` in one backend and keep its record, in the first of the case's dtypes. Raises `ParityError`."""
    column = resolve(column)
    dtype = case.dtypes[0]
    draws = DRAWS if response else 0
    task = Task(name=dtype, dtype=dtype, values=dtype, modes=case.modes, draws=draws, orders=ORDERS)
    with (
        tempfile.TemporaryDirectory(prefix="resnet-parity-") as folder,
        BackendProcess(column, threads=cores()) as process,
    ):
        request = Inputs(case, Path(folder), [task]).request(task, column, process.threads, output.absolute())
        process.ask(request, lambda step: progress(column, step))
    return Record.read(output)


def compare_files(paths: Sequence[Path]) -> list[Comparison]:
    """Compare the records at `paths`, those of each dtype with one another. Raises `RecordError`."""
    records = [Record.read(path) for path in paths]
    if len(records) < 2:
        raise RecordError(f"{len(records)} record given; a comparison needs at least two")
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.manifest.dtype, []).append(record)
    compared = [_compare_group(group, groups) for group in groups.values() if len(group) > 1]
    if not compared:
        found = ", ".join(f"{r.path} in {r.manifest.dtype}" for r in records)
        raise RecordError(f"no two of the records have one dtype: {found}")
    return compared


def _compare_group(group: list[Record], groups: Mapping[str, list[Record]]) -> Comparison:
    if any(record.manifest.layout for record in group):
        group = in_one_view(group)
    first = group[0].manifest
    given = first.weights, first.inputs
    float32 = next((r for r in groups.get("float32", []) if r.response), None)
    float32 = float32 if first.dtype == "float64" else None
    doubles = groups.get("float64", []) if first.dtype == "float32" else []
    exact = [r for r in doubles if (r.manifest.weights, r.manifest.inputs) == given]
    return compare(group, float32=float32, truth=next(iter(exact), None))


def compare_case(case: Case, records: Mapping[str, Mapping[str, Record]], reference: str) -> list[Comparison]:
    """Compare the records that the backends made of a case, level by level; none where fewer than two did."""
    if len(records) < 2:
        return []

    def all_of(task: str) -> list[Record]:
        return [made[task] for made in records.values()]

    of_reference = records[reference]
    compared = [compare(all_of("exact"))]
    if "float64" in case.dtypes:
        compared.append(compare(all_of("float64"), float32=of_reference.get("float32")))
    if "float32" in case.dtypes:
        compared.append(compare(all_of("float32"), truth=of_reference.get("truth")))
    return compared


def _versions(record: Record) -> dict[str, str]:
    return dict(record.manifest.versions) | {"device": record.manifest.device}
