"""Runs a Flax model and records every layer: the Backend protocol of common/backends/protocol.py.

JAX reads its environment when it first uses a device, so this module imports neither JAX nor Flax before `start`.
"""

import os
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.architectures import Spec, running
from common.backends.protocol import AUXILIARY_WEIGHT
from common.errors import BackendError, WeightsError
from common.training.dropout import Masks
from common.training.recipe import TrainingRecipe
from common.training.trainer import SINGLE, Replica, Trainer
from common.weights import Weights

if TYPE_CHECKING:
    from flax import linen as nn


@dataclass(kw_only=True)
class Model:
    """A module, its variables, which linen keeps apart, and its compiled pass: see `_pass`."""

    spec: Spec
    dtype: str
    module: "nn.Module"
    variables: dict[str, Any]
    run: Callable[..., dict[str, Any]]


class FlaxBackend:
    """One process's JAX. Made by `start`, which sets the global state it relies on.

    With `jit` a pass is compiled whole, anew for every model: the faster way for one network that is run a few times.
    Without, a pass is traced once and run operation by operation, each compiled once at every shape: the faster way for
    many similar networks.
    """

    def __init__(self, *, jit: bool) -> None:
        self._jit = jit

    def describe(self) -> dict[str, str]:
        return describe()

    def build(self, spec: Spec, dtype: str) -> Model:
        import jax

        from resnet_flax import from_spec

        module = from_spec(spec, dtype=dtype, param_dtype=dtype)
        # Shapes only: `load` sets every value. Large enough for every stride and window, with any padding.
        size = spec.input_size or (16 * spec.output_stride,) * 2
        images = jax.ShapeDtypeStruct((1, *size, spec.in_channels), dtype)
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        one_pass = partial(_pass, spec, module)
        run = jax.jit(one_pass, static_argnames=("training", "gradients")) if self._jit else _op_by_op(one_pass)
        return Model(spec=spec, dtype=dtype, module=module, variables=variables, run=run)

    def native(self, model: Model) -> "tuple[nn.Module, dict[str, Any]]":
        return model.module, model.variables

    def load(self, model: Model, weights: Weights) -> None:
        import jax

        from resnet_flax.weights import to_variables

        variables = to_variables(model.spec, weights, model.dtype)
        # `apply` ignores variables that no layer reads; the module itself says which it has.
        trees = (model.variables, variables)
        native, loaded = (_described(jax.tree_util.tree_leaves_with_path(tree)) for tree in trees)
        if native != loaded:
            wrong = ", ".join(sorted({name for name, _, _ in native ^ loaded})[:4])
            raise WeightsError(f"the module's variables are not those of its name table: {wrong}")
        model.variables = variables

    def export(self, model: Model) -> Weights:
        from resnet_flax.weights import from_variables

        return from_variables(model.spec, model.variables)

    def save(self, spec: Spec, weights: Weights, path: Path) -> None:
        """Write an orbax checkpoint, the folder `path`. Arrays keep their dtype: nothing goes through JAX."""
        from resnet_flax.checkpoints import write
        from resnet_flax.weights import variable_paths

        write(path, {native: weights[name] for name, native in variable_paths(spec).items()})

    def trainer(self, spec: Spec, recipe: TrainingRecipe, dtype: str, replica: Replica = SINGLE) -> Trainer:
        from resnet_flax.training import FlaxTrainer

        return FlaxTrainer(spec, recipe, dtype, replica)

    def run(
        self,
        model: Model,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        training: bool,
        gradients: bool,
        masks: Masks | None = None,
    ) -> dict[str, np.ndarray]:
        from resnet_flax.layers import native_masks
        from resnet_flax.weights import from_collection

        # Variables are arguments, not constants of the compiled program, and nothing it returns is kept.
        images = images.astype(model.dtype, copy=False)
        given = native_masks(model.spec, masks or {})
        results = model.run(model.variables, images, labels, given, training=training, gradients=gradients)
        trees = {"statistics": ("stat", "batch_stats"), "gradients": ("grad", "params")}
        wanted = {name for layer in running(model.spec, training) for name in layer.arrays}
        for result, (prefix, collection) in trees.items():
            if (tree := results.pop(result, None)) is not None:
                named = from_collection(model.spec, collection, tree)
                results |= {f"{prefix}/{name}": array for name, array in named.items() if name in wanted}
        return {name: np.asarray(array) for name, array in results.items()}


