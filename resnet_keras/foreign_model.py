"""The adapter of Keras models: what `resnet_keras.foreign.adapt` makes of one."""

import importlib.metadata
import inspect
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from common.errors import ModelError, ParityError
from common.foreign.protocol import LATER_OUTPUT, Forced, Inputs, Layout, Loss, Runner, Trace
from resnet_keras import foreign_state
from resnet_keras.foreign import first_line, results
from resnet_keras.foreign_calls import Watch, paths
from resnet_keras.foreign_engines import ENGINES, Engine


class KerasAdapter:
    """A Keras model or layer, which stays the user's own: between passes nothing of it is changed."""

    def __init__(self, model: Any) -> None:
        framework = keras.backend.backend()
        if framework not in ENGINES:
            raise ModelError(f"Keras runs on {framework}; set KERAS_BACKEND to one of {', '.join(ENGINES)}")
        self._model = model
        self._engine = ENGINES[framework]()
        self.backend = f"keras:{framework}"
        plain = type(model).__module__.startswith("keras.") and isinstance(model, keras.Model)
        self.title: str = model.name if plain else type(model).__name__
        self.layout: Layout = _layout(model)
        self.lacks: frozenset[str] = frozenset()

    def describe(self) -> dict[str, str]:
        """Versions of what decides the numbers, and the device."""
        packages = ("keras", *self._engine.packages, "numpy")
        return {name: importlib.metadata.version(name) for name in packages} | {
            "python": platform.python_version(),
            "keras backend": self.backend.partition(":")[2],
            "device": self._engine.device(),
        }

    def at_work(self, dtype: str) -> AbstractContextManager[Runner]:
        """The model in a dtype. Raises `ModelError` where it is not built, or quantized."""
        return self._at_work(dtype)

    @contextmanager
    def _at_work(self, dtype: str) -> Iterator[Runner]:
        foreign_state.check(self._model, self.title, dtype)
        with foreign_state.generators_kept(self._model, self._engine):
            yield KerasRunner(self._model, dtype, self._engine, self.title, self.layout)


