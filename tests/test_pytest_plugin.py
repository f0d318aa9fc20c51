"""The pytest plugin, on projects of a user's that are written here and run by a pytest of their own."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.parity import DifferentModels, assert_same
from common.parity.record import Record, write
from common.pytest_plugin import stem_of

ROOT = Path(__file__).parent.parent

MODELS = """
    import numpy as np
    import torch
    from flax import linen
    from torch import nn

    def images(count=2):
        return np.random.default_rng(0).normal(size=(count, 3, 8, 8)).astype("float32")

    class Net(nn.Module):
        def __init__(self, eps=1e-5, seed=0):
            super().__init__()
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8, eps=eps)
            self.fc = nn.Linear(8, 5)
            with torch.no_grad():
                for array in (self.norm.running_mean, self.norm.weight, self.norm.bias):
                    array.normal_()
                self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x):
            x = torch.relu(self.norm(self.conv(x)))
            return self.fc(x.mean((2, 3)))

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(8, (3, 3), name="conv")(x)
            x = linen.BatchNorm(use_running_average=True, name="norm")(x)
            return linen.Dense(5, name="fc")(linen.relu(x).mean((1, 2)))

    def in_linen(net):
        held = {name: array.numpy() for name, array in net.state_dict().items()}
        return Linen(), {
            "params": {
                "conv": {"kernel": held["conv.weight"].transpose(2, 3, 1, 0), "bias": held["conv.bias"]},
                "norm": {"scale": held["norm.weight"], "bias": held["norm.bias"]},
                "fc": {"kernel": held["fc.weight"].T, "bias": held["fc.bias"]},
            },
            "batch_stats": {"norm": {"mean": held["norm.running_mean"], "var": held["norm.running_var"]}},
        }
"""
# A function is a model too, and the quickest one.
FUNCTIONS = """
    import numpy as np

    x = np.random.default_rng(0).normal(size=(4, 6))

    def tanh(x):
        return np.tanh(x)

    def by_sinh(x):
        return np.sinh(x) / np.cosh(x)

    def nearly(x):
        return np.tanh(x) * x.dtype.type(1.001)
"""


@pytest.fixture(scope="module", autouse=True)
def everything_is_imported() -> None:
    """A run of pytest in this process forgets what it imported, and a framework cannot be imported twice."""
    import_module("flax.linen")
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DifferentModels):
        assert_same(nn.Linear(3, 3), nn.Linear(3, 3), inputs=x)


class Project:
    """A user's project, in a folder of its own."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self._pytester = pytester
        self.path = pytester.path
        pytester.makepyfile(models=MODELS, functions=FUNCTIONS)

    def tests(self, source: str, heading: str = "from functions import *") -> None:
        self._pytester.makepyfile(test_models=f"{heading}\n{textwrap.dedent(source).strip()}")

    def run(self, *options: str, **outcomes: int) -> pytest.RunResult:
        """As the plugin is, where the package is installed: the entry point may not be there yet."""
        result = self._pytester.runpytest_inprocess(*PLUGIN, "--color=no", *options)
        if outcomes:
            result.assert_outcomes(**outcomes)
        return result


