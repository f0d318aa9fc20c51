"""Training on several devices, by the engine below Keras.

On JAX: `keras.distribution.DataParallel` over all devices of all processes that `jax.distributed` connects. The state
is replicated, the batch divided; what is computed is the step of one process with the whole batch, its batch
statistics included.

On TensorFlow: `tf.distribute.MirroredStrategy` over the devices of one process, with synchronised batch norm. Keras 3
does not train over several processes there (github.com/keras-team/keras/issues/20585).
"""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from common.errors import TrainingError
from common.files import reason
from common.training import cluster
from common.training.recipe import shared
from common.training.trainer import Replica
from resnet_keras import framework

# Seconds after which a process that gives no sign of life is taken for dead. One that was killed is noticed at once, by
# its connections.
TIMEOUT = 30


class _State:
    joined = False
    lost = False  # another process is gone


def join() -> Replica:
    """Join the other processes of a training, before `backend.start`.

    On JAX they are those of a cluster that it knows (Slurm, Open MPI, Kubernetes, Cloud TPU). Elsewhere every process
    is started with ``RESNET_PARITY_COORDINATOR=host:port`` (of process 0, a port that is free there),
    ``RESNET_PARITY_PROCESSES`` and its own ``RESNET_PARITY_PROCESS``, counted from 0. On TensorFlow there is only one.
    Raises `TrainingError` for what the engine cannot do; ends the process where the others do not come.
    """
    engine = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    given = cluster.given()
    if engine == "jax":
        replica = _join_jax()
    elif engine == "tensorflow":
        if given or "TF_CONFIG" in os.environ:
            raise TrainingError(
                f"{next(iter(given), 'TF_CONFIG')} is set, but on TensorFlow Keras trains in one process only, on all "
                "its devices; for several processes take the backend keras:jax"
            )
        replica = Replica()
    else:
        raise TrainingError(f"on {engine} Keras trains on one device only; take keras:jax, or torch by itself")
    _State.joined = True
    return replica


def _join_jax() -> Replica:
    address, *numbers = cluster.complete()
    with framework():
        import jax
        from jax._src.distributed import global_state
    atexit.register(_leave)  # at once: what is registered first is done last
    # JAX would take SIGTERM for purposes of its own; a run ends by it, with a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        count, rank = (None if number is None else int(number) for number in numbers)
        with cluster.waiting(2 * TIMEOUT):
            jax.distributed.initialize(
                address, count, rank, initialization_timeout=4 * TIMEOUT, heartbeat_timeout_seconds=TIMEOUT
            )
    except (RuntimeError, ValueError) as error:
        hint = (
            f"are all running, and is {address} reachable" if address else f"is this no cluster? Set {cluster.SETTINGS}"
        )
        raise TrainingError(f"the other processes cannot be joined: {reason(error)}; {hint}?") from None
    # `jax.process_index` would begin to use the devices, before `backend.start` has said how.
    return Replica(rank=global_state.process_id, count=global_state.num_processes)


def _leave() -> None:
    """JAX's own end waits for processes that are gone, and then aborts this one with a stack trace."""
    if _State.lost:
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


@contextmanager
def together(replica: Replica) -> Iterator[None]:
    """Raises `TrainingError` where another process ends or does not answer."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if replica.count == 1 or not any(
            name in text for name in ("Gloo", "NCCL", "coordination", "DEADLINE_EXCEEDED")
        ):
            raise
        _State.lost = True
        raise TrainingError(
            f"process {replica.rank} of {replica.count}: another process ended or did not answer "
            f"({reason(error)[:120]}); its own output says why; start all of them again with --resume"
        ) from None


def agree(replica: Replica, yes: bool) -> bool:
    """Whether all processes say yes."""
    if replica.count == 1:
        return yes
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(yes)).all())


def wait(replica: Replica) -> None:
    """Until all processes are here."""
    agree(replica, True)


def scope(batch_size: int) -> AbstractContextManager[Any]:
    """The context in which to make what is trained, for global batches of so many examples.

    On JAX the distribution stays when it ends: `fit` asks for it too. Raises `RecipeError` for batches that cannot be
    divided, and `TrainingError` where there is nothing to divide them among.
    """
    if not _State.joined:
        return nullcontext()
    import keras

    if keras.backend.backend() == "jax":
        # Each process reads its own share of the data.
        distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
        shared(batch_size, distribution.num_model_replicas, "devices")
        keras.distribution.set_distribution(distribution)
        return nullcontext()
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) == 1:
        raise TrainingError(f"TensorFlow has one device only, {devices[0].name}; leave --distributed out")
    shared(batch_size, len(devices), "devices")
    context: AbstractContextManager[Any] = tf.distribute.MirroredStrategy([device.name for device in devices]).scope()
    return context


def replicas(model: Any) -> int:
    """Over how many replicas Keras takes the mean of what a step measured."""
    strategy = getattr(model, "distribute_strategy", None)
    return 1 if strategy is None else strategy.num_replicas_in_sync


def synchronise(model: Any) -> None:
    """Have every batch norm take its statistics over the whole batch: on JAX it does, there is one batch only."""
    if replicas(model) > 1:
        for layer in model.layers:
            if hasattr(layer, "synchronized"):
                layer.synchronized = True
