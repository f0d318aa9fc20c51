"""What the three frameworks below Keras differ in where a user's model is watched, steered and differentiated.

All three run eagerly: TensorFlow by a tape, JAX by a vjp that is not compiled, PyTorch by its graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import keras
import numpy as np
from keras.src import backend as keras_backend  # where Keras' own convolution is

# What is called with what came back to an output.
Heard = Callable[[Any], None]
# A function of the model's inputs by name; returns a scalar, and tensors in any structure of tuples and dicts.
Function = Callable[[Mapping[str, Any]], tuple[Any, Any]]


class Engine(Protocol):
    """One framework below Keras."""

    packages: tuple[str, ...]

    def device(self) -> str: ...

    def array(self, tensor: Any) -> np.ndarray:
        """A copy; bfloat16, which NumPy has not, as float32."""
        ...

    def concrete(self, value: Any) -> bool:
        """Whether this is an array that has a value, or will have one at the end of `gradients`."""
        ...

    def passed(self, value: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
        """`by` in the place of `value`, or a copy of it where that is None; gradients pass as if nothing had happened.

        `heard` is told what comes back, then `cotangent` goes on in its place where that is not None.
        """
        ...

    def mean_loss(self, value: Any) -> Any:
        """The mean of y² / 2 + sin y, in the dtype of the array: Keras' own is of float32 on two of its backends."""
        ...

    def differentiated(
        self, function: Function, variables: Sequence[Any], inputs: Mapping[str, Any], state: Sequence[Any]
    ) -> tuple[Any, Any, list[Any], dict[str, Any]]:
        """What `function` returns and the scalar's gradients: of Keras variables, and of floating-point inputs. None
        stands where it does not depend on one. `state` are all variables that the pass may change."""
        ...

    def undifferentiated(self, function: Function, inputs: Mapping[str, Any]) -> Any:
        """What `function` returns, computed without notes for gradients."""
        ...

    def holder(self, variable: Any, array: np.ndarray) -> Any:
        """A place for the values of a Keras variable, in the dtype of an array."""
        ...

    def put(self, undo: ExitStack, variable: Any, holder: Any) -> None:
        """Have a Keras variable hold its values there, until `undo` ends."""
        ...

    def generators_kept(self) -> AbstractContextManager[Any]:
        """A context after which the framework's own generator draws as before; Keras' are others."""
        ...

    def settings(self, dtype: str, *, untraced: bool) -> AbstractContextManager[Any]:
        """A context in which the framework computes in a dtype; `untraced` where functions of the user's that can be
        traced are not to be."""
        ...


