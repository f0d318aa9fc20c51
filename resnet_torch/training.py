"""Training in PyTorch: a plain loop over the batches, around PyTorch's own optimisers.

Several processes train one network together with what resnet_torch/distributed.py adds.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from common.architectures import Spec, output
from common.errors import CheckpointError, TrainingError
from common.files import reason
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Kept, Measured, Minibatch, Replica, loss_weights
from common.weights import Weights, check_names
from resnet_torch import framework, from_spec

with framework():
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from resnet_torch import distributed, optimizers
    from resnet_torch.distributed import together
    from resnet_torch.layers import given_dropout, native_masks, nodes
    from resnet_torch.weights import Slot, canonical, load_weights, slots

FILE = "state.pt"
_PADDING = -1  # the label of an example that an evaluation does not count


class TorchTrainer:
    """See `common.training.trainer.Trainer`. Raises `TrainingError` for a network without a classifier."""

    def __init__(
        self, spec: Spec, recipe: TrainingRecipe, dtype: str, device: torch.device, replica: Replica = SINGLE
    ) -> None:
        self._spec, self._recipe, self._device, self._replica = spec, recipe, device, replica
        self._dtype = {"float32": torch.float32, "float64": torch.float64}[dtype]
        self._mixed = recipe.precision == "bfloat16" and dtype == "float32"
        # Convolutions of float32 and bfloat16 work in this layout and would reorder from the other; float64 has no such
        # kernel, nor can FSDP spread parameters laid out like this.
        sharded = distributed.sharding(replica)
        self._layout = torch.channels_last if dtype == "float32" and not sharded else torch.contiguous_format

        self._loss_weights = loss_weights(spec, recipe)
        self._model = _logits(from_spec(spec), spec).to(device, self._dtype)
        self._model.to(memory_format=self._layout)  # type: ignore[call-overload]
        if replica.count > 1:
            distributed.synchronise(self._model, device)
        self._average = None
        if recipe.ema_decay is not None:
            self._average = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        with together(replica):
            if sharded and self._average is not None:
                distributed.parallel(self._average.module, spec, replica, device)
            self._parallel = distributed.parallel(self._model, spec, replica, device)
        self._optimizer = optimizers.make(self._model, spec, recipe, fused=None if sharded else True)

    def load(self, weights: Weights) -> None:
        plain = from_spec(self._spec).to(self._dtype)
        load_weights(plain, weights)
        with torch.no_grad():
            given = plain.state_dict()
            for model in (self._model, *([self._average.module] if self._average is not None else [])):
                for name, tensor in model.state_dict().items():
                    distributed.assign(tensor, given[name])
            for name, tensor in self._state().items():
                if not name.startswith("model/") and "/module." not in name:
                    tensor.zero_()
        torch.manual_seed(self._recipe.seed)  # of whatever a family draws while it trains

    def fit(self, batches: Iterable[Minibatch], after: Callable[[Measured], bool]) -> None:
        self._parallel.train()
        with together(self._replica):
            for batch in batches:
                measured = self._step(batch)
                if not distributed.agree(self._replica, after(measured), self._device):
                    break

    def evaluate(self, batches: Iterable[Minibatch], *, ema: bool = False) -> Measured:
        model = self._averaged() if ema else self._model
        totals = torch.zeros(3, dtype=torch.float64)
        training = model.training
        model.eval()
        try:
            with together(self._replica), torch.no_grad():
                for batch in batches:
                    images, labels = self._tensors(batch)
                    output, *_ = self._forward(model, images)
                    loss = F.cross_entropy(output, labels, ignore_index=_PADDING, reduction="sum")
                    correct = output.argmax(1).eq(labels).sum()
                    totals += torch.stack([loss, correct, labels.ne(_PADDING).sum()]).cpu()
                loss, correct, count = distributed.total(self._replica, totals.to(self._device)).tolist()
        finally:
            model.train(training)
        return Measured(loss=loss / max(count, 1), correct=int(correct), count=int(count))

    def save(self, folder: Path) -> None:
        failure: OSError | None = None
        with together(self._replica):
            tensors = {name: distributed.whole(tensor) for name, tensor in self._state().items()}
            tensors["random/cpu"] = torch.get_rng_state()
            if self._device.type == "cuda":
                tensors["random/cuda"] = torch.cuda.get_rng_state()
            if self._replica.rank == 0:
                try:
                    _write(folder / FILE, tensors)
                except OSError as error:
                    failure = error
            written = distributed.agree(self._replica, failure is None, self._device)
        if failure:
            raise failure
        if not written:
            raise TrainingError(f"{folder}: process 0 could not write the checkpoint; its own output says why")

    def restore(self, folder: Path) -> None:
        path = folder / FILE
        found, live = _read(path), self._state()
        of_gpu = found.pop("random/cuda", None)
        expected = live | {"random/cpu": torch.get_rng_state()}
        check_names(f"{path}: not the state of this training", found, expected, CheckpointError)
        for name, tensor in expected.items():
            if (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{path}: not the state of this training: {name} is {_described(found[name])}, "
                    f"expected {_described(tensor)}"
                )
        with torch.no_grad():
            # In place: the layout of an optimiser's tensors must stay that of the parameters.
            for name, tensor in live.items():
                distributed.assign(tensor, found[name])
        torch.set_rng_state(found["random/cpu"])
        if of_gpu is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(of_gpu)

    def export(self, *, ema: bool = False) -> Weights:
        state = (self._averaged() if ema else self._model).state_dict()
        with together(self._replica):
            return {name: _array(slot, state[slot.native]).copy() for name, slot in slots(self._spec).items()}

    def arrays(self, kept: Kept = np.array) -> dict[str, np.ndarray]:
        table, parameters = slots(self._spec), dict(self._model.named_parameters())
        kinds: dict[str, Mapping[str, Tensor]] = {"param": parameters}
        for key, kind in optimizers.MOMENTS[self._recipe.optimizer].items():
            state = self._optimizer.state
            kinds[kind] = {name: state[p][key] for name, p in parameters.items() if key in state[p]}
        if self._average is not None:
            kinds["ema"] = dict(self._average.module.named_parameters())
        kinds["stat"] = dict(self._model.named_buffers())
        with together(self._replica):
            return {
                f"{kind}/{name}": kept(_array(slot, tensors[slot.native]))
                for kind, tensors in kinds.items()
                for name, slot in table.items()
                if slot.native in tensors
            }

    def _step(self, batch: Minibatch) -> Measured:
        for group in self._optimizer.param_groups:
            group["lr"] = batch.learning_rate
        images, labels = self._tensors(batch)
        with given_dropout(self._model, native_masks(self._spec, batch.masks, self._device)):
            outputs = self._forward(self._parallel, images)
        loss = torch.zeros((), dtype=self._dtype, device=self._device)
        for weight, logits in zip(self._loss_weights, outputs, strict=True):
            loss = loss + weight * F.cross_entropy(logits, labels, label_smoothing=self._recipe.label_smoothing)
        loss.backward()
        if self._recipe.clip_norm is not None:
            optimizers.clip(self._model, self._recipe.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._average is not None:
            self._average.update_parameters(self._model)
        correct = outputs[0].argmax(1).eq(labels).sum()
        totals = distributed.total(self._replica, torch.stack([loss.detach().double(), correct.double()]))
        losses, right = totals.tolist()
        count = self._replica.count
        return Measured(loss=losses / count, correct=int(right), count=len(labels) * count)

    def _tensors(self, batch: Minibatch) -> tuple[Tensor, Tensor]:
        # Copied, since arrays of a pipeline may be shared memory, and read-only.
        images = torch.tensor(batch.images, dtype=self._dtype, device=self._device).permute(0, 3, 1, 2)
        labels = torch.tensor(batch.labels, dtype=torch.int64, device=self._device)
        return images.contiguous(memory_format=self._layout), labels

    def _forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """Logits, (N, classes), in the dtype of the parameters: the network's, then those of its auxiliary outputs."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed):
            found: Tensor | tuple[Tensor, ...] = model(images)
        outputs = (found,) if isinstance(found, Tensor) else found
        return tuple(logits.to(self._dtype) for logits in outputs)

    def _averaged(self) -> nn.Module:
        if self._average is None:
            raise TrainingError("there is no moving average of the weights; set ema_decay in the recipe")
        return self._average.module

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, as it is used, not copied; the random numbers are apart."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._model.named_parameters()}
        state = {f"model/{name}": tensor for name, tensor in self._model.state_dict().items()}
        for parameter, kept in self._optimizer.state.items():
            state |= {f"optimizer/{names[parameter]}/{key}": tensor for key, tensor in kept.items()}
        if self._average is not None:
            state |= {f"average/{name}": tensor for name, tensor in self._average.state_dict().items()}
        return state


def _logits(model: nn.Module, spec: Spec) -> nn.Module:
    """The model without a softmax at its end, which is left to the loss: there, no probability underflows."""
    if spec.head == "softmax":
        model.set_submodule(nodes(spec)[output(spec).path].module, nn.Identity())
    return model


def _array(slot: Slot, tensor: Tensor) -> np.ndarray:
    return canonical(slot, distributed.whole(tensor))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises `OSError`, a full disk included."""
    try:
        with path.open("wb") as file:
            torch.save(dict(tensors), file)
    except RuntimeError as error:
        # PyTorch's writer says only where it was when the system refused.
        raise (error.__context__ if isinstance(error.__context__, OSError) else OSError(reason(error))) from None


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with ZipFile(path) as archive:  # PyTorch writes checksums, and reads over them
            if changed := archive.testzip():
                raise CheckpointError(f"{path}: damaged: {changed} was changed after it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from None
    except Exception as error:  # whatever damaged bytes make the reader stumble over
        raise CheckpointError(f"{path}: damaged, or not written by PyTorch: {reason(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not the state of a training: expected a table of tensors")
    return state


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
