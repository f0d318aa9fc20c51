"""Training by several processes on JAX's own engine: `jax.distributed`, and jit over a mesh of all their devices.

The state is replicated and the batch is split, so that XLA sums gradients, and the statistics of batch norm, over the
whole batch: each process takes the step that one alone would take with it. A process may hold several devices.

Where JAX knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU) `join` needs nothing to be set. Elsewhere every
process is started with ``RESNET_PARITY_COORDINATOR=host:port`` (of process 0, a port that is free there),
``RESNET_PARITY_PROCESSES`` and its own ``RESNET_PARITY_PROCESS``, counted from 0.
"""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from common.errors import ParityError, TrainingError
from common.files import reason
from common.training import cluster
from common.training.trainer import Replica
from resnet_flax import framework

with framework():
    import jax
    from jax._src.distributed import global_state
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Seconds without a sign of life after which a process counts as lost. One that was killed is noticed at once, by its
# connections; a machine that lost its power by this.
TIMEOUT = 30


def join() -> Replica:
    """Join the other processes: those of the cluster that JAX finds, or that the variables above name.

    On CPUs they talk over gloo. Raises `TrainingError` where there are none; ends the process where they do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address, *numbers = cluster.complete()
    try:
        count, rank = (int(number) if number else None for number in numbers)
        with cluster.waiting(2 * TIMEOUT):
            jax.distributed.initialize(
                address,
                count,
                rank,
                initialization_timeout=4 * TIMEOUT,
                heartbeat_timeout_seconds=TIMEOUT,
                shutdown_timeout_seconds=4 * TIMEOUT,
            )
    except (RuntimeError, ValueError, TypeError) as error:  # the last of a JAX too old to know them all
        hint = (
            f"are all processes running, and {address} reachable" if address else f"set {', '.join(cluster.SETTINGS)}"
        )
        raise TrainingError(f"the other processes cannot be joined: {reason(error)}; {hint}?") from None
    # `jax.process_index` would begin to use the devices, before `backend.start` has said how.
    return Replica(rank=global_state.process_id, count=global_state.num_processes)


@contextmanager
def together(replica: Replica) -> Iterator[None]:
    """Raises `TrainingError` where another process ends or does not answer. Any error within ends the others too."""
    try:
        yield
    except BaseException as error:
        if replica.count == 1:
            raise
        atexit.register(_leave)
        # A collective that fails while it is dispatched raises a bare ValueError, later one of JAX's own.
        lost = any(name in str(error) for name in ("Gloo", "gloo", "NCCL", "coordination service"))
        if not lost or not isinstance(error, RuntimeError | ValueError) or isinstance(error, ParityError):
            raise
        raise TrainingError(
            f"process {replica.rank} of {replica.count}: another process ended or did not answer within "
            f"{TIMEOUT} s; its own output says why; start all of them again with --resume"
        ) from None


def _leave() -> None:
    """End this process without JAX's own ending, which waits for the others, who wait for this one in a step."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(2)


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """Of an array that every device of every process holds whole, and of one whose first axis they share."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def agree(replica: Replica, yes: bool) -> bool:
    """Whether all processes say yes."""
    return yes if replica.count == 1 else bool(multihost_utils.process_allgather(np.array(yes)).all())