def describe() -> dict[str, str]:
    """Versions of what decides the numbers, and the device, as ``device``."""
    import jax

    device = jax.devices()[0]
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    # XLA calls every processor "cpu"; on others the kind says what they are.
    name = platform.machine() if device.platform == "cpu" else device.device_kind
    return versions | {"python": platform.python_version(), "device": f"{device.platform} {name}"}


def start(threads: int) -> FlaxBackend:
    """Set the state of this process's JAX, which it must not have used before: `threads`, precision, device.

    ``RESNET_PARITY_JIT=0`` runs networks operation by operation. ``RESNET_PARITY_DEVICE`` chooses the device by JAX's
    name of its platform (cpu, the default, cuda, rocm, tpu). Raises `BackendError` where that device cannot be used,
    `BackendMissing` where JAX is not installed.
    """
    # XLA makes its thread pool as large as NPROC says. The other flag keeps one operation in one thread.
    os.environ["NPROC"] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    from resnet_flax import framework

    with framework():
        import flax  # noqa: F401
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
    return FlaxBackend(jit=os.environ.get("RESNET_PARITY_JIT", "1") != "0")


def _pass(
    spec: Spec,
    module: "nn.Module",
    variables: dict[str, Any],
    images: Any,
    labels: Any,
    masks: dict[tuple[str, ...], Any],
    *,
    training: bool,
    gradients: bool,
) -> dict[str, Any]:
    """``loss``, ``tap/<path>``, ``grad/input``, and the trees ``statistics`` and ``gradients``; traced by JAX."""
    import jax
    from flax import linen as nn

    from resnet_flax.layers import given_dropout

    def is_layer(layer: nn.Module, method: str) -> bool:
        return method == "__call__" and isinstance(layer, nn.Conv | nn.BatchNorm | nn.Dense | nn.Dropout)

    def forward(params: Any, images: Any) -> tuple[Any, dict[str, Any]]:
        with given_dropout(masks):
            output, state = module.apply(
                variables | {"params": params},
                images,
                train=training,
                mutable=["intermediates", "taps", *(["batch_stats"] if training else [])],
                capture_intermediates=is_layer,
            )
        results = _taps(spec, training, dict(state))
        if training:
            results["statistics"] = state.get("batch_stats", {})
        return _loss(spec, output, labels), results

    if not gradients:
        loss, results = forward(variables["params"], images)
        return {"loss": loss} | results
    differentiated = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
    (loss, results), (params, images) = differentiated(variables["params"], images)
    return {"loss": loss, "gradients": params, "grad/input": images} | results


def _op_by_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of arrays and of static keywords, traced once for every shape and then run operation by operation.

    Calling it as it is does that too, but goes through Flax and the rules of differentiation each time, which takes
    longer than the arithmetic of a small network.
    """
    import jax

    traced: dict[Any, Any] = {}

    def run(*arguments: Any, **static: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), tuple(static.items())
        if key not in traced:
            traced[key] = jax.make_jaxpr(partial(function, **static), return_shape=True)(*arguments)
        program, shapes = traced[key]
        results = jax.core.eval_jaxpr(program.jaxpr, program.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def _loss(spec: Spec, outputs: Any, labels: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def of_likelihoods(logarithms: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(logarithms, labels[:, None], axis=1))

    output, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    match spec.layers[-1].kind:
        case "softmax":
            loss = of_likelihoods(jnp.log(output))
        case "dense":
            loss = of_likelihoods(jax.nn.log_softmax(output))
        case _:
            loss = 0.5 * jnp.mean(output**2)
    for number, logits in enumerate(auxiliary, start=1):
        loss += AUXILIARY_WEIGHT**number * of_likelihoods(jax.nn.log_softmax(logits))
    return loss


def _taps(spec: Spec, training: bool, state: dict[str, Any]) -> dict[str, Any]:
    """The output of every layer that runs: a module's was captured under ``__call__``, any other was sown under its own
    name."""
    from flax.traverse_util import flatten_dict

    paths = import_module(f"{__package__}.{spec.family}").native_paths(spec)
    modules, others = (flatten_dict(state.get(name, {})) for name in ("intermediates", "taps"))
    taps, called, calls = {}, Counter(paths.values()), Counter[tuple[str, ...]]()
    for layer in running(spec, training):
        path, native = layer.path, paths[layer.path]
        outputs = others[native] if native in others else modules[(*native, "__call__")]
        calls[native] += 1
        # Where a subclass calls its parent's `__call__` both are captured in every call, its own last.
        taps[f"tap/{path}"] = outputs[calls[native] * len(outputs) // called[native] - 1]
    return taps


def _described(leaves: Any) -> set[tuple[str, tuple[int, ...], str]]:
    return {("/".join(key.key for key in path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves}
