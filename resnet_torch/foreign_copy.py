"""A copy of a user's PyTorch model, in which a comparison can do as it likes, and what is put back after it."""

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from common.errors import ModelError
from resnet_torch.foreign_exported import is_operator

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def held_by(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; what is shared has its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def device_of(model: nn.Module) -> torch.device:
    """Where its inputs belong."""
    return next((array.device for array in held_by(model).values()), torch.device("cpu"))


def copied(model: nn.Module, title: str) -> Any:
    """A copy of everything. Raises `ModelError` where something of it cannot be copied, or has no values yet."""
    for name, array in held_by(model).items():
        if torch.nn.parameter.is_lazy(array) or array.is_meta:
            raise ModelError(f"{title} has no values yet in {name!r}; call it once, or load some")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in tree_leaves(vars(module)):
            # PyTorch copies none that was computed: an attention map that was kept, a weight that a hook computes anew.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            own = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(f"{title} cannot be copied: {one_line(error)}") from error
    for array, original in zip(own.parameters(), model.parameters(), strict=True):
        array.requires_grad_(original.requires_grad)  # TorchScript's copies forget it
    return own


def cast_to(model: nn.Module, dtype: str) -> None:
    """Cast all that a model holds, but in float32 only where nothing is less than float64: a part that is bfloat16
    stays so. Its smallest numbers stay those of the dtype it had."""
    found = {array.dtype for array in held_by(model).values() if array.is_floating_point()}
    if dtype == "float32" and found != {torch.float64}:
        return
    done: dict[int, tuple[Tensor, Tensor]] = {}  # with what it was made of, whose id would be another's else

    def cast(tensor: Tensor) -> Tensor:
        """What is shared stays shared."""
        if id(tensor) not in done:
            done[id(tensor)] = tensor, in_dtype(tensor, dtype)
        return done[id(tensor)][1]

    for module in model.modules():
        if isinstance(module, nn.RMSNorm) and module.eps is None:
            # It would be the dtype's: another function in float64.
            module.eps = torch.finfo(torch.float32 if module.weight is None else module.weight.dtype).eps
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = cast(value)
    model._apply(cast)
    if isinstance(model, GraphModule) and dtype == "float64":
        for one in filter(is_operator, model.graph.nodes):
            one.args, one.kwargs = tree_map(_widened, (one.args, one.kwargs))


def in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in a dtype, where it is floating point; a complex one is of two such."""
    if tensor.is_complex():
        return tensor.to(torch.complex128) if dtype == "float64" else tensor
    return tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor


def _widened(argument: Any) -> Any:
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return wider.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def without_dropout(model: nn.Module) -> None:
    """Layers of dropout pass on what they get from now on, whatever the mode."""
    for module in model.modules():
        named_so = type(module).__name__.startswith(("Drop", "StochasticDepth"))
        if isinstance(module, _DropoutNd) or (named_so and module is not model and not held_by(module)):
            module.register_forward_pre_hook(_evaluated)
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = 0.0


def _evaluated(module: nn.Module, inputs: Any) -> None:
    module.training = False


_DROPS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout),
    }
)


class NoDropout(TorchFunctionMode):
    """While it lasts, functions of dropout return what they are given."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _DROPS:
            return args[0] if args else kwargs["input"]
        if function is F.scaled_dot_product_attention and len(args) < 5:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return function(*args, **kwargs)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Modes and buffers are put back at the end, buffers also where the model put others in their place."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, before in buffers:
            # One that gradients ran through would take their whole graph with it.
            kept = before if buffer.requires_grad else buffer
            with torch.no_grad():
                kept.copy_(before)
            module._buffers[name] = kept
        for module, training in modes:
            module.training = training


@contextmanager
def generators_kept() -> Iterator[None]:
    """Generators of random numbers, of PyTorch and of what models use besides, are as before at the end."""
    cpu, plain, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    # Asking for CUDA's would start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(plain)
        np.random.set_state(numpy)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """What a float64 model makes of nothing is float64 too: a table of positions, a mask."""
    before = torch.get_default_dtype()
    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def one_line(error: Exception) -> str:
    """What was raised, in one line."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__
