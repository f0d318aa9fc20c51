"""Container: Keras' three files. ``.weights.h5`` and ``.keras`` of Keras 3, and the legacy ``.h5`` of all before it.

All are HDF5; ``.keras`` is a zip archive with such a file inside. Read with h5py and without Keras: nothing is built
from a configuration, so that nothing in a file can be executed, lambda layers included. What leads out of the file
(external links and storage, virtual datasets) is refused, and so is a file that claims much more than it holds.
libhdf5 is asked for numbers only: see `hdf5_text`.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import numpy as np

from common.architectures.layers import Shape
from common.checkpoints.containers import Source, Stored, source
from common.checkpoints.containers.hdf5_text import text_attribute
from common.errors import CheckpointError
from common.files import reason, written
from common.weights import Weights

# A file may claim so many times what it holds (a compressed network of zeros does), or so many bytes if it is small.
_EXPANSION, _ALWAYS = 64, 64 << 20
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_WEIGHTS = "model.weights.h5"  # of a .keras archive
_DEFLATE, _SHUFFLE, _FLETCHER32 = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32
_ATTRIBUTE_LIMIT = 64512  # bytes that HDF5 takes in one attribute
# Folders in which Keras 3 keeps layers, and in which tf.keras 2.12 to 2.15 did.
_LAYERS = ("layers", "_layer_checkpoint_dependencies")
# Array names of Keras 1, which kept the running variance under the name of another number.
_KERAS_1 = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}
# Arrays of a Keras 3 layer in their order; a layer of another number of arrays is none of ours. Three are those of a
# batch norm without scale.
_ORDER = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    3: ("beta", "moving_mean", "moving_variance"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}
# Of the layer that normalises images, whose last array is a number.
_NORMALIZATION = ("mean", "variance", "count")


def _roles(arrays: Mapping[str, h5py.Dataset]) -> tuple[str, ...]:
    """The names of a Keras 3 layer's arrays in their order; none of a layer that is none of ours."""
    if len(arrays) == 3 and "2" in arrays and arrays["2"].shape == ():
        return _NORMALIZATION
    return _ORDER.get(len(arrays), ())


def recognises(path: Path) -> bool:
    """HDF5 by its signature, and a zip archive with Keras' members."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start[:4] != _ZIP:
            return start == _HDF5
        with zipfile.ZipFile(path) as archive:
            return {"config.json", "metadata.json"} <= set(archive.namelist())
    except Exception:  # zipfile's own, and whatever else damage makes it raise
        return False


def read(path: Path) -> Source:
    """The tensors by ``<layer>/<array>``, wherever in the file they are. Raises `CheckpointError`."""
    with _damage():
        with path.open("rb") as start:
            archived = start.read(4) == _ZIP
        if archived:
            member = _member(path)
            file, content = h5py.File(io.BytesIO(member), "r"), np.frombuffer(member, np.uint8)
        else:
            file, content = h5py.File(path, "r"), np.memmap(path, np.uint8, "r")
        found = _Datasets(file, content)
        keras_3 = any(name in file for name in _LAYERS)
        tensors = found.of_keras_3() if keras_3 else found.of_legacy()
    return source("Keras archive" if archived else "Keras 3 weights" if keras_3 else "Keras legacy HDF5", tensors)


def write(path: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """Tensors by ``<layer>/<array>``. The end of the file's name says whether as Keras 3 has it or as all before it."""
    layers = {layer: list(names) for layer, names in groupby(tensors, lambda name: name.rpartition("/")[0])}
    with written(path, CheckpointError) as beside:
        try:
            with h5py.File(beside, "w") as file:
                (_write_keras_3 if path.name.endswith(".weights.h5") else _write_legacy)(file, tensors, layers)
        except RuntimeError as error:  # what HDF5 makes of a full disk when it closes the file
            raise OSError(reason(error)) from None


# Reading


