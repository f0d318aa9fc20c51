"""The specification and its layer walk: counts, shapes, contradictions, and the form it takes as JSON."""

import json
import re
from collections import Counter
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise
from math import ceil, inf, nan, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import architectures
from common.architectures.layers import (
    INPUT,
    AdaptivePool,
    Conv,
    MaxPool,
    Window,
    adaptive_windows,
    multiply_adds,
    output_shapes,
    window_padding,
)
from common.architectures.marks import Mark, marked
from common.architectures.resnet import CONVENTIONS, GALLERY, ResNetSpec
from common.errors import InputError, ParityError, SpecError

VARIANTS = architectures.variants()
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def parameters(spec):
    return sum(layer.parameter_count for layer in spec.layers)


def statistics(spec):
    return sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())


def layer_of(spec, path):
    return next(layer for layer in spec.layers if layer.path == path)


def small(**changes):
    """A bottleneck network of two stages, changed."""
    return ResNetSpec(**({"block": "bottleneck", "blocks": (1, 1), "widths": (64, 128)} | changes))


@st.composite
def specs(draw):
    """Any valid specification of a small network."""
    block = draw(st.sampled_from(["basic", "bottleneck"]))
    stages = draw(st.integers(1, 3))
    fields_ = {
        "block": block,
        "blocks": tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))),
        "widths": tuple(sorted(draw(st.lists(st.integers(1, 6), min_size=stages, max_size=stages)))),
        "in_channels": draw(st.integers(1, 4)),
        "classes": draw(st.integers(1, 12)),
        "stem_kernel": draw(st.sampled_from([1, 3, 5, 7])),
        "stem_stride": draw(st.integers(1, 3)),
        "stem_width": 1,
        "stem_padding": draw(st.sampled_from(["symmetric", "same", "valid"])),
        "stem_pool": draw(st.booleans()),
        "pool_padding": draw(st.sampled_from(["symmetric", "same", "valid", "ceil"])),
        "block_padding": draw(st.sampled_from(["symmetric", "same"])),
        "stride_in": draw(st.sampled_from(["conv1", "conv2"])),
        "shortcut": draw(st.sampled_from(["projection", "zero_pad"])),
        "replace_stride_with_dilation": tuple(
            draw(st.lists(st.booleans(), min_size=stages - 1, max_size=stages - 1)),
        ),
        "conv_bias": draw(st.booleans()),
        "bn_eps": draw(st.floats(1e-12, 1.0)),
        "bn_momentum": draw(st.floats(0.01, 0.99)),
        "running_variance": draw(st.sampled_from(["unbiased", "biased"])),
        "norm": draw(st.booleans()),
    }
    fields_["shortcut_norm"] = fields_["norm"] and draw(st.booleans())
    fields_["head"] = draw(st.sampled_from(["logits", "softmax", "none"]))
    pools = ["average", "max"] + (["none"] if fields_["head"] == "none" else ["flatten"])
    fields_["head_pool"] = draw(st.sampled_from(pools))
    if fields_["head_pool"] == "flatten":
        fields_["input_size"] = (draw(st.integers(61, 67)), draw(st.integers(61, 67)))
    if block == "bottleneck":
        fields_ |= {
            "expansion": draw(st.integers(1, 4)),
            "groups": draw(st.integers(1, 3)),
            "width_per_group": draw(st.sampled_from([64, 128])),
        }
    return ResNetSpec(**fields_)


class TestCounts:
    @pytest.mark.parametrize(
        ("name", "expected", "running"),
        [
            ("resnet18", 11_689_512, 9_600),
            ("resnet34", 21_797_672, 17_024),
            ("resnet50", 25_557_032, 53_120),
            ("resnet101", 44_549_160, 105_344),
            ("resnet152", 60_192_808, 151_424),
        ],
    )
    @pytest.mark.parametrize("convention", ["", ".paper", ".flax_examples"])
    def test_parameters_and_running_statistics_are_the_published_ones(self, name, expected, running, convention):
        spec = VARIANTS[name + convention]
        assert (parameters(spec), statistics(spec)) == (expected, running)

    # Torchvision's own figures, and the paper's 0.27 … 1.7 M for CIFAR.
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("wide_resnet50_2", 68_883_240),
            ("wide_resnet101_2", 126_886_696),
            ("resnext50_32x4d", 25_028_904),
            ("resnext101_32x8d", 88_791_336),
            ("resnext101_64x4d", 83_455_272),
            ("resnet20", 269_722),
            ("resnet32", 464_154),
            ("resnet44", 658_586),
            ("resnet56", 853_018),
            ("resnet110", 1_727_962),
        ],
    )
    def test_parameters_of_wider_and_cifar_networks_are_the_published_ones(self, name, expected):
        assert parameters(VARIANTS[name]) == expected

    def test_keras_applications_resnet50_holds_25636712_numbers_in_all(self):
        spec = VARIANTS["resnet50.keras_applications"]
        assert parameters(spec) + statistics(spec) == 25_636_712
        assert statistics(spec) == 53_120

    # In thousand millions, as torchvision publishes them beside its weights; 3.858 is the v1 of the paper.
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", 1.814),
            ("resnet34", 3.664),
            ("resnet50", 4.089),
            ("resnet101", 7.801),
            ("resnet152", 11.514),
            ("resnext50_32x4d", 4.230),
            ("resnext101_32x8d", 16.414),
            ("resnext101_64x4d", 15.460),
            ("wide_resnet50_2", 11.398),
            ("wide_resnet101_2", 22.753),
            ("resnet50.paper", 3.858),
            ("resnet50.keras_applications", 3.858),
            ("resnet50.flax_examples", 4.089),
        ],
    )
    def test_multiply_adds_at_224_are_the_published_ones(self, name, expected):
        layers = VARIANTS[name].layers
        assert round(sum(multiply_adds(layers, output_shapes(layers, (224, 224, 3))).values()) / 1e9, 3) == expected

    def test_only_convolutions_and_dense_layers_cost_multiply_adds(self):
        layers = VARIANTS["resnet18"].layers
        costs = multiply_adds(layers, output_shapes(layers, (64, 64, 3)))
        assert {layer.kind for layer in layers if costs[layer.path]} == {"conv", "dense"}
        assert all(costs[layer.path] for layer in layers if layer.kind in ("conv", "dense"))

    @pytest.mark.parametrize(("name", "depth"), [(n, int(n.removeprefix("resnet"))) for n in (*DEPTHS, *CIFAR)])
    def test_the_number_in_the_name_counts_the_weighted_layers_of_the_main_path(self, name, depth):
        weighted = [x for x in VARIANTS[name].layers if x.kind in ("conv", "dense") and ".shortcut." not in x.path]
        assert len(weighted) == depth

    def test_a_grouped_convolution_costs_its_share_of_a_dense_one(self):
        dense = small(width_per_group=64, groups=1)
        grouped = small(width_per_group=16, groups=4)
        one, many = (layer_of(spec, "stages.0.blocks.0.conv2") for spec in (dense, grouped))
        assert one.parameters["stages.0.blocks.0.conv2.kernel"] == (3, 3, 64, 64)
        assert many.parameters["stages.0.blocks.0.conv2.kernel"] == (3, 3, 16, 64)
        assert one.multiply_adds((8, 8, 64)) == 4 * many.multiply_adds((8, 8, 64)) == 8 * 8 * 64 * 9 * 64


