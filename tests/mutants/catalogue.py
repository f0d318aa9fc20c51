"""The catalogue of planted defects: where each must be caught, and the changes that must not be."""

from dataclasses import dataclass, field
from typing import Any

from common.architectures import Spec
from common.architectures.alexnet import AlexNetSpec
from common.architectures.densenet import DenseNetSpec
from common.architectures.efficientnet import EfficientNetSpec
from common.architectures.googlenet import GoogLeNetSpec
from common.architectures.inception_v3 import InceptionV3Spec
from common.architectures.lenet import LeNetSpec
from common.architectures.resnet import ResNetSpec
from common.architectures.resnet_v2 import ResNetV2Spec
from common.architectures.vgg import VGGSpec

# Small enough to run in a second and with everything a large one has: a stage that strides, blocks with and without
# projection, the pool. Size 32 is even, so that SAME padding is not symmetric.
BASE = ResNetSpec(block="bottleneck", blocks=(1, 2), widths=(8, 16), stem_width=8, classes=10)
SIZE = (32, 32)
# Maps of 17 by 15 pixels before the last pool and of 8 by 7 behind it: windows that overlap, and a pixel left over.
VGG = VGGSpec(convs=(1, 2), widths=(8, 12), hidden=(16, 12), dropout=(0.5, 0.25), classes=10, map_size=(3, 3))
VGG_SIZE = (34, 30)
# A stage that strides at its end, projections, and a pool whose zeros win over what the stem gives below zero.
RESNET_V2 = ResNetV2Spec(blocks=(2, 1), widths=(4, 6), stem_width=8, classes=10)
DENSENET = DenseNetSpec(blocks=(2, 1), growth_rate=8, bottleneck=2, stem_width=8, classes=10)
LENET = LeNetSpec(widths=(4, 6), hidden=(12, 9), conv_activation="scaled_tanh", dense_activation="relu")
# A norm before the pools, groups, dropout, a flattened map of 2 by 1 pixels; and torchvision's.
ALEXNET_OF_PAPER = AlexNetSpec(
    widths=(8, 12, 10, 12, 8),
    groups=2,
    hidden=(16, 12),
    classes=10,
    padding=0,
    lrn="before_pool",
    head_pool="flatten",
    dropout_place="behind",
    input_size=(99, 67),
)
ALEXNET = AlexNetSpec(widths=(8, 12, 10, 12, 8), hidden=(48, 48), classes=10, map_size=(3, 2))  # 48 cells as well
# Maps of 17 by 15 pixels behind the stem, which a stride of 2 leaves 9 by 8 of; a residual block that may be left out.
EFFICIENTNET = EfficientNetSpec(
    widths=(8, 12, 12),
    repeats=(2, 2, 1),
    expand=(1, 3, 2),
    kernels=(3, 5, 3),
    strides=(1, 2, 1),
    stem_width=8,
    head_width=16,
    classes=10,
    stochastic_depth=0.6,
)
# A module of each kind, two of the last; the auxiliary branch takes images of 299x299.
INCEPTION_V3 = InceptionV3Spec(unit=4, pool_features=(7,), channels_7x7=(10,), classes=10, aux=False)
WITH_AUX = INCEPTION_V3.replace(wide_modules=1, aux=True)
# torchvision's input and auxiliary heads, and the rest of Caffe's network, without norms. The heads read maps of 4 by 5
# pixels and as many channels; ceil adds to the maps before the pools.
GOOGLENET = GoogLeNetSpec(
    stem=(6, 6, 8),
    stages=(1, 3, 1),
    widths=((6, 5, 8, 6, 7, 6), (7, 6, 6, 5, 8, 6), (6, 6, 8, 6, 6, 7), (8, 5, 6, 6, 7, 6), (6, 7, 8, 6, 6, 6)),
    large_kernel=5,
    classes=10,
    norm=False,
    transform_input=True,
    lrn=True,
    lrn_alpha=0.1,
    aux_widths=(6, 24),
    aux_map=(2, 2),
    aux_dropout=0.5,
)
# Of the images, where that is not SIZE and the spec does not say it.
SIZES: dict[Spec, tuple[int, int]] = {
    VGG: VGG_SIZE,
    ALEXNET: (70, 64),
    EFFICIENTNET: VGG_SIZE,
    GOOGLENET: (64, 80),
    INCEPTION_V3: (107, 92),
    WITH_AUX: (299, 300),
}


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A defect, in `backend`, that must be caught first at `level`, in the layer or array `at` of `section`."""

    backend: str
    plant: str
    level: str
    section: str
    at: str
    base: Spec = BASE
    changes: dict[str, Any] = field(default_factory=dict)  # to the spec

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.plant}"

    @property
    def path(self) -> str:
        return f"tests.mutants.of_{self.backend}:{self.plant}"

    @property
    def spec(self) -> Spec:
        return self.base.replace(**self.changes)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.spec.input_size or SIZES.get(self.base, SIZE)
        return height, width


@dataclass(frozen=True, kw_only=True)
class OfTraining:
    """A defect in how `backend` trains, that must be caught first after `step`, in an array of `kind`."""

    backend: str
    plant: str
    step: int
    kind: str
    recipe: str  # one of RECIPES

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.plant}-{self.recipe}"

    @property
    def path(self) -> str:
        return f"tests.mutants.training_of_{self.backend}:{self.plant}"


@dataclass(frozen=True, kw_only=True)
class OfOrder:
    """A defect that makes `backend` depend on the order of the batch, first in the array `at` of `section`."""

    backend: str
    plant: str
    level: str
    section: str
    at: str

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.plant}"

    @property
    def path(self) -> str:
        return f"tests.mutants.of_{self.backend}:{self.plant}"


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

    @property
    def path(self) -> str:
        return f"tests.mutants.of_{self.backend}:{self.plant}"


Row = tuple[str, str, str, str] | tuple[str, str, str, str, dict[str, Any]]


def _of(backend: str, *rows: Row, base: Spec = BASE) -> list[Mutant]:
    return [
        Mutant(backend=backend, plant=plant, level=level, section=section, at=at, base=base, changes=dict(*changes))
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
        ("loss_is_the_sum", "L1", "eval", "loss"),
        ("kernel_transposed", "L0", "exact", "stages.1.blocks.0.conv2"),
        ("kernel_reshaped", "L0", "exact", "stem.conv"),
        ("gammas_swapped", "L1", "eval", "stages.0.blocks.0.norm1"),
        ("beta_off_by_a_thousandth", "L1", "eval", "stages.1.blocks.0.norm2"),
        ("flattened_channels_first", "L0", "exact", "head.fc", {"head_pool": "flatten", "input_size": SIZE}),
        ("statistics_not_loaded", "L1", "weights", "stem.norm.mean"),
        ("weights_stored_in_float32", "L1", "weights", "stem.conv.kernel"),
    ),
    *_of(
        "keras",
        ("default_eps", "L1", "eval", "stem.norm"),
        ("default_momentum", "L1", "train", "stem.norm.mean"),
        ("frozen_norms", "L1", "train", "stem.norm"),
        ("relu6", "L0", "exact", "stages.1.blocks.0.relu1"),
        ("bfloat16_in_one_layer", "L2", "eval", "stages.1.blocks.0.conv2"),
        ("sigmoid_for_softmax", "L1", "eval", "head.softmax", {"head": "softmax"}),
        ("same_padding_everywhere", "L0", "exact", "stem.conv"),
        ("biased_variance", "L1", "train", "stem.norm.var"),
        ("unbiased_variance", "L1", "train", "stem.norm.var", {"running_variance": "biased"}),
        ("stem_without_relu", "L0", "exact", "stem.relu"),
        ("label_smoothing", "L1", "eval", "loss"),
        ("kernel_rotated", "L0", "exact", "stages.0.blocks.0.conv2"),
        ("means_swapped", "L1", "eval", "stages.1.blocks.0.norm1"),
        ("groups_interleaved", "L0", "exact", "stages.0.blocks.0.conv2", {"groups": 4}),
        ("bias_not_loaded", "L0", "weights", "head.fc.bias"),
    ),
    *_of(
        "flax",
        ("eps", "L1", "eval", "stem.norm"),
        ("default_momentum", "L1", "train", "stem.norm.mean"),
        ("momentum_as_decay", "L1", "train", "stem.norm.mean"),
        ("biased_variance", "L1", "train", "stem.norm.var"),
        ("always_running_average", "L1", "train", "stem.norm"),
        ("gelu", "L0", "exact", "stem.relu"),
        ("leaky_relu", "L0", "exact", "stem.relu"),
        ("average_pool", "L0", "exact", "stem.pool"),
        ("same_padding", "L0", "exact", "stem.conv"),
        ("gradient_stopped_at_the_pool", "L1", "grad, eval", "stem.norm.bias"),
        ("bfloat16_in_one_layer", "L2", "eval", "stem.conv"),
        ("temperature", "L1", "eval", "head.softmax", {"head": "softmax"}),
        ("last_gammas_stay_zero", "L1", "weights", "stages.0.blocks.0.norm3.scale"),
        ("variance_taken_for_deviation", "L1", "eval", "stem.norm"),
        ("dense_bias_shifted", "L0", "exact", "head.fc"),
    ),
    *_of(
        "torch",
        ("gate_without_its_sigmoid", "L1", "eval", "stages.0.blocks.0.se.sigmoid", {"squeeze": (4, 8)}),
        (
            "pixels_picked_in_place_of_the_average",
            "L1",
            "eval",
            "stages.1.blocks.0.shortcut.pool",
            {"shortcut_pool": True},
        ),
        ("shared_norm_averages_once", "L1", "train", "stages.0.blocks.0.norm1.mean", {"shared": "norm"}),
    ),
    *_of(
        "flax",
        ("relu_before_the_addition", "L0", "exact", "stages.0.blocks.0.add"),
    ),
    *_of(
        "torch",
        ("dense_rows_channels_first", "L0", "exact", "head.fc1"),
        ("adaptive_pool_resized", "L1", "eval", "head.pool"),
        ("no_relu_between_dense_layers", "L0", "exact", "head.relu1"),
        ("softmax_twice", "L1", "eval", "head.softmax", {"head": "softmax"}),
        base=VGG,
    ),
    *_of(
        "keras",
        ("adaptive_pool_by_strides", "L0", "exact", "head.pool"),
        ("pool_keeps_the_last_pixel", "L0", "exact", "blocks.1.pool"),
        ("no_bias_under_a_norm", "L0", "exact", "blocks.0.conv1", {"norm": True}),
        ("dropout_does_not_scale", "L1", "train", "head.dropout1"),
        ("dropout_of_the_head_left_on", "L1", "eval", "head.dropout1"),
        base=VGG,
    ),
    *_of(
        "flax",
        ("adaptive_windows_do_not_overlap", "L0", "exact", "head.pool"),
        ("one_rate_for_every_dropout", "L1", "train", "head.dropout2"),
        ("dense_layers_share_the_first_bias", "L0", "exact", "head.fc2", {"hidden": (16, 16), "dropout": (0.5, 0.25)}),
        base=VGG,
    ),
    *_of(
        "torch",
        ("relu_after_the_addition", "L0", "exact", "stages.0.blocks.0.add"),
        ("no_relu_at_the_end", "L0", "exact", "head.relu"),
        ("no_norm_at_the_end", "L1", "grad, eval", "head.norm.bias"),  # no gradient arrives at all
        ("projection_of_the_sum", "L0", "exact", "stages.0.blocks.0.shortcut.conv"),
        ("identity_behind_the_activation", "L0", "exact", "stages.0.blocks.1.shortcut.pool"),
        # After a ReLU, in the first ResNet, the same is an equivalent.
        ("zeros_around_the_pool", "L0", "exact", "stem.pool", {"pool_padding": "symmetric"}),
        base=RESNET_V2,
    ),
    *_of(
        "keras",
        ("padding_never_wins", "L0", "exact", "stem.pad"),
        ("stride_at_the_end", "L0", "exact", "stages.0.blocks.1.conv2", {"stride_at": "start"}),
        base=RESNET_V2,
    ),
    *_of(
        "flax",
        ("eps_of_torchvision", "L1", "eval", "stages.0.blocks.0.norm1"),
        ("projections_without_bias", "L0", "exact", "stages.0.blocks.0.shortcut.conv"),
        base=RESNET_V2,
    ),
    *_of(
        "torch",
        ("new_features_first", "L0", "exact", "blocks.0.layers.0.concat"),
        ("relu_in_place_of_the_features", "L0", "exact", "blocks.1.layers.0.concat"),
        ("transition_padded", "L0", "exact", "transitions.0.conv"),
        ("no_relu_behind_the_last_norm", "L0", "exact", "head.relu"),
        base=DENSENET,
    ),
    *_of(
        "keras",
        ("no_relu_in_the_stem", "L0", "exact", "stem.relu"),
        ("eps_of_torchvision", "L1", "eval", "stem.norm", {"bn_eps": 1.001e-5}),
        base=DENSENET,
    ),
    *_of(
        "flax",
        ("stem_padded_symmetrically", "L0", "exact", "stem.conv", {"stem_padding": "same"}),
        ("maximum_in_the_transition", "L1", "eval", "transitions.0.pool"),
        base=DENSENET,
    ),
    *_of(
        "torch",
        ("no_activation_between_dense_layers", "L0", "exact", "head.act1"),
        ("pools_by_maximum", "L1", "eval", "features.pool1"),
        base=LENET,
    ),
    *_of(
        "keras",
        ("tanh_without_its_scale", "L1", "eval", "features.act1"),
        base=LENET,
    ),
    *_of(
        "flax",
        ("rows_of_fc1_channels_first", "L0", "exact", "head.fc1"),
        base=LENET,
    ),
    *_of(
        "torch",
        ("alpha_divided_twice", "L1", "eval", "features.lrn1"),
        ("k_of_one", "L1", "eval", "features.lrn1"),
        ("groups_interleaved", "L0", "exact", "features.conv2"),
        base=ALEXNET_OF_PAPER,
    ),
    *_of(
        "keras",
        ("radius_taken_for_size", "L1", "eval", "features.lrn1"),
        base=ALEXNET_OF_PAPER,
    ),
    *_of("flax", ("default_beta", "L1", "eval", "features.lrn1"), base=ALEXNET_OF_PAPER),
    *_of(
        "torch",
        ("dropout_mask_channels_last", "L1", "train", "head.dropout1"),
        ("dropout_behind_the_dense_layers", "L1", "train", "head.dropout1"),
        base=ALEXNET,
    ),
    *_of(
        "torch",
        ("relu6_for_silu", "L1", "eval", "stem.act"),
        ("residual_missing", "L1", "eval", "stages.1.blocks.1.add"),
        ("same_padding_of_an_even_size", "L0", "exact", "stages.1.blocks.0.depthwise", {"padding": "same"}),
        (
            "deviations_taken_for_variances",
            *("L1", "eval", "stem.affine"),
            {"input_mean": (0.485, 0.456, 0.406), "input_std": (0.229, 0.224, 0.225)},
        ),
        base=EFFICIENTNET,
    ),
    *_of(
        "keras",
        ("stochastic_depth_does_not_scale", "L1", "train", "stages.0.blocks.1.drop"),
        ("symmetric_padding_for_same", "L0", "exact", "stem.conv", {"padding": "same"}),
        ("gate_of_the_first_block_everywhere", "L1", "eval", "stages.0.blocks.1.squeeze"),
        base=EFFICIENTNET,
    ),
    *_of(
        "flax",
        ("one_rate_of_stochastic_depth", "L1", "train", "stages.0.blocks.1.drop"),
        ("head_norm_at_default_eps", "L1", "eval", "head.norm", {"bn_eps": 1e-3}),
        base=EFFICIENTNET,
    ),
    *_of(
        "torch",
        ("average_of_the_borders_the_other_way", "L1", "eval", "stages.0.blocks.0.pool"),
        ("average_in_the_last_module", "L1", "eval", "stages.2.blocks.2.pool", {"last_pool": "max"}),
        ("columns_for_rows", "L0", "exact", "stages.1.blocks.1.branch7x7_2.conv"),
        base=INCEPTION_V3,
    ),
    *_of(
        "keras",
        ("numbers_in_another_order", "L0", "exact", "stages.2.blocks.1.branch3x3_2a.conv"),
        ("gammas_that_are_not_there_are_zero", "L1", "eval", "stem.1a.norm", {"bn_scale": False}),
        base=INCEPTION_V3,
    ),
    *_of(
        "flax",
        ("images_transformed_twice", "L1", "eval", "stem.affine", {"transform_input": True}),
        base=INCEPTION_V3,
    ),
    *_of("torch", ("auxiliary_windows_adapt", "L1", "train", "aux.pool"), base=WITH_AUX),
    *_of(
        "torch",
        ("input_transformed_twice", "L1", "eval", "stem.affine"),
        ("auxiliary_heads_swapped", "L1", "train", "aux1.pool"),
        ("auxiliary_outputs_swapped", "L1", "train", "loss"),
        base=GOOGLENET,
    ),
    *_of(
        "keras",
        ("pools_that_floor", "L0", "exact", "stem.pool1"),
        ("alpha_divided_twice", "L1", "eval", "stem.lrn1"),
        base=GOOGLENET,
    ),
    *_of(
        "flax",
        ("five_by_five_as_three_by_three", "L0", "exact", "inception3a.branch3"),
        ("auxiliary_windows_that_do_not_overlap", "L1", "train", "aux1.pool"),
        base=GOOGLENET,
    ),
]

# Of three images: what takes its neighbour's image in a ring is the same function of a batch that is rolled.
IMAGES_OF_ORDER = 3
OF_ORDER = [
    OfOrder(backend="torch", plant="norm_over_half_the_batch", level="L1", section="train", at="stem.norm"),
    OfOrder(backend="torch", plant="output_of_the_neighbour", level="L1", section="eval", at="stages.1.blocks.0.conv2"),
    OfOrder(backend="keras", plant="dropout_left_on", level="L1", section="eval", at="stages.1.blocks.0.conv2"),
    OfOrder(backend="flax", plant="float32_in_training_in_one_layer", level="L1", section="train", at="stem.norm"),
]

# Changes to the recipe of the check. Every option that changes a step is in one of them.
RECIPES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "nesterov": {"nesterov": True, "clip_norm": 1.0, "ema_decay": 0.9, "decay_norms_and_biases": True},
    "adamw": {"optimizer": "adamw", "decay": "decoupled", "clip_norm": 1.0, "ema_decay": 0.9},
}


def _of_training(backend: str, recipe: str, *rows: tuple[str, int, str]) -> list[OfTraining]:
    return [OfTraining(backend=backend, plant=plant, step=step, kind=kind, recipe=recipe) for plant, step, kind in rows]


OF_TRAINING = [
    *_of_training(
        "torch",
        "sgd",
        ("dampening", 1, "velocity"),
        ("decoupled_decay", 1, "velocity"),
        ("decay_of_norms_and_biases", 1, "velocity"),
        ("smoothing_over_the_other_classes", 1, "loss"),
        ("momentum_as_decay", 1, "stat"),
        ("biased_variance", 1, "stat"),
        ("rate_of_the_step_before", 2, "param"),
        ("gradients_not_zeroed", 2, "velocity"),
        ("optimizer_made_anew", 2, "velocity"),
    ),
    *_of_training(
        "torch",
        "nesterov",
        ("without_nesterov", 1, "param"),
        ("clipped_by_the_norm_and_1e_6", 1, "velocity"),
        ("clipped_one_by_one", 1, "velocity"),
        ("average_before_the_step", 1, "ema"),
    ),
    *_of_training(
        "torch",
        "adamw",
        ("without_bias_correction", 1, "param"),
        ("coupled_decay", 1, "moment1"),
    ),
    *_of_training(
        "keras",
        "sgd",
        ("rate_in_the_velocity", 2, "velocity"),
        ("decoupled_decay", 1, "velocity"),
        ("biased_variance", 1, "stat"),
        ("smoothing_left_out", 1, "loss"),
    ),
    *_of_training("keras", "nesterov", ("clipped_one_by_one", 1, "velocity")),
    *_of_training(
        "keras",
        "adamw",
        ("eps_before_the_bias_correction", 1, "param"),
        ("decay_of_norms_and_biases", 1, "param"),
    ),
    *_of_training(
        "flax",
        "sgd",
        ("decay_of_norms_and_biases", 1, "velocity"),
        ("momentum_in_float32", 2, "velocity"),
        ("momentum_averages", 1, "velocity"),
        ("rate_of_the_step_after", 1, "param"),
        ("default_momentum", 1, "stat"),
        ("statistics_not_kept", 1, "stat"),
    ),
    *_of_training(
        "flax",
        "nesterov",
        ("average_a_step_late", 2, "ema"),
    ),
    *_of_training(
        "flax",
        "adamw",
        ("eps_below_the_root", 1, "param"),
    ),
]

EQUIVALENTS = [
    Equivalent(backend="torch", plant="channels_last_memory", why="the layout of memory is not the order of axes"),
    Equivalent(
        backend="torch",
        plant="zeros_around_the_pool",
        why="after a ReLU no value is below zero: a zero never wins alone",
    ),
    Equivalent(backend="torch", plant="addition_the_other_way_round", why="a + b and b + a round to the same number"),
    Equivalent(backend="keras", plant="addition_the_other_way_round", why="a + b and b + a round to the same number"),
    Equivalent(backend="flax", plant="relu_as_maximum", why="no value before a ReLU is exactly zero"),
    Equivalent(
        backend="flax",
        plant="fast_variance",
        why="E[x²] - E[x]² loses digits where a mean is large against its deviation, and none is on this input",
    ),
]
