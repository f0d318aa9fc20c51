"""The Backend protocol for Keras: the columns `keras:tensorflow`, `keras:jax` and `keras:torch` are this one file.

Taps come from a functional model of every layer's output. A pass is a stateless call, so that no running statistic of
one run is left for the next; the gradients are the framework's own, by the three adapters at the end. TensorFlow and
PyTorch run eagerly, since a process makes a pass a few times only and tracing costs more than that; JAX compiles the
whole pass, since eagerly it compiles every operation for every shape, which takes longer.
"""

import importlib.metadata
import logging
import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

import resnet_keras
from common import names
from common import weights as canonical
from common.architectures import Spec, outputs, running
from common.backends.protocol import AUXILIARY_WEIGHT
from common.names import Naming
from common.training import dropout
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Replica, Trainer

Tensors = dict[str, Any]
# A function of (parameters, images, running statistics, labels, masks of dropout) that returns the loss and (taps, new
# statistics).
Forward = Callable[[Tensors, Any, Tensors, Any, Sequence[Any]], tuple[Any, Any]]
# The same with the slopes of the loss in the first two arguments added to what it returns, or None.
Pass = Callable[[Tensors, Any, Tensors, Any, Sequence[Any]], tuple[Any, Any, Any]]


def start(threads: int) -> "KerasBackend":
    """Import Keras on the backend that KERAS_BACKEND names (tensorflow if unset), with so many threads.

    Raises `BackendMissing` where Keras or that framework is not installed.
    """
    framework = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # All of these are read once, when the framework is first imported or used.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if framework == "jax":
        # Without the last, XLA may leave out a rounding to float32 that Keras asked for.
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        flags += " --xla_allow_excess_precision=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["NPROC"] = str(threads)
    resnet_keras.stage_outputs  # noqa: B018  imports Keras, or says what is missing
    device = _CONFIGURE[framework](threads)
    return KerasBackend(framework, threads, device)


def _configure_tensorflow(threads: int) -> str:
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices())[0].device_type.lower()


def _configure_jax(threads: int) -> str:
    import jax

    jax.config.update("jax_enable_x64", True)
    return str(jax.devices()[0].platform)


def _configure_torch(threads: int) -> str:
    import torch

    torch.set_num_threads(threads)
    return str(torch.empty(0, device=torch.get_default_device()).device.type)


_CONFIGURE = {"tensorflow": _configure_tensorflow, "jax": _configure_jax, "torch": _configure_torch}


