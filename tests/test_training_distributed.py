"""The command line in several processes: PyTorch's launcher, and JAX's variables."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from common.parity.levels import DECIDABLE
from common.training import metrics

pytestmark = pytest.mark.training

OPTIONS = ["--set", "batch_size=128", "--set", "epochs=2", "--checkpoint-every", "3", "--threads", "1"]


def command(backend, out, *options):
    arguments = ["train", "resnet20", "--data", "digits", "--backend", backend, "--out", str(out)]
    return ["-m", "common.commands", *arguments, *OPTIONS, *options]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(backend, out, *options):
    """Two processes that train together, as Popen; for PyTorch the launcher alone."""
    parts = command(backend, out, "--distributed", *options)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if backend == "torch":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [subprocess.Popen([sys.executable, *launcher, *parts], **streams)]
    address = {"RESNET_PARITY_COORDINATOR": f"127.0.0.1:{free_port()}", "RESNET_PARITY_PROCESSES": "2"}
    ranks = ({"RESNET_PARITY_PROCESS": str(rank)} for rank in range(2))
    return [subprocess.Popen([sys.executable, *parts], env=os.environ | address | rank, **streams) for rank in ranks]


def ended(processes, seconds):
    """Exit codes and standard error of processes that must end in time, and say nothing that is not ours."""
    end = time.monotonic() + seconds
    said = []
    try:
        spoken = [process.communicate(timeout=max(1, end - time.monotonic())) for process in processes]
        said = [errors for _, errors in spoken]
        assert not any("Gloo" in output for output, _ in spoken)
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def trained(folder):
    return [line["loss"] for line in metrics.read(folder) if line["kind"] == "train"]


def wait_for_step(folder, step, processes):
    end = time.monotonic() + 180
    while not ((folder / metrics.NAME).exists() and len(trained(folder)) >= step):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("backend", "fsdp"), [("torch", "0"), ("torch", "1"), ("flax", "0"), ("keras:jax", "0")], ids=str
)
def test_two_processes_take_the_steps_of_one(backend, fsdp, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_PARITY_FSDP", fsdp)
    codes, said = ended(launched(backend, tmp_path / "two"), 300)
    assert not any(codes), said
    alone = subprocess.run([sys.executable, *command(backend, tmp_path / "one")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    two, one = trained(tmp_path / "two"), trained(tmp_path / "one")
    assert len(two) == len(one) == 22
    # In float64 it is proved, framework by framework. This is float32, which decides as long as rounding has not grown
    # beyond what level L2 gates: the first loss shows the batch and its statistics, the second the gradients.
    assert two[:2] == pytest.approx(one[:2], rel=DECIDABLE["float32"])
    assert not [line for text in said for line in text.splitlines() if "Traceback" in line]


@pytest.mark.parametrize(("backend", "rank"), [("torch", -1), ("flax", -1), ("flax", 0), ("keras:jax", 0)])
def test_a_killed_worker_ends_the_others_and_one_process_goes_on(backend, rank, tmp_path):
    folder = tmp_path / "run"
    processes = launched(backend, folder)
    wait_for_step(folder, 4, processes)
    workers = [p.pid for p in processes]
    if backend == "torch":
        children = psutil.Process(processes[0].pid).children(recursive=True)
        workers = [child.pid for child in children if "common.commands" in child.cmdline()]
    killed = time.monotonic()
    os.kill(workers[rank], signal.SIGKILL)
    codes, said = ended(processes, 90)
    assert time.monotonic() - killed < 60
    assert all(codes), said
    assert not (folder / "final.safetensors").exists()
    if backend != "torch":  # whose launcher may stop the other before it speaks
        assert "another process ended or did not answer" in said[rank + 1]
    alone = subprocess.run([sys.executable, *command(backend, folder, "--resume")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    assert (folder / "final.safetensors").exists()
    assert len(trained(folder)) == 22


def test_sigterm_to_the_launcher_stops_both_with_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    processes = launched("torch", folder)
    wait_for_step(folder, 4, processes)
    processes[0].send_signal(signal.SIGTERM)
    ended(processes, 90)
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    assert max(steps) >= 4
    resumed = ended(launched("torch", folder, "--resume"), 300)
    assert resumed[0] == [0], resumed[1]
    assert len(trained(folder)) == 22


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("package", ["resnet_flax", "resnet_keras"])
def test_others_that_do_not_come_are_one_line(package, rank):
    code = f"from {package} import distributed; distributed.TIMEOUT = 2; distributed.join()"
    address = {"RESNET_PARITY_COORDINATOR": f"127.0.0.1:{free_port()}", "RESNET_PARITY_PROCESSES": "2"}
    settings = {"RESNET_PARITY_PROCESS": str(rank), "KERAS_BACKEND": "jax", **address}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("resnet-parity: "))
    assert "the other processes did not join within 4 s" in line
    assert address["RESNET_PARITY_COORDINATOR"] in line
    assert "Fatal" not in done.stderr


def test_without_a_launcher_it_says_which_one(tmp_path):
    for backend, words in (("torch", "torchrun"), ("flax", "RESNET_PARITY_COORDINATOR")):
        done = subprocess.run(
            [sys.executable, *command(backend, tmp_path / "run", "--distributed")], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not (tmp_path / "run").exists()
