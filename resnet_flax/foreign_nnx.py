"""An nnx module, watched through the methods of its classes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from types import FunctionType
from typing import Any

import jax
from flax import nnx

from common.foreign.operations import Dropout, Operation
from common.foreign.protocol import Held
from resnet_flax.foreign_modules import arguments, drops, in_dtype, named_leaves, parameters
from resnet_flax.foreign_operations import arrays_of, operation_of
from resnet_flax.foreign_runner import in_dtype_of
from resnet_flax.foreign_watch import PATCHING, Layer, Watch, is_array, is_floating


class NnxNetwork:
    """See `Network`. Names of arrays are their paths in the state of the module."""

    opaque: tuple[type, ...] = (nnx.Module, nnx.State, nnx.Rngs)

    def __init__(self, module: nnx.Module, dtype: str) -> None:
        self.title, self.dtype = type(module).__name__, dtype
        copy = _in_dtype(nnx.clone(module), dtype)
        self._signature = parameters(type(module).__call__)
        self._as_given, params, self.randomness, rest = _split(copy)
        self._state = params, rest
        self._leaves, self._tree = jax.tree_util.tree_flatten(self._state)
        self._names = ["/".join(path[1:]) for path, _ in named_leaves(self._state, boxed=True)]
        arrays = {name: leaf for name, leaf in zip(self._names, self._leaves, strict=True) if is_array(leaf)}
        self.values = {name: in_dtype_of(array, dtype) for name, array in arrays.items()}
        trained = {"/".join(path) for path, _ in named_leaves(params, boxed=True)}
        self.trained = {name: name in trained and is_floating(array) for name, array in self.values.items()}

        self._rates = {path: one.rate for path, one in _modules(copy).items() if isinstance(one, nnx.Dropout)}
        copy.eval()
        evaluating = _split(copy)[0]
        copy.train()
        self._graphs = {False: evaluating, True: _split(_undropped(copy))[0]}

    def forward(
        self,
        values: Mapping[str, Any],
        inputs: Mapping[str, Any],
        randomness: Any,
        *,
        named: bool,
        training: bool,
        watch: Watch,
    ) -> tuple[Any, dict[str, Any], Any]:
        args, kwargs = arguments(self.title, self._signature, inputs, named=named, training=training)
        module = self._merged(self._graphs[training], values, randomness)
        with _watched(_modules(module), partial(self._called, watch, training)):
            output = module(*args, **kwargs)
        after, randomness = self._named(module)
        return output, {**values, **after}, randomness

    def steps(
        self,
        train: Callable[..., Callable[..., Any]],
        values: Mapping[str, Any],
        batches: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        # A step may give its memory away, as `nnx.jit(donate_argnums=...)` does.
        values, randomness = jax.tree_util.tree_map(lambda leaf: leaf.copy(), (dict(values), self.randomness))
        module = _undropped(self._merged(self._as_given, values, randomness))
        step = train(module)
        for args, kwargs in batches:
            loss = step(*args, **kwargs)
            yield self._named(module)[0], loss

    def _merged(self, graph: Any, values: Mapping[str, Any], randomness: Any) -> Any:
        leaves = [values.get(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)]
        params, rest = jax.tree_util.tree_unflatten(self._tree, leaves)
        return nnx.merge(graph, params, randomness, rest)

    def _named(self, module: nnx.Module) -> tuple[dict[str, Any], Any]:
        """The arrays of a module by name, and its randomness."""
        _, params, randomness, rest = _split(module)
        named = {"/".join(path[1:]): leaf for path, leaf in named_leaves((params, rest), boxed=True)}
        return {name: leaf for name, leaf in named.items() if name in self.values}, randomness

    def _called(
        self,
        watch: Watch,
        training: bool,
        path: tuple[Any, ...],
        module: nnx.Module,
        method: str,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        kind = type(module).__name__
        name = "/".join(map(str, path))
        if training and method == "__call__" and drops(kind) and not self._below(name):
            call = partial(_first, call)
        layer = Layer(
            key=path,
            path=name,
            kind=kind if method == "__call__" else f"{kind}.{method}",
            facts=partial(self._facts, path, module, method),
        )
        return watch.call(layer, call, args, kwargs)

    def _facts(
        self, path: tuple[Any, ...], module: nnx.Module, method: str, inputs: tuple[Any, ...], whole: bool
    ) -> tuple[Operation | None, dict[str, Held]]:
        below = self._below("/".join(map(str, path)))
        own = {name: full for name, full in below.items() if whole or "/" not in name}
        operation = operation_of(module, method, inputs, nnx)
        if isinstance(operation, Dropout):
            operation = Dropout(rate=float(self._rates[path]))  # that of the copy which trains is zero
        return operation, arrays_of(module, method, own, nnx)

    def _below(self, path: str) -> dict[str, str]:
        """The names of all arrays of a module, by those in it."""
        start = f"{path}/" if path else ""
        return {name.removeprefix(start): name for name in self.values if name.startswith(start)}


def _split(module: nnx.Module) -> Any:
    """The graph of a module, its parameters, its randomness, and all other arrays."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _modules(module: nnx.Module) -> dict[tuple[Any, ...], nnx.Module]:
    return dict(nnx.iter_modules(module))


def _in_dtype(module: nnx.Module, dtype: str) -> nnx.Module:
    """The module itself, with the dtypes in all its attributes changed."""
    for one in _modules(module).values():
        for name, value in vars(one).items():
            data = isinstance(value, nnx.Module | nnx.Variable | nnx.Rngs) or is_array(value)
            if not (data or name.startswith("_")) and (new := in_dtype(name, value, dtype, _as_it_is)) is not value:
                setattr(one, name, new)
    return module


def _as_it_is(value: Any) -> Any:
    return value if isinstance(value, nnx.Module | nnx.Variable) else None


def _undropped(module: nnx.Module) -> nnx.Module:
    """The module itself, with dropout that drops nothing."""
    for one in _modules(module).values():
        if isinstance(one, nnx.Dropout):
            one.rate = 0.0
        elif isinstance(one, nnx.MultiHeadAttention):
            one.dropout_rate = 0.0
    return module


def _first(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What dropout is that drops nothing."""
    return next(value for value in (*args, *kwargs.values()) if is_array(value))


@contextmanager
def _watched(modules: Mapping[tuple[Any, ...], nnx.Module], called: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, calls of `modules` go through `called`; those of others of their classes do not."""
    paths = {id(module): path for path, module in modules.items()}
    foundation = set(nnx.Module.__mro__)
    classes = {one for module in modules.values() for one in type(module).__mro__} - foundation

    def patched(name: str, original: Any) -> Any:
        # Not every `__call__` is a function: `nnx.jit` makes an object of it.
        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = original.__get__(self, type(self))
            path = paths.get(id(self))
            return call(*args, **kwargs) if path is None else called(path, self, name, call, args, kwargs)

        return method

    with PATCHING:
        before = [
            (one, name, value)
            for one in classes
            for name, value in vars(one).items()
            if name == "__call__" or (isinstance(value, FunctionType) and not name.startswith("_"))
        ]
        try:
            for one, name, value in before:
                setattr(one, name, patched(name, value))
            yield
        finally:
            for one, name, value in before:
                setattr(one, name, value)
