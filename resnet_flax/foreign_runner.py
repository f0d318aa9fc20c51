"""One pass of a user's Flax model, and what it computed: the Runner of common/foreign/protocol.py.

A pass is traced once for every kind of it and then run operation by operation, each compiled once at every shape:
Flax's own overhead is larger than the arithmetic of a small network, and to compile a whole network takes longer still.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from common.errors import ModelError, ParityError
from common.foreign.protocol import LATER_OUTPUT, Call, Forced, Inputs, Loss, Trace
from resnet_flax.foreign_modules import cast, named_leaves
from resnet_flax.foreign_watch import Watch, is_array, is_floating


class Again(Exception):
    """A network learnt in a pass how it must be called; the pass begins anew."""


class Network(Protocol):
    """A copy of a user's model, in one dtype, without state: what a pass needs is handed to it."""

    title: str
    dtype: str
    opaque: tuple[type, ...]  # types of its framework whose instances hold arrays and are none
    values: dict[str, Any]  # every array that decides what it computes, by name, as the model has them
    trained: dict[str, bool]
    randomness: Any  # what a pass draws from, in arrays

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
        """What the model returns, the arrays of `values` as they are then, and the randomness that is left.

        `inputs` are by name where they are `named`, and in order else. Raises `Again`.
        """
        ...

    def steps(
        self,
        train: Callable[..., Callable[..., Any]],
        values: Mapping[str, Any],
        batches: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
    ) -> Iterator[tuple[dict[str, Any], Any]]:
        """After each step all arrays by name, and the loss or None. A batch is what the step is called with."""
        ...


@dataclass
class _Notes:
    """What a pass says beside its arrays; known as soon as it is traced."""

    calls: list[Call] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    cotangents: list[tuple[str, int]] = field(default_factory=list)
    watch: Watch | None = None


@dataclass
class _Program:
    run: Callable[..., dict[str, Any]]
    notes: _Notes
    numbers: list[Any] = field(default_factory=list)  # the constants in it
    settled: bool = False  # a second trace had the same


def settings(dtype: str) -> AbstractContextManager[Any]:
    """JAX's settings for a model in `dtype`, in this thread and for a while: in float32 they are the user's."""
    if dtype != "float64":
        return nullcontext()
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    import jax.experimental as older  # before JAX 0.8

    return older.enable_x64(True)  # type: ignore[attr-defined]


