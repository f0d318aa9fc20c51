"""A user's own Keras models at work: watched, steered, differentiated, in float64, and as they were behind it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

from common.errors import ModelError
from common.foreign import operations as said
from common.foreign.protocol import Forced, Held
from resnet_keras.foreign import adapt
from tests import foreign_keras
from tests.foreign_keras import MODELS, NOISE, WORDS, array, call, randomised, same, traces

ROOT = Path(__file__).parents[1]
# What of `foreign_keras.at_work` is no truth but a number, and its limit.
NEAR = {"float64 near": 1e-5, "gradients near": 1e-5}


def holds(found: dict[str, Any]) -> None:
    assert {name: value for name, value in found.items() if name not in NEAR and value is not True} == {}
    assert all(0 < found[name] < limit for name, limit in NEAR.items()), found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_at_work_is_the_model_that_is_called_and_leaves_no_trace(name: str) -> None:
    make, inputs = MODELS[name]
    holds(foreign_keras.at_work(make(), inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "names"),
    [("torch", ["functional", "subclassed", "transformer"]), ("jax", ["functional"])],
    ids=["torch", "jax"],
)
def test_so_it_is_on_keras_other_backends(engine: str, names: list[str]) -> None:
    # Eagerly, JAX compiles every operation for every shape: optimising these takes longer than it saves.
    environment = {"KERAS_BACKEND": engine, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.foreign_keras", *names],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout.splitlines()[-1]).values():
        holds(found)


def test_calls_are_named_by_the_layers_paths_in_the_order_in_which_they_end() -> None:
    model = foreign_keras.functional()
    with adapt(model).at_work("float32") as runner:
        trace = runner.run([NOISE])
    names = {call.name: call for call in trace.calls}
    relu, add, pool = (one.name for one in trace.calls if one.kind in ("Relu", "Add", "GlobalAveragePooling2D"))
    assert list(names) == [
        *("stem", "norm", relu, "shared", add, "shared#2", "dropout", "inner/conv", pool, "inner", "head")
    ]
    assert [call.layer for call in trace.calls if call.name == "shared#2"] == ["shared"]
    assert [name for name, call in names.items() if not call.leaf] == ["inner"]
    assert names["inner/conv"].kind == "Conv2D+relu"
    assert list(trace.inputs) == list(trace.outputs) == list(names)
    assert len(trace.inputs[add]) == 2
    assert list(runner.trained) == [
        *("stem/kernel", "norm/gamma", "norm/beta", "norm/moving_mean", "norm/moving_variance"),
        *(
            "shared/kernel",
            "shared/bias",
            "inner/conv/kernel",
            "inner/conv/bias",
            "head/kernel",
            "head/bias",
        ),
    ]
    assert [name for name, trained in runner.trained.items() if not trained] == [
        "norm/moving_mean",
        "norm/moving_variance",
    ]


def test_sublayers_in_a_subclass_have_paths_and_arrays_too() -> None:
    with adapt(foreign_keras.subclassed()).at_work("float32") as runner:
        trace = runner.run([NOISE])
    assert [call.name for call in trace.calls] == ["block/conv0", "block/conv1", "block", "norm"]
    assert list(trace.results) == ["map", "means.0", "means.1"]
    assert set(runner.trained) == {
        *("gain", "norm/gamma", "norm/beta"),
        *(f"block/conv{number}/{array}" for number in range(2) for array in ("kernel", "bias")),
    }


def test_two_sublayers_of_one_name_are_told_apart() -> None:
    class Twins(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = layers.Dense(2, name="dense"), layers.Dense(2, name="dense")

        def call(self, x: Any) -> Any:
            return self.one(x) + self.other(x)

    model = Twins()
    model(NOISE)
    with adapt(model).at_work("float32") as runner:
        assert [call.name for call in runner.run([NOISE]).calls] == ["dense", "dense~2"]
        assert list(runner.trained) == ["dense/kernel", "dense/bias", "dense~2/kernel", "dense~2/bias"]


def test_a_layer_alone_is_its_one_call() -> None:
    layer = layers.Conv2D(4, 3, name="conv")
    layer(NOISE)
    with adapt(layer).at_work("float64") as runner:
        trace = runner.run([NOISE], gradients=True)
    assert [call.name for call in trace.calls] == ["conv"]
    assert list(runner.trained) == ["kernel", "bias"]
    assert trace.results[""].dtype == "float64"
    assert list(trace.of_inputs) == ["0"]


def test_a_call_that_is_given_another_input_or_output_goes_on_with_it() -> None:
    model = foreign_keras.sequential()
    generator = np.random.default_rng(1)
    with adapt(model).at_work("float32") as runner:
        own = runner.run([NOISE], gradients=True)
        taken = generator.normal(size=own.inputs["conv"][0].shape).astype("float32")
        trace = runner.run([NOISE], forced={"conv": Forced(inputs=(taken,))})
        assert same(trace.outputs["conv"][0], array(model.get_layer("conv")(taken)))
        assert same(trace.inputs["conv"], own.inputs["conv"])
        instead = generator.normal(size=own.outputs["flatten"][0].shape).astype("float32")
        trace = runner.run([NOISE], forced={"flatten": Forced(outputs=(instead,))})
        assert same(trace.results[""], array(model.get_layer("head")(instead)))
        assert same(trace.outputs["flatten"], own.outputs["flatten"])
        # What comes back is noted down, and another goes on.
        back = generator.normal(size=instead.shape).astype("float32")
        trace = runner.run([NOISE], gradients=True, forced={"flatten": Forced(cotangents=(back,))})
        assert same(trace.cotangents["flatten"], own.cotangents["flatten"])
        assert same(trace.cotangents["relu"][0], back.reshape(own.outputs["relu"][0].shape))


def test_what_is_given_must_have_the_shape_of_what_it_replaces() -> None:
    with (
        adapt(foreign_keras.sequential()).at_work("float32") as runner,
        pytest.raises(
            ModelError, match=r"^conv: an output of shape \(2, 4, 5, 4\) cannot be replaced by one of \(1,\)$"
        ),
    ):
        runner.run([NOISE], forced={"conv": Forced(outputs=(np.zeros(1, "float32"),))})


def test_statistics_are_those_that_a_step_would_leave() -> None:
    model = foreign_keras.functional()
    norm = model.get_layer("norm")
    before = {name: array(getattr(norm, f"moving_{name}")).astype("float64") for name in ("mean", "variance")}
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([NOISE], training=True)
    given = trace.outputs["stem"][0]
    batch = {"mean": given.mean((0, 1, 2)), "variance": given.var((0, 1, 2))}
    assert set(trace.statistics) == {"norm/moving_mean", "norm/moving_variance"}
    for name, value in batch.items():
        np.testing.assert_allclose(
            trace.statistics[f"norm/moving_{name}"], 0.99 * before[name] + 0.01 * value, rtol=1e-12
        )


def test_dropout_passes_on_what_it_gets_in_training_mode_wherever_it_is() -> None:
    class Path(layers.Layer):
        def call(self, x: Any, training: bool = False) -> Any:
            return x * float(np.random.default_rng().random() > 0.5) if training else x

    class DropPath(Path):
        pass

    given = keras.Input((8, 9, 3))
    x = layers.GaussianNoise(1.0)(layers.SpatialDropout2D(0.9)(given))
    x = DropPath()(layers.RandomFlip()(x))
    model = keras.Model(given, layers.Lambda(lambda y: keras.random.dropout(y, 0.5))(x))
    with adapt(model).at_work("float32") as runner:
        assert same(runner.run([NOISE], training=True).results[""], NOISE)
        # A functional dropout in eval mode is the user's mistake, and shows.
        assert not same(runner.run([NOISE]).results[""], runner.run([NOISE]).results[""])


def test_other_randomness_goes_on_from_pass_to_pass_and_begins_again_behind() -> None:
    class Noisy(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.own = keras.random.SeedGenerator(3)

        def call(self, x: Any) -> Any:
            return x + keras.random.normal(ops.shape(x), seed=self.own) + keras.random.uniform(ops.shape(x))

    layer = Noisy()
    layer(NOISE)
    before = traces(layer)
    for dtype in ("float32", "float64"):
        with adapt(layer).at_work(dtype) as runner:
            drawn = [runner.run([NOISE]).results[""] for _ in range(2)]
            assert not same(*drawn)
        assert traces(layer) == before
        with adapt(layer).at_work(dtype) as runner:
            assert same(runner.run([NOISE]).results[""], drawn[0])


def test_the_default_loss_is_of_every_output_and_a_users_own_is_of_what_the_model_returned() -> None:
    with adapt(foreign_keras.subclassed()).at_work("float64") as runner:
        trace = runner.run([NOISE], gradients=True)
        expected = sum(
            0.3**place * np.mean(value**2 / 2 + np.sin(value)) for place, value in enumerate(trace.results.values())
        )
        assert trace.loss == pytest.approx(expected, rel=1e-14)
        own = runner.run([NOISE], gradients=True, loss=lambda outputs: ops.sum(outputs["means"][0]))
        assert own.loss == pytest.approx(trace.results["means.0"].sum(), rel=1e-13)
        with pytest.raises(
            ModelError, match=r"^the loss of Subclassed is an array of shape \(2, 8, 9, 3\); return a sc"
        ):
            runner.run([NOISE], gradients=True, loss=lambda outputs: outputs["map"])
        with pytest.raises(ModelError, match=r"^Subclassed: the loss raised KeyError: 'logits'"):
            runner.run([NOISE], gradients=True, loss=lambda outputs: outputs["logits"])


def test_what_the_loss_does_not_depend_on_has_a_gradient_of_zeros_and_no_cotangent() -> None:
    given = keras.Input((4,))
    used, unused = layers.Dense(2, name="used")(given), layers.Dense(2, name="unused")(given)
    with adapt(keras.Model(given, [used, unused])).at_work("float32") as runner:
        trace = runner.run([NOISE[:, 0, :4, 0]], gradients=True, loss=lambda outputs: ops.sum(outputs[0]))
    assert not trace.gradients["unused/kernel"].any()
    assert trace.gradients["used/kernel"].any()
    assert trace.cotangents["unused"] == (None,)


def test_loaded_values_are_the_runners_alone() -> None:
    model = foreign_keras.functional()
    before = traces(model)
    for dtype in ("float32", "float64"):
        with adapt(model).at_work(dtype) as runner:
            values = runner.values()
            own = runner.run([NOISE]).results
            runner.load({"head/bias": values["head/bias"] + 1})
            np.testing.assert_allclose(runner.run([NOISE]).results[""], own[""] + 1, rtol=1e-5)
            assert same(runner.values(), {**values, "head/bias": values["head/bias"] + 1})
            assert traces(model) == before
            with pytest.raises(ModelError, match=r"^residual has no array head/bas; it has stem/kernel, "):
                runner.load({"head/bas": values["head/bias"]})
            with pytest.raises(ModelError, match=r"^residual: head/bias is of shape \(5,\), not \(4,\)$"):
                runner.load({"head/bias": np.zeros(4)})


def test_runners_of_two_dtypes_are_at_work_at_once() -> None:
    model = foreign_keras.functional()
    with ExitStack() as stack:
        single, double = (stack.enter_context(adapt(model).at_work(dtype)) for dtype in ("float32", "float64"))
        results = [runner.run([NOISE]).results[""] for runner in (single, double, single, double)]
    assert [one.dtype.name for one in results] == ["float32", "float64"] * 2
    assert same(results[0], results[2])
    assert same(results[1], results[3])


def test_reduced_precision_stays_in_float32_and_is_none_in_float64() -> None:
    model = randomised(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, dtype="mixed_bfloat16"), layers.Rescaling(0.5), layers.Dense(3)]
        )
    )
    inputs = [NOISE[:, 0, :4, 0]]
    plain, before = call(model, inputs), traces(model)
    with adapt(model).at_work("float32") as single, adapt(model).at_work("float64") as double:
        assert same(single.run(inputs).results, plain)
        trace, values = double.run(inputs), double.values()
    assert traces(model) == before
    first, second = (name for name in values if name.endswith("kernel"))
    x = (inputs[0].astype("float64") @ values[first] + values[first.replace("kernel", "bias")]) * 0.5
    expected = x @ values[second] + values[second.replace("kernel", "bias")]
    np.testing.assert_allclose(trace.results[""], expected, rtol=1e-14)
    assert 1e-4 < np.abs(plain[""] - expected).max() < 1


def test_a_float64_model_is_float32_too() -> None:
    model = randomised(keras.Sequential([keras.Input((4,), dtype="float64"), layers.Dense(8, dtype="float64")]))
    before = traces(model)
    with adapt(model).at_work("float32") as single, adapt(model).at_work("float64") as double:
        results = [runner.run([NOISE[:, 0, :4, 0]]).results[""] for runner in (single, double)]
    assert traces(model) == before
    assert [one.dtype.name for one in results] == ["float32", "float64"]
    assert 0 < np.abs(results[0] - results[1]).max() < 1e-6


def test_a_traced_function_inside_runs_as_it_does_in_float32_and_eagerly_in_float64() -> None:
    class Traced(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.dropout = layers.Dense(3, name="dense"), layers.Dropout(0.5, name="dropout")

        @tf.function
        def inner(self, x: Any, training: bool) -> Any:
            return self.dropout(self.dense(x), training=training)

        def call(self, x: Any, training: bool = False) -> Any:
            return ops.tanh(self.inner(x, training))

    model = Traced()
    model.dense.build((None, 3))  # TensorFlow has no gradients of variables that were made in a trace
    plain = array(model(NOISE))
    with adapt(model).at_work("float32") as runner:
        trace = runner.run([NOISE])
        assert same(trace.results[""], plain)
        assert trace.calls == ()
        assert runner.run([NOISE], gradients=True).gradients["dense/kernel"].any()
    for _ in range(2):
        with adapt(model).at_work("float64") as runner:
            values = runner.values()
            runner.load({"dense/bias": values["dense/bias"] + 1})
            trace = runner.run([NOISE])
        expected = np.tanh(NOISE.astype("float64") @ values["dense/kernel"] + 1)
        np.testing.assert_allclose(trace.results[""], expected, rtol=1e-12)
        assert [call.name for call in trace.calls] == ["dense", "dropout"]
    assert same(array(model(NOISE)), plain)
    # In training mode too, or the user's function would have no dropout from then on.
    with adapt(model).at_work("float32") as runner:
        np.testing.assert_allclose(runner.run([NOISE], training=True).results[""], plain, rtol=1e-6)
    assert not same(array(model(NOISE, training=True)), array(model(NOISE, training=True)))


def test_what_keras_compiles_stays_compiled_in_float64() -> None:
    layer = layers.Conv2D(4, 3, groups=2, name="grouped")  # TensorFlow has no gradients of it otherwise
    image = NOISE[..., :2]
    layer(image)
    before = traces(layer)
    with adapt(layer).at_work("float32") as single, adapt(layer).at_work("float64") as double:
        near, exact = (runner.run([image], gradients=True).gradients["kernel"] for runner in (single, double))
    assert traces(layer) == before
    np.testing.assert_allclose(near, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_tensorflows_own_constants_are_float64_where_a_layer_keeps_them(kept: bool) -> None:
    class Scaled(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.factor = tf.constant(0.1)

        def call(self, x: Any) -> Any:
            return x * (self.factor if kept else tf.constant(0.1))

    layer = Scaled()
    layer(NOISE)
    with adapt(layer).at_work("float64") as runner:
        if kept:
            assert same(runner.run([NOISE]).results[""], NOISE.astype("float64") * np.float64(np.float32(0.1)))
            return
        with pytest.raises(
            ModelError,
            match=r"^Scaled: layer scaled\w* \(Scaled\) raised InvalidArgumentError: cannot compute Mul as input #1.* "
            r"float tensor; if it runs in float32, compare in float32$",
        ):
            runner.run([NOISE])


def two_arrays(left: Any, right: Any) -> Any:
    return left - right


class InList(layers.Layer):
    def call(self, arrays: Any, training: bool = False) -> Any:
        return two_arrays(*arrays)


class InPlaces(layers.Layer):
    def call(self, left: Any, right: Any, mask: Any = None) -> Any:
        return two_arrays(left, right)


class InDict(layers.Layer):
    def call(self, arrays: Any) -> Any:
        return two_arrays(arrays["left"], arrays["right"])


def called(layer: Any, inputs: Any) -> Any:
    layer(**inputs) if isinstance(layer, InPlaces) else layer(inputs)
    return layer


def graph(kind: type) -> Any:
    left, right = (keras.Input((9, 3), name=name) for name in ("left", "right"))
    return keras.Model({"right": right, "left": left} if kind is dict else [left, right], left - right, name="two")


LEFT, RIGHT = NOISE[:, 0], NOISE[:, 1]
NAMED = {"left": LEFT, "right": RIGHT}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: called(InList(), [LEFT, RIGHT]), [LEFT, RIGHT]),
        (lambda: called(InPlaces(), NAMED), [LEFT, RIGHT]),
        (lambda: called(InPlaces(), NAMED), NAMED),
        (lambda: called(InDict(), NAMED), NAMED),
        (lambda: graph(list), [LEFT, RIGHT]),
        (lambda: graph(list), NAMED),
        (lambda: graph(dict), NAMED),
        # In the order in which the model names them.
        (lambda: graph(dict), [RIGHT, LEFT]),
    ],
)
def test_inputs_are_given_as_the_model_takes_them(make: Callable[[], Any], inputs: Any) -> None:
    with adapt(make()).at_work("float32") as runner:
        trace = runner.run(inputs, gradients=True)
    assert same(trace.results[""], LEFT - RIGHT)
    assert set(trace.of_inputs) == ({"left", "right"} if isinstance(inputs, dict) else {"0", "1"})


def test_integers_stay_integers() -> None:
    with adapt(foreign_keras.transformer()).at_work("float64") as runner:
        trace = runner.run(WORDS, gradients=True)
    assert trace.inputs["table"][0].dtype == "int32"
    assert list(trace.of_inputs) == ["scale"]
    assert list(trace.results) == ["all", "first"]


class Raises(layers.Layer):
    def call(self, x: Any) -> Any:
        raise ValueError(f"\x1b[1mno such thing\x1b[0m as\n{x.shape}")


class Returns(layers.Layer):
    def call(self, x: Any) -> Any:
        return {"logits": x, "kind": "cat"}


def failing() -> Any:
    class Block(layers.Layer):
        def __init__(self) -> None:
            super().__init__(name="block")
            self.conv, self.bad = layers.Conv2D(2, 3, name="conv"), Raises(name="bad")

        def call(self, x: Any) -> Any:
            return self.bad(self.conv(x))

    block = Block()
    with pytest.raises(ValueError, match="no such thing"):
        block(NOISE)
    block.built = True
    return block


def test_an_exception_is_told_in_a_line_with_its_layer_and_leaves_no_trace() -> None:
    model = failing()
    before = traces(model)
    for dtype, advice in (("float32", ""), ("float64", "; if it runs in float32, compare in float32")):
        for gradients in (False, True):
            with adapt(model).at_work(dtype) as runner, pytest.raises(ModelError) as raised:
                runner.run([NOISE], training=True, gradients=gradients)
            assert str(raised.value) == f"Block: layer bad (Raises) raised ValueError: no such thing as{advice}"
            assert traces(model) == before


@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (lambda: layers.Dense(3), [NOISE], "Dense is not built, so it has no weights yet; call it once on an input"),
        (lambda: called(Returns(), NOISE), [NOISE], "Returns returns a str at kind, not an array; return arrays alone"),
        (lambda: graph(list), [LEFT], "two takes 2 inputs (left, right), and was given 1"),
        (lambda: graph(list), {"left": LEFT, "up": LEFT}, "two takes 2 inputs (left, right), and was given left, up"),
        (foreign_keras.sequential, [NOISE[:, :, :, :2]], "small: layer "),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(make: Callable[[], Any], inputs: Any, message: str) -> None:
    model = make()
    with pytest.raises(ModelError) as raised, adapt(model).at_work("float32") as runner:
        runner.run(inputs)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "kind"), [(3, "builtins.int"), (tf.Module(), "tensorflow.python.module.module.Module")]
)
def test_anything_else_is_no_model(model: Any, kind: str) -> None:
    with pytest.raises(ModelError, match=f"^{kind} is no model of Keras 3; give a keras.Model, a keras.Layer or a Sav"):
        adapt(model)


def test_a_quantized_model_has_no_float64_form() -> None:
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="dense")], name="small")
    model.get_layer("dense").quantize("int8")
    with pytest.raises(
        ModelError, match=r"^layer dense of small is quantized \(int8\), which has no float64 form; comp"
    ):
        adapt(model).at_work("float64").__enter__()


def by_tape(model: Any) -> Callable[..., Any]:
    optimizer = keras.optimizers.SGD(0.1)

    def step(images: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(model(images, training=True))) / 2
        slopes = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(slopes, model.trainable_variables)
        return loss

    return step


def by_fit(model: Any) -> Callable[..., Any]:
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return lambda images: model.train_on_batch(images, np.zeros((len(images), 5), "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("train", "factor"), [(by_tape, 0.5), (by_fit, 1.0)])
def test_steps_of_a_users_own_are_taken_on_the_model_and_put_back(
    train: Callable[[Any], Callable[..., Any]], factor: float, dtype: str
) -> None:
    model = foreign_keras.functional()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.train_on_batch(NOISE, np.zeros((2, 5), "float32"))
    before, optimizer, state = traces(model), model.optimizer, [array(one) for one in model.optimizer.variables]
    with adapt(model).at_work(dtype) as runner:
        own = runner.run([NOISE], training=True, gradients=True, loss=lambda y: ops.mean(ops.square(y)) / 2)
        values = runner.values()
        first, second = runner.steps(train, [[NOISE], [NOISE[::-1]]])
        assert same(runner.values(), values)
    assert traces(model) == before
    assert model.optimizer is optimizer
    assert all(map(same, state, (array(one) for one in model.optimizer.variables)))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    assert first[""] == pytest.approx(float(own.loss) * factor / 0.5, rel=max(tolerance, 1e-7))
    for name, gradient in own.gradients.items():
        expected = values[name] - 0.1 * factor / 0.5 * gradient
        np.testing.assert_allclose(first[name], expected, rtol=tolerance, atol=tolerance)
        assert first[name].dtype == dtype
    assert same({name: first[name] for name in own.statistics}, own.statistics) or dtype == "float32"
    assert not same(second["head/kernel"], first["head/kernel"])


def test_an_optimizer_that_the_model_has_works_in_its_dtype_and_is_as_it_was() -> None:
    model = foreign_keras.functional()
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.train_on_batch(NOISE, np.zeros((2, 5), "float32"))
    state = [array(one) for one in model.optimizer.variables]
    with adapt(model).at_work("float64") as runner:
        runner.steps(lambda one: lambda images: one.train_on_batch(images, np.zeros((2, 5))), [[NOISE]] * 2)
    assert all(map(same, state, (array(one) for one in model.optimizer.variables)))
    with adapt(model).at_work("float32") as runner, pytest.raises(ModelError, match="is to return a function, not a N"):
        runner.steps(lambda one: None, [[NOISE]])


class Overriding(layers.Conv2D):
    def call(self, x: Any) -> Any:
        return super().call(x) * 2


class Renamed(layers.Conv2D):
    def __init__(self, width: int) -> None:
        super().__init__(width, 3, padding="valid", name="conv")


IMAGE = (8, 8, 6)
NONE = ((0, 0), (0, 0))


@pytest.mark.parametrize(
    ("layer", "kind", "operation", "roles"),
    [
        (
            layers.Conv2D(4, (3, 2), strides=2, padding="same", groups=2),
            "Conv2D",
            said.Conv(strides=(2, 2), padding="same", dilation=(1, 1), groups=2),
            {"kernel", "bias"},
        ),
        (
            layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
            "DepthwiseConv2D",
            said.Conv(strides=(1, 1), padding=NONE, dilation=(1, 1), groups=6),
            {"kernel"},
        ),
        (
            Renamed(2),
            "Renamed",
            said.Conv(strides=(1, 1), padding=NONE, dilation=(1, 1)),
            {"kernel", "bias"},
        ),
        (Overriding(2, 3), "Overriding", None, {"kernel", "bias"}),
        (layers.Conv2D(2, 3, activation="gelu"), "Conv2D+gelu", None, {"kernel", "bias"}),
        (layers.SeparableConv2D(4, 3), "SeparableConv2D", None, {"depthwise_kernel", "pointwise_kernel", "bias"}),
        (layers.Conv2DTranspose(2, 3, activation="relu"), "Conv2DTranspose+relu", None, {"kernel", "bias"}),
        (layers.Dense(3), "Dense", said.Dense(), {"kernel", "bias"}),
        (layers.EinsumDense("bhwc,cd->bhwd", (8, 8, 2)), "EinsumDense", None, {"kernel"}),
        (
            layers.BatchNormalization(momentum=0.9, epsilon=1e-4),
            "BatchNormalization",
            said.BatchNorm(eps=1e-4, momentum=0.9),
            {"scale", "bias", "mean", "var"},
        ),
        (
            layers.LayerNormalization(axis=(2, 3)),
            "LayerNormalization",
            said.LayerNorm(eps=1e-3, axes=2),
            {"scale", "bias"},
        ),
        (layers.LayerNormalization(axis=1), "LayerNormalization", None, {"scale", "bias"}),
        (layers.RMSNormalization(), "RMSNormalization", said.LayerNorm(eps=1e-6, centred=False), {"scale"}),
        (layers.GroupNormalization(3), "GroupNormalization", said.GroupNorm(eps=1e-3, groups=3), {"scale", "bias"}),
        (
            layers.MaxPooling2D(3, 2),
            "MaxPooling2D",
            said.Pool(mode="max", window=(3, 3), strides=(2, 2), padding=NONE),
            set(),
        ),
        (
            layers.AveragePooling2D(2, padding="same"),
            "AveragePooling2D",
            said.Pool(mode="average", window=(2, 2), strides=(2, 2), padding="same"),
            set(),
        ),
        (
            layers.GlobalMaxPooling2D(keepdims=True),
            "GlobalMaxPooling2D",
            said.GlobalPool(mode="max", keep=True),
            set(),
        ),
        (layers.Activation("silu"), "Activation", said.Activation(name="silu"), set()),
        (layers.Activation(lambda x: x), "Activation", None, set()),
        (layers.ReLU(), "ReLU", said.Activation(name="relu"), set()),
        (layers.ReLU(max_value=6), "ReLU", said.Activation(name="relu6"), set()),
        (layers.ReLU(max_value=5), "ReLU", None, set()),
        (layers.ReLU(negative_slope=0.25), "ReLU", said.Activation(name="leaky_relu", slope=0.25), set()),
        (layers.LeakyReLU(0.5), "LeakyReLU", said.Activation(name="leaky_relu", slope=0.5), set()),
        (layers.ELU(2.0), "ELU", said.Activation(name="elu", slope=2.0), set()),
        (layers.Softmax(axis=3), "Softmax", said.Softmax(axis=-1), set()),
        (layers.PReLU(), "PReLU", None, {"alpha"}),
        # Made in the test: the state of its random numbers starts TensorFlow, which other tests configure before.
        (partial(layers.SpatialDropout2D, 0.5), "SpatialDropout2D", said.Dropout(rate=0.5), set()),
        (layers.Flatten(), "Flatten", said.Flatten(channels="last"), set()),
        (layers.ZeroPadding2D(((1, 2), (3, 4))), "ZeroPadding2D", said.Pad(padding=((1, 2), (3, 4))), set()),
        (layers.Rescaling(2.0), "Rescaling", None, set()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_says_what_it_does(layer: Any, kind: str, operation: said.Operation | None, roles: set[str]) -> None:
    given = np.ones((1, *IMAGE), "float32")
    layer = layer() if isinstance(layer, partial) else layer
    layer(given)
    with adapt(layer).at_work("float32") as runner:
        (found,) = runner.run([given]).calls
    assert (found.kind, found.operation, set(found.arrays)) == (kind, operation, roles)


def test_a_depthwise_kernel_is_held_as_that_of_a_grouped_convolution() -> None:
    layer = layers.DepthwiseConv2D(3, depth_multiplier=2)
    layer(np.ones((1, *IMAGE), "float32"))
    with adapt(layer).at_work("float32") as runner:
        (found,) = runner.run([np.ones((1, *IMAGE), "float32")]).calls
        assert found.arrays["kernel"] == Held(name="kernel", shape=(3, 3, 1, 12))
        kernel = found.arrays["kernel"].canonical(runner.values()["kernel"])
    image = np.random.default_rng(0).normal(size=(1, *IMAGE)).astype("float32")
    grouped = keras.ops.depthwise_conv(image, kernel.reshape(3, 3, 6, 2))
    np.testing.assert_allclose(array(grouped), array(layer(image)) - array(layer.bias), atol=1e-6)


def test_operations_of_a_graph_say_what_they_do() -> None:
    left, right = (keras.Input(IMAGE) for _ in range(2))
    x = ops.maximum(left * right, ops.gelu(left - right))
    x = ops.concatenate([x + 1.0, ops.leaky_relu(x, 0.25)], axis=-1)
    model = keras.Model([left, right], ops.mean(ops.concatenate([x, x], axis=1), axis=(1, 2)))
    with adapt(model).at_work("float32") as runner:
        calls = runner.run([np.ones((1, *IMAGE), "float32")] * 2).calls
    found = {(call.kind, call.operation) for call in calls}
    assert found == {
        ("Multiply", said.Merge(how="multiply")),
        ("Subtract", said.Merge(how="subtract")),
        ("Gelu", said.Activation(name="gelu_tanh")),
        ("Maximum", said.Merge(how="maximum")),
        ("Add", None),
        ("LeakyRelu", said.Activation(name="leaky_relu", slope=0.25)),
        ("Concatenate", said.Merge(how="concatenate")),
        ("Concatenate", None),
        ("Mean", said.GlobalPool(mode="average")),
    }


def test_the_layout_is_what_most_layers_say() -> None:
    given = keras.Input((3, 8, 9))
    x = layers.ZeroPadding2D(1, data_format="channels_first", name="pad")(given)
    x = layers.Concatenate(axis=1)([x, x])
    x = layers.Flatten(data_format="channels_last")(x)
    adapter = adapt(keras.Model(given, x))
    assert adapter.layout == "channels_last"
    model = keras.Model(given, layers.UpSampling2D(data_format="channels_first")(model_input := given + 1.0))
    assert adapt(model).layout == "channels_first"
    assert model_input is not None


def test_an_adapter_says_with_what_it_computes() -> None:
    adapter = adapt(foreign_keras.sequential())
    assert (adapter.backend, adapter.title, adapter.lacks) == ("keras:tensorflow", "small", frozenset())
    assert adapt(foreign_keras.subclassed()).title == "Subclassed"
    assert set(adapter.describe()) == {"keras", "tensorflow", "numpy", "python", "keras backend", "device"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("saved") / "small"
    model = foreign_keras.sequential()
    model.export(folder, verbose=False)
    return model, folder


@pytest.mark.parametrize("form", ["folder", "loaded", "layer", "signature"])
def test_a_saved_model_is_compared_by_its_outputs(exported: tuple[Any, Path], form: str) -> None:
    model, folder = exported
    given: Any = {
        "folder": lambda: str(folder),
        "loaded": lambda: tf.saved_model.load(folder),
        "layer": lambda: layers.TFSMLayer(folder, call_endpoint="serve"),
        "signature": lambda: layers.TFSMLayer(folder, call_endpoint="serving_default"),
    }[form]()
    adapter = adapt(given)
    assert adapter.lacks == {"layers", "gradients", "training", "float64"}
    assert adapter.backend == "tensorflow"
    with adapter.at_work("float32") as runner:
        own = runner.run([NOISE.astype("float64")]).results
        assert list(own) == (["output_0"] if form == "signature" else [""])
        np.testing.assert_allclose(*own.values(), call(model, [NOISE])[""], rtol=1e-5)
        values = runner.values()
        assert len(values) == len(model.weights)
        runner.load({name: value * 2 for name, value in values.items()})
        assert not same(runner.run([NOISE]).results, own)
    with adapter.at_work("float32") as runner:
        assert same(runner.run([NOISE]).results, own)
        with pytest.raises(ModelError, match=r"of which outputs in eval mode alone can be compared$"):
            runner.run([NOISE], gradients=True)
    with pytest.raises(ModelError, match=r"is a SavedModel, whose graph has its dtypes; compare in float32$"):
        adapter.at_work("float64").__enter__()


def test_a_folder_without_a_saved_model_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^{tmp_path} is no SavedModel; give a folder with a saved_model.pb$"):
        adapt(tmp_path)


def test_a_saved_module_of_several_inputs_takes_them_by_name(tmp_path: Path) -> None:
    class Difference(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 9, 3), name=name) for name in ("right", "left")])
        def minus(self, right: Any, left: Any) -> Any:
            return {"difference": left - right}

    module = Difference()
    tf.saved_model.save(module, str(tmp_path / "difference"), signatures={"minus": module.minus})
    with adapt(tmp_path / "difference").at_work("float32") as runner:
        assert same(runner.run(NAMED).results, {"difference": LEFT - RIGHT})
        with pytest.raises(
            ModelError, match=r"^difference takes its inputs by name \(left, right\); give these in a dict$"
        ):
            runner.run([LEFT, RIGHT])