class KerasBackend:
    """Keras on one of its backends; models are Keras models with a `spec`."""

    def __init__(self, framework: str, threads: int, device: str) -> None:
        self._framework = framework
        self._threads = threads
        self._device = device
        self._adapter = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[framework]
        # What was compiled for a model goes with the model.
        self._passes: WeakKeyDictionary[Any, dict[tuple[bool, bool], Pass]] = WeakKeyDictionary()

    def describe(self) -> dict[str, str]:
        packages = ["keras", self._framework, *(["jaxlib"] if self._framework == "jax" else []), "numpy"]
        return {name: importlib.metadata.version(name) for name in packages} | {
            "python": platform.python_version(),
            "keras backend": self._framework,
            "device": self._device,
            "threads": str(self._threads),
        }

    def build(self, spec: Spec, dtype: str) -> Any:
        _set_dtype(dtype)
        # Weights are always loaded; on jax, random ones cost a compilation for every shape.
        return resnet_keras.from_spec(spec, kernel_initializer="zeros")

    def native(self, model: Any) -> Any:
        return model

    def load(self, model: Any, weights: canonical.Weights) -> None:
        resnet_keras.load_weights(model, weights)

    def export(self, model: Any) -> canonical.Weights:
        return resnet_keras.export_weights(model)

    def save(self, spec: Spec, weights: canonical.Weights, path: Path) -> None:
        """A ``.keras`` archive. The naming stands before the end of its name, as in ``x.keras_applications.keras``."""
        dtypes = {weights[name].dtype for name in weights}
        model = self.build(spec, str(np.result_type(*dtypes)))
        self.load(model, weights)
        _renamed(model, spec, names.find(spec.family, path.stem.rpartition(".")[2])).save(path)

    def trainer(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> Trainer:
        from resnet_keras.training import KerasTrainer

        return KerasTrainer(spec, recipe, dtype, replica)

    def run(
        self,
        model: Any,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        training: bool,
        gradients: bool,
        masks: Masks | None = None,
    ) -> dict[str, np.ndarray]:
        import keras

        from resnet_keras.weights import in_canonical_order, variables

        dtype = model.dtype_policy.compute_dtype
        _set_dtype(dtype)
        passes = self._passes.setdefault(model, {})
        if (training, gradients) not in passes:
            passes[training, gradients] = self._pass(model, training, gradients)
        forward = passes[training, gradients]
        native = variables(model)
        layers = running(model.spec, training)
        kept = {name for layer in layers for name in layer.statistics}
        # Copies or detached views of the values, which nothing in the pass assigns to.
        values = {name: keras.ops.stop_gradient(native[name]) for layer in layers for name in layer.arrays}
        given = [(masks or {})[layer.path] for layer in dropout.layers(model.spec)] if training else []
        loss, (taps, after), slopes = forward(
            {name: value for name, value in values.items() if name not in kept},
            keras.ops.convert_to_tensor(images, dtype=dtype),
            {name: value for name, value in values.items() if name in kept},
            keras.ops.convert_to_tensor(labels, dtype="int32"),
            [keras.ops.convert_to_tensor(mask) for mask in given],
        )
        result = {f"tap/{path}": _array(tap) for path, tap in taps.items()} | {"loss": _array(loss)}
        if training:
            result |= {f"stat/{name}": _array(after[name]) for name in values if name in kept}
        if gradients:
            of_parameters, of_images = slopes
            turned = in_canonical_order(model.spec)
            trained = (name for name in values if name not in kept)
            result |= {f"grad/{name}": turned[name](_array(of_parameters[name])) for name in trained}
            result["grad/input"] = _array(of_images)
        return result

    def _pass(self, model: Any, training: bool, gradients: bool) -> Pass:
        import keras

        from resnet_keras.layers import with_masks
        from resnet_keras.weights import layer_names, variables

        spec: Spec = model.spec
        names = layer_names(spec)
        masked = [names[layer.path] for layer in dropout.layers(spec) if training]
        taps_model = with_masks(keras.Model(model.input, _taps(model, spec, training)), masked)
        canonical_names = {id(variable): name for name, variable in variables(model).items()}
        trained = [canonical_names[id(variable)] for variable in taps_model.trainable_variables]
        # Keras' own dropout has the state of its random numbers, which has no name and, in eval mode, no use. Arrays of
        # layers that do not run have no value here.
        frozen = [(canonical_names.get(id(one)), one) for one in taps_model.non_trainable_variables]
        last, *auxiliary = outputs(spec, training)
        kind = spec.layers[-1].kind

        def forward(
            parameters: Tensors, images: Any, statistics: Tensors, labels: Any, masks: Sequence[Any]
        ) -> tuple[Any, Any]:
            values = parameters | statistics
            taps, after = taps_model.stateless_call(
                [values[name] for name in trained],
                [values[name] if name and name in values else one.value for name, one in frozen],
                (images, *masks) if masks else images,
                training=training,
            )
            named = {name: value for (name, _), value in zip(frozen, after, strict=True) if name}
            loss = _loss(kind, taps[last], labels)
            for number, path in enumerate(auxiliary, start=1):
                loss += AUXILIARY_WEIGHT**number * _loss("dense", taps[path], labels)
            return loss, (taps, named)

        return self._adapter(forward, gradients)


def _taps(model: Any, spec: Spec, training: bool) -> dict[str, Any]:
    """The symbolic output of every layer that runs in a mode, by canonical path."""
    from resnet_keras.weights import layer_names

    names = layer_names(spec)
    again = {names[layer.path] for layer in spec.layers if layer.shares}
    calls: Counter[str] = Counter()
    taps = {}
    for path, name in ((layer.path, names[layer.path]) for layer in running(spec, training)):
        layer = model.get_layer(name)
        # A layer that was called twice has no one output, and Keras no public way to either.
        taps[path] = layer._inbound_nodes[calls[name]].output_tensors[0] if name in again else layer.output
        calls[name] += 1
    return taps


def _renamed(model: Any, spec: Spec, naming: Naming) -> Any:
    """The same model with a naming's layer names. A Keras layer keeps its name, so it is another one."""
    import keras

    from resnet_keras.weights import layer_names

    own, wanted = layer_names(spec), naming.layers(spec)
    if own == wanted:
        return model
    table = {native: wanted[path] for path, native in own.items()}

    def rename(layer: Any) -> Any:
        base, _, suffix = layer.name.rpartition("_")
        # Padding and such stands before a layer of the walk and is named after it.
        name = table.get(layer.name) or (f"{table[base]}_{suffix}" if base in table else layer.name)
        return type(layer).from_config(layer.get_config() | {"name": name})

    twin = keras.models.clone_model(model, clone_function=rename)
    for target, source in zip(twin.variables, model.variables, strict=True):
        target.assign(source)
    return twin


def _set_dtype(dtype: str) -> None:
    import keras

    keras.config.set_floatx(dtype)  # of losses and of constants
    keras.config.set_dtype_policy(dtype)  # of layers


def _loss(kind: str, outputs: Any, labels: Any) -> Any:
    import keras
    from keras import ops

    if kind == "dense":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, outputs)
    if kind == "softmax":
        # Keras' own loss of probabilities clips them, and so is another function where one is small.
        likelihood = ops.take_along_axis(outputs, ops.expand_dims(labels, 1), axis=1)
        return -ops.mean(ops.log(likelihood))
    return ops.mean(ops.square(outputs)) / 2


def _array(tensor: Any) -> np.ndarray:
    import keras

    return keras.ops.convert_to_numpy(tensor)


def _tensorflow(forward: Forward, gradients: bool) -> Pass:
    import tensorflow as tf

    def run(parameters: Tensors, images: Any, *rest: Any) -> tuple[Any, Any, Any]:
        if not gradients:
            return *forward(parameters, images, *rest), None
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch((parameters, images))
            loss, aux = forward(parameters, images, *rest)
        return loss, aux, tape.gradient(loss, (parameters, images))

    return run


def _jax(forward: Forward, gradients: bool) -> Pass:
    import jax

    if not gradients:
        return jax.jit(lambda *arguments: (*forward(*arguments), None))
    compiled = jax.jit(jax.value_and_grad(forward, argnums=(0, 1), has_aux=True))

    def run(*arguments: Any) -> tuple[Any, Any, Any]:
        (loss, aux), slopes = compiled(*arguments)
        return loss, aux, slopes

    return run


def _torch(forward: Forward, gradients: bool) -> Pass:
    import torch

    def run(parameters: Tensors, images: Any, *rest: Any) -> tuple[Any, Any, Any]:
        if not gradients:
            with torch.no_grad():
                return *forward(parameters, images, *rest), None
        parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        images = images.detach().requires_grad_()
        loss, aux = forward(parameters, images, *rest)
        *of_parameters, of_images = torch.autograd.grad(loss, [*parameters.values(), images])
        return loss, aux, (dict(zip(parameters, of_parameters, strict=True)), of_images)

    return run
