"""The catalogue of planted defects: where each must be caught, and the changes that must not be."""

from dataclasses import dataclass, field
from typing import Any

from common.architectures.resnet import ResNetSpec

# Small enough to run in a second and with everything a large one has: a stage that strides, blocks with and without
# projection, the pool. Size 32 is even, so that SAME padding is not symmetric.
BASE = ResNetSpec(block="bottleneck", blocks=(1, 2), widths=(8, 16), stem_width=8, classes=10)
SIZE = (32, 32)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A defect, in `backend`, that must be caught first at `level`, in the layer or array `at` of `section`."""

    backend: str
    plant: str
    level: str
    section: str
    at: str
    changes: dict[str, Any] = field(default_factory=dict)  # to the spec

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.plant}"


@dataclass(frozen=True, kw_only=True)
class Equivalent:
    """A change that computes the same function, and why."""

    backend: str
    plant: str
    why: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.plant}"


def _of(backend: str, *rows: tuple[str, str, str, str] | tuple[str, str, str, str, dict[str, Any]]) -> list[Mutant]:
    return [
        Mutant(backend=backend, plant=plant, level=level, section=section, at=at, changes=dict(*changes))
        for plant, level, section, at, *changes in rows
    ]


MUTANTS = [
    *_of(
        "torch",
        ("eps", "L1", "eval", "stem.norm"),
        ("momentum_as_decay", "L1", "train", "stem.norm.mean"),
        ("biased_variance", "L1", "train", "stem.norm.var"),
        ("stride_on_the_other_convolution", "L0", "exact", "stages.1.blocks.0.conv1"),
        ("stem_without_relu", "L0", "exact", "stem.relu"),
        ("same_padding_in_the_stem", "L0", "exact", "stem.conv"),
        ("pool_with_ceil_mode", "L0", "exact", "stem.pool"),
        ("bgr", "L0", "exact", "stem.conv"),
        ("bfloat16_in_one_layer", "L2", "eval", "stages.1.blocks.0.conv2"),
        ("tf32_in_one_layer", "L2", "eval", "stages.1.blocks.0.conv3"),
        ("shortcut_detached", "L1", "grad, eval", "stages.1.blocks.0.shortcut.norm.bias"),
        ("norms_stay_in_eval_mode", "L1", "train", "stem.norm"),
        ("maximum_for_the_average", "L1", "eval", "head.pool"),
        ("zeros_on_both_sides", "L0", "exact", "stages.1.blocks.0.shortcut.pad", {"shortcut": "zero_pad"}),
        ("odd_pixels_in_the_shortcut", "L0", "exact", "stages.1.blocks.0.shortcut.pad", {"shortcut": "zero_pad"}),
        (
            "dilation_forgotten",
            "L0",
            "exact",
            "stages.1.blocks.1.conv2",
            {"replace_stride_with_dilation": (True,)},
        ),
        ("loss_is_the_sum", "L1", "eval", "eval/loss"),
        ("kernel_transposed", "L0", "exact", "stages.1.blocks.0.conv2"),
        ("kernel_reshaped", "L0", "exact", "stem.conv"),
        ("gammas_swapped", "L1", "eval", "stages.0.blocks.0.norm1"),
        ("beta_off_by_a_thousandth", "L1", "eval", "stages.1.blocks.0.norm2"),
        ("flattened_channels_first", "L0", "exact", "head.fc", {"head_pool": "flatten", "input_size": SIZE}),
        ("statistics_not_loaded", "L1", "eval", "stem.norm.mean"),
        ("weights_stored_in_float32", "L1", "eval", "stem.conv.kernel"),
    ),
]

EQUIVALENTS = [
    Equivalent(backend="torch", plant="channels_last_memory", why="the layout of memory is not the order of axes"),
    Equivalent(
        backend="torch", plant="zeros_around_the_pool", why="after a ReLU no value is below zero: a zero never wins alone"
    ),
    Equivalent(backend="torch", plant="addition_the_other_way_round", why="a + b and b + a round to the same number"),
]
