"""The pytest plugin: a fixture `parity` that holds a project's models to each other, and to golden records of them.

It is loaded in every run of pytest where the package is installed, so it imports pytest alone; all else comes when a
test asks for it.
"""

import json
import linecache
import re
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from _pytest._code.code import ReprEntryNative, ReprExceptionInfo, ReprFileLocation, ReprTraceback, TracebackEntry
from _pytest._io import TerminalWriter

if TYPE_CHECKING:
    from common.parity.models import ModelsResult
    from common.report.assertions import DifferentModels

T = TypeVar("T")

OPTIONS: dict[str, tuple[str, str]] = {
    "--parity-record": ("DIR", "parity.record() writes golden records into this folder"),
    "--parity-against": ("DIR", "parity.record() compares models with the golden records in this folder"),
    "--parity-level": ("LEVELS", "what to compare in: L1 (float64), L2 (float32), or both as L1,L2; both if not given"),
    "--parity-report": ("FILE", "write every comparison of models in this run as JSON"),
}
_DTYPES = {"L1": "float64", "L2": "float32"}
_OURS = ("common", "resnet_torch", "resnet_keras", "resnet_flax")
# Where a user's own code calls ours; what is raised below is shown from the user's line on.
_DOORS = (__name__, "common.report.assertions", "common.parity.models")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says."""

    record: Path | None
    against: Path | None
    dtypes: tuple[str, ...]
    report: Path | None


_settings = pytest.StashKey[Settings]()
_found = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of `OPTIONS`."""
    group = parser.getgroup("parity", "models held to each other, and to golden records")
    for name, (metavar, words) in OPTIONS.items():
        group.addoption(name, metavar=metavar, help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options. Raises `pytest.UsageError` before anything runs, where they cannot be followed."""
    settings = config.stash[_settings] = _read(config)
    if hasattr(config, "workerinput"):  # of pytest-xdist: the controller reports
        return
    _check(settings)
    config.pluginmanager.register(_Reporter(settings), "parity-reporter")


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> "Parity":
    """Compare models: parity.assert_same(a, b, inputs=x); or one with its golden record: parity.record(a, inputs=x)."""
    return Parity(request.node, request.config.stash[_settings])


class Parity:
    """The fixture `parity`."""

    def __init__(self, item: pytest.Item, settings: Settings) -> None:
        self._item, self._settings = item, settings
        self._results = item.stash.setdefault(_found, [])
        self._names: set[str | None] = set()

    def assert_same(self, *models: Any, inputs: Any, **options: Any) -> "ModelsResult":
        """Compare models as `common.parity.compare_models` does, whose arguments these are, at the levels of
        ``--parity-level``; return the result.

        Raises `DifferentModels`, an `AssertionError`, where they are not shown to be one function; `ModelError` and
        `InputError` as there.
        """
        __tracebackhide__ = True
        from common.parity.models import compare_models

        options.setdefault("dtypes", self._settings.dtypes)
        return self._judged(None, partial(compare_models, *models, inputs=inputs, **options))

    def record(self, model: Any, *, inputs: Any, name: str | None = None, **options: Any) -> "ModelsResult | None":
        """Compare a model with its golden record in ``--parity-against``, and make one in ``--parity-record``; with
        neither, see that one can be made. The record is called after the test, and after `name` where a test has
        several. `options` are layout, modes, dtypes, loss, train and batches, and for the comparison matching, as
        `common.parity.compare_models` has them, for one model.

        Returns the result of the comparison. Raises `DifferentModels` where they are not shown to be one function,
        `RecordError` where there is no record, or one of other inputs; `ModelError`, `InputError`.
        """
        __tracebackhide__ = True
        from common.parity import golden

        matching = options.pop("matching", None)
        options = {"inputs": inputs, "dtypes": self._settings.dtypes, **options}
        record, against = self._settings.record, self._settings.against
        stem = stem_of(self._item.nodeid, name)

        def made() -> None:
            __tracebackhide__ = True
            found = golden.make_records(model, **options, response=record is not None)
            if record is not None:
                golden.write(record / stem, found)

        def compared() -> "ModelsResult":
            __tracebackhide__ = True
            assert against is not None
            return golden.compare_with_records(against / stem, model, matching=matching, **options)

        self._guarded(name, partial(self._name, name))
        if record is not None or against is None:
            self._guarded(name, made)
        return None if against is None else self._judged(name, compared)

    def _name(self, name: str | None) -> None:
        """Two records of one name would overwrite each other."""
        __tracebackhide__ = True
        from common.errors import InputError

        if name in self._names:
            which = f"named {name!r}" if name is not None else "without a name"
            raise InputError(f"two records {which} in one test; give each a name of its own: record(…, name=…)")
        self._names.add(name)

    def _judged(self, name: str | None, compare: "Callable[[], ModelsResult]") -> "ModelsResult":
        __tracebackhide__ = True
        from common.report.assertions import DifferentModels

        found = self._guarded(name, compare)
        if self._settings.report is not None:
            from common.report.json import models_as_json

            self._note(name, models_as_json(found))
        if not found.passed:
            raise DifferentModels(found)
        return found

    def _guarded(self, name: str | None, act: Callable[[], T]) -> T:
        """Do it; what is wrong with the user's input is noted for the report."""
        __tracebackhide__ = True
        from common.errors import ParityError

        try:
            return act()
        except ParityError as error:
            self._note(name, {"passed": False, "error": str(error)})
            raise

    def _note(self, name: str | None, result: Mapping[str, Any]) -> None:
        self._results.append({"test": self._item.nodeid, "name": name, **result})


def stem_of(test: str, name: str | None) -> Path:
    """The path of a test's records below a folder of records, without what comes behind the name: as
    ``tests/test_port.py/test_mine``.

    What a file system might refuse or take for something else is replaced, and then a digest tells such names apart.
    """
    path, _, function = test.partition("::")
    parts = [*path.split("/"), function.replace("::", ".") + ("" if name is None else f"-{name}")]
    safe = [re.sub(r"[^A-Za-z0-9_.=+-]+|^\.+", "-", part)[:120] for part in parts]
    if safe != parts:
        safe[-1] += f"-{sha256(repr((test, name)).encode()).hexdigest()[:10]}"
    return Path(*safe)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hand what was compared to the reporter, which may be in another process, and show our errors without our code."""
    report = yield
    if results := item.stash.get(_found, []):
        report.parity_results = json.dumps(results, allow_nan=False)  # type: ignore[attr-defined]
        results.clear()
    if report.failed and call.excinfo is not None and not item.config.option.fulltrace:
        shown = _shown(item, call.excinfo)
        if shown is not None:
            report.longrepr, report.parity_coloured = shown  # type: ignore[attr-defined]
    return report


class _Shown(ReprExceptionInfo):
    """A failure in the colours of a terminal, where it is one."""

    coloured: str

    def toterminal(self, tw: TerminalWriter) -> None:
        if tw.hasmarkup:
            tw.write(self.coloured)
        else:
            super().toterminal(tw)


class _Reporter:
    """Where all tests of the run are reported."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.report
        self._results: list[dict[str, Any]] = []
        self._said: tuple[str, dict[str, bool]] | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._results += json.loads(getattr(report, "parity_results", "[]"))
        coloured = getattr(report, "parity_coloured", None)
        if coloured is not None and isinstance(report.longrepr, ReprExceptionInfo):
            shown = _Shown(report.longrepr.reprtraceback, report.longrepr.reprcrash)
            shown.coloured = coloured
            report.longrepr = shown

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._path is None:
            return
        from common.errors import RecordError
        from common.files import written

        found = sorted(self._results, key=lambda one: str(one["test"]))
        content = {"passed": bool(found) and all(one["passed"] for one in found), "comparisons": found}
        try:
            with written(self._path, RecordError) as beside:
                beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            self._said = f"{self._path}: {len(found)} comparisons of models", {}
        except RecordError as error:
            self._said = f"error: {error}", {"red": True}
            if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._said is not None:
            line, colours = self._said
            terminalreporter.write_line(line, **colours)


def _read(config: pytest.Config) -> Settings:
    def path(option: str) -> Path | None:
        given = config.getoption(option)
        return config.invocation_params.dir / given if given else None

    text = config.getoption("--parity-level") or ",".join(_DTYPES)
    levels = [level.strip() for level in text.split(",")]
    if any(level not in _DTYPES for level in levels):
        raise pytest.UsageError(f"--parity-level {text}: expected L1, L2 or L1,L2")
    return Settings(
        record=path("--parity-record"),
        against=path("--parity-against"),
        dtypes=tuple(dtype for level, dtype in _DTYPES.items() if level in levels),
        report=path("--parity-report"),
    )


def _check(settings: Settings) -> None:
    record, against, report = settings.record, settings.against, settings.report
    if against is not None and not against.is_dir():
        raise pytest.UsageError(f"--parity-against {against}: there is no such folder; make it with --parity-record")
    if record is not None and record.exists() and not record.is_dir():
        raise pytest.UsageError(f"--parity-record {record}: this is no folder")
    if record is not None and against is not None and record.resolve() == against.resolve():
        raise pytest.UsageError(f"--parity-record and --parity-against both name {record}; the records would be lost")
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise pytest.UsageError(f"--parity-report {report}: no file can be written there")


def _shown(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> tuple[ReprExceptionInfo, str] | None:
    """How a failure of ours is shown, and the same in colours; None for what is not ours."""
    error = excinfo.value
    if _is_a(error, "common.report.assertions", "DifferentModels"):
        frames, lines = _users(excinfo), []
        plain, coloured, message = _different(error)  # type: ignore[arg-type]
    elif _is_a(error, "common.errors", "ParityError"):
        frames = _users(excinfo, only=True)
        lines = _below(item.config, error)
        plain = message = f"error: {error}"
        coloured = f"\033[1;31m{plain}\033[0m"
    else:
        return None
    if not frames:
        return None
    lines = [_line(item.config, e.path, e.lineno + 1, e.name, str(e.statement or "")) for e in frames] + lines
    location = ReprFileLocation(str(frames[-1].path), frames[-1].lineno + 1, message)
    entry = ReprEntryNative([f"{line.rstrip()}\n" for line in [*lines, *plain.splitlines()]])
    shown = ReprExceptionInfo(ReprTraceback([entry], None, "native"), location)
    return shown, "\n".join([*lines, coloured, ""])


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Whether it is of a class of ours, whose module need not be imported."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _different(error: "DifferentModels") -> tuple[str, str, str]:
    """The report of a comparison, the same in colours, and in a line."""
    from common.report import models as tables

    found = error.result
    shown = tables.result(found)
    best = next((defect.best for defect in found.diagnosis.defects if defect.best), None)
    first = next((compared.first for compared in found.comparisons if compared.first), None)
    what = f"first difference at {first.tensor.where}" if first else "not shown to be the same"
    what = best.sentence if best else what
    return tables.text(shown), tables.text(shown, colours=True), f"{what} ({' | '.join(found.names)})"


def _users(excinfo: pytest.ExceptionInfo[BaseException], only: bool = False) -> list[TracebackEntry]:
    """The frames of the user's own that led to ours; with `only`, none where none of ours was called."""
    frames: list[TracebackEntry] = []
    for entry in excinfo.traceback:
        module = str(entry.frame.f_globals.get("__name__", ""))
        if module in _DOORS:
            return frames
        if module.partition(".")[0] not in ("_pytest", "pytest", "pluggy", "unittest") and not entry.ishidden(excinfo):
            frames.append(entry)
    return [] if only else frames


def _below(config: pytest.Config, error: BaseException) -> list[str]:
    """The last line of the user's code below ours, where a model raised."""
    last: list[str] = []
    seen: BaseException | None = error
    while seen is not None and (seen := seen.__cause__ or seen.__context__) is not None:
        for frame, line in _walk(seen.__traceback__):
            path = Path(frame.f_code.co_filename)
            module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if module not in _OURS and "site-packages" not in path.parts and path.is_relative_to(config.rootpath):
                statement = linecache.getline(str(path), line)
                last = [_line(config, path, line, frame.f_code.co_name, statement)]
    return last


def _walk(traceback: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _line(config: pytest.Config, path: Path | str, line: int, function: str, statement: str) -> str:
    """``FILE:LINE: in FUNCTION: STATEMENT``."""
    folder = config.invocation_params.dir
    shown = Path(path).relative_to(folder) if Path(path).is_relative_to(folder) else Path(path)
    return f"{shown}:{line}: in {function}: {textwrap.shorten(statement, 100, placeholder=' …')}"
