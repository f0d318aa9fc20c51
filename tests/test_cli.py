"""The command line as a user meets it: what it prints, what it writes, how it ends."""

import json
import os
import pty
import resource
import subprocess
import sys
import sysconfig
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from written import save_weights

from common import architectures, weights
from common.architectures.resnet import ResNetSpec
from common.checkpoints import Checkpoint, Origin, canonical
from common.commands.main import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = ResNetSpec(block="basic", blocks=(1, 1), widths=(8, 16), stem_width=8, classes=10)


def run(*arguments: object, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `resnet-parity` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "common.commands", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        **options,  # type: ignore[call-overload]
    )


def called(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As `run`, but in this process: a command that starts no framework ends sooner than Python starts."""
    words = ["resnet-parity", *map(str, arguments)]
    with (
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        chdir(cwd or ROOT),
        patch.object(sys, "argv", words),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(words, int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(architectures.to_json(TINY))
    return path


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_weights(path, TINY, weights.randomize(TINY, dtype="float32"))
    return path


def test_list_shows_the_variants_that_match() -> None:
    shown = called("list", "resnext*")
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == [
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
    ]
    rows = [line.split() for line in called("list").stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == list(architectures.variants())
    depths = {name: depth for name, depth, *_ in rows}
    assert {name: depths[name] for name in ("resnet18", "resnet50", "resnet152", "resnet20")} == {
        "resnet18": "18",
        "resnet50": "50",
        "resnet152": "152",
        "resnet20": "20",
    }


def test_show_gives_layers_shapes_parameters_and_multiply_adds() -> None:
    shown = called("show", "resnet50", "--size", "224").stdout
    assert "stages.0.blocks.0.shortcut.conv" in shown
    assert "7x7, stride 2" in shown
    last = shown.splitlines()[-1].split()
    assert last == ["total", "25,557,032", "4,089,184,256"]
    assert "97x65x64" in called("show", "resnet18", "--size", "193x129").stdout
    assert called("show", "resnet50").stdout == shown
    assert "32x32x3" in called("show", "resnet20").stdout


def test_without_a_size_a_network_gets_the_one_that_it_takes(tmp_path: Path) -> None:
    flat = TINY.replace(head_pool="flatten", input_size=(32, 48))
    path, made = tmp_path / "flat.json", tmp_path / "flat.safetensors"
    path.write_text(architectures.to_json(flat))
    assert "32x48x3" in called("show", "--spec", path).stdout
    done = run("record", "torch", "--spec", path, "-o", made, "--mode", "eval", "--no-response")
    assert done.returncode == 0, done.stderr
    assert load_file(made)["eval/tap/stem.conv"].shape == (2, 16, 24, 8)
    for command in (["show", "--spec", path], ["check", "--spec", path]):
        refused(called(*command, "--size", 64), "input size 64x64 does not fit", "images of its input_size only")


def test_check_passes_and_writes_json_and_junit(spec_file: Path, tmp_path: Path) -> None:
    out, junit = tmp_path / "out.json", tmp_path / "junit.xml"
    done = run(
        "check",
        "--spec",
        spec_file,
        "--size",
        32,
        "--backends",
        "torch,keras",
        "--json",
        out,
        "--junit",
        junit,
        "--timings",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "SAME FUNCTION" in done.stdout
    assert "peak memory" in done.stdout
    found = json.loads(out.read_text())
    assert found["passed"] is True
    levels = {entry["dtype"]: entry for entry in found["checks"] if entry["level"] != "L0"}
    assert set(levels) == {"float64", "float32"}
    assert levels["float64"]["variant"] == "tiny"
    for mode in ("eval", "train", "grad"):
        worst = levels["float64"]["modes"][mode]["torch | keras:tensorflow"]
        assert 0 < worst["error"] < 1e-11
        assert worst["ratio"] <= found["limit"]
        assert worst["response"] > 0
        assert worst["tensor"]
    suite = ElementTree.parse(junit).getroot()
    assert len(suite.findall(".//testcase")) >= 8
    assert not suite.findall(".//failure")


def test_records_made_one_by_one_compare_as_the_check_does(spec_file: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, *arguments in (
        (a, "torch"),
        (b, "keras", "--no-response"),
        (c, "torch", "--seed", 1, "--no-response"),
    ):
        made = run("record", arguments[0], "--spec", spec_file, "--size", 32, "-o", path, *arguments[1:])
        assert made.returncode == 0, made.stderr
        assert str(path) in made.stdout
    same = called("compare", a, b)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "torch | keras:tensorflow" in same.stdout
    other = called("compare", a, c)
    assert other.returncode == 2
    assert "different weights" in other.stderr
    unheld = called("compare", b, b)
    assert unheld.returncode == 2


def test_compare_ends_with_1_where_records_differ(spec_file: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    path, changed = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert run("record", "torch", "--spec", spec_file, "--size", 32, "-o", path).returncode == 0
    arrays = load_file(path)
    arrays["eval/tap/stages.1.blocks.0.conv1"] *= 1 + 1e-12
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(arrays, changed, metadata | {"manifest": metadata["manifest"].replace('"torch"', '"flax"', 1)})
    done = called("compare", path, changed)
    assert done.returncode == 1
    assert "first difference: stages.1.blocks.0.conv1 (eval)" in done.stdout


def _broken(path: Path, how: str) -> Path:
    """The canonical file at `path`, damaged."""
    good = load_file(path)
    target = path.with_name(f"{how}.safetensors")
    metadata = {"format": "resnet-parity weights 2", "spec": architectures.to_json(TINY)}
    name = "stages.1.blocks.0.conv1.kernel"
    if how == "truncated":
        target.write_bytes(path.read_bytes()[:-1000])
        return target
    if how == "empty":
        target.write_bytes(b"")
        return target
    if how == "missing":
        del good[name]
    elif how == "extra":
        good["stem.extra"] = np.ones(3, np.float32)
    elif how == "misshapen":
        good[name] = np.ascontiguousarray(good[name].transpose(3, 2, 0, 1))
    elif how == "nan":
        good[name][0, 0, 0, 0] = np.nan
        metadata = canonical.metadata_of(Checkpoint(spec=TINY, weights=good, origin=Origin()))
    elif how == "foreign":
        other = TINY.replace(bn_eps=1e-3)
        save_weights(target, other, good)
        return target
    elif how == "untagged":
        metadata = {}
    save_file(good, target, metadata)
    return target


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "incomplete metadata, file not fully covered"),  # the library's own words
        ("empty", "not a checkpoint of a known format"),
        ("missing", "missing stages.1.blocks.0.conv1.kernel"),
        ("extra", "unexpected stem.extra"),
        ("misshapen", "stages.1.blocks.0.conv1.kernel has shape (16, 8, 3, 3); the spec expects (3, 3, 8, 16)"),
        ("nan", "stages.1.blocks.0.conv1.kernel has 1 values that are NaN or infinite"),
        ("foreign", "another network: bn_eps is 0.001 there and 1e-05 here"),
        ("untagged", "tensors have no names known here"),
    ],
)
def test_a_bad_weights_file_is_one_line_and_exit_2(spec_file: Path, weights_file: Path, how: str, says: str) -> None:
    path = _broken(weights_file, how)
    refused(called("check", "--spec", spec_file, "--weights", path, "--size", 32), says, str(path))


def test_good_weights_are_used(spec_file: Path, weights_file: Path) -> None:
    done = run(
        "check",
        "--spec",
        spec_file,
        "--weights",
        weights_file,
        "--size",
        32,
        "--backends",
        "torch,keras",
        "--dtype",
        "float32",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "resnet51"], "unknown variant 'resnet51'; did you mean"),
        (["check", "ResNet50"], "did you mean resnet50"),
        (["show", "x" * 50], "`resnet-parity list` shows all"),
        (["list", "nothing*"], "no variant matches 'nothing*'"),
        (["check"], "no network is named"),
        (["check", "resnet18", "--size", "16"], "size 16x16 is too small for resnet18"),
        (["check", "resnet18", "--size", "32", "--batch", "1"], "leaves one value per channel at stages.3."),
        (["check", "resnet18", "--size", "0"], "--size 0 is not a size"),
        (["check", "resnet18", "--size", "64x"], "--size 64x is not a size"),
        (["show", "resnet50.keras_classic", "--size", "1"], "input size 1x1 is too small"),
        (["check", "resnet18", "--dtype", "float16"], "'float16' is unknown; expected some of float64, float32"),
        (["check", "resnet18", "--mode", "eval,eval"], "'eval' is named twice"),
        (["check", "resnet18", "--mode", ""], "is unknown"),
        (["check", "resnet18", "--backends", "torch"], "a comparison needs at least two"),
        (["check", "resnet18", "--backends", "torch,mxnet"], "unknown backend 'mxnet'"),
        (["check", "resnet18", "--image", "no.jpg"], "no.jpg"),
        (["check", "resnet18", "--image", "pyproject.toml"], "pyproject.toml: not an image"),
        (["check", "resnet18", "--spec", "no.json"], "no.json: cannot read the spec"),
        (["check", "resnet18", "--weights", "no.safetensors"], "'no.safetensors': there is no such file"),
        (["check", "resnet18", "--json", "no/such/folder.json"], "is not a folder"),
        (["check", "resnet18", "--junit", "tests"], "it is a folder"),
        (["record", "torch", "resnet18", "-o", "no/such/a.safetensors"], "is not a folder"),
        (["record", "torhc", "resnet18", "-o", "a.safetensors"], "did you mean 'torch'"),
        (["show", "resnet18", "--spec", "a.json"], "both variant resnet18 and --spec a.json are given"),
        (["compare", "pyproject.toml", "README.md"], "pyproject.toml: cannot be read as safetensors"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], says: str) -> None:
    refused(called(*arguments), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"family": "resnet", "block": "basic", "blocks": [1], "width": [8]}', "unknown field 'width'"),
        ('{"family": "resnet", "block": "basic", "blocks": [1]}', "widths="),
        ('{"family": "wgg"}', "family='wgg' is unknown"),
        ('{"family": "resnet", "block": "basic"', "this is not"),
        ("[]", "a spec is a JSON object"),
        ("", "this is not"),
    ],
)
def test_a_bad_spec_file_is_one_line_and_exit_2(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    refused(called("show", "--spec", path), says, str(path))


def test_no_space_left_is_one_line_exit_2_and_no_partial_file(spec_file: Path, tmp_path: Path) -> None:
    """A real limit of the system on the size of files, as a full disk answers."""
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "record.safetensors"
    target.write_text("what was there before")

    # Inherited: to set it between fork and exec (`preexec_fn`) is not safe beside the threads of the frameworks.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        done = run("record", "torch", "--spec", spec_file, "--size", 64, "-o", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(done, "cannot be written")
    assert [path.name for path in folder.iterdir()] == ["record.safetensors"]
    assert target.read_text() == "what was there before"


@pytest.mark.parametrize(("arguments", "code"), [(["list"], 0), (["list", "--nothing"], 2), (["show", "none"], 2)])
def test_closed_streams_are_no_error(arguments: list[str], code: int) -> None:
    command = 'exec "$0" -m common.commands "$@" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, sys.executable, *arguments]).returncode == code


def test_the_help_groups_the_commands_and_each_shows_an_example() -> None:
    groups = {
        "Prove that networks are the same function": ("check", "record", "compare", "list", "show"),
        "Move weights": ("inspect", "convert", "predict"),
        "Train": ("train", "evaluate", "plot"),
    }
    shown = run("--help").stdout
    titles = [shown.index(f" {title} ") for title in groups]
    assert titles == sorted(titles)
    for (title, commands), end in zip(groups.items(), [*titles[1:], len(shown)], strict=True):
        panel = shown[shown.index(f" {title} ") : end]
        for command in commands:
            assert f"│ {command} " in panel
            assert f"resnet-parity {command} " in called(command, "--help").stdout.partition("Example")[2]


def test_wrong_usage_ends_with_2() -> None:
    assert run("chekc").returncode == 2
    assert run("check", "resnet18", "--no-such-option").returncode == 2
    assert run("--help").returncode == 0


def test_a_terminal_sees_a_progress_bar_and_none_of_the_frameworks_chatter(spec_file: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "common.commands",
            "check",
            "--spec",
            str(spec_file),
            "--size",
            "32",
            "--backends",
            "torch,keras",
        ],
        cwd=ROOT,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "150"},
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:
        pass  # the other side of a terminal that is closed answers with an error
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    assert "keras:tensorflow exact: import" in text
    assert "SAME FUNCTION" in text
    for word in ("oneDNN", "cuda", "CUDA", "WARNING", "AVX"):
        assert word not in text


def test_the_installed_command_is_this_command() -> None:
    command = Path(sysconfig.get_path("scripts")) / "resnet-parity"
    shown = subprocess.run([command, "list", "resnet50"], capture_output=True, text=True, check=True)
    assert shown.stdout == run("list", "resnet50").stdout


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("resnet-parity: ")
    for text in says:
        assert text in lines[0]


def test_evaluate_refuses_a_network_that_tells_other_classes_apart_whatever_its_end(tmp_path: Path) -> None:
    # Of a softmax the classes do not stand in the last layer.
    for head, classes, says in (
        ("softmax", 1000, "tells 1000 classes apart; digits has 10: choose other data"),
        ("logits", 12, "tells 12 classes apart; digits has 10"),
        ("none", 10, "has no classifier, so nothing can be counted"),
    ):
        spec = TINY.replace(in_channels=1).with_head(classes=classes, head=head, pool="average")
        path = tmp_path / f"{head}.safetensors"
        save_weights(path, spec, weights.randomize(spec, dtype="float32"))
        done = run("evaluate", "--weights", path, "--data", "digits", cwd=tmp_path)
        refused(done, f"{path} {says}")


def test_train_refuses_images_of_another_size_than_the_one_the_network_takes(tmp_path: Path) -> None:
    done = run("train", "vgg16.paper", "--data", "digits", "--out", tmp_path / "run", cwd=tmp_path)
    refused(done, "8x8; vgg16.paper takes 224x224 alone: resize them, as --set augmentation.size=224")
    assert not (tmp_path / "run").exists()
