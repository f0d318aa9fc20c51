"""Real runs of the command line, killed, stopped, starved and poisoned, in every framework."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors.numpy import load_file

from common.errors import TrainingError
from common.training import metrics, run

pytestmark = pytest.mark.training

BACKENDS = ("torch", "keras", "flax")
# Two epochs of 11 steps on the scans: short, and past the end of an epoch.
SHORT = ["--set", "batch_size=128", "--set", "epochs=2", "--set", "ema_decay=0.9", "--checkpoint-every", "3"]
# Kills of each backend; 20 in all. PyTorch starts in a third of the time of the others.
KILLS = {"torch": 10, "keras": 5, "flax": 5}


def command(backend, out, *options):
    arguments = ["train", "resnet20", "--backend", backend, "--data", "digits", "--threads", "1", "--out", str(out)]
    return [sys.executable, "-m", "common.commands", *arguments, *options]


def begun(backend, out, *options):
    return subprocess.Popen(command(backend, out, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ran(backend, out, *options):
    return subprocess.run(command(backend, out, *options), capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One undisturbed run of each backend, made when it is first asked for."""
    made = {}

    def of(backend):
        if backend not in made:
            made[backend] = tmp_path_factory.mktemp("whole") / backend
            done = ran(backend, made[backend], *SHORT)
            assert done.returncode == 0, done.stderr
        return made[backend]

    return of


