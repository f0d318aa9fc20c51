"""Flax's checkpoints: msgpack files and orbax folders, of real Flax and orbax, and ours read by them."""

import json
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.configurations import config
from flax.core import freeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from written import save_weights

import resnet_flax
from common import checkpoints
from common import weights as canonical
from common.architectures import find
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.checkpoints import containers
from common.checkpoints.containers import msgpack as msgpack_file
from common.checkpoints.containers import orbax as orbax_file
from common.checkpoints.containers.trees import variables
from common.errors import CheckpointError
from common.names.resnet import FLAX_EXAMPLE
from resnet_flax.weights import variable_paths

pytestmark = pytest.mark.slow

TINY = ResNetSpec(
    block="bottleneck", blocks=(1, 2), widths=(4, 8), stem_width=4, classes=5, **CONVENTIONS["flax_examples"]
)
BASIC = TINY.replace(block="basic")
SPECS = {
    "bottleneck": TINY,
    "basic": BASIC,
    "grouped": TINY.replace(groups=2, width_per_group=32),
    "biased": TINY.replace(conv_bias=True),
    "no norm": BASIC.replace(norm=False, conv_bias=True),
    "no head": BASIC.replace(head="none", classes=1000),
    "stages of one width": BASIC.replace(widths=(4, 4)),
    "cifar": find("resnet20").replace(widths=(2, 3, 5), stem_width=2, **CONVENTIONS["flax_examples"]),
}


class State(TrainState):
    """As the imagenet example has it."""

    batch_stats: object
    dynamic_scale: object = None


def weights_of(spec, dtype="float32"):
    return canonical.randomize(spec, dtype=dtype)


def variables_of(spec, dtype="float32"):
    """As `model.init` gives them, with values of ours, all on the host."""
    made = resnet_flax.to_variables(spec, weights_of(spec), jnp.dtype(dtype))
    return jax.tree.map(np.asarray, made)


def fresh(spec, dtype="float32"):
    """The tree of an initialised model, to restore into."""
    images = jax.ShapeDtypeStruct((1, 32, 32, spec.in_channels), jnp.float32)
    made = jax.eval_shape(resnet_flax.from_spec(spec).init, jax.random.key(0), images)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), made)


def state_of(spec):
    made = resnet_flax.to_variables(spec, weights_of(spec))
    return State.create(
        apply_fn=None, params=made["params"], batch_stats=made["batch_stats"], tx=optax.sgd(0.1, momentum=0.9)
    )


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def as_msgpack(path, tree):
    path.write_bytes(serialization.to_bytes(tree))


def as_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


