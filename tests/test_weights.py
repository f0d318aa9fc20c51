"""Canonical weights: how they are drawn, checked, moved by one ulp, and kept in a file."""

from itertools import pairwise, permutations
from math import sqrt

import numpy as np
import pytest

from common import architectures, images, weights
from common.architectures.layers import INPUT, output_shapes
from common.architectures.resnet import ResNetSpec
from common.errors import WeightsError

SMALL = ResNetSpec(block="bottleneck", blocks=(2, 1), widths=(4, 8), stem_kernel=3, stem_width=8, classes=5)
WIDE = ResNetSpec(block="bottleneck", blocks=(2, 1), widths=(32, 64), classes=100)
SPECS = {
    "small": SMALL,
    "grouped": SMALL.replace(widths=(64, 64), groups=4, width_per_group=16),
    "classic": SMALL.replace(
        pool_padding="valid", stem_padding="same", block_padding="same", conv_bias=True, head="softmax"
    ),
    "ceil": SMALL.replace(pool_padding="ceil", stride_in="conv1", replace_stride_with_dilation=(True,)),
    "flat": SMALL.replace(head_pool="flatten", input_size=(17, 20)),
    "headless": SMALL.replace(head="none", head_pool="none"),
    "zero_pad": ResNetSpec(
        block="basic", blocks=(3, 3), widths=(4, 8), stem_kernel=3, stem_stride=1, stem_width=4, stem_pool=False,
        shortcut="zero_pad", classes=4,
    ),
}  # fmt: skip
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and a[name].tobytes() == b[name].tobytes()
        for name in a
    )


def kernels(spec, kind):
    return [layer for layer in spec.layers if layer.kind == kind]


def fans(shape):
    """What one output reads, and what one input feeds, window included."""
    window = int(np.prod(shape[:-2]))
    return window * shape[-2], window * shape[-1]


