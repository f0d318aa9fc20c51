"""Backends live in processes of their own: nothing leaks in, and what happens to one of them is told."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from common.architectures.resnet import ResNetSpec
from common.backends.columns import resolve
from common.backends.process import BackendProcess
from common.errors import BackendCrashed, BackendError, BackendMissing, InputError
from common.parity.case import Case
from common.parity.session import Session
from common.report import json as json_report
from common.report import junit as junit_report
from tests.mutants.planting import Chatter, Crash, Fail

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = ResNetSpec(block="basic", blocks=(1, 1), widths=(8, 16), stem_width=8, classes=10)
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def blocking(*modules: str) -> str:
    """Code after which these modules look as if they were not installed."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.mark.parametrize("module", ["common", "common.commands.main", "common.parity.session", "common.report.console"])
def test_importing_common_imports_no_framework(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {FRAMEWORKS!r} if m in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("package", "needs"),
    [
        ("resnet_torch", ("torch",)),
        ("resnet_keras", ("keras", "tensorflow")),
        ("resnet_flax", ("jax", "flax", "optax")),
    ],
)
def test_a_backend_works_with_only_its_own_framework_installed(package: str, needs: tuple[str, ...]) -> None:
    others = tuple(name for name in FRAMEWORKS if name not in needs)
    builder = "ResNet18" if package != "resnet_torch" else "resnet18"
    code = blocking(*others, "sklearn") + f"import {package}; {package}.{builder}(); print('built')"
    done = run_python(code)
    assert done.stdout.strip() == "built", done.stderr


@pytest.mark.parametrize(
    ("package", "builder", "blocked", "extra"),
    [
        ("resnet_torch", "resnet50", "torch", "torch"),
        ("resnet_keras", "ResNet50", "keras", "keras"),
        ("resnet_flax", "ResNet50", "flax", "flax"),
    ],
)
def test_a_missing_framework_is_named_with_the_extra_that_installs_it(
    package: str, builder: str, blocked: str, extra: str
) -> None:
    code = blocking(blocked) + f"from {package} import {builder}; {builder}()"
    last = run_python(code).stderr.strip().splitlines()[-1]
    assert "BackendMissing" in last
    assert f"pip install 'resnet-parity[{extra}]'" in last


def test_a_column_whose_framework_is_missing_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.backends import columns as backend

    found = backend.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "jax" else found(name))
    with pytest.raises(
        BackendMissing, match=r"backend flax: jax not installed; run: pip install 'resnet-parity\[flax\]'"
    ):
        resolve("flax")


def test_unknown_and_repeated_backends_are_refused() -> None:
    with pytest.raises(BackendError, match="unknown backend 'tensorflow'"):
        Session(["torch", "tensorflow"])
    with pytest.raises(BackendError, match="did you mean 'torch'"):
        Session(["torhc", "flax"])
    with pytest.raises(InputError, match="keras:tensorflow is named 2 times"):
        Session(["keras", "keras:tensorflow"])


def test_a_killed_backend_is_reported_and_the_results_of_the_others_are_kept(session: Session) -> None:
    """A real SIGKILL in the middle of a run, of the backend that measures the response at that."""
    case = Case(variant="tiny", spec=TINY, size=(32, 32), dtypes=("float64",))
    killed = threading.Event()

    def progress(backend: str, step: str) -> None:
        if backend == "torch" and step == "float64: eval" and not killed.is_set():
            killed.set()
            os.kill(session.processes["torch"].pid, signal.SIGKILL)

    result = session.check(case, progress=progress)
    assert killed.is_set()
    assert not result.passed
    message = str(result.failures["torch"])
    assert message.startswith("backend torch: its process was killed by SIGKILL while ")
    assert "\n" not in message
    assert [c.backends for c in result.comparisons] == [("keras:tensorflow", "flax")] * 2
    assert all(c.passed for c in result.comparisons)

    # The next check has all three again.
    again = session.check(case)
    assert again.passed
    assert again.comparisons[0].backends == ("torch", "keras:tensorflow", "flax")


def test_where_the_reference_and_the_next_one_crash_the_reports_are_written_all_the_same(
    session: Session, tmp_path: Path
) -> None:
    case = Case(variant="tiny", spec=TINY, size=(32, 32), dtypes=("float64",), modes=("eval",))
    kills = {"torch": "float64: eval", "keras:tensorflow": "float64: response 1 of 3"}

    def progress(backend: str, step: str) -> None:
        if kills.get(backend) == step:
            os.kill(session.processes[backend].pid, signal.SIGKILL)

    result = session.check(case, progress=progress)
    assert not result.passed
    assert set(result.failures) == {"torch", "keras:tensorflow"}
    assert result.comparisons == ()
    json_report.write_json(tmp_path / "out.json", [result])
    junit_report.write_junit(tmp_path / "out.xml", [result])
    failures = json.loads((tmp_path / "out.json").read_text())["failures"]
    assert [failure["backend"] for failure in failures] == ["torch", "keras:tensorflow"]
    assert (tmp_path / "out.xml").read_text().count("was killed by SIGKILL") == 2


def test_a_crash_is_reported_with_the_last_output() -> None:
    crashed = pytest.raises(BackendCrashed, match=r"exit code 7 while .*; its last output: out of luck")
    with BackendProcess("torch") as worker, crashed:
        worker.ask(Crash())


def test_an_error_inside_a_backend_comes_through_as_one_line() -> None:
    with BackendProcess("torch") as worker, pytest.raises(BackendError, match="backend torch: ZeroDivisionError: "):
        worker.ask(Fail())


def test_what_a_framework_prints_is_not_taken_for_a_reply() -> None:
    with BackendProcess("torch") as worker, pytest.raises(BackendError, match="ZeroDivisionError"):
        worker.ask(Chatter())


def test_a_request_that_the_process_cannot_know_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fail, "__module__", "nowhere")
    monkeypatch.setitem(sys.modules, "nowhere", sys.modules[Crash.__module__])
    with BackendProcess("torch") as worker, pytest.raises(BackendError, match="No module named 'nowhere'"):
        worker.ask(Fail())


def test_a_process_ends_when_the_one_that_asks_is_killed() -> None:
    code = (
        "import time; from common.backends.process import BackendProcess\n"
        "w = BackendProcess('torch'); print(w.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if not _alive(child):
            return
        threading.Event().wait(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the backend's process outlived the one that asked")


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
