"""Keras' files: read without Keras as Keras wrote them, written so that Keras takes them, and refused when unsafe."""

import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras
import numpy as np
import pytest
from written import save_weights

import resnet_keras
from common import checkpoints
from common import weights as canonical
from common.architectures.resnet import CONVENTIONS, VARIANTS, ResNetSpec
from common.checkpoints.containers import hdf5 as hdf5_file
from common.errors import CheckpointError
from common.names.resnet import KERAS_APPLICATIONS, KERAS_CLASSIC, block_names
from resnet_keras import backend as probe

pytestmark = pytest.mark.slow

BOTTLENECK = ResNetSpec(
    block="bottleneck",
    blocks=(1, 2),
    widths=(4, 8),
    stem_width=4,
    classes=5,
    **CONVENTIONS["keras_classic"],
)
BASIC = BOTTLENECK.replace(block="basic", blocks=(2, 1, 1), widths=(4, 8, 8))
SPECS = {
    "bottleneck": BOTTLENECK,
    "basic": BASIC,
    "no_bias": BOTTLENECK.replace(conv_bias=False),
    "no_norm": BASIC.replace(norm=False),
    "no_shortcut_norm": BASIC.replace(shortcut_norm=False),
    "no_head": BASIC.replace(head="none", classes=1000),
    "projects_in_stage_one": BASIC.replace(stem_width=8, widths=(4, 8, 16)),
    "grouped": BOTTLENECK.replace(widths=(8, 16), groups=2, width_per_group=32),
    "unbiased_variance": BOTTLENECK.replace(running_variance="unbiased"),
    "long_stage": BASIC.replace(blocks=(1, 28), widths=(2, 2), stem_width=2),
}
SUFFIXES = (".weights.h5", ".h5", ".keras")


NAMINGS = {naming.name: naming for naming in (KERAS_APPLICATIONS, KERAS_CLASSIC)}


@pytest.fixture(scope="module", autouse=True)
def backend() -> probe.KerasBackend:
    return probe.start(1)


@pytest.fixture(autouse=True)
def _float32_unless_asked() -> Iterator[None]:
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are saving your model as an HDF5")
        yield


def ours(spec: ResNetSpec, **options: Any) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """One of our Keras models, and the weights in it."""
    weights = canonical.randomize(spec, dtype="float32")
    model = resnet_keras.from_spec(spec, **options)
    resnet_keras.load_weights(model, weights)
    return model, weights


@cache
def ours_of(name: str) -> tuple[keras.Model, dict[str, np.ndarray]]:
    """One for all tests that leave it with these weights: building it takes longer than its file."""
    return ours(SPECS[name])


def applications(builder: Any = keras.applications.ResNet50, classes: int = 7, **options: Any) -> keras.Model:
    """One of keras.applications' models with random numbers in every variable."""
    model = builder(weights=None, input_shape=(32, 32, 3), classes=classes, **options)
    randomize(model)
    return model


