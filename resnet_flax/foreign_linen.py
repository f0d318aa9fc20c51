"""A linen module and its variables, watched by an interceptor of its methods."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import jax
from flax import errors
from flax import linen as nn
from flax.core import FrozenDict

from common.errors import ModelError
from common.foreign.operations import Operation
from common.foreign.protocol import Held
from resnet_flax.foreign_modules import arguments, drops, in_dtype, is_switch, named_leaves, parameters, switched
from resnet_flax.foreign_operations import arrays_of, operation_of
from resnet_flax.foreign_runner import Again, in_dtype_of
from resnet_flax.foreign_watch import PATCHING, Layer, Watch, is_array, is_floating


class LinenNetwork:
    """See `Network`. Names of parameters are their paths, those of other variables begin with their collection."""

    opaque: tuple[type, ...] = (nn.Module,)

    def __init__(self, module: nn.Module, variables: Mapping[str, Any], dtype: str) -> None:
        self.title, self.dtype = type(module).__name__, dtype
        self._module = _in_dtype(module, dtype, {})
        self._signature = parameters(type(module).__call__)
        self._leaves, self._tree = jax.tree_util.tree_flatten(variables)
        self._names = [_name(path) for path, _ in named_leaves(variables, boxed=True)]
        self._places = [(path[0], path[1:]) for path, _ in named_leaves(variables, boxed=True)]
        self._collections = [collection for collection in variables if collection != "params"]
        arrays = {name: leaf for name, leaf in zip(self._names, self._leaves, strict=True) if is_array(leaf)}
        self.values = {name: in_dtype_of(array, dtype) for name, array in arrays.items()}
        trained = {_name((collection, *path)) for collection, path in self._places if collection == "params"}
        self.trained = {name: name in trained and is_floating(array) for name, array in self.values.items()}
        self.randomness: Any = jax.numpy.zeros((), "uint32")  # how many passes there were
        self._drawing: set[bool] = set()  # in which modes, training or not, it asks for random keys
        self._writing = False  # whether it changes variables outside of training too

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
        module, signature = self._switched(training)
        args, kwargs = arguments(self.title, signature, inputs, named=named, training=training)
        # Any collection that has no key of its own draws from this one.
        keys = {"params": jax.random.key(randomness)} if training in self._drawing else None
        changes = training or self._writing
        called = partial(self._called, watch, training)
        with ExitStack() as stack:
            stack.enter_context(_noticing(self._widen))
            stack.enter_context(_noticing(stack.enter_context(_lifted(called))))
            stack.enter_context(nn.intercept_methods(partial(_intercepted, called)))
            try:
                output, state = module.apply(
                    self._variables(values),
                    rngs=keys,
                    mutable=self._collections if changes else [],
                    method=lambda bound: bound(*args, **kwargs),
                )
            except errors.InvalidRngError:
                if keys is not None:
                    raise
                self._drawing.add(training)
                raise Again from None
            except errors.ModifyScopeVariableError:
                if changes:
                    raise
                self._writing = True
                raise Again from None
        return output, {**values, **self._named(state)}, randomness + 1

    def steps(
        self,
        train: Callable[..., Callable[..., Any]],
        values: Mapping[str, Any],
        batches: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        # A step may give its memory away, as `jax.jit(donate_argnums=...)` does.
        variables = self._variables({name: jax.numpy.array(array, copy=True) for name, array in values.items()})
        with _noticing(self._widen), nn.intercept_methods(_without_dropout(self)):
            step = train(self._module, variables)
            for args, kwargs in batches:
                result = step(variables, *args, **kwargs)
                new, loss = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
                if not isinstance(new, Mapping) or not new.keys() <= variables.keys():
                    found = f"a dict of {', '.join(map(str, new))}" if isinstance(new, Mapping) else type(new).__name__
                    raise ModelError(
                        f"a step of `{self.title}` returned {found}; variables were expected, of {', '.join(variables)}"
                    )
                merged = {**variables, **new}
                variables = FrozenDict(merged) if isinstance(variables, FrozenDict) else merged
                yield self._named(variables), loss

    def _switched(self, training: bool) -> tuple[nn.Module, list[Any]]:
        """The module with its own switches set, and its signature without those that are set already."""
        fields = {one.name for one in dataclasses.fields(self._module) if is_switch(one.name)}
        taken = {one.name for one in self._signature}
        # Where a call has the switch too, a field that is set may not be given again: see `nn.merge_param`.
        fields = {name for name in fields if name not in taken or getattr(self._module, name) is not None}
        values: dict[str, Any] = {name: switched(name, training) for name in fields}
        module = self._module.clone(**values) if fields else self._module
        return module, [one for one in self._signature if one.name not in fields]

    def _widen(self, module: Any) -> None:
        """In a module that is made in a pass, the dtype of its parameters: it is float32 where nobody said anything."""
        if any(one.name == "param_dtype" for one in dataclasses.fields(module)):
            changed = in_dtype("param_dtype", module.param_dtype, self.dtype)
            object.__setattr__(module, "param_dtype", changed)

    def _variables(self, values: Mapping[str, Any]) -> Any:
        leaves = [values.get(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)]
        return jax.tree_util.tree_unflatten(self._tree, leaves)

    def _named(self, variables: Any) -> dict[str, Any]:
        named = {_name(path): leaf for path, leaf in named_leaves(variables, boxed=True)}
        return {name: leaf for name, leaf in named.items() if name in self.values}

    def _called(
        self,
        watch: Watch,
        training: bool,
        module: nn.Module,
        method: str,
        call: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        if module.scope is None or method == "setup" or (method.startswith("_") and method != "__call__"):
            return call(*args, **kwargs)
        if training:
            call = self._undropped(module, method, call)
        kind = type(module).__name__
        layer = Layer(
            key=module.path,
            path="/".join(module.path),
            kind=kind if method == "__call__" else f"{kind}.{method}",
            facts=partial(self._facts, module, method),
        )
        return watch.call(layer, call, args, kwargs)

    def _undropped(self, module: nn.Module, method: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The method without the dropout that it is, or does."""
        kind = type(module).__name__
        if method == "__call__" and (isinstance(module, nn.Dropout) or (drops(kind) and not self._below(module.path))):
            return _first
        if isinstance(module, nn.MultiHeadDotProductAttention) and module.dropout_rate > 0:
            return partial(_called_with, module, "dropout_rate", 0.0, call)
        return call

    def _facts(
        self, module: nn.Module, method: str, inputs: tuple[Any, ...], whole: bool
    ) -> tuple[Operation | None, dict[str, Held]]:
        below = self._below(module.path)
        own = {name: full for name, full in below.items() if whole or "/" not in name}
        return operation_of(module, method, inputs, nn), arrays_of(module, method, own, nn)

    def _below(self, path: tuple[str, ...]) -> dict[str, str]:
        """The names of all arrays of a module, by those in it."""
        names: dict[str, str] = {}
        for name, (_, place) in zip(self._names, self._places, strict=True):
            if place[: len(path)] == path and name in self.values:
                names.setdefault("/".join(place[len(path) :]), name)
        return names