class TestInit:
    # The variance of n draws scatters by sqrt((kurtosis - 1) / n) around the true one: kurtosis 3 for a normal, 1.8 for
    # a uniform, 2.37 for a normal cut at two deviations. The kurtosis of n draws scatters by at most sqrt(24 / n). Six
    # such deviations are allowed for each; that tells the three distributions apart from n = 10,000 on.
    @pytest.mark.parametrize(
        ("scheme", "kind", "variance", "kurtosis"),
        [
            ("kaiming_fan_out", "conv", lambda fan_in, fan_out: 2 / fan_out, 3.0),
            ("kaiming_fan_out", "dense", lambda fan_in, fan_out: 1 / (3 * fan_in), 1.8),
            ("glorot_uniform", "conv", lambda fan_in, fan_out: 2 / (fan_in + fan_out), 1.8),
            ("glorot_uniform", "dense", lambda fan_in, fan_out: 2 / (fan_in + fan_out), 1.8),
            ("lecun_normal", "conv", lambda fan_in, fan_out: 1 / fan_in, 2.366),
            ("lecun_normal", "dense", lambda fan_in, fan_out: 1 / fan_in, 2.366),
        ],
    )
    def test_kernels_follow_the_distribution_of_their_scheme(self, scheme, kind, variance, kurtosis):
        drawn = weights.init(WIDE, 3, scheme, dtype="float64")
        standardised = []
        for layer in kernels(WIDE, kind):
            kernel = drawn[f"{layer.path}.kernel"]
            expected = variance(*fans(kernel.shape))
            ratio = np.mean(kernel**2) / expected
            assert abs(ratio - 1) < 6 * sqrt((kurtosis - 1) / kernel.size), layer.path
            standardised.append(kernel.ravel() / sqrt(expected))
        values = np.concatenate(standardised)
        assert values.size >= 10_000
        assert abs(values.mean()) < 6 / sqrt(values.size)
        assert abs(np.mean(values**4) - kurtosis) < 6 * sqrt(24 / values.size)

    @pytest.mark.parametrize(
        ("scheme", "limit"), [("glorot_uniform", sqrt(3)), ("lecun_normal", 2 / 0.87962566103423978)]
    )
    def test_bounded_schemes_reach_to_their_bound_and_not_beyond(self, scheme, limit):
        drawn = weights.init(WIDE, 0, scheme, dtype="float64")
        for layer in kernels(WIDE, "conv"):
            kernel = drawn[f"{layer.path}.kernel"]
            fan_in, fan_out = fans(kernel.shape)
            deviation = sqrt(2 / (fan_in + fan_out)) if scheme == "glorot_uniform" else sqrt(1 / fan_in)
            assert 0.95 < np.abs(kernel).max() / (limit * deviation) <= 1

    def test_fan_in_of_a_grouped_kernel_counts_its_group_alone(self):
        spec = ResNetSpec(block="bottleneck", blocks=(2,), widths=(256,), groups=8, width_per_group=8)
        kernel = weights.init(spec, 0, "lecun_normal", dtype="float64")["stages.0.blocks.0.conv2.kernel"]
        assert kernel.shape == (3, 3, 32, 256)
        assert abs(kernel.var() * 9 * 32 - 1) < 6 * sqrt(1.366 / kernel.size)

    @pytest.mark.parametrize("scheme", ["kaiming_fan_out", "glorot_uniform", "lecun_normal"])
    def test_norms_start_as_the_identity_and_convolution_biases_at_zero(self, scheme):
        spec = SMALL.replace(conv_bias=True)
        for name, value in weights.init(spec, 0, scheme).items():
            role = name.rsplit(".", 1)[1]
            if role in ("scale", "var"):
                assert (value == 1).all()
            elif role == "mean" or (role == "bias" and name != "head.fc.bias"):
                assert (value == 0).all()

    @pytest.mark.parametrize(
        ("scheme", "limit"), [("kaiming_fan_out", 1 / sqrt(256)), ("glorot_uniform", 0), ("lecun_normal", 0)]
    )
    def test_the_dense_bias_is_uniform_as_in_torchvision_or_zero(self, scheme, limit):
        bias = weights.init(WIDE, 0, scheme, dtype="float64")["head.fc.bias"]
        largest = np.abs(bias).max()
        # Of 100 uniform values the largest stays below 0.9 of the bound once in 40,000 times.
        assert 0.9 * limit <= largest <= limit

    @pytest.mark.parametrize(
        ("spec", "last"), [(SMALL, "norm3"), (SPECS["zero_pad"], "norm2"), (SMALL.replace(norm=False), None)]
    )
    def test_zero_gamma_zeroes_the_last_scale_of_every_block_and_nothing_else(self, spec, last):
        plain, zeroed = weights.init(spec), weights.init(spec, zero_gamma=True)
        expected = {f"stages.{s}.blocks.{b}.{last}.scale" for s, n in enumerate(spec.blocks) for b in range(n) if last}
        assert {name for name in plain if plain[name].tobytes() != zeroed[name].tobytes()} == expected
        assert all((zeroed[name] == 0).all() for name in expected)

    @pytest.mark.parametrize("draw", [weights.init, weights.randomize, weights.integers])
    def test_a_seed_gives_the_same_numbers_again_and_another_seed_others(self, draw):
        spec = SMALL.exact_twin
        assert same_bits(draw(spec, 5), draw(spec, 5))
        one, other = draw(spec, 5), draw(spec, 6)
        assert all((one[n] != other[n]).any() for n in one if n.endswith(".kernel"))

    @pytest.mark.parametrize("draw", [weights.init, weights.randomize])
    def test_the_dtype_rounds_the_numbers_and_draws_no_others(self, draw):
        double, single = draw(SMALL, 1, dtype="float64"), draw(SMALL, 1, dtype="float32")
        assert same_bits({name: value.astype(np.float32) for name, value in double.items()}, single)
        assert {value.dtype for value in double.values()} == {np.dtype("float64")}

    def test_a_tensor_does_not_depend_on_what_else_the_network_holds(self):
        longer = SMALL.replace(blocks=(2, 3))
        one, other = weights.init(SMALL), weights.init(longer)
        assert set(one) < set(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)

    def test_an_unknown_scheme_is_refused_with_the_known_ones(self):
        with pytest.raises(WeightsError, match="scheme='he' is unknown; expected one of kaiming_fan_out, glorot_unif"):
            weights.init(SMALL, 0, "he")

    @every_spec
    @pytest.mark.parametrize("draw", [weights.init, weights.randomize])
    def test_what_is_drawn_is_valid(self, spec, draw):
        weights.validate(spec, draw(spec))


