"""Canonical weights to and from Flax variables, for any family: a kernel is HWIO or (in, out) on both sides already.

Native names come from the family's `native_paths`; collections and leaves from the table of the checkpoint format.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common import weights as canonical
from common.architectures import Spec
from common.architectures.layers import Shape
from common.checkpoints import Given, weights_for
from common.errors import WeightsError
from common.names.roles import FLAX
from common.weights import Weights

Variables = Mapping[str, Any]


def variable_paths(spec: Spec) -> dict[str, tuple[str, ...]]:
    """Canonical name of every array -> its path in the variables, the collection first."""
    return {name: path for name, path, _ in _table(spec)}


def to_variables(spec: Spec, weights: Weights, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Variables ``{"params": …, "batch_stats": …}`` for `model.apply`, copies of `weights` in `dtype`.

    Running statistics are at least float32, as `model.init` makes them. Raises `WeightsError` naming the tensors that
    are missing, unexpected or misshapen, and where `dtype` is float64 but ``jax_enable_x64`` is off.
    """
    dtype = np.dtype(dtype)
    if dtype.itemsize > 4 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise WeightsError(
            f"{dtype} variables need jax.config.update('jax_enable_x64', True); JAX would round to float32"
        )
    dtypes = {"params": dtype, "batch_stats": jnp.promote_types(dtype, jnp.float32)}
    table = list(_table(spec))
    canonical.check_names("the weights are not this model's", weights, (name for name, _, _ in table))
    flat = {}
    for name, path, shape in table:
        array = weights[name]
        if array.shape != shape:
            raise WeightsError(f"{name} has shape {array.shape}; {'/'.join(path)} expects {shape}")
        # A copy, always: JAX arrays are immutable, and must not change with the array they were made from.
        flat[path] = jnp.array(array, dtypes[path[0]], copy=True)
    return unflatten_dict(flat)


def from_variables(spec: Spec, variables: Variables) -> dict[str, np.ndarray]:
    """Canonical weights of variables (plain or frozen): on the CPU read-only views, not copies.

    Raises `WeightsError` naming the variables that are missing, unexpected or misshapen.
    """
    collections = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    unknown = ", ".join(sorted(set(variables) - set(collections)))
    if unknown:
        raise WeightsError(f"unexpected collections {unknown}; expected params and batch_stats")
    return _canonical(list(_table(spec)), collections)


def from_collection(spec: Spec, collection: str, tree: Variables) -> dict[str, np.ndarray]:
    """The same for one collection alone: gradients (``params``) or running statistics (``batch_stats``)."""
    return _canonical([row for row in _table(spec) if row[1][0] == collection], {collection: tree})


def read_variables(spec: Spec, given: Given, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Variables from a checkpoint of any known format that fits this spec. Raises `WeightsError`."""
    return to_variables(spec, weights_for(spec, given), dtype)


def _table(spec: Spec) -> Iterator[tuple[str, tuple[str, ...], Shape]]:
    """(canonical name, variable path, shape) of every array."""
    modules = import_module(f"{__package__}.{spec.family}").native_paths(spec)
    for layer in spec.layers:
        for name, shape in layer.arrays.items():
            native = FLAX.array("/".join(modules[layer.path]), layer.kind, canonical.role_of(name, layer))
            yield name, tuple(native.split("/")), shape


def _canonical(table: list[tuple[str, tuple[str, ...], Shape]], collections: Variables) -> dict[str, np.ndarray]:
    flat = flatten_dict(collections)
    native = ("/".join(path) for _, path, _ in table)
    canonical.check_names("the variables are not this spec's", map("/".join, flat), native)
    for name, path, shape in table:
        if flat[path].shape != shape:
            raise WeightsError(f"{'/'.join(path)} has shape {flat[path].shape}; {name} expects {shape}")
    return {name: np.asarray(flat[path]) for name, path, _ in table}