class TensorFlow:
    """TensorFlow, eagerly."""

    packages: tuple[str, ...] = ("tensorflow",)

    def __init__(self) -> None:
        import tensorflow as tf

        self._tf = tf

    def device(self) -> str:
        devices = self._tf.config.list_logical_devices("GPU") or self._tf.config.list_logical_devices()
        return str(devices[0].device_type).lower()

    def array(self, tensor: Any) -> np.ndarray:
        return _copied(self._tf.convert_to_tensor(tensor).numpy())

    def concrete(self, value: Any) -> bool:
        return isinstance(value, self._tf.Tensor) and not self._tf.is_symbolic_tensor(value)

    def passed(self, value: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
        tf = self._tf

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def identity(tensor: Any) -> Any:
            def back(came: Any) -> Any:
                came = tf.convert_to_tensor(came)
                if heard:
                    heard(came)
                return came if cotangent is None else tf.cast(cotangent, came.dtype)

            return (tf.identity(tensor) if by is None else tf.cast(by, tensor.dtype)), back

        return identity(value)

    def mean_loss(self, value: Any) -> Any:
        return self._tf.reduce_mean(value * value / 2 + self._tf.sin(value))

    def differentiated(
        self, function: Function, variables: Sequence[Any], inputs: Mapping[str, Any], state: Sequence[Any]
    ) -> tuple[Any, Any, list[Any], dict[str, Any]]:
        tf = self._tf
        values = [variable.value for variable in variables]
        wanted = {name: value for name, value in inputs.items() if value.dtype.is_floating}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch((values, wanted))
            loss, kept = function(inputs)
        of_values, of_inputs = tape.gradient(loss, (values, wanted))
        return loss, kept, of_values, of_inputs

    def undifferentiated(self, function: Function, inputs: Mapping[str, Any]) -> Any:
        return function(inputs)

    def holder(self, variable: Any, array: np.ndarray) -> Any:
        with self._tf.device(variable.value.device):
            holder = self._tf.Variable(array, trainable=variable.trainable)
        holder._unique_id = variable.value._unique_id  # by which an optimizer knows it
        return holder

    def put(self, undo: ExitStack, variable: Any, holder: Any) -> None:
        undo.callback(setattr, variable, "_value", variable._value)
        variable._value = holder

    @contextmanager
    def generators_kept(self) -> Iterator[None]:
        from tensorflow.python.eager import context  # the generator of operations without a seed is nowhere public

        generator = getattr(context.context(), "_rng", None)
        before = generator.getstate() if generator else None
        try:
            yield
        finally:
            if generator:
                generator.setstate(before)

    @contextmanager
    def settings(self, dtype: str, *, untraced: bool) -> Iterator[None]:
        """A function that was traced keeps the variables that it found, and the dropout."""
        if not untraced:
            yield
            return
        run_eagerly, before = self._tf.config.run_functions_eagerly, self._tf.config.functions_run_eagerly()
        convolve = keras_backend.nn.conv

        def conv(*args: Any, **kwargs: Any) -> Any:
            # Keras compiles convolutions of groups, since TensorFlow has no gradients of others on a CPU.
            run_eagerly(before)
            try:
                return convolve(*args, **kwargs)
            finally:
                run_eagerly(True)

        run_eagerly(True)
        keras_backend.nn.conv = conv
        try:
            yield
        finally:
            keras_backend.nn.conv = convolve
            run_eagerly(before)


class Jax:
    """JAX, operation by operation."""

    packages: tuple[str, ...] = ("jax", "jaxlib")

    def __init__(self) -> None:
        import jax

        self._jax = jax
        self._trace: Any = None  # of the function that is being differentiated

    def device(self) -> str:
        return str(self._jax.devices()[0].platform)

    def array(self, tensor: Any) -> np.ndarray:
        return _copied(np.array(tensor.value if isinstance(tensor, keras.Variable) else tensor))

    def concrete(self, value: Any) -> bool:
        if not isinstance(value, self._jax.Array):
            return False
        # Within the function that is differentiated all are tracers, but those of a loop or compiled function inside
        # it never get a value.
        return not isinstance(value, self._jax.core.Tracer) or getattr(value, "_trace", None) is self._trace

    def passed(self, value: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
        jnp = self._jax.numpy

        def identity(tensor: Any) -> Any:
            return tensor if by is None else jnp.asarray(by, tensor.dtype)

        def forwards(tensor: Any) -> tuple[Any, None]:
            return identity(tensor), None

        def backwards(_: None, came: Any) -> tuple[Any]:
            if heard:
                heard(came)
            return (came if cotangent is None else jnp.asarray(cotangent, came.dtype),)

        passing = self._jax.custom_vjp(identity)
        passing.defvjp(forwards, backwards)
        return passing(value)

    def mean_loss(self, value: Any) -> Any:
        return self._jax.numpy.mean(value * value / 2 + self._jax.numpy.sin(value))

    def differentiated(
        self, function: Function, variables: Sequence[Any], inputs: Mapping[str, Any], state: Sequence[Any]
    ) -> tuple[Any, Any, list[Any], dict[str, Any]]:
        jax, jnp = self._jax, self._jax.numpy
        wanted = {name: value for name, value in inputs.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        trained = {id(variable) for variable in variables}
        others = [variable for variable in state if id(variable) not in trained]

        def whole(values: Sequence[Any], floating: Mapping[str, Any]) -> Any:
            tracers = jax.tree.leaves((values, floating))
            self._trace = getattr(tracers[0], "_trace", None) if tracers else None
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))) as scope:
                loss, kept = function({**inputs, **floating})
            after = [scope.get_current_value(variable) for variable in others]
            return loss, (loss, kept, after)

        try:
            values = [variable.value for variable in variables]
            _, back, (loss, kept, after) = jax.vjp(whole, values, wanted, has_aux=True)
            of_values, of_inputs = back(jnp.ones_like(loss))
        finally:
            self._trace = None
        for variable, value in zip(others, after, strict=True):
            if value is not None:
                variable.assign(value)
        return loss, kept, list(of_values), dict(of_inputs)

    def undifferentiated(self, function: Function, inputs: Mapping[str, Any]) -> Any:
        return function(inputs)

    def holder(self, variable: Any, array: np.ndarray) -> Any:
        return self._jax.numpy.array(array)

    def put(self, undo: ExitStack, variable: Any, holder: Any) -> None:
        undo.callback(setattr, variable, "_value", variable._value)
        variable._value = holder

    def generators_kept(self) -> AbstractContextManager[Any]:
        return ExitStack()  # there is none

    def settings(self, dtype: str, *, untraced: bool) -> AbstractContextManager[Any]:
        if dtype != "float64":
            return ExitStack()
        enable_x64: Any = getattr(self._jax, "enable_x64", None)  # it is of jax.experimental before jax 0.8
        if enable_x64 is None:
            from jax import experimental

            enable_x64 = getattr(experimental, "enable_x64")  # noqa: B009
        entered: AbstractContextManager[Any] = enable_x64(True)
        return entered


