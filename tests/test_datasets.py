"""Data sets in their public forms: the very pixels and labels of the files, and one line for anything that is wrong."""

import gzip
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from contextlib import suppress
from hashlib import sha256

import numpy as np
import pytest
from archives import mnist, pickled, planes, records, tar
from PIL import Image
from sklearn.datasets import load_digits

from common import datasets
from common import images as photographs
from common.errors import DataError
from common.training.augmentation import Resize, ResizedCrop
from common.training.recipe import PRESETS

RNG = np.random.default_rng(0)


def everything(examples):
    return examples.images(np.arange(len(examples))), examples.labels


def refused(name, lines=1, **options):
    """The message of the error that opening raises: a `DataError` that names the file, in one line and a list."""
    with pytest.raises(DataError) as caught:
        datasets.open(str(name), **options)
    message = str(caught.value)
    assert len(message.splitlines()) == lines
    assert str(name) in message
    return message


class TestDigits:
    @pytest.fixture
    def digits(self):
        return datasets.open("digits")

    def test_the_digits_are_those_of_scikit_learn(self, digits):
        theirs = load_digits()
        scans = {
            (np.rint(image * 255 / 16)).astype(np.uint8).tobytes(): label
            for image, label in zip(theirs.images, theirs.target, strict=True)
        }
        for part in (digits.train, digits.test):
            images, labels = everything(part)
            assert images.dtype == np.uint8
            assert images.shape[1:] == (8, 8, 1)
            assert labels.dtype == np.int64
            assert [scans[image.tobytes()] for image in images] == labels.tolist()
        assert len(digits.train) + len(digits.test) == len(theirs.images) == 1797

    def test_the_parts_share_no_scan_and_the_test_has_a_fifth_of_each_class(self, digits):
        train, test = ({image.tobytes() for image in everything(part)[0]} for part in (digits.train, digits.test))
        assert not train & test
        counts = np.bincount(digits.test.labels)
        assert (counts == (counts + np.bincount(digits.train.labels)) // 5).all()

    def test_the_split_never_changes(self, digits):
        images, labels = everything(digits.test)
        assert labels[:12].tolist() == [6, 7, 4, 8, 3, 7, 9, 8, 4, 1, 5, 2]
        assert sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16] == "3bcd3ad7ea0cafca"

    def test_mean_and_deviation_are_those_of_the_training_part(self, digits):
        values = everything(digits.train)[0] / 255
        assert digits.mean == pytest.approx((values.mean(),), abs=5e-5)
        assert digits.std == pytest.approx((values.std(),), abs=5e-5)

    def test_an_example_is_an_image_and_a_whole_number(self, digits):
        image, label = digits.train[-1]
        assert np.array_equal(image, everything(digits.train)[0][-1])
        assert type(label) is int
        with pytest.raises(IndexError):
            digits.train[len(digits.train)]


def photos(count):
    return RNG.integers(0, 256, (count, 32, 32, 3), np.uint8)


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"fine_{n}" for n in range(100)]


def cifar(classes, form, protocol=2):
    """The files of an archive, and the images and labels of its two parts."""
    parts = {}
    names = [f"data_batch_{n}" for n in range(1, 6)] if classes == 10 else ["train"]
    for name in [*names, "test_batch" if classes == 10 else "test"]:
        parts[name] = photos(4), RNG.integers(0, classes, 4)
    files = {"readme.html": b"<html></html>"}
    for name, (images, labels) in parts.items():
        coarse = None if classes == 10 else labels // 5
        if form == "binary":
            files[f"{name}.bin"] = records(images, labels, coarse)
        else:
            key = "labels" if classes == 10 else "fine_labels"
            more = {} if coarse is None else {"coarse_labels": coarse.tolist()}
            files[name] = pickled(
                {"batch_label": name, key: labels.tolist(), "data": planes(images), "filenames": ["a.png"] * 4} | more,
                protocol,
            )
    if form == "binary":
        about = ("batches.meta.txt", NAMES) if classes == 10 else ("fine_label_names.txt", FINE)
        files[about[0]] = "\n".join([*about[1], ""]).encode()
    elif classes == 10:
        files["batches.meta"] = pickled({"num_cases_per_batch": 4, "label_names": NAMES, "num_vis": 3072}, protocol)
    else:
        files["meta"] = pickled({"fine_label_names": FINE, "coarse_label_names": ["c"] * 20}, protocol)
    train = [np.concatenate([parts[name][of] for name in names]) for of in (0, 1)]
    return files, train, parts["test_batch" if classes == 10 else "test"]