# Hypothesis takes a second to say at the end of each run that it was not used.
PLUGIN = ("-p", "no:parity", "-p", "common.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


def failure(result: pytest.RunResult) -> str:
    """What is shown of the tests that failed."""
    shown = str(result.stdout).split("= FAILURES =")[1]
    return shown.split("= warnings summary =")[0].split("= short test summary info =")[0]


def lines_of(result: pytest.RunResult) -> list[str]:
    """The same without its headings, of one test."""
    return failure(result).splitlines()[2:-1]


def test_installed_it_is_there_and_nothing_is_imported_until_a_test_asks(pytester: pytest.Pytester) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert set(vars(import_module(declared["parity"]))) >= {"pytest_addoption", "pytest_configure", "parity"}
    # As an installer would leave it.
    installed = pytester.mkdir("installed") / "parity_as_declared-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: parity-as-declared\nVersion: 0\n")
    (installed / "entry_points.txt").write_text(f"[pytest11]\nparity = {declared['parity']}\n")
    pytester.makepyfile(
        """
        import sys

        def test_plain(parity):
            ours = {"common.pytest_plugin"} | {name for name in sys.modules if name == "common"}
            loaded = {name for name in sys.modules if name.split(".")[0] in ("common", "numpy", "torch", "rich", "jax")}
            assert loaded == ours
        """
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(installed.parent), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-p", "no:hypothesispytest", "-q", "--parity-level=L1"]
    done = subprocess.run(
        command, cwd=pytester.path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_models_that_are_the_same_pass_and_the_result_comes_back(project: Project) -> None:
    project.tests(
        """
        def test_functions(parity):
            assert parity.assert_same(tanh, by_sinh, inputs=x).passed

        def test_modules(parity):
            found = parity.assert_same(Net(), Net(), Net(), inputs=images(), modes=["eval", "grad"])
            assert found.modes == ("eval", "grad") and len(found.pairs) == 2

        def test_frameworks(parity):
            parity.assert_same(Net(), in_linen(Net()), inputs=images(), modes=["eval"])
        """,
        "from functions import *\nfrom models import *",
    )
    project.run(passed=3)


def test_a_failure_shows_the_users_line_the_table_the_first_layer_and_the_diagnosis(project: Project) -> None:
    project.tests(
        """
        def test_eps(parity):
            parity.assert_same(
                Net(), Net(eps=1e-3), inputs=images(),
            )
        """,
        "from models import *",
    )
    result = project.run(failed=1)
    shown = failure(result)
    user, *report = lines_of(result)
    assert user == "test_models.py:3: in test_eps: parity.assert_same( Net(), Net(eps=1e-3), inputs=images(), )"
    for line in (
        "L1 identity in float64",
        "L2 precision in float32",
        "first forwards: the output of norm",
        "diagnosis",
    ):
        assert any(line in one for one in report), line
    assert "yours has an eps of 0.001, the reference has an eps of 1e-05" in shown
    assert not any(word in shown for word in ("common/", "Traceback", "def ", "\033["))
    result.stdout.fnmatch_lines(["FAILED test_models.py::test_eps - `norm`: yours has an eps of 0.001*"])


def test_a_failure_of_another_framework_is_shown_alike(project: Project) -> None:
    project.tests(
        """
        def test_linen(parity):
            parity.assert_same(Net(eps=1e-3), in_linen(Net()), inputs=images(), modes=["eval"])
        """,
        "from models import *",
    )
    shown = failure(project.run(failed=1))
    assert "torch (Net) | flax (Linen)" in shown
    assert "first forwards: the output of norm" in shown


def test_the_users_own_helpers_are_shown_and_the_assertion_without_the_fixture_too(project: Project) -> None:
    project.tests(
        """
        from common.parity import assert_same

        def hold(a, b):
            assert_same(a, b, inputs=x)

        def test_direct():
            hold(tanh, nearly)
        """
    )
    assert lines_of(project.run(failed=1))[:2] == [
        "test_models.py:8: in test_direct: hold(tanh, nearly)",
        "test_models.py:5: in hold: assert_same(a, b, inputs=x)",
    ]


def test_the_whole_traceback_is_there_for_who_asks(project: Project) -> None:
    project.tests("def test_nearly(parity): parity.assert_same(tanh, nearly, inputs=x)")
    assert "pytest_plugin.py" in failure(project.run("--full-trace", failed=1))


def test_colours_are_for_a_terminal(project: Project) -> None:
    project.tests("def test_nearly(parity): parity.assert_same(tanh, nearly, inputs=x)")
    assert "\033[1;31mNOT SHOWN TO BE THE SAME\033[0m" in failure(project.run("--color=yes", failed=1))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("parity.assert_same(drawn, tanh, inputs=x)", "drawn is random in eval mode: *"),
        ("parity.record(drawn, inputs=x)", "drawn is random in eval mode: *"),
        ("parity.assert_same(tanh, 3, inputs=x)", "a value of type int is no model; *"),
        ("parity.assert_same(tanh, inputs=x)", "1 model given; a comparison needs at least two"),
        ("parity.assert_same(tanh, tanh, inputs='photo')", "an input of type str has values of type *"),
        ("parity.record(tanh, inputs=x, layout='CHWN')", "layout 'CHWN' is unknown; expected one of NCHW, NHWC"),
        ("parity.record(tanh, inputs=x, modes=['grad'])", "mode grad is asked for, and * has none: leave it out"),
        ("parity.record(tanh, inputs=x), parity.record(nearly, inputs=x)", "two records without a name in one test; *"),
        (
            "parity.record(tanh, inputs=x, name='a'), parity.record(tanh, inputs=x, name='a')",
            "two records named 'a' in one test; *",
        ),
    ],
)
def test_bad_input_is_one_line(project: Project, call: str, error: str) -> None:
    project.tests(
        f"""
        def drawn(x):
            return x + np.random.default_rng().normal(size=x.shape).astype(x.dtype)

        def test_bad(parity):
            {call}
        """
    )
    result = project.run(failed=1)
    assert len(lines_of(result)) == 2
    assert lines_of(result)[0] == f"test_models.py:6: in test_bad: {call}"
    result.stdout.fnmatch_lines([f"error: {error.replace('[', '[[]')}"])


