"""Runs a Flax model and records every layer: the Backend protocol of common/backend.py.

JAX reads its environment when it first uses a device, so this module imports neither JAX nor Flax before `start`.
"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from common.architectures import Spec
from common.errors import BackendError, WeightsError
from common.weights import Weights

if TYPE_CHECKING:
    from flax import linen as nn


@dataclass(kw_only=True)
class Model:
    """A module and its variables, which linen keeps apart."""

    spec: Spec
    dtype: str
    module: "nn.Module"
    variables: dict[str, Any]


class FlaxBackend:
    """One process's JAX. Made by `start`, which sets the global state it relies on."""

    def describe(self) -> dict[str, str]:
        import jax

        device = jax.devices()[0]
        versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
        # XLA calls every processor "cpu"; on others the kind says what they are.
        name = platform.machine() if device.platform == "cpu" else device.device_kind
        return versions | {"python": platform.python_version(), "device": f"{device.platform} {name}"}

    def build(self, spec: Spec, dtype: str) -> Model:
        import jax

        import resnet_flax

        module = resnet_flax.from_spec(spec, dtype=dtype, param_dtype=dtype)
        size = spec.input_size or (4 * spec.output_stride,) * 2
        images = jax.ShapeDtypeStruct((1, *size, spec.in_channels), dtype)
        # Shapes only: `load` sets every value, and initialising in vain would cost as much as the rest.
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        return Model(spec=spec, dtype=dtype, module=module, variables=variables)

    def load(self, model: Model, weights: Weights) -> None:
        import jax

        from resnet_flax.weights import to_variables

        variables = to_variables(model.spec, weights, model.dtype)
        # `apply` ignores variables that no layer reads; the module itself says which it has.
        native, loaded = (
            _described(jax.tree_util.tree_leaves_with_path(tree)) for tree in (model.variables, variables)
        )
        if native != loaded:
            wrong = ", ".join(sorted(name for name, _, _ in native ^ loaded)[:4])
            raise WeightsError(f"the module's variables are not those of its name table: {wrong}")
        model.variables = variables

    def export(self, model: Model) -> Weights:
        from resnet_flax.weights import from_variables

        return from_variables(model.spec, model.variables)

    def run(
        self, model: Model, images: np.ndarray, labels: np.ndarray, *, training: bool, gradients: bool
    ) -> dict[str, np.ndarray]:
        import jax
        import jax.numpy as jnp
        from flax import linen as nn

        from resnet_flax.weights import from_collection

        def is_layer(module: nn.Module, method: str) -> bool:
            return method == "__call__" and isinstance(module, nn.Conv | nn.BatchNorm | nn.Dense)

        def forward(params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
            output, state = model.module.apply(
                model.variables | {"params": params},
                x,
                train=training,
                mutable=["intermediates", "taps"] + ["batch_stats"] * training,
                capture_intermediates=is_layer,
            )
            return _loss(model.spec, output, jnp.asarray(labels)), state

        # Not compiled as a whole: a layer's operations are compiled once for each shape, which blocks, depths and
        # repeated runs share, where the whole program is compiled anew for every depth and mode.
        params, x = model.variables["params"], jnp.asarray(images, model.dtype)
        if gradients:
            (loss, state), (grads, grad_input) = jax.value_and_grad(forward, (0, 1), has_aux=True)(params, x)
        else:
            loss, state = forward(params, x)

        arrays = {"loss": np.asarray(loss)} | _taps(model.spec, state)
        if training and "batch_stats" in state:
            statistics = from_collection(model.spec, "batch_stats", state["batch_stats"])
            arrays |= {f"stat/{name}": array for name, array in statistics.items()}
        if gradients:
            arrays |= {f"grad/{name}": array for name, array in from_collection(model.spec, "params", grads).items()}
            arrays["grad/input"] = np.asarray(grad_input)
        return arrays


def start(threads: int) -> FlaxBackend:
    """Set the state of this process's JAX, which it must not have used before: `threads`, precision, device.

    ``RESNET_PARITY_DEVICE`` chooses the device by JAX's name of its platform (cpu, the default, cuda, rocm, tpu).
    Raises `BackendError` where that device cannot be used, `BackendMissing` where JAX is not installed.
    """
    # XLA makes its thread pool as large as NPROC says. The other flag keeps one operation in one thread.
    os.environ["NPROC"] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    from resnet_flax import _load

    _load("weights")
    import jax

    device = os.environ.get("RESNET_PARITY_DEVICE", "cpu")
    jax.config.update("jax_platforms", device)
    jax.config.update("jax_enable_x64", True)
    # Without it a GPU multiplies float32 in TF32, and a TPU in bfloat16.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        jax.devices()
    except RuntimeError as error:
        raise BackendError(f"JAX cannot use RESNET_PARITY_DEVICE={device}: {str(error).splitlines()[0]}") from None
    return FlaxBackend()


def _loss(spec: Spec, output: Any, labels: Any) -> Any:
    import jax
    import jax.numpy as jnp

    last = spec.layers[-1].kind
    if last not in ("dense", "softmax"):
        return 0.5 * jnp.mean(output**2)
    log_likelihood = jnp.log(output) if last == "softmax" else jax.nn.log_softmax(output)
    return -jnp.mean(jnp.take_along_axis(log_likelihood, labels[:, None], axis=1))


def _taps(spec: Spec, state: dict[str, Any]) -> dict[str, np.ndarray]:
    from importlib import import_module

    arrays = {}
    for path, native in import_module(f"{__package__}.{spec.family}").native_paths(spec).items():
        # A module's outputs stand under "__call__"; what is no module was sown under its own name.
        is_module = native[-1] not in _at(state.get("taps", {}), native[:-1])
        found = _at(state["intermediates"], native)["__call__"] if is_module else _at(state["taps"], native)
        # Where a subclass calls its parent's `__call__`, both are captured, its own last.
        arrays[f"tap/{path}"] = np.asarray(found[-1])
    return arrays


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree.get(name, {})
    return tree


def _described(leaves: Any) -> set[tuple[str, tuple[int, ...], str]]:
    return {("/".join(key.key for key in path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves}
