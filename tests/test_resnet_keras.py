"""The Keras backend: names, signatures, shapes, files, weights, and the same model on each of Keras' backends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from written import save_weights

import resnet_keras
from common import weights as canonical
from common.architectures import find
from common.architectures.layers import output_shapes
from common.architectures.resnet import VARIANTS, ResNetSpec
from common.errors import WeightsError
from resnet_keras import backend as probe
from resnet_keras.resnet import block_names, layer_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TINY = {"blocks": (2, 2), "widths": (8, 16), "stem_width": 8, "classes": 5}
BASIC = ResNetSpec(block="basic", **TINY)
BOTTLENECK = ResNetSpec(block="bottleneck", **TINY)
DILATED = ResNetSpec(
    block="basic",
    blocks=(1, 2, 1, 1),
    widths=(8, 8, 8, 8),
    stem_width=8,
    stem_pool=False,
    replace_stride_with_dilation=(True, False, True),
)
SPECS = {
    "basic": BASIC,
    "bottleneck": BOTTLENECK,
    "same": BOTTLENECK.replace(stem_padding="same", pool_padding="same", block_padding="same"),
    "valid": BOTTLENECK.replace(stem_padding="valid", pool_padding="valid", stride_in="conv1", head="softmax"),
    "ceil": BASIC.replace(pool_padding="ceil", stride_in="conv2", head_pool="max"),
    "biased": BASIC.replace(running_variance="biased", conv_bias=True, shortcut_norm=False),
    "zero_pad": BASIC.replace(stem_kernel=3, stem_stride=1, stem_pool=False, shortcut="zero_pad"),
    "no_norm": BASIC.replace(norm=False, conv_bias=True, head="none", head_pool="none"),
    "even_stem": BASIC.replace(stem_kernel=4, stem_stride=3, stem_padding="same", in_channels=4),
    "three_stages": BASIC.replace(blocks=(1, 1, 1), widths=(8, 8, 16), stem_width=4),
    "flatten": BASIC.replace(head_pool="flatten", input_size=(33, 40)),
    "dilated": DILATED,
    "dilated_same": DILATED.replace(block_padding="same"),
    "grouped": BOTTLENECK.replace(blocks=(1, 1), widths=(16, 16), groups=4, width_per_group=16),
}
GROUPED = SPECS["grouped"].replace(blocks=(1,), widths=(16,))


@pytest.fixture(scope="module", autouse=True)  # threads are set before TensorFlow is first used
def backend() -> probe.KerasBackend:
    return probe.start(1)


@pytest.fixture(autouse=True)
def _float32_unless_asked() -> None:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def images(spec: ResNetSpec, size: tuple[int, int] = (40, 33), count: int = 2) -> np.ndarray:
    height, width = spec.input_size or size
    return np.random.default_rng(0).normal(size=(count, height, width, spec.in_channels))


def run(backend: probe.KerasBackend, spec: ResNetSpec, batch: np.ndarray, **options: bool) -> dict[str, np.ndarray]:
    model = backend.build(spec, "float64")
    backend.load(model, canonical.randomize(spec))
    return backend.run(model, batch, np.arange(len(batch)) % 3, **({"training": False, "gradients": False} | options))


def at(tensor: np.ndarray, top: int, left: int, stride: int, dilation: int) -> np.ndarray:
    """The 3x3 windows of an already padded map, as (N, H, W, 3, 3, C)."""
    windows = np.lib.stride_tricks.sliding_window_view(tensor, (2 * dilation + 1,) * 2, axis=(1, 2))
    return windows[:, top::stride, left::stride, :, ::dilation, ::dilation].transpose(0, 1, 2, 4, 5, 3)


# Names


def test_resnet50_has_the_classic_names() -> None:
    names = [layer.name for layer in resnet_keras.ResNet50(input_shape=(64, 64, 3)).layers]
    expected = """conv1 bn_conv1 conv1_relu pool1 res2a_branch2a bn2a_branch2a res2a_branch2b bn2a_branch2b
        res2a_branch2c bn2a_branch2c res2a_branch1 bn2a_branch1 res2a res2a_relu res2c_branch2c res3a_branch1 res3d_relu
        res4f_branch2b bn4f_branch2b res5a_branch1 bn5a_branch1 res5c_branch2c res5c res5c_relu pool5 fc1000
        prob"""
    for name in expected.split():
        assert names.count(name) == 1, name
    assert not {"res2b_branch1", "res2d", "res4g", "res6a"} & set(names)


def test_a_stage_longer_than_the_alphabet_takes_the_caffe_form() -> None:
    names = layer_names(VARIANTS["resnet152"])
    assert names["stages.2.blocks.0.conv1"] == "res4a_branch2a"
    assert names["stages.2.blocks.1.add"] == "res4b1"
    assert names["stages.2.blocks.35.norm3"] == "bn4b35_branch2c"
    assert names["stages.1.blocks.7.conv1"] == "res3h_branch2a"
    assert block_names(26)[-1] == "z"
    assert block_names(27)[1] == "b1"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_of_a_walk_has_one_name_of_its_own(variant: str) -> None:
    names, layers = layer_names(VARIANTS[variant]), VARIANTS[variant].layers
    assert list(names) == [layer.path for layer in layers]
    assert len(set(names.values())) == sum(not layer.shares for layer in layers)


# The constructors


def test_parameters_are_those_of_keras_applications() -> None:
    model = resnet_keras.ResNet50()
    assert model.count_params() == 25_636_712
    assert model.name == "resnet50"
    assert model.input_shape == (None, 224, 224, 3)
    assert resnet_keras.ResNet50(include_top=False).count_params() == 23_587_712


def test_resnet50_is_the_function_of_keras_applications() -> None:
    keras.config.set_dtype_policy("float64")
    theirs = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=7)
    ours = resnet_keras.ResNet50(input_shape=(32, 32, 3), classes=7)
    weights = canonical.randomize(ours.spec)
    resnet_keras.load_weights(ours, weights)
    roles = {"conv": ("kernel", "bias"), "bn": ("scale", "bias", "mean", "var")}
    for layer in theirs.layers:
        if not layer.weights:
            continue
        if layer.name == "predictions":
            path, kind = "head.fc", "conv"
        else:
            head, *position, kind = layer.name.split("_")
            role = {"conv": "conv", "bn": "norm"}[kind]
            path = f"stem.{role}"
            if position:
                block = f"stages.{int(head[4:]) - 2}.blocks.{int(position[0][5:]) - 1}"
                path = f"{block}.shortcut.{role}" if position[1] == "0" else f"{block}.{role}{position[1]}"
        layer.set_weights([weights[f"{path}.{role}"] for role in roles[kind]])
    batch = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    for training in (False, True):
        expected = keras.ops.convert_to_numpy(theirs(batch, training=training))
        found = keras.ops.convert_to_numpy(ours(batch, training=training))
        assert expected.dtype == found.dtype == np.float64
        assert np.linalg.norm(found - expected) <= 1e-15 * np.linalg.norm(expected)


def test_without_its_top_a_model_returns_a_map_or_a_pooled_vector() -> None:
    options = {"include_top": False, "input_shape": (64, 96, 3)}
    assert resnet_keras.ResNet18(**options).output_shape == (None, 2, 3, 512)
    assert resnet_keras.ResNet18(include_top=False).output_shape == (None, None, None, 512)
    batch = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype("float32")
    for pooling, reduce in (("avg", np.mean), ("max", np.max)):
        model = resnet_keras.ResNet18(**options, pooling=pooling)
        features = keras.ops.convert_to_numpy(resnet_keras.stage_outputs(model)(batch)[-1])
        assert np.allclose(keras.ops.convert_to_numpy(model(batch)), reduce(features, axis=(1, 2)), atol=1e-5)


def test_classifier_activation_is_any_of_keras() -> None:
    options = {"input_shape": (32, 32, 3)}
    logits = resnet_keras.ResNet20(**options, classifier_activation=None)
    assert logits.layers[-1].name == "fc10"
    batch = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    raw = keras.ops.convert_to_numpy(logits(batch))
    for activation, function in (
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("softmax", lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)),
        (keras.activations.tanh, np.tanh),
    ):
        model = resnet_keras.ResNet20(**options, classifier_activation=activation)
        resnet_keras.load_weights(model, dict(resnet_keras.export_weights(logits)))
        assert np.allclose(keras.ops.convert_to_numpy(model(batch)), function(raw), atol=1e-6)


def test_a_model_builds_upon_a_given_tensor_and_what_comes_before_it() -> None:
    pixels = keras.Input((48, 48, 3), name="pixels")
    scaled = keras.layers.Rescaling(1 / 255, name="scaled")(pixels)
    model = resnet_keras.ResNet18(include_top=False, input_tensor=scaled)
    assert [tensor.name for tensor in model.inputs] == ["pixels"]
    assert model.get_layer("scaled") is not None
    assert model.output_shape == (None, 2, 2, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": (31, 64, 3)}, "at least 32x32"),
        ({"input_shape": (64, 64)}, "height, width, channels"),
        ({"input_shape": (None, None, 3)}, "must be static"),
        ({"include_top": False, "pooling": "sum"}, "pooling='sum'"),
        ({"classifier_activation": "no such"}, "no such"),
        ({"weights": "imagenet"}, "keras has published no weights of resnet18"),
        ({"weights": "no/such.safetensors"}, "no/such.safetensors"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resnet_keras.ResNet18(**options)


def test_a_tensor_of_another_shape_than_input_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="contradicts input_tensor"):
        resnet_keras.ResNet18(input_tensor=keras.Input((64, 64, 3)), input_shape=(96, 96, 3))
    with pytest.raises(ValueError, match="expected"):
        resnet_keras.from_spec(BASIC, input_shape=(64, 64, 4))


def test_siblings_have_their_own_conventions() -> None:
    cifar = resnet_keras.ResNet20()
    assert cifar.output_shape == (None, 10)
    assert cifar.input_shape == (None, 32, 32, 3)
    assert resnet_keras.ResNet20.__name__ == "ResNet20"
    grouped = resnet_keras.ResNeXt50_32x4d(input_shape=(32, 32, 3))
    assert grouped.get_layer("res2a_branch2b").groups == 32
    assert resnet_keras.WideResNet50_2(input_shape=(32, 32, 3)).get_layer("res2a_branch2a").filters == 128


# The data format


@pytest.fixture
def channels_first() -> Iterator[None]:
    """What a user's keras.json may say."""
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format(before)