def written(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class TestCifar:
    @pytest.mark.parametrize("stored", ["folder", ".tar.gz", ".tar"])
    @pytest.mark.parametrize(("form", "protocol"), [("binary", 2), ("python", 2), ("python", 0)])
    @pytest.mark.parametrize("classes", [10, 100])
    def test_every_published_form_gives_the_very_images(self, classes, form, protocol, stored, tmp_path):
        files, *expected = cifar(classes, form, protocol)
        path = tmp_path / "some name"
        if stored == "folder":
            written(path, files)
        else:
            path.write_bytes(tar(files, packed=stored.endswith("gz")))
        found = datasets.open(str(path))
        assert PRESETS[found.recipe].validation == 5000
        assert found.name == f"CIFAR-{classes}"
        assert (found.channels, found.size) == (3, (32, 32))
        assert found.classes == tuple(NAMES if classes == 10 else FINE)
        for part, (images, labels) in zip((found.train, found.test), expected, strict=True):
            assert np.array_equal(everything(part)[0], images)
            assert part.labels.tolist() == labels.tolist()

    @pytest.mark.parametrize("protocol", [0, 2])
    def test_the_pickles_written_here_are_pickles(self, protocol):
        images = photos(2)
        value = {"labels": [3, 300, -1], "data": planes(images), "names": ["a", "ünï'\n"], "flag": True}
        read = pickle.loads(pickled(value, protocol), encoding="latin-1")
        assert np.array_equal(read.pop("data"), value.pop("data"))
        assert read == value

    @pytest.mark.parametrize("protocol", [2, 3, 4])
    def test_what_python_3_pickled_again_is_read_too(self, protocol, tmp_path):
        files, _, (images, labels) = cifar(10, "python")
        again = {b"data": planes(images), b"labels": [int(label) for label in labels]}
        files["test_batch"] = pickle.dumps(again, protocol)
        found = datasets.open(str(written(tmp_path, files)))
        assert np.array_equal(everything(found.test)[0], images)

    def test_examples_in_any_order_come_from_all_files(self, tmp_path):
        files, (images, labels), _ = cifar(10, "binary")
        found = datasets.open(str(written(tmp_path, files)))
        some = np.array([19, 0, 7, 7, 12])
        assert np.array_equal(found.train.images(some), images[some])
        assert found.train[-3][1] == labels[-3]

    def test_a_worker_is_sent_the_place_of_a_binary_file_not_its_pixels(self, tmp_path):
        files, *_ = cifar(10, "binary")
        found = datasets.open(str(written(tmp_path, files)))
        sent = pickle.dumps(found.train)
        assert len(sent) < 3072
        assert np.array_equal(everything(pickle.loads(sent))[0], everything(found.train)[0])

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (
                lambda f: f.update({"data_batch_3.bin": f["data_batch_3.bin"][:-1]}),
                "12291 bytes; expected records of 3073",
            ),
            (lambda f: f.update({"data_batch_3.bin": f["data_batch_3.bin"][:-3073]}), "data_batch_3.bin 3"),
            (lambda f: f.update({"data_batch_3.bin": b""}), "0 bytes"),
            (lambda f: f.pop("data_batch_3.bin"), "data_batch_3.bin is missing"),
            (lambda f: f.pop("test_batch.bin"), "test_batch.bin is missing"),
            (lambda f: f.pop("batches.meta.txt"), "batches.meta.txt is missing"),
            (lambda f: f.update({"batches.meta.txt": b"cat\ndog\n"}), "2 names of classes; expected 10"),
            (lambda f: f.update({"test_batch.bin": b"\x0a" + f["test_batch.bin"][1:]}), "label 10 of example 0"),
        ],
    )
    @pytest.mark.parametrize("stored", ["folder", "archive"])
    def test_a_damaged_binary_archive_is_one_line(self, harm, message, stored, tmp_path):
        files, *_ = cifar(10, "binary")
        harm(files)
        path = tmp_path / "data"
        written(path, files) if stored == "folder" else path.write_bytes(tar(files))
        assert message in refused(path)

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ({"data": planes(photos(2)), "labels": [1]}, "2 images and 1 labels"),
            ({"data": planes(photos(2)), "labels": [1, 10]}, "label 10 of example 1 is out of range; expected 0 to 9"),
            ({"data": planes(photos(2)), "labels": [1, -1]}, "label -1"),
            ({"data": planes(photos(2)), "labels": ["1", "2"]}, "no list of whole numbers as 'labels'"),
            ({"data": planes(photos(2)), "labels": [1, 2**70]}, "no list of whole numbers"),
            ({"data": planes(photos(2))}, "no list of whole numbers"),
            ({"labels": [1, 2]}, "its array 'data' is missing"),
            ({"data": planes(photos(2))[:, 1:], "labels": [1, 2]}, "of shape (2, 3071)"),
            ({"data": planes(photos(2)).astype(np.int16), "labels": [1, 2]}, "something else than arrays of bytes"),
            ([1, 2], "no dictionary"),
        ],
    )
    def test_a_batch_that_is_not_one_is_one_line(self, batch, message, tmp_path):
        files, *_ = cifar(10, "python")
        files["test_batch"] = pickled(batch)
        assert message in refused(written(tmp_path, files))

    @pytest.mark.parametrize(
        "attack",
        [
            b"cos\nsystem\n(S'touch {trace}'\ntR.",
            b"\x80\x02cposix\nsystem\n(U\x0ctouch {trace}tR.",
            b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93(\x8c\x01xtR.",
            b"cnumpy\nload\n(S'x'\ntR.",
            b"c_codecs\nencode\n(S'rm'\nS'os.system'\ntR.",
            b"(S'x'\nios\nsystem\n.",
        ],
    )
    def test_code_in_a_pickle_is_refused_and_never_runs(self, attack, tmp_path):
        trace = tmp_path / "trace"
        files, *_ = cifar(10, "python")
        files["data_batch_2"] = attack.replace(b"{trace}", str(trace).encode())
        assert "; refused" in refused(written(tmp_path / "data", files))
        assert not trace.exists()

    def test_a_pickle_cut_anywhere_is_one_line(self, tmp_path):
        files, *_ = cifar(10, "python")
        whole = files["test_batch"]
        written(tmp_path, files)
        for end in [*range(60), *range(60, len(whole), 997), len(whole) - 1]:
            (tmp_path / "test_batch").write_bytes(whole[:end])
            refused(tmp_path)

    def test_an_archive_cut_anywhere_is_one_line(self, tmp_path):
        files, *_ = cifar(10, "binary")
        whole = tar(files)
        path = tmp_path / "cut.tar.gz"
        for end in [*range(40), *range(40, len(whole) - 1200, 1999)]:
            path.write_bytes(whole[:end])
            refused(path)

    def test_bytes_changed_anywhere_are_an_error_of_ours_or_none(self, tmp_path):
        files, *_ = cifar(10, "python")
        whole = files["test_batch"]
        written(tmp_path, files)
        for _ in range(150):
            changed = bytearray(whole)
            for place in RNG.integers(0, 120 if RNG.random() < 0.7 else len(whole), 3):
                changed[place] = RNG.integers(0, 256)
            (tmp_path / "test_batch").write_bytes(changed)
            with suppress(DataError):
                datasets.open(str(tmp_path))

    def test_a_file_that_is_no_archive(self, tmp_path):
        path = tmp_path / "cifar.tar.gz"
        path.write_bytes(b"not an archive" * 100)
        assert "cannot be read as a .tar or .tar.gz" in refused(path)

    def test_an_archive_of_something_else(self, tmp_path):
        path = tmp_path / "other.tar.gz"
        path.write_bytes(tar({"a.txt": b"x"}))
        assert "no data set of a known form" in refused(path)

    def test_an_archive_with_a_file_twice(self, tmp_path):
        files, *_ = cifar(100, "binary")
        path = tmp_path / "twice.tar.gz"
        path.write_bytes(tar(files | {"again/test.bin": b"x"}))
        assert "holds test.bin twice" in refused(path)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["member", "long name", "sparse"])
    def test_an_archive_that_unpacks_without_end_is_refused_in_bounded_memory(self, kind, tmp_path):
        path = tmp_path / "bomb.tar.gz"
        size = 1 << 30
        member = tarfile.TarInfo("x/data_batch_1.bin")
        member.size = size
        member.type = {
            "member": tarfile.REGTYPE,
            "long name": tarfile.GNUTYPE_LONGNAME,
            "sparse": tarfile.GNUTYPE_SPARSE,
        }[kind]
        with gzip.open(path, "wb", compresslevel=1) as packed:
            packed.write(member.tobuf(tarfile.GNU_FORMAT))
            for _ in range(size >> 20):
                packed.write(bytes(1 << 20))
        tracemalloc.start()
        try:
            refused(path)
            assert tracemalloc.get_traced_memory()[1] < 3 * (256 << 20)
        finally:
            tracemalloc.stop()