def test_a_model_that_raises_is_shown_with_its_own_line(project: Project) -> None:
    project.tests(
        """
        class Broken(Net):
            def forward(self, x):
                return self.fc(x.reshape(7, 7))

        def test_broken(parity):
            parity.assert_same(Net(), Broken(), inputs=images())
        """,
        "from models import *",
    )
    shown = lines_of(project.run(failed=1))
    assert shown[0] == "test_models.py:7: in test_broken: parity.assert_same(Net(), Broken(), inputs=images())"
    assert shown[1] == "test_models.py:4: in forward: return self.fc(x.reshape(7, 7))"
    assert shown[2].startswith("error: Broken")
    assert len(shown) == 3


def test_what_is_no_fault_of_the_input_keeps_its_traceback(project: Project) -> None:
    project.tests(
        """
        def test_typing_error(parity):
            parity.assert_same(tanh, tanh, inputs=x, moods=["eval"])
        """
    )
    assert "unexpected keyword argument 'moods'" in failure(project.run(failed=1))


RECORDED = """
    def test_net(parity):
        parity.record(Net(), inputs=images())
        parity.record(Net(seed=1), inputs=images(3), name="other", modes=["eval"])
"""


def test_a_model_is_the_same_as_its_golden_record(project: Project) -> None:
    project.tests(RECORDED, "from models import *")
    project.run(passed=1)
    assert not list(project.path.glob("**/*.safetensors"))
    project.run("--parity-record=golden", passed=1)
    assert sorted(path.name for path in (project.path / "golden" / "test_models.py").iterdir()) == [
        "test_net-other.float32.safetensors",
        "test_net-other.float64.safetensors",
        "test_net.float32.safetensors",
        "test_net.float64.safetensors",
    ]
    project.run("--parity-against=golden", "--parity-record=again/deep", passed=1)
    project.run("--parity-against=again/deep", "--parity-level=L1", passed=1)


