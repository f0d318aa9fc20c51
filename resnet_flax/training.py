"""Training in Flax: a `TrainState`, a chain of optax transformations, and one jitted step.

The step is the same for one device and for many: the state is replicated over a mesh of all devices of all processes,
the batch is split (resnet_flax/distributed.py). A checkpoint is the orbax folder of the state.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import weights as canonical
from common.architectures import Spec
from common.errors import CheckpointError, TrainingError
from common.training.recipe import TrainingRecipe, shared
from common.training.trainer import SINGLE, Kept, Measured, Minibatch, Replica, loss_weights
from common.weights import Weights
from resnet_flax import framework, from_spec

with framework():
    import jax
    import jax.numpy as jnp
    import optax  # type: ignore[import-untyped]
    from flax.serialization import from_state_dict, to_state_dict
    from flax.training import train_state
    from flax.traverse_util import flatten_dict, unflatten_dict

    from resnet_flax import checkpoints, distributed
    from resnet_flax.distributed import together
    from resnet_flax.layers import given_dropout, native_masks
    from resnet_flax.optimizers import MOMENTS, optimizer
    from resnet_flax.weights import from_collection, to_variables

# Of a step: images, labels, learning rate, and masks of dropout.
Arguments = tuple[jax.Array, jax.Array, jax.Array, dict[tuple[str, ...], jax.Array]]

FOLDER = "orbax"  # in the folder of a checkpoint, since orbax makes its own
_PADDING = -1  # the label of an example that an evaluation does not count


class TrainState(train_state.TrainState):
    """`ema` is the moving average of the parameters, or None."""

    batch_stats: Any
    ema: Any


def train_step(
    recipe: TrainingRecipe,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    learning_rate: jax.Array,
    masks: Mapping[tuple[str, ...], jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step on images (N, H, W, C) and labels (N,), and the step's ``loss`` and ``correct``.

    `masks` are those of every dropout, by the path of its module.
    """

    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        with given_dropout(masks):
            outputs, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        outputs = _at_least_float32(outputs)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, outputs[0].shape[-1], dtype=outputs[0].dtype), recipe.label_smoothing
        )
        losses = [optax.softmax_cross_entropy(logits, targets).mean() for logits in outputs]
        loss = sum(weight * loss for weight, loss in zip(recipe.loss_weights(len(losses)), losses, strict=True))
        return loss, (outputs[0], updates.get("batch_stats", {}))

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    opt_state = state.opt_state._replace(hyperparams={"learning_rate": learning_rate})
    after = state.replace(opt_state=opt_state).apply_gradients(grads=grads, batch_stats=batch_stats)
    if (decay := recipe.ema_decay) is not None:
        first = state.step == 0
        average = lambda a, p: jnp.where(first, p, decay * a + (1 - decay) * p)  # noqa: E731
        after = after.replace(ema=jax.tree.map(average, state.ema, after.params))
    return after, {"loss": loss, "correct": jnp.sum(jnp.argmax(logits, -1) == labels)}


def eval_step(
    apply_fn: Callable[..., Any], variables: Mapping[str, Any], images: jax.Array, labels: jax.Array
) -> dict[str, jax.Array]:
    """Sums over the examples that are no padding: of their ``loss``, of the ``correct`` ones, and their ``count``."""
    logits, *_ = _at_least_float32(apply_fn(variables, images, train=False))
    counted = labels != _PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    return {
        "loss": jnp.sum(jnp.where(counted, losses, 0)),
        "correct": jnp.sum(jnp.argmax(logits, -1) == labels),
        "count": jnp.sum(counted),
    }


