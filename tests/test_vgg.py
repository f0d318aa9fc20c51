"""VGG, the second family: its counts and names are the published ones, and it is one function in three frameworks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from math import prod

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_parity import explain, field_values

from common import architectures, checkpoints
from common import weights as canonical
from common.architectures.layers import AdaptivePool, adaptive_windows, multiply_adds, output_shapes
from common.architectures.vgg import VARIANTS, VGGSpec
from common.checkpoints import Checkpoint
from common.errors import CheckpointError, SpecError, WeightsError
from common.images import PRESETS, sample_photos
from common.names.vgg import KERAS_APPLICATIONS
from common.parity.case import Case
from common.parity.session import Session
from common.sources.known_weights import table
from tests.scripts import printed

PHOTOS = tuple(sample_photos())
# variant: parameters, those of its convolutions, multiply-adds at 224, tensors in torchvision's file
PUBLISHED = {
    "vgg11": (132_863_336, 9_220_480, 7_609_090_048, 22),
    "vgg13": (133_047_848, 9_404_992, 11_308_466_176, 26),
    "vgg16": (138_357_544, 14_714_688, 15_470_264_320, 32),
    "vgg19": (143_667_240, 20_024_384, 19_632_062_464, 38),
}
# parameters, running statistics, tensors
NORMED = {
    "vgg11_bn": (132_868_840, 5_504, 62),
    "vgg13_bn": (133_053_736, 5_888, 76),
    "vgg16_bn": (138_365_992, 8_448, 97),
    "vgg19_bn": (143_678_248, 11_008, 118),
}
# Of torchvision's `features`: the convolutions.
FEATURES = {
    "vgg11": [0, 3, 6, 8, 11, 13, 16, 18],
    "vgg13": [0, 2, 5, 7, 10, 12, 15, 17, 20, 22],
    "vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
    "vgg19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
    "vgg11_bn": [0, 4, 8, 11, 15, 18, 22, 25],
    "vgg13_bn": [0, 3, 7, 10, 14, 17, 21, 24, 28, 31],
    "vgg16_bn": [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
    "vgg19_bn": [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49],
}
SMALL = VGGSpec(convs=(1, 2), widths=(6, 8), hidden=(12, 9), classes=7, map_size=(3, 2))


def counts(spec):
    parameters = sum(layer.parameter_count for layer in spec.layers)
    return parameters, sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())


def twin(spec: VGGSpec) -> VGGSpec:
    """A few channels wide and three blocks deep: every convention of `spec`, and its code with other numbers."""
    size = (64, 65)
    return replace(
        spec,
        convs=(1, 1, 2),
        widths=(8, 10, 12),
        pointwise=(False, False, spec.pointwise[-1]),
        hidden=(20, 12),
        classes=10,
        input_size=size if spec.input_size else (),
        map_size=(7, 7) if spec.map_size else (),
    )


KINDS: dict[VGGSpec, str] = {}
for _name, _spec in VARIANTS.items():
    KINDS.setdefault(twin(_spec), _name)
SHORT = ("vgg11_bn", "vgg16_c.paper", "vgg16.keras_applications")


class TestSpec:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_parameters_and_multiply_adds_are_the_published_ones(self, name):
        spec = architectures.find(name)
        shapes = output_shapes(spec.layers, (224, 224, 3))
        operations = sum(multiply_adds(spec.layers, shapes).values())
        assert (counts(spec), operations) == ((PUBLISHED[name][0], 0), PUBLISHED[name][2])
        assert counts(spec.with_head(head="none"))[0] == PUBLISHED[name][1]

    @pytest.mark.parametrize("name", NORMED)
    def test_norms_add_their_parameters_and_statistics_and_no_bias_goes(self, name):
        spec = architectures.find(name)
        assert counts(spec) == NORMED[name][:2]
        shapes = output_shapes(spec.layers, (224, 224, 3))
        assert sum(multiply_adds(spec.layers, shapes).values()) == PUBLISHED[name.removesuffix("_bn")][2]
        assert all(layer.bias for layer in spec.layers if layer.kind == "conv")

    @pytest.mark.parametrize("name", ["vgg16.paper", "vgg16.keras_applications", "vgg19.keras_applications"])
    def test_conventions_change_no_parameter(self, name):
        assert counts(architectures.find(name)) == counts(architectures.find(name.partition(".")[0]))

    def test_configuration_c_ends_its_last_three_blocks_with_a_pointwise_convolution(self):
        # Table 2 of the paper: 134 million, against 138 of configuration D.
        spec = architectures.find("vgg16_c")
        kernels = [layer.kernel for layer in spec.layers if layer.kind == "conv"]
        assert kernels == [3, 3, 3, 3, 3, 3, 1, 3, 3, 1, 3, 3, 1]
        assert round(counts(spec)[0], -6) == 134_000_000

    def test_a_network_without_dense_layers_gives_the_last_map_or_a_vector(self):
        bare = architectures.find("vgg16").with_head(head="none")
        assert output_shapes(bare.layers, (224, 224, 3))[bare.layers[-1].path] == (7, 7, 512)
        pooled = bare.with_head(head="none", pool="max")
        assert output_shapes(pooled.layers, (224, 224, 3))[pooled.layers[-1].path] == (512,)

    def test_another_number_of_classes_changes_the_last_dense_layer_alone(self):
        spec = architectures.find("vgg16")
        changed = spec.with_head(classes=10)
        arrays = [{name: s for layer in one.layers for name, s in layer.arrays.items()} for one in (spec, changed)]
        assert {name for name in arrays[0] if arrays[0][name] != arrays[1][name]} == {"head.fc.kernel", "head.fc.bias"}

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"widths": (8,)}, "widths=(8,) is not allowed in a vgg spec; expected 2 entries, as many as convs has"),
            ({"pointwise": (True,)}, "pointwise=(True,) is not allowed in a vgg spec; expected 2 entries"),
            ({"dropout": (0.5,)}, "dropout=(0.5,) is not allowed in a vgg spec; expected 2 entries"),
            ({"dropout": (0.5, 1.0)}, "expected a list of shares of at least 0 and below 1"),
            ({"hidden": ()}, "hidden=() is not allowed in a vgg spec"),
            ({"head_pool": "average"}, "expected adaptive, adaptive_max or flatten with head logits"),
            ({"head": "none"}, "expected average, max or none with head none"),
            ({"head_pool": "flatten"}, "expected height and width with head_pool flatten"),
            ({"head_pool": "flatten", "input_size": (3, 3)}, "a size the network can take"),
            ({"input_size": (32, 32)}, "expected empty unless head_pool is flatten"),
            ({"map_size": ()}, "expected height and width with an adaptive head_pool"),
            ({"convs": (5_000, 5_001)}, "at most 10000 in all"),
        ],
        ids=str,
    )
    def test_a_contradiction_is_one_line_with_field_and_value(self, changes, expected):
        with pytest.raises(SpecError) as caught:
            SMALL.replace(**changes)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_groups_are_the_blocks_and_each_dense_layer_with_what_follows_it(self):
        groups = SMALL.replace(head="softmax").layer_groups
        assert [group[0] for group in groups] == [
            *("blocks.0.conv1", "blocks.1.conv1"),
            *("head.pool", "head.fc1", "head.fc2", "head.fc"),
        ]
        assert groups[3] == ("head.fc1", "head.relu1", "head.dropout1")
        assert groups[-1] == ("head.fc", "head.softmax")
        assert [path for group in groups for path in group] == [
            layer.path for layer in SMALL.replace(head="softmax").layers
        ]


class TestPyTorch:
    @pytest.mark.parametrize("name", FEATURES)
    def test_names_are_torchvisions(self, name):
        import torch

        import resnet_torch

        with torch.device("meta"):
            state = resnet_torch.from_spec(architectures.find(name)).state_dict()
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        convs = [int(key.split(".")[1]) for key, shape in shapes.items() if len(shape) == 4]
        assert convs == FEATURES[name]
        assert [key for key in shapes if key.startswith("classifier") and "weight" in key] == [
            f"classifier.{i}.weight" for i in (0, 3, 6)
        ]
        assert shapes["classifier.0.weight"] == (4096, 25088)
        assert len(state) == (NORMED[name][2] if name in NORMED else PUBLISHED[name][3])
        if name in NORMED:
            assert f"features.{FEATURES[name][-1] + 1}.running_var" in state

    @pytest.mark.parametrize("dropout", [0.5, 0.0])
    def test_modules_are_numbered_as_torchvisions_with_and_without_dropout(self, dropout):
        import resnet_torch

        model = resnet_torch.from_spec(SMALL.replace(dropout=(dropout, dropout)))
        kinds = [type(module).__name__ for module in model.classifier]
        assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
        assert [model.classifier[i].p for i in (2, 5)] == [dropout, dropout]
        assert [name for name, _ in model.named_children()][:3] == ["features", "avgpool", "classifier"]

    def test_the_builder_takes_torchvisions_keywords(self):
        import torch

        import resnet_torch

        with torch.device("meta"):
            model = resnet_torch.vgg11(weights=None, progress=False, num_classes=7, init_weights=False, dropout=0.25)
        assert model.spec == architectures.find("vgg11").replace(classes=7, dropout=(0.25, 0.25))
        with torch.device("meta"):
            assert resnet_torch.vgg16_bn().spec == architectures.find("vgg16_bn")

    @pytest.mark.slow
    def test_initialisation_is_torchvisions(self):
        import torch

        import resnet_torch

        torch.manual_seed(0)
        model = resnet_torch.from_spec(SMALL.replace(widths=(32, 64), hidden=(200, 100)))
        state = model.state_dict()
        # Kaiming-normal over fan_out: 2 / (64 * 9). The dense layers: N(0, 0.01).
        assert float(state["features.3.weight"].var()) == pytest.approx(2 / (64 * 9), rel=0.05)
        assert float(state["classifier.0.weight"].std()) == pytest.approx(0.01, rel=0.05)
        assert not any(tensor.any() for name, tensor in state.items() if name.endswith(".bias"))

    def test_stages_are_the_blocks_outputs(self):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(SMALL).eval()
        outputs = model.stages(torch.zeros(1, 3, 33, 20))
        assert [tuple(output.shape) for output in outputs] == [(1, 6, 16, 10), (1, 8, 8, 5)]

    def test_can_be_scripted(self):
        import torch

        import resnet_torch

        model = resnet_torch.from_spec(SMALL).eval()
        images = torch.randn(2, 3, 33, 20)
        with torch.no_grad():
            assert torch.equal(torch.jit.script(model)(images), model(images))


class TestFlax:
    def test_variables_are_called_as_the_layers_of_the_spec(self):
        import jax
        import jax.numpy as jnp
        from flax.traverse_util import flatten_dict

        import resnet_flax

        model = resnet_flax.VGG11_bn(num_classes=5)
        assert model.spec == architectures.find("vgg11_bn").replace(classes=5)
        images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        found = flatten_dict(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images))
        native = {"/".join(path): leaf.shape for path, leaf in found.items()}
        expected = {}
        for layer in model.spec.layers:
            for name, shape in layer.arrays.items():
                where = "batch_stats" if name in layer.statistics else "params"
                expected[f"{where}/{layer.path}/{name.removeprefix(layer.path + '.')}"] = shape
        assert native == expected

    @pytest.mark.slow
    @pytest.mark.usefixtures("unoptimised")
    def test_initialisation_is_torchvisions(self):
        import jax
        import jax.numpy as jnp

        import resnet_flax

        spec = SMALL.replace(widths=(32, 64), hidden=(200, 100))
        init = jax.jit(resnet_flax.from_spec(spec).init, static_argnames="train")
        params = init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)["params"]
        assert np.var(params["blocks.1.conv1"]["kernel"]) == pytest.approx(2 / (64 * 9), rel=0.05)
        assert np.std(params["head.fc1"]["kernel"]) == pytest.approx(0.01, rel=0.05)
        assert not np.any(params["head.fc1"]["bias"])

    def test_stages_are_sown(self):
        import jax
        import jax.numpy as jnp

        import resnet_flax

        model, images = resnet_flax.from_spec(SMALL), jax.ShapeDtypeStruct((1, 33, 20, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
        _, state = jax.eval_shape(partial(model.apply, train=False, mutable=["intermediates"]), variables, images)
        assert [x.shape for x in state["intermediates"]["stages"]] == [(1, 16, 10, 6), (1, 8, 5, 8)]


KERAS = """
import json, keras, numpy as np
import resnet_keras
from common import architectures
from common.architectures.vgg import VGGSpec
small = VGGSpec(convs=(1, 2), widths=(6, 8), hidden=(12, 9), classes=7, map_size=(3, 2))
found = {}
model = resnet_keras.VGG16(weights=None, classes=3, input_shape=(32, 48, 3))
found["layers"] = [layer.name for layer in model.layers if layer.weights or "pool" in layer.name]
found["spec"] = architectures.to_dict(model.spec)
found["sum"] = float(np.sum(model.predict(np.zeros((1, 32, 48, 3)), verbose=0)))
bare = resnet_keras.VGG11(include_top=False, pooling="avg")
found["bare"] = bare.output.shape, bare.count_params()
adaptive = resnet_keras.from_spec(small)
found["sizes"] = [adaptive.predict(np.zeros((2, h, w, 3)), verbose=0).shape for h, w in ((33, 20), (16, 50), (8, 9))]
path = "PATH"
adaptive.save(path)
again = keras.models.load_model(path)
images = np.random.default_rng(0).normal(size=(2, 33, 20, 3))
found["same"] = bool((again.predict(images, verbose=0) == adaptive.predict(images, verbose=0)).all())
print(json.dumps(found))
"""


def run_keras(code: str, engine: str) -> list:
    environment = os.environ | {"KERAS_BACKEND": engine, "JAX_ENABLE_X64": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_keras_models_are_those_of_keras_applications_at_any_size(session, tmp_path):
    found = printed(session, "keras:tensorflow", KERAS.replace("PATH", str(tmp_path / "small.keras")))
    convs = (2, 2, 3, 3, 3)
    blocks = [[*(f"block{b}_conv{i}" for i in range(1, n + 1)), f"block{b}_pool"] for b, n in enumerate(convs, start=1)]
    assert found["layers"] == [*(name for block in blocks for name in block), "fc1", "fc2", "predictions"]
    expected = architectures.find("vgg16.keras_applications").replace(classes=3, input_size=(32, 48))
    assert architectures.from_dict(found["spec"]) == expected
    assert found["sum"] == pytest.approx(1, abs=1e-6)
    assert found["bare"] == [[None, 512], PUBLISHED["vgg11"][1]]
    assert found["sizes"] == [[2, 7]] * 3
    assert found["same"]


# Each prints outputs and gradients of an adaptive pool of X, (2, 14, 9, 3), to CELLS, with D the slopes in its output.
POOLS = {
    "torch": """