WRITERS = {"msgpack": as_msgpack, "orbax": as_orbax}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One real orbax folder, to be copied and damaged."""
    path = tmp_path_factory.mktemp("orbax") / "tiny"
    as_orbax(path, variables_of(TINY))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refused(path, *words):
    """Loading and reading it is one error, a line with these words."""
    with pytest.raises(CheckpointError) as caught:
        dict(checkpoints.read(path).weights)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for word in words:
        assert word in message, message


# Files of Flax


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", SPECS)
def test_variables_saved_by_flax_load_bitwise_and_give_the_spec(tmp_path, kind, writer):
    spec = SPECS[kind]
    WRITERS[writer](tmp_path / "saved", variables_of(spec))
    found = checkpoints.read(tmp_path / "saved")
    assert (found.origin.format, found.origin.container) == ("flax", writer)
    assert found.spec == spec
    same(found.weights, weights_of(spec))
    assert (found.origin.ignored, found.origin.notes) == ((), ())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet152", "resnext50_32x4d", "wide_resnet50_2"])
def test_stages_are_found_from_shapes(name):
    spec = find(name)
    shapes = canonical.shapes(spec)
    found = FLAX_EXAMPLE.found({native: shapes[ours] for ours, (native, _) in FLAX_EXAMPLE.arrays(spec).items()})
    assert {name: one.shape for name, one in found.items()} == shapes


def test_the_table_names_the_variables_of_the_module():
    for spec in SPECS.values():
        table = {name: native for name, (native, _) in FLAX_EXAMPLE.arrays(spec).items()}
        assert table == {name: "/".join(path) for name, path in variable_paths(spec).items()}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_train_state_loads_without_its_optimiser(tmp_path, writer):
    state = state_of(TINY)
    tree = state if writer == "msgpack" else jax.tree.map(np.asarray, serialization.to_state_dict(state))
    WRITERS[writer](tmp_path / "state", tree)
    found = checkpoints.read(tmp_path / "state")
    assert found.spec == TINY
    same(found.weights, weights_of(TINY))
    assert {name.partition("/")[0] for name in found.origin.ignored} <= {"opt_state", "step"}
    assert any(name.startswith("opt_state/") for name in found.origin.ignored)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("wrapper", ["model", "state", "variables", "params", "model/variables"])
def test_what_is_around_the_variables_is_taken_off_with_a_note(tmp_path, wrapper, writer):
    tree = variables_of(BASIC)
    for name in reversed(wrapper.split("/")):
        tree = {name: tree}
    WRITERS[writer](tmp_path / "wrapped", tree | {"step": np.int32(3)})
    found = checkpoints.read(tmp_path / "wrapped")
    same(found.weights, weights_of(BASIC))
    assert found.origin.notes == (f"the variables were inside {wrapper!r}",)


def test_frozen_variables_load(tmp_path):
    as_msgpack(tmp_path / "frozen", freeze(variables_of(BASIC)))
    same(checkpoints.read(tmp_path / "frozen").weights, weights_of(BASIC))


@pytest.mark.parametrize("writer", WRITERS)
def test_bfloat16_becomes_float32_exactly_with_a_note(tmp_path, writer):
    tree = variables_of(TINY, "bfloat16")
    WRITERS[writer](tmp_path / "half", tree)
    found = checkpoints.read(tmp_path / "half")
    kernel = tree["params"]["conv_init"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    same({"stem.conv.kernel": found.weights["stem.conv.kernel"]}, {"stem.conv.kernel": kernel.astype(np.float32)})
    same(
        {"stem.norm.mean": found.weights["stem.norm.mean"]}, {"stem.norm.mean": tree["batch_stats"]["bn_init"]["mean"]}
    )
    assert found.origin.notes == (containers.BFLOAT16,)


def test_arrays_in_pieces_load_bitwise(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    as_msgpack(tmp_path / "pieces", variables_of(TINY))
    assert b"__msgpack_chunked_array__" in (tmp_path / "pieces").read_bytes()
    found = checkpoints.read(tmp_path / "pieces")
    assert found.spec == TINY
    same(found.weights, weights_of(TINY))


def test_arrays_of_a_msgpack_file_are_not_copied_again(tmp_path):
    as_msgpack(tmp_path / "views", variables_of(TINY))
    source = msgpack_file.read(tmp_path / "views")
    first, second = (source.tensors["params/conv_init/kernel"].read() for _ in range(2))
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_reading_imports_no_framework(tmp_path, folder):
    as_msgpack(tmp_path / "saved", variables_of(TINY))
    code = f"""
import sys
for name in ("jax", "flax", "orbax", "torch", "keras", "tensorflow"):
    sys.modules[name] = None
