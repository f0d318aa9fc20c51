"""The degradation experiment: what it trains, what it finds, how it stops and goes on."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import records
from experiment_requests import FirstSteps, NormsByAStep
from PIL import Image
from safetensors.numpy import load_file

from common import architectures, datasets
from common.architectures.resnet import ResNetSpec
from common.backends.process import BackendProcess
from common.commands import experiment
from common.commands.train import Material
from common.errors import BackendError, InputError, ParityError, RecipeError, TrainingError
from common.report import degradation as report
from common.training import degradation, metrics
from common.training import run as runs
from common.training.degradation import Found, Training, Watcher
from common.training.recipe import PRESETS, TrainingRecipe
from common.training.run import Plan

ROOT = Path(__file__).parent.parent
DIGITS = datasets.open("digits")
TINY = ResNetSpec(
    block="basic",
    blocks=(1, 1),
    widths=(4, 8),
    stem_width=4,
    stem_kernel=3,
    stem_stride=1,
    stem_pool=False,
    classes=10,
    in_channels=1,
    shortcut="zero_pad",
)
RECIPE = degradation.DIGITS.replace(batch_size=700, epochs=2, warmup_epochs=0)  # two steps to an epoch


def command(out: object, *options: object) -> list[str]:
    arguments = ["experiment", "degradation", "--out", out, *options]
    return [sys.executable, "-m", "common.commands", *map(str, arguments)]


def ran(out: object, *options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), capture_output=True, text=True, cwd=ROOT)


def plan(variant: str = "plain20", spec: ResNetSpec = TINY, **changes: Any) -> Plan:
    recipe = RECIPE.replace(**changes)
    return Plan(variant=variant, spec=spec, dataset=DIGITS, data="digits", recipe=recipe, backend="torch")


def tiny(folder: Path, *seeds: int, **changes: Any) -> list[Training]:
    return degradation.trainings([plan(seed=seed, **changes) for seed in seeds], folder)


def made_up(network: str, seed: int, train: list[float], test: list[float], norms: list[float]) -> Found:
    training = Training(plan=plan(network, seed=seed), folder=Path("nowhere"))
    start = {f"layer{n}": norm for n, norm in enumerate(norms)}
    halved = {name: norm / 2 for name, norm in start.items()}
    return Found(training=training, part="test", train=tuple(train), test=tuple(test), start=start, end=halved)


def all_networks(seeds: tuple[int, ...] = (0, 1)) -> list[Found]:
    last = {"plain20": 0.02, "plain56": 0.6, "resnet20": 0.01, "resnet56": 0.005}
    return [
        made_up(name, seed, [0.9, error + seed / 100], [0.8, error], [8.0 * (seed + 1), 2.0, 1.0, 5.0])
        for name, error in last.items()
        for seed in seeds
    ]


# What it is.


def test_the_networks_are_those_of_the_paper_and_differ_in_their_shortcuts_alone() -> None:
    depths = {}
    for plain, residual in zip(*degradation.KINDS.values(), strict=True):
        spec = architectures.find(plain)
        assert spec == architectures.find(residual).replace(shortcut="none")
        depths[plain] = len(degradation.kernels(spec))
        # The parameter-free shortcut: not an array more, so that nothing but the addition differs.
        assert degradation.kernels(spec).keys() == degradation.kernels(architectures.find(residual)).keys()
    assert depths == {"plain20": 20, "plain56": 56}


def test_kernels_come_in_the_order_of_the_walk_and_each_once() -> None:
    spec = architectures.find("resnet20")
    found = degradation.kernels(spec)
    assert list(found)[:3] == ["stem.conv", "stages.0.blocks.0.conv1", "stages.0.blocks.0.conv2"]
    assert list(found)[-1] == "head.fc"
    assert found["head.fc"] == "head.fc.kernel"
    shared = degradation.kernels(architectures.find("resnet18.shared_conv"))
    assert len(set(shared.values())) == len(shared) < len(degradation.kernels(architectures.find("resnet18")))


def test_other_data_take_the_recipe_made_for_them_with_nothing_held_out(tmp_path: Path) -> None:
    names = "\n".join(f"class{n}" for n in range(10))
    (tmp_path / "batches.meta.txt").write_text(names + "\n")
    images, labels = np.zeros((40, 32, 32, 3), np.uint8), np.arange(40) % 10
    for part in ("test_batch", *(f"data_batch_{n}" for n in range(1, 6))):
        (tmp_path / f"{part}.bin").write_bytes(records(images, labels))
    material = Material(data=str(tmp_path), settings=["seed=7"])
    members, recipe = experiment.members_of(tmp_path / "out", material, "torch", 2, None)
    assert recipe == PRESETS["cifar2015"].replace(validation=0, seed=7)
    assert [member.folder.name for member in members[:3]] == ["plain20-7", "plain20-8", "plain56-7"]
    for member in members:
        assert member.plan.spec == architectures.find(member.plan.variant)
        assert member.plan.recipe == recipe.replace(seed=member.seed)


# What it says.


def test_the_table_has_a_row_for_each_network_and_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=132).print(report.table(all_networks()))
    header, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(degradation.NETWORKS)
    assert rows[1].split() == [
        "plain56",
        "4",
        "60.50",
        "60.00",
        "…",
        "61.00",
        "60.00",
        "60.00",
        "…",
        "60.00",
        *rows[1].split()[-2:],
    ]
    # Of the first convolution over the last one: 8 and 16, whose geometric mean is 11.3; the dense layer is left out.
    assert rows[1].split()[-2:] == ["11.3", "11.3"]
    ends = {len(row.rstrip()) for row in (header, *rows)}
    assert len(ends) == 1


def test_the_verdict_is_the_deeper_networks_training_error_less_the_shallower_ones_seed_by_seed() -> None:
    plain, residual = report.verdicts(all_networks())
    assert plain == "plain: plain56 has +58.00 points of training error over plain20 (+58.00, +58.00)"
    assert residual == "residual: resnet56 has -0.50 points of training error over resnet20 (-0.50, -0.50)"


def test_figures_and_table_are_written_whole(tmp_path: Path) -> None:
    facts = {"backend": "torch", "data": "digits", "recipe": {}}
    paths = report.write(tmp_path, all_networks(), facts)
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    for path in paths[:2]:
        with Image.open(path) as picture:
            picture.load()
            assert (picture.format, picture.size) == ("PNG", (1500, 675))
    data = json.loads(paths[2].read_text())
    assert data["backend"] == "torch"
    assert data["deeper_minus_shallower"]["plain"]["train_error"] == pytest.approx([0.58, 0.58])
    assert [(run["network"], run["seed"]) for run in data["runs"]] == [
        (n, s) for n in degradation.NETWORKS for s in (0, 1)
    ]


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    def full(self: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(TrainingError, match=r"errors\.png: cannot be written: No space left"):
        report.write(tmp_path, all_networks(), {"backend": "torch", "data": "digits"})
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_has_vanished_is_drawn_and_tabled(tmp_path: Path) -> None:
    gone = [made_up(name, 0, [0.9], [0.9], [0.0, 0.0, 0.0, 1.0]) for name in degradation.NETWORKS]
    assert [next(iter(column.cells)) for column in report.table(gone).columns[-2:]] == ["none", "none"]
    assert len(report.write(tmp_path, gone, {"backend": "torch", "data": "digits"})) == 3


def test_errors_by_epoch_are_the_means_of_its_steps(tmp_path: Path) -> None:
    (member,) = tiny(tmp_path, 0)
    member.folder.mkdir(parents=True)
    lines = [
        ("train", 1, 0.5),
        ("train", 2, 0.7),
        ("test", 2, 0.6),
        ("train", 3, 0.8),
        ("train", 4, 0.9),
        ("test", 4, 0.75),
    ]
    written = [json.dumps({"kind": kind, "step": step, "accuracy": accuracy}) for kind, step, accuracy in lines]
    (member.folder / metrics.NAME).write_text("\n".join(written) + "\n")
    assert degradation.epochs_done(member) == 2
    (member.folder / degradation.GRADIENTS).write_text('{"start": {"a": 1.0}, "end": {"a": 2.0}}')
    found = degradation.found(member)
    assert found.train == pytest.approx((0.4, 0.15))
    assert found.test == pytest.approx((0.4, 0.25))
    (member.folder / degradation.GRADIENTS).write_text('{"start": ')
    with pytest.raises(TrainingError, match="measurements are damaged; remove the folder"):
        degradation.found(member)


# What it does, on networks so small that only a process's start takes time.


@pytest.mark.slow
def test_norms_are_those_of_the_step_that_is_taken(tmp_path: Path) -> None:
    recipe = {"momentum": 0.0, "weight_decay": 0.0, "batch_size": 32}
    with BackendProcess("torch") as process:
        moved, norms = process.ask(NormsByAStep(plan=plan(**recipe)))
    assert moved == pytest.approx(norms, rel=1e-9)
    assert len(norms) == 6


@pytest.mark.training
def test_what_is_finished_is_not_trained_again_and_what_is_not_goes_on(tmp_path: Path) -> None:
    members = tiny(tmp_path, 0, 1)
    heard: list[str] = []
    ended: list[str] = []
    watcher = Watcher(
        told=lambda worker, member, what: heard.append(f"{member.seed} {what}"),
        ended=lambda member, answer: ended.append(member.title),
    )
    assert degradation.conduct(members, "torch", 1, 1, watcher)
    assert ended == ["plain20, seed 0", "plain20, seed 1"]
    assert [line.partition(",")[0] for line in heard if "epoch" in line] == [
        "0 epoch 1",
        "0 epoch 2",
        "1 epoch 1",
        "1 epoch 2",
    ]
    first = [degradation.found(member) for member in members]
    assert all(len(one.train) == len(one.test) == 2 and len(one.start) == len(one.end) == 6 for one in first)
    assert first[0].start != first[1].start

    # As a process that was killed leaves them: one with its training done and not its gradients, one just made.
    (members[0].folder / degradation.GRADIENTS).unlink()
    for path in [*members[1].folder.rglob("*")]:
        if path.is_file():
            path.unlink()
    heard.clear()
    assert degradation.conduct(members, "torch", 1, 1, watcher)
    assert [line.partition(",")[0] for line in heard if "epoch" in line] == ["1 epoch 1", "1 epoch 2"]
    assert [degradation.found(member) for member in members] == first

    def never(*_: object) -> None:
        raise AssertionError("a finished run was touched")

    assert degradation.conduct(members, "torch", 2, 1, Watcher(told=never, ended=never))


@pytest.mark.training
def test_the_first_failure_ends_all_and_names_its_run(tmp_path: Path) -> None:
    members = tiny(tmp_path, 0, 1, learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"^plain20, seed 0: the loss is nan at step 2"):
        degradation.conduct(members, "torch", 1, 1, Watcher())
    assert not members[1].folder.exists()


@pytest.mark.slow
def test_told_to_stop_before_anything_is_done_it_does_nothing(tmp_path: Path) -> None:
    members, before = tiny(tmp_path, 0, 1), set(threading.enumerate())
    assert not degradation.conduct(members, "torch", 2, 1, Watcher(stop=lambda: True))
    assert not (tmp_path / "runs").exists()
    assert set(threading.enumerate()) <= before


# What it refuses.


def refused(error: type[ParityError], match: str, *arguments: object) -> None:
    from typer.main import get_command

    from common.commands.main import app

    with pytest.raises(error, match=match):
        get_command(app).main(["experiment", *map(str, arguments)], standalone_mode=False)


def test_bad_input_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(InputError, "unknown experiment 'degradatoin'; did you mean 'degradation'", "degradatoin", "--out", out)
    one = ("degradation", "--out", out)
    refused(BackendError, "unknown backend 'troch'; did you mean 'torch'", *one, "--backend", "troch")
    refused(ParityError, "no such folder or archive", *one, "--data", tmp_path / "absent")
    refused(RecipeError, "unknown recipe", *one, "--recipe", "digit")
    refused(RecipeError, "batch_size=2000; digits has 1442", *one, "--set", "batch_size=2000")
    assert not out.exists()


def test_a_folder_that_is_not_one_of_an_experiment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    one = ("degradation", "--out", tmp_path)
    refused(TrainingError, "is there already and not empty", *one)
    refused(TrainingError, "not the folder of an experiment: No such file or directory", *one, "--resume")
    (tmp_path / degradation.FILE).write_text('{"format": "x", "experiment": "y"}')
    refused(TrainingError, "is of 'x', 'y'; expected", *one, "--resume")
    for damaged in (
        "{",
        "[]",
        "{}",
        '{"format": "resnet-parity experiment 1", "experiment": "degradation", "recipe": {"lr": 1}}',
    ):
        (tmp_path / degradation.FILE).write_text(damaged)
        refused(TrainingError, "experiment.json is damaged", *one, "--resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == [degradation.FILE, "thesis.tex"]
    refused(TrainingError, "is there already", "degradation", "--out", tmp_path / "thesis.tex")
    refused(TrainingError, "is there already", "degradation", "--out", tmp_path / "thesis.tex", "--resume")


def test_it_does_not_go_on_by_another_recipe_or_in_another_framework(tmp_path: Path) -> None:
    recipe = TrainingRecipe(batch_size=64, epochs=1)
    degradation.begin(tmp_path, {"recipe": runs.recipes.to_dict(recipe)})
    spec = architectures.find("plain20").replace(in_channels=1)
    begun = Plan(variant="plain20", spec=spec, dataset=DIGITS, data="digits", recipe=recipe, backend="torch")
    (member,) = degradation.trainings([begun], tmp_path)
    runs.begin(member.folder, begun, {})
    one = ("degradation", "--out", tmp_path, "--resume")
    refused(
        TrainingError,
        "plain20-0: was begun with recipe learning_rate=0.1, not learning_rate=0.2",
        *one,
        "--set",
        "lr=0.2",
    )
    refused(TrainingError, "was begun with backend 'torch', not 'flax'", *one, "--backend", "flax")


@pytest.mark.training
def test_an_error_is_one_line_and_ends_with_2(tmp_path: Path) -> None:
    done = ran(tmp_path / "out", "--backend", "pytorch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["resnet-parity: unknown backend 'pytorch'; did you mean 'torch'?"]


# Real ones.

SHORT = ("--seeds", 1, "--set", "epochs=2", "--set", "batch_size=128")


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def begun(out: Path, *options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(out, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def contents(out: Path) -> dict[str, Any]:
    """What must be the same of two experiments: of the weights the bits, and all that was measured."""
    found: dict[str, Any] = {}
    for folder in sorted((out / "runs").iterdir()):
        weights = load_file(folder / degradation.FINAL)
        found[folder.name] = {name: array.tobytes() for name, array in weights.items()}
        found[f"{folder.name} gradients"] = (folder / degradation.GRADIENTS).read_text()
        kept = ("kind", "step", "loss", "accuracy")
        found[f"{folder.name} metrics"] = [[line[name] for name in kept] for line in metrics.read(folder)]
    found["table"] = (out / report.TABLE).read_text()
    return found


def measured_anywhere(out: Path) -> Callable[[], bool]:
    return lambda: any(path.stat().st_size for path in out.glob("runs/*/metrics.jsonl"))


def alone(process: int) -> bool:
    """Whether a process has gone, or is a zombie that nobody waited for."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()] + [
        int(child)
        for task in Path(f"/proc/{process}/task").iterdir()
        if task.name != str(process)
        for child in (task / "children").read_text().split()
    ]


