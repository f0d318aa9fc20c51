"""Training in Keras: one functional model, compiled with the recipe's optimiser and loss, and `Model.fit`.

On TensorFlow and JAX. A checkpoint is a `.keras` archive of the compiled model, which any Keras opens that has imported
this package; to go on from one, the model is built from its spec and only arrays are read.
"""

import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np

import resnet_keras
from common import weights as canonical
from common.architectures import Spec
from common.errors import CheckpointError, TrainingError
from common.files import reason
from common.training import dropout
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Kept, Measured, Minibatch, Replica, loss_weights
from resnet_keras import distributed
from resnet_keras.layers import with_masks
from resnet_keras.loop import Evaluation, Feed, Steps, measured
from resnet_keras.objective import CrossEntropy, Tally
from resnet_keras.optimizers import SGD, AdamW
from resnet_keras.weights import in_canonical_order, layer_names, read, variables

_STATE = "state.keras"


class KerasTrainer:
    """The `Trainer` protocol. A float64 model on JAX has parts in float32, as Keras computes them there."""

    def __init__(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> None:
        """Raises `TrainingError` for a network without a classifier, and as `distributed.scope`."""
        self._loss_weights = loss_weights(spec, recipe)
        self._replica = replica
        self._dtype = dtype
        mixed = recipe.precision == "bfloat16" and dtype == "float32"
        self._policy = "mixed_bfloat16" if mixed else dtype
        self._set_types()
        # XLA makes a training step of ResNet-50 twice as long on TensorFlow's CPU; on JAX nothing goes without it.
        jit = keras.backend.backend() == "jax"
        with distributed.scope(recipe.batch_size):
            network = resnet_keras.from_spec(spec, kernel_initializer="zeros")
            self._dropout = tuple(layer.path for layer in dropout.layers(spec))
            self._model = with_masks(network, [layer_names(spec)[path] for path in self._dropout])
            self._model.spec = spec
            distributed.synchronise(self._model)
            self._optimizer = _optimizer(self._model, recipe)
            self._optimizer.build(self._model.trainable_variables)
            of_logits = spec.head == "logits"
            smooth, plain = CrossEntropy(of_logits, recipe.label_smoothing), CrossEntropy(of_logits)
            auxiliary = CrossEntropy(True, recipe.label_smoothing)
            count = len(self._loss_weights)
            losses = [smooth, *[auxiliary] * (count - 1)]
            tallies = [Tally(loss, output=output) for output, loss in enumerate(losses)]
            weights = list(self._loss_weights)
            self._model.compile(self._optimizer, losses, loss_weights=weights, metrics=tallies, jit_compile=jit)
            # The same layers, with what an evaluation measures.
            self._evaluator = keras.Model(network.input, network.outputs[0])
            self._evaluator.compile(loss=plain, metrics=[Tally(plain, of_all=True)], jit_compile=jit)

    def load(self, weights: canonical.Weights) -> None:
        with distributed.together(self._replica):
            resnet_keras.load_weights(self._synced(), weights)
            for variable in self._optimizer.variables:
                _set(variable, np.zeros(variable.shape))
            # Before the first step there is no average; until then the weights themselves stand for it.
            for average, variable in zip(self._optimizer.averages, self._model.trainable_variables, strict=False):
                _set(average, variable)

    def fit(self, batches: Iterable[Minibatch], after: Callable[[Measured], bool]) -> None:
        self._set_types()
        feed = Feed(batches, self._dropout, outputs=len(self._loss_weights))
        steps = Steps(
            self._model,
            feed,
            lambda found: distributed.agree(self._replica, after(found)),
            self._loss_weights,
        )
        with closing(feed), distributed.together(self._replica):
            if feed:
                self._model.fit(feed.examples(), shuffle=False, verbose=0, callbacks=[steps])
        if feed.error is not None and not steps.stopped:
            raise feed.error

    def evaluate(self, batches: Iterable[Minibatch], *, ema: bool = False) -> Measured:
        self._check_averaged(ema)
        self._set_types()
        self._synced()
        feed = Feed(batches)
        found = {"loss_sum": 0.0, "correct": 0, "count": 0}
        with closing(feed), distributed.together(self._replica), self._averaged() if ema else nullcontext():
            if feed:
                callbacks = [Evaluation(self._evaluator, feed)]
                found = self._evaluator.evaluate(feed.examples(), verbose=0, callbacks=callbacks, return_dict=True)
        if feed.error is not None:
            raise feed.error
        return measured(found)

    def save(self, folder: Path) -> None:
        model = self._synced()
        with distributed.together(self._replica), tempfile.TemporaryDirectory() as own:
            # Every process: what Keras puts on the devices meanwhile, JAX compares over all of them.
            model.save((folder if self._replica.rank == 0 else Path(own)) / _STATE)
            distributed.wait(self._replica)

    def restore(self, folder: Path) -> None:
        path = folder / _STATE
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                dtypes = set() if damaged else _dtypes(archive)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be read as an archive of Keras: {reason(error)}") from None
        if damaged:
            raise CheckpointError(f"{path}: {damaged} in it was changed after it was written")
        if dtypes != {self._dtype}:
            found = f"its arrays are {' and '.join(sorted(dtypes)) or 'none'}, expected {self._dtype}"
            raise CheckpointError(f"{path}: not the state of this training: {found}")
        try:
            with warnings.catch_warnings(), distributed.together(self._replica):
                warnings.simplefilter("error", UserWarning)  # all that Keras does where an optimiser's variables differ
                self._synced().load_weights(path)
        except (ValueError, UserWarning) as error:
            # Keras counts what failed, and then shows the first of them, at length.
            first = (str(error).split("\n\n")[1:2] or [str(error)])[0].splitlines()[0]
            found = first.partition(". ")[0].rstrip(". ")
            raise CheckpointError(f"{path}: not the state of this training: {found}") from None

    def export(self, *, ema: bool = False) -> canonical.Weights:
        self._check_averaged(ema)
        native = self._variables()
        averages = self._by_name(self._optimizer.averages) if ema else {}
        turned = in_canonical_order(self._model.spec)
        return {name: turned[name](_copied(averages.get(name, variable))) for name, variable in native.items()}

    def arrays(self, kept: Kept = np.array) -> dict[str, np.ndarray]:
        native = self._variables()
        parameters = self._by_name(self._model.trainable_variables)
        groups = {"param": parameters, "stat": {name: native[name] for name in native if name not in parameters}}
        groups |= {slot: self._by_name(found) for slot, found in self._optimizer.slots.items()}
        groups["ema"] = self._by_name(self._optimizer.averages)
        turned = in_canonical_order(self._model.spec)
        return {
            f"{group}/{name}": kept(turned[name](read(found[name])))
            for group, found in groups.items()
            for name in found
        }

    def _check_averaged(self, ema: bool) -> None:
        if ema and not self._optimizer.use_ema:
            raise TrainingError("there is no moving average of the weights; set ema_decay in the recipe")

    def _set_types(self) -> None:
        keras.config.set_floatx(self._dtype)  # of the loss, the learning rate and constants
        keras.config.set_dtype_policy(self._policy)  # of layers

    def _synced(self) -> keras.Model:
        """The model with its variables at their newest values: on JAX, `fit` keeps these apart while it works."""
        if keras.backend.backend() == "jax":
            self._model.jax_state_sync()
        return self._model

    def _variables(self) -> dict[str, Any]:
        return variables(self._synced())

    def _by_name(self, found: list[Any]) -> dict[str, Any]:
        """Variables that go with the trainable ones, one each or none at all, by canonical name."""
        names = {id(variable): name for name, variable in variables(self._model).items()}
        pairs = zip(self._model.trainable_variables, found, strict=False)
        return {names[id(variable)]: one for variable, one in pairs}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in the place of the weights, for as long as the block lasts."""
        pairs = list(zip(self._model.trainable_variables, self._optimizer.averages, strict=True))
        own = [_copied(variable) for variable, _ in pairs]
        try:
            for variable, average in pairs:
                _set(variable, average)
            yield
        finally:
            for (variable, _), value in zip(pairs, own, strict=True):
                _set(variable, value)


def _optimizer(model: keras.Model, recipe: TrainingRecipe) -> Any:
    decay = {"coupled": "coupled_decay", "decoupled": "weight_decay"}[recipe.decay]
    options: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        decay: recipe.weight_decay or None,
        "global_clipnorm": recipe.clip_norm,
        "use_ema": recipe.ema_decay is not None,
        "ema_momentum": recipe.ema_decay or 0.0,
    }
    optimizer = (
        SGD(momentum=recipe.momentum, nesterov=recipe.nesterov, **options)
        if recipe.optimizer == "sgd"
        else AdamW(beta_1=recipe.beta1, beta_2=recipe.beta2, epsilon=recipe.eps, **options)
    )
    if not recipe.decay_norms_and_biases:
        kernels = {id(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")}
        optimizer.exclude_from_weight_decay([v for v in model.trainable_variables if id(v) not in kernels])
    return optimizer


def _set(variable: Any, value: Any) -> None:
    # A copy always: JAX gives a variable's memory away at every step, and another one's must not go with it.
    variable.assign(keras.ops.array(value, dtype=variable.dtype))


def _copied(variable: Any) -> np.ndarray:
    return np.array(read(variable))  # training writes to the memory of which that may be a view


def _dtypes(archive: zipfile.ZipFile) -> set[str]:
    """The floating-point types of the arrays in an archive of Keras."""
    found: set[str] = set()

    def look(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
            found.add(item.dtype.name)

    with archive.open("model.weights.h5") as file, h5py.File(file, "r") as arrays:
        arrays.visititems(look)
    return found
