"""Public checkpoints into canonical weights, and back: ``load(path)``, ``save(path, spec, weights)``.

No framework is needed to read any of them, and nothing in a file is ever executed. A format is a naming in a container
(see `base`); which of each a file is, is told from its content.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from math import ceil
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from common import architectures
from common import weights as canonical
from common.architectures import Spec
from common.architectures.layers import Layer
from common.checkpoints.base import (
    Naming,
    canonical_shape,
    native_names,
    native_weights,
    to_canonical,
)
from common.checkpoints.containers import BY_FRAMEWORK, Source, Stored, container_of, suffix_of, writer_of
from common.checkpoints.containers.native import write as write_by_framework
from common.checkpoints.inference import UNSEEN, infer
from common.errors import CheckpointError, WeightsError
from common.files import written
from common.sources.downloads import Fetched, fetch
from common.weights import LazyWeights, Weights

_NAMINGS = {
    "torchvision": "torchvision",
    "huggingface": "huggingface",
    "keras_applications": "resnet",
    "keras_classic": "resnet",
    "flax": "flax",
}
CANONICAL = "canonical"
FORMATS = (CANONICAL, *_NAMINGS)
_ALIASES = {"timm": "torchvision", "pytorch": "torchvision", "hf": "huggingface", "keras": "keras_applications"}
_KERAS = ("keras_applications", "keras_classic")
# By the end of the file's name: the namings that may stand in it, first the one that people expect.
_NAMINGS_IN: dict[str, tuple[str, ...]] = {
    ".safetensors": (CANONICAL, "torchvision", "huggingface"),
    ".pth": ("torchvision", "huggingface"),
    ".pt": ("torchvision", "huggingface"),
    ".bin": ("huggingface", "torchvision"),
    ".weights.h5": _KERAS,
    ".h5": _KERAS,
    ".keras": _KERAS,
    ".msgpack": ("flax",),
    "": ("flax",),
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read: headers only, until a tensor is asked for."""

    path: Path
    format: str  # one of FORMATS
    container: str
    spec: Spec
    weights: Weights
    assumed: Mapping[str, Any] = field(default_factory=dict)  # fields of the spec that nothing in the file shows
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was changed on the way, one line each


