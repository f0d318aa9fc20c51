"""Each layer of the vocabulary alone: its definition in NumPy against the native layer of every framework, forwards and
backwards, at an even and an odd size; and what `common` makes of it."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest

from common import weights
from common.architectures import layers
from common.architectures.layers import (
    ACTIVATIONS,
    INPUT,
    Add,
    Affine,
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    DepthwiseConv,
    Flatten,
    Gate,
    GlobalPool,
    MaxPool,
    ReLU,
    ReLU6,
    Sigmoid,
    StochasticDepth,
    output_shapes,
    window_padding,
)
from common.errors import InputError, SpecError, WeightsError
from common.names.roles import FLAX, KERAS, PYTORCH
from common.parity.subjects import arrays_of_passes
from common.report import networks
from common.training import dropout
from common.weights import layouts
from common.weights.random import before_addition, fans
from tests.layer_cases import CASES, EVEN, EXACT, ODD, WRONG, defined, differentiated
from tests.scripts import printed

# A sum of n products is off by n u of its terms at most; none of these has more than a few hundred.
TOLERANCE = 1e-13


@dataclass(frozen=True)
class Walk:
    """What a family would make of these layers, as far as `common` asks for it."""

    layers: tuple
    in_channels: int = 3
    family = "walk"


def conv_of(path, inputs, channels, out, kind=Conv, **options):
    ends = {"in_channels": channels} | ({"out_channels": out} if kind is Conv else {})
    return kind(path=path, inputs=(inputs,), **({"kernel": 3, "stride": 1, "padding": "same"} | ends | options))


def apart(a, b):
    """The largest difference, against the largest value."""
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture(scope="module")
def expected():
    """What the definitions say of every case and size: computed once for all frameworks."""
    found = {}
    for name, case in CASES.items():
        for size in (EVEN, ODD):
            inputs, arrays, slopes, mask = case.drawn(size)
            found[name, size] = {
                "output": defined(case.layer, inputs, arrays, mask),
                "eval": defined(case.layer, inputs, arrays, mask, training=False),
                **differentiated(case.layer, inputs, arrays, slopes, mask),
            }
    return found


def native(session, framework, folder):
    path = folder / "results.npz"
    if framework in session.columns:
        engine = framework.partition(":")[0]
        code = f"import json, numpy; from tests.native_layers import run; numpy.savez({str(path)!r}, **run({engine!r}))"
        printed(session, framework, f"{code}; print(json.dumps(True))")
        return np.load(path)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    arguments = [sys.executable, "-m", "tests.native_layers", framework, str(path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return np.load(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework",
    [
        *("torch", "keras:tensorflow", "flax"),
        *(pytest.param(engine, marks=pytest.mark.long) for engine in ("keras:jax", "keras:torch")),
    ],
)
def test_every_layer_follows_its_definition_forwards_and_backwards(session, framework, expected, tmp_path):
    found = native(session, framework, tmp_path)
    wrong = []
    for (name, size), arrays in expected.items():
        # On these Keras takes means in float32, in a float64 network too.
        soft = framework in ("keras:jax", "keras:torch") and CASES[name].layer.kind in ("norm", "global_pool")
        for what, array in arrays.items():
            result = found[f"{name}|{size}|float64|{what}"]
            if result.dtype != np.float64 or result.shape != array.shape:
                wrong.append(f"{name}, {size}, {what}: {result.dtype} {result.shape}, not {array.shape}")
            elif not (difference := apart(result, array)) < (1e-5 if soft else TOLERANCE):
                wrong.append(f"{name}, {size}, {what}: {difference:.1e}")
    for name, case in EXACT.items():
        for size in (EVEN, ODD):
            inputs, arrays, _, mask = case.drawn(size, "float32")
            result = found[f"{name}|{size}|float32|output"]
            if result.dtype != np.float32 or not np.array_equal(result, defined(case.layer, inputs, arrays, mask)):
                wrong.append(f"{name}, {size}: another integer, or {result.dtype}")
    assert not wrong, "\n".join(wrong)
    # A user's own stochastic depth draws anew at every call, and whole images.
    assert (found["own eval"] == 1).all()
    first, second = (found[f"own {i}"].reshape(400, -1) for i in range(2))
    assert (first == first[:, :1]).all()
    assert np.allclose(np.unique(first), [0, 1 / 0.7])
    assert abs((first > 0).mean() - 0.7) < 0.12
    assert (first != second).any()


@pytest.mark.parametrize("reading", WRONG)
def test_another_reading_would_be_seen(reading):
    name, size, computed = WRONG[reading]
    inputs, arrays, _, mask = CASES[name].drawn(size)
    right, other = (f(CASES[name].layer, inputs, arrays, mask) for f in (defined, computed))
    assert right.shape != other.shape or apart(other, right) > 1e-2


def test_every_kind_is_among_the_cases():
    def kinds(cls):
        return {kind for sub in cls.__subclasses__() for kind in ({getattr(sub, "kind", None)} | kinds(sub))}

    # These are tested with the families that had them first, or draw what the mask of stochastic depth stands for.
    elsewhere = {"add", "zero_pad", "adaptive_pool", "dropout", "flatten", "dense", "softmax"}
    assert kinds(layers.Layer) - {None} == {case.layer.kind for case in CASES.values()} | elsewhere
    assert {kind.kind: kind for kind in ACTIVATIONS.values()} == ACTIVATIONS


def test_torch_modules_are_scripted_and_traced():
    import torch

    from tests.native_layers import torch_module

    for name, case in CASES.items():
        if case.layer.kind in ("concat", "gate"):
            continue
        module = torch_module(case.layer).eval()
        x = torch.randn(2, case.channels[0], *ODD)
        # A leaf module of its own is not traced into, and some work in place.
        expected = module(x.clone())
        for other in (torch.jit.script(module), torch.fx.symbolic_trace(torch.nn.Sequential(module))):
            assert torch.equal(other(x.clone()), expected), name


def test_what_torch_has_itself_is_its_own_layer():
    import torch

    from resnet_torch.layers import avg_pool2d, conv2d, max_pool2d

    for padding in ("symmetric", "valid", "ceil", 1):
        assert type(max_pool2d(3, 2, padding=padding)) is torch.nn.MaxPool2d
        assert type(avg_pool2d(3, 2, padding=padding, count_padding=True)) is torch.nn.AvgPool2d
    assert type(avg_pool2d(3, 1, padding="same", count_padding=False)) is torch.nn.AvgPool2d
    assert type(conv2d(3, 4, (1, 7), padding="same", bias=False)) is torch.nn.Conv2d
    assert conv2d(3, 4, (1, 7), padding="symmetric", bias=False).padding == (0, 3)


class TestShapes:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    @pytest.mark.parametrize("size", [EVEN, ODD])
    def test_the_walk_knows_the_shape_of_the_output(self, case, size):
        inputs, arrays, _, mask = case.drawn(size)
        assert defined(case.layer, inputs, arrays, mask).shape[1:] == case.layer.output_shape(*case.shapes(size))

    def test_a_rectangular_kernel(self):
        conv = conv_of("c", INPUT, 6, 8, kernel=(1, 7), padding="symmetric")
        assert conv.parameters == {"c.kernel": (1, 7, 6, 8)}
        assert conv.spatial_padding((9, 9, 6)) == ((0, 0), (3, 3))
        assert conv.multiply_adds((9, 5, 6)) == 9 * 5 * 8 * 7 * 6
        assert replace(conv, kernel=7).sides == (7, 7)

    def test_alexnet_pads_an_11x11_window_by_2(self):
        conv = conv_of("c", INPUT, 3, 64, kernel=11, stride=4, padding=2)
        assert conv.output_shape((224, 224, 3)) == (55, 55, 64)

    def test_a_depthwise_convolution(self):
        conv = DepthwiseConv(path="d", inputs=("x",), kernel=5, stride=2, padding="same", in_channels=32)
        assert conv.parameters == {"d.kernel": (5, 5, 1, 32)}
        assert (conv.kind, conv.groups, conv.out_channels) == ("depthwise", 32, 32)
        assert conv.output_shape((9, 9, 32)) == (5, 5, 32)
        assert conv.multiply_adds((9, 9, 32)) == 5 * 5 * 25 * 32
        assert replace(conv, kernel=3).parameters == {"d.kernel": (3, 3, 1, 32)}

    def test_a_norm_without_a_scale(self):
        norm = BatchNorm(path="n", inputs=("x",), channels=5, eps=1e-3, momentum=0.9, running_variance="biased")
        assert list(norm.arrays) == ["n.scale", "n.bias", "n.mean", "n.var"]
        assert list(replace(norm, scale=False).arrays) == ["n.bias", "n.mean", "n.var"]

    def test_the_last_window_of_ceil_begins_in_the_map(self):
        # As PyTorch and Caffe: with a stride of 3, a third window of 2 would begin behind 6 pixels.
        assert [window_padding(size, 2, 3, 1, "ceil") for size in (6, 7, 8)] == [(0, 0), (0, 1), (0, 0)]
        assert [window_padding(size, 3, 2, 1, "ceil") for size in (6, 7, 8)] == [(0, 1), (0, 0), (0, 1)]

    @pytest.mark.parametrize(
        ("kind", "fitting", "other", "shape"),
        [
            (Concat, {"out": 2}, {"out": 2, "stride": 2}, (8, 6, 11)),
            (Add, {"out": 9}, {"out": 2}, (8, 6, 9)),
            (Gate, None, {"out": 9}, (8, 6, 9)),
        ],
    )
    def test_branches_that_do_not_meet_name_the_layer(self, kind, fitting, other, shape):
        first = conv_of("a", INPUT, 3, 9)
        gate = GlobalPool(path="b", inputs=("a",), op="average", keep=True)
        second = conv_of("b", INPUT, 3, **fitting) if fitting else gate
        here = kind(path="here", inputs=("a", "b"))
        assert output_shapes([first, second, here], (8, 6, 3))["here"] == shape
        message = "input size 8x6 does not fit: the branches that meet at here have shapes"
        with pytest.raises(InputError, match=message):
            output_shapes([first, conv_of("b", INPUT, 3, **other), here], (8, 6, 3))

    def test_a_gate_has_a_value_for_every_channel(self):
        pool = GlobalPool(path="b", inputs=(INPUT,), op="average", keep=True)
        here = Gate(path="here", inputs=("a", "b"))
        with pytest.raises(InputError, match="meet at here"):
            output_shapes([conv_of("a", INPUT, 3, 9), pool, here], (8, 6, 3))


class TestSharing:
    FIRST = conv_of("a", INPUT, 3, 3, bias=True)
    SECOND = conv_of("b", "a", 3, 3, bias=True, shares="a")
    NORM = BatchNorm(path="n", inputs=("a",), channels=3, eps=1e-3, momentum=0.9, running_variance="biased")

    def test_a_layer_that_shares_has_no_arrays_and_computes(self):
        assert (self.SECOND.arrays, self.SECOND.parameter_count) == ({}, 0)
        assert self.SECOND.uses == self.FIRST.uses == {"kernel": "a.kernel", "bias": "a.bias"}
        assert self.SECOND.multiply_adds((8, 6, 3)) == self.FIRST.multiply_adds((8, 6, 3)) > 0
        twin = replace(self.NORM, path="m", inputs=("n",), shares="n")
        assert (twin.parameters, twin.statistics, twin.uses["var"]) == ({}, {}, "n.var")

    @pytest.mark.parametrize("other", [{"shares": "z"}, {"bias": False}, {"kernel": 1}, {"shares": "b"}])
    def test_only_arrays_that_an_earlier_layer_holds_are_shared(self, other):
        output_shapes([self.FIRST, self.SECOND], (8, 6, 3))
        with pytest.raises(SpecError, match="b shares the arrays of"):
            output_shapes([self.FIRST, replace(self.SECOND, **other)], (8, 6, 3))

    def test_weights_are_those_of_the_holder(self):
        spec = Walk((self.FIRST, self.SECOND))
        for drawn in (weights.randomize(spec), weights.integers(spec), weights.init(spec)):
            assert list(drawn) == ["a.kernel", "a.bias"]

    def test_integer_bounds_behind_a_shared_kernel_are_what_it_can_reach(self, monkeypatch):
        # Each of ten uses doubles what two channels can reach, and the sums are far beyond a limit of 1000.
        twice = np.zeros((3, 3, 3, 3), np.float32)
        twice[1, 1, :2, :2], twice[1, 1, 2, 2] = 1, 1
        monkeypatch.setattr(weights.random, "_integer_kernel", lambda *_: (twice, np.array([30.0, 30.0, 15.0])))
        more = [replace(self.SECOND, path=f"b{i}", inputs=(f"b{i - 1}" if i else "a",)) for i in range(10)]
        bound = 33
        for _ in more:
            bound = 2 * bound + 3
        monkeypatch.setattr(weights.random, "EXACT_INTEGER", bound + 1)
        weights.integers(Walk((self.FIRST, *more)))
        monkeypatch.setattr(weights.random, "EXACT_INTEGER", bound)
        with pytest.raises(WeightsError, match=f"integer weights may reach {bound} at b9"):
            weights.integers(Walk((self.FIRST, *more)))

    def test_the_gradient_of_a_shared_bias_sums_over_every_use(self):
        alone, both = (
            {array.name: array.terms for array in arrays_of_passes(Walk(walk), ("grad",), (2, 8, 6, 3))}
            for walk in ((self.FIRST,), (self.FIRST, self.SECOND))
        )
        assert both["eval/grad/a.bias"] == 2 * alone["eval/grad/a.bias"] == 2 * 2 * 8 * 6


class TestStochasticDepth:
    SPEC = Walk(
        (
            StochasticDepth(path="s", inputs=(INPUT,), rate=0.3),
            StochasticDepth(path="t", inputs=("s",), rate=0.6),
        )
    )

    def masks(self, places, seed=3):
        return dropout.masks(self.SPEC, (8, 6), seed, places)

    def test_one_value_is_drawn_for_an_image(self):
        found = self.masks(np.arange(4000))
        for path, rate in (("s", 0.3), ("t", 0.6)):
            assert found[path].shape == (4000, 1, 1, 1)
            assert found[path].dtype == bool
            assert abs(found[path].mean() - (1 - rate)) < 5 * (rate * (1 - rate) / 4000) ** 0.5
        assert (found["s"] != found["t"]).any()

    def test_an_image_takes_its_masks_with_it(self):
        order, found = np.random.default_rng(0).permutation(64), self.masks(np.arange(64))
        assert all(np.array_equal(mask, found[path][order]) for path, mask in self.masks(order).items())
        assert not np.array_equal(self.masks(np.arange(64), seed=4)["s"], found["s"])


class TestDepthwiseKernels:
    LAYER = DepthwiseConv(path="d", inputs=("x",), kernel=(3, 5), stride=1, padding="same", in_channels=4)

    @pytest.mark.parametrize(
        ("roles", "shape", "place"),
        [
            (PYTORCH, (4, 1, 3, 5), (2, 0, 1, 3)),
            (KERAS, (3, 5, 4, 1), (1, 3, 2, 0)),
            (FLAX, (3, 5, 1, 4), (1, 3, 0, 2)),
        ],
    )
    def test_go_into_a_layout_and_back(self, roles, shape, place):
        kernel = np.arange(60.0).reshape(3, 5, 1, 4)
        there = layouts.to_native(kernel, self.LAYER, "kernel", roles.layout)
        assert (there.shape, there[place]) == (shape, kernel[1, 3, 0, 2])
        assert layouts.canonical_shape(shape, "depthwise", "kernel", roles.layout) == kernel.shape
        assert np.array_equal(layouts.to_canonical(there, self.LAYER, "kernel", roles.layout), kernel)

    def test_a_convolution_of_one_channel_is_an_ordinary_one(self):
        # LeNet's first kernel has the shape that PyTorch gives a depthwise one.
        assert layouts.canonical_shape((6, 1, 5, 5), "conv", "kernel", "OIHW") == (5, 5, 1, 6)
        assert layouts.canonical_shape((5, 5, 1, 6), "conv", "kernel", "HWCM") == (5, 5, 1, 6)

    def test_old_keras_files_spell_the_kernel_out(self):
        assert KERAS.array("block", "depthwise", "kernel") == "block/kernel"
        assert list(KERAS.layers_of("block/depthwise_kernel")) == [("block", "{}/depthwise_kernel")]
        assert KERAS.role("depthwise", "{}/depthwise_kernel") == KERAS.role("depthwise", "{}/kernel") == "kernel"
        assert KERAS.role("conv", "{}/depthwise_kernel") is None

    def test_feed_one_channel_each(self):
        assert fans((3, 5, 1, 4), self.LAYER) == (15, 15)
        wide = replace(self.LAYER, in_channels=4000)
        drawn = weights.init(Walk((wide,), 4000), 0, "kaiming_fan_out", dtype="float64")["d.kernel"]
        assert drawn.var() == pytest.approx(2 / 15, rel=0.05)


def chain(activation, count=8, channels=24):
    """Convolutions and dense layers with an activation behind each."""
    found, last, before = [], INPUT, 3
    for i in range(count):
        found.append(conv_of(f"c{i}", last, before, channels, bias=True))
        found.append(activation(path=f"a{i}", inputs=(f"c{i}",)))
        last, before = f"a{i}", channels
    found.append(GlobalPool(path="pool", inputs=(last,), op="average", keep=True))
    return Walk((*found, conv_of("fc", "pool", channels, 10, kernel=1)))


def computed(spec, drawn, images):
    taps = {INPUT: images}
    for layer in spec.layers:
        arrays = {role: drawn[name] for role, name in layer.uses.items()}
        x = [taps[path] for path in layer.inputs]
        taps[layer.path] = x[0] + x[1] if layer.kind == "add" else defined(layer, x, arrays, None, training=False)
    return taps


class TestRandomWeights:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_a_deep_network_of_any_activation_neither_dies_nor_overflows(self, activation):
        spec = chain(ACTIVATIONS[activation])
        images = np.random.default_rng(0).standard_normal((8, 12, 12, 3))
        for seed in range(3):
            taps = computed(spec, weights.randomize(spec, seed), images)
            assert 0.1 < taps["fc"].std() < 10
            # And it still tells images apart.
            assert taps["a7"].std(axis=0).mean() > 0.005
            assert taps["fc"].std(axis=0).mean() > 1e-3

    def test_gates_do_not_let_a_signal_fade(self):
        found, last = [], INPUT
        for i in range(8):
            found.append(conv_of(f"b{i}.conv", last, 3 if i == 0 else 16, 16, bias=True))
            found.append(conv_of(f"b{i}.depthwise", f"b{i}.conv", 16, 16, DepthwiseConv))
            found.append(ReLU(path=f"b{i}.relu", inputs=(f"b{i}.depthwise",)))
            found.append(GlobalPool(path=f"b{i}.pool", inputs=(f"b{i}.relu",), op="average", keep=True))
            found.append(conv_of(f"b{i}.expand", f"b{i}.pool", 16, 16, kernel=1, bias=True))
            found.append(Sigmoid(path=f"b{i}.sigmoid", inputs=(f"b{i}.expand",)))
            last = f"b{i}.gate"
            found.append(Gate(path=last, inputs=(f"b{i}.relu", f"b{i}.sigmoid")))
        spec = Walk(tuple(found))
        taps = computed(spec, weights.randomize(spec), np.random.default_rng(0).standard_normal((4, 10, 10, 3)))
        assert 0.02 < taps["b7.gate"].std(axis=0).mean() < 10

    def test_a_branch_ends_before_its_stochastic_depth(self):
        branch = (
            conv_of("conv", INPUT, 3, 3),
            StochasticDepth(path="drop", inputs=("conv",), rate=0.2),
            Add(path="add", inputs=("drop", INPUT)),
        )
        assert before_addition(Walk(branch)) == {"conv"}


class TestIntegers:
    SPEC = Walk(
        (
            conv_of("a", INPUT, 3, 32, bias=True),
            ReLU6(path="a6", inputs=("a",)),
            conv_of("b", "a6", 32, 32, DepthwiseConv, stride=2, bias=True),
            ReLU6(path="b6", inputs=("b",)),
            conv_of("c", "b6", 32, 32, kernel=1, bias=True),
            MaxPool(path="pool", inputs=("b6",), kernel=3, stride=1, padding="symmetric"),
            Concat(path="both", inputs=("c", "pool")),
            ReLU(path="relu", inputs=("both",)),
            Flatten(path="flat", inputs=("relu",)),
            Dense(path="fc", inputs=("flat",), in_features=5 * 4 * 64, out_features=10),
        )
    )

    def test_all_stay_integers_and_say_something_behind_a_relu6(self):
        images = np.random.default_rng(0).integers(0, 16, (4, 9, 8, 3)).astype(float)
        drawn = weights.integers(self.SPEC)
        before = Walk(self.SPEC.layers[:-2])
        taps = computed(before, drawn, images)
        assert all(np.array_equal(tap, np.rint(tap)) and np.abs(tap).max() < 2**24 for tap in taps.values())
        for path, least in (("a6", 0.1), ("b6", 0.3)):
            between = (taps[path] > 0) & (taps[path] < 6)
            assert between.mean() > least, path
        assert taps["relu"].std(axis=0).mean() > 0.3

    @pytest.mark.parametrize(
        "layer",
        [
            Sigmoid(path="z", inputs=(INPUT,)),
            AveragePool(path="z", inputs=(INPUT,), kernel=2, stride=2, padding="valid", count_padding=True),
            Affine(path="z", inputs=(INPUT,), scale=(1.0,) * 3, shift=(0.0,) * 3),
            GlobalPool(path="z", inputs=(INPUT,), op="average"),
        ],
    )
    def test_a_layer_that_rounds_is_refused(self, layer):
        with pytest.raises(WeightsError, match=r"z, a layer of kind .*, rounds integers"):
            weights.integers(Walk((layer,)))


class TestReports:
    def test_windows_say_what_is_not_usual(self):
        shown = {
            "3x3": {},
            "1x7": {"kernel": (1, 7), "padding": "symmetric"},
            "11x11, stride 4, padding 2": {"kernel": 11, "stride": 4, "padding": 2},
            "3x3, groups 3": {"groups": 3},
        }
        for text, options in shown.items():
            assert networks._window(conv_of("c", INPUT, 3, 6, **({"padding": "symmetric"} | options))) == text
        assert networks._window(conv_of("d", INPUT, 3, 3, DepthwiseConv, padding="symmetric")) == "3x3"
        assert networks._window(ReLU(path="r", inputs=(INPUT,))) == ""

    def test_a_depthwise_convolution_counts_to_the_depth(self):
        assert networks._depth(TestIntegers.SPEC) == 4

    def test_what_shows_a_product_is_no_bias(self):
        norm = BatchNorm(path="n", inputs=(INPUT,), channels=3, eps=1e-3, momentum=0.9, running_variance="biased")
        for scale in (True, False):
            arrays = arrays_of_passes(Walk((replace(norm, scale=scale),)), ("grad",), (2, 8, 6, 3))
            assert any(array.rounds for array in arrays) == scale