class KerasRunner:
    """A Keras model in one dtype.

    A variable that is to have another dtype has a place of its own for its values, which it is given for as long as a
    pass takes; another keeps its own place, and only what was loaded is assigned to it for as long.
    """

    def __init__(self, model: Any, dtype: str, engine: Engine, title: str, layout: Layout) -> None:
        self._model, self._dtype, self._engine, self._title, self._layout = model, dtype, engine, title, layout
        self._layers = paths(model)
        self._variables = foreign_state.weights(model, self._layers)
        trained = {id(variable) for variable in model.trainable_variables}
        self.trained: Mapping[str, bool] = {name: id(one) in trained for name, one in self._variables.items()}
        statistics = {id(one) for layer in foreign_state.all_layers(model) for one in layer._non_trainable_variables}
        self._statistics = [
            name
            for name, one in self._variables.items()
            if id(one) in statistics and "float" in keras.backend.standardize_dtype(one.dtype)
        ]
        self._loaded: dict[str, np.ndarray] = {}
        self._holders: dict[int, tuple[Any, Any]] = {}
        with engine.settings(dtype, untraced=False):
            for variable in self._all_variables():
                if foreign_state.differs(variable.dtype, dtype):
                    array = engine.array(variable).astype(dtype)
                    self._holders[id(variable)] = variable, engine.holder(variable, array)

    def _all_variables(self) -> list[Any]:
        """With those of metrics and of an optimizer, which only the user's own steps use."""
        model = self._model
        optimizer = getattr(model, "optimizer", None)
        others = [*getattr(model, "metrics_variables", ()), *(optimizer.variables if optimizer else ())]
        return list({id(one): one for one in (*self._variables.values(), *others)}.values())

    def values(self) -> dict[str, np.ndarray]:
        """All arrays by name, copied; those in floating point in the runner's dtype."""
        values = {}
        with self._engine.settings(self._dtype, untraced=False):
            for name, variable in self._variables.items():
                if id(variable) in self._holders:
                    values[name] = self._engine.array(self._holders[id(variable)][1])
                else:
                    array = self._loaded[name] if name in self._loaded else self._engine.array(variable)
                    floating = np.issubdtype(array.dtype, np.floating)
                    values[name] = array.astype(self._dtype) if floating else array.copy()
        return values

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Set arrays by name. Raises `ModelError` for one that the model has not, or not in that shape."""
        with self._engine.settings(self._dtype, untraced=False):
            for name, array in values.items():
                if name not in self._variables:
                    raise ModelError(f"{self._title} has no array {name}; it has {', '.join(self._variables)}")
                variable = self._variables[name]
                if array.shape != tuple(variable.shape):
                    raise ModelError(f"{self._title}: {name} is of shape {tuple(variable.shape)}, not {array.shape}")
                if id(variable) in self._holders:
                    holder = self._engine.holder(variable, array.astype(self._dtype))
                    self._holders[id(variable)] = variable, holder
                else:
                    self._loaded[name] = np.array(array)

    @contextmanager
    def _in_place(self, *, changing: bool) -> Iterator[None]:
        """The model as the runner has it, until the end of a pass; `changing` where it may assign to its weights."""
        filtered = keras.config.is_traceback_filtering_enabled()
        kept = self._all_variables() if changing else self._untrained()
        loaded = [self._variables[name] for name in self._loaded]
        with ExitStack() as stack:
            # What Keras adds to an exception hides its first line.
            keras.config.disable_traceback_filtering()
            stack.callback(keras.config.enable_traceback_filtering if filtered else lambda: None)
            stack.enter_context(foreign_state.marks_kept(self._model))
            stack.enter_context(
                foreign_state.in_dtype(self._model, self._dtype, self._engine, self._holders, untraced=changing)
            )
            known = {id(one) for one in kept}
            every = [*kept, *(one for one in loaded if id(one) not in known)]
            stack.enter_context(foreign_state.values_kept(every, self._engine))
            for name, array in self._loaded.items():
                self._variables[name].assign(array)
            yield

    def _untrained(self) -> list[Any]:
        return [
            *(variable for name, variable in self._variables.items() if not self.trained[name]),
            *getattr(self._model, "metrics_variables", ()),
        ]

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        """One pass: see `common.foreign.protocol.Runner`."""
        watch = self._watch(training, gradients, forced or {})
        engine, model = self._engine, self._model
        trained = [variable for name, variable in self._variables.items() if self.trained[name]]
        loss_of = loss or self._default_loss
        with self._in_place(changing=training):
            tensors = self._tensors(inputs)

            def forward(given: Mapping[str, Any]) -> tuple[Any, Any]:
                args, kwargs = self._arguments(given, named=isinstance(inputs, Mapping))
                with watch.watching():
                    outputs = model(*args, training=training, **kwargs)
                flat = self._results(outputs)
                scalar = None
                if gradients:
                    watch.failed = "the loss"
                    scalar = loss_of(outputs)
                    if not engine.concrete(scalar) or tuple(scalar.shape) != ():
                        shape = getattr(scalar, "shape", None)
                        found = f"a {type(scalar).__name__}" if shape is None else f"an array of shape {tuple(shape)}"
                        raise ModelError(f"the loss of {self._title} is {found}; return a scalar of the framework")
                    watch.failed = "the gradient"
                return scalar, (flat, watch.inputs, watch.outputs)

            with self._named(watch):
                of_variables: list[Any] = []
                of_inputs: dict[str, Any] = {}
                if gradients:
                    scalar, kept, of_variables, of_inputs = engine.differentiated(
                        forward, trained, tensors, [*model.variables, *getattr(model, "metrics_variables", ())]
                    )
                else:
                    scalar, kept = engine.undifferentiated(forward, tensors)
            flat, came, went = kept
            names = [name for name, is_trained in self.trained.items() if is_trained]
            return Trace(
                calls=tuple(watch.calls),
                inputs={name: tuple(map(engine.array, arrays)) for name, arrays in came.items()},
                outputs={name: tuple(map(engine.array, arrays)) for name, arrays in went.items()},
                results={name: engine.array(value) for name, value in flat.items()},
                changed_inputs=self._changed(inputs, tensors),
                statistics={name: engine.array(self._variables[name]) for name in self._statistics} if training else {},
                loss=engine.array(scalar) if gradients else None,
                gradients={
                    name: self._slope(slope, variable.value)
                    for name, slope, variable in zip(names, of_variables, trained, strict=gradients)
                },
                of_inputs={name: self._slope(slope, tensors[name]) for name, slope in of_inputs.items()},
                cotangents={name: tuple(arrays) for name, arrays in watch.cotangents.items()},
            )

    def _slope(self, slope: Any, like: Any) -> np.ndarray:
        array: np.ndarray = self._engine.array(slope) if slope is not None else np.zeros_like(self._engine.array(like))
        return array

    def _watch(self, training: bool, gradients: bool, forced: Mapping[str, Forced], recorded: bool = True) -> Watch:
        # Anew for every pass: a model may make layers when it is called.
        layers = paths(self._model)
        return Watch(
            engine=self._engine,
            layout=self._layout,
            layers=layers,
            names={id(one): name for name, one in foreign_state.weights(self._model, layers).items()},
            training=training,
            gradients=gradients,
            forced=forced,
            recorded=recorded,
        )

    def _results(self, outputs: Any) -> dict[str, Any]:
        def is_array(value: Any) -> bool:
            return isinstance(value, np.ndarray | keras.Variable) or self._engine.concrete(value)

        flat = results(outputs, is_array, self._title)
        return {
            name: value if self._engine.concrete(value) else keras.ops.convert_to_tensor(value)
            for name, value in flat.items()
        }

    def _default_loss(self, outputs: Any) -> Any:
        total: Any = 0
        floating = [
            value
            for value in self._results(outputs).values()
            if "float" in keras.backend.standardize_dtype(value.dtype)
        ]
        if not floating:
            raise ModelError(f"{self._title} returns nothing in floating point, which has no gradients; give a loss")
        for number, value in enumerate(floating):
            total = total + LATER_OUTPUT**number * self._engine.mean_loss(value)
        return total

    def _tensors(self, inputs: Inputs) -> dict[str, Any]:
        """Copies on the device, floating-point ones in the runner's dtype, by name or position."""
        named = inputs if isinstance(inputs, Mapping) else {str(place): one for place, one in enumerate(inputs)}
        return {
            str(name): keras.ops.convert_to_tensor(np.array(one, dtype=self._input_dtype(one)))
            for name, one in named.items()
        }

    def _input_dtype(self, array: Any) -> Any:
        return self._dtype if np.issubdtype(np.asarray(array).dtype, np.floating) else None

    def _changed(self, inputs: Inputs, tensors: Mapping[str, Any]) -> tuple[str, ...]:
        """Which of the inputs the model wrote to, as only PyTorch's can be."""
        if keras.backend.backend() != "torch":
            return ()
        named = inputs if isinstance(inputs, Mapping) else {str(place): one for place, one in enumerate(inputs)}
        return tuple(
            str(name)
            for name, one in named.items()
            if not np.array_equal(
                np.asarray(one, dtype=self._input_dtype(one)), self._engine.array(tensors[str(name)]), equal_nan=True
            )
        )

    def _arguments(self, given: Mapping[str, Any], *, named: bool) -> tuple[list[Any], dict[str, Any]]:
        """How the model is called with its inputs."""
        values = list(given.values())
        functional = getattr(self._model, "_functional", None) or self._model
        if isinstance(functional, keras.Function):
            structure = functional._inputs_struct
            by_key = isinstance(structure, Mapping) and not any(map(keras.tree.is_nested, structure.values()))
            known = list(structure) if by_key else [tensor.name for tensor in functional.inputs]
            if set(given) == set(known) if named else len(values) == len(known):
                ordered = dict(given) if named else dict(zip(known, values, strict=True))
                if by_key:
                    return [{name: ordered[name] for name in known}], {}
                return [keras.tree.pack_sequence_as(structure, [ordered[name] for name in known])], {}
            if not (named and len(given) == len(known) == 1):
                got = ", ".join(given) if named else f"{len(values)}"
                raise ModelError(f"{self._title} takes {len(known)} inputs ({', '.join(known)}), and was given {got}")
            return values, {}
        parameters = [
            one
            for one in inspect.signature(self._model.call).parameters.values()
            if one.name not in ("training", "mask")
        ]
        if named:
            by_name = {one.name for one in parameters}
            if set(given) <= by_name or any(one.kind is one.VAR_KEYWORD for one in parameters):
                return [], dict(given)
            return [dict(given)], {}
        places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        spread = len(places) >= len(values) or any(one.kind is one.VAR_POSITIONAL for one in parameters)
        return (values if spread else [values]), {}

    @contextmanager
    def _named(self, watch: Watch) -> Iterator[None]:
        """Exceptions of the user's as a `ModelError` in one line."""
        try:
            yield
        except ParityError:
            raise
        except Exception as error:
            where = f": {watch.failed}" if watch.failed else ""
            advice = "; if it runs in float32, compare in float32" if self._dtype == "float64" else ""
            raise ModelError(
                f"{self._title}{where} raised {type(error).__name__}: {first_line(error)}{advice}"
            ) from error

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> list[dict[str, Any]]:
        """Steps of the user's own: see `common.foreign.protocol.Runner`."""
        taken: list[dict[str, Any]] = []
        watch = self._watch(True, False, {}, recorded=False)
        with foreign_state.compiled_kept(self._model), self._in_place(changing=True), self._named(watch):
            watch.failed = "the function that makes a step"
            step = train(self._model)
            if not callable(step):
                raise ModelError(f"{self._title}: train(model) is to return a function, not a {type(step).__name__}")
            for batch in batches:
                watch.failed = None
                with watch.watching():
                    tensors = self._tensors(batch)
                    loss = step(**tensors) if isinstance(batch, Mapping) else step(*tensors.values())
                values = {name: self._engine.array(one) for name, one in self._variables.items()}
                if isinstance(loss, list | tuple):  # as `train_on_batch` returns it with metrics
                    loss = loss[0]
                if loss is not None:
                    values[""] = self._engine.array(loss) if self._engine.concrete(loss) else np.asarray(loss)
                taken.append(values)
        return taken


def _layout(model: Any) -> Layout:
    """Where most of a model's layers say that the channels stand; Keras' own word where none says anything."""
    said = [
        layer.data_format
        for layer in foreign_state.all_layers(model)
        if isinstance(getattr(layer, "data_format", None), str)
    ]
    first = sum(one == "channels_first" for one in said)
    if not said:
        default: Layout = keras.config.image_data_format()
        return default
    return "channels_first" if 2 * first > len(said) else "channels_last"