def randomize(model: keras.Model, seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        variable.assign(generator.standard_normal(variable.shape, np.float32))


def values(model: keras.Model) -> dict[str, np.ndarray]:
    return {variable.path: keras.ops.convert_to_numpy(variable) for variable in model.variables}


def save(model: keras.Model, path: Path) -> None:
    """As a user of Keras does: the end of the name says how."""
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    else:
        model.save(path)


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def copied(path: Path) -> dict[str, np.ndarray]:
    """The weights in a file that is about to change."""
    return {name: array.copy() for name, array in checkpoints.read(path).weights.items()}


def refused(path: Path) -> str:
    """The message of the error that reading everything in `path` ends with."""
    with pytest.raises(CheckpointError) as caught:
        dict(checkpoints.read(path).weights)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.fixture(scope="module")
def resnet50() -> keras.Model:
    return applications()


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    """A small file that is good."""
    path = tmp_path / "good.h5"
    save_weights(path, BASIC, canonical.randomize(BASIC, dtype="float32"), "keras_classic")
    return path


# Names


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_array_of_a_walk_has_one_native_name_of_its_own(variant: str, naming: Any) -> None:
    table = naming.arrays(VARIANTS[variant])
    assert len({native for native, _ in table.values()}) == len(canonical.shapes(VARIANTS[variant]))


def test_native_names_are_those_of_the_community() -> None:
    spec = VARIANTS["resnet50.keras_applications"]
    today = KERAS_APPLICATIONS.arrays(spec)
    classic = KERAS_CLASSIC.arrays(spec)
    for name, new, old in (
        ("stem.conv.bias", "conv1_conv/bias", "conv1/bias"),
        ("stem.norm.scale", "conv1_bn/gamma", "bn_conv1/gamma"),
        ("stages.0.blocks.0.conv1.kernel", "conv2_block1_1_conv/kernel", "res2a_branch2a/kernel"),
        ("stages.0.blocks.0.shortcut.conv.kernel", "conv2_block1_0_conv/kernel", "res2a_branch1/kernel"),
        ("stages.3.blocks.0.shortcut.norm.var", "conv5_block1_0_bn/moving_variance", "bn5a_branch1/moving_variance"),
        ("stages.2.blocks.5.norm3.mean", "conv4_block6_3_bn/moving_mean", "bn4f_branch2c/moving_mean"),
        ("head.fc.kernel", "predictions/kernel", "fc1000/kernel"),
    ):
        assert (today[name][0], classic[name][0]) == (new, old)


def of_applications(resnet50: keras.Model, builder: str) -> keras.Model:
    """That of the module where it is the one: these take seconds to build."""
    return resnet50 if builder == "ResNet50" else applications(getattr(keras.applications, builder))


@pytest.mark.parametrize("builder", ["ResNet50", pytest.param("ResNet152", marks=pytest.mark.long)])
def test_native_names_are_all_the_layers_of_keras_applications(resnet50: keras.Model, builder: str) -> None:
    model = of_applications(resnet50, builder)
    spec = VARIANTS[f"{builder.lower()}.keras_applications"]
    native = {name for name, _ in KERAS_APPLICATIONS.arrays(spec).values()}
    assert native == {variable.path for variable in model.variables}


# Reading what Keras wrote


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SPECS)
def test_a_file_of_our_keras_model_reads_bitwise(name: str, suffix: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model, weights = ours_of(name)
    save(model, tmp_path / f"model{suffix}")
    found = checkpoints.read(tmp_path / f"model{suffix}")
    assert found.origin.format == "keras_classic"
    assert found.spec == spec.replace(running_variance="biased")
    assert_same(found.weights, weights)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_keras_applications_reads_bitwise(resnet50: keras.Model, suffix: str, tmp_path: Path) -> None:
    save(resnet50, tmp_path / f"model{suffix}")
    found = checkpoints.read(tmp_path / f"model{suffix}")
    assert found.origin.format == "keras_applications"
    assert found.spec == VARIANTS["resnet50.keras_applications"].replace(classes=7)
    table = KERAS_APPLICATIONS.arrays(found.spec)
    assert_same({table[name][0]: array for name, array in found.weights.items()}, values(resnet50))


def test_a_model_without_its_top_reads(tmp_path: Path) -> None:
    model = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(32, 32, 3))
    model.save_weights(tmp_path / "top.weights.h5")
    assert checkpoints.read(tmp_path / "top.weights.h5").spec.head == "none"


def test_optimiser_state_is_ignored_and_listed(tmp_path: Path) -> None:
    model, _ = ours(BASIC, input_shape=(32, 32, 3))
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(np.zeros((2, 32, 32, 3)), np.zeros(2), verbose=0)
    for suffix in SUFFIXES:
        save(model, tmp_path / f"model{suffix}")
        found = checkpoints.read(tmp_path / f"model{suffix}")
        assert any(name.startswith("optimizer") for name in found.origin.ignored), suffix
        assert_same(found.weights, dict(resnet_keras.export_weights(model)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_network_inside_another_model_reads(suffix: str, tmp_path: Path) -> None:
    inner, weights = ours(BASIC, input_shape=(32, 32, 3))
    augmented = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.RandomFlip("horizontal"), inner])
    save(augmented, tmp_path / f"model{suffix}")
    assert_same(checkpoints.read(tmp_path / f"model{suffix}").weights, weights)