from common import checkpoints
for path in ({str(tmp_path / "saved")!r}, {str(folder)!r}):
    found = checkpoints.read(path)
    print(found.origin.container, len([found.weights[name] for name in found.weights]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    arrays = len(canonical.shapes(TINY))
    assert done.stdout.split() == ["msgpack", str(arrays), "orbax", str(arrays)], done.stderr


# Folders of orbax


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_ocdbt": True, "use_zarr3": True}], ids=str)
def test_other_layouts_of_orbax_load(tmp_path, options):
    ocp.PyTreeCheckpointer(**options).save(tmp_path / "tree", variables_of(TINY))
    same(checkpoints.read(tmp_path / "tree").weights, weights_of(TINY))


def test_a_folder_without_its_tree_is_listed(copy):
    (copy / "_METADATA").unlink()
    same(checkpoints.read(copy).weights, weights_of(TINY))


def test_the_newest_step_of_a_run_is_taken_with_a_note(tmp_path):
    old, new = variables_of(BASIC), variables_of(TINY)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(9, args=ocp.args.StandardSave(old))
        manager.save(10, args=ocp.args.StandardSave(new))
    (tmp_path / "run" / "11.orbax-checkpoint-tmp-12").mkdir()
    found = checkpoints.read(tmp_path / "run")
    assert found.origin.notes == ("step 10, the newest of 2",)
    same(found.weights, weights_of(TINY))
    same(checkpoints.read(tmp_path / "run" / "9").weights, weights_of(BASIC))
    same(checkpoints.read(tmp_path / "run" / "9" / "default").weights, weights_of(BASIC))


def test_the_item_with_the_state_is_taken(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run", item_names=("state", "extra")) as manager:
        args = {"state": ocp.args.StandardSave(variables_of(BASIC)), "extra": ocp.args.JsonSave({"a": 1})}
        manager.save(1, args=ocp.args.Composite(**args))
    same(checkpoints.read(tmp_path / "run").weights, weights_of(BASIC))


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated:DeprecationWarning")
def test_the_checkpoints_of_flax_training_load(tmp_path):
    from flax.training import checkpoints as legacy

    with config.temp_flip_flag("use_orbax_checkpointing", False):
        legacy.save_checkpoint(tmp_path, variables_of(BASIC), 3)
    same(checkpoints.read(tmp_path / "checkpoint_3").weights, weights_of(BASIC))


# Ours, read by Flax and orbax


@pytest.mark.parametrize("kind", SPECS)
def test_our_msgpack_is_byte_for_byte_that_of_flax(tmp_path, kind):
    spec = SPECS[kind]
    assert save_weights(tmp_path / "ours.msgpack", spec, weights_of(spec)).format == "flax"
    written = (tmp_path / "ours.msgpack").read_bytes()
    assert written == serialization.msgpack_serialize(variables_of(spec))
    assert [path.name for path in tmp_path.iterdir()] == ["ours.msgpack"]


@pytest.mark.parametrize("kind", SPECS)
def test_our_msgpack_restores_into_a_fresh_model(tmp_path, kind):
    spec = SPECS[kind]
    save_weights(tmp_path / "ours.msgpack", spec, weights_of(spec))
    restored = serialization.from_bytes(fresh(spec), (tmp_path / "ours.msgpack").read_bytes())
    same(resnet_flax.from_variables(spec, restored), weights_of(spec))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_our_pieces_are_those_of_flax(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(msgpack_file, "CHUNK", 100)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 100)
    weights = weights_of(TINY, dtype)
    save_weights(tmp_path / "ours.msgpack", TINY, weights)
    tree = serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())
    assert (tmp_path / "ours.msgpack").read_bytes() == serialization.msgpack_serialize(tree)
    flat = flatten_dict(tree)
    same({name: flat[path] for name, path in variable_paths(TINY).items()}, weights)
    same(checkpoints.read(tmp_path / "ours.msgpack").weights, weights)


def test_views_that_are_not_contiguous_are_written_in_order(tmp_path):
    weights = {name: np.asfortranarray(array) for name, array in weights_of(TINY).items()}
    save_weights(tmp_path / "ours.msgpack", TINY, weights)
    assert (tmp_path / "ours.msgpack").read_bytes() == serialization.msgpack_serialize(variables_of(TINY))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["bottleneck", "no norm"])
def test_our_folder_restores_by_orbax(tmp_path, kind, dtype):
    spec, weights = SPECS[kind], weights_of(SPECS[kind], dtype)
    (tmp_path / "ours").mkdir()  # an empty folder may be filled
    assert save_weights(tmp_path / "ours", spec, weights).format == "flax"
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    with ocp.StandardCheckpointer() as checkpointer:
        restored = flatten_dict(checkpointer.restore(tmp_path / "ours", fresh(spec, dtype)))
    same({name: restored[path] for name, path in variable_paths(spec).items()}, weights)
    same(checkpoints.read(tmp_path / "ours").weights, weights)


def test_a_folder_that_is_not_empty_is_not_written_over(tmp_path):
    target = tmp_path / "ours"
    target.mkdir()
    (target / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        save_weights(target, TINY, weights_of(TINY))
    assert [path.name for path in tmp_path.rglob("*")] == ["ours", "notes"]


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(tmp_path / "missing" / "ours", TINY, weights_of(TINY))
    assert list(tmp_path.iterdir()) == []


# Files of msgpack that are none, damaged or hostile


def packed(tree):
    return serialization.msgpack_serialize(tree)


def raw_map(*pairs):
    return msgpack.Packer().pack_map_header(len(pairs)) + b"".join(map(b"".join, pairs))


def array(shape, dtype, content):
    return msgpack.packb(msgpack.ExtType(1, msgpack.packb((shape, dtype, content))))


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    params = msgpack.packb("params") + packed(variables_of(TINY)["params"])
    (tmp_path / "twice").write_bytes(raw_map([params], [params]))
    refused(tmp_path / "twice", "params is there twice")


@pytest.mark.parametrize("keep", [1, 10, 100, 1000, -1])
def test_a_file_cut_off_is_refused(tmp_path, keep):
    content = packed(variables_of(TINY))
    (tmp_path / "cut").write_bytes(content[:keep])
    refused(tmp_path / "cut")


def test_bytes_after_the_end_are_refused(tmp_path):
    (tmp_path / "longer").write_bytes(packed(variables_of(TINY)) + b"\0")
    refused(tmp_path / "longer", "expected one map, to the end")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (array((2**40,), "float32", b"1234"), "4398046511104 bytes"),
        (array((0, 2**62), "float32", b""), "is said to be"),
        (array((1,), "float32", b"12345"), "is said to be"),
        (array((-1,), "float32", b"1234"), "not a list of shape"),
        (array("four", "float32", b"1234"), "not a list of shape"),
        (array((1,) * 40, "float32", b"1234"), "no whole msgpack"),
        (array((1,), "object", b"12345678"), "of dtype object"),
        (array((1,), "float8_e4m3fn", b"1"), "of dtype float8_e4m3fn"),
        (array((1,), "<U1", b"1234"), "of dtype <U1"),
        (array((1,), "f4\n", b"1234"), "not a list of shape"),
        (array((1,), 4, b"1234"), "not a list of shape"),
        (msgpack.packb(msgpack.ExtType(1, b"")), "no whole msgpack"),
        (msgpack.packb(msgpack.ExtType(2, b"\x92\0\0")), "no array"),
        (msgpack.packb(None), "no array"),
        (msgpack.packb("text"), "no array"),
        (b"\xc9" + struct.pack(">I", 2**32 - 1) + b"\1", "no whole msgpack"),
        (b"\xdf" + struct.pack(">I", 2**32 - 1), "no whole msgpack"),
        (b"\xdd" + struct.pack(">I", 2**32 - 1), "no whole msgpack"),
        (b"\xc1", "no whole msgpack"),
        (b"\x91" * 100_000 + b"\xc0", "no whole msgpack"),
        (b"\xdc\x27\x10" + (b"\xdc\x00\xff" + b"\xc0" * 255) * 10_000, "more than 200000 values"),
        (b"\x81\x01\x01", "no whole msgpack"),
        (b"\x81\xa2\xff\xff\x01", "no whole msgpack"),
        (packed({"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}), "in pieces"),
        (packed({"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": np.ones(2)}}), "is said to be"),
        (packed({"__msgpack_chunked_array__": True, "shape": {"1": 2}, "chunks": {"0": np.ones(2)}}), "in pieces"),
        (packed({"__msgpack_chunked_array__": True, "chunks": {"1": np.ones(2)}}), "in pieces"),
    ],
)
def test_a_hostile_value_is_one_line(tmp_path, content, word):
    inner = raw_map([msgpack.packb("conv_init"), raw_map([msgpack.packb("kernel"), content])])
    (tmp_path / "bad").write_bytes(raw_map([msgpack.packb("params"), inner]))
    refused(tmp_path / "bad", word)


@pytest.mark.parametrize("content", [b"", b"\x80", b"\x80\x02}q\0.", b"\x81\x01\x02", b"hello", b"\x81\xa3a\nb\x01"])
def test_what_is_no_map_from_names_is_no_msgpack(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    assert not msgpack_file.recognises(tmp_path / "other")
    refused(tmp_path / "other")


def test_a_folder_and_a_missing_file_are_not_recognised(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        assert not msgpack_file.recognises(path)
        assert not orbax_file.recognises(path)


# Variables that are no network


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tree: tree.pop("batch_stats"), "missing batch_stats/"),
        (lambda tree: tree["params"].pop("Dense_0"), ""),
        (lambda tree: tree["params"].pop("conv_init"), "no kernel of stem.conv"),
        # Its statistics are still there: a block without kernels, not a gap.
        (lambda tree: tree["params"].pop("BottleneckResNetBlock_1"), "no kernel of stages.1.blocks.0.conv1"),
        (lambda tree: tree["params"]["BottleneckResNetBlock_2"].pop("Conv_2"), ""),
        (lambda tree: tree["params"].update(extra=np.ones(3)), "unexpected params/extra"),
        (lambda tree: tree.update(other={"a": np.ones(3)}), "unexpected other/a"),
        (lambda tree: tree["params"]["Dense_0"].update(bias=np.ones(5, np.int32)), "dtype int32"),
        (lambda tree: tree["params"]["bn_init"].update(scale=np.ones(5, np.float32)), "has shape (5,)"),
    ],
)
def test_variables_that_are_not_a_whole_network_are_refused_by_name(tmp_path, change, word):
    tree = variables_of(TINY)
    change(tree)
    as_msgpack(tmp_path / "changed", tree)
    if "Dense_0" not in tree["params"]:
        assert checkpoints.read(tmp_path / "changed").spec.head == "none"
    else:
        refused(tmp_path / "changed", word)


def test_block_numbers_of_another_writing_are_not_blocks():
    odd = [f"params/ResNetBlock_{number}/Conv_0/kernel" for number in ("00", "٣", "1" * 5000, "-1")]
    assert FLAX_EXAMPLE.found(dict.fromkeys(odd, (3, 3, 1, 1))) == {}


def test_two_leaves_of_one_name_are_refused():
    leaf = containers.stored(np.ones(1, np.float32))
    with pytest.raises(CheckpointError, match="batch_stats/x is there twice"):
        variables({"params/params/a": leaf, "params/batch_stats/x": leaf, "batch_stats/x": leaf}, "msgpack")


# Folders that are damaged or hostile


def tree_of(copy):
    return json.loads((copy / "_METADATA").read_text())


def test_a_link_out_of_the_folder_is_refused(copy, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    (copy / "d" / "link").symlink_to(tmp_path / "elsewhere")
    refused(copy, "d/link is a link")


@pytest.mark.parametrize("name", ["..", ".", "", "../../etc", "a/b", "a\\b", "two\nlines", "x" * 300, 3, None])
def test_a_name_that_is_a_path_is_refused(copy, name):
    tree = tree_of(copy)
    next(iter(tree["tree_metadata"].values()))["key_metadata"][0]["key"] = name
    (copy / "_METADATA").write_text(json.dumps(tree))
    refused(copy, "names an array")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"tree_metadata": 3}', '{"tree_metadata": {"a": 1}}', "[" * 100_000, '{"a": 1, "a": 2}', "\udcff"],
)
def test_a_damaged_tree_is_refused(copy, content):
    (copy / "_METADATA").write_bytes(content.encode(errors="surrogateescape"))
    refused(copy, "_METADATA")


