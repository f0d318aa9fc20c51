"""Training by several processes on JAX's own engine: `jax.distributed`, and jit over a mesh of all their devices.

The state is replicated and the batch is split, so that XLA sums gradients, and the statistics of batch norm, over the
whole batch: each process takes the step that one alone would take with it. A process may hold several devices.

Where JAX knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU) `join` needs nothing to be set. Elsewhere every
process is started with ``RESNET_PARITY_COORDINATOR=host:port`` (of process 0, a port that is free there),
``RESNET_PARITY_PROCESSES`` and its own ``RESNET_PARITY_PROCESS``, counted from 0.
"""

from contextlib import AbstractContextManager

import numpy as np

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
    cluster.join(jax.distributed.initialize, TIMEOUT)
    # `jax.process_index` would begin to use the devices, before the backend's `start` has said how.
    return Replica(rank=global_state.process_id, count=global_state.num_processes)


def together(replica: Replica) -> AbstractContextManager[None]:
    """Raises `TrainingError` where another process ends or does not answer. Any error within ends the others too."""
    return cluster.together(replica, TIMEOUT)


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """Of an array that every device of every process holds whole, and of one whose first axis they share."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def agree(replica: Replica, yes: bool) -> bool:
    """Whether all processes say yes."""
    return yes if replica.count == 1 else bool(multihost_utils.process_allgather(np.array(yes)).all())