def test_a_model_that_changed_differs_from_its_golden_record(project: Project) -> None:
    project.tests(RECORDED, "from models import *")
    project.run("--parity-record=golden", passed=1)
    made_under(project.path / "golden", "1.13.0")
    project.tests(RECORDED.replace("Net()", "Net(eps=1e-3)"), "from models import *")
    result = project.run("--parity-against=golden", failed=1)
    shown = failure(result)
    assert "test_models.py:3: in test_net: parity.record(Net(eps=1e-3), inputs=images())" in shown
    assert f"recorded with torch 1.13.0, now with torch {torch.__version__}" in shown
    assert f"torch: 1.13.0 | {torch.__version__}" in shown
    assert "first forwards: the output of norm" in shown
    assert "yours has an eps of 0.001, the reference has an eps of 1e-05" in shown
    assert "are not the recorded ones" not in shown
    assert "common/" not in shown


def made_under(folder: Path, version: str) -> None:
    """Records as an older PyTorch would have made them."""
    for path in folder.glob("**/*.safetensors"):
        found = Record.read(path)
        found.manifest.versions["torch"] = version
        write(path, {name: np.array(array) for name, array in found.items()}, found.manifest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("Net(seed=2), inputs=images()", "parameters and statistics are not the recorded ones, first conv.weight"),
        ("Net(), inputs=images() + 1", "input 0 has other values than the recorded one; make the inputs from a fixed"),
        ("Net(), inputs=images(4)", "input 0 was (2, 3, 8, 8), is (4, 3, 8, 8); make the inputs from a fixed seed"),
        ("Net(), inputs={'x': images()}", "inputs 0 were recorded, and x are given"),
        (
            "Net(), inputs=images(), name='new'",
            "there is no record of this name in float64 or float32; run pytest with",
        ),
    ],
)
def test_what_else_is_not_as_recorded_is_said(project: Project, change: str, words: str) -> None:
    source = "def test_net(parity): parity.record({}, modes=['eval'])"
    project.tests(source.format("Net(), inputs=images()"), "from models import *")
    project.run("--parity-record=golden", passed=1)
    project.tests(source.format(change), "from models import *")
    assert words in failure(project.run("--parity-against=golden", failed=1))