# What is done to a file; what is said of a plain one, of a packed one.
HARM = {
    "cut": (lambda c: c[:-1], "bytes; its header says", "values; its header says"),
    "longer": (lambda c: c + b"x", "bytes; its header says", "more values; its header says"),
    "magic": (lambda c: b"\0\0\x0b\x03" + c[4:], "begins with 00000b03; expected 00000803"),
    "axes": (lambda c: b"\0\0\x08\x01" + c[4:], "begins with 00000801"),
    "nothing": (lambda c: b"", "begins with nothing"),
    "head": (lambda c: c[:9], "begins with 00000803"),
    "absurd": (
        lambda c: c[:4] + b"\xff" * 12 + c[16:],
        "its header says 16 and 4294967295 x 4294967295 x 4294967295",
        "more than it can hold",
    ),
    "none": (lambda c: c[:4] + bytes(4) + c[8:], "expected some"),
}


class TestIdx:
    PARTS = (
        (RNG.integers(0, 256, (30, 28, 28), np.uint8), np.arange(30) % 10),
        (RNG.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12) % 10),
    )

    @pytest.mark.parametrize(("ending", "dot"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
    def test_plain_and_packed_files_give_the_very_images(self, ending, dot, tmp_path):
        mnist(tmp_path, *self.PARTS, ending=ending, dot=dot)
        found = datasets.open(str(tmp_path))
        assert (found.channels, found.size, found.classes) == (1, (28, 28), tuple("0123456789"))
        assert PRESETS[found.recipe].augmentation == (Resize(size=224),)
        for part, (images, labels) in zip((found.train, found.test), self.PARTS, strict=True):
            assert np.array_equal(everything(part)[0], images[..., None])
            assert part.labels.tolist() == labels.tolist()

    def test_mean_and_deviation_are_those_of_the_training_images(self, tmp_path):
        mnist(tmp_path, *self.PARTS)
        found = datasets.open(str(tmp_path))
        values = self.PARTS[0][0] / 255
        assert found.mean == pytest.approx((values.mean(),), rel=1e-12)
        assert found.std == pytest.approx((values.std(),), rel=1e-12)

    def test_a_worker_is_sent_the_place_of_a_plain_file(self, tmp_path):
        mnist(tmp_path, *self.PARTS)
        found = datasets.open(str(tmp_path))
        sent = pickle.dumps(found.train)
        assert len(sent) < 2000
        assert np.array_equal(everything(pickle.loads(sent))[0], everything(found.train)[0])

    @pytest.mark.parametrize("ending", ["", ".gz"])
    @pytest.mark.parametrize("harm", HARM)
    def test_a_damaged_file_is_one_line(self, harm, ending, tmp_path):
        mnist(tmp_path, *self.PARTS, ending=ending)
        path = tmp_path / f"train-images-idx3-ubyte{ending}"
        change, *messages = HARM[harm]
        content = path.read_bytes()
        path.write_bytes(gzip.compress(change(gzip.decompress(content))) if ending else change(content))
        message = refused(tmp_path)
        assert path.name in message
        assert messages[-1 if ending else 0] in message

    def test_a_packed_file_cut_anywhere_is_one_line(self, tmp_path):
        mnist(tmp_path, *self.PARTS, ending=".gz")
        path = tmp_path / "train-labels-idx1-ubyte.gz"
        whole = path.read_bytes()
        for end in range(len(whole)):
            path.write_bytes(whole[:end])
            assert path.name in refused(tmp_path)

    def test_a_header_that_claims_a_gigabyte_takes_none(self, tmp_path):
        mnist(tmp_path, *self.PARTS, ending=".gz")
        path = tmp_path / "train-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 1000, 1000, 1000) + bytes(50_000)))
        tracemalloc.start()
        try:
            assert "more than it can hold" in refused(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()

    def test_a_file_that_unpacks_without_end_is_read_as_far_as_its_header_says(self, tmp_path):
        mnist(tmp_path, *self.PARTS, ending=".gz")
        path = tmp_path / "train-labels-idx1-ubyte.gz"
        content = gzip.decompress(path.read_bytes())
        path.write_bytes(gzip.compress(content + bytes(200 << 20), 1))
        tracemalloc.start()
        try:
            assert "more values; its header says 30" in refused(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 2 << 20
        finally:
            tracemalloc.stop()

    def test_counts_that_differ(self, tmp_path):
        (images, labels), test = self.PARTS
        mnist(tmp_path, (images, labels[:-1]), test)
        assert "30 images, and 29 labels in train-labels-idx1-ubyte" in refused(tmp_path)

    def test_sizes_that_differ(self, tmp_path):
        train, (images, labels) = self.PARTS
        mnist(tmp_path, train, (images[:, 1:], labels))
        assert "images of (28, 28) to train on and of (27, 28) to test with" in refused(tmp_path)

    def test_labels_out_of_range(self, tmp_path):
        (images, labels), test = self.PARTS
        mnist(tmp_path, (images, labels + 1), test)
        assert "label 10 of example 9 is out of range; expected 0 to 9 (3 such labels)" in refused(tmp_path)

    @pytest.mark.parametrize("name", ["train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
    def test_a_file_that_is_missing(self, name, tmp_path):
        mnist(tmp_path, *self.PARTS)
        (tmp_path / f"{name}-ubyte").unlink()
        assert f"{name}-ubyte is missing" in refused(tmp_path)


def colour(value, size=(24, 16)):
    return Image.new("RGB", size, (value, 255 - value, 7))


class TestFolder:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path_factory, monkeypatch):
        folder = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("RESNET_PARITY_CACHE", str(folder))
        return folder

    @pytest.fixture
    def tree(self, tmp_path):
        """Two classes of ten photographs each, told by their colour."""
        for label, name in enumerate(("cats", "dogs")):
            (tmp_path / name).mkdir()
            for n in range(10):
                colour(100 * label + n).save(tmp_path / name / f"{n}.png")
        return tmp_path

    @staticmethod
    def values(examples):
        return [int(image[0, 0, 0]) for image in examples.images(np.arange(len(examples)))]

    @pytest.mark.parametrize("test", ["test", "val", "validation"])
    def test_parts_that_are_given_are_used(self, test, tmp_path):
        for part, first in (("train", 0), (test, 50)):
            for label, name in enumerate(("b", "a")):
                (tmp_path / part / name).mkdir(parents=True)
                for n in range(3):
                    colour(first + 100 * label + n).save(tmp_path / part / name / f"{n}.png")
        found = datasets.open(str(tmp_path))
        assert PRESETS[found.recipe].augmentation[0] == ResizedCrop(size=224)
        assert found.classes == ("a", "b")
        assert (found.channels, found.size, found.notes) == (3, (16, 24), ())
        assert self.values(found.train) == [100, 101, 102, 0, 1, 2]
        assert self.values(found.test) == [150, 151, 152, 50, 51, 52]
        assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert found.mean == (0.485, 0.456, 0.406)

    def test_without_a_test_folder_a_fifth_of_each_class_is_kept_for_it(self, tree):
        found = datasets.open(str(tree))
        assert np.bincount(found.test.labels).tolist() == [2, 2]
        assert sorted(self.values(found.train) + self.values(found.test)) == [*range(10), *range(100, 110)]

    def test_an_image_that_is_added_moves_at_most_one_other(self, tree):
        before = set(self.values(datasets.open(str(tree)).test))
        for n in range(10, 15):
            colour(n).save(tree / "cats" / f"{n}.png")
            after = set(self.values(datasets.open(str(tree)).test))
            assert len(before - after) <= 1
            assert len(after - before) <= 1 + (n == 14)
            before = after

    def test_the_split_does_not_depend_on_where_the_folder_is(self, tree, tmp_path):
        first = self.values(datasets.open(str(tree)).test)
        moved = tree.rename(tmp_path.with_name(tmp_path.name + " moved"))
        assert self.values(datasets.open(str(moved)).test) == first

    def test_images_are_upright_rgb_and_of_their_own_size(self, tree):
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        colour(200, (24, 16)).save(tree / "cats" / "turned.jpg", exif=exif, quality=95)
        Image.new("L", (5, 9), 77).save(tree / "cats" / "grey.png")
        colour(44, (7, 7)).quantize(4).save(tree / "cats" / "palette.gif")
        found = datasets.open(str(tree))
        assert found.size is None
        shapes = {image.shape for part in (found.train, found.test) for image in everything(part)[0]}
        assert shapes == {(16, 24, 3), (24, 16, 3), (9, 5, 3), (7, 7, 3)}

    def test_a_size_that_all_share_is_that_of_the_upright_images(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 8
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for n in range(2):
                colour(n, (24, 16)).save(tmp_path / name / f"{n}.jpg", exif=exif)
        assert datasets.open(str(tmp_path)).size == (24, 16)

    def test_hidden_files_and_files_that_are_no_images_are_passed_over(self, tree):
        (tree / ".hidden").mkdir()
        (tree / "cats" / ".DS_Store").write_bytes(b"x")
        (tree / "cats" / "notes.txt").write_text("x")
        (tree / "readme.md").write_text("x")
        assert len(datasets.open(str(tree)).train) == 16

    def test_a_worker_is_sent_names(self, tree):
        found = datasets.open(str(tree))
        copy = pickle.loads(pickle.dumps(found.train))
        assert np.array_equal(np.stack(everything(copy)[0]), np.stack(everything(found.train)[0]))

    @staticmethod
    def harmed(tree):
        photo = io.BytesIO()
        colour(9, (200, 100)).save(photo, "jpeg")
        (tree / "cats" / "cut.jpg").write_bytes(photo.getvalue()[:-300])
        (tree / "cats" / "text.png").write_bytes(b"no image")
        (tree / "dogs" / "empty.jpg").write_bytes(b"")
        Image.new("1", (20_000, 20_000)).save(tree / "dogs" / "bomb.png")
        return ("cut.jpg", "text.png", "empty.jpg", "bomb.png")

    def test_images_that_cannot_be_read_are_listed_and_refused(self, tree):
        names = self.harmed(tree)
        first, *listed = refused(tree, lines=5).splitlines()
        assert first.startswith("4 of 24 images cannot be read")
        assert first.endswith("--skip-bad:")
        assert len(listed) == 4
        assert all(any(name in line for line in listed) for name in names)

    def test_of_very_many_that_cannot_be_read_a_hundred_are_listed(self, tree):
        for n in range(102):
            (tree / "cats" / f"bad{n}.jpg").write_bytes(b"")
        assert refused(tree, lines=102).splitlines()[-1] == "  and 2 more"

    def test_with_skip_bad_they_are_left_out_and_noted(self, tree):
        whole = self.values(datasets.open(str(tree)).train)
        names = self.harmed(tree)
        found = datasets.open(str(tree), skip_bad=True)
        assert self.values(found.train) == whole
        (note,) = found.notes
        assert note.startswith("left out 4 of 24 images")
        assert all(name in note for name in names)

    @pytest.fixture
    def looked_at(self, monkeypatch):
        """The names of the images that are decoded."""
        names, examine = [], photographs.examine

        def noted(path):
            names.append(path.name)
            return examine(path)

        monkeypatch.setattr(photographs, "examine", noted)
        return names

    def test_a_second_time_only_what_has_changed_is_decoded(self, tree, looked_at):
        sizes = datasets.open(str(tree)).size
        assert len(looked_at) == 20
        looked_at.clear()
        assert datasets.open(str(tree)).size == sizes
        assert not looked_at
        changed = next((tree / "cats").iterdir())
        changed.write_bytes(b"no image")
        (tree / "dogs" / "new.png").write_bytes((tree / "cats" / sorted(os.listdir(tree / "cats"))[-1]).read_bytes())
        assert changed.name in refused(tree, lines=2)
        assert sorted(looked_at) == sorted([changed.name, "new.png"])

    def test_one_that_could_not_be_read_is_looked_at_again(self, tree, looked_at):
        self.harmed(tree)
        datasets.open(str(tree), skip_bad=True)
        looked_at.clear()
        datasets.open(str(tree), skip_bad=True)
        assert sorted(looked_at) == ["bomb.png", "cut.jpg", "empty.jpg", "text.png"]

    def test_another_folder_is_not_the_one_that_is_remembered(self, tree, tmp_path_factory, looked_at):
        datasets.open(str(tree))
        copy = shutil.copytree(tree, tmp_path_factory.mktemp("copy") / "of-it")
        looked_at.clear()
        datasets.open(str(copy))
        assert len(looked_at) == 20

    @pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pillow": "0.0", "images": []}', b'{"images": [1]}'])
    def test_a_damaged_memory_is_none(self, tree, looked_at, cache, content):
        datasets.open(str(tree))
        (memory,) = cache.iterdir()
        memory.write_bytes(content)
        looked_at.clear()
        datasets.open(str(tree))
        assert len(looked_at) == 20

    def test_without_a_place_to_remember_all_is_looked_at_each_time(self, tree, looked_at, cache, monkeypatch):
        (cache / "file").write_bytes(b"")
        monkeypatch.setenv("RESNET_PARITY_CACHE", str(cache / "file" / "below"))
        for _ in range(2):
            looked_at.clear()
            datasets.open(str(tree))
            assert len(looked_at) == 20

    def test_how_many_were_looked_at_is_told(self, tree):
        told = []
        datasets.open(str(tree), seen=lambda done, total: told.append((done, total)))
        assert told == [(n, 20) for n in range(1, 21)]

    def test_a_class_without_a_readable_image_is_refused_even_then(self, tree):
        for path in (tree / "dogs").iterdir():
            path.write_bytes(b"no image")
        assert "too few readable images to test with too in class dogs" in refused(tree, skip_bad=True)

    def test_a_given_part_without_a_readable_image_is_refused_even_then(self, tmp_path):
        for part in ("train", "test"):
            for name in ("a", "b"):
                (tmp_path / part / name).mkdir(parents=True)
                colour(1).save(tmp_path / part / name / "1.png")
        (tmp_path / "test" / "b" / "1.png").write_bytes(b"no image")
        assert "no readable image to test with in class b" in refused(tmp_path, skip_bad=True)

    def test_an_empty_class_folder(self, tree):
        (tree / "birds").mkdir()
        assert "no image in the folder of class birds" in refused(tree)

    def test_one_class_alone(self, tmp_path):
        (tmp_path / "cats").mkdir()
        colour(1).save(tmp_path / "cats" / "1.png")
        assert "1 folders of classes; expected two or more" in refused(tmp_path)

    def test_a_class_in_one_part_alone(self, tmp_path):
        for path in ("train/a", "train/b", "test/a", "test/c", "test/b"):
            (tmp_path / path).mkdir(parents=True)
            colour(1).save(tmp_path / path / "1.png")
        assert "has no folder for class c" in refused(tmp_path)

    def test_train_without_test(self, tmp_path):
        for path in ("train/a", "train/b"):
            (tmp_path / path).mkdir(parents=True)
            colour(1).save(tmp_path / path / "1.png")
        assert "nothing to test with" in refused(tmp_path)

    def test_an_image_that_goes_away_later_is_one_line(self, tree):
        found = datasets.open(str(tree))
        next((tree / "cats").iterdir()).unlink()
        with pytest.raises(DataError, match=r"cats/.*\.png: .*when the training began"):
            everything(found.train), everything(found.test)


class TestOpen:
    def test_what_is_not_there(self, tmp_path):
        assert "no such folder or archive; expected digits, " in refused(tmp_path / "nothing")
        assert "no such folder or archive" in refused("digit")
        assert refused("x" * 5000)

    def test_a_folder_with_nothing_known_in_it(self, tmp_path):
        (tmp_path / "a.txt").write_text("x")
        assert "no data set of a known form" in refused(tmp_path)

    def test_no_framework_and_not_scikit_learn_is_imported(self):
        code = (
            "import sys; from common import datasets; datasets.open('digits');"
            "print([m for m in ('torch', 'tensorflow', 'keras', 'jax', 'sklearn') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