class _Datasets:
    """Every dataset of a file, checked before any of it is read."""

    def __init__(self, file: h5py.File, content: np.ndarray) -> None:
        self._file = file
        self._content = content
        self._left = max(_EXPANSION * content.size, _ALWAYS)

    def of_keras_3(self) -> dict[str, Stored]:
        """Layers are folders named by their class and a number; their own name is an attribute."""
        tensors: dict[str, Stored] = {}
        named = False
        for path, group, arrays in self._groups():
            layer, roles = None, _roles(arrays)
            if arrays and path.partition("/")[0] in _LAYERS and path.endswith("/vars"):
                layer = _text(group, "name", self._content)
                named = named or layer is not None
            for name, dataset in arrays.items():
                known = layer is not None and name.isdecimal() and len(name) < 3 and int(name) < len(roles)
                self._add(tensors, f"{layer or path}/{roles[int(name)] if known else name}".lstrip("/"), dataset)
        if tensors and not named:
            raise CheckpointError(
                "the file names no layers, as those of the first releases of Keras 3; load it with Keras and save it "
                "with a newer one"
            )
        return tensors

    def of_legacy(self) -> dict[str, Stored]:
        """Layers are folders named as they are; the names of the arrays end with their role and perhaps ``:0``."""
        tensors: dict[str, Stored] = {}
        for path, _, arrays in self._groups():
            parts = path.split("/")
            training = parts[0] == "optimizer_weights"
            parts = parts[1:] if parts[0] == "model_weights" else parts
            for name, dataset in arrays.items():
                if training or not parts:
                    self._add(tensors, f"{path}/{name}".lstrip("/"), dataset)
                else:
                    self._add(tensors, "/".join(_legacy_name(parts, name)), dataset)
        return tensors

    def _groups(self) -> Iterator[tuple[str, h5py.Group, dict[str, h5py.Dataset]]]:
        """Every group once, with the datasets in it. A file may link groups in circles."""
        todo, seen = [("", self._file["/"])], set()
        while todo:
            path, group = todo.pop()
            address = h5py.h5o.get_info(group.id).addr
            if address in seen:
                continue
            seen.add(address)
            arrays = {}
            for name in group:
                where = f"{path}/{name}".lstrip("/")
                if not where.isprintable():
                    raise CheckpointError(f"{where!r} is no name that Keras gives; the file is damaged")
                if group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
                    link = group.get(name, getlink=True)
                    if link is None:
                        raise CheckpointError(f"{where} cannot be reached; the file is damaged, fetch or make it again")
                    raise CheckpointError(
                        f"{where} is linked by {type(link).__name__}; only what is in the file itself is read"
                    )
                item = group[name]
                if isinstance(item, h5py.Group):
                    todo.append((where, item))
                elif isinstance(item, h5py.Dataset):
                    arrays[name] = item
                else:
                    raise CheckpointError(f"{where} is an HDF5 {type(item).__name__}; expected groups and datasets")
            yield path, group, arrays

    def _add(self, tensors: dict[str, Stored], name: str, dataset: h5py.Dataset) -> None:
        if name in tensors:
            raise CheckpointError(f"two arrays are named {name}; expected one of each name")
        tensors[name] = self._stored(name, dataset)

    def _stored(self, name: str, dataset: h5py.Dataset) -> Stored:
        if dataset.is_virtual or dataset.external:
            raise CheckpointError(f"{name} keeps its values in another file; only what is in the file itself is read")
        if dataset.shape is None:
            raise CheckpointError(f"{name} has no shape; expected an array of numbers")
        dtype = dataset.dtype
        # Keras says so in an attribute; HDF5 had no name for the type.
        bfloat16 = dtype.itemsize == 2 and _text(dataset, "dtype", self._content) == "bfloat16"
        if not bfloat16 and (dtype.kind not in "fiub" or dtype.itemsize > 8):
            raise CheckpointError(f"{name} has the HDF5 type {dtype}; expected an array of numbers")
        self._left -= max(_size(dataset.shape, dtype), _size(dataset.chunks or (), dtype))
        if self._left < 0:
            raise CheckpointError(
                f"its datasets claim more than {_EXPANSION} times the {self._content.size} bytes that the file holds"
            )
        if dataset.chunks is not None:
            _check_filters(name, dataset)
        stored = "bfloat16" if bfloat16 else dtype.newbyteorder("=").name
        return Stored(shape=dataset.shape, dtype=stored, read=partial(_read, name, dataset, stored))


def _read(name: str, dataset: h5py.Dataset, stored: str) -> np.ndarray:
    with _damage():
        if dataset.chunks is not None:
            _check_chunks(name, dataset)
        array = np.asarray(dataset[()])
        return array.view(np.uint16) if stored == "bfloat16" else array.astype(stored, copy=False)


def _check_chunks(name: str, dataset: h5py.Dataset) -> None:
    """That no chunk inflates to more than it should: HDF5 itself would go on as long as there is memory."""
    expected = _size(dataset.chunks, dataset.dtype)
    deflated = _DEFLATE in _filters(dataset)
    chunks: list[Any] = []
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        if chunk.filter_mask:
            raise CheckpointError(f"{name} has a chunk that is stored in another way than the others")
        if deflated:
            _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
            if len(zlib.decompressobj().decompress(stored, expected + 1)) != expected:
                raise CheckpointError(f"{name} has a chunk that does not hold the {expected} bytes it should")


@contextmanager
def _damage() -> Iterator[None]:
    """One line for whatever HDF5 and zipfile make of a damaged file."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        why = reason(error).strip("'")
        raise CheckpointError(f"damaged, or no file of Keras ({why}); fetch or make it again") from None


def _member(path: Path) -> bytes:
    """The HDF5 file inside a ``.keras`` archive; Python's zipfile checks its checksum."""
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename == _WEIGHTS]
        if len(entries) != 1:
            raise CheckpointError(f"a Keras archive with {len(entries)} members {_WEIGHTS}; expected one")
        (entry,), size = entries, path.stat().st_size
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{_WEIGHTS} is encrypted, or compressed in a way that Keras does not use")
        if entry.file_size > max(_EXPANSION * size, _ALWAYS):
            raise CheckpointError(
                f"{_WEIGHTS} claims {entry.file_size} bytes, more than {_EXPANSION} times what the archive holds"
            )
        with archive.open(entry) as file:
            return file.read(entry.file_size + 1)  # to the end, where the checksum is looked at


