"""The canonical file: safetensors with the spec and checksums in its metadata."""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common import architectures
from common.architectures import Spec
from common.errors import SpecError, WeightsError
from common.files import opened, reason, written
from common.weights.arrays import Weights, check_names, contiguous, mapped, shapes, validate

FORMAT = "resnet-parity weights 2"  # in the metadata of a canonical file


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
    told = [metadata.get(key, "") for key in ("format", "spec", "checksums")]
    return xxhash.xxh3_128(json.dumps(told).encode()).hexdigest()


def save(path: Path | str, spec: Spec, weights: Weights) -> None:
    """Write canonical weights; beside the target first, then renamed. Raises `WeightsError`.

    The metadata hold the spec, a checksum of every tensor and one of all that: `load` knows a changed file.
    """
    check_names("the weights are not this spec's", weights, shapes(spec))
    arrays = contiguous(weights)
    validate(spec, arrays)
    metadata = {"format": FORMAT, "spec": architectures.to_json(spec), "checksums": json.dumps(_checksums(arrays))}
    with written(Path(path), WeightsError) as beside:
        save_file(arrays, beside, metadata | {"header_checksum": _header_checksum(metadata)})


def load(path: Path | str, *, finite: bool = True) -> tuple[Spec, Weights]:
    """Spec and weights of a canonical file, memory-mapped: a tensor is read when it is asked for.

    Every tensor is checked against its checksum first. Raises `WeightsError` for a file that is missing, truncated,
    changed or no canonical file, for tensors that are not exactly those of the spec inside, and with `finite` for NaN
    and infinity.
    """
    path = Path(path)
    file = opened(path, WeightsError)
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise WeightsError(f"{path}: not a canonical weights file: format is {found!r}, expected {FORMAT!r}")
    try:
        spec = architectures.from_json(metadata.get("spec", ""))
        weights = mapped(path)
        validate(spec, weights, finite=finite)
        # Last: what can be named precisely has been by now.
        if metadata.get("header_checksum") != _header_checksum(metadata):
            raise WeightsError("the header was changed after it was written; fetch or make the file again")
        expected = json.loads(metadata["checksums"])
        changed = [name for name, checksum in _checksums(weights).items() if expected.get(name) != checksum]
        if changed:
            raise WeightsError(
                f"{len(changed)} tensors were changed after they were written, {changed[0]} first; "
                "fetch or make the file again"
            )
    except SpecError as error:
        raise WeightsError(f"{path}: the spec inside is damaged: {error}") from None
    except (WeightsError, SafetensorError) as error:
        raise WeightsError(f"{path}: {reason(error)}") from None
    return spec, weights
