"""Training by several processes on PyTorch's own engine: torchrun, DistributedDataParallel, and FSDP2 if asked for.

Every process takes an equal share of each batch. Gradients are averaged, batch norm takes its statistics over the whole
batch, and so all processes take the step that one alone would take with it.
"""

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from common.architectures import Spec
from common.errors import ParityError, TrainingError
from common.files import reason
from common.training import cluster
from common.training.trainer import Replica
from resnet_torch import framework

with framework():
    import torch
    from torch import Tensor, distributed, nn
    from torch.nn.parallel import DistributedDataParallel

    from resnet_torch.layers import BiasedBatchNorm2d, nodes

# How long a process waits for another. One that was killed is noticed at once, by its connections; a machine that lost
# its power only by this, and within a minute.
TIMEOUT = timedelta(seconds=40)


def join() -> Replica:
    """Join the processes that torchrun started, over gloo; over NCCL, with a GPU each, if RESNET_PARITY_DEVICE is cuda.

    Raises `TrainingError` outside torchrun, and where the others cannot be reached.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise TrainingError(
            f"{missing[0]} is not set, so this process was not started by torchrun; "
            "run: torchrun --nproc-per-node 2 --no-python resnet-parity train … --distributed"
        )
    cuda = os.environ.get("RESNET_PARITY_DEVICE", "cpu") == "cuda"
    try:
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(f"the other processes cannot be reached at {where}: {reason(error)}") from None
    atexit.register(_leave)
    return Replica(rank=distributed.get_rank(), count=distributed.get_world_size())


def _leave() -> None:
    distributed.destroy_process_group()
    # gloo's threads let go of their last tensors a moment later, and need the interpreter for that: where it is already
    # being taken down the process ends with an abort.
    time.sleep(0.1)


@contextmanager
def together(replica: Replica) -> Iterator[None]:
    """Raises `TrainingError` where another process ends or does not answer."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a bare RuntimeError.
        lost = isinstance(error, distributed.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
        if isinstance(error, ParityError) or replica.count == 1 or not lost:
            raise
        raise cluster.lost(replica, TIMEOUT.seconds) from None


def total(replica: Replica, values: Tensor) -> Tensor:
    """The sum of `values` over the processes."""
    if replica.count > 1:
        distributed.all_reduce(values)
    return values


def agree(replica: Replica, yes: bool, device: torch.device) -> bool:
    """Whether all processes say yes."""
    return yes if replica.count == 1 else bool(total(replica, torch.tensor(int(yes), device=device)) == replica.count)


def sharding(replica: Replica) -> bool:
    """Whether the parameters are to be spread over the processes."""
    return replica.count > 1 and os.environ.get("RESNET_PARITY_FSDP") == "1"


def parallel(model: nn.Module, spec: Spec, replica: Replica, device: torch.device) -> nn.Module:
    """The model as it is to be called in training: its gradients are then those of the global batch.

    DistributedDataParallel lays gradients out anew after its first step. Of three or more processes the order of a sum
    depends on that: a run that goes on from a checkpoint differs there, for a step, by roundings.
    """
    if replica.count == 1:
        return model
    if sharding(replica):
        from torch.distributed.fsdp import fully_shard  # half a second that nothing else needs

        # Group by group: more than the parameters of one need never be whole at a time.
        for group in _groups(model, spec):
            fully_shard(group)
        # Of the outermost, else, an evaluation leaves the parameters whole, which are others than the optimiser's.
        fully_shard(model, reshard_after_forward=True)
        return model
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=any(layer.unused for layer in spec.layers),
    )


def _groups(model: nn.Module, spec: Spec) -> list[list[nn.Module]]:
    """The modules of every group of layers whose parameters are used together."""
    places, groups = nodes(spec), []
    for paths in spec.layer_groups:
        modules = {places[path].module: model.get_submodule(places[path].module) for path in paths}
        if held := [module for module in modules.values() if any(True for _ in module.parameters(recurse=False))]:
            groups.append(held)
    return groups


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece, gathered from all processes if it is spread over them."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def assign(target: Tensor, value: Tensor) -> None:
    """Set a tensor, that may be spread over the processes, to a value in one piece."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)


def synchronise(model: nn.Module, device: torch.device) -> None:
    """Have every batch norm of the model take its statistics over all processes."""
    for name, module in list(model.named_modules()):
        if device.type == "cuda" and type(module) is nn.BatchNorm2d:
            model.set_submodule(name, nn.SyncBatchNorm.convert_sync_batchnorm(module))
        elif isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, SyncBatchNorm2d(module))


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for the CPU too, where that refuses to run, and for either running variance.

    Takes over the arrays of `norm`. In training all processes must bring inputs of one shape.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.biased = isinstance(norm, BiasedBatchNorm2d)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked

    def forward(self, input: Tensor) -> Tensor:
        mean, var, counter, momentum = self.running_mean, self.running_var, self.num_batches_tracked, self.momentum
        if not self.training or mean is None or var is None or counter is None or momentum is None:
            return super().forward(input)
        count = input.numel() // input.size(1) * distributed.get_world_size()
        weight: Tensor | None = self.weight  # none where a norm does not scale
        weight = torch.ones_like(self.bias) if weight is None else weight
        output, batch_mean, batch_var = _Normalise.apply(input, weight, self.bias, self.eps, count)
        with torch.no_grad():
            counter.add_(1)
            mean.lerp_(batch_mean, momentum)
            var.lerp_(batch_var if self.biased else batch_var * (count / (count - 1)), momentum)
        return output


class _Normalise(torch.autograd.Function):
    """Batch norm over the processes: the output, and the mean and biased variance that it was normalised with."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The variance around the global mean, from a second sum: E[x²]-E[x]² would cancel.
        mean = _sum(input.to(weight.dtype)) / count
        centred = input - _channels(mean)
        var = _sum(centred.square()) / count
        deviation = (var + eps).rsqrt()
        normalised = centred.mul_(_channels(deviation))
        ctx.save_for_backward(normalised, deviation, weight)
        ctx.count = count
        ctx.mark_non_differentiable(mean, var)
        output = torch.addcmul(_channels(bias), normalised, _channels(weight))
        return output.to(input.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        normalised, deviation, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        # The parameters' own gradients stay this process's: they are averaged with all others.
        of_bias, of_weight = gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))
        means = torch.stack([of_bias, of_weight])
        distributed.all_reduce(means)
        of_shift, of_scale = means / ctx.count
        of_input = gradient - _channels(of_shift) - normalised * _channels(of_scale)
        of_input = of_input.mul_(_channels(deviation * weight))
        return of_input.to(gradients[0].dtype), of_weight, of_bias, None, None


def _sum(values: Tensor) -> Tensor:
    """The sum of (N, C, H, W) by channel, over all processes."""
    result = values.sum((0, 2, 3))
    distributed.all_reduce(result)
    return result


def _channels(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