def _text(item: h5py.Group | h5py.Dataset, name: str, content: np.ndarray) -> str | None:
    """A text among the attributes, as Keras writes them; None where there is none."""
    text = text_attribute(content, h5py.h5o.get_info(item.id).addr, name)
    if text is not None and not text.isprintable():
        raise CheckpointError(f"{item.name} has an attribute {name} that Keras would not write; the file is damaged")
    return text


def _legacy_name(folders: list[str], array: str) -> tuple[str, str]:
    """(layer, array) of a dataset by the folders it is in: ``conv1/conv1/kernel:0``, ``resnet50/conv1/kernel:0``,
    ``conv1/bn/conv1/bn/gamma:0``."""
    layer, inner = folders[0], folders[-1]
    # TensorFlow 1 counted the uses of a name, and then the inner folder is conv1_1.
    own = layer if re.fullmatch(rf"{re.escape(layer)}(_\d+)?", inner) else inner
    half = len(folders) // 2
    if folders[:half] == folders[half:]:  # once for the layer and once in its arrays' names, which may have slashes
        own = "/".join(folders[:half])
    role = array.partition(":")[0].removeprefix(f"{own}_")
    stem, _, number = role.rpartition("_")
    role = stem if number.isdecimal() and stem else role
    return own, _KERAS_1.get(role, role)


def _filters(dataset: h5py.Dataset) -> list[int]:
    created = dataset.id.get_create_plist()
    return [created.get_filter(number)[0] for number in range(created.get_nfilters())]


def _check_filters(name: str, dataset: h5py.Dataset) -> None:
    filters = _filters(dataset)
    plain = [code for code in filters if code not in (_SHUFFLE, _FLETCHER32)]
    # After compression only a checksum may come, or the bytes in the file would not be those that zlib wrote.
    after = filters[filters.index(_DEFLATE) + 1 :] if _DEFLATE in filters else []
    if plain not in ([], [_DEFLATE]) or set(after) - {_FLETCHER32}:
        raise CheckpointError(f"{name} is compressed in a way that Keras does not use; expected gzip or none")


def _size(shape: Shape, dtype: np.dtype) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


# Writing


def _write_keras_3(file: h5py.File, tensors: Weights, layers: Mapping[str, list[str]]) -> None:
    counts: dict[str, int] = {}
    for layer, names in layers.items():
        arrays = {name.rpartition("/")[2]: tensors[name] for name in names}
        kind = _kind(arrays)
        number = counts[kind] = counts.get(kind, -1) + 1
        folder = f"{kind}_{number}" if number else kind
        group = file.create_group(f"layers/{folder}/vars")
        group.attrs["name"] = layer
        for index, array in enumerate(arrays.values()):
            group.create_dataset(str(index), data=np.asarray(array, order="C"))
        if kind == "batch_normalization":
            # Our own layer for an unbiased running variance has a class of its own, and Keras looks under its name.
            file[f"layers/unbiased_{folder}"] = file[f"layers/{folder}"]


def _kind(arrays: Mapping[str, np.ndarray]) -> str:
    """What Keras calls the class of a layer with these arrays."""
    if tuple(arrays) == _NORMALIZATION:
        return "normalization"
    if "kernel" not in arrays:
        return "batch_normalization"
    kernel = arrays["kernel"]
    # A multiplier of one behind the channels. A convolution with one filter is pointwise wherever networks have one.
    depthwise = kernel.ndim == 4 and kernel.shape[3] == 1 and kernel.shape[:2] != (1, 1)
    return "depthwise_conv2d" if depthwise else "conv2d" if kernel.ndim == 4 else "dense"


def _write_legacy(file: h5py.File, tensors: Weights, layers: Mapping[str, list[str]]) -> None:
    # Without a version, Keras takes a file for one of Keras 1 and converts it.
    file.attrs["keras_version"], file.attrs["backend"] = b"2.15.0", b"tensorflow"
    for layer, names in layers.items():
        group = file.create_group(layer)
        group.attrs["weight_names"] = [f"{name}:0".encode() for name in names]
        for name in names:
            group.create_dataset(f"{name}:0", data=np.asarray(tensors[name], order="C"))
    texts = np.array([layer.encode() for layer in layers])
    if texts.nbytes <= _ATTRIBUTE_LIMIT:
        file.attrs["layer_names"] = texts
        return
    for index, piece in enumerate(np.array_split(texts, -(-texts.nbytes // _ATTRIBUTE_LIMIT) + 1)):
        file.attrs[f"layer_names{index}"] = piece