@pytest.mark.usefixtures("channels_first")
def test_a_builder_follows_the_image_data_format_of_keras() -> None:
    model = resnet_keras.ResNet50()
    assert model.input_shape == (None, 3, 224, 224)
    backbone = resnet_keras.ResNet18(include_top=False, input_shape=(4, 64, 96))
    assert backbone.output_shape == (None, 512, 2, 3)
    assert resnet_keras.ResNet18(include_top=False).input_shape == (None, 3, None, None)
    maps = resnet_keras.stage_outputs(backbone)
    assert [shape[1:] for shape in maps.output_shape] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    pixels = keras.Input((2, 48, 48))
    assert resnet_keras.ResNet18(include_top=False, input_tensor=pixels).spec.in_channels == 2
    with pytest.raises(ValueError, match="channels, height, width"):
        resnet_keras.ResNet18(input_shape=(64, 64))
    with pytest.raises(ValueError, match="at least 32x32"):
        resnet_keras.ResNet18(input_shape=(3, 31, 64))
    with pytest.raises(ValueError, match="contradicts input_tensor"):
        resnet_keras.ResNet18(input_tensor=pixels, input_shape=(3, 48, 48))


@pytest.mark.usefixtures("channels_first")
def test_a_spec_is_built_with_channels_last_unless_told_whatever_the_image_data_format(
    backend: probe.KerasBackend,
) -> None:
    spec = SPECS["dilated_same"]
    assert resnet_keras.from_spec(spec).input_shape == (None, None, None, 3)
    assert run(backend, spec, images(spec))  # TensorFlow's CPU has no convolution with channels first
    first = resnet_keras.from_spec(spec, data_format="channels_first", kernel_initializer="zeros")
    assert first.input_shape == (None, 3, None, None)
    formats = {layer.get_config().get("data_format") for layer in first.layers} - {None}
    assert formats == {"channels_first"}
    with pytest.raises(ValueError, match="data_format='NCHW' is unknown; expected 'channels_last' or 'channels_first'"):
        resnet_keras.from_spec(spec, data_format="NCHW")
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
        resnet_keras.from_spec(spec, data_format="channels_first", input_shape=(64, 64, 3))