class TestRandomize:
    @every_spec
    def test_no_value_occurs_twice_or_is_a_default_or_fits_float32(self, spec):
        drawn = weights.randomize(spec, 0)
        for name, value in drawn.items():
            assert np.unique(value).size == value.size, name
            assert not np.isin(value, (0.0, 1.0)).any(), name
            # One value in 2^29 would fit by chance.
            assert (value != value.astype(np.float32)).all(), name
        everything = np.concatenate([value.ravel() for value in drawn.values()])
        assert np.unique(everything).size == everything.size

    def test_scales_and_variances_are_positive_and_away_from_zero(self):
        for name, value in weights.randomize(SMALL).items():
            if name.endswith((".scale", ".var")):
                assert value.min() >= 0.5 * 0.3, name

    @pytest.mark.parametrize("name", ["resnet18", "resnet110"])
    def test_no_two_tensors_of_one_network_share_a_random_stream(self, name):
        firsts = [weights.random.generator_for(0, array).random() for array in weights.shapes(architectures.find(name))]
        assert len(set(firsts)) == len(firsts)


def windows(array, layer, fill):
    """Every window of a (H, W, C) map: (out_h, out_w, kernel, kernel, C)."""
    padded = np.pad(array, (*layer.spatial_padding(array.shape), (0, 0)), constant_values=fill)
    height, width = layer.spatial_output(array.shape)
    reach = range(0, layer.dilation * layer.kernel, layer.dilation)
    rows = [
        [
            [[padded[y * layer.stride + i, x * layer.stride + j] for j in reach] for i in reach]
            for x in range(width)
        ]
        for y in range(height)
    ]  # fmt: skip
    return np.array(rows)


def largest_sums(spec, kernels_, image):
    """The largest magnitude that any sum in the network can reach on `image`, whatever its order: the network is run on
    the absolute values of its weights, in Python's own integers as NumPy's int64."""
    values = {INPUT: image}
    for layer in spec.layers:
        source = values[layer.inputs[0]]
        if layer.kind == "conv":
            kernel = np.abs(kernels_[f"{layer.path}.kernel"]).astype(np.int64)
            seen = windows(source, layer, 0)
            parts = [
                np.einsum("yxijc,ijco->yxo", part, k)
                for part, k in zip(
                    np.split(seen, layer.groups, axis=-1), np.split(kernel, layer.groups, axis=-1), strict=True
                )
            ]
            value = np.concatenate(parts, axis=-1)
            value += np.abs(kernels_.get(f"{layer.path}.bias", np.zeros(1))).astype(np.int64)
        elif layer.kind == "dense":
            value = source @ np.abs(kernels_[f"{layer.path}.kernel"]).astype(np.int64)
            value += np.abs(kernels_[f"{layer.path}.bias"]).astype(np.int64)
        elif layer.kind == "max_pool":
            value = windows(source, layer, 0).max(axis=(2, 3))
        elif layer.kind == "add":
            value = source + values[layer.inputs[1]]
        elif layer.kind == "zero_pad":
            value = source[:: layer.stride, :: layer.stride]
            value = np.pad(value, ((0, 0), (0, 0), (0, layer.channels - source.shape[-1])))
        elif layer.kind == "global_pool":
            value = source.max(axis=(0, 1))
        elif layer.kind == "flatten":
            value = source.ravel()
        else:
            assert layer.kind == "relu"
            value = source
        values[layer.path] = value
    return {path: int(value.max()) for path, value in values.items()}


