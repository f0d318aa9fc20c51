"""Arrays in orbax's own format: a folder that orbax makes. NumPy goes in and comes out: no value goes through JAX.

Each process works alone, without orbax's waiting for the others: who writes, and when all go on, the caller decides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import CheckpointError
from common.files import reason
from resnet_flax import framework

with framework():
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]
    from flax.traverse_util import flatten_dict, unflatten_dict

Arrays = Mapping[tuple[str, ...], np.ndarray]


def write(path: Path, arrays: Arrays, rank: int = 0) -> None:
    """Write arrays by their paths in a tree; all is written on return. Raises `OSError`, a full disk included."""
    try:
        with _checkpointer(rank) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.StandardSave(unflatten_dict(arrays)))
    except OSError:
        raise
    except Exception as error:  # tensorstore has several
        raise OSError(reason(error)) from None


def read(path: Path, rank: int = 0) -> dict[tuple[str, ...], np.ndarray]:
    """What `write` wrote. Raises `CheckpointError`."""
    try:
        with _checkpointer(rank) as checkpointer:
            found = flatten_dict(checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore()))
    except Exception as error:  # whatever damaged files make the reader stumble over
        raise CheckpointError(f"{path}: damaged, or not written by orbax: {reason(error)[:200]}") from None
    return {name: np.asarray(array) for name, array in found.items()}


def _checkpointer(rank: int) -> Any:
    alone = ocp.options.MultiprocessingOptions(primary_host=rank, active_processes={rank})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)