@pytest.mark.parametrize("name", SPECS)
def test_channels_first_moves_the_channels_and_nothing_else(name: str) -> None:
    """Every layer but the head's of one model has the shape of the other's, transposed; the arrays are the same."""
    spec = SPECS[name]
    size = spec.input_size or (40, 33)
    last = resnet_keras.from_spec(spec, input_shape=(*size, spec.in_channels))
    first = resnet_keras.from_spec(spec, input_shape=(spec.in_channels, *size), data_format="channels_first")
    assert len(last.layers) == len(first.layers)
    for one, other in zip(last.layers, first.layers, strict=True):
        shape = tuple(one.output.shape)
        expected = (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
        assert tuple(other.output.shape) == expected, one.name
        assert [variable.shape for variable in other.variables] == [variable.shape for variable in one.variables]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_a_builder_whose_head_takes_one_size_takes_that_of_its_input(
    data_format: str, request: pytest.FixtureRequest
) -> None:
    if data_format == "channels_first":
        request.getfixturevalue("channels_first")
    shape = (3, 64, 32) if data_format == "channels_first" else (64, 32, 3)
    model = resnet_keras.VGG16(input_shape=shape, classes=7, classifier_activation="sigmoid")
    assert model.spec.input_size == (64, 32)
    assert model.output_shape == (None, 7)
    assert model.layers[-1].name == "predictions_softmax"  # the name of that place
    anywhere = resnet_keras.VGG16(include_top=False, pooling="avg")
    assert anywhere.spec.input_size == ()
    assert anywhere.output_shape == (None, 512)


BOTH_FORMATS = """
import numpy as np, tempfile
from resnet_keras import backend as probe
probe.start(1)
import keras
import resnet_keras
from common import weights as canonical
from common.architectures.resnet import ResNetSpec
from common.architectures.vgg import VGGSpec
from common.architectures.densenet import DenseNetSpec
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
TINY = ResNetSpec(block="basic", blocks=(1, 1), widths=(4, 8), stem_width=4, classes=5)
DEEP = ResNetSpec(block="bottleneck", blocks=(1, 1, 1), widths=(8, 8, 8), stem_width=4, expansion=2, classes=5)
DILATED = {"stem_pool": False, "replace_stride_with_dilation": (True, False), "block_padding": "same"}
NORMLESS = {"norm": False, "conv_bias": True, "head_pool": "max"}  # Keras rounds norms and means to float32 here
SPECS = (
    (VGGSpec(convs=(1, 1), widths=(4, 6), hidden=(5, 7), classes=3, map_size=(3, 2)), 1e-13),
    (TINY.replace(shortcut="zero_pad", **NORMLESS), 1e-13),
    (DEEP.replace(**DILATED, **NORMLESS), 1e-13),
    (DenseNetSpec(blocks=(2, 1), growth_rate=4, stem_width=6, classes=3, conv_bias=True, transition_padding=1), 2e-5),
    (TINY.replace(stem_padding="same", pool_padding="same", block_padding="same", running_variance="biased"), 2e-5),
    (TINY.replace(head_pool="flatten", input_size=(34, 35), pool_padding="ceil", head="softmax"), 2e-5),
    (DEEP.replace(**DILATED, groups=2, width_per_group=32, head="none", head_pool="none"), 2e-5),
)
if keras.backend.backend() == "jax":
    SPECS = (SPECS[1], SPECS[-1])  # each operation is compiled for each shape, and takes longer than all else
def moved(array):
    return np.moveaxis(array, -1, 1) if array.ndim == 4 else array
def computed(model, images, training):
    outputs = [layer.output for layer in model.layers[1:]]
    found = keras.Model(model.input, outputs)(images, training=training)
    return {layer.name: keras.ops.convert_to_numpy(tap) for layer, tap in zip(model.layers[1:], found)}
batch = np.random.default_rng(0).normal(size=(2, 34, 35, 3))
images = moved(batch)
checked = 0
for spec, limit in SPECS:
    weights = canonical.randomize(spec)
    last = resnet_keras.from_spec(spec, kernel_initializer="zeros")
    first = resnet_keras.from_spec(spec, data_format="channels_first", kernel_initializer="zeros")
    for model in (last, first):
        resnet_keras.load_weights(model, weights)
    with tempfile.TemporaryDirectory() as folder:
        first.save(folder + "/first.keras")
        again = keras.models.load_model(folder + "/first.keras")
    assert np.array_equal(keras.ops.convert_to_numpy(first(images)), keras.ops.convert_to_numpy(again(images)))
    for training in (False, True) if spec.norm else (False,):
        expected, found = computed(last, batch, training), computed(first, images, training)
        for layer, tap in expected.items():
            assert found[layer].shape == moved(tap).shape, (spec, layer)
            error = np.linalg.norm(found[layer] - moved(tap)) / np.linalg.norm(tap)
            assert error <= limit, (spec, layer, training, error)
            checked += 1
    after, expected = resnet_keras.export_weights(first), resnet_keras.export_weights(last)
    for key in weights:  # the running statistics, after one step of training
        assert np.linalg.norm(after[key] - expected[key]) <= limit * np.linalg.norm(expected[key]), (spec, key)
        assert not key.endswith(".var") or not np.array_equal(after[key], weights[key])
print(keras.backend.backend(), checked)
"""


@pytest.mark.parametrize("name", [pytest.param("jax", marks=pytest.mark.long), "torch"])
def test_a_model_with_channels_first_computes_what_the_other_does(name: str) -> None:
    """TensorFlow's CPU has no convolution with channels first."""
    process = started(BOTH_FORMATS, KERAS_BACKEND=name)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-2000:]
    framework, checked = output.split()
    assert framework == name
    assert int(checked) > 60


