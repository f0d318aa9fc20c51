"""Checkpoints that only a framework can write: the work is done in a process of its own, as any other."""

import tempfile
from pathlib import Path

from safetensors.numpy import save_file

from common import architectures
from common.architectures import Spec
from common.backends.process import BackendProcess, cores
from common.weights import Weights, contiguous


def write(column: str, spec: Spec, weights: Weights, path: Path) -> None:
    """Have the backend `column` write canonical `weights` to `path`, which is not there yet.

    Raises `BackendMissing` if the framework is not installed, and what `Backend.save` raises.
    """
    with (
        tempfile.TemporaryDirectory(prefix="resnet-parity-") as folder,
        BackendProcess(column, threads=cores()) as worker,
    ):
        given = Path(folder) / "weights.safetensors"
        save_file(contiguous(weights), given)
        request = {"spec": architectures.to_dict(spec), "weights": str(given), "output": str(path.absolute())}
        worker.ask("save", request)