class FlaxRunner:
    """A network at work. The user's settings of JAX hold outside of its methods, and another in the dtype of each."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._values = network.values
        self._programs: dict[Any, _Program] = {}
        self.trained: Mapping[str, bool] = network.trained

    def values(self) -> dict[str, np.ndarray]:
        return {name: _own(array, self._network.dtype) for name, array in self._values.items()}

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        if unknown := sorted(values.keys() - self._values.keys()):
            raise ModelError(f"`{self._network.title}` has no array {unknown[0]}; it has {', '.join(self._values)}")
        with settings(self._network.dtype):
            new = {}
            for name, value in values.items():
                old = self._values[name]
                if np.shape(value) != old.shape:
                    raise ModelError(f"{name}: an array of shape {np.shape(value)} for one of shape {old.shape}")
                new[name] = jnp.array(value, old.dtype)
            self._values = self._values | new

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        network = self._network
        with settings(self._network.dtype):
            named, given = self._given(inputs)
            put = {name: _in_jax(one) for name, one in (forced or {}).items()}
            # JAX sorts what it is given by name.
            order = tuple(given)
            function = partial(self._pass, order, named=named, training=training, gradients=gradients, loss=loss)
            key = (order, named, training, gradients)
            results, notes = self._carried_out(key, function, given, put, keep=loss is None)
            network.randomness = results["randomness"]
            statistics = [name for name, trained in self.trained.items() if not trained] if training else []
            trace = _trace(notes, results, statistics)
            trace.gradients = {name: trace.gradients[name] for name in self.trained if name in trace.gradients}
            trace.of_inputs = {name: trace.of_inputs[name] for name in order if name in trace.of_inputs}
            return trace

    def steps(self, train: Callable[..., Callable[..., Any]], batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """See `Runner`. A linen model's `train(module, variables)` returns ``step(variables, *arrays)``, which returns
        the new variables, or a pair of these and the loss; collections that it leaves out stay as they were. What else
        a step carries along, as the state of an optimiser, is the closure's: steps are called in turn, not traced. An
        nnx model's `train(model)` returns ``step(*arrays)``, which changes the model in place and may return the loss.
        Batches that are mappings are given by keyword. Dropout passes on what it gets.
        """
        with settings(self._network.dtype), self._told(_Notes()):
            given = [self._given(batch) for batch in batches]
            calls = [((), arrays) if named else ((*arrays.values(),), {}) for named, arrays in given]
            taken = []
            for values, value in self._network.steps(train, self._values, calls):
                arrays: dict[str, Any] = {name: _own(array, self._network.dtype) for name, array in values.items()}
                if value is not None:
                    arrays[""] = np.asarray(value)
                taken.append(arrays)
            return taken

    @contextmanager
    def _told(self, notes: _Notes) -> Iterator[None]:
        """Whatever the model raises, in one line."""
        try:
            yield
        except Again:
            raise
        except ParityError as error:
            raise type(error)(*error.args) from None  # JAX has left notes on it
        except Exception as error:
            path = notes.watch.failed if notes.watch else None
            place = f"`{path}` of `{self._network.title}`" if path else f"`{self._network.title}`"
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            said = f": {lines[0]}" if lines else ""
            raise ModelError(f"{place} raised {type(error).__name__}{said}") from error

    def _given(self, inputs: Inputs) -> tuple[bool, dict[str, Any]]:
        """Whether they are by name, and the inputs by name or position."""
        named = isinstance(inputs, Mapping)
        items = inputs.items() if isinstance(inputs, Mapping) else ((str(n), x) for n, x in enumerate(inputs))
        arrays = {}
        for name, value in items:
            array = np.asarray(value)
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            arrays[name] = jnp.asarray(array, self._network.dtype if floating else None)
        return named, arrays

    def _carried_out(
        self, kind: tuple[Any, ...], function: Callable[..., Any], given: Any, put: Any, *, keep: bool
    ) -> tuple[dict[str, Any], _Notes]:
        for _ in range(4):
            arguments = (self._values, given, put, self._network.randomness)
            leaves, tree = jax.tree_util.tree_flatten(arguments)
            key = kind, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
            notes = _Notes()
            try:
                program = self._programs.get(key)
                if program is None or not program.settled:
                    with self._told(notes):
                        program = _traced(function, notes, arguments, program)
                    # A loss of the user's may read what he changes between two calls.
                    if keep:
                        self._programs[key] = program
                with self._told(program.notes):
                    return program.run(*arguments), program.notes
            except Again:
                continue
        raise ModelError(f"`{self._network.title}` asks for something else at each call")

    def _pass(
        self,
        order: Sequence[str],
        notes: _Notes,
        values: Mapping[str, Any],
        inputs: Mapping[str, Any],
        put: Mapping[str, Any],
        randomness: Any,
        *,
        named: bool,
        training: bool,
        gradients: bool,
        loss: Loss | None,
    ) -> dict[str, Any]:
        """The arrays of a pass; what they are goes into `notes`."""
        network = self._network
        root = network.title.lower()

        def forward(params: Any, floats: Any) -> tuple[Any, dict[str, Any]]:
            watch = notes.watch = Watch(
                root=root, dtype=network.dtype, differentiated=gradients, forced=put, opaque=network.opaque
            )
            output, after, left = network.forward(
                {**values, **params},
                {name: floats.get(name, inputs[name]) for name in order},
                randomness,
                named=named,
                training=training,
                watch=watch,
            )
            results = self._results(output)
            notes.calls, notes.results = watch.calls, [path for path, _ in results]
            total = _loss(network.title, loss, output, results) if gradients else None
            return total, {
                "inputs": watch.inputs,
                "outputs": watch.outputs,
                "results": [array for _, array in results],
                "statistics": [after[name] for name, trained in network.trained.items() if not trained],
                "randomness": left,
            }

        params = {name: array for name, array in values.items() if network.trained[name]}
        floats = {name: array for name, array in inputs.items() if is_floating(array)}
        if not gradients:
            return forward(params, floats)[1]
        differentiated = jax.value_and_grad(forward, argnums=(0, 1), has_aux=True)
        (total, arrays), (of_params, of_inputs) = differentiated(params, floats)
        assert notes.watch is not None
        notes.cotangents = list(notes.watch.cotangents)
        cotangents = list(notes.watch.cotangents.values())
        return arrays | {"loss": total, "gradients": of_params, "of_inputs": of_inputs, "cotangents": cotangents}

    def _results(self, output: Any) -> list[tuple[str, Any]]:
        title = self._network.title
        named = [(".".join(path), leaf) for path, leaf in named_leaves(output)]
        for path, leaf in named:
            place = f" at {path}" if path else ""
            if not is_array(leaf):
                raise ModelError(f"`{title}` returns a {type(leaf).__name__}{place}; arrays were expected")
            if self._network.dtype == "float64" and is_floating(leaf) and leaf.dtype != np.float64:
                raise ModelError(f"`{title}` returns {leaf.dtype}{place}; compare in float32")
        if not named:
            raise ModelError(f"`{title}` returns no array")
        return named


def _traced(
    function: Callable[..., Any], notes: _Notes, arguments: tuple[Any, ...], before: _Program | None
) -> _Program:
    """`function` as a program of JAX's operations.

    Traced twice it must have the same constants: what it drew by other means than JAX's stands in them.
    """
    try:
        program, shapes = jax.make_jaxpr(partial(function, notes), return_shape=True)(*arguments)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        # It looks at values, which a trace has not: run as it is, it may.
        return _Program(run=partial(function, notes), notes=notes, settled=True)
    notes.watch = None  # it holds what was traced
    structure = jax.tree_util.tree_structure(shapes)

    def run(*arguments: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves(arguments)
        results = jax.core.eval_jaxpr(program.jaxpr, program.consts, *leaves)
        return dict(jax.tree_util.tree_unflatten(structure, results))

    numbers = list(_numbers(program.jaxpr, program.consts))
    settled = before is not None and before.numbers == numbers
    return _Program(run=run, notes=notes, numbers=numbers, settled=settled)


def _numbers(program: Jaxpr, constants: Sequence[Any] = ()) -> Iterator[Any]:
    """Of a program, and of those in it: the operations and all constants."""
    yield from (_bytes(constant) for constant in constants)
    for operation in program.eqns:
        yield operation.primitive.name
        yield from (_bytes(one.val) for one in operation.invars if isinstance(one, Literal))
        for parameter in operation.params.values():
            for one in parameter if isinstance(parameter, list | tuple) else (parameter,):
                if isinstance(one, ClosedJaxpr):
                    yield from _numbers(one.jaxpr, one.consts)
                elif isinstance(one, Jaxpr):
                    yield from _numbers(one)


def _bytes(constant: Any) -> bytes:
    return np.asarray(constant).tobytes() if not isinstance(constant, jax.Array) or is_array(constant) else b""


def _loss(title: str, loss: Loss | None, output: Any, results: list[tuple[str, Any]]) -> Any:
    if loss is None:
        arrays = [array for _, array in results if is_floating(array)]
        if not arrays:
            raise ModelError(f"`{title}` returns no array of floating point, which gradients could be taken of")
        return sum(
            LATER_OUTPUT**number * jnp.mean(array**2 / 2 + jnp.sin(array)) for number, array in enumerate(arrays)
        )
    value = loss(output)
    if not is_array(value) or value.shape != () or not is_floating(value):
        raise ModelError(f"the loss of `{title}` is no scalar of floating point: {getattr(value, 'shape', value)!r}")
    return value


def _trace(notes: _Notes, results: Mapping[str, Any], statistics: Sequence[str]) -> Trace:
    names = [call.name for call in notes.calls]
    trace = Trace(
        calls=tuple(notes.calls),
        inputs={name: _arrays(arrays) for name, arrays in zip(names, results["inputs"], strict=True)},
        outputs={name: _arrays(arrays) for name, arrays in zip(names, results["outputs"], strict=True)},
        results=dict(zip(notes.results, _arrays(results["results"]), strict=True)),
    )
    if statistics:
        trace.statistics = dict(zip(statistics, _arrays(results["statistics"]), strict=True))
    if "loss" in results:
        trace.loss = np.asarray(results["loss"])
        trace.gradients = {name: np.asarray(array) for name, array in results["gradients"].items()}
        trace.of_inputs = {name: np.asarray(array) for name, array in results["of_inputs"].items()}
        came = dict(zip(notes.cotangents, _arrays(results["cotangents"]), strict=True))
        trace.cotangents = {
            name: tuple(came.get((name, place)) for place in range(len(trace.outputs[name]))) for name in names
        }
    return trace


def _arrays(arrays: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """As NumPy's; what JAX has computed never changes."""
    return tuple(np.asarray(array) for array in arrays)


def _own(array: Any, dtype: str) -> np.ndarray:
    """A copy, in `dtype` where it is floating point."""
    return np.array(array, dtype if is_floating(array) else None)


def _in_jax(forced: Forced) -> dict[str, tuple[Any, ...]]:
    fields = {"inputs": forced.inputs, "outputs": forced.outputs, "cotangents": forced.cotangents}
    return {
        name: tuple(None if array is None else jnp.asarray(array) for array in arrays)
        for name, arrays in fields.items()
    }


def in_dtype_of(array: Any, dtype: str) -> Any:
    """A copy on the device, as `cast` has it. To be called in the settings of that dtype."""
    return jnp.array(array, cast(array.dtype, dtype))