# The function


@pytest.mark.parametrize("name", SPECS)
def test_taps_have_the_shapes_and_convolutions_the_numbers_of_the_walk(backend: probe.KerasBackend, name: str) -> None:
    spec = SPECS[name]
    for size in ((40, 33), (33, 64)):
        batch = images(spec, size)
        found = run(backend, spec, batch)
        expected = output_shapes(spec.layers, batch.shape[1:])
        for layer in spec.layers:
            assert found[f"tap/{layer.path}"].shape == (len(batch), *expected[layer.path])
            assert found[f"tap/{layer.path}"].dtype == np.float64


@pytest.mark.parametrize("name", ["basic", "same", "dilated", "dilated_same", "zero_pad"])
@pytest.mark.parametrize("size", [(40, 33), (33, 40)])
def test_convolutions_and_pools_read_the_windows_of_the_walk(
    backend: probe.KerasBackend, name: str, size: tuple[int, int]
) -> None:
    spec = SPECS[name]
    batch = images(spec, size)
    taps, weights = run(backend, spec, batch), canonical.randomize(spec)
    checked = 0
    for layer in spec.layers:
        if layer.kind not in ("conv", "max_pool") or layer.kernel != 3:
            continue
        source = batch if layer.inputs[0] == "input" else taps[f"tap/{layer.inputs[0]}"]
        padding = layer.spatial_padding(source.shape[1:])
        fill = 0.0 if layer.kind == "conv" else -np.inf
        padded = np.pad(source, ((0, 0), *padding, (0, 0)), constant_values=fill)
        windows = at(padded, 0, 0, layer.stride, layer.dilation)
        if layer.kind == "conv":
            expected = np.einsum("nhwijc,ijco->nhwo", windows, weights[f"{layer.path}.kernel"])
        else:
            expected = windows.max(axis=(3, 4))
        np.testing.assert_allclose(taps[f"tap/{layer.path}"], expected, rtol=1e-12, atol=1e-12)
        checked += 1
    assert checked >= 5


