"""The run's folder, checkpoints and metrics, without a framework. Real runs are in test_training_faults.py."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from common import architectures, datasets
from common.errors import TrainingError
from common.training import metrics, run
from common.training.recipe import TrainingRecipe
from common.training.snapshots import Snapshots


def write(checkpoints, step, text="weights"):
    with checkpoints.writing(step) as folder:
        (folder / "model").write_text(f"{text} {step}")
        (folder / "deeper").mkdir()
        (folder / "deeper" / "optimizer").write_text("velocities")


@pytest.fixture
def checkpoints(tmp_path):
    made = Snapshots(tmp_path / "checkpoints", keep=3)
    made.folder.mkdir()
    return made


def never(message):
    raise AssertionError(message)


def test_the_last_checkpoints_stay_and_the_newest_is_found(checkpoints):
    assert checkpoints.newest(never) is None
    for step in (5, 10, 15, 100):
        write(checkpoints, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "step-00000010",
        "step-00000015",
        "step-00000100",
    ]
    newest = checkpoints.newest(never)
    assert (newest.step, (newest.state / "model").read_text()) == (100, "weights 100")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: flip_a_bit(path / "state" / "model"), "model was changed after it was written"),
        (lambda path: (path / "state" / "deeper" / "optimizer").unlink(), "incomplete: No such file or directory: opt"),
        (lambda path: (path / "checkpoint.json").unlink(), "incomplete: No such file or directory: checkpoint.json"),
        (lambda path: (path / "checkpoint.json").write_text("{"), "checkpoint.json is damaged"),
        (lambda path: (path / "checkpoint.json").write_text("[]"), "checkpoint.json is damaged"),
        (lambda path: (path / "checkpoint.json").write_text('{"format": "x"}'), "format is 'x'"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(checkpoints, damage, words):
    write(checkpoints, 5)
    write(checkpoints, 10)
    damage(checkpoints.folder / "step-00000010")
    heard = []
    assert checkpoints.newest(heard.append).step == 5
    assert len(heard) == 1
    assert words in heard[0]


def test_with_one_to_keep_a_damaged_newest_one_costs_no_good_one(tmp_path):
    kept = Snapshots(tmp_path / "checkpoints", keep=1)
    kept.folder.mkdir()
    write(kept, 20)
    flip_a_bit(kept.folder / "step-00000020" / "state" / "model")
    heard = []
    assert kept.newest(heard.append) is None
    assert heard[0].endswith("no other is intact, the training begins anew")
    for step in (5, 10):
        write(kept, step)
        assert kept.newest(heard.append).step == step
        assert heard[-1].endswith(f"that of step {step} is used")
    write(kept, 20)
    assert [path.name for path in kept.folder.iterdir()] == ["step-00000020"]
    assert kept.newest(never).step == 20


def test_a_damaged_one_is_not_counted_among_those_that_stay(tmp_path):
    kept = Snapshots(tmp_path / "checkpoints", keep=2)
    kept.folder.mkdir()
    write(kept, 10)
    write(kept, 20)
    flip_a_bit(kept.folder / "step-00000020" / "state" / "model")
    assert kept.newest(lambda message: None).step == 10
    write(kept, 25)
    assert sorted(path.name for path in kept.folder.iterdir()) == ["step-00000010", "step-00000025"]


def test_a_checkpoint_that_fails_half_way_leaves_nothing_and_the_one_before(checkpoints):
    write(checkpoints, 5)
    with (
        pytest.raises(TrainingError, match="No space left on device; those before it are kept"),
        checkpoints.writing(10),
    ):
        raise OSError(28, "No space left on device")
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000005"]


def test_what_a_killed_process_left_half_written_is_removed_and_never_used(checkpoints):
    write(checkpoints, 5)
    half = checkpoints.folder / ".step-00000010.part" / "state"
    half.mkdir(parents=True)
    (half / "model").write_text("half")
    assert checkpoints.newest(never).step == 5
    checkpoints.clean()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000005"]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path):
    """On a real file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        checkpoints = Snapshots(folder / "checkpoints", keep=3)
        checkpoints.folder.mkdir()
        write(checkpoints, 5)
        with pytest.raises(TrainingError, match="No space left on device"), checkpoints.writing(10) as state:
            (state / "model").write_bytes(bytes(2**21))
        assert checkpoints.newest(never).step == 5
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000005"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_metrics_go_on_from_the_step_of_the_checkpoint(tmp_path):
    first = metrics.Metrics(tmp_path, 0)
    for step in range(1, 6):
        first.add("train", step, {"loss": 1 / step})
    first.close()
    with (tmp_path / metrics.NAME).open("a") as file:
        file.write('{"kind": "train", "st')  # cut off by a kill
    second = metrics.Metrics(tmp_path, 3)
    second.add("train", 4, {"loss": 9.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in metrics.read(tmp_path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 9.0),
    ]


@pytest.mark.slow
def test_tensorboard_reads_the_curves_of_a_resumed_run(tmp_path):
    for start, stop, loss in ((0, 5, 1.0), (3, 7, 2.0)):
        writer = metrics.Metrics(tmp_path, start)
        for step in range(start + 1, stop + 1):
            writer.add("train", step, {"loss": loss})
        writer.close()
    code = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps([(e.step, e.value) for e in events.Scalars("train/loss")]))
"""
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    points = json.loads(ran.stdout.splitlines()[-1])
    assert points == [[step, 1.0 if step <= 3 else 2.0] for step in range(1, 8)]


def test_writing_metrics_imports_no_framework(tmp_path):
    code = "import common.training.metrics as m, sys; m.Metrics(__import__('pathlib').Path(sys.argv[1]), 0).close(); "
    code += "print([name for name in ('tensorflow', 'torch', 'jax', 'keras') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_run_of_a_version_that_lacked_a_field_goes_on_with_its_default(tmp_path):
    given = {"dataset": datasets.open("digits"), "data": "digits", "recipe": TrainingRecipe(), "backend": "torch"}
    plan = run.Plan(variant="resnet20", spec=architectures.find("resnet20"), **given)
    run.begin(tmp_path / "run", plan, {})
    facts = run.facts(tmp_path / "run")
    del facts["spec"]["unused_projection"], facts["recipe"]["auxiliary_weights"]

    def begun_with(**fields):
        content = facts | {"spec": facts["spec"] | fields}
        (tmp_path / "run" / run.FILE).write_text(json.dumps(content))
        run.check_same(tmp_path / "run", plan)

    begun_with()
    with pytest.raises(TrainingError, match="with spec relu_before_add=True, not relu_before_add=False"):
        begun_with(relu_before_add=True)
    with pytest.raises(TrainingError, match=r"was begun with another version's spec: .*colour.*; begin anew"):
        begun_with(colour="red")
