"""`examples/port`: the right ports pass, and the faulty ones are told their mistake, as its README has it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PORT = ROOT / "examples" / "port"
# By the faulty port: its test, and the first place, the cause and the remedy that it is to be told.
FAULTS = {
    "vit_flax.py:faulty_gelu": (
        "test_gelu",
        "the input of block0/down (blocks.0.mlp.2)",
        "activation",
        "In Flax use nn.gelu(x, approximate=False).",
    ),
    "vit_flax.py:faulty_eps": (
        "test_eps",
        "block0/norm1 (blocks.0.norm1)",
        "eps",
        "In Flax give the norm epsilon=1e-05.",
    ),
    "resnet_linen.py:faulty_padding": (
        "test_padding",
        "stage2_block1/Conv_1 (stages.1.0.spatial)",
        "padding",
        "In Flax give padding=((1, 1), (1, 1)).",
    ),
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def ported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What pytest prints of the examples, and the report of every comparison by the name of its test."""
    report = tmp_path_factory.mktemp("port") / "report.json"
    # As it is where the package is installed: the entry point may not be there yet.
    plugin = ("-p", "no:parity", "-p", "common.pytest_plugin", "-p", "no:cacheprovider")
    done = run("pytest", *plugin, "--color=no", f"--parity-report={report}", str(PORT))
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    found = json.loads(report.read_text())["comparisons"]
    return done.stdout, {one["test"].rpartition("::")[2]: one for one in found}


@pytest.mark.slow
def test_the_right_ports_pass_and_the_faulty_ones_fail(ported: tuple[str, dict[str, Any]]) -> None:
    stdout, found = ported
    assert re.search(r"3 failed, 2 passed in", stdout)
    assert {name for name, one in found.items() if not one["passed"]} == {name for name, *_ in FAULTS.values()}


@pytest.mark.slow
@pytest.mark.parametrize(("test", "place", "cause", "remedy"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_port_is_told_its_mistake(
    ported: tuple[str, dict[str, Any]], test: str, place: str, cause: str, remedy: str
) -> None:
    [pair] = ported[1][test]["pairs"]
    [defect] = pair["diagnosis"]
    assert (defect["best"]["place"], defect["best"]["cause"], defect["best"]["remedy"]) == (place, cause, remedy)


@pytest.mark.slow
def test_the_readme_shows_what_is_said(ported: tuple[str, dict[str, Any]]) -> None:
    def told(text: str) -> list[str]:
        """What comes first of every diagnosis, without the measured numbers behind it."""
        return sorted(re.findall(r" 1\. (.*?); so changed", " ".join(text.split())))

    assert told((PORT / "README.md").read_text()) == told(ported[0])
    assert len(told(ported[0])) == len(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_command_says_the_same(fault: str, tmp_path: Path) -> None:
    _, place, cause, remedy = FAULTS[fault]
    original = "vit_torch.py:model" if fault.startswith("vit") else "resnet50_torch.py:model"
    command = ("diagnose", f"{PORT / fault}", "--against", f"{PORT / original}", "--mode", "eval")
    done = run("common.commands", *command, "--json", f"{tmp_path / 'why.json'}")
    assert done.returncode == 1, done.stderr
    [pair] = json.loads((tmp_path / "why.json").read_text())["pairs"]
    [defect] = pair["diagnosis"]
    assert (defect["best"]["place"], defect["best"]["cause"]) == (place, cause)
    assert remedy in done.stdout