class TestShapes:
    # Side of the stem convolution's, the pool's and the last stage's output.
    @pytest.mark.parametrize(
        ("name", "size", "sides"),
        [
            ("resnet50", 224, (112, 56, 7)),
            ("resnet50", 64, (32, 16, 2)),
            ("resnet50", 65, (33, 17, 3)),
            ("resnet50.paper", 224, (112, 56, 7)),
            ("resnet50.paper", 64, (32, 16, 2)),
            ("resnet50.paper", 65, (33, 16, 2)),
            ("resnet50.keras_applications", 224, (112, 56, 7)),
            ("resnet50.keras_applications", 65, (33, 17, 3)),
            ("resnet50.keras_classic", 224, (112, 55, 7)),
            ("resnet50.keras_classic", 64, (32, 15, 2)),
            ("resnet50.keras_classic", 65, (33, 16, 2)),
            ("resnet50.flax_examples", 224, (112, 56, 7)),
            ("resnet50.flax_examples", 64, (32, 16, 2)),
            ("resnet50.flax_examples", 65, (33, 17, 3)),
            ("resnet18.d2l", 224, (112, 56, 7)),
            ("resnet18.d2l", 65, (33, 17, 3)),
        ],
    )
    def test_sides_follow_the_padding_of_the_convention(self, name, size, sides):
        spec = VARIANTS[name]
        shapes = output_shapes(spec.layers, (size, size, 3))
        places = ("stem.conv", "stem.pool", spec.stage_outputs[-1])
        assert tuple(shapes[place][0] for place in places) == tuple(shapes[place][1] for place in places) == sides

    @pytest.mark.parametrize(
        ("changes", "path", "shape", "padding"),
        [
            ({"stem_padding": "same"}, "stem.conv", (224, 224, 3), ((2, 3), (2, 3))),
            ({"stem_padding": "same"}, "stem.conv", (65, 64, 3), ((3, 3), (2, 3))),
            ({"stem_padding": "symmetric"}, "stem.conv", (224, 224, 3), ((3, 3), (3, 3))),
            ({"stem_padding": "valid"}, "stem.conv", (224, 224, 3), ((0, 0), (0, 0))),
            ({"pool_padding": "same"}, "stem.pool", (112, 112, 64), ((0, 1), (0, 1))),
            ({"pool_padding": "same"}, "stem.pool", (33, 32, 64), ((1, 1), (0, 1))),
            ({"pool_padding": "ceil"}, "stem.pool", (112, 33, 64), ((0, 1), (0, 0))),
            ({"pool_padding": "symmetric"}, "stem.pool", (112, 112, 64), ((1, 1), (1, 1))),
            ({"block_padding": "same"}, "stages.1.blocks.0.conv2", (56, 17, 128), ((0, 1), (1, 1))),
            ({"block_padding": "symmetric"}, "stages.1.blocks.0.conv2", (56, 17, 128), ((1, 1), (1, 1))),
            ({"block_padding": "same"}, "stages.0.blocks.0.conv2", (56, 56, 64), ((1, 1), (1, 1))),
            ({"block_padding": "same"}, "stages.1.blocks.0.shortcut.conv", (56, 56, 256), ((0, 0), (0, 0))),
        ],
    )
    def test_same_puts_the_odd_zero_after_and_at_even_sizes_only(self, changes, path, shape, padding):
        assert layer_of(VARIANTS["resnet50"].replace(**changes), path).spatial_padding(shape) == padding

    def test_height_and_width_are_kept_apart(self):
        shapes = output_shapes(VARIANTS["resnet50"].layers, (64, 224, 3))
        assert shapes["stem.conv"] == (32, 112, 64)
        assert shapes["stages.3.blocks.2.relu"] == (2, 7, 2048)
        assert shapes["head.pool"] == (2048,)
        assert shapes["head.fc"] == (1000,)

    @pytest.mark.parametrize("name", CIFAR)
    def test_cifar_networks_keep_32_pixels_through_the_stem_and_end_at_8(self, name):
        spec = VARIANTS[name]
        shapes = output_shapes(spec.layers, (32, 32, 3))
        assert [shapes[path] for path in ("stem.relu", *spec.stage_outputs)] == [
            (32, 32, 16),
            (32, 32, 16),
            (16, 16, 32),
            (8, 8, 64),
        ]

    @pytest.mark.parametrize(("size", "expected"), [((224, 224), 7 * 7 * 2048), ((64, 96), 2 * 3 * 2048)])
    def test_a_flattened_head_takes_every_pixel_of_its_own_size_and_refuses_another(self, size, expected):
        spec = VARIANTS["resnet50"].replace(head_pool="flatten", input_size=size)
        head = layer_of(spec, "head.fc")
        assert head.in_features == expected
        assert prod(head.flattened) == expected
        with pytest.raises(InputError, match="input_size only"):
            output_shapes(spec.layers, (size[0] + 64, size[1], 3))

    @pytest.mark.parametrize(
        ("changes", "image", "path"),
        [
            ({"stem_padding": "valid"}, (6, 224, 3), "stem.conv"),
            ({"stem_padding": "valid"}, (224, 6, 3), "stem.conv"),
            ({"pool_padding": "valid"}, (4, 4, 3), "stem.pool"),
            ({"pool_padding": "ceil"}, (2, 2, 3), "stem.pool"),
            ({}, (0, 5, 3), "stem.conv"),
        ],
    )
    def test_a_size_of_which_nothing_is_left_is_refused_with_size_and_place(self, changes, image, path):
        with pytest.raises(InputError) as caught:
            output_shapes(VARIANTS["resnet50"].replace(**changes).layers, image)
        assert f"{image[0]}x{image[1]} is too small" in str(caught.value)
        assert f"at {path};" in str(caught.value)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_every_variant_accepts_twice_its_output_stride_or_its_least_size(self, name):
        spec = VARIANTS[name]
        size = spec.input_size or (max(2 * spec.output_stride, architectures.least_size(spec)),) * 2
        shapes = output_shapes(architectures.running(spec, training=False), (*size, spec.in_channels))
        assert shapes[spec.layers[-1].path] == (spec.classes,)