class TestIntegers:
    @every_spec
    def test_no_sum_reaches_2_to_the_24_on_the_largest_input(self, spec, monkeypatch):
        twin = spec.exact_twin
        size = twin.input_size or (17, 20)
        drawn = weights.integers(twin, 0)
        sums = largest_sums(twin, drawn, np.full((*size, twin.in_channels), 15, dtype=np.int64))
        assert sums.keys() == output_shapes(twin.layers, (*size, twin.in_channels)).keys()
        assert max(sums.values()) < 2**24
        # The bound says something: values do grow on the way, and a limit that one of them reaches is refused.
        assert max(sums.values()) > 15
        monkeypatch.setattr(weights.random, "EXACT_INTEGER", max(sums.values()))
        with pytest.raises(WeightsError, match=f"the limit is {max(sums.values())}"):
            weights.integers(twin, 0)

    def test_images_of_integers_keep_to_the_range_that_the_bound_assumes(self):
        pixels = images.integers(3, (16, 17), 2, seed=1)
        assert (pixels.min(), pixels.max()) == (0, 15)
        assert (pixels == np.round(pixels)).all()

    @pytest.mark.parametrize("seed", range(3))
    @every_spec
    def test_every_kernel_has_entries_and_all_are_small_integers_in_float32(self, spec, seed):
        drawn = weights.integers(spec.exact_twin, seed)
        weights.validate(spec.exact_twin, drawn)
        for name, value in drawn.items():
            assert value.dtype == np.float32
            assert np.count_nonzero(value) > 0, name
            assert (value == np.round(value)).all()
            assert np.abs(value).max() <= (1 if name.endswith(".kernel") else 3)

    @pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet110", "resnet50.keras_classic", "resnext50_32x4d"])
    def test_named_networks_have_integer_weights_with_every_kernel_in_use(self, name):
        drawn = weights.integers(architectures.find(name).exact_twin, 0)
        assert not [tensor for tensor, value in drawn.items() if not value.any()]

    def test_a_network_that_cannot_be_kept_below_the_limit_is_refused(self):
        spec = ResNetSpec(block="basic", blocks=(60,), widths=(4,), stem_width=4, norm=False, conv_bias=True).exact_twin
        deep = spec.replace(blocks=(400,))
        weights.integers(spec)
        with pytest.raises(WeightsError, match=r"integer weights may reach \d+ at .*; the limit is 16777216"):
            weights.integers(deep)


def without(name):
    return lambda w: w.pop(name)


def changed(name, change):
    return lambda w: w.update({name: change(w[name])})