def test_a_layer_that_is_not_the_networks_is_named(tmp_path: Path) -> None:
    inner, _ = ours(SPECS["no_head"], input_shape=(32, 32, 3))
    model = keras.Sequential([keras.Input((32, 32, 3)), inner, keras.layers.Dense(3, name="extra")])
    model.save_weights(tmp_path / "model.weights.h5")
    assert "unexpected extra/kernel" in refused(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_widths_of_numbers_read_bitwise(dtype: str, suffix: str, tmp_path: Path) -> None:
    if (dtype, suffix) == ("bfloat16", ".h5"):
        pytest.skip("the legacy format of Keras says nowhere that a number is one")
    keras.config.set_dtype_policy(dtype)
    model = resnet_keras.from_spec(BASIC)
    for variable in model.variables:
        variable.assign(keras.random.normal(variable.shape, dtype="float32", seed=1))
    save(model, tmp_path / f"model{suffix}")
    found = checkpoints.read(tmp_path / f"model{suffix}")
    assert ("bfloat16 is read as float32, exactly" in found.origin.notes) == (dtype == "bfloat16")
    names = KERAS_CLASSIC.arrays(BASIC)
    inside = {variable.path: variable for variable in model.variables}
    for name, array in found.weights.items():
        expected = keras.ops.convert_to_numpy(inside[names[name][0]])
        assert array.dtype == (np.float32 if dtype == "bfloat16" else dtype)
        np.testing.assert_array_equal(array, expected.astype(array.dtype))


def test_big_endian_numbers_read_as_what_they_are(legacy: Path) -> None:
    expected = copied(legacy)
    with h5py.File(legacy, "a") as file:
        replace(file, "conv1/conv1/kernel:0", lambda array: {"data": array.astype(">f4")})
    assert_same(checkpoints.read(legacy).weights, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "gzip"},
        {"compression": "gzip", "shuffle": True},
        {"compression": "gzip", "fletcher32": True, "shuffle": True},
    ],
)
def test_chunked_and_gzipped_arrays_read(legacy: Path, options: dict[str, Any]) -> None:
    expected = copied(legacy)
    with h5py.File(legacy, "a") as file:
        replace(file, "conv1/conv1/kernel:0", lambda array: {"data": array, "chunks": (3, 3, 2, 2)} | options)
    assert_same(checkpoints.read(legacy).weights, expected)


def replace(file: h5py.File, name: str, change: Callable[[np.ndarray], dict[str, Any]]) -> None:
    array = file[name][()]
    del file[name]
    file.create_dataset(name, **change(array))


# Other spellings


def relabel(path: Path, rename: Callable[[str], str], weight: Callable[[str, str], str]) -> None:
    """Move every layer of a legacy file to another name, its arrays to other names."""
    with h5py.File(path, "a") as file:
        for layer in list(file):
            arrays = {name: dataset[()] for name, dataset in file[layer][layer].items()}
            del file[layer]
            for name, array in arrays.items():
                file[f"{rename(layer)}/{weight(rename(layer), name)}"] = array


