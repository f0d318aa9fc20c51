"""`inspect`, `convert` and `predict` as a user meets them, and `weights=` of the three backends' builders."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from test_cli import called, run
from written import save_weights

from common import checkpoints
from common import weights as canonical
from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.images import PRESETS, Preprocessing, sample_photos

pytestmark = pytest.mark.slow

SPEC = ResNetSpec(block="bottleneck", blocks=(1, 1), widths=(4, 8), stem_width=4, classes=1000)


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    path = tmp_path / "given.pth"
    save_weights(path, SPEC, canonical.randomize(SPEC, dtype="float32"))
    return path


def digest(text: str) -> str:
    found = re.search(r"\b[0-9a-f]{32}\b", text)
    assert found, text
    return found[0]


def test_inspect_says_what_a_file_is_and_what_is_assumed(pth: Path) -> None:
    shown = called("inspect", pth)
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "format torchvision, in PyTorch" in text
    assert "blocks=[1,1]" in text
    assert "assumed" in text
    assert "stride_in=conv2" in text
    assert "suspicious nothing" in text
    assert "num_batches_tracked" in text
    other = called("inspect", pth, "--convention", "paper", "--set", "bn_eps=0.001").stdout
    assert "stride_in=conv1" in other
    assert "bn_eps=0.001" in other
    assert digest(other) == digest(shown.stdout)


def test_inspect_knows_a_named_network_and_suspicious_values(tmp_path: Path) -> None:
    spec = VARIANTS["resnet20"]
    weights = canonical.randomize(spec, dtype="float32")
    weights["stem.conv.kernel"].flat[0] = np.nan
    weights["stages.2.blocks.2.norm2.scale"][:] = 0
    save_weights(tmp_path / "w.pth", spec, weights)
    text = " ".join(called("inspect", tmp_path / "w.pth").stdout.split())
    assert "network resnet20 " in text
    assert "suspicious stem.conv.kernel: 1 of 432 values are NaN or infinite" in text
    assert "stages.2.blocks.2.norm2.scale: all zero" in text


def test_convert_keeps_the_digest_and_says_what_readers_will_assume(pth: Path, tmp_path: Path) -> None:
    first = called("convert", pth, tmp_path / "w.msgpack")
    assert first.returncode == 0, first.stderr
    assert "assumed: " in first.stderr
    assert "read it with: --set pool_padding=symmetric --set block_padding=symmetric" in first.stderr
    settings = first.stderr.rpartition("read it with: ")[2].split()
    second = called("convert", tmp_path / "w.msgpack", tmp_path / "w.safetensors", *settings)
    assert second.returncode == 0, second.stderr
    assert digest(first.stdout) == digest(second.stdout) == digest(called("inspect", tmp_path / "w.safetensors").stdout)
    assert checkpoints.read(tmp_path / "w.safetensors").spec == SPEC


def test_convert_adapts_head_and_stem_and_says_so(pth: Path, tmp_path: Path) -> None:
    done = called("convert", pth, tmp_path / "w.safetensors", "--classes", 4, "--in-channels", 1)
    assert "initialised anew for 4 classes instead of 1000" in done.stderr
    assert "the sum of its 3 input channels" in done.stderr
    assert checkpoints.read(tmp_path / "w.safetensors").spec == SPEC.replace(classes=4, in_channels=1)


KERAS = SPEC.replace(**CONVENTIONS["keras_applications"])
NAMES = tuple(f"kind {number}" for number in range(1000))


def test_the_preprocessing_of_keras_goes_with_its_weights(tmp_path: Path) -> None:
    """From a Keras file through canonical to .pth, which cannot hold it and says which option restores it."""
    given, between, end = (tmp_path / name for name in ("w.weights.h5", "w.safetensors", "w.pth"))
    save_weights(given, KERAS, canonical.randomize(KERAS, dtype="float32"))
    first = called("convert", given, between)
    assert first.returncode == 0, first.stderr
    assert "--preprocess" not in first.stderr
    assert checkpoints.read(between).preprocessing == PRESETS["keras_caffe"]
    assert "made from " in " ".join(called("inspect", between).stdout.split())

    photo = sample_photos()[0]
    shown = run("predict", photo, "--weights", between)
    assert "preprocessing: keras_caffe, resized to 224 x 224" in shown.stdout

    second = called("convert", between, end)
    assert second.stderr.count("--preprocess keras_caffe") == 1
    options = second.stderr.rpartition("read it with: ")[2].split()
    again = run("predict", photo, "--weights", end, *options)
    assert again.stdout == shown.stdout, again.stderr


def test_class_names_and_a_preprocessing_of_ones_own_are_kept(pth: Path, tmp_path: Path) -> None:
    listed, between = tmp_path / "names.txt", tmp_path / "w.safetensors"
    listed.write_text("\n".join(NAMES))
    options = ["--class-names", listed, "--preprocess", '{"crop": 64, "resize": 64}']
    done = called("convert", pth, between, *options)
    assert done.returncode == 0, done.stderr
    found = checkpoints.read(between)
    assert found.class_names == NAMES
    assert found.preprocessing == Preprocessing(crop=64, resize=64)
    # Once more through a canonical file, and then to one that holds neither.
    assert called("convert", between, tmp_path / "again.safetensors").stderr == ""
    assert checkpoints.read(tmp_path / "again.safetensors").class_names == NAMES
    lost = called("convert", between, tmp_path / "lost.pth").stderr
    assert "nor the names of the classes" in lost
    assert """--preprocess '{"crop": 64, "resize": 64}' --class-names FILE""" in lost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "none.pth"], "none.pth'?: there is no such file"),
        (["inspect", "hf:/x"], "there is no such file; expected a file, a URL"),
        (["inspect", "given.pth", "--convention", "x"], "unknown convention 'x'; expected one of torchvision, paper"),
        (["inspect", "given.pth", "--set", "stride_in"], "expected FIELD=VALUE"),
        (["inspect", "given.pth", "--set", "stride_in=conv9"], "stride_in='conv9' is not allowed"),
        (["inspect", "cut.pth"], "cut.pth: "),
        (["inspect", "text.pth"], "text.pth: not a checkpoint of a known format"),
        (["convert", "given.pth", "out.xyz"], "no format goes by '.xyz'"),
        (["convert", "given.pth", "no/out.pth"], "cannot be written"),
        (["convert", "given.pth", "out.pth", "--to", "onnx"], "unknown format 'onnx'"),
        (
            ["convert", "given.pth", "out.safetensors", "--to", "torchvision:legacy"],
            "unknown format 'torchvision:legacy'",
        ),
        (["convert", "given.pth", "out.pth", "--to", "timm:legacy"], "unknown format"),
        (["convert", "given.pth", "out.safetensors", "--class-names", "none.txt"], "none.txt: cannot be read"),
        (["convert", "given.pth", "out.safetensors", "--class-names", "text.pth"], "1 names; the network tells 1000"),
        (["convert", "given.pth", "out.safetensors", "--preprocess", '{"crop": 0}'], "crop=0 is not allowed"),
        (["predict", "given.pth", "--weights", "given.pth"], "given.pth: not an image"),
        (["predict", "none.jpg", "--weights", "given.pth"], "none.jpg: the image cannot be read"),
        (["predict", "none.jpg", "--weights", "given.pth", "--backend", "mxnet"], "unknown backend 'mxnet'"),
        (["predict", "none.jpg", "--weights", "given.pth", "--preprocess", "x"], "--preprocess x is unknown"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(pth: Path, arguments: list[str], message: str) -> None:
    (pth.parent / "cut.pth").write_bytes(pth.read_bytes()[:5000])
    (pth.parent / "text.pth").write_text("hello")
    before = sorted(pth.parent.iterdir())
    done = called(*arguments, cwd=pth.parent)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("assumed: ")]
    assert len(lines) == 1, done.stderr
    assert re.search(message, lines[0])
    assert "Traceback" not in done.stderr
    assert sorted(pth.parent.iterdir()) == before


def test_predict_shows_all_backends_side_by_side(pth: Path) -> None:
    photos = sample_photos()
    done = run("predict", *photos, "--weights", pth, "--backend", "all", "--top", 3)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout
    assert "keras:tensorflow" in done.stdout
    assert "flax" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.rstrip().endswith("%")]
    assert len(rows) == 3 * len(photos)
    for row in rows:
        shares = [float(value) for value in row if re.fullmatch(r"[0-9.]+", value)]
        assert max(shares) - min(shares) <= 0.002
    apart = re.search(r"largest difference of an output between backends: ([0-9.e+-]+)", done.stdout)
    assert apart
    assert 0 < float(apart[1]) < 1e-4


@pytest.mark.parametrize("backend", ["torch", "keras", "flax"])
def test_a_builder_given_foreign_weights_takes_their_conventions(tmp_path: Path, backend: str) -> None:
    """A torchvision ResNet-18 into each community's own builder: the same function as the spec it came from."""
    spec = VARIANTS["resnet18"]
    weights = canonical.randomize(spec, dtype="float32")
    save_weights(tmp_path / "w.pth", spec, weights)
    script = {
        "torch": "import resnet_torch as r; m = r.resnet18(weights=P); s = m.spec; w = r.export_weights(m)",
        "keras": "import resnet_keras as r; m = r.ResNet18(weights=P); s = m.spec; w = r.export_weights(m)",
        "flax": "import resnet_flax as r; m, v = r.ResNet18(weights=P).unbind(); w = r.from_variables(s := m.spec, v)",
    }[backend]
    check = f"""
import sys
from common import checkpoints
from common import weights as canonical
P = sys.argv[1]
{script}
f = checkpoints.read(P)
assert s.replace(head="logits") == f.spec, s
assert canonical.digest(w) == canonical.digest(f.weights)
"""
    from subprocess import run as run_process
    from sys import executable

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = run_process(
        [executable, "-c", check, str(tmp_path / "w.pth")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_convention_of_keras_goes_the_other_way_too(tmp_path: Path) -> None:
    spec = VARIANTS["resnet18"].replace(**CONVENTIONS["keras_applications"])
    save_weights(tmp_path / "w.weights.h5", spec, canonical.randomize(spec, dtype="float32"))
    own = VARIANTS["resnet18"]
    taken, _ = checkpoints.adopt(own, tmp_path / "w.weights.h5", "resnet18")
    assert taken == spec.replace(head="logits")