def load(
    path: Path | str,
    *,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
    classes: int | None = None,
    in_channels: int | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known format; a tensor is read when it is asked for.

    What shapes cannot say comes from the format's convention, from another `convention` by name, or from `changes` by
    field. `classes` makes a new head of that size, `in_channels` adapts the stem; both are noted. Raises
    `CheckpointError` for a file that is damaged, unsafe or of no known format, and one that lists the names for
    tensors that are missing or belong nowhere.
    """
    path = Path(path)
    container = container_of(path)
    try:
        source = container.read(path)
        if source.metadata.get("format") == canonical.FORMAT:
            if convention is not None or changes:
                raise CheckpointError("a canonical file states its own spec; no convention or field can be set")
            spec, weights = canonical.load(path, finite=False)
            found = Checkpoint(path=path, format=CANONICAL, container=source.container, spec=spec, weights=weights)
        else:
            found = _read(path, source, convention, changes)
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    if in_channels is not None and in_channels != found.spec.in_channels:
        found = _with_channels(found, in_channels)
    if classes is not None and classes != getattr(found.spec, "classes", None):
        found = _with_classes(found, classes)
    return found


def save(path: Path | str, spec: Spec, weights: Weights, to: str | None = None) -> str:
    """Write canonical weights in a public format; beside the target first, then renamed. Returns the format.

    `to` is one of FORMATS; without it the end of the file's name says. Raises `CheckpointError` for an unknown format,
    or one that cannot stand in such a file.
    """
    path = Path(path)
    suffix, naming = _target(path, to)
    if naming == CANONICAL:
        canonical.save(path, spec, weights)
        return naming
    canonical.check_names("the weights are not this spec's", weights, canonical.shapes(spec))
    table = _naming(naming)
    if suffix in BY_FRAMEWORK:
        write_by_framework(path, BY_FRAMEWORK[suffix], spec, weights, naming)
        return naming
    with ExitStack() as stack:
        for name, text in table.beside(path, spec).items():
            beside = stack.enter_context(written(path.with_name(name), CheckpointError))
            beside.write_text(text, encoding="utf-8")
        writer_of(path).write(path, native_weights(spec, weights, table), table.metadata)
    return naming


def check_target(path: Path | str, to: str | None = None) -> None:
    """Raise `CheckpointError` where `save` could not write: an unknown format, or no folder to write into."""
    _target(Path(path), to)
    if not Path(path).absolute().parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: {Path(path).parent} is not a folder; make it first")


def load_for(spec: Spec, reference: Path | str, *, free_fields: Collection[str] = ()) -> tuple[Spec, Weights]:
    """Spec and weights of a checkpoint for a network that is known: `spec`, fields in `free_fields` aside.

    `reference` is a path, or what `downloads.fetch` takes. A canonical file states its spec and is held to it. A
    foreign one states none: what its shapes show must be `spec`'s, and the rest is taken from `spec`. Raises
    `WeightsError` naming the fields that differ.
    """
    path = fetch(reference).path
    if _is_canonical(path):
        inside, weights = canonical.load(path)
    else:
        inside, weights = _loaded_as(path, spec, free_fields)
    here, there = architectures.to_dict(spec), architectures.to_dict(inside)
    if here.get("head") == there.get("head") == "none":
        here.pop("classes", None)  # of a head that neither has
    differing = [name for name in here if name not in free_fields and here[name] != there.get(name)]
    if differing:
        found = ", ".join(f"{name} is {there.get(name)!r} there and {here[name]!r} here" for name in differing)
        raise WeightsError(f"{path}: these are the weights of another network: {found}")
    return inside, weights


def adopted(
    spec: Any, reference: str | PathLike[str] | None, variant: str, *, progress: bool | None = None
) -> tuple[Any, Path | None]:
    """`spec`, a builder's own, with the conventions of the weights that are to be loaded into it; and where they are.

    So a builder that is given foreign weights computes what the library computes that they come from. A canonical file
    changes nothing: `load_for` holds it to its own spec. `variant` is the name of the builder's network; `progress` is
    that of `downloads.fetch`.
    """
    if reference is None:
        return spec, None
    fetched = fetch(fspath(reference), variant=variant, progress=progress)
    if _is_canonical(fetched.path):
        return spec, fetched.path
    inside = load_fetched(fetched).spec
    return spec.replace(**{name: getattr(inside, name) for name in _ADOPTED}), fetched.path


def network(reference: str | PathLike[str], **options: Any) -> tuple[Spec, Path]:
    """The spec behind a reference, for `from_spec`, and where its weights are; `options` are those of `load`."""
    fetched = fetch(fspath(reference))
    return load_fetched(fetched, **options).spec, fetched.path


def load_fetched(fetched: Fetched, *, convention: str | None = None, **options: Any) -> Checkpoint:
    """`load` for what `downloads.fetch` brought: known weights have a convention of their own, unless one is given."""
    known = fetched.known.convention if fetched.known else None
    return load(fetched.path, convention=convention or known, **options)


# What weights may bring to a builder's network: all that leaves its arguments alone.
_ADOPTED = (
    *("stem_stride", "stem_padding", "stem_pool", "pool_padding", "block_padding", "stride_in"),
    *("bn_eps", "bn_momentum", "running_variance", "conv_bias", "norm", "shortcut_norm"),
)


def digest(weights: Weights) -> str:
    """A digest of the weights: the same for the same weights, whatever file they are in."""
    return canonical.digest(weights)


def suspicious(spec: Spec, weights: Weights) -> list[str]:
    """What a careful person would want to know of these numbers before using them, one line each."""
    found = []
    for layer in spec.layers:
        for name in layer.arrays:
            array = weights[name]
            role = name.removeprefix(f"{layer.path}.")
            bad = array.size - int(np.isfinite(array).sum())
            if bad:
                found.append(f"{name}: {bad} of {array.size} values are NaN or infinite")
            elif role == "scale" and not array.any():
                found.append(f"{name}: all zero; the branch before it adds nothing")
            elif role == "kernel" and not array.any():
                found.append(f"{name}: all zero")
            elif role == "var" and (array <= 0).any():
                found.append(f"{name}: {int((array <= 0).sum())} of {array.size} running variances are not above 0")
    return found


def _read(path: Path, source: Source, convention: str | None, changes: Mapping[str, Any] | None) -> Checkpoint:
    """The checkpoint in a foreign source, every one of its tensors accounted for."""
    for naming in map(_naming, _NAMINGS):
        tensors, notes = naming.usual(source.tensors)
        if (skeleton := naming.skeleton(tensors)) is not None:
            break
    else:
        some = ", ".join(list(source.tensors)[:4]) or "none"
        raise CheckpointError(
            f"a {source.container} file whose {len(source.tensors)} tensors have no names known here: {some}"
        )
    inferred = infer(naming, skeleton, tensors, convention=convention, changes=changes)
    names = native_names(inferred.spec, naming)
    wanted = dict.fromkeys(native for native, _ in names.values())  # in the order of the walk
    ignored = tuple(name for name in tensors if name not in wanted and naming.ignored(name))
    left = [name for name in tensors if name not in ignored]
    canonical.check_names(f"not a whole network in {naming.title}'s names", left, wanted, CheckpointError)
    getters = {}
    for name, (native, layer) in names.items():
        tensor, role = tensors[native], name.removeprefix(f"{layer.path}.")
        found, expected = canonical_shape(tensor.shape, layer.kind, role, naming.kernels), layer.arrays[name]
        if found != expected:
            raise CheckpointError(
                f"{native} has shape {tensor.shape}, {found} in canonical order; {name} expects {expected}"
            )
        if not np.issubdtype(np.dtype(tensor.dtype), np.floating):
            raise CheckpointError(f"{native} has dtype {tensor.dtype}; expected a floating-point type")
        getters[name] = partial(_canonical, tensor, layer, role, naming)
    return Checkpoint(
        path=path,
        format=naming.name,
        container=source.container,
        spec=inferred.spec,
        weights=LazyWeights(getters),
        assumed=inferred.assumed,
        ignored=ignored,
        notes=(*source.notes, *notes, *naming.told(path)),
    )


def _canonical(tensor: Stored, layer: Layer, role: str, naming: Naming) -> np.ndarray:
    return to_canonical(tensor.read(), layer, role, naming.kernels)


def _with_channels(found: Checkpoint, channels: int) -> Checkpoint:
    """The stem for another number of input channels, by timm's rule: one channel is the sum, more are repetitions
    scaled so that their sum stays."""
    before = found.spec.in_channels
    spec = found.spec.replace(in_channels=channels)
    name = next(iter(canonical.shapes(spec)))
    kernel = found.weights[name]
    if channels == 1:
        how, adapted = "the sum of", kernel.sum(axis=2, keepdims=True)
    else:
        repeats = ceil(channels / before)
        how = "repetitions of"
        adapted = np.tile(kernel, (1, 1, repeats, 1))[:, :, :channels] * kernel.dtype.type(before / channels)
    note = f"{name}: {how} its {before} input channels, for {channels}"
    return _replaced(found, spec, {name: adapted.astype(kernel.dtype)}, note)


def _with_classes(found: Checkpoint, classes: int) -> Checkpoint:
    """A new head of another size, as it would be initialised for training."""
    if getattr(found.spec, "head", "none") == "none":
        raise CheckpointError(f"{found.path}: there is no classifier to give {classes} classes")
    before = found.spec.classes
    spec = found.spec.replace(classes=classes)
    dense = [name for layer in spec.layers if layer.kind == "dense" for name in layer.arrays]
    dtype = found.weights[dense[0]].dtype
    new = canonical.init(spec, dtype=str(dtype))
    note = f"{', '.join(dense)}: initialised anew for {classes} classes instead of {before}; train them before use"
    return _replaced(found, spec, {name: new[name] for name in dense}, note)


def _replaced(found: Checkpoint, spec: Spec, arrays: Mapping[str, np.ndarray], note: str) -> Checkpoint:
    getters = {
        name: partial(arrays.__getitem__, name) if name in arrays else partial(found.weights.__getitem__, name)
        for name in canonical.shapes(spec)
    }
    return replace(found, spec=spec, weights=LazyWeights(getters), notes=(*found.notes, note))


def _loaded_as(path: Path, spec: Spec, free_fields: Collection[str]) -> tuple[Spec, Weights]:
    """A foreign checkpoint under the fields of a spec that no shape shows."""
    seen = load(path).spec
    if getattr(seen, "blocks", None) != getattr(spec, "blocks", None):
        return seen, {}  # another depth: the caller says so
    unseen = {name: getattr(spec, name) for name in UNSEEN if name not in free_fields}
    if getattr(seen, "head", "none") == "none":
        unseen = {name: value for name, value in unseen.items() if name not in ("head", "head_pool")}
    found = load(path, changes=unseen)
    return found.spec, found.weights


def _is_canonical(path: Path) -> bool:
    try:
        return container_of(path).read(path).metadata.get("format") == canonical.FORMAT
    except WeightsError:
        return False


def _target(path: Path, to: str | None) -> tuple[str, str]:
    """(end of the name, naming) for a file to be written."""
    if to and _ALIASES.get(to, to) not in FORMATS:
        raise CheckpointError(f"unknown format {to!r}; expected one of {', '.join(FORMATS)}")
    suffix = suffix_of(path)
    allowed = _NAMINGS_IN[suffix]
    naming = _ALIASES.get(to, to) if to else allowed[0]
    if naming not in allowed:
        raise CheckpointError(f"{path}: {naming} does not go into such a file; expected {' or '.join(allowed)}")
    return suffix, naming


def _naming(name: str) -> Naming:
    """The naming of a name; one module may hold several."""
    naming: Naming = import_module(f"common.names.{_NAMINGS[name]}").NAMINGS[name]
    return naming