def same_bits(a, b):
    """Of the arrays: the order of a safetensors file's metadata differs from time to time."""
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def wait_for(process, condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def step_of(folder):
    """The last step whose metrics are written."""
    path = folder / metrics.NAME
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(backend, whole, tmp_path):
    expected = whole(backend)
    chance, folder, times = random.Random(backend), tmp_path / "run", 0
    half_written = 0
    while times < KILLS[backend]:
        # Each life ends at most three steps after the newest checkpoint, so that the next ones have something to do.
        newest = max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0)
        process = begun(backend, folder, *SHORT, "--resume")
        if times % 3 == 1:
            # In the middle of a checkpoint.
            there = wait_for(process, lambda: any(folder.glob("checkpoints/.step-*.part/state")))
            time.sleep(chance.random() * 0.02)
        else:
            until = newest + 1 + chance.randrange(2)
            there = wait_for(process, lambda until=until: step_of(folder) >= until)
            time.sleep(chance.random() * 0.02)
        process.kill()
        process.communicate()
        half_written += any(folder.glob("checkpoints/.step-*.part"))
        if not there or (folder / "final.safetensors").exists():
            shutil.rmtree(folder)  # it had come to its end: begin anew
            continue
        times += 1
    done = ran(backend, folder, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    for name in ("final.safetensors", "final-ema.safetensors"):
        assert same_bits(folder / name, expected / name)
    assert half_written, "no kill hit a checkpoint that was being written"
    # The metrics are those of one run: every step once, with the same numbers.
    lives = [[(line["kind"], line["step"], line["loss"]) for line in metrics.read(f)] for f in (folder, expected)]
    assert lives[0] == lives[1]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step-00000018",
        "step-00000021",
        "step-00000022",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_it(backend, whole, tmp_path):
    folder = tmp_path / "run"
    process = begun(backend, folder, *SHORT)
    assert wait_for(process, lambda: step_of(folder) >= 4)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    stopped = int(errors.partition("after step ")[2].split()[0])
    assert (folder / "checkpoints" / f"step-{stopped:08d}" / "checkpoint.json").exists()
    assert not (folder / "final.safetensors").exists()
    done = ran(backend, folder, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert same_bits(folder / "final.safetensors", whole(backend) / "final.safetensors")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_terminal_hears_of_epochs_and_nothing_of_the_framework(backend, tmp_path):
    done = ran(backend, tmp_path / "run", "--set", "batch_size=128", "--set", "epochs=1")
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("epoch   1.0  loss ")
    assert done.stdout.startswith(f"{tmp_path / 'run'}: resnet20 on digits by")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_not_finite_stops_names_the_layer_and_keeps_the_last_good_checkpoint(backend, tmp_path):
    folder = tmp_path / "run"
    options = ["--set", "lr=1e25", "--set", "warmup_steps=0", "--set", "warmup_epochs=0", "--checkpoint-every", "1"]
    done = ran(backend, folder, "--set", "batch_size=128", "--set", "epochs=1", *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "the loss is" in done.stderr
    assert "is the first layer whose output is not finite" in done.stderr or "not finite;" in done.stderr
    step = int(done.stderr.partition("the checkpoint of step ")[2].split()[0])
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (folder / "final.safetensors").exists()


def damage(checkpoint):
    """Flip a bit in the largest file of a checkpoint."""
    inside = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(inside.read_bytes())
    data[len(data) // 2] ^= 1
    inside.write_bytes(data)
    return inside


def test_a_corrupt_newest_checkpoint_is_said_and_the_one_before_gives_the_same_end(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("torch"), folder)
    (folder / "final.safetensors").unlink()
    newest = max((folder / "checkpoints").iterdir())
    inside = damage(newest)
    done = ran("torch", folder, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest}: state/{inside.name} was changed after it was written; that of step 21 is used" in done.stderr
    assert same_bits(folder / "final.safetensors", whole("torch") / "final.safetensors")


def test_a_run_whose_one_checkpoint_is_corrupt_begins_anew_and_keeps_what_it_writes(whole, tmp_path):
    folder, options = tmp_path / "run", [*SHORT, "--keep", "1"]
    shutil.copytree(whole("torch"), folder)
    (folder / "final.safetensors").unlink()
    *older, newest = sorted((folder / "checkpoints").iterdir())
    for path in older:
        shutil.rmtree(path)
    damage(newest)
    process = begun("torch", folder, *options, "--resume")
    assert wait_for(process, lambda: (folder / "checkpoints" / "step-00000006").exists())
    process.kill()
    _, errors = process.communicate()
    assert f"{newest}: " in errors
    assert errors.endswith("was changed after it was written; no other is intact, the training begins anew\n")
    done = ran("torch", folder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest}: " in done.stderr
    resumed = int(done.stderr.partition("that of step ")[2].split()[0])
    assert resumed >= 6
    assert f"({resumed} of them before)" in done.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000022"]
    assert same_bits(folder / "final.safetensors", whole("torch") / "final.safetensors")


def test_a_kill_between_a_checkpoint_and_the_evaluation_after_it_loses_no_evaluation(whole, tmp_path):
    # The epoch's last step is a checkpoint's too: it is written first, then the test images are measured.
    options = [*SHORT[:-1], "11"]
    for life in range(5):
        folder = tmp_path / f"run{life}"
        process = begun("torch", folder, *options)
        assert wait_for(process, lambda folder=folder: (folder / "checkpoints" / "step-00000011").exists())
        process.send_signal(signal.SIGSTOP)  # so that what is looked at is what the kill leaves
        evaluated = [line for line in metrics.read(folder) if line["kind"] == "test"]
        process.kill()
        process.communicate()
        if not evaluated:
            break
    assert not evaluated, "no kill came between the two"
    done = ran("torch", folder, *options, "--resume")
    assert done.returncode == 0, done.stderr
    lives = [[(line["kind"], line["step"], line["loss"]) for line in metrics.read(f)] for f in (folder, whole("torch"))]
    assert lives[0] == lives[1]
    assert [step for kind, step, _ in lives[0] if kind == "test"] == [11, 22]


def test_a_full_disk_stops_with_one_line_and_keeps_what_there_is(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        # A checkpoint takes some 3 MB: the first fits, and with --keep 9 some later one does not.
        done = ran("torch", folder / "run", *SHORT, "--keep", "9")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "the checkpoint cannot be written" in done.stderr
        assert [path.name for path in (folder / "run" / "checkpoints").iterdir()], "none was kept"
        assert not list((folder / "run" / "checkpoints").glob(".*"))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_weights_of_a_run_go_on_in_another_framework(whole, tmp_path):
    final = whole("torch") / "final.safetensors"
    losses = {}
    for backend in BACKENDS:
        done = ran(backend, tmp_path / backend, "--init", str(final), "--set", "batch_size=128", "--set", "steps=1")
        assert done.returncode == 0, done.stderr
        losses[backend] = metrics.read(tmp_path / backend)[0]["loss"]
    first, last = (metrics.read(whole("torch"))[line]["loss"] for line in (0, -2))
    assert abs(losses["torch"] - last) < (first - last) / 4
    assert losses["keras"] == pytest.approx(losses["torch"], rel=1e-5)
    assert losses["flax"] == pytest.approx(losses["torch"], rel=1e-5)


def test_another_recipe_data_or_network_does_not_go_on_in_the_folder(whole):
    for options, words in (
        (["--set", "lr=0.01"], "was begun with recipe learning_rate=0.1, not learning_rate=0.01"),
        (["--backend", "flax"], "was begun with backend 'torch', not 'flax'"),
    ):
        done = ran("torch", whole("torch"), *SHORT, "--resume", *options)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_run_does_not_go_on_with_other_images(tmp_path):
    photos, folder = tmp_path / "photos", tmp_path / "run"
    for label in range(2):
        (photos / str(label)).mkdir(parents=True)
        for n in range(6):
            Image.new("RGB", (8, 8), (100 * label + n,) * 3).save(photos / str(label) / f"{n}.png")
    data = ["--data", str(photos), "--recipe", "digits", "--set", "batch_size=4", "--set", "epochs=1"]
    assert ran("torch", folder, *data).returncode == 0
    (photos / "0" / "3.png").rename(photos / "0" / "30.png")
    done = ran("torch", folder, *data, "--resume")
    assert done.returncode == 2
    assert "was begun with train checksum=" in done.stderr
    assert f"what is in {photos} has changed since" in done.stderr
    (photos / "0" / "30.png").rename(photos / "0" / "3.png")
    assert ran("torch", folder, *data, "--resume").returncode == 0


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = ran("torch", tmp_path)
    assert done.returncode == 2
    assert "is there already and not empty" in done.stderr
    done = ran("torch", tmp_path, "--resume")
    assert done.returncode == 2
    assert "not the folder of a run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "optimiser=sgd"], "did you mean 'optimizer'?"),
        (["--set", "batch_size=4000"], "batch_size=4000"),
        (["--recipe", "digit"], "did you mean 'digits'?"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--init", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (["--backend", "torhc"], "did you mean 'torch'?"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_folder(options, words, tmp_path):
    done = ran("torch", tmp_path / "run", *options)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_network_are_refused(tmp_path):
    arguments = ["train", "resnet50", "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "common.commands", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "8x8, too small for resnet50" in done.stderr
    assert "--set augmentation.size=32" in done.stderr


def test_evaluate_measures_what_the_run_measured_in_every_framework(whole):
    final = whole("torch") / "final.safetensors"
    last = metrics.read(whole("torch"))[-1]
    for backend in BACKENDS:
        arguments = ["evaluate", "--weights", str(final), "--data", "digits", "--backend", backend]
        done = subprocess.run([sys.executable, "-m", "common.commands", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"accuracy {last['accuracy']:.2%}" in done.stdout
        assert f"loss {last['loss']:.4f}" in done.stdout
        assert not done.stderr


def test_images_held_out_are_evaluated_after_every_epoch_and_the_test_images_at_the_end(tmp_path):
    folder, picture = tmp_path / "run", tmp_path / "curves.svg"
    done = ran("torch", folder, "--set", "validation=100", "--set", "epochs=2", "--set", "ema_decay=0.9")
    assert done.returncode == 0, done.stderr
    lines = [line for line in metrics.read(folder) if line["kind"] != "train"]
    assert [(line["kind"], line["epoch"]) for line in lines] == [("validation", 1), ("validation", 2), ("test", 2)]
    words = [" ".join(line.split()[4:6]) for line in done.stderr.splitlines()]
    assert words == ["validation loss", "validation loss", "test loss"]
    accuracy = f"accuracy {lines[-1]['accuracy']:.2%}"
    assert accuracy in done.stdout
    # The command to evaluate means the test images, whatever a recipe holds out of the others.
    evaluate = [
        sys.executable,
        "-m",
        "common.commands",
        "evaluate",
        "--weights",
        str(folder / "final.safetensors"),
    ]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(run.facts(folder)["recipe"]))
    found = subprocess.run([*evaluate, "--recipe", str(recipe)], capture_output=True, text=True)
    assert accuracy in found.stdout
    assert "of 355)" in found.stdout
    found = subprocess.run([*evaluate, "--set", "validation=100"], capture_output=True, text=True)
    assert f"accuracy {lines[1]['accuracy']:.2%}" in found.stdout
    plotted = subprocess.run([sys.executable, "-m", "common.commands", "plot", str(folder), "-o", str(picture)])
    assert plotted.returncode == 0


def test_plot_draws_the_runs_over_each_other(whole, tmp_path):
    picture = tmp_path / "curves.png"
    arguments = ["plot", str(whole("torch")), str(whole("flax")), "-o", str(picture)]
    done = subprocess.run([sys.executable, "-m", "common.commands", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run(
        [sys.executable, "-m", "common.commands", "plot", str(tmp_path), "-o", str(picture)],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "not the folder of a run" in refused.stderr


def test_a_damaged_run_file_is_one_line(tmp_path):
    for content in ("", "[]", "{}", '{"format": 1}', json.dumps({"format": "resnet-parity run 1"})):
        (tmp_path / run.FILE).write_text(content)
        with pytest.raises(TrainingError):
            run.facts(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_loss_is_printed_every_so_many_steps(backend, tmp_path):
    options = ["--set", "batch_size=128", "--set", "steps=13", "--print-every", "4"]
    done = ran(backend, tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics.read(tmp_path / "run") if line["kind"] == "train"]
    words = [line.split() for line in done.stderr.splitlines()]
    printed = [(line[3], line[5]) for line in words if "step" in line]
    assert printed == [(str(n), f"{sum(losses[n - 4 : n]) / 4:.4f}") for n in (4, 8, 12)]
    assert sum("test" in line for line in words) == 2  # the lines of epochs are as ever


def test_a_run_begun_with_the_recipes_of_before_is_told_so(whole, tmp_path):
    folder = shutil.copytree(whole("torch"), tmp_path / "run")
    facts = run.facts(folder)
    facts["recipe"]["augmentation"] = {"pad": 1, "flip": False}
    (folder / run.FILE).write_text(json.dumps(facts))
    done = ran("torch", folder, "--resume")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"{folder}: was begun with another version's recipe: augmentation={{'pad': 1, 'flip': False}}" in line
