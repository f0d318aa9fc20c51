"""Damaged and hostile checkpoints: at least 2,000 mutated files over all formats, each refused in a line or read.

What carries a checksum, our canonical file and PyTorch's zip, must never give other values than were written.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_checkpoints import BOTTLENECK, EVERY, written
from written import save_weights

from common import weights as canonical

PER_FORMAT = 160
CHECKED = [("canonical", "w.safetensors"), ("torchvision", "w.pth"), ("huggingface", "w.bin")]
LEGACY = ("torchvision before 1.6", "w.pth")  # read, and written by PyTorch alone
SCRIPT = Path(__file__).parent / "fuzz_checkpoints.py"


def run(path, first, count):
    """Outcomes of `count` mutations; a process that dies is an outcome of the mutation it died of."""
    outcomes, done = [], 0
    while done < count:
        command = [sys.executable, str(SCRIPT), str(path), str(first + done), str(count - done)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        lines = [json.loads(line) for line in finished.stdout.splitlines()]
        got = [line["outcome"] for line in lines if "outcome" in line]
        outcomes += got
        done += len(got)
        if finished.returncode:
            outcomes.append(f"the process ended with {finished.returncode}: {finished.stderr[-500:]}")
            done += 1
        else:
            assert lines[-1]["peak_kib"] < 2 * 2**20  # a tiny network; a claim of gigabytes was believed otherwise
    return outcomes


def test_at_least_two_thousand_files_are_tried():
    assert len(EVERY) * PER_FORMAT >= 2000


@pytest.mark.slow
@pytest.mark.parametrize("format_", [*EVERY, LEGACY], ids=":".join)
def test_a_mutated_file_is_refused_in_a_line_or_read(tmp_path, format_):
    if format_ == LEGACY:
        save_weights(tmp_path / "zip.pth", BOTTLENECK, canonical.randomize(BOTTLENECK, dtype="float32"))
        path = tmp_path / format_[1]
        torch.save(torch.load(tmp_path / "zip.pth"), path, _use_new_zipfile_serialization=False)
    else:
        path = written(tmp_path, format_, BOTTLENECK, canonical.randomize(BOTTLENECK, dtype="float32"))
    counted = Counter(run(path, 0, PER_FORMAT))
    allowed = {"refused", "same"} if format_ in CHECKED else {"refused", "same", "changed"}
    assert set(counted) <= allowed, counted
    # The mutations reach the file: a test in which all stay harmless shows nothing.
    assert counted["refused"] > PER_FORMAT // 10, counted
