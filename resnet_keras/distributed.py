"""Training on several devices, by the engine below Keras.

On JAX: `keras.distribution.DataParallel` over all devices of all processes that `jax.distributed` connects. The state
is replicated, the batch divided; what is computed is the step of one process with the whole batch, its batch
statistics included.

On TensorFlow: `tf.distribute.MirroredStrategy` over the devices of one process, with synchronised batch norm. Keras 3
does not train over several processes there (github.com/keras-team/keras/issues/20585).
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from common.errors import TrainingError
from common.training import cluster
from common.training.recipe import shared
from common.training.trainer import Replica
from resnet_keras import framework

# Seconds after which a process that gives no sign of life is taken for dead. One that was killed is noticed at once, by
# its connections.
TIMEOUT = 30


class _State:
    joined = False


def join() -> Replica:
    """Join the other processes of a training, before the backend's `start`.

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
    with framework():
        import jax
        from jax._src.distributed import global_state
    # JAX would take SIGTERM for purposes of its own; a run ends by it, with a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    cluster.join(jax.distributed.initialize, TIMEOUT)
    # `jax.process_index` would begin to use the devices, before the backend's `start` has said how.
    return Replica(rank=global_state.process_id, count=global_state.num_processes)


def together(replica: Replica) -> AbstractContextManager[None]:
    """Raises `TrainingError` where another process ends or does not answer. Any error within ends the others too."""
    return cluster.together(replica, TIMEOUT)


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
