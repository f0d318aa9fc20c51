"""PyTorch as a backend: runs a network and returns what every layer computed.

The only place that sets PyTorch's global state; meant for a process of its own.
"""

import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from common.architectures import Spec, running
from common.architectures.layers import GlobalPool, Layer
from common.backends.protocol import AUXILIARY_WEIGHT
from common.errors import BackendError
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Replica
from common.weights import Weights
from resnet_torch import framework, from_spec

with framework():
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from resnet_torch.layers import Node, given_dropout, native_masks
    from resnet_torch.training import TorchTrainer
    from resnet_torch.weights import canonical, export_weights, load_weights, slots

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def start(threads: int) -> "TorchBackend":
    """PyTorch with `threads` threads, on the device that RESNET_PARITY_DEVICE names (cpu unless it is set).

    Raises `BackendError` if that device is not there.
    """
    device = os.environ.get("RESNET_PARITY_DEVICE", "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"RESNET_PARITY_DEVICE={device!r} cannot be used by PyTorch: {reason}") from None
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        torch.set_num_interop_threads(1)
    # Full precision: no bfloat16 or TF32 inside a float32 operation, no Winograd or FFT convolution.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.nnpack.set_flags(False)
    # The same numbers twice. cuBLAS reads its variable when it starts; CUDA kernels that have no such form only warn.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return TorchBackend(torch.device(device))


class TorchBackend:
    """See `common.backends.protocol.Backend`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def describe(self) -> dict[str, str]:
        facts = {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "device": str(self._device),
            "threads": str(torch.get_num_threads()),
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        }
        if self._device.type == "cuda":
            facts |= {
                "gpu": torch.cuda.get_device_name(self._device),
                "cuda": str(torch.version.cuda),
                "cudnn": str(torch.backends.cudnn.version()),
            }
        return facts

    def build(self, spec: Spec, dtype: str) -> nn.Module:
        return from_spec(spec).to(self._device, _DTYPES[dtype])

    def native(self, model: nn.Module) -> nn.Module:
        return model

    def load(self, model: nn.Module, weights: Weights) -> None:
        load_weights(model, weights)

    def export(self, model: nn.Module) -> Weights:
        return export_weights(model)

    def trainer(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> TorchTrainer:
        return TorchTrainer(spec, recipe, dtype, self._device, replica)

    def run(
        self,
        model: nn.Module,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        training: bool,
        gradients: bool,
        masks: Masks | None = None,
    ) -> dict[str, np.ndarray]:
        spec: Spec = model.spec  # type: ignore[assignment]
        layers = running(spec, training)
        table = slots(spec)
        parameters = dict(model.named_parameters())
        dtype = next(iter(parameters.values())).dtype
        inputs = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), dtype=dtype, device=self._device)
        targets = torch.tensor(labels, dtype=torch.int64, device=self._device)
        taps: dict[str, Tensor] = {}
        results: dict[str, np.ndarray] = {}

        with _traceless(model), torch.set_grad_enabled(gradients):
            model.train(training)
            inputs.requires_grad_(gradients)
            given = native_masks(spec, masks or {}, self._device)
            with given_dropout(model, given), _tapped(model, spec, layers, taps):
                loss = _loss(spec.layers[-1], model(inputs), targets)
            results |= {f"tap/{layer.path}": taps[layer.path].cpu().numpy() for layer in layers}
            results["loss"] = loss.detach().cpu().numpy()
            if training:
                buffers = dict(model.named_buffers())
                for layer in layers:
                    for name in layer.statistics:
                        results[f"stat/{name}"] = canonical(table[name], buffers[table[name].native]).copy()
            if gradients:
                wanted = [name for layer in layers for name in layer.parameters]
                of_input, *of_parameters = torch.autograd.grad(
                    loss, [inputs, *(parameters[table[name].native] for name in wanted)]
                )
                results["grad/input"] = of_input.permute(0, 2, 3, 1).cpu().numpy()
                for name, gradient in zip(wanted, of_parameters, strict=True):
                    results[f"grad/{name}"] = canonical(table[name], gradient)
        return results


def _loss(last: Layer, outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    if isinstance(outputs, tuple):
        output, *auxiliary = outputs
        loss = _loss(last, output, labels)
        for number, logits in enumerate(auxiliary, start=1):
            loss = loss + AUXILIARY_WEIGHT**number * F.cross_entropy(logits, labels)
        return loss
    output = outputs
    if last.kind == "softmax":
        return F.nll_loss(output.log(), labels)
    if last.kind == "dense":
        return F.cross_entropy(output, labels)
    return output.square().mean() / 2


@contextmanager
def _traceless(model: nn.Module) -> Iterator[None]:
    """Put the model's mode and buffers back at the end: a pass in training mode changes the running statistics."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _tapped(model: nn.Module, spec: Spec, layers: tuple[Layer, ...], taps: dict[str, Tensor]) -> Iterator[None]:
    """While the model runs, copy the output of each of these layers into `taps`, channels last.

    Raises `BackendError` if the model did not run a layer.
    """
    nodes = import_module(f"{__package__}.{spec.family}").nodes(spec)
    # Several may be found in one place: a map, and the same map flattened.
    wanted: dict[str, dict[tuple[int, str], list[tuple[Layer, Node]]]] = defaultdict(lambda: defaultdict(list))
    for layer in layers:
        node = nodes[layer.path]
        wanted[node.module][node.call, node.value].append((layer, node))
    with ExitStack() as hooks:
        for name, places in wanted.items():
            module, before, after = model.get_submodule(name), *_hooks(places, taps)
            hooks.callback(module.register_forward_pre_hook(before).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        yield
    if missed := [layer.path for layer in layers if layer.path not in taps]:
        raise BackendError(f"the model did not run {len(missed)} of {len(layers)} layers: {', '.join(missed[:4])}")


def _hooks(
    layers: "Mapping[tuple[int, str], list[tuple[Layer, Node]]]", taps: dict[str, Tensor]
) -> tuple[Callable[[Any, Any], None], Callable[[Any, Any, Any], None]]:
    """What to call before and after a module, which may be called several times."""
    calls = 0

    def keep(value: Tensor, side: str) -> None:
        for layer, node in layers.get((calls, side), ()):
            taps[layer.path] = _channels_last(value.detach(), layer, node)

    def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
        keep(inputs[0], "input")

    def after(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal calls
        keep(output, "output")
        calls += 1

    return before, after


def _channels_last(value: Tensor, layer: Layer, node: "Node") -> Tensor:
    if node.flattened is not None:
        height, width, channels = node.flattened
        value = value.unflatten(1, (channels, height, width))
    # A copy in any case: the next layer may work in place.
    if value.ndim == 4:
        value = value.permute(0, 2, 3, 1)
    value = value.clone(memory_format=torch.contiguous_format)
    pooled = isinstance(layer, GlobalPool) and not layer.keep
    return value.flatten(1) if pooled or layer.kind == "flatten" or node.flattened is not None else value