class TestWindowPadding:
    """Against definitions written the long way: put windows down one by one, and look where they lie."""

    windows = st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.integers(1, 3))

    @staticmethod
    def starts(length, extent, stride):
        return [start for start in range(0, length, stride) if start + extent <= length]

    @given(windows)
    @settings(max_examples=200, deadline=None)
    def test_same_is_the_least_padding_that_gives_one_window_per_stride(self, window):
        size, kernel, stride, dilation = window
        extent = max(dilation * tap for tap in range(kernel)) + 1
        wanted = ceil(size / stride)
        total = 0
        while len(self.starts(size + total, extent, stride)) < wanted:
            total += 1
        before, after = window_padding(size, kernel, stride, dilation, "same")
        assert (before + after, len(self.starts(size + before + after, extent, stride))) == (total, wanted)
        assert after - before in (0, 1)

    @given(windows)
    @settings(max_examples=200, deadline=None)
    def test_ceil_is_the_least_padding_after_that_covers_every_pixel(self, window):
        size, kernel, stride, dilation = window
        extent = max(dilation * tap for tap in range(kernel)) + 1
        if size < extent or stride > extent:
            return
        after = 0
        while self.starts(size + after, extent, stride)[-1] + extent < size:
            after += 1
        assert window_padding(size, kernel, stride, dilation, "ceil") == (0, after)

    @given(windows)
    @settings(max_examples=100, deadline=None)
    def test_symmetric_keeps_the_size_at_stride_one_whatever_the_size(self, window):
        size, kernel, stride, dilation = window
        kernel |= 1
        before, after = window_padding(size, kernel, stride, dilation, "symmetric")
        assert before == after
        assert len(self.starts(size + before + after, dilation * (kernel - 1) + 1, 1)) == size

    @given(windows)
    @settings(max_examples=20, deadline=None)
    def test_valid_pads_nothing(self, window):
        assert window_padding(*window, "valid") == (0, 0)

    @given(windows, st.sampled_from(["symmetric", "same", "valid", "ceil"]))
    @settings(max_examples=100, deadline=None)
    def test_the_output_size_counts_the_windows_that_fit(self, window, padding):
        size, kernel, stride, dilation = window
        layer = MaxPool(path="p", inputs=("i",), kernel=kernel, stride=stride, dilation=dilation, padding=padding)
        (before, after), _ = layer.spatial_padding((size, size, 1))
        fitting = self.starts(before + size + after, dilation * (kernel - 1) + 1, stride)
        assert max(layer.spatial_output((size, size, 1))[0], 0) == len(fitting)


