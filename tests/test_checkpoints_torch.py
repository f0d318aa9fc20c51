"""PyTorch's and Hugging Face's files: read and written without their libraries, the same bits as with them."""

import argparse
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from written import save_weights

import resnet_torch
from common import architectures, checkpoints, names, weights
from common.architectures.resnet import ResNetSpec
from common.checkpoints.containers import pytorch as pytorch_file
from common.checkpoints.containers import pytorch_legacy as pytorch_legacy_file
from common.checkpoints.containers import safetensors as safetensors_file
from common.checkpoints.containers import state_dict
from common.errors import CheckpointError

BOTTLENECK = ResNetSpec(block="bottleneck", blocks=(1, 2), widths=(4, 8), stem_width=4, classes=5)
SPECS = {
    "bottleneck": BOTTLENECK,
    "basic": ResNetSpec(block="basic", blocks=(2, 1), widths=(4, 8), stem_width=4, classes=5),
    "biased": BOTTLENECK.replace(conv_bias=True),
    "without norms": BOTTLENECK.replace(norm=False, conv_bias=True),
    "headless": BOTTLENECK.replace(head="none", head_pool="none", classes=1000),
    "grouped": BOTTLENECK.replace(widths=(64, 64), groups=4, width_per_group=16),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
FORMATS = {
    "zip": (".pth", "torchvision"),
    "safetensors": (".safetensors", "torchvision"),
    "huggingface": (".safetensors", "huggingface"),
    "huggingface zip": (".bin", "huggingface"),
}


def model_of(spec, dtype="float32"):
    model = resnet_torch.from_spec(spec).to(getattr(torch, dtype))
    resnet_torch.load_weights(model, weights.randomize(spec, 1, dtype=dtype))
    return model


def saved(path, state, **options):
    torch.save(state, path, **options)
    return path


def same_bits(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        a, b = np.ascontiguousarray(found[name]), np.ascontiguousarray(expected[name])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.tobytes() == b.tobytes(), name


def everything(path):
    """The bytes of every tensor, read; or the line that refuses the file."""
    try:
        return {name: array.tobytes() for name, array in checkpoints.read(path).weights.items()}
    except CheckpointError as error:
        return str(error)


def refused(path, *words):
    """One line, with `words` in it, from `load` or from reading the tensors."""
    with pytest.raises(CheckpointError) as caught:
        dict(checkpoints.read(path).weights)
    # Without the path, which holds the name of the test.
    message = str(caught.value).removeprefix(str(path))
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message
    return message


@contextmanager
def little_memory(most=2**25):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def source_of(path):
    module = next(m for m in (safetensors_file, pytorch_file, pytorch_legacy_file) if m.recognises(path))
    return module.read(path)


class TestWhatPyTorchWrites:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    @every_spec
    def test_is_read_bitwise(self, spec, dtype, zipped, tmp_path):
        model = model_of(spec, dtype)
        path = saved(tmp_path / "m.pth", model.state_dict(), _use_new_zipfile_serialization=zipped)
        found = checkpoints.read(path, changes={"head_pool": "none"} if spec.head == "none" else None)
        assert found.spec == spec
        assert found.origin.format == "torchvision"
        same_bits(found.weights, resnet_torch.export_weights(model))
        assert len(found.origin.ignored) == sum(layer.kind == "norm" for layer in spec.layers)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_strides_views_and_shared_storages_come_out_right(self, zipped, tmp_path):
        base = torch.arange(720.0).reshape(2, 3, 8, 15)
        state = {
            "transposed": base.permute(3, 1, 0, 2),
            "channels_last": base.to(memory_format=torch.channels_last),
            "view": base[1:, :, 2:5, ::4],
            "other view": base[0, 0],
            "expanded": torch.tensor([[3.0], [4.0]]).expand(2, 7),
            "scalar": torch.tensor(7, dtype=torch.int64),
            "empty": torch.zeros(0, 3),
            "parameter": nn.Parameter(torch.randn(3)),
            "bool": torch.tensor([True, False]),
        }
        path = saved(tmp_path / "m.pt", state, _use_new_zipfile_serialization=zipped)
        same_bits(
            {name: tensor.read() for name, tensor in source_of(path).tensors.items()},
            {name: tensor.detach().numpy() for name, tensor in state.items()},
        )

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_bfloat16_becomes_float32_exactly_and_says_so(self, zipped, tmp_path):
        value = torch.randn(64).bfloat16()
        value[:3] = torch.tensor([float("inf"), -0.0, 1e-40])
        path = saved(tmp_path / "m.pth", {"a": value}, _use_new_zipfile_serialization=zipped)
        source = source_of(path)
        assert source.tensors["a"].dtype == "float32"
        same_bits({"a": source.tensors["a"].read()}, {"a": value.float().numpy()})
        assert any("bfloat16" in note for note in source.notes)

    def test_a_big_endian_archive_has_the_same_values(self, tmp_path):
        path = saved(tmp_path / "m.pth", {"a": torch.arange(9.0), "b": torch.arange(3)})
        swapped = tmp_path / "big.pth"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(swapped, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                size = {"m/data/0": 4, "m/data/1": 8}.get(name)
                data = np.frombuffer(data, f"u{size}").byteswap().tobytes() if size else data
                new.writestr(name, b"big" if name == "m/byteorder" else data)
        tensors = source_of(swapped).tensors
        same_bits({n: t.read() for n, t in tensors.items()}, {"a": np.arange(9, dtype="f4"), "b": np.arange(3)})

    def test_zip64_headers_are_read(self, tmp_path):
        path = saved(tmp_path / "m.pth", {"a": torch.arange(9.0)})
        large = tmp_path / "large.pth"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(large, "w") as new:
            for name in old.namelist():
                with new.open(name, "w", force_zip64=True) as entry:
                    entry.write(old.read(name))
        same_bits({"a": source_of(large).tensors["a"].read()}, {"a": np.arange(9, dtype="f4")})

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_every_pickle_protocol_is_read(self, protocol, zipped, tmp_path):
        state = {"model": OrderedDict(a=torch.arange(3.0)), "note": "x" * 300, "long": 2**70, "half": 0.5}
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        path = saved(tmp_path / "m.pth", state, **options)
        same_bits({"a": source_of(path).tensors["a"].read()}, {"a": np.arange(3, dtype="f4")})

    def test_a_file_of_python_2_with_a_view_of_a_storage_is_read(self, tmp_path):
        """As PyTorch 0.1 wrote: byte strings, parameters that are called, pairs in an OrderedDict."""
        storage = b"(U\x07storagectorch\nFloatStorage\nU\x01kU\x03cpuK\x04(U\x01vK\x01K\x02ttQ"
        tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00(K\x02t(K\x01ttR"
        parameter = b"ctorch.nn.parameter\nParameter\n" + tensor + b"\x85R(I01\nI00\nccollections\nOrderedDict\n)Rtb"
        state = b"\x80\x02ccollections\nOrderedDict\n]]U\x01aa" + parameter + b"aa\x85R."
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        pickles = [*(pickle.dumps(part, 2) for part in head), state, b"\x80\x02]U\x01ka."]
        path = tmp_path / "m.pth"
        path.write_bytes(b"".join(pickles) + struct.pack("<q4f", 4, 1, 2, 3, 4))
        expected = {"a": np.array([2, 3], dtype="f4")}
        same_bits({n: t.read() for n, t in source_of(path).tensors.items()}, expected)
        same_bits({n: t.detach().numpy() for n, t in torch.load(path, weights_only=False).items()}, expected)

    def test_a_file_on_disk_is_mapped_not_read(self, tmp_path):
        path = saved(tmp_path / "m.pth", {"a": torch.zeros(2**22)})
        tracemalloc.start()
        array = source_of(path).tensors["a"].read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert array.nbytes == 2**24
        assert peak < 2**21
        assert not array.flags.writeable


class TestWrappers:
    def state(self):
        return model_of(BOTTLENECK).state_dict()

    def test_what_a_training_script_keeps_beside_the_weights_is_left_out_and_named(self, tmp_path):
        model = model_of(BOTTLENECK)
        optimiser = torch.optim.AdamW(model.parameters())
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimiser.step()
        # The forward pass has moved the running statistics.
        expected = resnet_torch.export_weights(model)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [3, 5])
        everything = {
            "model": model.state_dict(),
            "optimizer": optimiser.state_dict(),
            "lr_scheduler": schedule.state_dict(),
            "epoch": 3,
            "args": argparse.Namespace(lr=0.1, output=None),
            "best": np.float64(0.5),
            "seen": {1, 2},
            "size": torch.Size([2, 3]),
            "device": torch.device("cpu"),
            "dtype": torch.bfloat16,
        }
        found = checkpoints.read(saved(tmp_path / "m.pth", everything))
        same_bits(found.weights, expected)
        (note,) = found.origin.notes
        assert "'model'" in note
        assert "optimizer" in note

    @pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "net", "module", "ema", "state_dict_ema"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
    def test_keys_and_prefixes_come_off_and_are_named(self, key, prefix, tmp_path):
        state = {f"{prefix}{name}": tensor for name, tensor in self.state().items()}
        found = checkpoints.read(saved(tmp_path / "m.pth", {key: state, "epoch": 1}))
        same_bits(found.weights, weights.randomize(BOTTLENECK, 1, dtype="float32"))
        assert key in found.origin.notes[0]
        assert len(found.origin.notes) == 1 + prefix.count(".")

    def test_the_model_comes_before_its_running_average(self, tmp_path):
        average = {name: torch.zeros_like(tensor) for name, tensor in self.state().items()}
        found = checkpoints.read(saved(tmp_path / "m.pth", {"model_ema": average, "model": self.state()}))
        same_bits(found.weights, weights.randomize(BOTTLENECK, 1, dtype="float32"))
        assert "'model_ema'" in found.origin.notes[0]

    def test_an_averaged_model_of_torch_is_read(self, tmp_path):
        averaged = torch.optim.swa_utils.AveragedModel(model_of(BOTTLENECK))
        found = checkpoints.read(saved(tmp_path / "m.pth", {"model_ema": averaged.state_dict()}))
        same_bits(found.weights, weights.randomize(BOTTLENECK, 1, dtype="float32"))

    def test_a_prefix_that_only_some_names_have_stays(self, tmp_path):
        state = self.state()
        state["module.bn1.bias"] = state.pop("bn1.bias")
        refused(saved(tmp_path / "m.pth", state), "missing bn1.bias", "unexpected module.bn1.bias")

    @pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, 7, [torch.zeros(3)], {"model": {"epoch": 1}}, None])
    def test_an_object_without_tensors_by_name_is_refused(self, content, tmp_path):
        refused(saved(tmp_path / "m.pth", content), "expected a state_dict")


class TestWhatWeWrite:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    @every_spec
    def test_pytorch_loads_strictly_and_bitwise(self, spec, dtype, tmp_path):
        path = tmp_path / "m.pth"
        given = weights.randomize(spec, 2, dtype=dtype)
        save_weights(path, spec, given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = torch.load(path, weights_only=True)
            torch.load(path, weights_only=False)
        model = resnet_torch.from_spec(spec).to(getattr(torch, dtype))
        assert state.keys() == model.state_dict().keys()
        assert all(tensor.is_contiguous() for tensor in state.values())
        model.load_state_dict(state, strict=True)
        same_bits(resnet_torch.export_weights(model), given)

    @every_spec
    def test_safetensors_loads_into_the_model_strictly(self, spec, tmp_path):
        given = weights.randomize(spec, 2, dtype="float32")
        save_weights(tmp_path / "m.safetensors", spec, given, "torchvision")
        model = resnet_torch.from_spec(spec)
        model.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
        same_bits(resnet_torch.export_weights(model), given)

    @pytest.mark.parametrize(("suffix", "to"), FORMATS.values(), ids=FORMATS)
    @every_spec
    def test_comes_back_bitwise(self, spec, suffix, to, tmp_path):
        given = weights.randomize(spec, 2, dtype="float32")
        save_weights(tmp_path / f"m{suffix}", spec, given, to)
        found = checkpoints.read(tmp_path / f"m{suffix}", changes={"head_pool": spec.head_pool})
        assert (found.spec, found.origin.notes) == (spec, ())
        same_bits(found.weights, given)

    @pytest.mark.parametrize(("suffix", "to"), FORMATS.values(), ids=FORMATS)
    def test_is_the_same_file_for_the_same_weights(self, suffix, to, tmp_path):
        given = weights.randomize(BOTTLENECK, 2, dtype="float32")
        for name in ("a", "b"):
            save_weights(tmp_path / f"{name}{suffix}", BOTTLENECK, given, to)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()

    def test_storages_of_the_zip_are_aligned_and_can_be_mapped_by_pytorch(self, tmp_path):
        path = tmp_path / "m.pth"
        save_weights(path, BOTTLENECK, weights.randomize(BOTTLENECK, 2, dtype="float32"))
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        state = torch.load(path, weights_only=True, mmap=True)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values() if tensor.dim())

    @pytest.mark.parametrize(("suffix", "to"), FORMATS.values(), ids=FORMATS)
    def test_a_write_that_fails_leaves_nothing_and_the_old_file(self, suffix, to, tmp_path):
        path = tmp_path / f"m{suffix}"
        path.write_bytes(b"old")
        given = dict(weights.randomize(BOTTLENECK, 2, dtype="float32"))
        given["head.fc.bias"] = given["head.fc.bias"].astype("complex64")
        with pytest.raises(CheckpointError, match="complex64"):
            save_weights(path, BOTTLENECK, given, to)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == b"old"

    @pytest.mark.parametrize(("suffix", "to"), FORMATS.values(), ids=FORMATS)
    def test_a_full_disk_is_one_line_and_leaves_nothing(self, suffix, to, tmp_path):
        code = f"""
import resource, signal
from common import checkpoints, weights
from common.architectures.resnet import ResNetSpec
from common.errors import CheckpointError
spec = ResNetSpec(block="basic", blocks=(2,), widths=(64,), classes=5)
given = weights.init(spec)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    checkpoints.write({str(tmp_path / f"m{suffix}")!r}, checkpoints.Checkpoint(spec=spec, weights=given), {to!r})
except CheckpointError as error:
    assert "cannot be written" in str(error) and chr(10) not in str(error), error
else:
    raise SystemExit("it was written")
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
        assert not list(tmp_path.iterdir())

    def test_the_zip_is_written_a_tensor_at_a_time(self, tmp_path):
        spec = ResNetSpec(block="basic", blocks=(4,), widths=(96,), stem_width=96, classes=5)
        given = weights.randomize(spec, 2, dtype="float32")
        whole = sum(array.nbytes for array in given.values())
        tracemalloc.start()
        save_weights(tmp_path / "m.pth", spec, given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < whole / 2

    def test_no_framework_is_imported_to_read_or_write(self, tmp_path):
        path = saved(tmp_path / "m.pth", model_of(BOTTLENECK).state_dict())
        code = f"""
import sys
from common import checkpoints
found = checkpoints.read({str(path)!r})
for to, name in (("torchvision", "a.pth"), ("huggingface", "c.safetensors")):
    checkpoints.write({str(tmp_path)!r} + "/" + name, found, to)
    assert len(dict(checkpoints.read({str(tmp_path)!r} + "/" + name).weights)) == len(found.weights)
assert not {{"torch", "jax", "tensorflow", "keras", "pickle5"}} & set(sys.modules)
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Touches:
    """What a hostile pickle does when it is loaded by pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class TestCode:
    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize("where", ["a", "model"])
    def test_is_refused_by_name_and_not_run(self, zipped, where, tmp_path):
        state = {"a": torch.zeros(3), where: Touches(tmp_path / "touched")}
        path = saved(tmp_path / "m.pth", state, _use_new_zipfile_serialization=zipped)
        refused(path, "carries code", "posix.system", "refused")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_a_whole_pickled_model_is_refused(self, zipped, tmp_path):
        path = tmp_path / "m.pth"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=zipped)
        refused(path, "state_dict()")

    def test_a_bare_pickle_is_refused(self, tmp_path):
        (tmp_path / "m.pth").write_bytes(pickle.dumps(Touches(tmp_path / "touched"), 2))
        refused(tmp_path / "m.pth", "carries code", "posix.system")
        (tmp_path / "m.pth").write_bytes(pickle.dumps({"a": 1}, 2))
        refused(tmp_path / "m.pth", "bare pickle")

    def test_torchscript_is_refused(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "TorchScript")

    @pytest.mark.parametrize("name", ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load"])
    @pytest.mark.parametrize("stacked", [True, False])
    def test_only_listed_names_are_known(self, name, stacked):
        module, _, attribute = name.rpartition(".")
        ask = f"c{module}\n{attribute}\n".encode()
        if stacked:
            ask = b"\x8c%c%b\x8c%c%b\x93" % (len(module), module.encode(), len(attribute), attribute.encode())
        with pytest.raises(CheckpointError, match=f"carries code: asks for {name}; refused"):
            state_dict.unpickled(io.BytesIO(b"\x80\x04" + ask + b"."), lambda identity: identity)

    @pytest.mark.parametrize(
        "hostile",
        [
            b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f.",  # a string of 2**63 bytes
            b"\x80\x02\x8b\xff\xff\xff\x7f.",  # an integer of 2**31 bytes
            b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"}h\x00K\x01s.",  # a key of 2**100 steps to hash
            b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",  # a name twice
            b"\x80\x02}K\x01s.", b"\x80\x02.", b"\x80\x02tt.", b"\x80\x02h\x07.", b"\x80\x02R.", b"\x80\x02", b"",
            b"\x80\x02(cargparse\nNamespace\no.", b"\x80\x02\x82\x01.",
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(tR.",
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00Nh\x00)tR.",
            b"I" + b"9" * 10_000 + b"\n.",
        ],
        ids=range(16),
    )  # fmt: skip
    def test_hostile_pickles_end_in_one_line(self, hostile):
        with pytest.raises(CheckpointError) as caught, little_memory():
            state_dict.unpickled(io.BytesIO(hostile), lambda identity: identity)
        assert "\n" not in str(caught.value)

    def test_a_memo_of_two_thousand_million_places_takes_no_memory(self):
        with little_memory():
            assert state_dict.unpickled(io.BytesIO(b"\x80\x02]r\xff\xff\xff\x7f."), lambda identity: identity) == []

    def test_a_list_of_pairs_that_is_shown_again_and_again_takes_no_memory(self):
        pairs = b"".join(b"]X\x02\x00\x00\x00%02xaK\x00aa" % n for n in range(250))
        again = b"ccollections\nOrderedDict\nh\x00\x85R" * 5000
        found = state_dict.unpickled(
            io.BytesIO(b"\x80\x02]q\x00" + pairs + b"(" + again + b"l."), lambda identity: identity
        )
        assert [len(each) for each in found] == [250] + [0] * 4999

    def test_no_stand_in_can_be_changed(self):
        """Attributes of what a name stands for would be this process's own."""
        change = b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(tstb."
        state_dict.unpickled(io.BytesIO(b"\x80\x02" + change), lambda identity: identity)
        assert state_dict._tensor.__defaults__ is None

    def test_tuples_in_tuples_do_not_overflow_the_stack(self):
        deep = b"\x80\x02" + b"(" * 30_000 + b"t" * 30_000 + b"."
        with little_memory():
            assert isinstance(state_dict.unpickled(io.BytesIO(deep), lambda identity: identity), tuple)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A copy of an archive by `zipfile`, its entries as `change` has them."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    copy = path.with_name("changed.pth")
    with warnings.catch_warnings(), zipfile.ZipFile(copy, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in change(entries):
            archive.writestr(name, data)
    return copy


class TestDamagedZip:
    @pytest.fixture
    def path(self, tmp_path):
        return saved(tmp_path / "m.pth", model_of(BOTTLENECK).state_dict())

    def test_every_changed_byte_of_an_entry_that_is_read_is_found(self, path):
        raw = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            places = []
            for info in archive.infolist():
                start = info.header_offset + 30 + sum(struct.unpack("<2H", raw[info.header_offset + 26 :][:4]))
                if "serialization" not in info.filename and "alignment" not in info.filename:
                    # Batch counters are no weights: they are not even read.
                    places += [start, start + info.file_size - 1] if info.file_size != 8 else []
        assert len(places) > 100
        for place in places:
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            refused(path, "fails its CRC")

    @pytest.mark.slow
    def test_no_mutation_loads_with_another_value(self, path):
        expected = everything(path)
        raw, generator, refusals = path.read_bytes(), np.random.default_rng(3), 0
        for _ in range(300):
            data = bytearray(raw)
            # Half of them in the directory at the end.
            place = int(generator.integers(len(data) - 7000 if generator.random() < 0.5 else 0, len(data)))
            data[place] ^= int(generator.integers(1, 256))
            path.write_bytes(data)
            outcome = everything(path)
            refusals += isinstance(outcome, str)
            assert "\n" not in outcome if isinstance(outcome, str) else outcome == expected
        assert refusals > 100

    def test_a_file_cut_short_anywhere_is_refused(self, path):
        raw = path.read_bytes()
        for length in (*range(1, 60, 7), *range(60, len(raw), len(raw) // 40), len(raw) - 1):
            path.write_bytes(raw[:length])
            refused(path)

    def test_two_entries_that_swap_names_in_the_directory_are_found(self, path):
        raw = path.read_bytes()
        directory = raw.rindex(b"PK\x05\x06") - struct.unpack("<I", raw[raw.rindex(b"PK\x05\x06") + 12 :][:4])[0]
        head, tail = raw[:directory], raw[directory:]
        swapped = tail.replace(b"m/data/10", b"@").replace(b"m/data/16", b"m/data/10").replace(b"@", b"m/data/16")
        assert swapped != tail
        path.write_bytes(head + swapped)
        refused(path, "damaged zip")

    def test_compressed_entries_are_refused_before_they_are_unpacked(self, path):
        inflate = lambda entries: [(n, bytes(2**26) if n == "m/data/0" else d) for n, d in entries]  # noqa: E731
        bomb = rewritten(path, inflate, zipfile.ZIP_DEFLATED)
        with little_memory():
            refused(bomb, "compressed")

    def test_names_twice_are_refused(self, path):
        refused(rewritten(path, lambda entries: [*entries, entries[-1]]), "two entries", entries_of(path)[-1])

    @pytest.mark.parametrize("gone", ["data/0", "data/6", "data.pkl"])
    def test_a_missing_entry_is_refused(self, path, gone):
        refused(rewritten(path, lambda entries: [e for e in entries if e[0] != f"m/{gone}"]))

    def test_a_storage_of_another_size_is_refused(self, path):
        change = lambda entries: [(n, d + b"0000" if n == "m/data/0" else d) for n, d in entries]  # noqa: E731
        refused(rewritten(path, change), "storage 0 holds")

    def test_an_unknown_byte_order_is_refused(self, path):
        change = lambda entries: [(n, b"middle" if n == "m/byteorder" else d) for n, d in entries]  # noqa: E731
        refused(rewritten(path, change), "byteorder", "middle")

    def test_an_archive_without_crcs_is_refused(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            path = saved(tmp_path / "m.pth", {"a": torch.zeros(3)})
        finally:
            torch.serialization.set_crc32_options(True)
        refused(path, "no CRCs")

    def test_a_byte_order_whose_name_is_damaged_is_not_taken_as_missing(self, path):
        raw = path.read_bytes()
        place = raw.rindex(b"m/byteorder")
        path.write_bytes(raw[:place] + b"m/bytfo" + raw[place + 7 :])
        refused(path, "damaged zip")

    @pytest.mark.parametrize(
        ("claim", "words"),
        [
            ({"offset": 2}, "reaches element 4"),
            ({"strides": (3,)}, "reaches element 4"),
            ({"strides": (2**62,)}, "reaches element"),
            ({"shape": (4,)}, "reaches element 4"),
            ({"shape": (2**30,), "strides": (0,)}, f"claims {2**30} elements"),
            ({"shape": (2**39, 2**39), "strides": (0, 0)}, f"claims {2**78} elements"),
            ({"shape": (2**62,), "strides": (0,)}, "claims an axis"),
            ({"shape": (2, 1)}, "pickle is damaged"),
            ({"shape": (-1,)}, "pickle is damaged"),
            ({"numel": 4}, "storage 0 holds 12 bytes"),
            ({"numel": 2**70}, "asks for a storage in a way"),
            ({"numel": -3}, "asks for a storage in a way"),
        ],
    )
    def test_a_tensor_that_claims_more_than_its_storage_is_refused(self, claim, words, tmp_path):
        path = tmp_path / "m.pth"
        self.with_claims(path, {})
        same_bits({n: t.read() for n, t in source_of(path).tensors.items()}, {"a": np.array([0, 1], dtype="f4")})
        self.with_claims(path, claim)
        with little_memory():
            refused(path, words)

    def with_claims(self, path, claim):
        """A tensor of two of the three numbers of a storage, or as `claim` has it."""
        claims = {"numel": 3, "offset": 0, "shape": (2,), "strides": (1,)} | claim
        number = lambda value: b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)  # noqa: E731
        numbers = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
        storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        storage += number(claims["numel"]) + b"tQ"
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(claims["offset"])
        tensor += numbers(claims["shape"]) + numbers(claims["strides"]) + b"\x89NtR"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.")
            archive.writestr("m/data/0", np.arange(3, dtype="f4").tobytes())

    def test_many_entries_over_the_same_bytes_are_refused(self, tmp_path):
        path = saved(tmp_path / "m.pth", {"a": torch.zeros(3000)})
        with zipfile.ZipFile(path, "a") as archive:
            entry = archive.getinfo("m/data/0")
            archive.filelist += [entry] * 10
            archive._didModify = True
        refused(path, "larger than the file")


class TestDamagedLegacy:
    @pytest.fixture
    def path(self, tmp_path):
        return saved(tmp_path / "m.pth", model_of(BOTTLENECK).state_dict(), _use_new_zipfile_serialization=False)

    def test_a_file_cut_short_anywhere_is_refused(self, path):
        raw = path.read_bytes()
        for length in (*range(1, 60, 7), *range(60, len(raw), len(raw) // 40), len(raw) - 1):
            path.write_bytes(raw[:length])
            refused(path)

    def test_more_than_the_storages_is_refused(self, path):
        path.write_bytes(path.read_bytes() + b"0")
        refused(path, "follow the last storage")

    def test_a_storage_that_counts_otherwise_is_refused(self, tmp_path):
        path = saved(tmp_path / "m.pth", {"a": torch.arange(3.0)}, _use_new_zipfile_serialization=False)
        raw = path.read_bytes()
        assert raw[-20:-12] == struct.pack("<q", 3)
        path.write_bytes(raw[:-20] + struct.pack("<q", 2) + raw[-12:])
        refused(path, "counts another number")

    def test_no_mutation_ends_in_anything_but_a_line(self, path):
        raw, generator, refusals = path.read_bytes(), np.random.default_rng(3), 0
        pickles = raw.index(b"cpu") + 8000
        for _ in range(300):
            data = bytearray(raw)
            data[int(generator.integers(0, pickles))] ^= int(generator.integers(1, 256))
            path.write_bytes(data)
            outcome = everything(path)
            refusals += isinstance(outcome, str) and "\n" not in outcome
        assert refusals > 100

    def test_a_tar_is_refused_in_a_line(self, tmp_path):
        path = tmp_path / "m.pth"
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "storages", "tensors", "pickle"):
                archive.addfile(tarfile.TarInfo(name))
        refused(path, "tar archive")


def with_header(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LIBRARY = "cannot be read as safetensors"  # and the library's own words for it


class TestSafetensors:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    @every_spec
    def test_what_the_library_writes_is_read_bitwise(self, spec, dtype, tmp_path):
        model = model_of(spec, "float32").to(getattr(torch, dtype))
        save_file(model.state_dict(), tmp_path / "m.safetensors")
        found = checkpoints.read(tmp_path / "m.safetensors", changes={"head_pool": spec.head_pool})
        assert found.spec == spec
        widened = model.float() if dtype == "bfloat16" else model
        same_bits(found.weights, resnet_torch.export_weights(widened))
        assert (dtype == "bfloat16") == any("bfloat16" in note for note in found.origin.notes)

    def test_prefixes_come_off_and_are_named(self, tmp_path):
        state = {f"module.{name}": tensor for name, tensor in model_of(BOTTLENECK).state_dict().items()}
        save_file(state, tmp_path / "m.safetensors")
        found = checkpoints.read(tmp_path / "m.safetensors")
        same_bits(found.weights, weights.randomize(BOTTLENECK, 1, dtype="float32"))
        assert "'module.'" in found.origin.notes[0]

    @pytest.mark.parametrize(
        ("header", "data", "words"),
        [
            (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
             b'"data_offsets":[4,8]}}', 8, LIBRARY),
            (b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', 4, LIBRARY),
            ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, LIBRARY),
            ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, LIBRARY),
            ({"a": entry([1], 0, 4)}, 12, LIBRARY),
            ({"a": entry([1], 4, 8)}, 8, LIBRARY),
            ({"a": entry([2], 0, 8)}, 4, LIBRARY),
            ({"a": entry([2**35], 0, 2**37)}, 4, LIBRARY),
            ({"a": entry([2**62], 0, 4)}, 4, "shape"),
            ({"a": entry([2**39] * 30, 0, 4)}, 4, LIBRARY),
            ({"a": entry([1] * 40, 0, 4)}, 4, "shape"),
            ({"a": entry([-1], 0, -4)}, 4, LIBRARY),
            ({"a": entry([True], 0, 4)}, 4, LIBRARY),
            ({"a": entry([1], 8, 4)}, 8, LIBRARY),
            ({"a": entry([2], 0, 4)}, 4, LIBRARY),
            ({"a": entry([1], 0, 1, "F8_E4M3")}, 1, "F8_E4M3"),
            ({"a": entry([1], 0.0, 4.0)}, 4, LIBRARY),
            ({"a": [1, 2]}, 0, LIBRARY),
            ({"a\nb": entry([1], 0, 4)}, 4, "no name"),
            ({"__metadata__": {"format": 3}, "a": entry([1], 0, 4)}, 4, LIBRARY),
            ({"__metadata__": [], "a": entry([1], 0, 4)}, 4, LIBRARY),
            (b"{" + b'"a":{' * 100_000, 0, LIBRARY),
            (b'{"a":' + b"9" * 10_000 + b"}", 0, LIBRARY),
            (b"{\xff}", 0, LIBRARY),
            (b"{", 0, LIBRARY),
            ({}, 0, ""),
        ],
    )  # fmt: skip
    def test_a_header_that_is_not_right_is_refused(self, header, data, words, tmp_path):
        path = with_header(tmp_path / "m.safetensors", header, bytes(data))
        with little_memory():
            refused(path, words)

    @pytest.mark.parametrize("length", [0, 1, 50, 2**20, 2**23, 2**40, 2**64 - 1])
    def test_a_header_longer_than_the_file_is_refused(self, length, tmp_path):
        path = with_header(tmp_path / "m.safetensors", {"a": entry([1], 0, 4)}, bytes(4), length=length)
        with little_memory():
            refused(path)

    def test_a_file_cut_short_anywhere_is_refused(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file(model_of(BOTTLENECK).state_dict(), path)
        raw = path.read_bytes()
        for length in (*range(1, 20, 3), *range(20, len(raw), len(raw) // 40), len(raw) - 1):
            path.write_bytes(raw[:length])
            refused(path)


def sharded(folder, spec, count=3):
    """Hugging Face's shards and index of a network of random weights."""
    given = weights.randomize(spec, 2, dtype="float32")
    save_weights(folder / "whole.safetensors", spec, given, "huggingface")
    state = load_file(folder / "whole.safetensors")
    (folder / "whole.safetensors").unlink()
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    table = {name: names[i % count] for i, name in enumerate(state)}
    for shard in names:
        part = {name: tensor for name, tensor in state.items() if table[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return given, table


class TestShards:
    def index(self, folder, **table):
        path = folder / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        found["weight_map"] |= {name.replace("__", "."): file for name, file in table.items()}
        path.write_text(json.dumps(found))
        return path

    @pytest.mark.parametrize("by", ["folder", "index", "another name"])
    def test_are_read_by_folder_and_by_index(self, by, tmp_path):
        given, _ = sharded(tmp_path, BOTTLENECK)
        path = tmp_path / "model.safetensors.index.json"
        path = {"folder": tmp_path, "index": path, "another name": path.rename(tmp_path / "i") if by[0] == "a" else 0}[
            by
        ]
        found = checkpoints.read(path)
        assert (found.origin.format, found.origin.container, found.spec) == (
            "huggingface",
            "safetensors, sharded",
            BOTTLENECK,
        )
        same_bits(found.weights, given)

    @pytest.mark.parametrize(
        "name", ["../x.safetensors", "/etc/passwd", "..", "", "a/../b", "a\\b", "x\ny", "gone.safetensors"]
    )
    def test_names_that_lead_out_of_the_folder_are_refused(self, name, tmp_path):
        folder = tmp_path / "inside"
        folder.mkdir()
        sharded(folder, BOTTLENECK)
        save_file({"classifier.1.bias": torch.zeros(5)}, tmp_path / "x.safetensors")
        refused(self.index(folder, classifier__1__bias=name))

    def test_a_link_out_of_the_folder_is_refused(self, tmp_path):
        folder = tmp_path / "inside"
        folder.mkdir()
        _, table = sharded(folder, BOTTLENECK)
        shard = folder / table["classifier.1.bias"]
        shard.rename(tmp_path / "outside")
        shard.symlink_to(tmp_path / "outside")
        refused(folder, "link out of the folder")

    def test_links_of_hugging_faces_cache_are_followed(self, tmp_path):
        folder, blobs = tmp_path / "snapshots" / "revision", tmp_path / "blobs"
        folder.mkdir(parents=True)
        blobs.mkdir()
        given, _ = sharded(folder, BOTTLENECK)
        for number, path in enumerate(list(folder.iterdir())):
            path.rename(blobs / str(number))
            path.symlink_to(f"../../blobs/{number}")
        same_bits(checkpoints.read(folder).weights, given)

    def test_a_tensor_in_another_shard_than_listed_is_refused(self, tmp_path):
        _, table = sharded(tmp_path, BOTTLENECK)
        other = next(file for file in table.values() if file != table["classifier.1.bias"])
        refused(self.index(tmp_path, classifier__1__bias=other), "do not agree", "classifier.1.bias")

    def test_a_tensor_in_two_shards_is_refused(self, tmp_path):
        _, table = sharded(tmp_path, BOTTLENECK)
        other = tmp_path / next(file for file in table.values() if file != table["classifier.1.bias"])
        save_file(load_file(other) | {"classifier.1.bias": torch.zeros(5)}, other)
        refused(tmp_path, "do not agree", "classifier.1.bias")

    def test_a_tensor_that_is_listed_and_in_no_shard_is_refused(self, tmp_path):
        _, table = sharded(tmp_path, BOTTLENECK)
        refused(self.index(tmp_path, more=table["classifier.1.bias"]), "do not agree", "more")

    @pytest.mark.parametrize(
        "text",
        [
            '{"weight_map": []}',
            '{"weight_map": {}}',
            '{"weight_map": {"a": 3}}',
            '{"weight_map": {"a": "b", "a": "c"}}',
            '{"weight_map"',
        ],
    )
    def test_an_index_that_is_none_is_refused(self, text, tmp_path):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(text)
        refused(tmp_path)


class TestHuggingFace:
    def test_a_folder_gets_the_config_that_builds_the_same_network(self, tmp_path):
        spec = BOTTLENECK.replace(stride_in="conv1", in_channels=1)
        save_weights(tmp_path / "model.safetensors", spec, weights.init(spec), "huggingface")
        config = json.loads((tmp_path / "config.json").read_text())
        labels = config.pop("id2label")
        assert config.pop("label2id") == {label: int(index) for index, label in labels.items()}
        assert len(labels) == 5
        assert config == {
            "architectures": ["ResNetForImageClassification"],
            "model_type": "resnet",
            "num_channels": 1,
            "embedding_size": 4,
            "hidden_sizes": [16, 32],
            "depths": [1, 2],
            "layer_type": "bottleneck",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": True,
        }

    def test_a_config_that_shapes_do_not_show_is_told(self, tmp_path):
        spec = BOTTLENECK.replace(stride_in="conv1")
        save_weights(tmp_path / "model.safetensors", spec, weights.init(spec), "huggingface")
        (note,) = checkpoints.read(tmp_path).origin.notes
        assert "stride_in=conv1" in note
        config = tmp_path / "config.json"
        config.write_text(
            config.read_text().replace('"downsample_in_first_stage": false', '"downsample_in_first_stage": true')
        )
        refused(tmp_path, "first stage")

    def test_a_config_of_another_network_is_not_overwritten(self, tmp_path):
        save_weights(tmp_path / "model.safetensors", BOTTLENECK, weights.init(BOTTLENECK), "huggingface")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        save_weights(tmp_path / "model.safetensors", BOTTLENECK, weights.init(BOTTLENECK), "huggingface")
        other = SPECS["basic"]
        with pytest.raises(CheckpointError, match="another network"):
            save_weights(tmp_path / "model.safetensors", other, weights.init(other), "huggingface")
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(
        "changes", [{"conv_bias": True}, {"stem_pool": False}, {"bn_eps": 1e-3}, {"head": "softmax"}]
    )
    def test_a_network_without_a_config_is_refused_as_a_folder_only(self, changes, tmp_path):
        spec = BOTTLENECK.replace(**changes)
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            save_weights(tmp_path / "model.safetensors", spec, weights.init(spec), "huggingface")
        assert not list(tmp_path.iterdir())
        save_weights(tmp_path / "other.safetensors", spec, weights.init(spec), "huggingface")

    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_a_model_saved_without_its_classifier_is_read(self, suffix, tmp_path):
        spec, path = SPECS["headless"], tmp_path / f"m{suffix}"
        given = weights.randomize(spec, 2, dtype="float32")
        save_weights(path, spec, given, "huggingface")
        state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
        state = {name.removeprefix("resnet."): tensor for name, tensor in state.items()}
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        found = checkpoints.read(path)
        same_bits(found.weights, given)
        assert found.spec.head == "none"

    def test_names_are_those_of_transformers(self):
        table = names.find("resnet", "huggingface").arrays(architectures.find("resnet50"))
        natives = [native for native, _ in table.values()]
        assert len(table) == len(set(natives)) == 267
        for native in (
            "resnet.embedder.embedder.convolution.weight",
            "resnet.embedder.embedder.normalization.running_var",
            "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight",
            "resnet.encoder.stages.3.layers.2.layer.2.normalization.bias",
            "classifier.1.weight",
        ):
            assert native in natives