def test_a_damaged_record_and_one_of_other_modes_are_refused(project: Project) -> None:
    source = "def test_net(parity): parity.record(Net(), inputs=images(), modes={})"
    project.tests(source.format(["eval"]), "from models import *")
    project.run("--parity-record=golden", passed=1)
    project.tests(source.format(["eval", "train"]), "from models import *")
    assert "mode train is asked for, and recorded has none" in failure(project.run("--parity-against=golden", failed=1))
    for path in project.path.glob("golden/**/*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read as safetensors" in failure(project.run("--parity-against=golden", failed=1))


def test_a_model_without_a_float64_twin_is_recorded_and_compared_in_float32(project: Project) -> None:
    project.tests(
        """
        def single(x):
            return np.tanh(x.astype("float32"))

        def test_single(parity):
            parity.record(single, inputs=x)
        """
    )
    project.run("--parity-record=golden", passed=1)
    assert [path.name for path in project.path.glob("golden/*/*")] == ["test_single.float32.safetensors"]
    project.run("--parity-against=golden", passed=1)


def test_less_than_what_is_asked_for_never_passes(project: Project) -> None:
    source = "def test_one(parity): parity.record({}, inputs=x)"
    project.tests(source.format("tanh"))
    project.run("--parity-record=golden", "--parity-level=L2", passed=1)
    project.run("--parity-against=golden", "--parity-level=L2", passed=1)
    assert "there is no record in float64" in failure(project.run("--parity-against=golden", failed=1))
    project.run("--parity-record=golden", passed=1)
    project.tests(source.format("lambda x: np.tanh(x.astype('float32'))"))
    assert "was recorded in float64 and float32" in failure(project.run("--parity-against=golden", failed=1))


def test_a_new_record_takes_the_place_of_all_that_were_there(project: Project) -> None:
    project.tests("def test_one(parity): parity.record(tanh, inputs=x)")
    project.run("--parity-record=golden", passed=1)
    project.run("--parity-record=golden", "--parity-level=L2", passed=1)
    assert [path.name for path in project.path.glob("golden/*/*")] == ["test_one.float32.safetensors"]


@pytest.mark.parametrize(("level", "dtypes"), [("L1", ["float64"]), ("L2", ["float32"]), ("L2, L1", None)])
def test_the_level_is_that_of_the_command_line(project: Project, level: str, dtypes: list[str] | None) -> None:
    project.tests(
        """
        def test_level(parity):
            found = parity.assert_same(tanh, by_sinh, inputs=x)
            print([compared.dtype for compared in found.comparisons])
        """
    )
    result = project.run(f"--parity-level={level}", "-s", passed=1)
    result.stdout.fnmatch_lines([f"*{dtypes or ['float64', 'float32']}*".replace("[", "[[]")])


COMPARED = """
    import pytest

    def test_same(parity):
        parity.assert_same(tanh, by_sinh, inputs=x)
        parity.record(tanh, inputs=x, name="mine")

    @pytest.mark.parametrize("factor", [1, 1.5])
    def test_factor(parity, factor):
        parity.assert_same(tanh, lambda x: np.tanh(x) * x.dtype.type(factor), inputs=x)

    def test_bad(parity):
        parity.assert_same(tanh, None, inputs=x)

    def test_of_something_else():
        pass
"""


def test_the_report_holds_every_comparison_of_the_run(project: Project) -> None:
    project.tests(COMPARED)
    project.run("--parity-record=golden", "-k", "same", passed=1, deselected=4)
    result = project.run("--parity-report=out.json", "--parity-against=golden", passed=3, failed=2)
    result.stdout.fnmatch_lines(["*out.json: 5 comparisons of models"])
    found = report(project.path / "out.json")
    assert not found["passed"]
    assert [(one["test"], one["name"], one["passed"]) for one in found["comparisons"]] == [
        ("test_models.py::test_bad", None, False),
        ("test_models.py::test_factor[1.5]", None, False),
        ("test_models.py::test_factor[1]", None, True),
        ("test_models.py::test_same", None, True),
        ("test_models.py::test_same", "mine", True),
    ]
    bad, _, same, _, golden = found["comparisons"]
    assert bad["error"].startswith("None is no model; ")
    assert [level["level"] for level in same["levels"]] == ["L1", "L2"]
    assert golden["models"] == ["recorded", "now"]
    assert golden["versions"]["recorded"]["numpy"] == np.__version__
    project.run("--parity-report=out.json", "-k", "test_same", passed=1, deselected=4)
    assert report(project.path / "out.json")["passed"]


def report(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_the_report_of_several_processes_is_that_of_one(project: Project, pytester: pytest.Pytester) -> None:
    project.tests(COMPARED)
    project.run("--parity-report=one.json", "--parity-record=golden", passed=3, failed=2)
    result = pytester.runpytest_subprocess(
        *PLUGIN, "-n", "2", "--color=yes", "--parity-report=two.json", "--parity-record=several"
    )
    result.assert_outcomes(passed=3, failed=2)
    assert "\033[1;31mNOT SHOWN TO BE THE SAME\033[0m" in failure(result)
    one, two = (report(project.path / name)["comparisons"] for name in ("one.json", "two.json"))
    assert [(c["test"], c["passed"], c.get("error")) for c in one] == [
        (c["test"], c["passed"], c.get("error")) for c in two
    ]
    names = [sorted(path.name for path in (project.path / folder).glob("*/*")) for folder in ("golden", "several")]
    assert names[0] == names[1]


def test_a_report_that_cannot_be_written_is_one_line_and_no_success(project: Project) -> None:
    project.tests(
        """
        from pathlib import Path

        def test_one(parity):
            parity.assert_same(tanh, by_sinh, inputs=x)
            Path("there").rmdir()
        """
    )
    (project.path / "there").mkdir()
    result = project.run("--parity-report=there/out.json", passed=1)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["error: *out.json: cannot be written: No such file or directory; *"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--parity-level=L3"], "--parity-level L3: expected L1, L2 or L1,L2"),
        (["--parity-against=none"], "none: there is no such folder; make it with --parity-record"),
        (["--parity-record=test_models.py"], "test_models.py: this is no folder"),
        (["--parity-record=.", "--parity-against=."], "the records would be lost"),
        (["--parity-report=."], "no file can be written there"),
        (["--parity-report=none/out.json"], "no file can be written there"),
    ],
)
def test_options_that_cannot_be_followed_end_the_run_at_its_beginning(
    project: Project, options: list[str], words: str
) -> None:
    project.tests("def test_one(parity): parity.assert_same(tanh, by_sinh, inputs=x)")
    result = project.run(*options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert words in str(result.stderr)


def test_every_test_has_records_of_its_own_in_files_that_any_system_takes() -> None:
    tests = [
        *(
            "tests/test_a.py::test_b",
            "tests/test_a.py::TestB.test_b",
            "test_a.py::test_b[x/y]",
            "test_a.py::test_b[x-y]",
        ),
        *(
            "../test_a.py::test_b",
            "-/test_a.py::test_b",
            f"test_a.py::test_{'b' * 300}",
            f"test_a.py::test_{'b' * 301}",
        ),
        *("test_a.py::test_ß", "test_a.py::test_b[x:y]", "test_a.py::test_b[x\\y]"),
    ]
    stems = [stem_of(test, name) for test in tests for name in (None, "one", "../../one", "eins ü")]
    for a, b in combinations(stems, 2):
        assert str(a).lower() != str(b).lower()
    for stem in stems:
        assert not stem.is_absolute()
        assert all(len(part) < 150 and part.strip(".") and part.isascii() for part in stem.parts)
        assert not set(str(stem)) & set('<>:"\\|?* []')
    assert stem_of("tests/test_a.py::TestB::test_c", "d") == Path("tests/test_a.py/TestB.test_c-d")


@pytest.mark.slow
def test_a_model_of_another_library_is_recorded_as_its_authors_wrote_it(project: Project) -> None:
    source = """
        import numpy as np
        import torch

        def test_translator(parity):
            torch.manual_seed(0)
            model = torch.nn.Transformer(16, 2, 1, 1, 32, activation="relu", batch_first=True)
            random = np.random.default_rng(0)
            source, target = random.normal(size=(2, 5, 16)), random.normal(size=(2, 4, 16))
            parity.record(model, inputs={"src": source, "tgt": target}, loss=lambda y: (y**3).mean())
    """
    project.tests(source, "")
    project.run("--parity-record=golden", passed=1)
    project.run("--parity-against=golden", passed=1)
    project.tests(source.replace("relu", "gelu"), "")
    shown = " ".join(failure(project.run("--parity-against=golden", failed=1)).split())
    assert "takes GELU by the error function, the reference takes ReLU" in shown


CHANGE = "model.get_layer('expanded_conv_project_BN').epsilon = 0.01"


@pytest.mark.slow
def test_a_keras_application_is_recorded_as_its_authors_wrote_it(project: Project) -> None:
    import_module("keras")
    source = """
        import keras
        import numpy as np

        def test_mobile_net(parity):
            keras.utils.set_random_seed(0)
            model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
            photos = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
            parity.record(model, inputs=photos, modes=["eval"])
    """
    project.tests(source, "")
    project.run("--parity-record=golden", passed=1)
    project.run("--parity-against=golden", passed=1)
    project.tests(source.replace("parity.record", f"{CHANGE}; parity.record"), "")
    shown = " ".join(failure(project.run("--parity-against=golden", failed=1)).split())
    assert "first forwards: the output of expanded_conv_project_BN" in shown
    assert "`expanded_conv_project_BN`: yours has an eps of 0.01, the reference has an eps of 0.001" in shown