def test_caffes_block_names_read_in_short_stages_too(tmp_path: Path) -> None:
    spec = BASIC.replace(blocks=(1, 12), widths=(2, 2), stem_width=2)
    weights = canonical.randomize(spec, dtype="float32")
    path = tmp_path / "caffe.h5"
    save_weights(path, spec, weights, "keras_classic")
    long = dict(zip(block_names(12)[1:], [f"b{i}" for i in range(1, 12)], strict=True))
    relabel(
        path,
        lambda layer: (
            layer[:4] + long[layer[4]] + layer[5:]
            if layer[:4] == "res3" and layer[4] != "a"
            else layer[:3] + long[layer[3]] + layer[4:]
            if layer[:3] == "bn3" and layer[3] != "a"
            else layer
        ),
        lambda layer, name: f"{layer}/{name}",
    )
    with h5py.File(path) as file:
        assert "res3b11_branch2a" in file
        assert "bn3b1_branch2b" in file
    assert_same(checkpoints.read(path).weights, weights)


def test_the_head_of_the_first_keras_applications_reads(tmp_path: Path) -> None:
    weights = canonical.randomize(BOTTLENECK, dtype="float32")
    path = tmp_path / "probs.h5"
    save_weights(path, BOTTLENECK, weights, "keras_applications")
    relabel(path, lambda layer: layer.replace("predictions", "probs"), lambda layer, name: f"{layer}/{name}")
    assert_same(checkpoints.read(path).weights, weights)


def test_a_head_that_kept_the_name_of_another_size_reads(tmp_path: Path) -> None:
    weights = canonical.randomize(BASIC, dtype="float32")
    path = tmp_path / "fc.h5"
    save_weights(path, BASIC, weights, "keras_classic")
    relabel(path, lambda layer: layer.replace("fc5", "fc1000"), lambda layer, name: f"{layer}/{name}")
    assert_same(checkpoints.read(path).weights, weights)


def test_names_of_keras_1_read(tmp_path: Path) -> None:
    weights = canonical.randomize(BASIC, dtype="float32")
    path = tmp_path / "keras_1.h5"
    save_weights(path, BASIC, weights, "keras_classic")
    old = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}

    def rename(layer: str, name: str) -> str:
        array = name.removesuffix(":0")
        return f"{layer}_{old.get(array, array)}_1:0"

    relabel(path, str, rename)
    assert_same(checkpoints.read(path).weights, weights)


def test_two_spellings_of_one_layer_are_refused(legacy: Path) -> None:
    with h5py.File(legacy, "a") as file:
        file["res2b1_branch2a/res2b1_branch2a/kernel:0"] = np.zeros((3, 3, 4, 4), np.float32)
    assert "res2b_branch2a/kernel" in refused(legacy)


# Files of the first releases of Keras 3, in which no layer has a name


def without_names(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)