def with_value(value):
    def change(array):
        array = array.copy()
        array.flat[array.size // 2] = value
        return array

    return change


FAULTS = {
    "missing": (without("stem.conv.kernel"), "missing stem.conv.kernel"),
    "missing statistics": (
        lambda w: [w.pop(n) for n in list(w) if n.endswith(".mean")],
        "missing stem.norm.mean, stages.0.blocks.0.norm1.mean, stages.0.blocks.0.norm2.mean, "
        "stages.0.blocks.0.norm3.mean and 8 more",
    ),
    "extra": (lambda w: w.update(other=np.ones(1)), "unexpected other"),
    "renamed": (
        lambda w: w.update({"fc.kernel": w.pop("head.fc.kernel")}),
        "missing head.fc.kernel; unexpected fc.kernel",
    ),
    "empty": (lambda w: w.clear(), "missing stem.conv.kernel, stem.norm.scale, stem.norm.bias, stem.norm.mean and "),
    "transposed": (
        changed("head.fc.kernel", np.transpose),
        "head.fc.kernel has shape (5, 32); the spec expects (32, 5)",
    ),
    "OIHW": (
        changed("stem.conv.kernel", lambda k: k.transpose(3, 2, 0, 1)),
        "stem.conv.kernel has shape (8, 3, 3, 3); the spec expects (3, 3, 3, 8)",
    ),
    "column": (changed("stem.norm.mean", lambda v: v[:, None]), "stem.norm.mean has shape (8, 1); the spec expects"),
    "NaN": (changed("stem.norm.var", with_value(np.nan)), "stem.norm.var has 1 values that are NaN or infinite, of 8"),
    "infinite": (changed("head.fc.bias", with_value(-np.inf)), "head.fc.bias has 1 values that are NaN or infinite"),
    "integer": (
        changed("stem.norm.bias", lambda v: v.astype(np.int64)),
        "stem.norm.bias has dtype int64; expected a floating-point type",
    ),
    "boolean": (changed("stem.norm.bias", lambda v: v > 0), "stem.norm.bias has dtype bool; expected"),
    "complex": (changed("stem.norm.bias", lambda v: v * 1j), "stem.norm.bias has dtype complex"),
}


class TestValidate:
    @pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
    def test_a_fault_is_named_with_its_tensor(self, fault, expected):
        faulty = weights.randomize(SMALL)
        fault(faulty)
        with pytest.raises(WeightsError) as caught:
            weights.validate(SMALL, faulty)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_every_floating_type_is_fine(self, dtype):
        weights.validate(SMALL, weights.randomize(SMALL, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (3,), (70, 65), (64, 128, 1, 1), (3, 3, 130, 70), (5, 5, 2, 200), (0, 99, 99)])
def test_any_view_is_copied_as_it_is(shape):
    array = np.random.default_rng(0).normal(size=shape)
    for order in permutations(range(array.ndim)):
        for view in (array.transpose(order), array.transpose(order)[..., ::-1] if shape else array):
            (copy,) = weights.contiguous({"x": view}).values()
            assert copy.flags.c_contiguous
            assert copy.dtype == view.dtype
            assert np.array_equal(copy, view)


class TestPerturb:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_each_value_moves_by_at_most_one_ulp_and_a_third_each_way(self, dtype):
        values = np.random.default_rng(0).normal(size=100_000).astype(dtype)
        moved = weights.perturb_array(values, 0, "x")
        assert moved.dtype == values.dtype
        steps = (moved - values) / np.spacing(np.abs(values))
        assert set(np.unique(steps)) == {-1.0, 0.0, 1.0}
        # The count of each has deviation sqrt(n * 1/3 * 2/3) = 149; six of them.
        for step in (-1, 0, 1):
            assert abs(np.count_nonzero(steps == step) - values.size / 3) < 6 * 149

    def test_all_tensors_move_each_on_its_own_and_the_original_stays(self):
        before = weights.randomize(SMALL)
        kept = {name: value.copy() for name, value in before.items()}
        moved = weights.perturb(before, 1)
        assert list(moved) == list(before)
        assert same_bits(before, kept)
        assert not any(np.array_equal(moved[name], before[name]) for name in before)
        signs = {name: ((moved[name] - before[name]) / np.spacing(np.abs(before[name]))).ravel() for name in before}
        norms = [signs[name][:8].tolist() for name in signs if ".norm" in name and signs[name].size >= 8]
        assert len({tuple(sign) for sign in norms}) > len(norms) * 0.9

    def test_draws_repeat_by_seed(self):
        before = weights.randomize(SMALL)
        assert same_bits(dict(weights.perturb(before, 1)), dict(weights.perturb(before, 1)))
        assert not same_bits(dict(weights.perturb(before, 1)), dict(weights.perturb(before, 2)))


class TestDigest:
    ARRAYS = {  # noqa: RUF012
        "a": np.arange(6, dtype=np.float64).reshape(2, 3),
        "b": np.zeros(2, dtype=np.float32),
        "c": np.array(1.5),
    }

    def test_it_depends_on_no_order_and_no_layout_in_memory(self):
        turned = {name: np.asarray(value, order="F") for name, value in reversed(self.ARRAYS.items())}
        assert weights.digest(turned) == weights.digest(self.ARRAYS)
        assert len(weights.digest(self.ARRAYS)) == 32

    @pytest.mark.parametrize(
        "change",
        [
            {"a": np.nextafter(np.arange(6, dtype=np.float64), 9).reshape(2, 3)},
            {"a": np.arange(6, dtype=np.float64).reshape(3, 2)},
            {"a": np.arange(6, dtype=np.float64)},
            {"a": np.arange(6, dtype=np.float64).reshape(2, 3)[::-1]},
            {"a": np.arange(6, dtype=np.float32).reshape(2, 3)},
            {"b": np.zeros(2, dtype=np.int32)},
            {"b": np.array([0.0, -0.0], dtype=np.float32)},
            {"c": np.array([1.5])},
            {"d": np.zeros(0)},
        ],
        ids=["value", "shape", "flat", "order", "dtype", "kind", "sign of zero", "scalar", "one more"],
    )
    def test_it_changes_with_every_value_shape_and_dtype(self, change):
        assert weights.digest(self.ARRAYS | change) != weights.digest(self.ARRAYS)

    def test_it_changes_with_every_name_and_with_names_that_trade_places(self):
        a, b, c = self.ARRAYS.values()
        digests = [weights.digest(x) for x in ({"a": a, "b": b, "c": c}, {"a": a, "b": b, "d": c}, {"a": a, "b": b})]
        assert all(one != other for one, other in pairwise(sorted(digests)))
        assert weights.digest({"x": b, "y": b + 1}) != weights.digest({"x": b + 1, "y": b})
