"""Against the libraries themselves: their models, saved by their code, are the same functions in all our backends.

And back: what we write, their own strict loaders take, and compute the same. Runs in the peers' environment only
(`make test-peers`).
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common import checkpoints
from common import weights as canonical
from common.checkpoints import Checkpoint
from common.images import sample_photos
from common.parity.case import Case
from common.parity.levels import FLOOR, RESPONSE_FACTOR, UNIT, rho
from common.parity.names import ArrayName
from common.parity.record import distance, norm
from common.parity.session import Session

# Even one way and odd the other, since 65 = 1 mod 32 hides how SAME pads; and what the weights are used at.
SIZES = ((64, 65), (224, 224))
PEER = Path(__file__).with_name("peer.py")
# Library, its model, our name for it, the file it writes, what `--to` calls that.
TORCHVISION = [
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
]
# Every naming, container and convention once; the others are more of the same: `make test-peers-all`.
ONCE = [
    ("torchvision", "resnet18", "resnet18", "given.pth", "torchvision"),
    ("torchvision", "resnext50_32x4d", "resnext50_32x4d", "given.pth", "torchvision"),
    ("timm", "resnet18", "resnet18", "given.safetensors", "torchvision"),
    ("timm", "resnet50", "resnet50", "given.pth", "torchvision"),
    ("timm", "resnet18d", "resnet18d", "given.safetensors", "timm"),
    ("timm", "seresnet18", "seresnet18", "given.safetensors", "torchvision"),
    ("transformers", "resnet-18", "resnet18", "model.safetensors", "huggingface"),
    ("transformers", "resnet-50", "resnet50", "model.safetensors", "huggingface"),
    ("keras", "ResNet50", "resnet50.keras_applications", "given.weights.h5", "keras_applications"),
    ("keras", "ResNet50", "resnet50.keras_applications", "given.keras", "keras_applications"),
    ("flax", "resnet18", "resnet18.flax_examples", "given.msgpack", "flax"),
    ("flax", "resnet50", "resnet50.flax_examples", "given", "flax"),
    ("torchvision", "vgg11_bn", "vgg11_bn", "given.pth", "torchvision"),
    ("timm", "vgg11", "vgg11", "given.safetensors", "timm"),
    ("keras", "VGG16", "vgg16.keras_applications", "given.weights.h5", "keras_applications"),
    ("keras", "ResNet50V2", "resnet50v2.keras_applications", "given.weights.h5", "keras_applications"),
    ("timm", "resnetv2_50", "resnet50v2.timm", "given.safetensors", "timm"),
    ("torchvision", "densenet121", "densenet121", "given.pth", "torchvision"),
    ("keras", "DenseNet121", "densenet121.keras_applications", "given.weights.h5", "keras_applications"),
    ("torchvision", "alexnet", "alexnet", "given.pth", "torchvision"),
    ("torchvision", "googlenet", "googlenet.transform_input", "given.pth", "torchvision"),
    ("torchvision", "inception_v3", "inception_v3", "given.pth", "torchvision"),
    ("timm", "inception_v3", "inception_v3.timm", "given.safetensors", "torchvision"),
    ("keras", "InceptionV3", "inception_v3.keras_applications", "given.weights.h5", "keras_applications"),
    ("torchvision", "efficientnet_b0", "efficientnet_b0", "given.pth", "torchvision"),
    ("timm", "efficientnet_b0", "efficientnet_b0.timm", "given.safetensors", "timm"),
    ("timm", "tf_efficientnet_lite0", "efficientnet_lite0.timm_tf", "given.pth", "timm"),
    ("keras", "EfficientNetB0", "efficientnet_b0.keras_applications", "given.weights.h5", "keras_applications"),
    ("transformers", "efficientnet-b0", "efficientnet_b0.huggingface", "model.safetensors", "huggingface"),
]
# What peer.py makes smaller than the library has it by default.
SMALLER = {
    ("torchvision", "vgg11_bn"): {"hidden": (256, 128)},
    ("torchvision", "alexnet"): {"hidden": (256, 128)},
    ("timm", "vgg11"): {"hidden": (256, 4096)},
    ("keras", "VGG16"): {"input_size": (64, 32)},
}
# What its names do not say.
CONVENTIONS = {("timm", f"tf_efficientnet_{name}"): "timm_tf" for name in ("lite0", "b0", "b3")}
CONVENTIONS |= {("timm", "inception_v3"): "timm"}
# Of a network that takes no smaller images; and of one whose padding is SAME's at even sides alone.
SIZES_OF = {
    **{(library, "inception_v3"): ((76, 91), (299, 299)) for library in ("torchvision", "timm")},
    ("keras", "InceptionV3"): ((76, 91), (299, 299)),
    ("transformers", "efficientnet-b0"): ((64, 96), (224, 224)),
}
ALL = [
    *(("torchvision", name, name, "given.pth", "torchvision") for name in TORCHVISION),
    *(("timm", name, name, "given.safetensors", "torchvision") for name in TORCHVISION[:5]),
    ("timm", "resnet50d", "resnet50d", "given.safetensors", "timm"),
    ("timm", "seresnet50", "seresnet50", "given.safetensors", "torchvision"),
    ("keras", "InceptionV3", "inception_v3.keras_applications", "given.keras", "keras_applications"),
    ("keras", "ResNet101", "resnet101.keras_applications", "given.weights.h5", "keras_applications"),
    ("keras", "ResNet152", "resnet152.keras_applications", "given.weights.h5", "keras_applications"),
    ("flax", "resnet50", "resnet50.flax_examples", "given.msgpack", "flax"),
    ("keras", "ResNet50V2", "resnet50v2.keras_applications", "given.keras", "keras_applications"),
    *(
        ("keras", f"ResNet{depth}V2", f"resnet{depth}v2.keras_applications", "given.weights.h5", "keras_applications")
        for depth in (101, 152)
    ),
    *(("timm", f"resnetv2_{depth}", f"resnet{depth}v2.timm", "given.safetensors", "timm") for depth in (101, 152)),
    *(("torchvision", f"densenet{n}", f"densenet{n}", "given.pth", "torchvision") for n in (161, 169, 201)),
    ("timm", "densenet121", "densenet121", "given.safetensors", "torchvision"),
    ("keras", "DenseNet169", "densenet169.keras_applications", "given.keras", "keras_applications"),
    ("keras", "DenseNet201", "densenet201.keras_applications", "given.weights.h5", "keras_applications"),
    ("torchvision", "efficientnet_b3", "efficientnet_b3", "given.pth", "torchvision"),
    ("torchvision", "efficientnet_b5", "efficientnet_b5", "given.pth", "torchvision"),
    ("timm", "tf_efficientnet_b0", "efficientnet_b0.timm_tf", "given.safetensors", "timm"),
    ("timm", "tf_efficientnet_b3", "efficientnet_b3.timm_tf", "given.safetensors", "timm"),
    ("timm", "efficientnet_lite0", "efficientnet_lite0.timm", "given.safetensors", "timm"),
    ("keras", "EfficientNetB3", "efficientnet_b3.keras_applications", "given.weights.h5", "keras_applications"),
]
CASES = [*ONCE, *(pytest.param(*case, marks=pytest.mark.long) for case in ALL if case not in ONCE)]


@pytest.fixture(scope="module")
def session():
    with Session(("torch", "keras", "flax")) as running:
        yield running


def peer(*arguments):
    done = subprocess.run(
        [sys.executable, str(PEER), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("library", "model", "variant", "file", "to"), CASES, ids=lambda value: str(value))
def test_a_peers_model_is_the_same_function_here_and_back(session, tmp_path, library, model, variant, file, to):
    from common import architectures

    theirs = tmp_path / "theirs" / file
    theirs.parent.mkdir()
    peer(library, model, "make", theirs)
    smaller = SMALLER.get((library, model), {})
    # A flattened map does not show its height and width.
    said = {name: smaller[name] for name in smaller if name == "input_size"}
    found = checkpoints.read(theirs, convention=CONVENTIONS.get((library, model)), changes=said)
    assert found.spec == architectures.find(variant).replace(**smaller)
    ours = tmp_path / "ours" / file
    ours.parent.mkdir()
    checkpoints.write(ours, Checkpoint(spec=found.spec, weights=found.weights), to)

    weights = {name: found.weights[name].astype(np.float64) for name in found.weights}
    last = found.spec.layers[-1].path
    images, expected = [], []
    sizes = (found.spec.input_size,) if found.spec.input_size else SIZES_OF.get((library, model), SIZES)
    for size in sizes:
        case = Case(
            variant=variant,
            spec=found.spec,
            size=size,
            batch=2,  # so that there is another order
            photos=tuple(sample_photos()),
            weights=weights,
            dtypes=("float64",),
            modes=("eval",),
        )
        with session.prepared(case) as inputs:
            with ThreadPoolExecutor(session.jobs) as pool:
                made = pool.map(lambda column: session.run(column, inputs, column == "torch"), session.columns)
                records = dict(zip(session.columns, made, strict=True))
            kept = tmp_path / f"images-{len(images)}.safetensors"
            kept.write_bytes(inputs.path("inputs", "float64").read_bytes())
            tap = ArrayName("eval", "tap", last)
            response = records["torch"]["float64"].response[tap]
            outputs = {
                column: (made["float64"][tap].copy(), made["float64"].order_response.get(tap, 0.0))
                for column, made in records.items()
            }
        images.append(kept)
        expected.append((response, outputs))

    for which, path in (("theirs", theirs), ("ours", ours)):
        peer(library, model, "run", path, tmp_path / which / "outputs", *images)
        got = load_file(tmp_path / which / "outputs")
        for index, (response, outputs) in enumerate(expected):
            for column, (output, reordered) in outputs.items():
                least = max(response, FLOOR * UNIT["float64"] * norm(output))
                limit = RESPONSE_FACTOR * rho(least, reordered, 0.0)  # theirs is not known
                apart = distance(got[str(index)], output)
                assert apart <= limit, (
                    f"{which} at {sizes[index]}: {column} is {apart / limit * RESPONSE_FACTOR:.1f} responses away"
                )


def test_nothing_here_could_pass_by_accident(session, tmp_path):
    """The gate sees an eps of 1.001e-5 instead of 1e-5, the smallest difference of two public conventions."""
    theirs = tmp_path / "given.pth"
    peer("torchvision", "resnet18", "make", theirs)
    found = checkpoints.read(theirs, changes={"bn_eps": 1.001e-5})
    weights = {name: found.weights[name].astype(np.float64) for name in canonical.shapes(found.spec)}
    case = Case(
        variant="eps",
        spec=found.spec,
        photos=tuple(sample_photos()),
        weights=weights,
        dtypes=("float64",),
        modes=("eval",),
    )
    with session.prepared(case) as inputs:
        record = session.run("torch", inputs, True)["float64"]
        kept = tmp_path / "images.safetensors"
        kept.write_bytes(inputs.path("inputs", "float64").read_bytes())
        head = ArrayName("eval", "tap", "head.fc")
        response, output = record.response[head], record[head].copy()
    peer("torchvision", "resnet18", "run", theirs, tmp_path / "outputs", kept)
    assert distance(load_file(tmp_path / "outputs")["0"], output) > 1000 * RESPONSE_FACTOR * response
