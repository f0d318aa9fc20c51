"""The embedded default, whole: the scans of digits in every framework, from three seeds."""

import subprocess
import sys
import time

import pytest

from common.training import metrics

pytestmark = [pytest.mark.training, pytest.mark.timeout(1800)]

BACKENDS = ("torch", "keras", "flax")
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory):
    """Test accuracy by backend and seed, and the seconds that each command took."""
    found, seconds = {}, {}
    for seed in SEEDS:
        for backend in BACKENDS:
            folder = tmp_path_factory.mktemp("digits") / "run"
            arguments = ["train", "resnet20", "--data", "digits", "--backend", backend, "--set", f"seed={seed}"]
            started = time.perf_counter()
            command = [sys.executable, "-m", "common.commands", *arguments, "--out", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            seconds[backend, seed] = time.perf_counter() - started
            assert done.returncode == 0, done.stderr
            found[backend, seed] = metrics.read(folder)[-1]["accuracy"]
    return found, seconds


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_reaches_98_percent_from_every_seed(accuracies, backend):
    assert min(accuracies[0][backend, seed] for seed in SEEDS) >= 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_the_frameworks_end_within_a_point_of_each_other(accuracies, seed):
    ends = [accuracies[0][backend, seed] for backend in BACKENDS]
    assert max(ends) - min(ends) <= 0.01


def test_no_run_takes_three_minutes(accuracies):
    """On two cores, compilation included, with another part of the suite beside it."""
    assert max(accuracies[1].values()) < 180, accuracies[1]
