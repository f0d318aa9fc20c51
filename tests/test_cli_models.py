"""compare-models, record and diagnose as a user meets them: a function in a file, a process of its own, one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_cli import ROOT, called, run
from written import save_weights

from common import architectures, weights
from common.architectures.resnet import ResNetSpec

pytestmark = pytest.mark.slow

MODELS = """
import os, sys, time
import numpy as np
import torch
from torch import nn

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 16, 18)).astype("float32")


def net(eps=1e-5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=eps), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        for name, array in model.state_dict().items():
            if array.dtype == torch.float32:
                array.uniform_(0.5, 1.5)
    return model.eval()


def right():
    return net(), IMAGES


def wrong():
    return net(1e-3), IMAGES


def bare():
    return net()


def raising():
    raise RuntimeError("no weights here")


def wanting(path):
    return net()


def nothing():
    pass


def word():
    return "a word", IMAGES


def dying():
    return Dying(), IMAGES


class Dying(nn.Module):
    def forward(self, x):
        os._exit(9)


def sleeping():
    print("asleep", file=sys.stderr, flush=True)
    open(os.environ["ASLEEP"], "w").close()
    time.sleep(600)
"""
TINY = ResNetSpec(block="bottleneck", blocks=(1, 1), widths=(4, 8), stem_width=8, classes=10)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "models.py"
    path.write_text(MODELS)
    return path


def test_models_are_compared_in_processes_of_their_own(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    same = called("compare-models", f"{models}:right", f"{models}:bare", "--json", out)
    assert same.returncode == 0, same.stderr
    assert "SAME FUNCTION" in same.stdout
    assert json.loads(out.read_text())["passed"] is True
    other = called("compare-models", f"{models}:right", f"{models}:wrong", "--mode", "eval", "--json", out)
    assert other.returncode == 1
    assert "another eps: `1`: yours has an eps of 0.001, the reference has an eps of 1e-05" in other.stdout
    found = json.loads(out.read_text())
    assert [level["level"] for level in found["levels"]] == ["L1", "L2"]
    (pair,) = found["pairs"]
    assert pair["diagnosis"][0]["best"]["cause"] == "eps"
    assert pair["added"][0]["place"] == "1"


def test_a_record_of_a_model_is_compared_and_diagnosed_later(models: Path, tmp_path: Path) -> None:
    right, wrong = tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"
    for name, path in (("right", right), ("wrong", wrong)):
        made = called("record", f"{models}:{name}", "-o", path, "--mode", "eval")
        assert made.returncode == 0, made.stderr
        assert f"{path}: " in made.stdout
    assert called("compare", right, right.rename(tmp_path / "again.safetensors")).returncode == 2
    right = tmp_path / "again.safetensors"
    assert called("compare", right, wrong).returncode == 1
    for yours in (wrong, f"{models}:wrong"):
        found = called("diagnose", yours, "--against", right)
        assert found.returncode == 1, found.stderr
        assert "yours has an eps of 0.001" in found.stdout


def test_a_checkpoint_is_diagnosed_against_a_variant_and_the_field_is_named(tmp_path: Path) -> None:
    spec = architectures.find("resnet20").replace(bn_eps=1e-3)
    path = tmp_path / "mine.safetensors"
    save_weights(path, spec, weights.randomize(spec))
    found = called("diagnose", path, "--against", "resnet20", "--mode", "eval")
    assert found.returncode == 1, found.stderr
    assert "bn_eps=0.001" in found.stdout
    assert "another eps" in found.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("compare-models", "{}:right"), "1 model is named; a comparison needs at least two"),
        (("compare-models", "{}:right", "models"), "'models' names no function in a file; expected FILE.py:FUNCTION"),
        (("compare-models", "{}:right", "none.py:f"), "none.py: there is no such file"),
        (("compare-models", "{}:right", "{}:other"), "has no function other; it has net, right"),
        (("compare-models", "{}:bare", "{}:bare"), "returns a model and no inputs"),
        (("compare-models", "{}:right", "{}:raising"), "raises RuntimeError: no weights here (line "),
        (("compare-models", "{}:right", "{}:wanting"), "needs arguments (path); it is called with none"),
        (("compare-models", "{}:right", "{}:nothing"), "returns nothing; expected a model"),
        (("compare-models", "{}:right", "{}:word"), "the path 'a word' is no model"),
        (("compare-models", "{}:right", "{}:dying"), "models.py:dying: its process ended with exit code 9"),
        (("compare-models", "{}:right", "{}:bare", "--layouts", "NCHW"), "expected 2 of NCHW, NHWC"),
        (("compare-models", "{}:right", "{}:bare", "--match", "a"), "expected NAME=NAME"),
        (("compare-models", "{}:right", "{}:bare", "--inputs", "none.npy"), "none.npy: cannot be read as .npy or .npz"),
        (("compare-models", "{}:right", "{}:bare", "--mode", "tests"), "'tests' is unknown"),
        (("record", "{}:right", "resnet18", "-o", "x"), "makes the model itself; a variant would say of another"),
        (("record", "{}:dying", "-o", "x"), "models.py:dying: its process ended with exit code 9"),
        (("diagnose", "{}:right", "--against", "resnet18"), "no order of axes makes them one"),
        (("diagnose", "nowhere", "--against", "resnet18"), "'nowhere' is no file, and no variant either"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    models: Path, tmp_path: Path, command: tuple[str, ...], says: str
) -> None:
    found = called(*(word.format(models) for word in command), cwd=tmp_path)
    assert found.returncode == 2, found.stdout
    assert found.stderr.startswith("resnet-parity: ")
    assert len(found.stderr.strip().splitlines()) == 1
    assert says in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_record_of_a_network_of_ours_is_not_taken_for_a_users(models: Path, tmp_path: Path) -> None:
    path, spec = tmp_path / "ours.safetensors", tmp_path / "tiny.json"
    spec.write_text(architectures.to_json(TINY))
    assert run("record", "torch", "--spec", spec, "--size", 32, "-o", path, "--mode", "eval").returncode == 0
    found = called("diagnose", f"{models}:right", "--against", path)
    assert found.returncode == 2
    assert "is a record of a network of ours" in found.stderr


def test_a_command_that_is_stopped_ends_the_users_process_too(models: Path, tmp_path: Path) -> None:
    asleep = tmp_path / "asleep"
    process = subprocess.Popen(
        [sys.executable, "-m", "common.commands", "compare-models", f"{models}:right", f"{models}:sleeping"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ASLEEP": str(asleep)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while not asleep.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(str(asleep))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    # Whoever waits for an answer that nobody will read ends by itself.
    deadline = time.monotonic() + 60
    while _alive(str(asleep)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(str(asleep))


def _alive(word: str) -> list[int]:
    """Processes that have it in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if word in (folder / "environ").read_text(errors="replace"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def test_inputs_may_come_from_a_file(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "inputs.npy"
    np.save(path, np.random.default_rng(1).normal(size=(2, 3, 10, 9)).astype(np.float32))
    found = called("compare-models", f"{models}:bare", f"{models}:bare", "--inputs", path, "--mode", "eval")
    assert found.returncode == 0, found.stderr
