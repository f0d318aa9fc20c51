"""A user's own PyTorch model at work: a module, or an exported program.

All is done on a copy, which `foreign_copy` makes. `foreign_watch` notes down what layers compute, and
`foreign_operations` what they say of themselves.
"""

import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from common.errors import ModelError, ParityError
from common.foreign.protocol import LATER_OUTPUT, Adapter, Forced, Inputs, Layout, Loss, Runner, Trace
from resnet_torch import framework

with framework():
    import torch
    from torch import Tensor, nn
    from torch.fx import GraphModule

    from resnet_torch.foreign_copy import (
        NoDropout,
        cast_to,
        copied,
        default_dtype,
        device_of,
        generators_kept,
        held_by,
        in_dtype,
        one_line,
        state_kept,
        without_dropout,
    )
    from resnet_torch.foreign_exported import Operators, is_exported, title_of
    from resnet_torch.foreign_watch import Casts, Watch, array_of, floats, node, tensor_of


def adapt(model: Any) -> Adapter:
    """A `torch.nn.Module` or a `torch.export.ExportedProgram`, to be compared.

    Raises `ModelError` for anything else, and for a compiled module, whose layers nobody sees.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return _TorchAdapter(model.module(), title_of(model))
    if isinstance(model, nn.Module):
        title = getattr(model, "original_name", type(model).__name__)
        if hasattr(model, "_orig_mod") or any(
            getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
        ):
            raise ModelError(f"{title} is compiled, so that its layers cannot be seen; give the model without it")
        return _TorchAdapter(model, title)
    if isinstance(model, type):
        raise ModelError(f"{model.__name__} is a class; give an object of it")
    raise ModelError(f"a {type(model).__name__} is neither a torch.nn.Module nor a torch.export.ExportedProgram")


class _TorchAdapter:
    """See `common.foreign.protocol.Adapter`."""

    backend = "torch"
    layout: Layout = "channels_first"

    def __init__(self, model: nn.Module, title: str) -> None:
        self._model, self.title = model, title
        scripted = isinstance(model, torch.jit.ScriptModule)
        self.lacks = frozenset({"training"} if is_exported(model) else {"layers"} if scripted else ())

    def describe(self) -> dict[str, str]:
        device = device_of(self._model)
        facts = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": str(device),
            "threads": str(torch.get_num_threads()),
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        }
        if device.type == "cuda":
            facts |= {
                "gpu": torch.cuda.get_device_name(device),
                "cuda": str(torch.version.cuda),
                "cudnn": str(torch.backends.cudnn.version()),
            }
        return facts

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[Runner]:
        with generators_kept(), torch.inference_mode(False):
            model = copied(self._model, self.title)
            cast_to(model, dtype)
            without_dropout(model)
            yield _TorchRunner(model, self.title, dtype)


class _TorchRunner:
    """See `common.foreign.protocol.Runner`. The model is a copy."""

    def __init__(self, model: nn.Module, title: str, dtype: str) -> None:
        self._model, self._title, self._dtype = model, title, dtype
        self._devices = {name: array.device for name, array in held_by(model).items()}
        self._parameters = {name: array for name, array in model.named_parameters() if array.requires_grad}
        self._cast_free: set[tuple[bool, bool]] = set()  # in which modes no cast was found in float64
        self.trained: Mapping[str, bool] = {name: name in self._parameters for name in self._devices}

    def values(self) -> dict[str, np.ndarray]:
        return self._values(self._model)

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        arrays = held_by(self._model)
        for name, value in values.items():
            if name not in arrays or tuple(arrays[name].shape) != value.shape:
                had = f"has {tuple(arrays[name].shape)}" if name in arrays else "has no such array"
                raise ModelError(f"{self._title} was given {name!r} of shape {value.shape}, and {had}")
            with torch.no_grad():
                arrays[name].copy_(tensor_of(value))

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        if training and is_exported(self._model):
            raise ModelError(f"{self._title} is an exported program, which has no training mode")
        wide = self._dtype == "float64"
        given = self._tensors(inputs)
        seen = given
        if gradients:
            for tensor in given.values():
                tensor.requires_grad_(floats(tensor))
            # The model may change its inputs, which autograd forbids of what gradients are taken of.
            seen = {name: node(tensor) if tensor.requires_grad else tensor.clone() for name, tensor in given.items()}
        args, keywords = _arguments(self._model, seen, inputs)
        watch = Watch(self._title, wide=wide, gradients=gradients, forced=forced or {})
        trace = watch.trace
        with ExitStack() as state:
            state.enter_context(default_dtype(self._dtype))
            state.enter_context(torch.set_grad_enabled(gradients))
            state.enter_context(state_kept(self._model))
            with self._raised(watch):
                # Later passes need not look at every operator.
                looking = wide and (training, gradients) not in self._cast_free
                with Casts(watch) if looking else nullcontext():
                    returned = self._call(watch, training, args, keywords)
                self._cast_free.add((training, gradients))
                watch.ended()
                results = dict(_leaves(returned, self._title))
                self._check(results, watch)
            trace.results = {path: array_of(tensor) for path, tensor in results.items()}
            before = self._tensors(inputs)
            trace.changed_inputs = tuple(name for name in seen if not _equal(before[name], seen[name]))
            if training:
                buffers = {name: one for name, one in self._model.named_buffers() if one.is_floating_point()}
                trace.statistics = {name: self._array(one) for name, one in buffers.items()}
            if gradients:
                scalar = self._loss(loss, returned, results)
                trace.loss = array_of(scalar.reshape(()))
                trace.gradients = self._gradients(scalar)
                asked = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
                trace.of_inputs = {name: array_of(_gradient(tensor)) for name, tensor in asked.items()}
        return trace

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        model = copied(self._model, self._title)
        taken: list[dict[str, Any]] = []
        with default_dtype(self._dtype), torch.enable_grad(), NoDropout():
            try:
                step = train(model)
                for batch in batches:
                    tensors = self._tensors(batch)
                    loss = step(**tensors) if isinstance(batch, Mapping) else step(*tensors.values())
                    of_loss = {} if loss is None else {"": array_of(torch.as_tensor(loss))}
                    taken.append({**self._values(model), **of_loss})
            except ParityError:
                raise
            except Exception as error:
                place = f"step {len(taken) + 1} of the user's own"
                raise ModelError(f"{self._title}, {place}: {one_line(error)}") from error
        return taken

    def _call(self, watch: Watch, training: bool, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        model = self._model
        if isinstance(model, GraphModule) and is_exported(model):
            bound = inspect.signature(model.forward).bind(*args, **keywords)
            return Operators(model, watch).run(*bound.args, *bound.kwargs.values())
        model.train(training)
        with watch.modules(model), NoDropout() if training else nullcontext():
            return model(*args, **keywords)

    def _loss(self, loss: Loss | None, returned: Any, results: Mapping[str, Tensor]) -> Tensor:
        if loss is None:
            parts = [
                (tensor.abs().square() / 2 + tensor.real.sin()).mean() for tensor in results.values() if floats(tensor)
            ]
            if not parts:
                raise ModelError(f"{self._title} returned nothing of floating point, of which a loss could be made")
            return torch.stack([LATER_OUTPUT**i * part for i, part in enumerate(parts)]).sum()
        try:
            scalar = loss(returned)
        except Exception as error:
            raise ModelError(f"the loss of {self._title}: {one_line(error)}") from error
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            found = (
                f"one of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else f"a {type(scalar).__name__}"
            )
            raise ModelError(f"the loss of {self._title} must return a tensor of one number, not {found}")
        return scalar

    def _gradients(self, loss: Tensor) -> dict[str, np.ndarray]:
        """After the way back, which takes them of the inputs too. The model keeps none."""
        try:
            if loss.requires_grad:
                loss.reshape(()).backward()
            return {name: self._array(_gradient(array)) for name, array in self._parameters.items()}
        except Exception as error:
            raise ModelError(f"{self._title}, on the way back: {one_line(error)}") from error
        finally:
            for array in self._parameters.values():
                array.grad = None

    def _check(self, results: Mapping[str, Tensor], watch: Watch) -> None:
        """Raises `ModelError` where something went to another device, or is of less than float64 where that is due."""
        self._moved()
        devices = {*self._devices.values()} or {device_of(self._model)}
        for path, tensor in results.items():
            if tensor.device not in devices:
                moved = f"{device_of(self._model)} to {tensor.device}"
                raise ModelError(f"{self._title} moved its result{f' {path!r}' if path else ''} from {moved}")
            watch.check(tensor)

    def _moved(self) -> None:
        for name, array in held_by(self._model).items():
            if array.device != self._devices.get(name, array.device):
                raise ModelError(f"{self._title} moved {name!r} from {self._devices[name]} to {array.device}")

    @contextmanager
    def _raised(self, watch: Watch) -> Iterator[None]:
        """What the model raises, as a `ModelError`."""
        try:
            yield
        except ParityError:
            raise
        except Exception as error:
            self._moved()
            message = str(error).lower()
            # Two precisions met, one of which is not the one that everything was cast to.
            if self._dtype == "float64" and "double" in message and ("float" in message or "half" in message):
                raise watch.narrow() from error
            raise ModelError(f"{watch.place()}: {one_line(error)}") from error

    def _tensors(self, inputs: Inputs) -> dict[str, Tensor]:
        """By name or position."""
        named = inputs if isinstance(inputs, Mapping) else {str(i): array for i, array in enumerate(inputs)}
        device = device_of(self._model)
        return {name: in_dtype(tensor_of(np.asarray(one), device), self._dtype) for name, one in named.items()}

    def _array(self, tensor: Tensor) -> np.ndarray:
        array = array_of(tensor)
        return array.astype(self._dtype) if tensor.is_floating_point() else array

    def _values(self, model: nn.Module) -> dict[str, np.ndarray]:
        return {name: self._array(array) for name, array in held_by(model).items()}


def _arguments(
    model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A dict is given by keyword where `forward` knows the names, else as one."""
    if not isinstance(inputs, Mapping):
        return tuple(tensors.values()), {}
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return (), tensors
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()) or set(tensors) <= set(parameters):
        return (), tensors
    return (dict(tensors),), {}


def _leaves(value: Any, title: str, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in what a model returned, by path. Raises `ModelError` for what is none."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = dict(zip(value._fields, value, strict=True))
    elif isinstance(value, list | tuple):
        parts = {str(i): part for i, part in enumerate(value)}
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {one.name: getattr(value, one.name) for one in fields(value)}
    else:
        raise ModelError(f"{title} returned a {type(value).__name__}{f' as {path!r}' if path else ''}, not a tensor")
    found = [
        leaf
        for key, part in parts.items()
        if part is not None
        for leaf in _leaves(part, title, f"{path}.{key}" if path else key)
    ]
    if not found and not path:
        raise ModelError(f"{title} returned a {type(value).__name__} without a tensor")
    yield from found


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _equal(one: Tensor, other: Tensor) -> bool:
    return np.array_equal(array_of(one), array_of(other), equal_nan=floats(one))
