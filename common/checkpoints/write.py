"""A checkpoint out, in any format; and what a file of that format cannot hold."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import architectures, names
from common.architectures import Spec
from common.architectures.marks import Mark, marked
from common.checkpoints import beside, canonical
from common.checkpoints.checkpoint import Checkpoint
from common.checkpoints.containers import BY_FRAMEWORK, native, suffix_of, writer_of
from common.checkpoints.inference import as_read
from common.errors import CheckpointError
from common.files import written
from common.images import PRESETS, Preprocessing
from common.names import CANONICAL, Naming
from common.names import roles as communities
from common.weights import LazyWeights, check_names, contiguous, shapes, validate

# By the end of a file's name: the communities whose names may stand in it, and the naming that people expect there.
_NAMINGS_IN = {
    ".safetensors": ((communities.CANONICAL, communities.PYTORCH), CANONICAL),
    ".pth": ((communities.PYTORCH,), "torchvision"),
    ".pt": ((communities.PYTORCH,), "torchvision"),
    ".bin": ((communities.PYTORCH,), "huggingface"),
    ".weights.h5": ((communities.KERAS,), "keras_applications"),
    ".h5": ((communities.KERAS,), "keras_applications"),
    ".keras": ((communities.KERAS,), "keras_applications"),
    ".msgpack": ((communities.FLAX,), "flax"),
    "": ((communities.FLAX,), "flax"),
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """The format that was written, and what such a file does not hold of the checkpoint."""

    format: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the spec, where its readers assume other values
    preprocessing: Preprocessing | None = None  # where its readers assume another
    class_names: tuple[str, ...] = ()


def write(path: Path | str, checkpoint: Checkpoint, to: str | None = None) -> Written:
    """Write a checkpoint in any format; beside the target first, then renamed.

    `to` is one of `formats()`; without it the end of the file's name says. Raises `CheckpointError` for an unknown
    format, one that cannot stand in such a file, weights that are not the spec's, and a place that cannot be written.
    """
    path = Path(path)
    spec, suffix = checkpoint.spec, suffix_of(path)
    naming = _naming(path, suffix, spec.family, to)
    check_names("the weights are not this spec's", checkpoint.weights, shapes(spec), CheckpointError)
    if naming.name == CANONICAL:
        weights = contiguous(checkpoint.weights)
        validate(spec, weights)
        whole = replace(checkpoint, weights=weights)
        writer_of(path).write(path, weights, canonical.metadata_of(whole))
        return Written(format=CANONICAL)
    companion = beside.belongs(naming, path)
    if suffix in BY_FRAMEWORK:
        native.write(path, BY_FRAMEWORK[suffix], spec, checkpoint.weights, naming.name)
    else:
        with ExitStack() as stack:
            if companion is not None:
                place = path.with_name(companion.name)
                text = beside.text_for(companion, place, spec, checkpoint.class_names)
                if text is not None:
                    stack.enter_context(written(place, CheckpointError)).write_text(text, encoding="utf-8")
            tensors = LazyWeights(naming.tensors(spec, checkpoint.weights.__getitem__))
            writer_of(path).write(path, tensors, naming.roles.metadata)
    usual = None if naming.preprocessing is None else PRESETS[naming.preprocessing]
    return Written(
        format=naming.name,
        fields=_unstated(spec, naming),
        preprocessing=checkpoint.preprocessing if checkpoint.preprocessing not in (None, usual) else None,
        class_names=() if companion is not None else checkpoint.class_names,
    )


def check_target(path: Path | str, to: str | None = None) -> None:
    """Raise `CheckpointError` where `write` could not write: an unknown format, or no folder to write into."""
    path = Path(path)
    _expected(path, suffix_of(path), to)
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written: {path.parent} is not a folder; make it first")


def _expected(path: Path, suffix: str, to: str | None) -> list[Naming]:
    """The namings, of any family, that a file of this name may have under the name `to`."""
    known = [
        naming for family in architectures.families() for naming in (names.canonical(family), *names.of(family).namings)
    ]
    communities_in, usual = _NAMINGS_IN[suffix]
    named = [naming for naming in known if (to or usual) in (naming.name, *naming.aliases)]
    if not named:
        raise CheckpointError(f"unknown format {to!r}; expected one of {', '.join(names.formats())}")
    fitting = [naming for naming in named if naming.roles in communities_in]
    if not fitting:
        allowed = dict.fromkeys(naming.name for naming in known if naming.roles in communities_in)
        raise CheckpointError(f"{path}: {to} does not go into such a file; expected {' or '.join(allowed)}")
    return fitting


def _naming(path: Path, suffix: str, family: str, to: str | None) -> Naming:
    for naming in _expected(path, suffix, to):
        if naming.family == family:
            return naming
    communities_in, usual = _NAMINGS_IN[suffix]
    namings = (names.canonical(family), *names.of(family).namings)
    allowed = [naming.name for naming in namings if naming.roles in communities_in]
    raise CheckpointError(
        f"{path}: {to or usual} has no names for a {family}; "
        + (f"such a file can have {' or '.join(allowed)}, with --to" if allowed else "choose another kind of file")
    )


def _unstated(spec: Spec, naming: Naming) -> dict[str, Any]:
    """The fields that a reader of this naming would take for others."""
    try:
        read = as_read(spec, naming)
    except CheckpointError:  # no reader can know such a network by its shapes
        return {}
    return {
        name: getattr(spec, name) for name in marked(spec, Mark.UNSEEN) if getattr(read, name) != getattr(spec, name)
    }