def _intercepted(called: Callable[..., Any], call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    return called(context.module, context.method_name, call, args, kwargs)


@contextmanager
def _noticing(each: Callable[[nn.Module], None]) -> Iterator[None]:
    """While it lasts, `each` is called of every module that this thread makes, as soon as it has its fields."""
    thread, initialise = threading.get_ident(), nn.Module.__post_init__

    def noticed(self: nn.Module) -> None:
        if threading.get_ident() == thread:
            each(self)
        initialise(self)

    with PATCHING:
        nn.Module.__post_init__ = noticed  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__post_init__ = initialise  # type: ignore[method-assign]


@contextmanager
def _lifted(called: Callable[..., Any]) -> Iterator[Callable[[nn.Module], None]]:
    """While it lasts, methods inside of a scan, a remat or a jit go through `called` as a whole too.

    Interceptors see what is inside alone, where arrays are those of another program. The classes that `nn.scan` and
    its like make are found when their modules are: each is to be given to what this yields.
    """
    thread = threading.get_ident()
    before: list[tuple[type, str, Any]] = []
    known: set[type] = set()
    over = False

    def patched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # A class that was made meanwhile may keep this method.
            if over or threading.get_ident() != thread:
                return original(self, *args, **kwargs)
            return called(self, name, partial(original, self), args, kwargs)

        return method

    def found(module: nn.Module) -> None:
        for one in set(type(module).__mro__) - known:
            known.add(one)
            for name, value in list(vars(one).items()):
                # What is put around a method that Flax has wrapped already.
                if getattr(getattr(value, "__wrapped__", None), "method_handler_wrapped", False):
                    before.append((one, name, value))
                    setattr(one, name, patched(name, value))

    with PATCHING:
        try:
            yield found
        finally:
            over = True
            for one, name, value in reversed(before):
                setattr(one, name, value)


def lacks(module: nn.Module, variables: Mapping[str, Any]) -> frozenset[str]:
    """Training, where there are statistics and nothing that says that they are to be updated."""
    names = {one.name for one in parameters(type(module).__call__)} | {one.name for one in dataclasses.fields(module)}
    fixed = "batch_stats" in variables and not any(map(is_switch, names))
    return frozenset({"training"} if fixed else ())


def _name(path: tuple[str, ...]) -> str:
    return "/".join(path[1:] if path[0] == "params" else path)


def _in_dtype(module: nn.Module, dtype: str, known: dict[int, nn.Module]) -> nn.Module:
    """The module with the dtypes of its fields changed, and of those of the modules in them.

    A module that stands in two fields, which share it, stays one: `known` are those that were met, by their identity.
    """

    def inside(value: Any) -> Any:
        return _in_dtype(value, dtype, known) if isinstance(value, nn.Module) else None

    if id(module) not in known:
        fields = {
            one.name: getattr(module, one.name)
            for one in dataclasses.fields(module)
            if one.init and one.name not in ("parent", "name")
        }
        new = {name: in_dtype(name, value, dtype, inside) for name, value in fields.items()}
        changed = {name: value for name, value in new.items() if value is not fields[name]}
        known[id(module)] = module.clone(**changed) if changed else module
    return known[id(module)]


def _first(*args: Any, **kwargs: Any) -> Any:
    """What dropout is that drops nothing."""
    return next(value for value in (*args, *kwargs.values()) if is_array(value))


def _called_with(module: nn.Module, name: str, value: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call while a field of a module, which is frozen otherwise, has another value."""
    with _field(module, name, value):
        return call(*args, **kwargs)


@contextmanager
def _field(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__setattr__(module, name, before)


def _without_dropout(network: LinenNetwork) -> Callable[..., Any]:
    def intercepted(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None:
            call = network._undropped(context.module, context.method_name, call)
        return call(*args, **kwargs)

    return intercepted
