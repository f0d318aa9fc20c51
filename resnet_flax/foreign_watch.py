"""Takes down what the layers of a Flax model are given and give back, and puts other arrays in their place."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace

from common.errors import ModelError
from common.foreign.operations import Operation
from common.foreign.protocol import Call, Held

# Classes are everybody's: two threads that put back what the other has put there would leave it there.
PATCHING = threading.RLock()

# What a call is given in the place of its own, by "inputs", "outputs" and "cotangents": the fields of `Forced` in JAX.
Given = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module as it is called."""

    key: Any  # which one it is
    path: str  # "" for the whole model
    kind: str
    # Of its inputs, and whether no other call was taken down inside it: what it does, and its arrays by role.
    facts: Callable[[tuple[Any, ...], bool], tuple[Operation | None, dict[str, Held]]]


@dataclass
class _Frame:
    key: Any
    busy: bool = False  # whether a call was taken down inside


@dataclass(kw_only=True)
class Watch:
    """Of one pass: every call of a module from outside of it, in the order in which the calls ended.

    Inside of a loop, a remat or a jit of the model's own an array is one of another program: such calls pass unseen,
    and the module that has the loop is what is taken down. `opaque` are types whose instances are no arrays, whatever
    they hold. In float64 a layer that gives less, or is given less, raises `ModelError`.
    """

    root: str  # the name of the model itself, which is a call only where no other was seen
    dtype: str
    differentiated: bool  # cotangents are noted
    forced: Mapping[str, Given]
    opaque: tuple[type, ...] = ()
    calls: list[Call] = field(default_factory=list)
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[tuple[Any, ...]] = field(default_factory=list)
    cotangents: dict[tuple[str, int], Any] = field(default_factory=dict)  # by name of the call, place of the output
    failed: str | None = None  # the path of the module that raised
    _level: Any = field(default_factory=current_trace)
    _stack: list[_Frame] = field(default_factory=list)
    _counts: Counter[str] = field(default_factory=Counter)

    def call(self, layer: Layer, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `function`, which is what `layer` does, and take the call down."""
        caller = self._stack[-1] if self._stack else None
        frame = _Frame(layer.key)
        self._stack.append(frame)
        try:
            if current_trace() != self._level or (caller is not None and caller.key == layer.key):
                return function(*args, **kwargs)
            return self._taken_down(layer, frame, function, args, kwargs)
        except Exception:
            self.failed = layer.path if self.failed is None else self.failed
            raise
        finally:
            self._stack.pop()
            if caller is not None:
                caller.busy |= frame.busy

    def _taken_down(
        self, layer: Layer, frame: _Frame, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._counts[layer.path] += 1
        number, path = self._counts[layer.path], layer.path or self.root
        name = path if number == 1 else f"{path}#{number}"
        forced = self.forced.get(name, {})

        # Keywords as they were written; a dict would be sorted.
        leaves, rebuilt = self._flat((args, tuple(kwargs.values())))
        inputs = tuple(leaf for leaf in leaves if is_array(leaf))
        if new := forced.get("inputs"):
            put = [_put(name, value, other, self.differentiated) for value, other in _paired(inputs, new)]
            args, values = rebuilt(put)
            kwargs = dict(zip(kwargs, values, strict=True))
        result = function(*args, **kwargs)

        leaves, rebuilt = self._flat(result)
        outputs = tuple(leaf for leaf in leaves if is_array(leaf))
        if not outputs:
            self._counts[layer.path] -= 1
            return result
        if not layer.path and self.calls:
            return result
        self._check(path, inputs, outputs)
        operation, arrays = layer.facts(inputs, not frame.busy)
        self.calls.append(
            Call(name=name, layer=path, kind=layer.kind, leaf=not frame.busy, operation=operation, arrays=arrays)
        )
        self.inputs.append(inputs)
        self.outputs.append(outputs)
        frame.busy = True
        new, backwards = forced.get("outputs", ()), forced.get("cotangents", ())
        if not (self.differentiated or new):
            return result
        put = []
        for index, ((value, other), (_, cotangent)) in enumerate(
            zip(_paired(outputs, new), _paired(outputs, backwards), strict=True)
        ):
            note = partial(self.cotangents.__setitem__, (name, index))
            put.append(_put(name, value, other, self.differentiated, note, cotangent))
        return rebuilt(put)

    def _flat(self, tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        """The leaves of a tree, and the tree with other arrays in the place of its own."""
        leaves, structure = jax.tree_util.tree_flatten(tree, is_leaf=lambda leaf: isinstance(leaf, self.opaque))

        def rebuilt(arrays: list[Any]) -> Any:
            rest = iter(arrays)
            return jax.tree_util.tree_unflatten(structure, [next(rest) if is_array(x) else x for x in leaves])

        return leaves, rebuilt

    def _check(self, path: str, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if self.dtype != "float64":
            return
        # The first alone: masks, which follow, hold zeros and ones in any dtype.
        for array in inputs[:1]:
            if is_floating(array) and array.dtype != np.float64:
                raise ModelError(f"`{path}` is given {array.dtype}: the model rounds before it; compare in float32")
        for array in outputs:
            if is_floating(array) and array.dtype != np.float64:
                raise ModelError(f"`{path}` computes in {array.dtype} inside; compare in float32")


def is_array(leaf: Any) -> bool:
    """Whether it is an array of numbers; a random key is none."""
    return isinstance(leaf, jax.Array | np.ndarray) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def is_floating(array: Any) -> bool:
    """Whether gradients are taken of it."""
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _paired(own: tuple[Any, ...], given: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    return list(zip(own, (*given, *[None] * (len(own) - len(given))), strict=False))


def _put(
    name: str,
    value: Any,
    other: Any,
    differentiated: bool,
    note: Callable[[Any], None] | None = None,
    cotangent: Any = None,
) -> Any:
    """`other`, where it is an array, in the place of `value`, with the gradients of `value`; what comes back is noted,
    and then replaced by `cotangent`."""
    if other is not None and other.shape != value.shape:
        if other.ndim != value.ndim:
            raise ModelError(f"`{name}`: an array of shape {other.shape} in the place of one of {value.shape}")
        return other.astype(value.dtype)  # no gradient passes it
    if cotangent is not None and cotangent.shape != value.shape:
        raise ModelError(f"`{name}`: a gradient of shape {cotangent.shape} in the place of one of {value.shape}")
    other, cotangent = (array if array is None else array.astype(value.dtype) for array in (other, cotangent))
    if not (differentiated and is_floating(value)) or (other is None and note is None):
        return value if other is None else other

    @jax.custom_vjp
    def identity(value: Any, other: Any, cotangent: Any) -> Any:
        return value if other is None else other

    def forwards(value: Any, other: Any, cotangent: Any) -> tuple[Any, Any]:
        return value if other is None else other, cotangent

    def backwards(cotangent: Any, coming: Any) -> tuple[Any, None, None]:
        # Called only where something comes back at all.
        if note is not None:
            note(coming)
        return coming if cotangent is None else cotangent, None, None

    identity.defvjp(forwards, backwards)
    return identity(value, other, cotangent)
