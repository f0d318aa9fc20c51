"""Models as users of Keras write them, and what holds of every one of them at work; on any of its backends.

Run as a script, it checks some of them on the backend that KERAS_BACKEND names, and prints what it found as JSON.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from common.foreign.protocol import Forced, Inputs, Trace
from resnet_keras.foreign import adapt
from resnet_keras.foreign_state import all_layers

NOISE = np.random.default_rng(7).normal(size=(2, 8, 9, 3)).astype("float32")
TOKENS = np.random.default_rng(8).integers(0, 11, size=(2, 6))


def randomised(model: Any) -> Any:
    """Every array distinct, none as it began."""
    generator = np.random.default_rng(3)
    for variable in model.weights:
        if "float" in keras.backend.standardize_dtype(variable.dtype):
            low, high = (0.5, 1.5) if "var" in variable.name or "gamma" in variable.name else (-0.5, 0.5)
            variable.assign(generator.uniform(low, high, tuple(variable.shape)))
    return model


def functional() -> Any:
    """A residual block by arithmetic on Keras' symbols, a layer that is called twice, and a nested model."""
    given = keras.Input((8, 9, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="stem")(given)
    x = layers.BatchNormalization(name="norm")(x)
    shared = layers.Conv2D(4, 3, padding="same", name="shared")
    x = x + shared(ops.relu(x))
    x = layers.Dropout(0.5, name="dropout")(shared(x))
    inner = keras.Sequential(
        [keras.Input((8, 9, 4)), layers.Conv2D(6, 1, activation="relu", name="conv"), layers.GlobalAveragePooling2D()],
        name="inner",
    )
    return randomised(keras.Model(given, layers.Dense(5, name="head")(inner(x)), name="residual"))


def sequential() -> Any:
    return randomised(
        keras.Sequential(
            [
                keras.Input((8, 9, 3)),
                layers.ZeroPadding2D(1, name="pad"),
                layers.Conv2D(4, 3, strides=2, name="conv"),
                layers.MaxPooling2D(2, name="pool"),
                layers.ReLU(6.0, name="relu"),
                layers.Flatten(name="flatten"),
                layers.Dense(3, activation="softmax", name="head"),
            ],
            name="small",
        )
    )


@keras.saving.register_keras_serializable(package="tests")
class Block(layers.Layer):
    """With a constant of its own, and a sublayer in a list."""

    def __init__(self, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.convs = [layers.Conv2D(width, 3, padding="same", name=f"conv{number}") for number in range(2)]
        self.scale = ops.convert_to_tensor(np.float32(0.3))

    def call(self, x: Any) -> Any:
        for conv in self.convs:
            x = x + self.scale * ops.tanh(conv(x))
        return x


class Subclassed(keras.Model):
    """Its constructor takes an object, so Keras knows no configuration of it."""

    def __init__(self, made: Callable[[], Any]) -> None:
        super().__init__()
        self.block = made()
        self.norm = layers.LayerNormalization(name="norm")
        self.gain = self.add_weight(shape=(3,), name="gain")

    def call(self, image: Any, training: bool = False) -> Any:
        x = self.norm(self.block(image)) * self.gain
        return {"map": x, "means": (ops.mean(x, axis=(1, 2)), ops.max(x))}


def subclassed() -> Any:
    model = Subclassed(lambda: Block(3, name="block"))
    model(NOISE)
    return randomised(model)


def transformer() -> Any:
    tokens, scale = keras.Input((6,), dtype="int32", name="tokens"), keras.Input((6, 4), name="scale")
    x = layers.Embedding(11, 4, mask_zero=True, name="table")(tokens)
    x = layers.Multiply(name="scaled")([x, scale])
    x = x + layers.MultiHeadAttention(2, 3, dropout=0.1, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    return randomised(keras.Model({"tokens": tokens, "scale": scale}, {"all": x, "first": x[:, 0]}, name="transformer"))


def recurrent() -> Any:
    given = keras.Input((3, 4))
    x = layers.Bidirectional(layers.LSTM(3, dropout=0.3, return_sequences=True, name="lstm"), name="both")(given)
    return randomised(keras.Model(given, layers.GRU(2, name="gru")(x), name="recurrent"))


WORDS = {"tokens": TOKENS, "scale": NOISE[:, 0, :6, :1] * np.ones(4, "float32")}
SEQUENCE = NOISE[:, :3, :4, 0]
MODELS: dict[str, tuple[Callable[[], Any], Inputs]] = {
    "functional": (functional, [NOISE]),
    "sequential": (sequential, [NOISE]),
    "subclassed": (subclassed, [NOISE]),
    "transformer": (transformer, WORDS),
    "recurrent": (recurrent, [SEQUENCE]),
}


def traces(model: Any) -> list[Any]:
    """What must be the same before and behind a comparison."""
    generator = keras.src.backend.common.global_state.get_global_attribute("global_seed_generator")
    jax = keras.config.backend() == "jax"  # assigning to a variable of JAX's is giving it another array
    variables = [
        (one.path, str(one.dtype), one.trainable, None if jax else id(one._value), array(one).tobytes())
        for one in (*model.variables, *getattr(model, "metrics_variables", ()))
    ]
    attributes = [
        {name: id(value) for name, value in vars(one).items() if not isinstance(value, bool | int | str)}
        for one in (*all_layers(model), *model.variables)
    ]
    if jax:
        attributes = [{name: value for name, value in one.items() if name != "_value"} for one in attributes]
    return [
        *(variables, attributes, [len(layer._losses) for layer in all_layers(model)]),
        *(keras.config.floatx(), keras.config.dtype_policy().name, keras.config.is_traceback_filtering_enabled()),
        *(id(vars(keras.layers.Layer)["__call__"]), id(vars(keras.Operation)["__call__"])),
        *(id(keras.src.backend.random.dropout), id(keras.src.backend.nn.conv), eager_functions()),
        *(getattr(model, "compiled", None), model.trainable),
        *(random.getstate(), [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]),
        generator and array(generator.state).tolist(),
    ]


def eager_functions() -> bool | None:
    if keras.config.backend() != "tensorflow":
        return None
    import tensorflow as tf

    return bool(tf.config.functions_run_eagerly())


def array(value: Any) -> np.ndarray:
    value = ops.convert_to_tensor(value)
    if keras.config.backend() == "torch":
        value = value.detach()
    return np.array(value if keras.config.backend() == "jax" else value.numpy())


def call(model: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """What a plain call returns."""
    outputs = model(inputs if isinstance(inputs, dict) else inputs[0])
    flat = keras.tree.flatten_with_path(outputs)
    return {".".join(map(str, path)): array(value) for path, value in flat}


def same(one: Any, other: Any) -> bool:
    """Bitwise, dictionaries of arrays or of tuples of arrays or None."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other is None or (one.dtype == other.dtype and np.array_equal(one, other))


def forced_by_itself(trace: Trace, *, inputs: bool = False) -> dict[str, Forced]:
    return {
        call.name: Forced(
            inputs=trace.inputs[call.name] if inputs else (),
            outputs=trace.outputs[call.name],
            cotangents=trace.cotangents.get(call.name, ()),
        )
        for call in trace.calls
    }


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Relative to the largest value; what is smaller than a thousandth is rounding, as an attention's key bias is."""
    return float(np.max(np.abs(one - other), initial=0) / max(np.max(np.abs(one), initial=0), 1e-3))


def at_work(model: Any, inputs: Inputs) -> dict[str, Any]:
    """What is to hold of a model at work, by what it says."""
    plain = call(model, inputs)
    before = traces(model)
    found: dict[str, Any] = {}
    whole: dict[str, Trace] = {}
    for dtype in ("float32", "float64"):
        with adapt(model).at_work(dtype) as runner:
            whole[dtype] = trace = runner.run(inputs, gradients=True)
            forwards = runner.run(inputs)
            again = runner.run(inputs, gradients=True, forced=forced_by_itself(trace))
            # Gradients of an array that several layers take are added up in another order if each has its own.
            inputs_too = runner.run(inputs, gradients=True, forced=forced_by_itself(trace, inputs=True))
            values = runner.values()
            found |= {
                f"{dtype}: as without gradients": same(forwards.results, trace.results),
                f"{dtype}: forced by itself": all(
                    same(getattr(again, part), getattr(trace, part))
                    for part in ("results", "inputs", "outputs", "gradients", "of_inputs", "cotangents", "loss")
                ),
                f"{dtype}: inputs forced by themselves": same(inputs_too.results, trace.results)
                and all(
                    apart(trace.gradients[name], inputs_too.gradients[name]) < 1e3 * np.finfo(dtype).eps
                    for name in trace.gradients
                ),
                f"{dtype}: of that dtype": {
                    str(one.dtype)
                    for one in (
                        *trace.results.values(),
                        *trace.gradients.values(),
                        *trace.of_inputs.values(),
                        trace.loss,
                    )
                }
                == {dtype},
                f"{dtype}: values of that dtype": all(
                    one.dtype == dtype for name, one in values.items() if np.issubdtype(one.dtype, np.floating)
                ),
                f"{dtype}: gradients of what is trained": [*trace.gradients]
                == [name for name, trained in runner.trained.items() if trained],
                f"{dtype}: gradients as the losses' differences": differences(runner, inputs, trace)
                if dtype == "float64" and keras.config.backend() == "tensorflow"
                else True,
            }
            training = runner.run(inputs, training=True, gradients=True)
            found[f"{dtype}: no randomness in training"] = same(
                training.results, runner.run(inputs, training=True).results
            )
            found[f"{dtype}: statistics are put back"] = same(runner.values(), values)
    single, double = whole["float32"], whole["float64"]
    return found | {
        "as it is called": same(dict(sorted(plain.items())), dict(sorted(single.results.items()))),
        "no trace": traces(model) == before,
        "called as before": same(call(model, inputs), plain),
        "the same calls": single.calls == double.calls,
        "float64 near": max(apart(double.results[name], single.results[name]) for name in plain),
        "gradients near": max(apart(double.gradients[name], single.gradients[name]) for name in single.gradients),
    }


def differences(runner: Any, inputs: Inputs, trace: Trace) -> bool:
    """Whether the loss moves with parameters, and with what a layer returns, as the gradients say."""
    generator = np.random.default_rng(0)
    values, step = runner.values(), 1e-6
    slope = 0.0
    moved: list[dict[str, np.ndarray]] = [{}, {}]
    for name, gradient in trace.gradients.items():
        direction = generator.normal(size=gradient.shape)
        slope += float(np.sum(direction * gradient))
        for sign, to in zip((1, -1), moved, strict=True):
            to[name] = values[name] + sign * step * direction
    losses = []
    for to in moved:
        runner.load(to)
        losses.append(float(runner.run(inputs, gradients=True).loss))
    runner.load(values)
    measured = (losses[0] - losses[1]) / (2 * step)
    close = [abs(measured - slope) <= 1e-6 * max(abs(slope), 1e-3)]
    for name, (came, *_) in trace.cotangents.items():
        if came is None:
            continue
        out = trace.outputs[name]
        direction = generator.normal(size=came.shape)
        losses = [
            float(
                runner.run(
                    inputs, gradients=True, forced={name: Forced(outputs=(out[0] + sign * step * direction,))}
                ).loss
            )
            for sign in (1, -1)
        ]
        measured, slope = (losses[0] - losses[1]) / (2 * step), float(np.sum(direction * came))
        close.append(abs(measured - slope) <= 1e-5 * max(abs(slope), 1e-3))
    return all(close)


class Doubles(layers.Layer):
    """Writes to what it is given, as only PyTorch's arrays can be written to."""

    def call(self, x: Any) -> Any:
        return x.mul_(2)


def in_place() -> bool:
    """Whether it is said that a model wrote to its input, and the input is as it was."""
    model, given = Doubles(), NOISE.copy()
    model.built = True
    with adapt(model).at_work("float32") as runner:
        trace = runner.run([given])
    return trace.changed_inputs == ("0",) and same(trace.results[""], 2 * NOISE) and same(given, NOISE)


if __name__ == "__main__":
    import sys

    found = {name: at_work(MODELS[name][0](), MODELS[name][1]) for name in sys.argv[1:]}
    if keras.config.backend() == "torch":
        next(iter(found.values()))["changed inputs are named"] = in_place()
    print(json.dumps(found))