class TestStridesAndDilation:
    @pytest.mark.parametrize(
        ("block", "stride_in", "strides"),
        [
            ("basic", "conv1", (2, 1)),
            ("basic", "conv2", (1, 2)),
            ("bottleneck", "conv1", (2, 1, 1)),
            ("bottleneck", "conv2", (1, 2, 1)),
        ],
    )
    def test_the_first_block_of_each_later_stage_strides_in_the_convolution_asked_for(self, block, stride_in, strides):
        spec = ResNetSpec(block=block, blocks=(2, 2, 2), widths=(64, 128, 256), stride_in=stride_in)
        for stage in range(3):
            for b in range(2):
                found = tuple(
                    layer.stride
                    for layer in spec.layers
                    if isinstance(layer, Conv) and layer.path.startswith(f"stages.{stage}.blocks.{b}.conv")
                )
                assert found == (strides if stage > 0 and b == 0 else (1,) * len(strides))

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", "conv1"),
            ("resnet50", "conv2"),
            ("resnet50.paper", "conv1"),
            ("resnet50.keras_applications", "conv1"),
            ("resnet50.keras_classic", "conv1"),
            ("resnet50.flax_examples", "conv2"),
            ("wide_resnet50_2", "conv2"),
        ],
    )
    def test_v1_strides_in_the_first_1x1_and_v1_5_in_the_3x3(self, name, expected):
        strided = {x.path.rsplit(".", 1)[1] for x in VARIANTS[name].layers if isinstance(x, Conv) and x.stride == 2}
        assert strided == {"conv", expected}  # the stem and the projections are called conv

    # torchvision's replace_stride_with_dilation: the first block of a dilated stage keeps the dilation before it.
    @pytest.mark.parametrize(
        ("output_stride", "flags", "dilations"),
        [
            (32, (False, False, False), [(1, 1), (1, 1), (1, 1), (1, 1)]),
            (16, (False, False, True), [(1, 1), (1, 1), (1, 1), (1, 2)]),
            (8, (False, True, True), [(1, 1), (1, 1), (1, 2), (2, 4)]),
            (4, (True, True, True), [(1, 1), (1, 2), (2, 4), (4, 8)]),
        ],
    )
    def test_dilation_of_the_3x3_doubles_behind_each_stride_taken_away(self, output_stride, flags, dilations):
        spec = VARIANTS["resnet50"].with_output_stride(output_stride)
        assert spec.replace_stride_with_dilation == flags
        assert spec.output_stride == output_stride
        found = [tuple(layer_of(spec, f"stages.{s}.blocks.{b}.conv2").dilation for b in (0, 1)) for s in range(4)]
        assert found == dilations
        assert all(x.dilation == 1 for x in spec.layers if isinstance(x, Conv) and x.kernel == 1)
        shape = output_shapes(spec.layers, (64, 64, 3))[spec.stage_outputs[-1]]
        assert shape == (64 // output_stride, 64 // output_stride, 2048)

    @pytest.mark.parametrize("stride_in", ["conv1", "conv2"])
    @pytest.mark.parametrize("block", ["basic", "bottleneck"])
    @pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
    def test_dilation_in_place_of_stride_reads_the_same_pixels(self, block, stride_in, output_stride):
        spec = ResNetSpec(block=block, blocks=(2, 2, 2, 2), stride_in=stride_in)
        dilated = spec.with_output_stride(output_stride)
        assert self.pixels_read(dilated) == self.pixels_read(spec)
        assert architectures.to_dict(dilated) == architectures.to_dict(spec) | {
            "replace_stride_with_dilation": list(dilated.replace_stride_with_dilation)
        }

    @staticmethod
    def pixels_read(spec):
        """How the last stage's output at 0 depends on the input, in one dimension: which pixels it reads, at which
        offsets, for a picture without borders."""
        read = {spec.stage_outputs[-1]: {0}}
        for layer in reversed(spec.layers):
            positions = read.pop(layer.path, set())
            if isinstance(layer, Window):
                taps = [layer.dilation * (tap - (layer.kernel - 1) // 2) for tap in range(layer.kernel)]
                positions = {position * layer.stride + tap for position in positions for tap in taps}
            for path in layer.inputs:
                read[path] = read.get(path, set()) | positions
        return read[INPUT]

    @pytest.mark.parametrize("output_stride", [2, 3, 64, 0, -8])
    def test_an_output_stride_out_of_reach_is_refused(self, output_stride):
        with pytest.raises(SpecError, match=f"output_stride={output_stride} .* down to 4"):
            VARIANTS["resnet50"].with_output_stride(output_stride)


class TestShortcuts:
    @pytest.mark.parametrize(
        ("name", "stages"),
        [
            ("resnet18", [1, 2, 3]),
            ("resnet34", [1, 2, 3]),
            ("resnet50", [0, 1, 2, 3]),
            ("resnet101", [0, 1, 2, 3]),
            ("resnet152", [0, 1, 2, 3]),
            ("resnext50_32x4d", [0, 1, 2, 3]),
        ],
    )
    def test_projections_stand_on_first_blocks_where_stride_or_channels_change(self, name, stages):
        found = [layer.path for layer in VARIANTS[name].layers if layer.path.endswith("shortcut.conv")]
        assert found == [f"stages.{stage}.blocks.0.shortcut.conv" for stage in stages]

    def test_a_stride_without_new_channels_projects_and_neither_does_not(self):
        spec = ResNetSpec(block="basic", blocks=(2, 2), widths=(64, 64))
        assert [x.path for x in spec.layers if "shortcut" in x.path and x.kind == "conv"] == [
            "stages.1.blocks.0.shortcut.conv"
        ]
        dilated = spec.replace(replace_stride_with_dilation=(True,))
        assert not [x for x in dilated.layers if "shortcut" in x.path]

    @pytest.mark.parametrize("name", [*CIFAR, "resnet50", "resnet18.d2l", "resnet50.keras_classic"])
    def test_the_addition_reads_the_branch_first_and_the_shortcut_second(self, name):
        spec = VARIANTS[name]
        last = {"basic": "2", "bottleneck": "3"}[spec.block]
        for add in (layer for layer in spec.layers if layer.kind == "add"):
            block = add.path.removesuffix(".add")
            branch, shortcut = add.inputs
            assert branch == f"{block}.norm{last}"
            assert shortcut.startswith(f"{block}.shortcut.") or shortcut.endswith((".relu", "stem.pool"))

    @pytest.mark.parametrize("name", CIFAR)
    def test_cifar_shortcuts_hold_no_parameter(self, name):
        shortcuts = [layer for layer in VARIANTS[name].layers if ".shortcut." in layer.path]
        assert [(layer.kind, layer.stride, layer.channels) for layer in shortcuts] == [
            ("zero_pad", 2, 32),
            ("zero_pad", 2, 64),
        ]
        assert not any(layer.arrays for layer in shortcuts)

    def test_d2l_projects_without_a_norm_and_with_a_bias(self):
        layers = VARIANTS["resnet18.d2l"].layers
        shortcuts = [layer for layer in layers if ".shortcut." in layer.path]
        assert {layer.kind for layer in shortcuts} == {"conv"}
        assert all(layer.bias for layer in layers if layer.kind == "conv")


class TestConventions:
    @pytest.mark.parametrize(
        ("convention", "eps", "momentum", "variance", "bias", "head"),
        [
            ("", 1e-5, 0.9, "unbiased", False, "logits"),
            (".paper", 1e-5, 0.9, "unbiased", False, "logits"),
            (".keras_applications", 1.001e-5, 0.99, "biased", True, "softmax"),
            (".keras_classic", 1e-3, 0.99, "biased", True, "softmax"),
            (".flax_examples", 1e-5, 0.9, "biased", False, "logits"),
        ],
    )
    def test_every_layer_carries_the_constants_of_its_convention(self, convention, eps, momentum, variance, bias, head):
        layers = VARIANTS[f"resnet50{convention}"].layers
        norms = {(x.eps, x.momentum, x.running_variance) for x in layers if x.kind == "norm"}
        assert norms == {(eps, momentum, variance)}
        assert {x.bias for x in layers if x.kind == "conv"} == {bias}
        assert layers[-1].kind == {"logits": "dense", "softmax": "softmax"}[head]

    def test_every_depth_has_every_convention_and_d2l_where_blocks_are_basic(self):
        expected = {f"{d}.{c}" for c in CONVENTIONS for d in DEPTHS if c != "d2l" or d in ("resnet18", "resnet34")}
        forms = {f"{d}.{form}" for form in (*GALLERY, "extra_block") for d in ("resnet18", "resnet50")}
        expected |= forms - {"resnet50.shared_conv"}
        assert expected == {name for name, spec in VARIANTS.items() if spec.family == "resnet" and "." in name}
        assert expected


class TestWalk:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_paths_and_names_are_unique_and_inputs_come_before_their_readers(self, name):
        self.check(VARIANTS[name])

    @given(specs())
    @settings(max_examples=60, deadline=None)
    def test_any_valid_spec_walks_soundly_and_has_shapes(self, spec):
        self.check(spec)
        shapes = output_shapes(spec.layers, (*(spec.input_size or (64, 67)), spec.in_channels))
        assert shapes.keys() == {INPUT, *(layer.path for layer in spec.layers)}

    @staticmethod
    def check(spec):
        layers = spec.layers
        assert not [p for p, n in Counter(layer.path for layer in layers).items() if n > 1]
        assert not [a for a, n in Counter(a for layer in layers for a in layer.arrays).items() if n > 1]
        known = {INPUT}
        for layer in layers:
            assert set(layer.inputs) <= known, f"{layer.path} reads what does not exist yet"
            assert all(array.startswith(f"{layer.path}.") for array in layer.arrays)
            known.add(layer.path)
        # Nothing is computed in vain: every output is read, except the network's and the auxiliary ones.
        run = architectures.running(spec, training=True)
        unread = {layer.path for layer in run} - {path for layer in run for path in layer.inputs}
        assert unread == set(architectures.outputs(spec, training=True))
        assert set(spec.stage_outputs) <= known

    @pytest.mark.parametrize("name", VARIANTS)
    def test_channels_of_every_layer_are_those_of_what_it_reads(self, name):
        spec = VARIANTS[name]
        fits = architectures.least_size(spec) <= 64 and not any(layer.training_only for layer in spec.layers)
        size = spec.input_size or ((64, 64) if fits else spec.default_size)
        shapes = output_shapes(spec.layers, (*size, spec.in_channels))
        for layer in spec.layers:
            source = shapes[layer.inputs[0]]
            if layer.kind == "conv":
                assert layer.in_channels == source[-1]
                assert layer.trained["kernel"][2] * layer.groups == source[-1]
            elif layer.kind == "norm":
                assert {*layer.trained.values(), *layer.averaged.values()} == {source[-1:]}
            elif layer.kind == "dense":
                assert (layer.in_features,) == source

    def test_every_convolution_has_norm_and_relu_behind_it_in_order(self):
        block = [x for x in VARIANTS["resnet50"].layers if x.path.startswith("stages.1.blocks.0.")]
        assert [x.path.removeprefix("stages.1.blocks.0.") for x in block] == [
            *("conv1", "norm1", "relu1", "conv2", "norm2", "relu2", "conv3", "norm3"),
            *("shortcut.conv", "shortcut.norm", "add", "relu"),
        ]
        assert all(b.inputs == (a.path,) for a, b in pairwise(block[:8]))

    def test_the_exact_twin_has_no_layer_that_rounds(self):
        for name in ("resnet50", "resnet20", "resnet50.keras_classic"):
            twin = VARIANTS[name].exact_twin
            assert {x.kind for x in twin.layers} & {"norm", "softmax"} == set()
            assert layer_of(twin, "head.pool").op == "max"
            windows = [(x.path, x.kernel, x.stride, x.padding) for x in twin.layers if isinstance(x, Window)]
            assert windows == [
                (x.path, x.kernel, x.stride, x.padding) for x in VARIANTS[name].layers if isinstance(x, Window)
            ]


class TestIdentity:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_every_variant_survives_json(self, name):
        self.check_json(VARIANTS[name])

    @given(specs())
    @settings(max_examples=60, deadline=None)
    def test_any_spec_survives_json(self, spec):
        self.check_json(spec)

    @staticmethod
    def check_json(spec):
        again = architectures.from_json(architectures.to_json(spec))
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.layers == spec.layers
        assert json.loads(architectures.to_json(spec)).keys() == {"family", *(f.name for f in fields(spec))}

    def test_lists_and_tuples_make_equal_specs_and_equal_hashes(self):
        listed = ResNetSpec(block="basic", blocks=[2, 2], widths=[16, 32], replace_stride_with_dilation=[True])
        other = ResNetSpec(block="basic", blocks=(2, 2), widths=(16, 32), replace_stride_with_dilation=(True,))
        assert listed == other
        assert len({listed, other}) == 1

    def test_a_default_written_out_makes_no_other_spec(self):
        explicit = ResNetSpec(
            block="bottleneck", blocks=(3, 4, 6, 3), expansion=4, stride_in="conv2", shortcut_norm=True, input_size=()
        )
        assert explicit == VARIANTS["resnet50"]
        assert hash(explicit) == hash(VARIANTS["resnet50"])

    def test_variants_differ_from_one_another(self):
        by_spec = {}
        for name, spec in VARIANTS.items():
            by_spec.setdefault(spec, []).append(name)
        assert [names for names in by_spec.values() if len(names) > 1] == []

    def test_a_spec_cannot_be_changed(self):
        spec = small()
        with pytest.raises(FrozenInstanceError):
            spec.classes = 5
        with pytest.raises(FrozenInstanceError):
            spec.new_field = 5
        assert spec == small()

    @pytest.mark.parametrize(
        ("changes", "followers"),
        [
            ({"classes": 10}, {}),
            ({"block": "basic"}, {"expansion": 1, "stride_in": "conv1"}),
            ({"block": "basic", "stride_in": "conv2"}, {"expansion": 1}),
            ({"norm": False}, {"shortcut_norm": False}),
            (
                {"blocks": (1, 1, 1), "widths": (8, 8, 8), "width_per_group": 512},
                {"replace_stride_with_dilation": (False, False)},
            ),
            ({"head_pool": "flatten", "input_size": (64, 64)}, {}),
            ({"head": "none", "head_pool": "none"}, {}),
        ],
    )
    def test_replace_changes_what_it_is_asked_and_what_follows_from_it(self, changes, followers):
        before = small()
        after = before.replace(**changes)
        expected = {f.name: getattr(before, f.name) for f in fields(before)} | followers | changes
        assert {f.name: getattr(after, f.name) for f in fields(after)} == expected
        assert before == small()

    def test_replacing_a_flattened_head_forgets_its_size(self):
        flat = small(head_pool="flatten", input_size=(64, 64))
        assert flat.replace(head_pool="average") == small()

    def test_replace_refuses_a_field_it_does_not_know(self):
        with pytest.raises(SpecError, match=r"unknown field 'clases'.*classes"):
            small().replace(clases=10)

    @pytest.mark.parametrize("changes", [{"classes": 0}, {"blocks": 5}, {"blocks": None}, {"norm": [1]}])
    def test_replace_validates(self, changes):
        ((name, value),) = changes.items()
        with pytest.raises(SpecError, match=f"{name}={re.escape(repr(value))} is not allowed"):
            small().replace(**changes)


class TestHead:
    def test_another_number_of_classes_changes_nothing_else(self):
        spec = VARIANTS["resnet50.keras_applications"]
        assert spec.with_head(classes=7) == spec.replace(classes=7)
        assert spec.with_head() == spec

    @pytest.mark.parametrize(("pool", "last"), [("none", "relu"), ("average", "global_pool"), ("max", "global_pool")])
    @pytest.mark.parametrize("flat", [False, True])
    def test_a_classifier_is_left_off(self, pool, last, flat):
        spec = small(head_pool="flatten", input_size=(64, 64)) if flat else small()
        bare = spec.with_head(head="none", pool=pool)
        assert (architectures.output(bare).kind, architectures.logits(bare)) == (last, None)
        assert architectures.logits(bare.with_head(head="softmax", classes=3)) == "head.fc"

    @pytest.mark.parametrize("name", VARIANTS)
    def test_logits_are_what_the_softmax_reads_or_the_output(self, name):
        spec = VARIANTS[name]
        shapes = output_shapes(spec.layers, (*spec.default_size, spec.in_channels))
        assert shapes[architectures.logits(spec)] == (spec.classes,)

    @pytest.mark.parametrize("name", VARIANTS)
    def test_groups_hold_every_layer_once_and_in_order(self, name):
        spec = VARIANTS[name]
        assert [path for group in spec.layer_groups for path in group] == [layer.path for layer in spec.layers]

    def test_a_block_is_a_group(self):
        assert len(VARIANTS["resnet50"].layer_groups) == 1 + 3 + 4 + 6 + 3 + 1


class TestMarks:
    def test_what_shapes_cannot_show_follows_from_a_convention(self):
        unseen = marked(ResNetSpec, Mark.UNSEEN)
        assert {name for changes in CONVENTIONS.values() for name in changes} - set(unseen) == {
            "conv_bias",
            "shortcut_norm",
        }
        # Two specs that differ in nothing else have arrays of the same names and shapes.
        for name, value in (("stem_stride", 1), ("stem_pool", False), ("bn_eps", 1e-3), ("head", "softmax")):
            assert name in unseen
            arrays = [
                {a: s for x in spec.layers for a, s in x.arrays.items()} for spec in (small(), small(**{name: value}))
            ]
            assert arrays[0] == arrays[1]

    def test_only_dilation_leaves_weights_what_they_are(self):
        assert marked(small(), Mark.FREE) == ("replace_stride_with_dilation",)


class TestAdaptivePool:
    @pytest.mark.parametrize(
        ("size", "cells", "windows"),
        [
            (7, 7, [(i, i + 1) for i in range(7)]),
            (14, 4, [(0, 4), (3, 7), (7, 11), (10, 14)]),
            (2, 3, [(0, 1), (0, 2), (1, 2)]),
            (1, 3, [(0, 1)] * 3),
        ],
    )
    def test_windows_are_floor_and_ceil_of_equal_shares(self, size, cells, windows):
        assert adaptive_windows(size, cells) == windows

    def test_a_map_of_any_size_becomes_the_cells(self):
        pool = AdaptivePool(path="pool", inputs=(INPUT,), op="average", height=7, width=5)
        assert output_shapes([pool], (31, 2, 6))["pool"] == (7, 5, 6)


CHOICES = {
    "block": "basic, bottleneck",
    "stem_padding": "symmetric, same, valid",
    "pool_padding": "symmetric, same, valid, ceil",
    "block_padding": "symmetric, same",
    "stride_in": "conv1, conv2",
    "shortcut": "projection, zero_pad",
    "running_variance": "unbiased, biased",
    "head_pool": "average, max, flatten, none",
    "head": "logits, softmax, none",
}
COUNTS = (
    "expansion",
    "groups",
    "width_per_group",
    "in_channels",
    "classes",
    "stem_kernel",
    "stem_stride",
    "stem_width",
)
FLAGS = ("stem_pool", "conv_bias", "norm", "shortcut_norm")


class TestRefusal:
    @staticmethod
    def check(field, value, allowed, **others):
        with pytest.raises(SpecError) as caught:
            small(**(others | {field: value}))
        message = str(caught.value)
        assert message.startswith(f"{field}={value!r} is not allowed")
        assert allowed in message
        assert "\n" not in message

    @pytest.mark.parametrize(("field", "allowed"), CHOICES.items())
    @pytest.mark.parametrize("value", ["SAME", "", 1, True, ["same"], {}])
    def test_a_word_that_is_no_choice(self, field, value, allowed):
        self.check(field, value, f"one of {allowed}")

    @pytest.mark.parametrize("field", [name for name in CHOICES if name != "stride_in"])
    def test_null_where_nothing_follows_from_other_fields(self, field):
        self.check(field, None, f"one of {CHOICES[field]}")

    @pytest.mark.parametrize(
        ("field", "value"),
        [("stem_padding", "ceil"), ("block_padding", "valid"), ("block_padding", "ceil")],
    )
    def test_a_padding_that_exists_elsewhere_only(self, field, value):
        self.check(field, value, f"one of {CHOICES[field]}")

    @pytest.mark.parametrize("field", COUNTS)
    @pytest.mark.parametrize("value", [0, -1, True, 1.0, 2.5, "3", [3], nan])
    def test_a_count_that_is_no_positive_integer(self, field, value):
        self.check(field, value, "an integer of at least 1")

    @pytest.mark.parametrize("field", [name for name in COUNTS if name != "expansion"])
    def test_a_count_that_is_null(self, field):
        self.check(field, None, "an integer of at least 1")

    @pytest.mark.parametrize("field", FLAGS)
    @pytest.mark.parametrize("value", [0, 1, "true", []])
    def test_a_flag_that_is_no_boolean(self, field, value):
        self.check(field, value, "true or false")

    @pytest.mark.parametrize("field", ["blocks", "widths"])
    @pytest.mark.parametrize("value", [(), [], (0,), (1, -1), (1.0, 2), (True, 1), "34", 3, None, (None,)])
    def test_a_list_of_counts_that_is_none(self, field, value):
        self.check(field, value, "a list of one or more integers of at least 1")

    @pytest.mark.parametrize("value", [True, "no", (1,), (None,), (0, 1)])
    def test_dilation_flags_that_are_no_booleans(self, value):
        self.check("replace_stride_with_dilation", value, "a list of booleans")

    @pytest.mark.parametrize("value", [64, "64", (64,), (64, 64, 3), (64, 0), (64.0, 64), (True, True)])
    def test_an_input_size_that_is_no_height_and_width(self, value):
        self.check("input_size", value, "a list of height and width", head_pool="flatten")

    @pytest.mark.parametrize("value", [0, 0.0, -1e-5, inf, nan, True, "1e-5", None])
    def test_an_eps_that_is_no_finite_positive_number(self, value):
        self.check("bn_eps", value, "a number above 0")

    def test_an_eps_too_large_for_a_float(self):
        self.check("bn_eps", 10**400, "a number above 0")

    @pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.1, 1.5, nan, inf, True, "0.9", None])
    def test_a_momentum_that_is_no_share(self, value):
        self.check("bn_momentum", value, "a number above 0 and below 1")

    @pytest.mark.parametrize(
        ("field", "value", "allowed", "others"),
        [
            ("widths", (64,), "2 entries, as many as blocks has", {}),
            ("widths", (64, 128, 256), "2 entries, as many as blocks has", {}),
            ("replace_stride_with_dilation", (), "1 entries, one a stage after the first", {}),
            ("replace_stride_with_dilation", (True, False), "1 entries, one a stage after the first", {}),
            ("expansion", 4, "1 with block basic", {"block": "basic"}),
            ("groups", 2, "1 with block basic", {"block": "basic"}),
            ("width_per_group", 128, "64 with block basic", {"block": "basic"}),
            ("width_per_group", 1, "at least 2 at width 32", {"widths": (64, 32)}),
            ("width_per_group", 8, "at least 10 at width 7", {"widths": (64, 7)}),
            ("stem_kernel", 4, "an odd number with stem_padding symmetric", {}),
            ("shortcut_norm", True, "false where norm is false", {"norm": False}),
            ("shortcut", "zero_pad", "projection where a stage has fewer channels", {"widths": (64, 32)}),
            ("shortcut", "zero_pad", "projection where a stage has fewer channels", {"stem_width": 300}),
            ("head_pool", "flatten", "average, max or none with head none", {"head": "none", "input_size": (64, 64)}),
            ("head_pool", "none", "average, max or flatten with head logits", {}),
            ("head_pool", "none", "average, max or flatten with head softmax", {"head": "softmax"}),
            ("input_size", (), "height and width with head_pool flatten", {"head_pool": "flatten"}),
            ("input_size", (64, 64), "empty unless head_pool is flatten", {}),
            (
                "input_size",
                (5, 64),
                "a size the network can take (input size 5x64 is too small",
                {"head_pool": "flatten", "stem_padding": "valid"},
            ),
        ],
    )
    def test_a_value_that_contradicts_another(self, field, value, allowed, others):
        self.check(field, value, allowed, **others)

    @pytest.mark.parametrize(
        "changes",
        [
            {"stem_kernel": 4, "stem_padding": "same"},
            {"stem_kernel": 4, "stem_padding": "valid"},
            {"widths": (64, 7), "width_per_group": 10},
            {"head": "none", "head_pool": "none"},
            {"shortcut": "zero_pad", "widths": (64, 64)},
            {"norm": True, "shortcut_norm": False},
            {"blocks": (1,), "widths": (64,), "replace_stride_with_dilation": ()},
        ],
    )
    def test_the_neighbours_of_a_contradiction_are_allowed(self, changes):
        assert small(**changes).layers


class TestNames:
    @pytest.mark.parametrize(
        ("name", "suggested"),
        [
            ("resnet5O", "resnet50"),
            ("ResNet50", "resnet50"),
            ("resnet-101", "resnet101"),
            ("resnext50", "resnext50_32x4d"),
            ("resnet50.keras", "resnet50.keras_classic"),
            ("resent50", "resnet50"),
            ("wide_resnet50", "wide_resnet50_2"),
        ],
    )
    def test_an_unknown_variant_is_answered_with_the_nearest(self, name, suggested):
        with pytest.raises(SpecError) as caught:
            architectures.find(name)
        assert f"unknown variant {name!r}; did you mean" in str(caught.value)
        assert suggested in str(caught.value)

    @pytest.mark.parametrize("name", ["", "~~~", "swin"])
    def test_a_variant_near_to_nothing_is_answered_with_the_list(self, name):
        with pytest.raises(SpecError, match="; `resnet-parity list` shows all"):
            architectures.find(name)

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.d2l", ["resnet18.d2l", "resnet34.d2l", "lenet5.d2l"]),
            ("d2l", ["resnet18.d2l", "resnet34.d2l", "lenet5.d2l"]),
            ("resnet?0", ["resnet50", "resnet20"]),
            ("nothing", []),
            ("*", list(VARIANTS)),
        ],
    )
    def test_a_pattern_matches_as_in_a_shell_or_as_a_part(self, pattern, expected):
        assert architectures.matching(pattern) == expected