class Torch:
    """PyTorch, eagerly."""

    packages: tuple[str, ...] = ("torch",)

    def __init__(self) -> None:
        import torch

        class Passed(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
                ctx.heard, ctx.cotangent = heard, cotangent
                return value.clone() if by is None else by.clone().to(value)

            @staticmethod
            def backward(ctx: Any, *came: Any) -> Any:
                if ctx.heard:
                    ctx.heard(came[0])
                return came[0] if ctx.cotangent is None else ctx.cotangent.to(came[0]), None, None, None

        self._torch = torch
        self._passed = Passed

    def device(self) -> str:
        return str(keras.ops.convert_to_tensor(0.0).device.type)

    def array(self, tensor: Any) -> np.ndarray:
        tensor = (tensor.value if isinstance(tensor, keras.Variable) else tensor).detach().cpu()
        return np.array((tensor.float() if tensor.dtype == self._torch.bfloat16 else tensor).numpy())

    def concrete(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor) and value.device.type != "meta"

    def passed(self, value: Any, by: Any, heard: Heard | None, cotangent: Any) -> Any:
        return self._passed.apply(value, by, heard, cotangent)

    def mean_loss(self, value: Any) -> Any:
        return self._torch.mean(value * value / 2 + self._torch.sin(value))

    def differentiated(
        self, function: Function, variables: Sequence[Any], inputs: Mapping[str, Any], state: Sequence[Any]
    ) -> tuple[Any, Any, list[Any], dict[str, Any]]:
        torch = self._torch
        values = [variable.value for variable in variables]
        wanted = {name: value.requires_grad_() for name, value in inputs.items() if value.is_floating_point()}
        before = [value.requires_grad for value in values]
        try:
            for value in values:
                value.requires_grad_(True)
            with torch.enable_grad():
                loss, kept = function({**inputs, **wanted})
            sources = [*values, *wanted.values()]
            if loss.requires_grad and sources:
                slopes = list(torch.autograd.grad(loss, sources, allow_unused=True))
            else:
                slopes = [None] * len(sources)
        finally:
            for value, required in zip(values, before, strict=True):
                value.requires_grad_(required)
        return loss, kept, slopes[: len(values)], dict(zip(wanted, slopes[len(values) :], strict=True))

    def undifferentiated(self, function: Function, inputs: Mapping[str, Any]) -> Any:
        with self._torch.no_grad():
            return function(inputs)

    def holder(self, variable: Any, array: np.ndarray) -> Any:
        return self._torch.tensor(array, device=variable.value.device)

    def put(self, undo: ExitStack, variable: Any, holder: Any) -> None:
        """The parameter stays the same one: others know it by its identity."""
        parameter = variable._value

        def back(data: Any, grad: Any) -> None:
            parameter.grad = None  # one of another dtype would not fit
            parameter.data = data
            parameter.grad = grad

        undo.callback(back, parameter.data, parameter.grad)
        parameter.grad = None
        parameter.data = holder

    @contextmanager
    def generators_kept(self) -> Iterator[None]:
        before = self._torch.get_rng_state()
        try:
            yield
        finally:
            self._torch.set_rng_state(before)

    def settings(self, dtype: str, *, untraced: bool) -> AbstractContextManager[Any]:
        return ExitStack()


def _copied(array: np.ndarray) -> np.ndarray:
    # The dtype of bfloat16 is not one of NumPy's own, and none of NumPy's tests takes it for floating point.
    return array.astype("float32") if array.dtype.name == "bfloat16" else np.array(array)


ENGINES: dict[str, Callable[[], Engine]] = {"tensorflow": TensorFlow, "jax": Jax, "torch": Torch}
