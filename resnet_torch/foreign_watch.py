"""A pass of a user's model, watched: what every layer is given and returns, which can be replaced on the way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from common.errors import ModelError
from common.foreign.protocol import Call, Forced, Trace
from resnet_torch.foreign_operations import arrays_of, operation_of

_WIDE = torch.float64, torch.complex128
_NOTHING = Forced()


def array_of(tensor: Tensor) -> np.ndarray:
    """A copy in NumPy; of what NumPy has no type for, or float16, in float32."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    if dense.is_floating_point() and dense.dtype.itemsize < 4:
        dense = dense.float()
    dense = dense.resolve_conj().resolve_neg()
    return dense.to("cpu", copy=True, memory_format=torch.contiguous_format).numpy()


def tensor_of(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A copy in PyTorch."""
    # Not of negative strides, nor read-only, which `torch.from_numpy` does not take.
    return torch.from_numpy(np.array(array, order="C")).to(device)


def node(
    tensor: Tensor,
    value: Tensor | None = None,
    note: Callable[[Tensor], None] | None = None,
    cotangent: Tensor | None = None,
) -> Tensor:
    """A copy of a tensor, or `value`. The gradient that comes back to it is noted down, and it or `cotangent` goes on
    to the tensor."""
    return cast(Tensor, _Node.apply(tensor, (value, note, cotangent)))


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ours: Any) -> Tensor:
        # Of what autograd is given or a view of it nothing may be returned: what follows may work in place.
        value, ctx.note, ctx.cotangent = ours
        ctx.fits = value is None or value.shape == tensor.shape
        return tensor.clone() if value is None else cast(Tensor, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        if ctx.note is not None:
            ctx.note(gradient)
        if not ctx.fits:  # what was put there has another shape, and nothing can go back
            return None, None
        return gradient if ctx.cotangent is None else ctx.cotangent, None


@dataclass
class Entered:
    """A layer at work."""

    name: str
    layer: str
    kind: str
    inputs: tuple[np.ndarray, ...]
    axes: int  # of its first input
    taken: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)  # theirs, ours in its place, its version
    around: bool = False  # other layers were called inside it


class Watch:
    """One pass: what it computes is in `trace`, and `place` says where it is, also after an exception."""

    def __init__(self, title: str, *, wide: bool, gradients: bool, forced: Mapping[str, Forced]) -> None:
        self.trace = Trace()
        self.inside: list[Entered] = []
        self._title, self._wide, self._gradients, self._forced = title, wide, gradients, forced
        self._on = True
        self._root = ""
        self._counts: dict[str, int] = {}
        self._copies = WeakIdKeyDictionary()

    def place(self) -> str:
        """The innermost layer at work."""
        if not self.inside or self.inside[-1].layer == self._root:
            return self._title
        return f"{self._title}, layer {self.inside[-1].name!r} ({self.inside[-1].kind})"

    def ended(self) -> None:
        """Layers that are called from now on, as checkpointing does on the way back, are no calls of the pass. Raises
        `ModelError` where values were to be put into a call that there was not."""
        self._on = False
        if missed := [name for name in self._forced if name not in self.trace.outputs]:
            raise ModelError(f"{self._title} made no call {missed[0]!r}, whose values were to be replaced")

    def enter(self, layer: str, kind: str, tensors: list[Tensor]) -> list[Tensor]:
        """Note down what a layer is given. Returns what it shall be given instead."""
        if self.inside:
            self.inside[-1].around = True
        count = self._counts[layer] = self._counts.get(layer, 0) + 1
        name = layer if count == 1 else f"{layer}#{count}"
        axes = tensors[0].ndim if tensors else 0
        entered = Entered(name, layer, kind, tuple(self._copy(tensor) for tensor in tensors), axes)
        self.inside.append(entered)
        given = list(tensors)
        for i, value in self._values("input", self._forced.get(name, _NOTHING).inputs, tensors).items():
            given[i] = node(tensors[i], value) if self._follows(tensors[i]) else value
            if value.shape == tensors[i].shape:
                entered.taken.append((tensors[i], given[i], given[i]._version))
        return given

    def leave(self, entered: Entered, call: Call, tensors: list[Tensor], *, aliases: bool = False) -> list[Tensor]:
        """Note down what the innermost layer returned. Returns what the others shall see instead: with gradients a node
        for each tensor, but where they are `aliases` of what it was given. Raises `ModelError` where float64 was asked
        for and another precision comes out."""
        for theirs, ours, version in entered.taken:
            if ours._version != version:  # it worked in place, and others may read that too
                theirs.copy_(ours)
        for tensor in tensors:
            self.check(tensor)
        trace = self.trace
        trace.calls = (*trace.calls, call)
        trace.inputs[call.name] = entered.inputs if call.leaf else ()
        trace.outputs[call.name] = tuple(self._copy(tensor) for tensor in tensors)
        forced = self._forced.get(call.name, _NOTHING)
        values = self._values("output", forced.outputs, tensors)
        cotangents = self._values("cotangent", forced.cotangents, tensors)
        if self._gradients:
            trace.cotangents[call.name] = (None,) * len(tensors)
        returned = list(tensors)
        for i, tensor in enumerate(tensors):
            if not self._follows(tensor):
                returned[i] = values.get(i, tensor)
            elif aliases and i not in values:
                tensor.register_hook(partial(self._hook, call.name, i, cotangents.get(i)))
            else:
                returned[i] = node(tensor, values.get(i), partial(self._note, call.name, i), cotangents.get(i))
        return returned

    def check(self, tensor: Tensor) -> None:
        """Raises `ModelError` where float64 was asked for and this is of another precision."""
        if self._wide and floats(tensor) and tensor.dtype not in _WIDE:
            raise self.narrow(tensor.dtype)

    def narrow(self, dtype: torch.dtype | str = torch.float32) -> ModelError:
        """The error that the layer at work is not all of float64."""
        precision = str(dtype).removeprefix("torch.")
        return ModelError(f"{self.place()} computes in {precision} inside; compare in float32")

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """While it lasts, every module of the model is watched; the model itself is a layer only where it calls none,
        and goes by its class."""
        taken, root = dict(model.named_modules()), self._title.lower()
        self._root = root if root not in taken else f"{root}_"
        names = {id(array): name for name, array in (*model.named_parameters(), *model.named_buffers())}
        with ExitStack() as hooks:
            for path, module in taken.items():
                # What computes a weight anew is a part of the layer that has the weight.
                if isinstance(module, torch.jit.ScriptModule) or "parametrizations" in path.split("."):
                    continue
                layer = path or self._root
                before, after = partial(self._before, layer), partial(self._after, layer, names)
                hooks.callback(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            yield

    def _before(self, layer: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._on:
            return None
        leaves, structure = tree_flatten((args, kwargs))
        tensors = tensors_in(leaves)
        given = self.enter(layer, type(module).__name__, tensors)
        return replaced(leaves, structure, tensors, given)

    def _after(
        self, layer: str, names: Mapping[int, str], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> Any:
        if not self._on:
            return None
        while self.inside[-1].layer != layer:  # it raised, and the model went on
            self.inside.pop()
        entered = self.inside[-1]
        returned = None
        if layer != self._root or not entered.around:
            leaves, structure = tree_flatten(output)
            tensors = tensors_in(leaves)
            call = Call(
                name=entered.name,
                layer=layer,
                kind=entered.kind,
                leaf=not entered.around,
                operation=None if entered.around else operation_of(module, entered.axes),
                arrays=arrays_of(module, names, inside=not entered.around),
            )
            returned = replaced(leaves, structure, tensors, self.leave(entered, call, tensors))
        self.inside.pop()
        return returned

    def _follows(self, tensor: Tensor) -> bool:
        return self._gradients and tensor.requires_grad

    def _values(self, what: str, arrays: tuple[np.ndarray | None, ...], tensors: list[Tensor]) -> dict[int, Tensor]:
        values = {}
        for i, array in enumerate(arrays):
            if array is None:
                continue
            shape = tuple(tensors[i].shape) if i < len(tensors) else None
            other = shape is not None and array.ndim == len(shape)
            if array.shape != shape and not other:
                raise ModelError(f"{self.place()}: {what} {i} is of shape {shape}, not {array.shape}")
            with torch.no_grad():
                if array.shape != shape:
                    values[i] = tensor_of(array).to(tensors[i])
                    continue
                # In the memory order of the one that it replaces: the sums of some kernels depend on it.
                values[i] = torch.empty_like(tensors[i]).copy_(tensor_of(array))
        return values

    def _copy(self, tensor: Tensor) -> np.ndarray:
        """One copy for a tensor that several layers see, which is most of them."""
        if tensor.is_inference():  # these keep no count of what changed them
            return array_of(tensor)
        known = self._copies.get(tensor)
        # `tensor.data` can be changed without being counted.
        if known is not None and known[0] == tensor._version and _same(tensor, known[1]):
            return cast(np.ndarray, known[1])
        array = array_of(tensor)
        self._copies[tensor] = tensor._version, array
        return array

    def _note(self, name: str, i: int, gradient: Tensor) -> None:
        noted = self.trace.cotangents[name]
        self.trace.cotangents[name] = (*noted[:i], array_of(gradient), *noted[i + 1 :])

    def _hook(self, name: str, i: int, cotangent: Tensor | None, gradient: Tensor) -> Tensor | None:
        self._note(name, i, gradient)
        return cotangent


class Casts(TorchDispatchMode):
    """While it lasts, raises `ModelError` where a float64 array becomes one of another precision: that of a layer which
    casts back at its end shows nowhere else."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch loads its compiler, only to keep it away: three seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [one for one in tensors_in(tree_leaves(result)) if floats(one) and one.dtype not in _WIDE]
        # `zeros_like(x, dtype=…)` and its kin take the shape alone.
        if made and not any(part in str(func) for part in ("_like", ".new_")):
            given = tensors_in(tree_leaves((args, kwargs)))
            if any(one.dtype in _WIDE for one in given):
                raise self._watch.narrow(made[0].dtype)
        return result


def tensors_in(leaves: list[Any]) -> list[Tensor]:
    """The tensors among the leaves of a structure."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def floats(tensor: Tensor) -> bool:
    """Whether it is of floating point, real or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def _same(tensor: Tensor, array: np.ndarray) -> bool:
    copy = torch.from_numpy(array)
    return tensor.dtype == copy.dtype and torch.equal(tensor.detach().cpu(), copy)


def replaced(leaves: list[Any], structure: Any, before: list[Tensor], after: list[Tensor]) -> Any:
    """The structure with these tensors; None where they are the ones it had."""
    if all(one is other for one, other in zip(before, after, strict=True)):
        return None
    rest = iter(after)
    return tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
