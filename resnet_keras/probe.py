"""The Backend protocol for Keras: the columns `keras:tensorflow`, `keras:jax` and `keras:torch` are this one file.

Taps come from a functional model of every layer's output. A pass is a stateless call, so that no running statistic of
one run is left for the next; the gradients are the framework's own, by the three adapters at the end. Everything runs
eagerly: a process makes a pass a few times only, and tracing or compiling the model costs more than that.
"""

import importlib.metadata
import logging
import os
import platform
from collections.abc import Callable
from typing import Any

import numpy as np

import resnet_keras
from common import weights as canonical
from common.architectures import Spec

# A function of (trainable values, images) that returns the loss and whatever else the pass computed.
Forward = Callable[[list[Any], Any], tuple[Any, Any]]


def start(threads: int) -> "KerasBackend":
    """Import Keras on the backend that KERAS_BACKEND names (tensorflow if unset), with so many threads.

    Raises `BackendMissing` where Keras or that framework is not installed.
    """
    framework = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # All of these are read once, when the framework is first imported or used.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if framework == "jax":
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        os.environ["NPROC"] = str(threads)
    resnet_keras.stage_outputs  # noqa: B018  imports Keras, or says what is missing
    _configure[framework](threads)
    return KerasBackend(framework, threads)


def _configure_tensorflow(threads: int) -> None:
    import tensorflow as tf

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def _configure_jax(threads: int) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def _configure_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


_configure = {"tensorflow": _configure_tensorflow, "jax": _configure_jax, "torch": _configure_torch}


class KerasBackend:
    """Keras on one of its backends; models are Keras models with a `spec`."""

    def __init__(self, framework: str, threads: int) -> None:
        self._framework = framework
        self._threads = threads
        self._with_gradients = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[framework]

    def describe(self) -> dict[str, str]:
        packages = ["keras", self._framework, *(["jaxlib"] if self._framework == "jax" else []), "numpy"]
        return {name: importlib.metadata.version(name) for name in packages} | {
            "python": platform.python_version(),
            "keras backend": self._framework,
            "device": _device(),
            "threads": str(self._threads),
        }

    def build(self, spec: Spec, dtype: str) -> Any:
        _set_dtype(dtype)
        return resnet_keras.from_spec(spec)

    def load(self, model: Any, weights: canonical.Weights) -> None:
        resnet_keras.load_weights(model, weights)

    def export(self, model: Any) -> canonical.Weights:
        return resnet_keras.export_weights(model)

    def run(
        self, model: Any, images: np.ndarray, labels: np.ndarray, *, training: bool, gradients: bool
    ) -> dict[str, np.ndarray]:
        import keras

        from resnet_keras.weights import layer_names, variables

        spec: Spec = model.spec
        dtype = model.dtype_policy.compute_dtype
        _set_dtype(dtype)
        names = layer_names(spec)
        outputs = {layer.path: model.get_layer(names[layer.path]).output for layer in spec.layers}
        taps_model = keras.Model(model.inputs, outputs)
        last = spec.layers[-1]
        targets = keras.ops.convert_to_tensor(labels, dtype="int32")
        statistics = [keras.ops.convert_to_tensor(v) for v in taps_model.non_trainable_variables]

        def forward(trainable: list[Any], batch: Any) -> tuple[Any, Any]:
            taps, after = taps_model.stateless_call(trainable, statistics, batch, training=training)
            return _loss(last.kind, taps[last.path], targets), (taps, after)

        trainable = [keras.ops.convert_to_tensor(v) for v in taps_model.trainable_variables]
        batch = keras.ops.convert_to_tensor(images, dtype=dtype)
        run = self._with_gradients if gradients else _WITHOUT_GRADIENTS.get(self._framework, _forward_only)
        loss, (taps, after), slopes = run(forward, trainable, batch)

        result = {f"tap/{layer.path}": _array(taps[layer.path]) for layer in spec.layers}
        result["loss"] = _array(loss)
        native = {id(variable): name for name, variable in variables(model).items()}
        if training:
            for variable, value in zip(taps_model.non_trainable_variables, after, strict=True):
                result[f"stat/{native[id(variable)]}"] = _array(value)
        if gradients:
            of_parameters, of_images = slopes
            for variable, value in zip(taps_model.trainable_variables, of_parameters, strict=True):
                result[f"grad/{native[id(variable)]}"] = _array(value)
            result["grad/input"] = _array(of_images)
        return result


def _set_dtype(dtype: str) -> None:
    import keras

    keras.config.set_floatx(dtype)  # of losses and of constants
    keras.config.set_dtype_policy(dtype)  # of layers


def _device() -> str:
    import keras

    return ", ".join(keras.distribution.list_devices()) or "cpu"


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


def _forward_only(forward: Forward, trainable: list[Any], images: Any) -> tuple[Any, Any, None]:
    return *forward(trainable, images), None


def _tensorflow(forward: Forward, trainable: list[Any], images: Any) -> tuple[Any, Any, Any]:
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch((trainable, images))
        loss, aux = forward(trainable, images)
    return loss, aux, tape.gradient(loss, (trainable, images))


def _jax(forward: Forward, trainable: list[Any], images: Any) -> tuple[Any, Any, Any]:
    import jax

    (loss, aux), slopes = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)(trainable, images)
    return loss, aux, slopes


def _torch(forward: Forward, trainable: list[Any], images: Any) -> tuple[Any, Any, Any]:
    import torch

    leaves = [value.detach().requires_grad_() for value in (*trainable, images)]
    loss, aux = forward(leaves[:-1], leaves[-1])
    *of_parameters, of_images = torch.autograd.grad(loss, leaves)
    return loss, aux, (of_parameters, of_images)


def _torch_forward_only(forward: Forward, trainable: list[Any], images: Any) -> tuple[Any, Any, None]:
    import torch

    with torch.no_grad():
        return _forward_only(forward, trainable, images)


_WITHOUT_GRADIENTS = {"torch": _torch_forward_only}
