"""What our canonical file says in its metadata: spec, preprocessing, class names, origin, and checksums of all.

The file itself is safetensors with canonical names; nothing else is special about it.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash

from common import architectures
from common.checkpoints.checkpoint import Checkpoint, Origin
from common.errors import CheckpointError, InputError, SpecError
from common.images import Preprocessing
from common.weights import Weights

FORMAT = "resnet-parity weights 3"
_BEFORE = "resnet-parity weights 2"  # spec and checksums alone


def recognises(metadata: Mapping[str, str]) -> bool:
    """Whether these are the metadata of a canonical file."""
    return metadata.get("format") in (FORMAT, _BEFORE)


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of a canonical file of this checkpoint, whose weights are in memory."""
    preprocessing = checkpoint.preprocessing
    origin = checkpoint.origin if checkpoint.origin.path else None
    while origin is not None and origin.before is not None:
        origin = origin.before
    told = {
        "format": FORMAT,
        "spec": architectures.to_json(checkpoint.spec),
        "preprocessing": json.dumps(asdict(preprocessing) if preprocessing else None),
        "class_names": json.dumps(checkpoint.class_names, ensure_ascii=False),
        "origin": json.dumps(_plain(origin) if origin else None),
        "checksums": json.dumps(_checksums(checkpoint.weights)),
    }
    return told | {"header_checksum": _header_checksum(told)}


def stated(metadata: Mapping[str, str], origin: Origin) -> Checkpoint:
    """The checkpoint that metadata state, without its weights; `origin` is of the file. Raises `CheckpointError`."""
    try:
        spec = architectures.from_json(metadata.get("spec", ""))
    except SpecError as error:
        raise CheckpointError(f"the spec inside is damaged: {error}") from None
    if metadata["format"] == _BEFORE:
        return Checkpoint(spec=spec, weights={}, origin=origin)
    try:
        preprocessing, names, before = (json.loads(metadata[key]) for key in ("preprocessing", "class_names", "origin"))
        if not (isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)):
            raise ValueError("class_names is no list of names")
        if names and len(names) != spec.classes:
            raise ValueError(f"{len(names)} class_names of {spec.classes} classes")
        return Checkpoint(
            spec=spec,
            weights={},
            preprocessing=Preprocessing.from_data(preprocessing) if preprocessing else None,
            class_names=tuple(names),
            origin=Origin(**{**vars(origin), "before": _origin(before) if before else None}),
        )
    except (KeyError, TypeError, ValueError, RecursionError, InputError) as error:
        raise CheckpointError(f"the metadata are damaged: {str(error).splitlines()[0]}; make the file again") from None


def check(metadata: Mapping[str, str], weights: Weights) -> None:
    """Raise `CheckpointError` unless header and tensors are as they were written; every tensor is read for it."""
    if metadata.get("header_checksum") != _header_checksum(metadata):
        raise CheckpointError("the header was changed after it was written; fetch or make the file again")
    try:
        expected = dict(json.loads(metadata.get("checksums", "")))
    except (ValueError, TypeError, RecursionError):  # of a file that somebody made to pass the line above
        expected = {}
    changed = [name for name, checksum in _checksums(weights).items() if expected.get(name) != checksum]
    if changed:
        raise CheckpointError(
            f"{len(changed)} tensors were changed after they were written, {changed[0]} first; "
            "fetch or make the file again"
        )


def _plain(origin: Origin) -> dict[str, Any]:
    return {
        "reference": origin.reference or str(origin.path),
        "format": origin.format,
        "container": origin.container,
        "assumed": dict(origin.assumed),
        "notes": list(origin.notes),
    }


def _origin(plain: Mapping[str, Any]) -> Origin:
    return Origin(
        reference=str(plain["reference"]),
        format=str(plain["format"]),
        container=str(plain["container"]),
        assumed=dict(plain["assumed"]),
        notes=tuple(map(str, plain["notes"])),
    )


def _checksums(arrays: Weights) -> dict[str, str]:
    """A checksum of every array, at the speed of memory: for accidents, not against forgers."""
    names = sorted(arrays)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(name, arrays[name]), names), strict=True))


def _checksum(name: str, array: np.ndarray) -> str:
    one = xxhash.xxh3_128(f"{name} {array.dtype.str} {array.shape};".encode())
    one.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return one.hexdigest()


def _header_checksum(metadata: Mapping[str, str]) -> str:
    stated: list[Any] = [metadata.get(key, "") for key in ("format", "spec", "checksums")]
    if metadata.get("format") == FORMAT:
        stated = sorted([key, value] for key, value in metadata.items() if key != "header_checksum")
    return xxhash.xxh3_128(json.dumps(stated).encode()).hexdigest()