import torch
from torch import nn
x = torch.tensor(X).permute(0, 3, 1, 2).requires_grad_()
y = {"average": nn.AdaptiveAvgPool2d, "max": nn.AdaptiveMaxPool2d}[OP](CELLS)(x)
y.backward(torch.tensor(D).permute(0, 3, 1, 2))
y, g = y.detach().permute(0, 2, 3, 1).numpy(), x.grad.permute(0, 2, 3, 1).numpy()
""",
    "keras": """
import keras
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
from resnet_keras.layers import AdaptivePooling2D
layer = AdaptivePooling2D(CELLS, OP)
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    with tf.GradientTape() as tape:
        x = tf.constant(X)
        tape.watch(x)
        y = layer(x)
    g = tape.gradient(y, x, tf.constant(D))
elif keras.backend.backend() == "jax":
    import jax
    y, pull = jax.vjp(jax.jit(layer), jax.numpy.array(X))
    g, = pull(jax.numpy.array(D))
else:
    import torch
    x = torch.tensor(X, requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(D))
    y, g = y.detach(), x.grad
y, g = np.asarray(y), np.asarray(g)
""",
    "flax": """
import jax
jax.config.update("jax_enable_x64", True)
from resnet_flax.layers import adaptive_pool
from tests.scripts import unoptimised
reduce = {"average": jax.numpy.mean, "max": jax.numpy.max}[OP]
def both(x, d):
    y, pull = jax.vjp(lambda x: adaptive_pool(x, CELLS, reduce), x)
    return y, *pull(d)