class FlaxTrainer:
    """See `common.training.trainer.Trainer`.

    Raises `TrainingError` for a network without a classifier, `RecipeError` for batches that the devices cannot share.
    """

    def __init__(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> None:
        shared(recipe.batch_size, jax.device_count(), "devices")
        self._spec, self._recipe, self._replica = spec, recipe, replica
        self._dtype = np.dtype(dtype)
        narrow = recipe.precision == "bfloat16" and dtype == "float32"
        loss_weights(spec, recipe)  # or an error that says why not
        # Without a softmax at its end, which is left to the loss: there, no probability underflows.
        logits = spec.with_head(head="logits")
        module = from_spec(logits, dtype=jnp.bfloat16 if narrow else dtype, param_dtype=dtype)
        self._apply, self._optimizer = module.apply, optimizer(recipe)
        self._whole, self._split = distributed.shardings()
        self._step = jax.jit(
            partial(train_step, recipe),
            in_shardings=(self._whole, self._split, self._split, self._whole, self._split),
            out_shardings=self._whole,
            donate_argnums=0,
        )
        self._evaluate = jax.jit(
            partial(eval_step, module.apply),
            in_shardings=(self._whole, self._split, self._split),
            out_shardings=self._whole,
        )
        self._state: TrainState

    def load(self, weights: Weights) -> None:
        self._place(self._begun(weights))

    def fit(self, batches: Iterable[Minibatch], after: Callable[[Measured], bool]) -> None:
        with together(self._replica):
            ahead = map(self._arguments, batches)
            arguments, failure = _taken(ahead)
            while arguments is not None:
                self._state, measured = self._step(self._state, *arguments)
                count = len(arguments[1])
                arguments, failure = _taken(ahead)  # made ready while the devices work
                loss, correct = jax.device_get((measured["loss"], measured["correct"]))
                going = after(Measured(loss=float(loss), correct=int(correct), count=count))
                if not distributed.agree(self._replica, going):
                    return
            if failure is not None:
                raise failure

    def evaluate(self, batches: Iterable[Minibatch], *, ema: bool = False) -> Measured:
        variables = {"params": self._params(ema), "batch_stats": self._state.batch_stats}
        loss, correct, count = 0.0, 0, 0
        with together(self._replica):
            for batch in batches:
                images, labels = self._padded(batch)
                sums = jax.device_get(self._evaluate(variables, self._shared(images), self._shared(labels)))
                loss += float(sums["loss"])
                correct += int(sums["correct"])
                count += int(sums["count"])
        return Measured(loss=loss / max(count, 1), correct=correct, count=count)

    def save(self, folder: Path) -> None:
        failure: OSError | None = None
        if self._replica.rank == 0:
            try:
                checkpoints.write(folder / FOLDER, _arrays(self._state))
            except OSError as error:
                failure = error
        with together(self._replica):
            written = distributed.agree(self._replica, failure is None)
        if failure is not None:
            raise failure
        if not written:
            raise TrainingError(f"{folder}: process 0 could not write the checkpoint; its own output says why")

    def restore(self, folder: Path) -> None:
        path = folder / FOLDER
        state = self._begun({name: np.zeros(shape) for name, shape in canonical.shapes(self._spec).items()})
        found, expected = checkpoints.read(path, self._replica.rank), _arrays(state)
        names, wanted = (["/".join(name) for name in arrays] for arrays in (found, expected))
        canonical.check_names(f"{path}: not the state of this training", names, wanted, CheckpointError)
        for name, array in expected.items():
            if _described(found[name]) != _described(array):
                raise CheckpointError(
                    f"{path}: not the state of this training: {'/'.join(name)} is {_described(found[name])}, "
                    f"expected {_described(array)}"
                )
        everything = flatten_dict(to_state_dict(state), keep_empty_nodes=True) | found
        self._place(from_state_dict(state, unflatten_dict(everything)))

    def export(self, *, ema: bool = False) -> Weights:
        params, batch_stats = self._params(ema), self._state.batch_stats
        return self._named("params", params) | self._named("batch_stats", batch_stats)

    def arrays(self, kept: Kept = np.array) -> dict[str, np.ndarray]:
        state = self._state
        kinds = {"param": state.params} | ({} if state.ema is None else {"ema": state.ema})
        for native, kind in MOMENTS[self._recipe.optimizer].items():
            found = optax.tree_utils.tree_get(state.opt_state, native)
            kinds |= {} if found is None else {kind: found}
        named = {kind: self._named("params", tree, kept) for kind, tree in kinds.items()}
        named["stat"] = self._named("batch_stats", state.batch_stats, kept)
        return {f"{kind}/{name}": array for kind, arrays in named.items() for name, array in arrays.items()}

    def _begun(self, weights: Weights) -> TrainState:
        """Of weights, with an optimiser at zero."""
        variables = to_variables(self._spec, weights, self._dtype)
        params = variables["params"]
        state = TrainState.create(
            apply_fn=self._apply,
            params=params,
            tx=self._optimizer,
            batch_stats=variables.get("batch_stats", {}),
            # Before the first step there is no average; until then the weights themselves stand for it.
            ema=params if self._recipe.ema_decay is not None else None,
        )
        # Flax begins with a Python integer, for which the step would be compiled once more.
        return state.replace(step=jnp.zeros((), jnp.int32))

    def _place(self, state: TrainState) -> None:
        """Copied: a buffer that is donated to a step can neither be in the state twice nor belong to somebody else."""
        with together(self._replica):
            self._state = jax.device_put(jax.tree.map(jnp.array, state), self._whole)

    def _params(self, ema: bool) -> Any:
        if not ema:
            return self._state.params
        if self._state.ema is None:
            raise TrainingError("there is no moving average of the weights; set ema_decay in the recipe")
        return self._state.ema

    def _named(self, collection: str, tree: Any, kept: Kept = np.array) -> dict[str, np.ndarray]:
        """Copies: the next step takes the buffers."""
        return {name: kept(array) for name, array in from_collection(self._spec, collection, tree).items()}

    def _arguments(self, batch: Minibatch) -> Arguments:
        rate = np.asarray(batch.learning_rate, self._dtype)
        masks = {path: self._shared(mask) for path, mask in native_masks(self._spec, batch.masks).items()}
        return self._shared(batch.images), self._shared(batch.labels), jax.device_put(rate, self._whole), masks

    def _shared(self, array: np.ndarray) -> jax.Array:
        """This process's part of an array that all devices share. Copied: a pipeline may use its memory again."""
        return jax.make_array_from_process_local_data(self._split, array.copy())

    def _padded(self, batch: Minibatch) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels, filled up so that the devices can share them."""
        missing = -len(batch.labels) % jax.local_device_count()
        images = np.pad(batch.images, [(0, missing), (0, 0), (0, 0), (0, 0)])
        return images, np.pad(batch.labels, (0, missing), constant_values=_PADDING)


def _taken(ahead: Iterator[Arguments]) -> tuple[Arguments | None, Exception | None]:
    """The next of `ahead`, or the error in its place, which is for after the step before."""
    try:
        return next(ahead, None), None
    except Exception as error:
        return None, error


def _at_least_float32(outputs: jax.Array | tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The logits of every output: of bfloat16 a logarithm would leave too little."""
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) for logits in found)


def _arrays(state: TrainState) -> dict[tuple[str, ...], np.ndarray]:
    """Every array that the next step depends on, by its path in the state, as it is, not copied."""
    flat = flatten_dict(to_state_dict(state))
    return {path: np.asarray(leaf) for path, leaf in flat.items() if leaf is not None}


def _described(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