def test_zero_padded_shortcuts_subsample_and_append_zeros(backend: probe.KerasBackend) -> None:
    taps = run(backend, SPECS["zero_pad"], images(BASIC))
    before, after = taps["tap/stages.0.blocks.1.relu"], taps["tap/stages.1.blocks.0.shortcut.pad"]
    assert np.array_equal(after[..., :8], before[:, ::2, ::2])
    assert not after[..., 8:].any()


@pytest.mark.parametrize("variance", ["unbiased", "biased"])
def test_running_statistics_follow_the_convention_and_do_not_leak(backend: probe.KerasBackend, variance: str) -> None:
    spec = BASIC.replace(running_variance=variance, bn_momentum=0.8)
    weights, batch = canonical.randomize(spec), images(BASIC)
    model = backend.build(spec, "float64")
    backend.load(model, weights)
    first = backend.run(model, batch, np.array([0, 1]), training=True, gradients=True)
    second = backend.run(model, batch, np.array([0, 1]), training=True, gradients=False)
    conv = first["tap/stem.conv"]
    count = conv[..., 0].size
    factor = count / (count - 1) if variance == "unbiased" else 1
    var = 0.8 * weights["stem.norm.var"] + 0.2 * conv.var(axis=(0, 1, 2)) * factor
    mean = 0.8 * weights["stem.norm.mean"] + 0.2 * conv.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(first["stat/stem.norm.var"], var, rtol=1e-14)
    np.testing.assert_allclose(first["stat/stem.norm.mean"], mean, rtol=1e-13)
    for name in canonical.shapes(spec):
        assert np.array_equal(backend.export(model)[name], weights[name])
        if name.endswith((".mean", ".var")):
            assert np.array_equal(first[f"stat/{name}"], second[f"stat/{name}"])


