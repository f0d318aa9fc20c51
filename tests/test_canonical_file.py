"""The canonical file: what stands in it, what comes back, and every way in which one can be damaged."""

import json
import struct
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_weights import FAULTS, SMALL, WIDE, every_spec, same_bits
from written import save_weights

from common import architectures, checkpoints, weights
from common.checkpoints import Checkpoint, canonical
from common.errors import WeightsError
from common.files import written


def written_anyhow(folder, arrays):
    """A file that says it is a canonical one of `SMALL`, whatever is in it, its checksums right."""
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path = folder / "faulty.safetensors"
    save_file(arrays, path, canonical.metadata_of(Checkpoint(spec=SMALL, weights=arrays)))
    return path


def split(path):
    """Header and tensors of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path, header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def refused(path):
    """The message of the error that loading raises, which is a `WeightsError`, one line, with the path in front."""
    with pytest.raises(WeightsError) as caught:
        checkpoints.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(f"{path}: ")


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_weights(path, SMALL, weights.randomize(SMALL))
        return path

    @every_spec
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_weights_and_spec_come_back_bitwise(self, tmp_path, spec, dtype):
        given_ = weights.randomize(spec, dtype=dtype)
        given_[next(iter(given_))].flat[0] = -0.0
        save_weights(tmp_path / "w.safetensors", spec, given_)
        found = checkpoints.read(tmp_path / "w.safetensors")
        assert found.spec == spec
        assert same_bits(dict(found.weights), given_)
        assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]

    def test_a_view_in_another_order_is_written_by_its_values(self, tmp_path):
        given_ = weights.randomize(SMALL)
        turned = {name: np.asfortranarray(value)[::-1] for name, value in given_.items()}
        save_weights(tmp_path / "w.safetensors", SMALL, turned)
        loaded = checkpoints.read(str(tmp_path / "w.safetensors")).weights
        assert all(np.array_equal(loaded[name], value[::-1]) for name, value in given_.items())

    def test_loading_holds_no_more_than_one_tensor_at_a_time(self, tmp_path):
        spec = WIDE.replace(widths=(128, 256))
        path = tmp_path / "w.safetensors"
        save_weights(path, spec, weights.init(spec))
        sizes = [value.nbytes for value in weights.init(spec).values()]
        tracemalloc.start()
        try:
            loaded = checkpoints.read(path).weights
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Beside names and the walk.
        assert peak < max(sizes) + 1_000_000 < sum(sizes)
        assert held < 500_000
        assert loaded["stem.conv.kernel"] is not loaded["stem.conv.kernel"]

    def test_the_spec_stands_in_the_metadata_for_other_readers(self, path):
        header, _ = split(path)
        assert json.loads(header["__metadata__"]["spec"]) == architectures.to_dict(SMALL)
        assert header["__metadata__"]["format"] == canonical.FORMAT
        assert load_file(path).keys() == weights.shapes(SMALL).keys()

    def test_a_file_cut_off_anywhere_is_refused(self, path):
        raw = path.read_bytes()
        header = len(raw) - len(split(path)[1])
        cuts = {*range(12), *range(12, header + 16, 97), *range(header, len(raw), 1013), len(raw) - 1}
        for cut in sorted(cuts):
            path.write_bytes(raw[:cut])
            refused(path)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x89PNG\r\n\x1a\n" * 50,
            b"PK\x03\x04" + bytes(500),
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 4) + b"nope",
            struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        ],
        ids=["empty", "png", "zip", "huge header", "no tensors", "no JSON", "no UTF-8"],
    )
    def test_what_is_no_canonical_file_is_refused(self, tmp_path, content):
        path = tmp_path / "w.safetensors"
        path.write_bytes(content)
        refused(path)

    def test_bytes_after_the_end_are_refused(self, path):
        path.write_bytes(path.read_bytes() + b"\0")
        refused(path)

    def test_a_missing_file_and_a_folder_are_called_that(self, tmp_path):
        with pytest.raises(WeightsError, match="there is no such file"):
            checkpoints.read(tmp_path / "none")
        assert "not a checkpoint" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("metadata", "expected"),
        [
            (None, "no names known here"),
            ({"format": "pt"}, "no names known here"),
            ({"format": "resnet-parity record 1"}, "no names known here"),
            ({"format": canonical.FORMAT}, "the spec inside is damaged: a spec is JSON"),
            ({"format": canonical.FORMAT, "spec": "{"}, "the spec inside is damaged: a spec is JSON"),
            ({"format": canonical.FORMAT, "spec": "[" * 100_000}, "the spec inside is damaged"),
            ({"format": canonical.FORMAT, "spec": "[]"}, "the spec inside is damaged: a spec is a JSON obj"),
            ({"format": canonical.FORMAT, "spec": '{"family": "mobilenet"}'}, "the spec inside is damaged: family="),
            (
                {"format": canonical.FORMAT, "spec": '{"family": "resnet", "block": "basic", "blocks": [0]}'},
                "the spec inside is damaged: blocks=[0] is not allowed",
            ),
        ],
        ids=range(9),
    )
    def test_wrong_metadata_are_refused(self, path, metadata, expected):
        header, body = split(path)
        header.pop("__metadata__")
        join(path, header | ({"__metadata__": metadata} if metadata else {}), body)
        assert expected in refused(path)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"classes": 6}, "head.fc.kernel has shape (32, 5); the spec expects (32, 6)"),
            ({"conv_bias": True}, "missing stem.conv.bias, stages.0.blocks.0.conv1.bias"),
            ({"blocks": (1, 1)}, "unexpected stages.0.blocks.1."),
        ],
    )
    def test_the_tensors_of_another_spec_are_refused(self, path, changes, expected):
        header, body = split(path)
        header["__metadata__"]["spec"] = architectures.to_json(SMALL.replace(**changes))
        join(path, header, body)
        assert expected in refused(path)

    @pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
    def test_a_faulty_tensor_is_refused_when_saving(self, path, fault, expected):
        faulty = weights.randomize(SMALL, dtype="float32")
        fault(faulty)
        before = path.read_bytes()
        with pytest.raises(WeightsError) as caught:
            save_weights(path, SMALL, faulty)
        assert expected in str(caught.value)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("name", [name for name in FAULTS if name not in ("NaN", "infinite")])
    def test_a_faulty_tensor_is_refused_when_loading(self, tmp_path, name):
        fault, expected = FAULTS[name]
        faulty = weights.randomize(SMALL, dtype="float32")
        fault(faulty)
        path = written_anyhow(tmp_path, faulty)
        # The file holds its tensors in an order of its own.
        assert expected.split(", ")[0] in refused(path)

    @pytest.mark.parametrize("name", ["NaN", "infinite"])
    def test_a_value_that_is_not_finite_is_shown_but_loads_into_no_network(self, tmp_path, name):
        fault, expected = FAULTS[name]
        faulty = weights.randomize(SMALL, dtype="float32")
        fault(faulty)
        found = checkpoints.read(written_anyhow(tmp_path, faulty))
        assert len(weights.suspicious(SMALL, found.weights)) == 1
        with pytest.raises(WeightsError) as caught:
            checkpoints.read_for(SMALL, found)
        assert expected in str(caught.value)

    @pytest.mark.parametrize(("dtype", "width"), [("F8_E4M3", 1), ("F8_E5M2", 1)])
    def test_a_type_that_numpy_does_not_have_is_named(self, path, dtype, width):
        header, _ = split(path)
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                size = int(np.prod(entry["shape"])) * width
                header[name] = entry | {"dtype": dtype, "data_offsets": [end, end + size]}
                end += size
        join(path, header, bytes(end))
        assert f"is stored as {dtype}" in refused(path)

    @pytest.mark.parametrize("key", ["checksums", "class_names", "origin"])
    def test_a_header_with_a_renamed_entry_is_refused(self, tmp_path, key):
        save_weights(tmp_path / "w.safetensors", SMALL, weights.init(SMALL))
        raw = (tmp_path / "w.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(raw.replace(f'"{key}":'.encode(), f'"{key[:-1]}_":'.encode(), 1))
        with pytest.raises(WeightsError, match=r"the header was changed|the metadata are damaged"):
            checkpoints.read(tmp_path / "w.safetensors")

    @pytest.mark.slow
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
    @settings(max_examples=120, deadline=None)
    def test_changed_bytes_change_no_value_or_give_one_line(self, tmp_path_factory, changes, in_header):
        path = tmp_path_factory.getbasetemp() / "changed.safetensors"
        save_weights(path, SMALL, weights.init(SMALL))
        header, _ = split(path)
        raw = bytearray(path.read_bytes())
        reach = 8 + len(json.dumps(header, separators=(",", ":"))) if in_header else len(raw)
        for place, value in changes:
            raw[place % reach] = value
        path.write_bytes(raw)
        try:
            found = checkpoints.read(path)
        except WeightsError:
            refused(path)
        else:
            assert found.spec == SMALL
            assert same_bits(dict(found.weights), weights.init(SMALL))


class TestInterruptedWrite:
    @staticmethod
    def write_half(path, raised):
        with written(path, WeightsError) as beside:
            beside.write_bytes(b"half")
            raise raised

    @pytest.mark.parametrize("before", [None, b"what was there"])
    @pytest.mark.parametrize(
        ("raised", "seen"),
        [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), WeightsError),
         (ZeroDivisionError(), ZeroDivisionError)],
    )  # fmt: skip
    def test_nothing_new_stands_there_and_what_was_there_stays(self, tmp_path, before, raised, seen):
        path = tmp_path / "w.safetensors"
        if before is not None:
            path.write_bytes(before)
        with pytest.raises(seen):
            self.write_half(path, raised)
        assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == (
            [("w.safetensors", before)] if before else []
        )

    @pytest.mark.parametrize(
        ("place", "expected"),
        [("none/w.safetensors", "No such file or directory"), ("folder.safetensors", "Is a directory")],
    )
    def test_a_place_that_cannot_be_written_is_one_line(self, tmp_path, place, expected):
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(WeightsError) as caught:
            save_weights(tmp_path / place, SMALL, weights.init(SMALL))
        assert str(caught.value) == f"{tmp_path / place}: cannot be written: {expected}; nothing was left there"
        assert [file.name for file in tmp_path.iterdir()] == ["folder.safetensors"]

    # The target is larger than the space, by the file system's own word: a limit on the size of files, and, where user
    # namespaces permit mounting, a file system that is really full.
    SAVE = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from common import checkpoints, weights
        from common.architectures.resnet import ResNetSpec
        from common.checkpoints import Checkpoint
        from common.errors import WeightsError

        folder, limit = Path(sys.argv[1]), int(sys.argv[2])
        spec = ResNetSpec(block="basic", blocks=(1,), widths=(64,), classes=5)
        small = ResNetSpec(block="basic", blocks=(1,), widths=(4,), stem_width=4, stem_kernel=3, classes=5)
        checkpoints.write(folder / "old.safetensors", Checkpoint(spec=small, weights=weights.init(small)))
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for name in ("old.safetensors", "new.safetensors"):
            try:
                checkpoints.write(folder / name, Checkpoint(spec=spec, weights=weights.init(spec)))
                print("written")
            except WeightsError as error:
                print(error)
        print(*[file.name for file in folder.iterdir()])
        print(checkpoints.read(folder / "old.safetensors").spec == small)
    """)

    def outcome(self, command, folder, limit):
        run = subprocess.run([*command, sys.executable, "-c", self.SAVE, str(folder), str(limit)],
                             capture_output=True, text=True, timeout=120)  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    def check(self, lines, folder, expected):
        assert lines[2:] == ["old.safetensors", "True"]
        for name, line in zip(("old.safetensors", "new.safetensors"), lines, strict=False):
            assert line.startswith(f"{folder / name}: cannot be written: ")
            assert expected in line
            assert line.endswith("; nothing was left there")

    def test_a_file_larger_than_the_limit_leaves_nothing(self, tmp_path):
        self.check(self.outcome([], tmp_path, 64 * 1024), tmp_path, "File too large")

    def test_a_full_disk_leaves_nothing(self, tmp_path):
        mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
                 f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}" && exec "$@"', "sh"]  # fmt: skip
        try:
            permitted = subprocess.run([*mount, "true"], capture_output=True, timeout=60).returncode == 0
        except FileNotFoundError:
            permitted = False
        if not permitted:
            pytest.skip("this system permits no mount in a user namespace")
        self.check(self.outcome(mount, tmp_path, 0), tmp_path, "No space left on device")
