"""AlexNet: its counts and names are the published ones, and each version is one function in three frameworks."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_parity import explain

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.alexnet import VARIANTS, AlexNetSpec
from common.architectures.layers import multiply_adds, output_shapes
from common.checkpoints import Checkpoint
from common.errors import InputError, SpecError
from common.images import PRESETS, sample_photos
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters, multiply-adds, side of the images, sides of the maps behind the pools
COUNTS = {
    "alexnet": (61_100_840, 714_188_480, 224, [27, 13, 6]),
    **dict.fromkeys(
        ("alexnet.paper", "alexnet.caffe", "alexnet.caffenet"), (60_965_224, 724_406_816, 227, [27, 13, 6])
    ),
    **dict.fromkeys(("alexnet.single_tower", "alexnet.tutorial"), (62_378_344, 1_135_256_096, 224, [27, 13, 6])),
    "alexnet.slim": (50_303_912, 736_555_776, 224, [26, 12, 5]),
}
SMALL = AlexNetSpec(widths=(8, 12, 10, 12, 8), hidden=(16, 12), classes=10)
PAPER = VARIANTS["alexnet.paper"].replace(widths=SMALL.widths, hidden=SMALL.hidden, classes=10, input_size=(80, 69))


def twin(spec: AlexNetSpec) -> AlexNetSpec:
    """A few channels wide, and for maps of 18 by 15 or 16 pixels, where pools of one kind leave pixels over."""
    size = (80, 69) if spec.input_size else ()
    return replace(spec, widths=SMALL.widths, hidden=SMALL.hidden, classes=10, input_size=size)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_multiply_adds_and_maps_are_the_published_ones(name):
    spec = architectures.find(name)
    shapes = output_shapes(spec.layers, (*spec.default_size, 3))
    parameters = sum(layer.parameter_count for layer in spec.layers)
    operations = sum(multiply_adds(spec.layers, shapes).values())
    maps = [shapes[path][0] for path in spec.stage_outputs]
    assert (parameters, operations, spec.default_size[0], maps) == COUNTS[name]


def test_dropout_stands_before_the_dense_layers_of_torchvision_and_behind_those_of_the_paper():
    def head(name):
        return [layer.kind for layer in architectures.find(name).layers if layer.path.startswith("head")]

    assert head("alexnet") == ["adaptive_pool", "flatten", *["dropout", "dense", "relu"] * 2, "dense"]
    assert head("alexnet.paper") == ["flatten", *["dense", "relu", "dropout"] * 2, "dense"]
    assert head("alexnet.tutorial") == ["flatten", "dense", "dense", "dense"]


def test_alpha_is_undivided_and_the_norm_stands_before_the_pool_or_behind_it():
    norms = {}
    for name in ("paper", "caffe", "caffenet"):
        spec = architectures.find(f"alexnet.{name}")
        norms[name] = [(x.inputs[0], x.size, x.alpha, x.beta, x.k) for x in spec.layers if x.kind == "lrn"]
    assert norms["paper"] == [(f"features.relu{i}", 5, 1e-4, 0.75, 2.0) for i in (1, 2)]
    assert norms["caffe"] == [(f"features.relu{i}", 5, 2e-5, 0.75, 1.0) for i in (1, 2)]
    assert norms["caffenet"] == [(f"features.pool{i}", 5, 2e-5, 0.75, 1.0) for i in (1, 2)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"widths": (8, 8)}, "widths=(8, 8) is not allowed in an alexnet spec; expected a list of five"),
        ({"groups": 3}, "groups=3 is not allowed in an alexnet spec; expected a divisor of 8 and 12"),
        ({"dropout": (0.5,)}, "expected 2 entries, as many as hidden has"),
        ({"dropout_place": "after"}, "expected one of before, behind"),
        ({"lrn": "caffe"}, "expected one of none, before_pool, behind_pool"),
        ({"lrn_k": 0.0}, "expected a number above 0"),
        ({"head_pool": "average"}, "expected adaptive, adaptive_max or flatten with head logits"),
        ({"head": "none"}, "expected average, max or none with head none"),
        ({"head_pool": "flatten"}, "expected height and width with head_pool flatten"),
        ({"head_pool": "flatten", "input_size": (62, 62)}, "a size the network can take"),
        ({"map_size": ()}, "expected height and width with an adaptive head_pool"),
    ],
    ids=str,
)
def test_a_contradiction_is_one_line_with_field_and_value(changes, expected):
    with pytest.raises(SpecError) as caught:
        SMALL.replace(**changes)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_it_takes_images_from_63_pixels_up_as_torchvisions_does():
    assert architectures.least_size(VARIANTS["alexnet"]) == 63
    with pytest.raises(InputError, match="62x70 is too small: nothing is left of it at features"):
        output_shapes(VARIANTS["alexnet"].layers, (62, 70, 3))
    bare = SMALL.with_head(head="none", pool="max")
    assert output_shapes(bare.layers, (63, 90, 3))[bare.layers[-1].path] == (8,)
    spec = PAPER.with_head(head="softmax", classes=3)
    assert [path for group in spec.layer_groups for path in group] == [layer.path for layer in spec.layers]


def test_names_and_keywords_are_torchvisions():
    import torch

    import resnet_torch

    with torch.device("meta"):
        model = resnet_torch.alexnet(weights=None, progress=False, num_classes=7, dropout=0.25)
    assert model.spec == architectures.find("alexnet").replace(classes=7, dropout=(0.25, 0.25))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    layers = [*(f"features.{i}" for i in (0, 3, 6, 8, 10)), *(f"classifier.{i}" for i in (1, 4, 6))]
    assert list(shapes) == [f"{layer}.{role}" for layer in layers for role in ("weight", "bias")]
    assert (shapes["classifier.1.weight"], shapes["classifier.6.weight"]) == ((4096, 9216), (7, 4096))
    kinds = [type(module).__name__ for module in model.classifier]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    undropped = resnet_torch.from_spec(SMALL.replace(dropout=(0.0, 0.0)))
    assert [type(module).__name__ for module in undropped.classifier] == kinds


def test_a_builder_keeps_its_name_though_its_module_has_the_same():
    import importlib

    import resnet_torch

    module = importlib.import_module("resnet_torch.alexnet")
    assert module.AlexNet is resnet_torch.AlexNet
    assert resnet_torch.alexnet is not module
    assert resnet_torch.alexnet.__qualname__ == "alexnet"


@pytest.mark.parametrize("spec", [SMALL, PAPER], ids=["torchvision", "paper"])
def test_pytorch_initialises_as_its_layers_do_gives_stages_and_can_be_scripted(spec):
    import torch

    import resnet_torch

    model = resnet_torch.from_spec(spec).eval()
    state = model.state_dict()
    # The second convolution reads as many of the first's channels as a group has.
    second = next(name for name in state if state[name].shape[-2:] == (5, 5))
    for name, fan_in in ((second, 25 * 8 // spec.groups), (second.replace("weight", "bias"), 25 * 8 // spec.groups)):
        bound = fan_in**-0.5
        assert 0.7 * bound < float(state[name].abs().max()) <= bound
    images = torch.randn(2, 3, 80, 69)
    shapes = output_shapes(spec.layers, (80, 69, 3))
    found = [tuple(x.shape[i] for i in (2, 3, 1)) for x in model.stages(images)]
    assert found == [shapes[path] for path in spec.stage_outputs]
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(images), model(images))


@pytest.mark.slow
@pytest.mark.usefixtures("unoptimised")
def test_flax_has_the_names_of_the_spec_and_pytorchs_initialisation():
    import jax
    import jax.numpy as jnp

    import resnet_flax

    assert resnet_flax.AlexNet(num_classes=7).spec == architectures.find("alexnet").replace(classes=7)
    model, images = resnet_flax.from_spec(PAPER), jnp.zeros((1, 80, 69, 3))
    params = jax.jit(model.init, static_argnames="train")(jax.random.key(0), images, train=False)["params"]
    assert set(params) == {layer.path for layer in PAPER.layers if layer.arrays}
    for layer, role, fan_in in (("features.conv2", "kernel", 100), ("head.fc2", "bias", 16)):
        bound = fan_in**-0.5
        assert 0.7 * bound < float(abs(params[layer][role]).max()) <= bound
    _, state = jax.eval_shape(partial(model.apply, train=False, mutable=["intermediates"]), {"params": params}, images)
    shapes = output_shapes(PAPER.layers, (80, 69, 3))
    assert [x.shape[1:] for x in state["intermediates"]["stages"]] == [shapes[p] for p in PAPER.stage_outputs]


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures
found = {}
small = {"widths": (8, 12, 10, 12, 8), "hidden": (16, 12), "classes": 10}
model = resnet_keras.AlexNet(include_top=False, pooling="avg")
found["bare"] = model.output.shape, model.count_params()
try:
    resnet_keras.AlexNet(include_top=False, input_shape=(62, 70, 3))
except ValueError as error:
    found["small"] = str(error)
adaptive = resnet_keras.from_spec(architectures.find("alexnet").replace(head="softmax", **small))
found["layers"] = [layer.name for layer in adaptive.layers if "pad" not in layer.name][1:]
found["sizes"] = [adaptive.predict(np.zeros((2, h, w, 3)), verbose=0).shape for h, w in ((63, 90), (80, 69))]
paper = resnet_keras.from_spec(architectures.find("alexnet.paper").replace(input_size=(80, 69), **small))
paper.save("PATH")
again = keras.models.load_model("PATH")
images = np.random.default_rng(0).normal(size=(2, 80, 69, 3))
found["same"] = bool((again.predict(images, verbose=0) == paper.predict(images, verbose=0)).all())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_keras_models_have_caffes_names_at_any_size(session, tmp_path):
    found = printed(session, "keras:tensorflow", KERAS.replace("PATH", str(tmp_path / "a.keras")))
    assert found["bare"] == [[None, 256], 2_469_696]
    assert found["small"] == "input_shape=(62, 70, 3) is too small; expected at least 63x63 pixels"
    assert found["layers"] == [
        *("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4", "relu4"),
        *(
            "conv5",
            "relu5",
            "pool5",
            "pool",
            "flatten",
            "drop6",
            "fc6",
            "relu6",
            "drop7",
            "fc7",
            "relu7",
            "fc8",
            "prob",
        ),
    ]
    assert found["sizes"] == [[2, 10]] * 2
    assert found["same"]


def checkpoint(spec: AlexNetSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0), preprocessing=PRESETS["torchvision"])


@pytest.mark.parametrize(
    ("file", "to"),
    [
        *(("a.pth", "torchvision"), ("a.safetensors", "torchvision"), ("a.safetensors", "canonical")),
        *(("a.h5", "keras"), ("a.weights.h5", "keras"), ("a.msgpack", "flax")),
    ],
)
@pytest.mark.parametrize("spec", [SMALL, SMALL.replace(groups=2, hidden=(9, 8))], ids=["plain", "grouped"])
def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(tmp_path, file, to, spec):
    made = checkpoint(spec)
    checkpoints.write(tmp_path / file, made, None if file in ("a.pth", "a.h5", "a.weights.h5") else to)
    found = checkpoints.read(tmp_path / file)
    assert (found.spec, found.origin.format, found.preprocessing) == (spec, to, PRESETS["torchvision"])
    assert all(np.array_equal(found.weights[name], made.weights[name]) for name in made.weights)


@pytest.mark.parametrize("name", ["paper", "caffe", "caffenet", "single_tower", "slim"])
def test_a_convention_that_is_said_is_that_of_the_file_in_every_naming(tmp_path, name):
    spec = twin(VARIANTS[f"alexnet.{name}"])
    made = checkpoint(spec)
    for file, to in (("a.pth", "torchvision"), ("a.h5", "keras"), ("a.msgpack", "flax")):
        checkpoints.write(tmp_path / file, made, to)
        changes = {"input_size": spec.input_size}
        found = checkpoints.read(tmp_path / file, convention=name, changes=changes)
        assert found.spec == spec
        assert all(np.array_equal(found.weights[array], made.weights[array]) for array in made.weights)


def test_names_of_the_tutorials_say_that_nothing_stands_between_the_dense_layers(tmp_path):
    spec = VARIANTS["alexnet.tutorial"].replace(widths=SMALL.widths, hidden=SMALL.hidden, classes=10)
    made = checkpoint(spec)
    checkpoints.write(tmp_path / "a.pth", made, "tutorial")
    found = checkpoints.read(tmp_path / "a.pth")
    assert (found.spec, found.origin.format) == (spec, "tutorial")
    assert all(np.array_equal(found.weights[name], made.weights[name]) for name in made.weights)


def test_groups_are_shown_and_what_is_not_is_assumed(tmp_path):
    checkpoints.write(tmp_path / "a.pth", checkpoint(SMALL))
    assumed = checkpoints.read(tmp_path / "a.pth").origin.assumed
    assert {"lrn", "dropout_place", "dense_activation"} <= assumed.keys()
    assert not {"widths", "groups", "hidden", "classes"} & assumed.keys()
    checkpoints.write(tmp_path / "a.safetensors", checkpoint(SMALL), "torchvision")
    rows = checkpoint(SMALL).weights["head.fc1.kernel"].reshape(6, 6, 8, 16)
    stored = load_file(tmp_path / "a.safetensors")["classifier.1.weight"]
    assert np.array_equal(stored, rows.transpose(3, 2, 0, 1).reshape(16, -1))
    bare = SMALL.with_head(head="none", pool="average")
    checkpoints.write(tmp_path / "bare.pth", checkpoint(bare))
    assert checkpoints.read(tmp_path / "bare.pth").spec.layers == bare.layers


def test_published_weights_are_torchvisions():
    (known,) = [entry for entry in table() if entry.spec.family == "alexnet"]
    assert known.spec == VARIANTS["alexnet"]
    assert (known.checksum, known.top1) == ("sha256:7be5be79", 56.522)


KINDS: dict[AlexNetSpec, str] = {}
for _name, _spec in VARIANTS.items():
    KINDS.setdefault(twin(_spec), _name)
# Every pool, norm, end, place of dropout and padding is in one of them.
SHORT = ("alexnet", "alexnet.paper")


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=[] if name in SHORT else [pytest.mark.long]) for spec, name in KINDS.items()],
    ids=KINDS.get,
)
def test_every_kind_of_alexnet_is_one_function_in_three_frameworks(session: Session, spec: AlexNetSpec) -> None:
    case = Case(variant=KINDS[spec], spec=spec, size=(80, 69), photos=PHOTOS, dtypes=("float64",))
    result = session.check(case)
    assert result.passed, explain(result)