with unoptimised():
    y, g = jax.jit(both)(X, D)
""",
}
SCRIPT = """
import json
import numpy as np
results = []
for OP in ("average", "max"):
    for size, CELLS in {cases}:
        generator = np.random.default_rng(0)
        X = generator.standard_normal((2, *size, 3))
        D = generator.standard_normal((2, *CELLS, 3))
{network}
        results.append([np.asarray(y).tolist(), np.asarray(g).tolist()])
print(json.dumps(results))
"""
# A sum of n terms of at most m is off by n² u m at most: 49 slopes of a pixel that every cell reads, none above 5.
ROUNDING = 49**2 * 2**-53 * 5
# Even and odd, a divisor and not, fewer pixels than cells, and as many.
CASES = [((14, 9), (7, 7)), ((8, 7), (3, 3)), ((2, 1), (7, 7)), ((7, 7), (7, 7)), ((5, 13), (1, 4))]


def pooled(images, slopes, cells, op):
    """The definition, cell by cell: values and the slopes in the images."""
    out, gradient = np.zeros((len(images), *cells, images.shape[-1])), np.zeros_like(images)
    for i, (top, bottom) in enumerate(adaptive_windows(images.shape[1], cells[0])):
        for j, (left, right) in enumerate(adaptive_windows(images.shape[2], cells[1])):
            window = images[:, top:bottom, left:right]
            reduce = np.mean if op == "average" else np.max
            out[:, i, j] = value = reduce(window, axis=(1, 2))
            count = window.shape[1] * window.shape[2]
            share = 1 / count if op == "average" else window == value[:, None, None]
            gradient[:, top:bottom, left:right] += share * slopes[:, i, j][:, None, None]
    return out, gradient


@pytest.mark.slow
@pytest.mark.parametrize(
    "column",
    [
        *("torch", "keras:tensorflow", "flax"),
        *(pytest.param(engine, marks=pytest.mark.long) for engine in ("keras:jax", "keras:torch")),
    ],
)
def test_adaptive_pools_follow_the_definition_forwards_and_backwards(session, column):
    framework, _, engine = column.partition(":")
    network = "\n".join(f"        {line}" for line in POOLS[framework].splitlines())
    script = SCRIPT.format(cases=CASES, network=network)
    found = iter(printed(session, column, script) if column in session.columns else run_keras(script, engine))
    for op in ("average", "max"):
        for size, cells in CASES:
            generator = np.random.default_rng(0)
            images, slopes = generator.standard_normal((2, *size, 3)), generator.standard_normal((2, *cells, 3))
            value, gradient = map(np.array, next(found))
            expected = pooled(images, slopes, cells, op)
            exact = op == "max" or size == cells
            assert np.array_equal(value, expected[0]) if exact else np.allclose(value, expected[0], 0, ROUNDING)
            assert np.allclose(gradient, expected[1], 0, ROUNDING)


def test_windows_cover_the_map_and_are_the_identity_where_there_are_as_many():
    for size in range(1, 30):
        for cells in range(1, 12):
            windows = adaptive_windows(size, cells)
            assert {pixel for window in windows for pixel in range(*window)} == set(range(size))
            assert len(windows) == cells
        assert adaptive_windows(size, size) == [(i, i + 1) for i in range(size)]
    assert AdaptivePool(path="p", inputs=("x",), op="max", height=3, width=2).output_shape((9, 9, 5)) == (3, 2, 5)


def test_the_short_list_has_every_value_of_every_field():
    assert field_values(spec for spec, name in KINDS.items() if name in SHORT) == field_values(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=[] if name in SHORT else [pytest.mark.long]) for spec, name in KINDS.items()],
    ids=KINDS.get,
)
def test_every_kind_of_vgg_is_one_function_in_three_frameworks(session: Session, spec: VGGSpec) -> None:
    result = session.check(Case(variant=KINDS[spec], spec=spec, size=(64, 65), photos=PHOTOS, dtypes=("float64",)))
    assert result.passed, explain(result)


def checkpoint(spec: VGGSpec) -> Checkpoint:
    return Checkpoint(spec=spec, weights=canonical.randomize(spec, 0), preprocessing=PRESETS["torchvision"])


def arrays(weights):
    return {name: np.array(weights[name]) for name in weights}


class TestNames:
    # Foreign names show a depth that has a name, at any width.
    PLAIN = VGGSpec(convs=(1, 1, 2, 2, 2), widths=(4, 5, 6, 7, 8), hidden=(12, 9), classes=7)
    NORMED = PLAIN.replace(norm=True)

    @pytest.mark.parametrize(
        ("name", "to"),
        [
            ("a.pth", "torchvision"),
            ("a.safetensors", "torchvision"),
            ("a.safetensors", "timm"),
            ("a.safetensors", "canonical"),
            ("a.msgpack", "flax"),
        ],
    )
    def test_a_file_in_any_names_gives_back_the_spec_and_every_bit(self, tmp_path, name, to):
        made = checkpoint(self.NORMED)
        checkpoints.write(tmp_path / name, made, to)
        found = checkpoints.read(tmp_path / name)
        assert (found.spec, found.origin.format) == (self.NORMED, to)
        for array, values in arrays(found.weights).items():
            assert np.array_equal(values, made.weights[array]), array

    @pytest.mark.parametrize("name", ["a.h5", "a.weights.h5"])
    def test_files_of_keras_applications_end_in_a_softmax_of_a_flattened_map(self, tmp_path, name):
        spec = architectures.find("vgg16.keras_applications").replace(widths=(4,) * 5, hidden=(6, 5), classes=3)
        made = checkpoint(spec)
        checkpoints.write(tmp_path / name, made, "keras_applications")
        found = checkpoints.read(tmp_path / name)
        assert found.spec == spec
        assert found.preprocessing == PRESETS["keras_caffe"]
        assert all(np.array_equal(found.weights[array], made.weights[array]) for array in made.weights)

    def test_a_keras_model_of_another_size_is_read_once_its_size_is_said(self, tmp_path):
        spec = architectures.find("vgg16.keras_applications").replace(widths=(4,) * 5, hidden=(6, 5), classes=3)
        spec = spec.replace(input_size=(32, 64))
        checkpoints.write(tmp_path / "a.h5", checkpoint(spec), "keras_applications")
        with pytest.raises(CheckpointError, match="fc1/kernel has shape"):
            checkpoints.read(tmp_path / "a.h5")
        assert checkpoints.read(tmp_path / "a.h5", changes={"input_size": (32, 64)}).spec == spec

    def test_timm_stores_the_first_dense_layers_as_convolutions(self, tmp_path):
        made = checkpoint(self.NORMED)
        checkpoints.write(tmp_path / "a.safetensors", made, "timm")
        stored = load_file(tmp_path / "a.safetensors")
        assert stored["pre_logits.fc1.weight"].shape == (12, 8, 7, 7)
        assert stored["pre_logits.fc2.weight"].shape == (9, 12, 1, 1)
        rows = made.weights["head.fc1.kernel"].reshape(7, 7, 8, 12)
        assert np.array_equal(stored["pre_logits.fc1.weight"], rows.transpose(3, 2, 0, 1))
        assert stored["head.fc.weight"].shape == (7, 9)

    def test_the_rows_of_torchvisions_first_dense_layer_go_by_channel(self, tmp_path):
        made = checkpoint(self.NORMED)
        checkpoints.write(tmp_path / "a.safetensors", made, "torchvision")
        stored = load_file(tmp_path / "a.safetensors")
        rows = made.weights["head.fc1.kernel"].reshape(7, 7, 8, 12)
        assert np.array_equal(stored["classifier.0.weight"], rows.transpose(3, 2, 0, 1).reshape(12, -1))

    def test_names_of_keras_1_are_read(self, tmp_path):
        spec = architectures.find("vgg16.keras_applications").replace(widths=(4,) * 5, hidden=(6, 5), classes=3)
        made, layers = checkpoint(spec), KERAS_APPLICATIONS.layers(spec)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            for layer in spec.layers:
                name = layers[layer.path]
                group = file.create_group(name)
                for array in layer.arrays:
                    old = "W" if array.endswith("kernel") else "b"
                    group[f"{name}_{old}_1:0"] = made.weights[array]
        found = checkpoints.read(tmp_path / "a.h5")
        assert found.spec == spec
        assert all(np.array_equal(found.weights[array], made.weights[array]) for array in made.weights)

    @pytest.mark.parametrize("name", ["a.pth", "a.h5", "a.msgpack"])
    def test_a_file_without_dense_layers_is_a_network_without_them(self, tmp_path, name):
        bare = self.NORMED.with_head(head="none", pool="average")
        checkpoints.write(tmp_path / name, checkpoint(bare))
        assert checkpoints.read(tmp_path / name).spec.layers == bare.layers

    def test_a_new_number_of_classes_keeps_fc6_and_fc7(self, tmp_path):
        made = checkpoint(self.NORMED)
        changed = made.with_classes(3)
        assert changed.spec == self.NORMED.replace(classes=3)
        for array in ("head.fc1.kernel", "head.fc2.kernel", "blocks.4.norm2.var"):
            assert np.array_equal(changed.weights[array], made.weights[array])
        assert changed.weights["head.fc.kernel"].shape == (9, 3)

    def test_the_weights_of_the_other_family_are_refused_in_one_line_that_names_both(self, tmp_path):
        resnet = architectures.find("resnet20")
        checkpoints.write(tmp_path / "vgg.pth", checkpoint(self.PLAIN))
        made = Checkpoint(spec=resnet, weights=canonical.randomize(resnet, 0), preprocessing=PRESETS["torchvision"])
        checkpoints.write(tmp_path / "resnet.safetensors", made)
        for spec, file, there, here in (
            (resnet, "vgg.pth", "vgg", "resnet"),
            (SMALL, "resnet.safetensors", "resnet", "vgg"),
        ):
            with pytest.raises(WeightsError) as caught:
                checkpoints.read_for(spec, tmp_path / file)
            message = str(caught.value)
            assert f"these are the weights of a {there}, and the network is a {here}" in message
            assert "\n" not in message

    def test_published_weights_name_every_variant_that_has_some(self):
        known = [entry for entry in table() if entry.spec.family == "vgg"]
        assert {entry.variant for entry in known} == {*PUBLISHED, *NORMED}
        assert all(entry.preprocessing == "keras_caffe" for entry in known if entry.reference.startswith("keras:"))
        assert [entry.spec.head for entry in known if entry.reference == "keras:vgg19:imagenet:notop"] == ["none"]