def test_a_file_that_names_no_layers_is_refused(tmp_path: Path) -> None:
    model, _ = ours(BASIC)
    model.save_weights(tmp_path / "model.weights.h5")
    without_names(tmp_path / "model.weights.h5")
    assert "the file names no layers" in refused(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("options", [{"libver": "latest"}, {"libver": "latest", "track_order": True}])
def test_names_read_in_the_newer_form_of_hdf5_too(options: dict[str, Any], tmp_path: Path) -> None:
    model, weights = ours(BASIC)
    model.save_weights(tmp_path / "old.weights.h5")
    with h5py.File(tmp_path / "old.weights.h5") as old, h5py.File(tmp_path / "new.weights.h5", "w", **options) as new:
        for number, (name, group) in enumerate(sorted(old["layers"].items())):
            copied = new.create_group(f"layers/{name}/vars")
            for index in range(number % 6):
                copied.attrs[f"other{index}"] = "of no interest"
            copied.attrs["name"] = group["vars"].attrs["name"]
            for array in group["vars"]:
                copied[array] = group["vars"][array][()]
    assert_same(checkpoints.read(tmp_path / "new.weights.h5").weights, weights)


# Written by us, read by Keras


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
@pytest.mark.parametrize("name", SPECS)
def test_our_keras_model_loads_what_we_wrote(name: str, suffix: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model, weights = ours_of(name)
    save_weights(tmp_path / f"model{suffix}", spec, weights, "keras_classic")
    randomize(model, seed=1)
    model.load_weights(tmp_path / f"model{suffix}")
    assert_same(dict(resnet_keras.export_weights(model)), weights)


@pytest.mark.parametrize(
    ("builder", "suffix"),
    [
        *(("ResNet50", ".h5"), ("ResNet50", ".weights.h5")),
        pytest.param("ResNet101", ".weights.h5", marks=pytest.mark.long),
    ],
)
def test_keras_applications_loads_what_we_wrote(
    resnet50: keras.Model, builder: str, suffix: str, tmp_path: Path
) -> None:
    model = of_applications(resnet50, builder)
    expected = values(model)
    spec = VARIANTS[f"{builder.lower()}.keras_applications"].replace(classes=7)
    table = KERAS_APPLICATIONS.arrays(spec)
    weights = {name: expected[native] for name, (native, _) in table.items()}
    save_weights(tmp_path / f"model{suffix}", spec, weights)
    randomize(model, seed=1)
    model.load_weights(tmp_path / f"model{suffix}")
    assert_same(values(model), expected)


def test_a_legacy_file_loads_by_name(tmp_path: Path) -> None:
    model, weights = ours(BASIC)
    save_weights(tmp_path / "model.h5", BASIC, weights, "keras_classic")
    randomize(model, seed=1)
    model.load_weights(tmp_path / "model.h5", by_name=True)
    assert_same(dict(resnet_keras.export_weights(model)), weights)


@pytest.mark.parametrize(
    ("name", "naming"),
    [
        ("bottleneck", "keras_applications"),
        pytest.param("basic", "keras_applications", marks=pytest.mark.long),
        ("unbiased_variance", "keras_classic"),
    ],
)
def test_an_archive_is_a_model_that_keras_loads(name: str, naming: str, tmp_path: Path) -> None:
    spec, path = SPECS[name], tmp_path / "model.keras"
    weights = canonical.randomize(spec, dtype="float32")
    save_weights(path, spec, weights, naming)
    model = keras.saving.load_model(path)
    table = NAMINGS[naming].arrays(spec)
    assert_same(values(model), {native: weights[name] for name, (native, _) in table.items()})
    found = checkpoints.read(path)
    assert found.origin.format == naming
    assert_same(found.weights, weights)
    assert [file.name for file in tmp_path.iterdir()] == ["model.keras"]
    layers = set(NAMINGS[naming].layers(spec).values())
    assert layers <= {layer.name for layer in model.layers}


def test_an_archive_keeps_the_width_of_numbers(tmp_path: Path) -> None:
    weights = canonical.randomize(BASIC, dtype="float64")
    save_weights(tmp_path / "model.keras", BASIC, weights)
    assert_same(checkpoints.read(tmp_path / "model.keras").weights, weights)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_every_spec_comes_back_bitwise(naming: str, suffix: str, tmp_path: Path) -> None:
    for name, spec in SPECS.items():
        weights = canonical.randomize(spec, dtype="float64")
        save_weights(tmp_path / f"{name}{suffix}", spec, weights, naming)
        found = checkpoints.read(tmp_path / f"{name}{suffix}")
        assert found.origin.format == naming
        assert_same(found.weights, weights)


def test_layer_names_beyond_the_limit_of_an_attribute_are_split_as_keras_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hdf5_file, "_ATTRIBUTE_LIMIT", 100)
    model, weights = ours(BASIC)
    save_weights(tmp_path / "model.h5", BASIC, weights, "keras_classic")
    with h5py.File(tmp_path / "model.h5") as file:
        assert {"layer_names0", "layer_names1"} <= set(file.attrs)
        assert "layer_names" not in file.attrs
        assert all(attribute.nbytes <= 100 for name, attribute in file.attrs.items() if name[:5] == "layer")
    randomize(model, seed=1)
    model.load_weights(tmp_path / "model.h5")
    assert_same(dict(resnet_keras.export_weights(model)), weights)
    assert_same(checkpoints.read(tmp_path / "model.h5").weights, weights)


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path) -> None:
    weights = canonical.randomize(BASIC, dtype="float32")
    for suffix in SUFFIXES:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_weights(tmp_path / "missing" / f"model{suffix}", BASIC, weights)
    assert not list(tmp_path.iterdir())