class TestSpecFiles:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("", "a spec is JSON, and this is not"),
            ("{", "a spec is JSON, and this is not"),
            ("[" * 100_000, "a spec is JSON, and this is not"),
            ('{"family": "resnet", "classes": ' + "9" * 5000 + "}", "a spec is JSON, and this is not"),
            ("[]", "a JSON object of fields, and this is a list"),
            ("null", "a JSON object of fields"),
            ("3", "a JSON object of fields"),
            ("{}", "family=None is unknown; expected one of resnet"),
            ('{"family": "wgg"}', "family='wgg' is unknown; expected one of resnet, resnet_v2, vgg, googlenet, "),
            ('{"family": ["resnet"]}', "is unknown; expected one of resnet"),
            ('{"family": "resnet"}', "field 'block' is missing"),
            ('{"family": "resnet", "block": "basic"}', "field 'blocks' is missing"),
            ('{"family": "resnet", "blok": "basic"}', "unknown field 'blok' in a resnet spec; did you mean 'block'?"),
            ('{"family": "resnet", "norms": true}', "did you mean 'norm'?"),
            ('{"family": "resnet", "zzz": 1}', "unknown field 'zzz' in a resnet spec; allowed: block, blocks"),
            ('{"family": "resnet", "block": "basic", "blocks": [1], "widths": [8], "bn_eps": NaN}', "bn_eps=nan"),
            ('{"family": "resnet", "block": "basic", "blocks": [2, 2]}', "widths=(64, 128, 256, 512) is not allowed"),
            ('{"family": "resnet", "block": null, "blocks": [2, 2]}', "block=None is not allowed"),
        ],
        ids=range(18),
    )
    def test_a_bad_spec_file_is_one_line_with_its_path(self, tmp_path, text, expected):
        path = tmp_path / "spec.json"
        path.write_text(text)
        with pytest.raises(SpecError) as caught:
            architectures.read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("make", ["missing", "folder", "binary"])
    def test_a_spec_file_that_cannot_be_read_is_one_line_with_its_path(self, tmp_path, make):
        path = tmp_path / "spec.json"
        if make == "folder":
            path.mkdir()
        elif make == "binary":
            path.write_bytes(b"\xff\xfe\x00{")
        with pytest.raises(SpecError, match=r"spec\.json: cannot read the spec: ") as caught:
            architectures.read(path)
        assert "\n" not in str(caught.value)

    def test_fields_left_out_take_their_defaults(self, tmp_path):
        path = tmp_path / "spec.json"
        path.write_text('{"family": "resnet", "block": "bottleneck", "blocks": [3, 4, 6, 3]}')
        assert architectures.read(path) == VARIANTS["resnet50"]

    @given(st.dictionaries(st.sampled_from([f.name for f in fields(ResNetSpec)]), st.none() | st.integers(-1, 3)))
    @settings(max_examples=80, deadline=None)
    def test_any_fields_make_a_spec_or_a_spec_error(self, data):
        try:
            spec = architectures.from_dict({"family": "resnet", "block": "basic", "blocks": [1]} | data)
        except ParityError as error:
            assert isinstance(error, SpecError)  # noqa: PT017 - which of the two happens is not ours to say
        else:
            assert spec.layers
