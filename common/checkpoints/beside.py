"""The JSON files that some communities keep beside their weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.architectures import Spec
from common.errors import CheckpointError
from common.names import Beside, Naming, Told

_MOST = 2**20  # bytes; a thousand classes with their names take 80,000


def told(naming: Naming, path: Path) -> Told:
    """What stands beside the weights at `path`, a file or a folder. Raises `CheckpointError` for another network."""
    if naming.beside is None:
        return Told()
    found = _read(path / naming.beside.name if path.is_dir() else path.with_name(naming.beside.name))
    return Told() if found is None else naming.beside.read(found)


def belongs(naming: Naming, path: Path) -> Beside | None:
    """The file that weights written to `path` get; None where they get none."""
    return naming.beside if naming.beside is not None and path.name == naming.beside.weights else None


def text_for(beside: Beside, path: Path, spec: Spec, class_names: Sequence[str]) -> str | None:
    """What is to be written to `path`; None where the right file is there already.

    Raises `CheckpointError` for a network that the file has no words for, and where another one's is there.
    """
    wanted = beside.write(spec, class_names)
    if not path.exists():
        return json.dumps(wanted, indent=2) + "\n"
    found = _read(path)
    if found is None or any(found.get(name) != wanted[name] for name in wanted if name not in beside.free):
        raise CheckpointError(f"{path} is there already and describes another network; move it away")
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