def test_a_frozen_norm_uses_and_keeps_its_running_statistics() -> None:
    model = resnet_keras.from_spec(BASIC)
    norm = model.get_layer("bn_conv1")
    norm.trainable = False
    model(images(BASIC), training=True)
    assert np.array_equal(keras.ops.convert_to_numpy(norm.moving_variance), np.ones(8))
    other = model.get_layer("bn2a_branch2a")
    assert not np.array_equal(keras.ops.convert_to_numpy(other.moving_variance), np.ones(8))


@pytest.mark.parametrize("name", ["bottleneck", "valid", "biased", "dilated_same", "no_norm", "grouped"])
def test_gradients_are_the_slopes_of_the_loss(backend: probe.KerasBackend, name: str) -> None:
    spec = SPECS[name]
    batch, weights = images(spec), canonical.randomize(spec)
    labels = np.array([0, 1])
    model = backend.build(spec, "float64")
    backend.load(model, weights)
    found = backend.run(model, batch, labels, training=False, gradients=True)
    parameters = [key for layer in spec.layers for key in layer.parameters]
    assert {key for key in found if key.startswith("grad/")} == {f"grad/{key}" for key in (*parameters, "input")}
    for key in ("input", "stem.conv.kernel", "stages.1.blocks.0.conv2.kernel"):
        value = batch if key == "input" else weights[key]
        step = 1e-7 * np.random.default_rng(1).normal(size=value.shape)
        losses = []
        for sign in (1, -1):
            backend.load(model, weights if key == "input" else weights | {key: value + sign * step})
            moved = batch + sign * step if key == "input" else batch
            losses.append(backend.run(model, moved, labels, training=False, gradients=False)["loss"])
        assert (losses[0] - losses[1]) / 2 == pytest.approx(np.sum(found[f"grad/{key}"] * step), rel=1e-4)


def test_grouped_convolutions_keep_their_groups_apart(backend: probe.KerasBackend) -> None:
    found = run(backend, GROUPED, images(GROUPED, (16, 16)))
    source, weights = found["tap/stages.0.blocks.0.relu1"], canonical.randomize(GROUPED)
    kernel = weights["stages.0.blocks.0.conv2.kernel"]
    windows = at(np.pad(source, ((0, 0), (1, 1), (1, 1), (0, 0))), 0, 0, 1, 1)
    each = [
        np.einsum("nhwijc,ijco->nhwo", part, filters)
        for part, filters in zip(np.split(windows, 4, axis=-1), np.split(kernel, 4, axis=-1), strict=True)
    ]
    np.testing.assert_allclose(
        found["tap/stages.0.blocks.0.conv2"], np.concatenate(each, axis=-1), rtol=1e-11, atol=1e-12
    )


def test_the_loss_is_of_its_head(backend: probe.KerasBackend) -> None:
    batch = images(BASIC)
    logits = run(backend, BASIC, batch)
    z = logits["tap/head.fc"]
    likelihood = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    expected = -np.log(likelihood[[0, 1], [0, 1]]).mean()
    assert logits["loss"] == pytest.approx(expected, rel=1e-14)
    assert run(backend, BASIC.replace(head="softmax"), batch)["loss"] == pytest.approx(expected, rel=1e-14)
    none = run(backend, BASIC.replace(head="none"), batch)
    assert none["loss"] == pytest.approx(np.mean(none["tap/head.pool"] ** 2) / 2, rel=1e-14)


def test_stage_outputs_are_those_of_the_spec(backend: probe.KerasBackend) -> None:
    spec = find("resnet18")
    model = backend.build(spec, "float64")
    backend.load(model, canonical.randomize(spec))
    batch = images(BASIC, (64, 64), 1)
    taps = backend.run(model, batch, np.array([0]), training=False, gradients=False)
    outputs = resnet_keras.stage_outputs(model)(batch)
    assert [tuple(output.shape[1:]) for output in outputs] == [(16, 16, 64), (8, 8, 128), (4, 4, 256), (2, 2, 512)]
    for path, output in zip(spec.stage_outputs, outputs, strict=True):
        assert np.array_equal(taps[f"tap/{path}"], keras.ops.convert_to_numpy(output))