def test_a_tree_that_names_what_is_not_there_is_refused(copy):
    tree = tree_of(copy)
    for row in tree["tree_metadata"].values():
        row["key_metadata"][-1]["key"] += "x"
    (copy / "_METADATA").write_text(json.dumps(tree))
    refused(copy, "cannot be read")


def test_every_lost_file_of_the_arrays_is_noticed(folder, tmp_path):
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    needed = [path for path in files if "d" in path.parts or path.name == "manifest.ocdbt"]
    assert len(needed) > 3
    results = []
    for number, path in enumerate(needed):
        damaged = shutil.copytree(folder, tmp_path / str(number))
        (damaged / path).unlink()
        results.append(loaded(damaged))
    whole = {name: array.tobytes() for name, array in weights_of(TINY).items()}
    # The manifest of each process was merged into one, and is not read any more.
    assert all(result in (None, whole) for result in results)
    assert results.count(None) > 1


def loaded(path):
    """Every array's bytes, or None where the folder is refused."""
    try:
        return {name: array.tobytes() for name, array in checkpoints.read(path).weights.items()}
    except CheckpointError:
        return None


@pytest.mark.parametrize("version", [2, 3])
def test_a_lost_chunk_is_not_read_as_zeros(tmp_path, version):
    tree = {"params": {"conv_init": {"kernel": np.ones((3, 3, 1, 1), np.float32)}}}
    ocp.PyTreeCheckpointer(use_ocdbt=False, use_zarr3=version == 3).save(tmp_path / "tree", tree)
    store = tmp_path / "tree" / "params.conv_init.kernel"
    chunk = store / ("0.0.0.0" if version == 2 else "c/0/0/0/0")
    assert orbax_file.read(tmp_path / "tree").tensors["params/conv_init/kernel"].read().sum() == 9
    chunk.unlink()
    with pytest.raises(CheckpointError, match="params/conv_init/kernel cannot be read"):
        orbax_file.read(tmp_path / "tree").tensors["params/conv_init/kernel"].read()


@pytest.mark.parametrize("field", ["shape", "chunks"])
def test_an_array_that_claims_more_than_its_folder_is_refused(tmp_path, field):
    tree = {"params": {"Dense_0": {"bias": np.ones(4, np.float32)}}}
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "tree", tree)
    header = tmp_path / "tree" / "params.Dense_0.bias" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {field: [10**12]}))
    refused(tmp_path / "tree", "its arrays claim")


def test_a_run_without_arrays_is_refused(tmp_path):
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    assert orbax_file.recognises(tmp_path)
    refused(tmp_path, "no item with arrays")