# Refused


def test_a_text_that_claims_gigabytes_is_refused_without_making_room(tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    save_weights(path, BASIC, canonical.randomize(BASIC, dtype="float32"), "keras_classic")
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        address = h5py.h5o.get_info(file["layers/conv2d/vars"].id).addr
    claim = content.index(struct.pack("<I", len("conv1")), content.index(b"name\0", address) + 24)
    content[claim : claim + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert "4294967295 expected" in refused(path)


def test_a_heap_of_texts_that_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    save_weights(path, BASIC, canonical.randomize(BASIC, dtype="float32"), "keras_classic")
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    content[heap + 16 : heap + 4096] = bytes(4080)
    path.write_bytes(content)
    assert "a heap of texts is damaged" in refused(path)


def link_out(file: h5py.File) -> None:
    file["out"] = h5py.ExternalLink("/etc/passwd", "/")


def link_softly(file: h5py.File) -> None:
    file["soft"] = h5py.SoftLink("/conv1")


def keep_values_outside(file: h5py.File) -> None:
    del file["conv1/conv1/kernel:0"]
    external = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("conv1/conv1/kernel:0", (7, 7, 3, 4), "f4", external=external)


def make_virtual(file: h5py.File) -> None:
    del file["conv1/conv1/kernel:0"]
    layout = h5py.VirtualLayout((7, 7, 3, 4), "f4")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "data", (7, 7, 3, 4))
    file.create_virtual_dataset("conv1/conv1/kernel:0", layout)


def claim_gigabytes(file: h5py.File) -> None:
    del file["conv1/conv1/kernel:0"]
    file.create_dataset("conv1/conv1/kernel:0", (1 << 20, 1 << 10, 3, 4), "f4", chunks=(1, 1, 3, 4))


def claim_gigabytes_in_one_piece(file: h5py.File) -> None:
    del file["conv1/conv1/kernel:0"]
    file.create_dataset("conv1/conv1/kernel:0", (1 << 20, 1 << 10, 3, 4), "f4")


def claim_a_chunk_of_gigabytes(file: h5py.File) -> None:
    del file["conv1/conv1/bias:0"]
    options = {"maxshape": (None,), "chunks": (1 << 29,), "compression": "gzip"}
    file.create_dataset("conv1/conv1/bias:0", (4,), "f4", **options)


def hold_text(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": ["text"] * 4, "dtype": h5py.string_dtype()})


def hold_records(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": np.zeros(4, [("a", "f4"), ("b", "f4")])})


def hold_references(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": [file.ref] * 4, "dtype": h5py.ref_dtype})


def hold_nothing(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": h5py.Empty("f4")})


def hold_integers(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": array.astype("i4")})


def compress_otherwise(file: h5py.File) -> None:
    replace(file, "conv1/conv1/bias:0", lambda array: {"data": array, "chunks": (4,), "compression": "lzf"})


def name_oddly(file: h5py.File) -> None:
    file["two\nlines"] = np.zeros(3, np.float32)


def leave_a_type(file: h5py.File) -> None:
    file["type"] = np.dtype("f4")


REFUSED = {
    link_out: "ExternalLink",
    link_softly: "SoftLink",
    keep_values_outside: "another file",
    make_virtual: "another file",
    claim_gigabytes: "claim more than 64 times",
    claim_gigabytes_in_one_piece: "claim more than 64 times",
    claim_a_chunk_of_gigabytes: "claim more than 64 times",
    hold_text: "HDF5 type object",
    hold_records: "HDF5 type",
    hold_references: "HDF5 type object",
    hold_nothing: "no shape",
    hold_integers: "dtype int32",
    compress_otherwise: "compressed in a way",
    name_oddly: "two\\nlines",
    leave_a_type: "Datatype",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_unsafe_or_no_number_is_refused(spoil: Callable[[h5py.File], None], legacy: Path) -> None:
    with h5py.File(legacy, "a") as file:
        spoil(file)
    assert REFUSED[spoil] in refused(legacy)


def test_a_chunk_that_inflates_to_more_than_it_should_is_refused_unread(legacy: Path) -> None:
    bomb = zlib.compress(bytes(64 << 20), 9)
    with h5py.File(legacy, "a") as file:
        replace(file, "conv1/conv1/bias:0", lambda array: {"data": array, "chunks": (4,), "compression": "gzip"})
        file["conv1/conv1/bias:0"].id.write_direct_chunk((0,), bomb)
    assert "does not hold the 16 bytes" in refused(legacy)


def test_groups_in_a_circle_come_to_an_end(legacy: Path) -> None:
    expected = copied(legacy)
    with h5py.File(legacy, "a") as file:
        file["conv1/again"] = file["/"]
    assert_same(checkpoints.read(legacy).weights, expected)


def test_a_missing_layer_is_named(legacy: Path) -> None:
    with h5py.File(legacy, "a") as file:
        del file["bn2b_branch2a"]
    assert "missing bn2b_branch2a/" in refused(legacy)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_ends_early_is_refused(suffix: str, tmp_path: Path) -> None:
    model, _ = ours(BASIC)
    whole = tmp_path / f"model{suffix}"
    save(model, whole)
    content = whole.read_bytes()
    for part in (10, 100, len(content) // 2, len(content) - 1):
        (tmp_path / f"part{suffix}").write_bytes(content[:part])
        refused(tmp_path / f"part{suffix}")


def rezipped(path: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    model, _ = ours(BASIC)
    model.save(tmp_path / "good.keras")
    return tmp_path / "good.keras"


def test_a_compressed_archive_reads(archive: Path) -> None:
    expected = copied(archive)
    rezipped(archive, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    assert_same(checkpoints.read(archive).weights, expected)


def test_nothing_in_the_configuration_is_looked_at(archive: Path) -> None:
    rezipped(archive, lambda name, content: b"not JSON" if name == "config.json" else content)
    assert checkpoints.read(archive).origin.format == "keras_classic"


def test_an_archive_without_weights_is_refused(archive: Path) -> None:
    rezipped(archive, lambda name, content: None if name.endswith(".h5") else content)
    assert "0 members model.weights.h5" in refused(archive)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_of_an_archive_are_refused(archive: Path, compression: int) -> None:
    rezipped(archive, lambda name, content: content, compression=compression)
    assert "does not use" in refused(archive)


def test_an_archive_that_inflates_without_end_is_refused(archive: Path) -> None:
    rezipped(archive, lambda name, content: bytes(200 << 20) if name.endswith(".h5") else content, compression=8)
    assert "more than 64 times" in refused(archive)


def test_a_weight_that_was_changed_in_an_archive_is_noticed(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    needle = np.asarray(checkpoints.read(archive).weights["stem.conv.kernel"]).tobytes()
    content[bytes(content).index(needle) + 5] ^= 1
    archive.write_bytes(content)
    assert "Bad CRC-32" in refused(archive)


def test_a_size_that_the_archive_lies_about_is_noticed(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    entry = content.rindex(b"PK\x01\x02" + content[content.rindex(b"PK\x01\x02") + 4 :][:6])
    size = struct.unpack_from("<I", content, entry + 24)[0]
    struct.pack_into("<II", content, entry + 20, size + 1000, size + 1000)
    archive.write_bytes(content)
    refused(archive)


def test_no_other_file_is_taken_for_one_of_keras(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("conv1")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04 and no more")
    with zipfile.ZipFile(tmp_path / "other", "w") as other:
        other.writestr("archive/data.pkl", b"")
    for path in (tmp_path, *tmp_path.iterdir(), tmp_path / "none"):
        assert not hdf5_file.recognises(path)