# Files and weights


@pytest.mark.parametrize("name", ["basic", "zero_pad", "dilated_same", "biased"])
def test_a_keras_file_gives_the_model_back(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model = resnet_keras.from_spec(spec)
    weights = canonical.randomize(spec, dtype="float32")
    resnet_keras.load_weights(model, weights)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    batch = images(spec).astype("float32")
    assert np.array_equal(model(batch), again(batch))
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]
    exported = resnet_keras.export_weights(again, spec)
    assert all(np.array_equal(exported[key], weights[key]) for key in weights)
    with pytest.raises(WeightsError, match="pass spec="):
        resnet_keras.export_weights(again)


def test_the_summary_shows_the_classic_names() -> None:
    lines: list[str] = []
    resnet_keras.from_spec(BASIC).summary(print_fn=lambda line, **_: lines.append(line), line_length=160)
    assert "res3a_branch1" in "\n".join(lines)


def test_the_model_can_be_plotted(tmp_path: Path) -> None:
    pytest.importorskip("pydot")
    graph = keras.utils.model_to_dot(resnet_keras.from_spec(BASIC))
    assert graph is not None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_survive_bitwise_in_the_dtype_of_the_model(backend: probe.KerasBackend, dtype: str) -> None:
    model = backend.build(SPECS["biased"], dtype)
    weights = canonical.randomize(SPECS["biased"])
    backend.load(model, weights)
    exported = backend.export(model)
    assert list(exported) == list(weights)
    for name, array in weights.items():
        assert exported[name].dtype == dtype
        assert np.array_equal(exported[name], array.astype(dtype))


def test_loading_is_strict() -> None:
    model = resnet_keras.from_spec(BASIC)
    weights = canonical.randomize(BASIC)
    before = {name: array.copy() for name, array in resnet_keras.export_weights(model).items()}
    kernel = weights["stages.0.blocks.0.conv1.kernel"]
    wrong = {
        r"missing head\.fc\.bias": {name: array for name, array in weights.items() if name != "head.fc.bias"},
        r"unexpected stem\.conv\.bias": weights | {"stem.conv.bias": np.zeros(8)},
        # The same number of values, and a square matrix transposed: neither may be reshaped into place.
        r"stages\.0\.blocks\.0\.conv1\.kernel has shape \(9, 8, 8\)": weights
        | {"stages.0.blocks.0.conv1.kernel": kernel.reshape(9, 8, 8)},
        r"head\.fc\.kernel has shape \(5, 16\)": weights | {"head.fc.kernel": weights["head.fc.kernel"].T},
    }
    for message, given in wrong.items():
        with pytest.raises(WeightsError, match=message):
            resnet_keras.load_weights(model, given)
    after = resnet_keras.export_weights(model)
    assert all(np.array_equal(after[name], array) for name, array in before.items())


def test_a_model_with_other_variables_than_its_spec_is_refused() -> None:
    model = resnet_keras.from_spec(BASIC)
    with pytest.raises(WeightsError, match="has no layer res2c"):
        resnet_keras.export_weights(model, BASIC.replace(blocks=(3, 2)))
    with pytest.raises(WeightsError, match="it also has res2b_branch2a"):
        resnet_keras.export_weights(model, BASIC.replace(blocks=(1, 2)))


def test_a_constructor_reads_a_canonical_file(tmp_path: Path) -> None:
    spec = VARIANTS["resnet18"].replace(
        conv_bias=True, stride_in="conv1", bn_eps=1.001e-5, bn_momentum=0.99, running_variance="biased", classes=3
    )
    weights, path = canonical.randomize(spec, dtype="float32"), tmp_path / "weights.safetensors"
    save_weights(path, spec, weights)
    model = resnet_keras.ResNet18(weights=path, classes=3)
    backbone = resnet_keras.ResNet18(weights=path, include_top=False)
    pooled = resnet_keras.ResNet18(weights=path, include_top=False, pooling="max")
    for made in (model, backbone, pooled):
        exported = resnet_keras.export_weights(made)
        assert all(np.array_equal(exported[name], weights[name]) for name in exported)
    with pytest.raises(WeightsError, match="classes is 3 there and 1000 here"):
        resnet_keras.ResNet18(weights=path)
    # The same shapes, and another function: eps tells the conventions apart.
    save_weights(path, spec.replace(bn_eps=1e-3), weights)
    with pytest.raises(WeightsError, match=r"bn_eps is 0\.001 there"):
        resnet_keras.ResNet18(weights=path, classes=3)


