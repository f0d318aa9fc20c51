"""LeNet-5: its counts are the published ones, its files are known by their content, and it is one function in three
frameworks."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_cli import run
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.layers import multiply_adds, output_shapes
from common.architectures.lenet import VARIANTS, LeNetSpec
from common.checkpoints import Checkpoint
from common.errors import SpecError
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import Session
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters, multiply-adds, size of the images
COUNTS = {
    **{f"lenet5{name}": (61_706, 416_520, (28, 28)) for name in ("", ".relu", ".d2l")},
    **{f"lenet5{name}": (61_706, 416_520, (32, 32)) for name in (".scaled_tanh", ".tutorial")},
    "lenet5.caffe": (431_080, 2_293_000, (28, 28)),
}
SMALL = LeNetSpec(widths=(4, 6), hidden=(12, 9), classes=7)


def twin(spec: LeNetSpec) -> LeNetSpec:
    """Fewer channels, and sides that leave a pixel over behind the first pool one way, which ceil alone keeps."""
    return replace(spec, widths=(4, 6), hidden=(12, 9)[: len(spec.hidden)], input_size=(29, 30))


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_multiply_adds_and_maps_are_the_published_ones(name):
    spec = architectures.find(name)
    shapes = output_shapes(spec.layers, (*spec.default_size, 1))
    parameters = sum(layer.parameter_count for layer in spec.layers)
    assert (parameters, sum(multiply_adds(spec.layers, shapes).values()), spec.default_size) == COUNTS[name]
    assert [shapes[path] for path in spec.stage_outputs] == (
        [(12, 12, 20), (4, 4, 50)] if name == "lenet5.caffe" else [(14, 14, 6), (5, 5, 16)]
    )


def test_the_tutorials_dense_layers_are_one_linear_map_and_caffes_convolutions_have_no_activation():
    kinds = [layer.kind for layer in architectures.find("lenet5.tutorial").layers]
    assert kinds[kinds.index("flatten") :] == ["flatten", "dense", "dense", "dense"]
    kinds = [layer.kind for layer in architectures.find("lenet5.caffe").layers]
    assert kinds == ["conv", "max_pool"] * 2 + ["flatten", "dense", "relu", "dense"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"widths": (6,)}, "widths=(6,) is not allowed in a lenet spec; expected a list of 2"),
        ({"pool": "trainable"}, "expected one of average, max"),
        ({"conv_activation": "gelu"}, "expected one of tanh, scaled_tanh, sigmoid, relu, none"),
        ({"input_size": (8, 8)}, "a size the network can take"),
        ({"input_size": ()}, "expected height and width with head_pool flatten"),
        ({"head": "none"}, "expected average, max or none with head none"),
        ({"head_pool": "average"}, "expected flatten with head logits"),
    ],
    ids=str,
)
def test_a_contradiction_is_one_line_with_field_and_value(changes, expected):
    with pytest.raises(SpecError) as caught:
        SMALL.replace(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_ends_keep_the_convolutions_and_groups_have_every_layer_once():
    bare = SMALL.with_head(head="none", pool="max")
    assert output_shapes(bare.layers, (33, 40, 1))[bare.layers[-1].path] == (6,)
    assert bare.with_head(head="logits") == SMALL
    spec = SMALL.with_head(head="softmax", classes=3)
    assert [path for group in spec.layer_groups for path in group] == [layer.path for layer in spec.layers]
    assert [group[0] for group in spec.layer_groups][-3:] == ["head.fc1", "head.fc2", "head.fc"]


def test_pytorch_has_the_names_of_every_port_and_its_own_initialisation():
    import torch

    import resnet_torch

    model = resnet_torch.lenet5(weights=None, progress=False, num_classes=7)
    assert model.spec == architectures.find("lenet5").replace(classes=7)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(state) == [
        f"{n}.{role}" for n in ("conv1", "conv2", "fc1", "fc2", "fc3") for role in ("weight", "bias")
    ]
    assert (state["conv2.weight"], state["fc1.weight"], state["fc3.weight"]) == ((16, 6, 5, 5), (120, 400), (7, 84))
    for name, fan_in in (("fc1.weight", 400), ("conv2.bias", 150)):
        bound = fan_in**-0.5
        assert 0.8 * bound < float(model.state_dict()[name].abs().max()) <= bound
    images = torch.randn(2, 1, 28, 28)
    assert [tuple(x.shape) for x in model.stages(images)] == [(2, 6, 14, 14), (2, 16, 5, 5)]
    scripted = torch.jit.script(model.eval())
    assert torch.equal(scripted(images), model(images))
    assert len(scripted.stages(images)) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimised")
def test_flax_has_the_names_of_the_spec_and_pytorchs_initialisation():
    import jax
    import jax.numpy as jnp

    import resnet_flax

    model = resnet_flax.LeNet5(num_classes=7)
    images = jnp.zeros((1, 28, 28, 1))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert set(params) == {"features.conv1", "features.conv2", "head.fc1", "head.fc2", "head.fc"}
    for layer, role, fan_in in (("head.fc1", "kernel", 400), ("features.conv2", "bias", 150)):
        bound = fan_in**-0.5
        assert 0.8 * bound < float(abs(params[layer][role]).max()) <= bound
    _, state = jax.eval_shape(partial(model.apply, train=False, mutable=["intermediates"]), {"params": params}, images)
    assert [x.shape for x in state["intermediates"]["stages"]] == [(1, 14, 14, 6), (1, 5, 5, 16)]


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures
found = {}
model = resnet_keras.LeNet5(classes=7)
found["layers"] = [layer.name for layer in model.layers[1:]]
found["input"] = model.input.shape
found["sum"] = float(np.sum(model.predict(np.zeros((1, 28, 28, 1)), verbose=0)))
found["stages"] = [x.shape for x in resnet_keras.stage_outputs(model).outputs]
bare = resnet_keras.LeNet5(include_top=False, pooling="avg", input_shape=(40, 33, 3))
found["bare"] = bare.output.shape, bare.input.shape
try:
    resnet_keras.LeNet5(include_top=False, input_shape=(11, 12, 1))
except ValueError as error:
    found["small"] = str(error)
spec = architectures.find("lenet5.scaled_tanh")
made = resnet_keras.from_spec(spec)
made.save("PATH")
again = keras.models.load_model("PATH")
images = np.random.default_rng(0).normal(size=(2, 32, 32, 1))
found["same"] = bool((again.predict(images, verbose=0) == made.predict(images, verbose=0)).all())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_take_grey_images_of_28_pixels(session, tmp_path):
    found = printed(session, "keras:tensorflow", KERAS.replace("PATH", str(tmp_path / "a.keras")))
    assert found["layers"] == [
        *("conv1", "conv1_tanh", "pool1", "conv2", "conv2_tanh", "pool2", "flatten"),
        *("fc1", "fc1_tanh", "fc2", "fc2_tanh", "fc3", "softmax"),
    ]
    assert found["input"] == [None, 28, 28, 1]
    assert found["sum"] == pytest.approx(1, abs=1e-6)
    assert found["stages"] == [[None, 14, 14, 6], [None, 5, 5, 16]]
    assert found["bare"] == [[None, 16], [None, 40, 33, 3]]
    assert found["small"] == "input_shape=(11, 12, 1) is too small; expected at least 12x12 pixels"
    assert found["same"]


def checkpoint(spec: LeNetSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0))


@pytest.mark.parametrize(
    ("file", "to"),
    [
        *(("a.pth", "pytorch"), ("a.safetensors", "pytorch"), ("a.safetensors", "canonical")),
        *(("a.h5", "keras"), ("a.weights.h5", "keras"), ("a.msgpack", "flax")),
    ],
)
@pytest.mark.parametrize("spec", [SMALL, SMALL.replace(input_size=(48, 48), in_channels=3), VARIANTS["lenet5.caffe"]])
def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(tmp_path, file, to, spec):
    made = checkpoint(spec)
    checkpoints.write(tmp_path / file, made, None if file == "a.pth" else to)
    found = checkpoints.read(tmp_path / file)
    assert (found.spec, found.origin.format, found.preprocessing) == (spec, to, None)
    assert all(np.array_equal(found.weights[name], made.weights[name]) for name in made.weights)


def test_what_no_shape_shows_is_assumed_and_can_be_said(tmp_path):
    checkpoints.write(tmp_path / "a.pth", checkpoint(VARIANTS["lenet5.tutorial"]))
    found = checkpoints.read(tmp_path / "a.pth")
    assert found.spec == VARIANTS["lenet5"]
    assert {"conv_activation", "dense_activation", "pool", "padding"} <= found.origin.assumed.keys()
    assert checkpoints.read(tmp_path / "a.pth", convention="tutorial").spec == VARIANTS["lenet5.tutorial"]
    assert checkpoints.read(tmp_path / "a.pth", changes={"pool": "max"}).spec.pool == "max"
    bare = SMALL.with_head(head="none", pool="average")
    checkpoints.write(tmp_path / "bare.h5", checkpoint(bare))
    assert checkpoints.read(tmp_path / "bare.h5").spec.layers == bare.layers


KINDS: dict[LeNetSpec, str] = {}
for _name, _spec in VARIANTS.items():
    KINDS.setdefault(twin(_spec), _name)
# Every activation, pool and padding is in one of them.
SHORT = ("lenet5", "lenet5.caffe", "lenet5.d2l", "lenet5.scaled_tanh")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=[] if name in SHORT else [pytest.mark.long]) for spec, name in KINDS.items()],
    ids=KINDS.get,
)
def test_every_kind_of_lenet_is_one_function_in_three_frameworks(session: Session, spec: LeNetSpec) -> None:
    result = session.check(
        Case(variant=KINDS[spec], spec=spec, size=spec.default_size, photos=PHOTOS, dtypes=("float64",))
    )
    assert result.passed, explain(result)


@pytest.mark.training
def test_it_trains_on_digits_at_its_own_size(tmp_path: Path) -> None:
    """They are of 8 x 8 pixels, and it takes 28 x 28 alone."""
    done = run("train", "lenet5", "--data", "digits", "--set", "steps=60", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.partition("accuracy ")[2].partition("%")[0])
    assert accuracy > 80
    found = checkpoints.read(tmp_path / "run" / "final.safetensors")
    assert found.spec == architectures.find("lenet5")
    weights = tmp_path / "run" / "final.safetensors"
    done = run("evaluate", "--weights", weights, "--data", "digits", cwd=tmp_path)
    assert f"accuracy {accuracy:.2f}%" in done.stdout
