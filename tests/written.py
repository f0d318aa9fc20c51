"""Weights as a file, for tests that want nothing else of a checkpoint."""

from pathlib import Path

from common import checkpoints
from common.architectures import Spec
from common.checkpoints import Checkpoint
from common.checkpoints.write import Written
from common.weights import Weights


def save_weights(path: Path, spec: Spec, weights: Weights, to: str | None = None) -> Written:
    """Write weights in any format."""
    return checkpoints.write(path, Checkpoint(spec=spec, weights=weights), to)