# Processes


def started(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize(
    ("blocked", "environment", "message"),
    [
        ("keras", {}, "BackendMissing: Keras is not installed; run: pip install 'resnet-parity[keras]'"),
        (
            "jax",
            {"KERAS_BACKEND": "jax"},
            "BackendMissing: JAX is not installed; run: pip install 'resnet-parity[flax]'",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_extra(blocked: str, environment: dict[str, str], message: str) -> None:
    code = BLOCK.format(blocked=(blocked,)) + "import resnet_keras; print('imported'); resnet_keras.ResNet50()"
    process = started(code, **({"KERAS_BACKEND": ""} | environment))
    output, errors = process.communicate(timeout=300)
    assert output == "imported\n"
    assert process.returncode == 1
    assert message in errors.strip().splitlines()[-1]


ON_EVERY_BACKEND = """
import numpy as np, sys, tempfile
from resnet_keras import backend as probe
backend = probe.start(1)
import keras
import resnet_keras
from common import weights as canonical
from common.architectures.resnet import ResNetSpec
spec = ResNetSpec(block="basic", blocks=(1, 1), widths=(4, 8), stem_width=4, classes=5, shortcut="zero_pad")
weights = canonical.randomize(spec)
batch = np.random.default_rng(0).normal(size=(2, 34, 35, 3))
model = backend.build(spec, "float64")
backend.load(model, weights)
result = {}
for training in (False, True):
    found = backend.run(model, batch, np.array([0, 1]), training=training, gradients=True)
    result |= {f"{'train' if training else 'eval'}/{name}": array for name, array in found.items()}
exported = backend.export(model)
assert all(np.array_equal(exported[name], weights[name]) for name in weights)
copies = {name: array.copy() for name, array in weights.items()}
backend.load(model, copies)
for array in copies.values():
    array += 1
assert all(np.array_equal(exported[name], weights[name]) for name in weights), "the model shares memory"
with tempfile.TemporaryDirectory() as folder:
    model.save(folder + "/m.keras")
    again = resnet_keras.export_weights(keras.models.load_model(folder + "/m.keras"), spec)
assert all(np.array_equal(again[name], weights[name]) for name in weights)
np.savez(sys.argv[1], backend=keras.backend.backend(), **result)
"""


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What each of Keras' backends computes of one small float64 network."""
    folder = tmp_path_factory.mktemp("columns")
    processes = {
        name: started(f"import sys; sys.argv = ['', {str(folder / name)!r}]\n" + ON_EVERY_BACKEND, KERAS_BACKEND=name)
        for name in ("tensorflow", "jax", "torch")
    }
    found = {}
    for name, process in processes.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        found[name] = dict(np.load(folder / f"{name}.npz"))
        assert found[name].pop("backend") == name
    return found


@pytest.mark.long  # as tests/test_columns.py, without a check's machinery
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_the_same_file_computes_the_same_on_every_keras_backend(columns: dict, name: str) -> None:
    reference = columns["tensorflow"]
    assert columns[name].keys() == reference.keys()
    for key, expected in reference.items():
        found = columns[name][key]
        assert found.shape == expected.shape
        if key.startswith("eval/") or "/stat/" in key:
            assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected), key


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "rounded"), [("tensorflow", set()), ("jax", {"norm", "pool"}), ("torch", {"norm", "pool"})]
)
def test_keras_rounds_to_float32_inside_a_float64_model_where_known(
    columns: dict, name: str, rounded: set[str]
) -> None:
    """Keras 3.15 caps `result_type` at 32 bits on jax and torch; the taps show what was computed, in float64 arrays."""
    taps = {key.removeprefix("eval/tap/"): array for key, array in columns[name].items() if key.startswith("eval/tap/")}
    assert all(array.dtype == np.float64 for array in taps.values())
    single = {path for path, array in taps.items() if np.array_equal(array, array.astype(np.float32))}
    norms = {path for path in taps if ".norm" in path}
    assert ("norm" in rounded) == (norms <= single)
    assert ("pool" in rounded) == ("head.pool" in single)
    assert not {path for path in taps if path.endswith((".conv", ".conv1", ".conv2", ".conv3", ".add"))} & single
    if not rounded:
        assert not single