@pytest.mark.training
@pytest.mark.timeout(1800)
def test_a_killed_one_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = ran(whole, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "plain: plain56 has" in done.stdout
    assert len(done.stderr.splitlines()) == 4, done.stderr
    resumes: tuple[str, ...] = ()
    kept: dict[Path, int] = {}
    conditions = (
        measured_anywhere(cut),
        lambda: any(cut.glob("runs/*/gradients.json")),
        lambda: len([*cut.glob("runs/*/gradients.json")]) > len(kept),
    )
    for condition in conditions:
        process = begun(cut, *SHORT, *resumes)
        wait_for(process, condition)
        workers = children(process.pid)
        process.kill()  # SIGKILL: it can do nothing about it
        process.communicate()
        assert workers
        # None of its processes writes on in the folder.
        end = time.monotonic() + 30
        while not all(map(alone, workers)):
            assert time.monotonic() < end, "a process outlived the one that asked"
            time.sleep(0.05)
        assert not list(cut.glob("*.png"))
        kept = {path: path.stat().st_mtime_ns for path in cut.glob("runs/*/gradients.json")}
        resumes = ("--resume",)
    done = ran(cut, *SHORT, "--resume")
    assert done.returncode == 0, done.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert contents(cut) == contents(whole)
    # And once more, with nothing left to do but the figures.
    (cut / report.ERRORS).unlink()
    done = ran(cut, "--seeds", 1, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert (cut / report.ERRORS).exists()


@pytest.mark.training
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_stopped_one_writes_checkpoints_and_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    process = begun(tmp_path / "out", *SHORT, "--jobs", 1)
    wait_for(process, measured_anywhere(tmp_path / "out"))
    os.kill(process.pid, number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), errors
    name = signal.Signals(number).name
    assert errors == f"stopped by {name} with 0 of 4 runs at their end; go on with --resume\n"
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    stepped = len([line for line in metrics.read(folder) if line["kind"] == "train"])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{stepped:08d}"]


@pytest.mark.training
def test_the_first_steps_of_the_three_frameworks_lie_over_each_other_in_float64(tmp_path: Path) -> None:
    specs = {name: architectures.find(name).replace(in_channels=1) for name in ("plain20", "resnet20")}
    plans = {name: plan(name, spec, steps=6, batch_size=16) for name, spec in specs.items()}
    found = {}
    for backend in ("torch", "keras", "flax"):
        with BackendProcess(backend) as process:
            for name, one in plans.items():
                found[backend, name] = process.ask(FirstSteps(plan=one, folder=tmp_path / f"{name}-{backend}"))
    for (backend, name), (losses, norms) in found.items():
        expected_losses, expected_norms = found["torch", name]
        assert (len(losses), len(norms)) == (6, 20)
        # The largest difference measured is 4e-15.
        assert losses == pytest.approx(expected_losses, rel=1e-12), (backend, name)
        assert norms == pytest.approx(expected_norms, rel=1e-12), (backend, name)


@pytest.mark.training
@pytest.mark.timeout(1800)
def test_the_deeper_plain_network_is_worse_on_its_training_set_and_the_deeper_residual_one_is_not(
    tmp_path: Path,
) -> None:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    done = ran(tmp_path / "out", "--seeds", 1)
    assert done.returncode == 0, done.stderr
    # Three seeds have 12 minutes on two cores; of the processors' time, since others may be at work beside.
    assert spent() - before < 2 * 12 * 60 / 3
    found = json.loads((tmp_path / "out" / report.TABLE).read_text())["deeper_minus_shallower"]
    assert found["plain"]["train_error"][0] > 0.2
    assert found["residual"]["train_error"][0] < 0.01
