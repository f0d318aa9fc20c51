"""Checkpoints that only a framework can write: the work is done in a process of its own, as any other."""

import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from common.architectures import Spec
from common.backends.columns import cores
from common.backends.process import BackendProcess
from common.backends.requests import SaveCheckpoint
from common.errors import CheckpointError
from common.files import reason
from common.weights import Weights, contiguous


def write(path: Path, column: str, spec: Spec, weights: Weights, naming: str) -> None:
    """Have the backend `column` write canonical `weights` to `path`: beside it first, then renamed.

    Raises `CheckpointError` where it cannot be written, `BackendMissing` if the framework is not installed, and what
    `Backend.save` raises.
    """
    if path.is_dir() and any(path.iterdir()):
        raise CheckpointError(f"{path}: is there already, and not an empty folder; remove it or name another")
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent) as folder,
            BackendProcess(column, threads=cores()) as worker,
        ):
            given = Path(folder) / "weights.safetensors"
            save_file(contiguous(weights), given)
            # Keras goes by the end of the name, and our backend for it by what is before that.
            made = Path(folder) / f"checkpoint.{naming}{path.suffix}"
            worker.ask(SaveCheckpoint(spec=spec, weights=given, output=made))
            made.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {reason(error)}; nothing was left there") from None
