"""Models of Flax that are not ours, in a comparison: see common/foreign/protocol.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from common.errors import ModelError
from common.foreign import operations
from common.foreign.protocol import Forced, Held, Trace
from resnet_flax.foreign import adapt

pytestmark = pytest.mark.usefixtures("unoptimised")

IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)
TOKENS = np.arange(12).reshape(2, 6) % 10


class ConvNet(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = conv(6, (3, 3), (2, 2), padding=[(1, 1), (1, 1)], name="stem")(x)
        x = nn.relu(norm(name="norm")(x))
        y = norm()(conv(6, (3, 3), kernel_dilation=2, feature_group_count=2)(x))
        x = nn.relu(x + y).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return jnp.asarray(nn.Dense(5, dtype=self.dtype)(x), self.dtype)


class Setup(nn.Module):
    width: int = 8

    def setup(self) -> None:
        self.shared = nn.Dense(self.width)
        self.norms = [nn.LayerNorm(), nn.RMSNorm(epsilon=1e-4)]
        self.heads = {"a": nn.Dense(3), "b": nn.Dense(2)}

    def body(self, x: Any) -> Any:
        x = self.norms[0](self.shared(x))
        return self.norms[1](nn.gelu(self.shared(x)))

    def __call__(self, x: Any) -> dict[str, Any]:
        x = self.body(x)
        return {name: head(x) for name, head in self.heads.items()}


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, deterministic: bool) -> tuple[Any, Any]:
        table = nn.Embed(10, 8, name="table")
        y = table(x)
        y = y + nn.MultiHeadDotProductAttention(2, dropout_rate=0.3)(
            y, mask=nn.make_causal_mask(x), deterministic=deterministic
        )
        return table.attend(y), y


class Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return nn.LayerNorm()(x + nn.Dropout(0.2, deterministic=False)(nn.Dense(8)(x))), None


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="first")(x)
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
        x, _ = stack(name="stack")(x, None)
        x, _ = nn.remat(Block)(name="remat")(x)
        x, _ = nn.jit(Block)(name="jit")(x)
        return nn.Dense(8, name="first_again")(x)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.shared = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.shared(nnx.relu(self.shared(x))))
        return self.blocks[1](x + self.blocks[0](x))


class NnxConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 6, (3, 3), strides=2, padding=1, use_bias=False, dtype=jnp.float32, rngs=rngs)
        self.norm = nnx.BatchNorm(6, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: Any) -> dict[str, Any]:
        x = nnx.relu(self.norm(self.conv(x)))
        x = self.dropout(x.mean((1, 2)))
        return {"logits": self.head(x), "aux": (x,)}


def linen(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
    """With variables none of which is as a fresh one is."""
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(partial(module.init, **kwargs), keys, x, *args)
    random = np.random.default_rng(2)

    def values(leaf: Any) -> Any:
        few = len(leaf.shape) < 2  # scales and variances are not below zero
        return jnp.asarray(
            random.uniform(0.5, 1.5, leaf.shape) if few else random.normal(0, 0.3, leaf.shape), leaf.dtype
        )

    return module, jax.tree.map(values, shapes)


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any]
    inputs: Any
    plain: Callable[[Any], Any]  # what the user has without us, in eval mode
    names: list[str]  # of the calls


def applied(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda model: model[0].apply(model[1], *args, **kwargs)


def nnx_evaluated(x: Any) -> Callable[[Any], Any]:
    def plain(model: Any) -> Any:
        model = nnx.clone(model)
        model.eval()
        return model(x)

    return plain


CASES = {
    "compact": Case(
        lambda: linen(ConvNet(), IMAGES, train=False),
        [IMAGES],
        applied(IMAGES, train=False),
        ["stem", "norm", "Conv_0", "BatchNorm_0", "Dropout_0", "Dense_0"],
    ),
    "setup": Case(
        lambda: linen(Setup(), ROWS),
        [ROWS],
        applied(ROWS),
        ["shared", "norms_0", "shared#2", "norms_1", "heads_a", "heads_b"],
    ),
    "attention": Case(
        lambda: linen(Attention(), TOKENS, deterministic=True),
        {"x": TOKENS},
        applied(TOKENS, deterministic=True),
        [
            "table",
            *(f"MultiHeadDotProductAttention_0/{part}" for part in ("query", "key", "value", "out")),
            "MultiHeadDotProductAttention_0",
            "table#2",
        ],
    ),
    "nnx mlp": Case(
        lambda: Mlp(nnx.Rngs(0)), [ROWS], nnx_evaluated(ROWS), ["shared", "shared#2", "norm", "blocks/0", "blocks/1"]
    ),
    "nnx conv net": Case(
        lambda: NnxConvNet(nnx.Rngs(0)), [IMAGES], nnx_evaluated(IMAGES), ["conv", "norm", "dropout", "head"]
    ),
}


def each_case() -> Any:
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def each_mode() -> Any:
    """Without statistics and dropout there is one."""
    modes = {f"{name} eval": (case, False) for name, case in CASES.items()}
    modes |= {f"{name} train": (CASES[name], True) for name in ("compact", "nnx conv net")}
    return pytest.mark.parametrize(("case", "training"), modes.values(), ids=modes.keys())


def own(trace: Trace, **names: bool) -> dict[str, Forced]:
    """What every call had of itself."""
    kinds = {"inputs": trace.inputs, "outputs": trace.outputs, "cotangents": trace.cotangents}
    return {
        call.name: Forced(
            **{kind: arrays[call.name] for kind, arrays in kinds.items() if arrays and names.get(kind, True)}
        )
        for call in trace.calls
    }


@each_case()
def test_float32_is_what_the_user_computes_bit_for_bit_and_calls_come_in_order(case: Case) -> None:
    model = case.make()
    expected = jax.tree.leaves(case.plain(model))
    with adapt(model).at_work("float32") as runner:
        traces = [runner.run(case.inputs) for _ in range(3)]
    for trace in traces:
        assert [call.name for call in trace.calls] == case.names
        assert len(trace.results) == len(expected)
        for array, plain in zip(trace.results.values(), expected, strict=True):
            np.testing.assert_array_equal(array, plain)
        assert not trace.statistics
        assert not trace.gradients


@each_mode()
def test_float64_is_the_same_function(case: Case, training: bool) -> None:
    model = case.make()
    traces = {}
    for dtype in ("float32", "float64"):
        with adapt(model).at_work(dtype) as runner:
            traces[dtype] = runner.run(case.inputs, training=training, gradients=True)
            assert {array.dtype.name for array in runner.values().values()} == {dtype}
            runner.load(runner.values())
    single, double = traces.values()
    for kind in ("results", "gradients", "of_inputs", "statistics"):
        ours, theirs = getattr(single, kind), getattr(double, kind)
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert array.dtype == np.float64
            np.testing.assert_allclose(ours[name], array, rtol=1e-4, atol=3e-6)
    for array in [one for arrays in double.outputs.values() for one in arrays]:
        assert array.dtype == np.float64
    np.testing.assert_allclose(
        single.results[next(iter(single.results))], next(iter(double.results.values())), atol=3e-6
    )


@each_mode()
def test_a_model_that_is_given_its_own_arrays_computes_what_it_did(case: Case, training: bool) -> None:
    with adapt(case.make()).at_work("float64") as runner:
        before = runner.run(case.inputs, training=training, gradients=True)
        after = runner.run(case.inputs, training=training, gradients=True, forced=own(before))
        forward = runner.run(case.inputs, training=training, forced=own(before))
    assert before.loss == after.loss
    for kind in ("results", "gradients", "of_inputs", "statistics"):
        for name, array in getattr(before, kind).items():
            np.testing.assert_allclose(getattr(after, kind)[name], array, rtol=1e-14, atol=1e-17)
    assert any(array.any() for array in before.gradients.values())
    for name, array in before.results.items():
        np.testing.assert_array_equal(forward.results[name], array)
    for name, arrays in before.cotangents.items():
        for mine, yours in zip(arrays, after.cotangents[name], strict=True):
            assert mine is not None
            assert yours is not None
            np.testing.assert_allclose(mine, yours, rtol=1e-14, atol=1e-17)


def test_a_layer_that_is_given_another_input_computes_of_it_and_notes_its_own() -> None:
    model = linen(ConvNet(), IMAGES, train=False)
    other = np.random.default_rng(3).normal(size=(4, 4, 4, 6))
    with adapt(model).at_work("float64") as runner:
        before = runner.run([IMAGES])
        after = runner.run([IMAGES], forced={"Conv_0": Forced(inputs=(other,))})
        outputs = runner.run([IMAGES], forced={"norm": Forced(outputs=(other,))})
        values = runner.values()
    np.testing.assert_array_equal(after.inputs["Conv_0"][0], before.inputs["Conv_0"][0])
    with jax.enable_x64(True):
        conv = nn.Conv(6, (3, 3), kernel_dilation=2, feature_group_count=2, use_bias=False)
        expected = conv.apply({"params": {"kernel": values["Conv_0/kernel"]}}, other)
    np.testing.assert_allclose(after.outputs["Conv_0"][0], expected, rtol=1e-13)
    np.testing.assert_array_equal(outputs.outputs["norm"][0], before.outputs["norm"][0])
    np.testing.assert_array_equal(outputs.inputs["Conv_0"][0], np.maximum(other, 0))


def test_cotangents_are_the_gradients_of_outputs_and_can_be_replaced() -> None:
    module, variables = linen(Setup(), ROWS)
    weights = np.random.default_rng(4).normal(size=(*ROWS.shape[:-1], 3))

    def loss(output: Any) -> Any:
        return (output["a"] * weights).sum() + 0 * jax.lax.stop_gradient(output["b"]).sum()

    with adapt((module, variables)).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True, loss=loss)
        other = np.ones_like(trace.outputs["norms_1"][0])
        replaced = runner.run([ROWS], gradients=True, loss=loss, forced={"norms_1": Forced(cotangents=(other,))})
    np.testing.assert_allclose(trace.cotangents["heads_a"][0], weights, rtol=1e-14)
    assert trace.cotangents["heads_b"] == (None,)
    assert not trace.gradients["heads_b/kernel"].any()
    kernel = np.asarray(variables["params"]["heads_a"]["kernel"], np.float64)
    np.testing.assert_allclose(trace.cotangents["norms_1"][0], weights @ kernel.T, rtol=1e-13)
    np.testing.assert_array_equal(replaced.cotangents["norms_1"][0], trace.cotangents["norms_1"][0])
    np.testing.assert_array_equal(replaced.gradients["heads_a/kernel"], trace.gradients["heads_a/kernel"])
    x = trace.inputs["norms_1"][0]
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(replaced.gradients["norms_1/scale"], normed.sum((0, 1)), rtol=1e-12)


def test_gradients_are_those_of_jax() -> None:
    module, variables = linen(ConvNet(), IMAGES, train=False)

    def loss(params: Any, x: Any) -> Any:
        output, _ = module.apply(variables | {"params": params}, x, train=False, mutable=["batch_stats"])
        return jnp.mean(output**2 / 2 + jnp.sin(output))

    of_params, of_images = jax.grad(loss, argnums=(0, 1))(variables["params"], IMAGES)
    with adapt((module, variables)).at_work("float32") as runner:
        trace = runner.run([IMAGES], gradients=True)
    np.testing.assert_allclose(trace.of_inputs["0"], of_images, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(trace.gradients["stem/kernel"], of_params["stem"]["kernel"], rtol=1e-4, atol=1e-6)
    assert trace.gradients.keys() == {name for name, trained in runner.trained.items() if trained}


def test_later_outputs_count_less_in_the_default_loss() -> None:
    with adapt(linen(Setup(), ROWS)).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True)
    first, second = (np.mean(trace.results[name] ** 2 / 2 + np.sin(trace.results[name])) for name in "ab")
    assert trace.loss == pytest.approx(first + 0.3 * second, rel=1e-14)


def test_training_updates_statistics_in_the_trace_alone_and_drops_nothing() -> None:
    module, variables = linen(ConvNet(), IMAGES, train=False)
    with adapt((module, variables)).at_work("float64") as runner:
        values = runner.values()
        trace = runner.run([IMAGES], training=True)
        again = runner.run([IMAGES], training=True)
        for name, array in runner.values().items():
            np.testing.assert_array_equal(array, values[name])
    x = trace.inputs["norm"][0]
    expected = 0.9 * values["batch_stats/norm/var"] + 0.1 * x.var((0, 1, 2))
    np.testing.assert_allclose(trace.statistics["batch_stats/norm/var"], expected, rtol=1e-12)
    assert trace.statistics.keys() == {name for name in values if name.startswith("batch_stats/")}
    np.testing.assert_array_equal(trace.inputs["Dropout_0"][0], trace.outputs["Dropout_0"][0])
    for name, array in trace.results.items():
        np.testing.assert_array_equal(array, again.results[name])


def test_attention_drops_nothing_in_training_either() -> None:
    with adapt(linen(Attention(), TOKENS, deterministic=True)).at_work("float64") as runner:
        training, evaluated = runner.run([TOKENS], training=True), runner.run([TOKENS])
    np.testing.assert_array_equal(training.results["0"], evaluated.results["0"])


def test_what_runs_inside_a_loop_a_remat_or_a_jit_is_seen_from_outside() -> None:
    model = linen(Looped(), ROWS)
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([ROWS], training=True, gradients=True)
        after = runner.run([ROWS], training=True, gradients=True, forced=own(trace))
    assert [call.name for call in trace.calls] == ["first", "stack", "remat", "jit", "first_again"]
    assert all(call.leaf for call in trace.calls)
    stack = trace.calls[1]
    assert stack.arrays["Dense_0/kernel"] == Held(name="stack/Dense_0/kernel")
    assert trace.gradients["stack/Dense_0/kernel"].shape == (3, 8, 8)
    np.testing.assert_allclose(after.gradients["first/kernel"], trace.gradients["first/kernel"], rtol=1e-13)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dropout(0.5, deterministic=False)(x)


@pytest.mark.parametrize("before", [False, True], ids=["compiled here", "compiled by the user"])
def test_what_the_user_compiles_has_dropout_and_what_is_compiled_here_has_none(before: bool) -> None:
    module = nn.jit(Dropping)()

    def plain() -> Any:
        return module.apply({}, ROWS, rngs={"dropout": jax.random.key(3)})

    if before:
        plain()
    with adapt((module, {})).at_work("float32") as runner:
        np.testing.assert_array_equal(runner.run([ROWS], training=True).results[""], ROWS)
    assert (plain() == 0).any()


def test_calls_say_what_they_are_and_which_arrays_they_hold() -> None:
    with adapt(linen(ConvNet(), IMAGES, train=False)).at_work("float64") as runner:
        calls = {call.name: call for call in runner.run([IMAGES]).calls}
    assert calls["stem"].operation == operations.Conv(strides=(2, 2), padding=((1, 1), (1, 1)), dilation=(1, 1))
    assert calls["Conv_0"].operation == operations.Conv(strides=(1, 1), padding="same", dilation=(2, 2), groups=2)
    assert calls["norm"].operation == operations.BatchNorm(eps=1e-5, momentum=0.9)
    assert calls["Dropout_0"].operation == operations.Dropout(rate=0.5)
    assert calls["Dense_0"].operation == operations.Dense()
    assert calls["norm"].arrays["mean"] == Held(name="batch_stats/norm/mean")
    assert calls["norm"].arrays["scale"] == Held(name="norm/scale")
    assert calls["stem"].arrays == {"kernel": Held(name="stem/kernel")}
    assert (calls["stem"].layer, calls["stem"].kind, calls["stem"].leaf) == ("stem", "Conv", True)

    with adapt(linen(Attention(), TOKENS, deterministic=True)).at_work("float64") as runner:
        calls = {call.name: call for call in runner.run([TOKENS]).calls}
    whole = calls["MultiHeadDotProductAttention_0"]
    assert (whole.leaf, whole.operation, whole.arrays) == (False, None, {})
    assert calls["MultiHeadDotProductAttention_0/query"].operation is None
    assert calls["table"].arrays == {"table": Held(name="table/embedding")}
    assert (calls["table#2"].kind, calls["table#2"].operation) == ("Embed.attend", operations.Dense())
    assert calls["table#2"].arrays == {"kernel": Held(name="table/embedding", axes=(1, 0))}


class Flipped(nn.Dense):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return super().__call__(x)[..., ::-1]


def some_layers() -> dict[str, tuple[nn.Module, Any, operations.Operation | None]]:
    same, ones = ((0, 0), (0, 0)), (1, 1)
    conv = partial(operations.Conv, strides=ones, dilation=ones, padding="same")
    return {
        "valid": (nn.Conv(4, (3, 3), padding="VALID"), IMAGES, conv(padding=same)),
        "number": (nn.Conv(4, (3, 3), padding=2), IMAGES, conv(padding=((2, 2), (2, 2)))),
        "numbers": (
            nn.Conv(4, (3, 3), padding=(1, 2), strides=2),
            IMAGES,
            conv(padding=((1, 1), (2, 2)), strides=(2, 2)),
        ),
        "circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), IMAGES, None),
        "causal": (nn.Conv(4, (3,), padding="CAUSAL"), ROWS, None),
        "transposed": (nn.Conv(4, (3, 3), padding=1, input_dilation=2), IMAGES, None),
        "one axis": (nn.Conv(4, 3), ROWS, operations.Conv(strides=(1,), padding="same", dilation=(1,))),
        "local": (nn.ConvLocal(4, (3, 3)), IMAGES, None),
        "general": (nn.DenseGeneral(4), ROWS, operations.Dense()),
        "general of two": (nn.DenseGeneral((2, 4)), ROWS, None),
        "einsum": (nn.Einsum((8, 4), "...a,ab->...b"), ROWS, operations.Dense()),
        "other einsum": (nn.Einsum((8, 4), "nla,ab->nbl"), ROWS, None),
        "layer norm": (nn.LayerNorm(epsilon=1e-3), ROWS, operations.LayerNorm(eps=1e-3)),
        "of two axes": (
            nn.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2)),
            ROWS,
            operations.LayerNorm(eps=1e-6, axes=2),
        ),
        "of pixels": (nn.LayerNorm(reduction_axes=(1, 2)), IMAGES, None),
        "rms": (nn.RMSNorm(), ROWS, operations.LayerNorm(eps=1e-6, centred=False)),
        "group": (nn.GroupNorm(3), IMAGES, operations.GroupNorm(eps=1e-6, groups=3)),
        "group size": (nn.GroupNorm(None, 4), ROWS, operations.GroupNorm(eps=1e-6, groups=2)),
        "instance": (nn.InstanceNorm(), IMAGES, operations.GroupNorm(eps=1e-6, groups=3)),
        "own call": (Flipped(4), ROWS, None),
    }


@pytest.mark.parametrize(("module", "x", "operation"), some_layers().values(), ids=some_layers().keys())
def test_a_layer_alone_is_a_call_of_its_own(module: nn.Module, x: Any, operation: Any) -> None:
    with adapt(linen(module, x)).at_work("float64") as runner:
        trace = runner.run([x])
    (call,) = trace.calls
    assert call.name == type(module).__name__.lower()
    assert call.operation == operation
    assert call.arrays.keys() == {name.rpartition("/")[2] for name in runner.trained}


def nnx_layers() -> dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], Any, operations.Operation | None]]:
    conv = operations.Conv(strides=(1, 1), padding="same", dilation=(1, 1), groups=3)
    return {
        "conv": (lambda rngs: nnx.Conv(3, 6, (3, 3), feature_group_count=3, rngs=rngs), IMAGES, conv),
        "linear": (lambda rngs: nnx.Linear(8, 3, rngs=rngs), ROWS, operations.Dense()),
        "general": (lambda rngs: nnx.LinearGeneral(8, 3, rngs=rngs), ROWS, operations.Dense()),
        "einsum": (lambda rngs: nnx.Einsum("nla,ab->nlb", (8, 4), (4,), rngs=rngs), ROWS, operations.Dense()),
        "embed": (lambda rngs: nnx.Embed(10, 4, rngs=rngs), TOKENS, operations.Embedding()),
        "batch": (lambda rngs: nnx.BatchNorm(3, rngs=rngs), IMAGES, operations.BatchNorm(eps=1e-5, momentum=0.99)),
        "layer": (lambda rngs: nnx.LayerNorm(8, rngs=rngs), ROWS, operations.LayerNorm(eps=1e-6)),
        "rms": (lambda rngs: nnx.RMSNorm(8, rngs=rngs), ROWS, operations.LayerNorm(eps=1e-6, centred=False)),
        "group": (lambda rngs: nnx.GroupNorm(3, 3, rngs=rngs), IMAGES, operations.GroupNorm(eps=1e-6, groups=3)),
        "instance": (lambda rngs: nnx.InstanceNorm(3, rngs=rngs), IMAGES, operations.GroupNorm(eps=1e-6, groups=3)),
        "dropout": (lambda rngs: nnx.Dropout(0.25, rngs=rngs), ROWS, operations.Dropout(rate=0.25)),
        "attention": (lambda rngs: nnx.MultiHeadAttention(2, 8, dropout_rate=0.5, decode=False, rngs=rngs), ROWS, None),
    }


@pytest.mark.parametrize(("make", "x", "operation"), nnx_layers().values(), ids=nnx_layers().keys())
def test_a_layer_of_nnx_alone_says_what_it_is(make: Any, x: Any, operation: Any) -> None:
    with adapt(make(nnx.Rngs(0))).at_work("float64") as runner:
        trace, training = runner.run([x]), runner.run([x], training=True, gradients=x is not TOKENS)
        again = runner.run([x], training=True)
    if operation is not None:
        (call,) = trace.calls
        assert call.operation == operation
        assert training.calls[0].operation == operation
        assert {held.name for held in call.arrays.values()} == set(runner.trained)
    np.testing.assert_array_equal(training.results[""], again.results[""])


def test_names_of_nnx_are_paths_and_statistics_are_updated() -> None:
    model = NnxConvNet(nnx.Rngs(0))
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([IMAGES], training=True, gradients=True)
    assert runner.trained == {
        "conv/kernel": True,
        "head/bias": True,
        "head/kernel": True,
        "norm/bias": True,
        "norm/scale": True,
        "norm/mean": False,
        "norm/var": False,
    }
    expected = 0.9 + 0.1 * trace.inputs["norm"][0].var((0, 1, 2))
    np.testing.assert_allclose(trace.statistics["norm/var"], expected, rtol=1e-12)
    assert trace.calls[0].arrays == {"kernel": Held(name="conv/kernel")}
    assert list(trace.results) == ["aux.0", "logits"]


def test_values_can_be_set_some_or_all() -> None:
    for model in (linen(Setup(), ROWS), Mlp(nnx.Rngs(0))):
        with adapt(model).at_work("float64") as runner:
            before = runner.run([ROWS])
            values = runner.values()
            runner.load({"shared/bias": values["shared/bias"] + 1})
            assert np.abs(runner.run([ROWS]).outputs["shared"][0] - before.outputs["shared"][0] - 1).max() < 1e-14
            runner.load(values)
            after = runner.run([ROWS])
            for name, array in before.results.items():
                np.testing.assert_array_equal(after.results[name], array)
            with pytest.raises(ModelError, match="has no array nothing"):
                runner.load({"nothing": np.zeros(1)})
            with pytest.raises(ModelError, match=r"shape \(1,\) for one of shape \(8,\)"):
                runner.load({"shared/bias": np.zeros(1)})


def test_a_bound_module_and_frozen_variables_are_models_too() -> None:
    module, variables = linen(Setup(), ROWS)
    frozen = flax.core.freeze(variables)
    expected = module.apply(variables, ROWS)
    for model in (module.bind(variables), (module, frozen), module.bind(frozen)):
        adapter = adapt(model)
        assert (adapter.title, adapter.backend, adapter.layout, adapter.lacks) == (
            "Setup",
            "flax",
            "channels_last",
            frozenset(),
        )
        with adapter.at_work("float32") as runner:
            np.testing.assert_array_equal(runner.run([ROWS]).results["a"], expected["a"])
    assert adapter.describe()["flax"] == flax.__version__


class Noisy(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4)(x)
        if self.how == "key":
            return x + jax.random.normal(self.make_rng("noise"), x.shape)
        return x * np.random.default_rng().normal()


class NoisyNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.rngs = nnx.Linear(8, 4, rngs=rngs), rngs

    def __call__(self, x: Any) -> Any:
        x = self.linear(x)
        return x + jax.random.normal(self.rngs.noise(), x.shape)


@pytest.mark.parametrize("how", ["key", "numpy", "nnx"])
def test_randomness_shows(how: str) -> None:
    if how == "nnx":
        model: Any = NoisyNnx(nnx.Rngs(0))
    else:
        module = Noisy(how)
        model = module, module.init({"params": jax.random.key(0), "noise": jax.random.key(1)}, ROWS)
    with adapt(model).at_work("float64") as runner:
        results = [runner.run([ROWS]) for _ in range(4)]
    for one, other in pairwise(results):
        assert np.abs(one.results[""] - other.results[""]).max() > 1e-3
        (call,) = [call.name for call in one.calls]
        np.testing.assert_array_equal(one.outputs[call][0], other.outputs[call][0])


def classes() -> dict[str, Any]:
    return {
        f"{one.__qualname__}.{n}": v
        for one in (nnx.Linear, nnx.Dropout, nnx.Sequential, NnxConvNet, nn.Module, nn.Dense)
        for n, v in vars(one).items()
    }


def test_nothing_of_the_users_is_changed_not_even_after_an_error() -> None:
    module, variables = linen(ConvNet(), IMAGES, train=False)
    model = NnxConvNet(nnx.Rngs(0))
    model.train()
    leaves = [np.array(leaf) for leaf in jax.tree.leaves(variables)]
    state = jax.tree.map(
        lambda leaf: np.array(jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf),
        nnx.state(model),
    )
    before, precision = classes(), jax.config.jax_default_matmul_precision
    for one in ((module, variables), model):
        for dtype in ("float32", "float64"):
            with adapt(one).at_work(dtype) as runner:
                assert not jax.config.jax_enable_x64
                runner.run([IMAGES], training=True, gradients=True)
                with pytest.raises(ModelError):
                    runner.run([IMAGES[..., :2]])
                assert not jax.config.jax_enable_x64
                assert jax.config.jax_default_matmul_precision == precision
                assert classes() == before
    for leaf, old in zip(jax.tree.leaves(variables), leaves, strict=True):
        np.testing.assert_array_equal(leaf, old)
        assert leaf.dtype == old.dtype
    after = jax.tree.map(
        lambda leaf: np.array(jax.random.key_data(leaf) if leaf.dtype == jax.random.key(0).dtype else leaf),
        nnx.state(model),
    )
    jax.tree.map(np.testing.assert_array_equal, state, after)
    assert (model.conv.dtype, model.dropout.rate, model.dropout.deterministic) == (jnp.float32, 0.5, False)
    assert module.dtype == jnp.float32
    assert jnp.ones(2).dtype == jnp.float32


def test_a_model_for_double_precision_stays_so_for_its_user() -> None:
    with jax.enable_x64(True):
        module = nn.Dense(3, param_dtype=jnp.float64, dtype="float64")
        variables = module.init(jax.random.key(0), jnp.ones((2, 8)))
        with adapt((module, variables)).at_work("float32") as runner:
            assert runner.run([ROWS]).results[""].dtype == np.float32
        with adapt((module, variables)).at_work("float64") as runner:
            np.testing.assert_array_equal(runner.run([ROWS]).results[""], module.apply(variables, ROWS.astype(float)))
        assert jnp.ones(2).dtype == jnp.float64


@dataclass(frozen=True)
class Config:
    dtype: Any = jnp.bfloat16


class Configured(nn.Module):
    config: Config
    inner: nn.Module
    layer: Any = partial(nn.Dense, dtype=jnp.float32)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return self.inner(self.layer(4)(x.astype(self.config.dtype))) + self.inner(jnp.ones_like(x[..., :4]))


def test_dtypes_are_found_in_configurations_partials_and_inner_modules() -> None:
    model = linen(Configured(Config(), nn.Dense(4, dtype=jnp.bfloat16)), ROWS)
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([ROWS])
    assert [call.name for call in trace.calls] == ["Dense_0", "inner", "inner#2"]
    assert trace.results[""].dtype == np.float64
    with adapt(model).at_work("float32") as runner:
        assert runner.run([ROWS]).results[""].dtype == jnp.bfloat16


class Fixed(nn.Module):
    where: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.where == "input":
            x = x.astype(jnp.float32)
        x = nn.Dense(4, dtype=jnp.float32 if self.where == "layer" else None)(x)
        x = nn.Dense(4)(x)
        return x.astype(jnp.float32) if self.where == "result" else x


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("layer", "`Dense_0` computes in float32 inside; compare in float32"),
        ("input", "`Dense_0` is given float32: the model rounds before it; compare in float32"),
        ("result", "`Fixed` returns float32; compare in float32"),
    ],
)
def test_a_model_that_rounds_inside_is_none_in_float64(where: str, message: str) -> None:
    model = linen(Fixed(where), ROWS)
    with adapt(model).at_work("float64") as runner, pytest.raises(ModelError) as error:
        runner.run([ROWS])
    assert str(error.value) == message
    with adapt(model).at_work("float32") as runner:
        runner.run([ROWS])


class Switches(nn.Module):
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Any, y: Any, mask: Any = None, *, is_training: bool) -> Any:
        assert is_training is not self.deterministic
        x = nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x) + y)
        return x if mask is None else x * mask


class OfDict(nn.Module):
    @nn.compact
    def __call__(self, batch: dict[str, Any]) -> Any:
        return nn.Dense(4)(batch["x"]) + batch["y"]


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True)(x)


def test_switches_and_inputs_are_given_as_the_model_takes_them() -> None:
    y = np.ones((4, 6, 4), np.float32)
    model = linen(Switches(), ROWS, y, is_training=False)
    assert adapt(model).lacks == frozenset()
    with adapt(model).at_work("float64") as runner:
        by_order, by_name = runner.run([ROWS, y, y]), runner.run({"mask": y, "x": ROWS, "y": y}, gradients=True)
        np.testing.assert_array_equal(by_order.results[""], by_name.results[""])
        assert by_name.of_inputs.keys() == {"mask", "x", "y"}
        runner.run([ROWS, y], training=True)
        with pytest.raises(ModelError, match=r"^`Switches` needs `y` beside its inputs; give a dict"):
            runner.run([ROWS])
        with pytest.raises(ModelError, match=r"^`Switches` takes 3 inputs, 4 were given$"):
            runner.run([ROWS, y, y, y])
    with adapt(linen(OfDict(), {"x": ROWS, "y": y})).at_work("float64") as runner:
        assert runner.run({"x": ROWS, "y": y}, gradients=True).of_inputs.keys() == {"x", "y"}
    assert adapt(linen(Frozen(), ROWS)).lacks == {"training"}


class Raising(nn.Module):
    what: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(4, name="one")(x)
        match self.what:
            case "error":
                return Inner(name="two")(x)
            case "words":
                return {"x": x, "words": "no array"}
            case "nothing":
                return ()
            case "values":
                return x if x.mean() > -100 else -x
            case _:
                return jnp.argmax(x, -1)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        raise RuntimeError(f"no rows of {x.shape[-1]}\nsecond line")


def run(model: Any, **options: Any) -> Trace:
    with adapt(model).at_work("float64") as runner:
        return runner.run([ROWS], **options)


def test_errors_are_one_line_with_the_place() -> None:
    params = {"params": {"one": {"kernel": np.ones((8, 4), np.float32), "bias": np.ones(4, np.float32)}}}

    def raises(what: str, message: str, **options: Any) -> None:
        with pytest.raises(ModelError) as error:
            run((Raising(what), params), **options)
        assert str(error.value) == message

    raises("error", "`two` of `Raising` raised RuntimeError: no rows of 4")
    raises("words", "`Raising` returns a str at words; arrays were expected")
    raises("nothing", "`Raising` returns no array")
    raises("index", "`Raising` returns no array of floating point, which gradients could be taken of", gradients=True)
    raises(
        "values", "the loss of `Raising` is no scalar of floating point: (4, 6, 4)", gradients=True, loss=lambda y: y
    )
    raises("values", "`Raising` raised ZeroDivisionError: division by zero", gradients=True, loss=lambda y: 1 / 0)
    assert run((Raising("index"), params)).results[""].dtype == np.int64
    with pytest.raises(ModelError, match=r"^`one` of `Raising` raised ScopeCollectionNotFound: Tried to access"):
        run((Raising("values"), {"params": {}}))


def test_a_model_that_looks_at_values_runs_all_the_same() -> None:
    params = {"params": {"one": {"kernel": np.ones((8, 4), np.float32), "bias": np.ones(4, np.float32)}}}
    with adapt((Raising("values"), params)).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True)
        again = runner.run([ROWS], gradients=True, forced=own(trace))
    np.testing.assert_array_equal(trace.gradients["one/kernel"], again.gradients["one/kernel"])
    returned = trace.results[""]
    np.testing.assert_allclose(trace.cotangents["one"][0], (returned + np.cos(returned)) / returned.size, rtol=1e-14)


class Uncallable(nn.Module):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ConvNet(), "`ConvNet` comes without variables; give (module, variables), or bind them"),
        ((ConvNet(), None), "the variables of `ConvNet` are a NoneType; a dict of collections was expected"),
        ((Uncallable(), {}), "`Uncallable` has no method __call__, which a comparison calls"),
        ([1], "a list is no model of Flax; give (module, variables), a bound linen module, or an nnx.Module"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ModelError) as error:
        adapt(model)
    assert str(error.value) == message


def test_steps_of_linen_return_variables_and_leave_the_model_as_it_was() -> None:
    module, variables = linen(ConvNet(), IMAGES, train=False)

    def train(module: nn.Module, variables: Any) -> Callable[..., Any]:
        momentum = jax.tree.map(jnp.zeros_like, variables["params"])

        def loss(params: Any, statistics: Any, x: Any) -> Any:
            rngs = {"dropout": jax.random.key(np.random.default_rng().integers(1000))}
            y, new = module.apply({"params": params, "batch_stats": statistics}, x, rngs=rngs, mutable=["batch_stats"])
            return jnp.mean(y**2), new

        @partial(jax.jit, donate_argnums=0)
        def gradients(variables: Any, x: Any) -> Any:
            return jax.value_and_grad(loss, has_aux=True)(variables["params"], variables["batch_stats"], x)

        def step(variables: Any, x: Any) -> Any:
            nonlocal momentum
            kept = jax.tree.map(jnp.copy, variables["params"])
            (value, new), of_params = gradients(variables, x)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, of_params)
            return {"params": jax.tree.map(lambda p, m: p - 0.1 * m, kept, momentum), **new}, value

        return step

    with adapt((module, variables)).at_work("float64") as runner:
        before = runner.values()
        steps = runner.steps(train, [[IMAGES]] * 3)
        again = runner.steps(train, [{"x": IMAGES}] * 3)
        trace = runner.run([IMAGES], training=True)
        for name, array in runner.values().items():
            np.testing.assert_array_equal(array, before[name])
    assert len(steps) == 3
    assert steps[0].keys() == {*before, ""}
    assert steps[0][""] == pytest.approx((trace.results[""] ** 2).mean(), rel=1e-10)
    np.testing.assert_allclose(steps[0]["batch_stats/norm/mean"], trace.statistics["batch_stats/norm/mean"], rtol=1e-10)
    for one, other in zip(steps, again, strict=True):
        for name, array in one.items():
            np.testing.assert_allclose(array, other[name], rtol=1e-10, atol=1e-14)
    with (
        adapt((module, variables)).at_work("float64") as runner,
        pytest.raises(ModelError, match="returned a dict of stem"),
    ):
        runner.steps(lambda module, variables: lambda variables, x: {"stem": 1}, [[IMAGES]])
    with (
        adapt((module, variables)).at_work("float64") as runner,
        pytest.raises(ModelError, match="raised KeyError: 'x'"),
    ):
        runner.steps(lambda module, variables: lambda variables, x: {}["x"], [[IMAGES]])


def test_steps_of_nnx_change_a_copy_in_place() -> None:
    model = NnxConvNet(nnx.Rngs(0))

    def train(model: nnx.Module) -> Callable[..., Any]:
        model.train()

        @nnx.jit
        def step(model: Any, x: Any) -> Any:
            value, of_params = nnx.value_and_grad(lambda model: jnp.mean(model(x)["logits"] ** 2))(model)
            params = nnx.state(model, nnx.Param)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, of_params))
            return value

        return partial(step, model)

    with adapt(model).at_work("float64") as runner:
        before = runner.values()
        first, second = runner.steps(train, [[IMAGES]] * 2)
        trace = runner.run([IMAGES], training=True, gradients=True, loss=lambda y: jnp.mean(y["logits"] ** 2))
        for name, array in runner.values().items():
            np.testing.assert_array_equal(array, before[name])
    assert first[""] == pytest.approx(trace.loss, rel=1e-12)
    assert second[""] < first[""]
    np.testing.assert_allclose(first["norm/var"], trace.statistics["norm/var"], rtol=1e-12)
    expected = before["head/kernel"] - 0.1 * trace.gradients["head/kernel"]
    np.testing.assert_allclose(first["head/kernel"], expected, rtol=1e-12)


class DropPath(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return x * jax.random.bernoulli(self.make_rng("drop"), 0.5, (x.shape[0], 1, 1)) if train else x


class DropPathNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rngs = rngs

    def __call__(self, x: Any) -> Any:
        return x * jax.random.bernoulli(self.rngs.drop(), 0.5, (x.shape[0], 1, 1))


class Paths(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return x + DropPath()(nn.Dense(8)(x), train)


class PathsNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.drop = nnx.Linear(8, 8, rngs=rngs), DropPathNnx(rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        return x + self.drop(self.linear(x)) if train else x + self.linear(x)


def test_dropout_by_its_name_passes_on_what_it_gets() -> None:
    for model in (linen(Paths(), ROWS, train=False), PathsNnx(nnx.Rngs(0))):
        with adapt(model).at_work("float64") as runner:
            np.testing.assert_array_equal(runner.run([ROWS], training=True).results[""], runner.run([ROWS]).results[""])


class Encoder(nn.Module):
    def setup(self) -> None:
        self.dense = nn.Dense(4)

    def encode(self, x: Any) -> Any:
        return self.dense(x)

    def width(self) -> int:
        return 4


class Outer(nn.Module):
    def setup(self) -> None:
        self.encoder = Encoder()

    def __call__(self, x: Any) -> Any:
        return self.encoder.encode(x) * self.encoder.width()


def test_other_methods_are_calls_where_another_module_calls_them() -> None:
    trace = run(linen(Outer(), ROWS))
    assert [(call.name, call.kind, call.leaf) for call in trace.calls] == [
        ("encoder/dense", "Dense", True),
        ("encoder", "Encoder.encode", False),
    ]


def test_partitioned_parameters_have_their_plain_names() -> None:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Dense(4, kernel_init=init)
    variables = module.init(jax.random.key(0), ROWS)
    with adapt((module, variables)).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True)
    assert runner.trained == {"bias": True, "kernel": True}
    assert trace.gradients["kernel"].shape == (8, 4)


class Lone(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.BatchNorm(use_running_average=True, force_float32_reductions=False)(x)


def test_dtypes_that_nobody_wrote_round_nothing() -> None:
    with adapt(linen(Lone(), ROWS)).at_work("float64") as runner:
        runner.load({name: array + 1e-12 for name, array in runner.values().items()})
        trace, values = runner.run([ROWS]), runner.values()
    of = {name.rpartition("/")[2]: array for name, array in values.items()}
    expected = (ROWS - of["mean"]) / np.sqrt(of["var"] + 1e-5) * of["scale"] + of["bias"]
    np.testing.assert_allclose(trace.results[""], expected, rtol=1e-12, atol=1e-14)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, *arrays: Any) -> Any:
        return jnp.stack(arrays)


def test_many_inputs_keep_their_order() -> None:
    with adapt((Stacked(), {})).at_work("float64") as runner:
        trace = runner.run([np.full(2, number) for number in map(float, range(12))], gradients=True)
    assert list(trace.of_inputs) == [str(number) for number in range(12)]
    np.testing.assert_array_equal(trace.results[""][:, 0], range(12))
    np.testing.assert_allclose(trace.of_inputs["11"], [(11 + np.cos(11)) / 24] * 2)


class NnxLooped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Mlp8:
            return Mlp8(rngs)

        self.stack = make(rngs)
        self.whole = WholeJit(rngs)
        self.table = nnx.Param(jnp.ones((8,)))
        self.scale = jnp.full((8,), 2.0)
        self.last = nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.relu)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: Any, layer: Any) -> Any:
            return layer(x)

        return self.last(self.whole(forward(x, self.stack)) * self.table * self.scale)


class Mlp8(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.linear(x)


class WholeJit(Mlp8):
    @nnx.jit
    def __call__(self, x: Any) -> Any:
        return self.linear(x)


def test_what_nnx_runs_in_a_loop_or_a_jit_is_seen_from_outside_at_most() -> None:
    model = NnxLooped(nnx.Rngs(0))
    expected = model(ROWS)
    with adapt(model).at_work("float32") as runner:
        np.testing.assert_array_equal(runner.run([ROWS]).results[""], expected)
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True)
        after = runner.run([ROWS], gradients=True, forced=own(trace))
    assert [call.name for call in trace.calls] == ["whole", "last/layers/0", "last"]
    assert trace.calls[0].arrays["linear/kernel"] == Held(name="whole/linear/kernel")
    assert (runner.trained["table"], runner.trained["scale"]) == (True, False)
    assert runner.values()["stack/linear/kernel"].shape == (3, 8, 8)
    np.testing.assert_allclose(after.gradients["table"], trace.gradients["table"], rtol=1e-13)
    assert isinstance(vars(WholeJit)["__call__"], type(nnx.jit(lambda: 0)))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.RNN(nn.LSTMCell(4), name="rnn")(x)
        x = nn.Sequential([nn.Dense(4), nn.tanh, nn.WeightNorm(nn.Dense(3))], name="net")(x)
        return nn.vmap(nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})(2)(x)


def test_other_wrappers_of_linen_are_calls_as_a_whole() -> None:
    model = linen(Recurrent(), ROWS)
    expected = model[0].apply(model[1], ROWS)
    with adapt(model).at_work("float32") as runner:
        np.testing.assert_array_equal(runner.run([ROWS]).results[""], expected)
    with adapt(model).at_work("float64") as runner:
        trace = runner.run([ROWS], gradients=True)
    assert [call.layer for call in trace.calls if call.leaf] == ["rnn", "Dense_0", "Dense_1", "VmapDense_0"]


def test_parameters_in_bfloat16_stay_so_in_float32() -> None:
    module = nn.Dense(4, param_dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), ROWS)
    with adapt((module, variables)).at_work("float32") as runner:
        np.testing.assert_array_equal(runner.run([ROWS]).results[""], module.apply(variables, ROWS))
        assert runner.values()["kernel"].dtype == np.float32
        runner.load({"kernel": np.full((8, 4), 1 + 2**-12, np.float32)})
        assert (runner.values()["kernel"] == 1).all()
