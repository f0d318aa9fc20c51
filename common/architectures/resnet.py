"""ResNet: the specification, the layer walk, and the named variants.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385); ResNeXt: Xie et al., 2017
(arXiv:1611.05431); wide ResNet: Zagoruyko and Komodakis, 2016 (arXiv:1605.07146).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    Add,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalPool,
    Layer,
    MaxPool,
    Padding,
    ReLU,
    RunningVariance,
    Shape,
    Softmax,
    ZeroPadShortcut,
    output_shapes,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, Size, check_input_size
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Positive

Block = Literal["basic", "bottleneck"]
ConvName = Literal["conv1", "conv2"]
Shortcut = Literal["projection", "zero_pad"]
HeadPool = Literal["average", "max", "flatten", "none"]

_MOST_BLOCKS = 10_000  # a walk of more would only look like one that hangs

# A convention alone says these, and a builder takes them from weights that follow another one.
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
# The same weights at a finer stride: what DeepLab does to a trained network.
_DILATION = Annotated[tuple[bool, ...], Bound("a list of booleans", lambda flags: True), Mark.UNSEEN | Mark.FREE]


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(Checked):
    """Everything that fixes the function a ResNet computes; the defaults are torchvision's ResNet.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "resnet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a resnet spec"

    block: Block
    blocks: Counts  # blocks in each stage
    widths: Counts = (64, 128, 256, 512)  # of each stage, before expansion
    expansion: Count = None  # type: ignore[assignment]  # output channels / width: 4 for bottleneck, 1 for basic
    groups: Count = 1  # of the 3x3 convolution of a bottleneck
    width_per_group: Count = 64  # inner width of a bottleneck = width * width_per_group // 64 * groups
    in_channels: Count = 3
    classes: Count = 1000

    stem_kernel: Count = 7
    stem_stride: Annotated[Count, _CONVENTION] = 2
    stem_width: Count = 64
    stem_padding: Annotated[Literal["symmetric", "same", "valid"], _CONVENTION] = "symmetric"
    stem_pool: Annotated[bool, _CONVENTION] = True  # the 3x3 max-pool with stride 2
    pool_padding: Annotated[Padding, _CONVENTION] = "symmetric"

    block_padding: Annotated[Literal["symmetric", "same"], _CONVENTION] = "symmetric"
    # conv2 for bottleneck ("v1.5"), conv1 for basic
    stride_in: Annotated[ConvName, _CONVENTION] = None  # type: ignore[assignment]
    shortcut: Shortcut = "projection"  # option B of the paper, or its parameter-free option A
    replace_stride_with_dilation: _DILATION = None  # type: ignore[assignment]  # each stage after the first
    conv_bias: Annotated[bool, Mark.ADOPTED] = False

    norm: Annotated[bool, Mark.ADOPTED] = True
    shortcut_norm: Annotated[bool, Mark.ADOPTED] = None  # type: ignore[assignment]  # as norm
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-5
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased

    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    head: Annotated[Head, Mark.UNSEEN] = "logits"
    input_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]  # with a flattened head only, else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        bottleneck = self.block == "bottleneck"
        self.follow("expansion", 4 if bottleneck else 1)
        self.follow("stride_in", "conv2" if bottleneck else "conv1")
        self.follow("shortcut_norm", self.norm)
        self.follow("replace_stride_with_dilation", (False,) * (len(self.blocks) - 1))
        self.follow("input_size", ())
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        stages = len(self.blocks)
        self.require("blocks", sum(self.blocks) <= _MOST_BLOCKS, f"at most {_MOST_BLOCKS} in all")
        self.require("widths", len(self.widths) == stages, f"{stages} entries, as many as blocks has")
        dilated = len(self.replace_stride_with_dilation)
        self.require(
            "replace_stride_with_dilation", dilated == stages - 1, f"{stages - 1} entries, one a stage after the first"
        )
        if self.block == "basic":
            for name, only in (("expansion", 1), ("groups", 1), ("width_per_group", 64)):
                self.require(name, getattr(self, name) == only, f"{only} with block basic")
        for width in self.widths:
            self.require(
                "width_per_group", self.inner_width(width) >= 1, f"at least {-(-64 // width)} at width {width}"
            )
        odd = self.stem_padding != "symmetric" or self.stem_kernel % 2 == 1
        self.require("stem_kernel", odd, "an odd number with stem_padding symmetric")
        self.require("shortcut_norm", self.norm or not self.shortcut_norm, "false where norm is false")
        if self.shortcut == "zero_pad":
            channels = [self.stem_width, *(width * self.expansion for width in self.widths)]
            rising = channels == sorted(channels)
            self.require("shortcut", rising, f"projection where a stage has fewer channels: {channels}")
        if self.head == "none":
            self.require("head_pool", self.head_pool != "flatten", "average, max or none with head none")
        else:
            self.require("head_pool", self.head_pool != "none", f"average, max or flatten with head {self.head}")
        if self.head_pool == "flatten":
            self.require("input_size", bool(self.input_size), "height and width with head_pool flatten")
            check_input_size(self)
        else:
            self.require("input_size", not self.input_size, "empty unless head_pool is flatten")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed.

        Fields that follow from a changed one (`block`, `blocks`, `norm`) start anew unless they are given too.
        """
        self.check_names(changes)
        anew: dict[str, Any] = {}
        if changes.get("block", self.block) != self.block:
            anew |= {"expansion": None, "stride_in": None}
        if changes.get("norm", self.norm) != self.norm:
            anew |= {"shortcut_norm": None}
        blocks = changes.get("blocks", self.blocks)
        if isinstance(blocks, list | tuple) and len(blocks) != len(self.blocks):
            anew |= {"replace_stride_with_dilation": None}
        if changes.get("head_pool", self.head_pool) != self.head_pool:
            anew |= {"input_size": None}
        return replace(self, **(anew | changes))

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves the classifier off and returns the last map, pooled by `pool` into a vector an image."""
        changes: dict[str, Any] = {} if classes is None else {"classes": classes}
        if head == "none":
            changes |= {"head": "none", "head_pool": pool}
        elif head is not None:
            changes |= {"head": head} | ({"head_pool": "average"} if self.head == "none" else {})
        return self.replace(**changes)

    def with_output_stride(self, output_stride: int) -> Self:
        """The same weights at a finer stride: the last stages dilate instead (DeepLab's output stride 8, 16, 32)."""
        stride = self.replace(replace_stride_with_dilation=None).output_stride
        for last in range(len(self.blocks)):
            if stride == output_stride:
                kept = len(self.blocks) - 1 - last
                return self.replace(replace_stride_with_dilation=(False,) * kept + (True,) * last)
            stride //= 2
        raise SpecError(
            f"output_stride={output_stride!r} is not allowed in {self.title}; expected the network's stride or a half, "
            f"quarter, … down to {stride * 2}"
        )

    @property
    def stage_strides(self) -> tuple[int, ...]:
        """Stride of each stage's first block, where dilation does not replace it."""
        return (1, *(1 if dilated else 2 for dilated in self.replace_stride_with_dilation))

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last stage's output, in each direction."""
        stride = self.stem_stride * (2 if self.stem_pool else 1)
        for stage_stride in self.stage_strides:
            stride *= stage_stride
        return stride

    def inner_width(self, width: int) -> int:
        """Channels inside a block of a stage of this width."""
        return width * self.width_per_group // 64 * self.groups

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        if self.input_size:
            height, width = self.input_size
            return height, width
        return (224, 224) if self.output_stride > 8 else (32, 32)

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: the stem, each block, the head; in order, every layer once."""
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            where, *rest = layer.path.split(".")
            groups.setdefault(".".join([where, *rest[:3]]) if where == "stages" else where, []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        return self.replace(
            norm=False,
            shortcut_norm=False,
            conv_bias=True,
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            head="none" if self.head == "none" else "logits",
            input_size=self.input_size,
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_walk(self))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the stages' outputs (C2 to C5 of a feature pyramid for four stages)."""
        return tuple(f"stages.{s}.blocks.{n - 1}.relu" for s, n in enumerate(self.blocks))


def _walk(spec: ResNetSpec) -> Iterator[Layer]:
    last = INPUT

    def conv(path: str, inputs: str, in_channels: int, out_channels: int, kernel: int, **hyper: Any) -> Conv:
        return Conv(
            path=path,
            inputs=(inputs,),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=kernel,
            bias=spec.conv_bias,
            **({"stride": 1, "padding": spec.block_padding} | hyper),
        )

    def norm(path: str, inputs: str, channels: int) -> BatchNorm:
        return BatchNorm(
            path=path,
            inputs=(inputs,),
            channels=channels,
            eps=spec.bn_eps,
            momentum=spec.bn_momentum,
            running_variance=spec.running_variance,
        )

    stem = {"stride": spec.stem_stride, "padding": spec.stem_padding}
    yield conv(last := "stem.conv", INPUT, spec.in_channels, spec.stem_width, spec.stem_kernel, **stem)
    if spec.norm:
        yield norm("stem.norm", last, spec.stem_width)
        last = "stem.norm"
    yield ReLU(path="stem.relu", inputs=(last,))
    last = "stem.relu"
    if spec.stem_pool:
        yield MaxPool(path="stem.pool", inputs=(last,), kernel=3, stride=2, padding=spec.pool_padding)
        last = "stem.pool"

    channels, dilation = spec.stem_width, 1
    for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
        out_channels = width * spec.expansion
        inner = spec.inner_width(width)
        dilated = s > 0 and spec.replace_stride_with_dilation[s - 1]
        for b in range(count):
            block = f"stages.{s}.blocks.{b}"
            block_input, block_channels = last, channels
            stride = spec.stage_strides[s] if b == 0 else 1
            # A convolution keeps the dilation it had up to the one whose stride was taken away, and doubles after it.
            before, after = dilation, dilation * 2 if dilated and b == 0 else dilation
            strided = int(spec.stride_in == "conv2")
            if spec.block == "bottleneck":
                shapes = [(inner, 1), (inner, 3), (out_channels, 1)]
            else:
                shapes = [(inner, 3), (out_channels, 3)]
            for i, (width_out, kernel) in enumerate(shapes):
                yield conv(
                    f"{block}.conv{i + 1}",
                    last,
                    channels,
                    width_out,
                    kernel,
                    stride=stride if i == strided else 1,
                    dilation=1 if kernel == 1 else before if i <= strided else after,
                    groups=spec.groups if (spec.block, i) == ("bottleneck", 1) else 1,
                )
                last, channels = f"{block}.conv{i + 1}", width_out
                if spec.norm:
                    yield norm(f"{block}.norm{i + 1}", last, channels)
                    last = f"{block}.norm{i + 1}"
                if i < len(shapes) - 1:
                    yield ReLU(path=f"{block}.relu{i + 1}", inputs=(last,))
                    last = f"{block}.relu{i + 1}"
            dilation = after
            shortcut = block_input
            if stride != 1 or block_channels != out_channels:
                if spec.shortcut == "zero_pad":
                    shortcut = f"{block}.shortcut.pad"
                    yield ZeroPadShortcut(path=shortcut, inputs=(block_input,), stride=stride, channels=out_channels)
                else:
                    shortcut = f"{block}.shortcut.conv"
                    yield conv(shortcut, block_input, block_channels, out_channels, 1, stride=stride)
                    if spec.shortcut_norm:
                        yield norm(f"{block}.shortcut.norm", shortcut, out_channels)
                        shortcut = f"{block}.shortcut.norm"
            yield Add(path=f"{block}.add", inputs=(last, shortcut))
            yield ReLU(path=f"{block}.relu", inputs=(f"{block}.add",))
            last = f"{block}.relu"

    features, flattened = channels, None
    if spec.head_pool == "flatten":
        flattened = _map_shape(spec, channels)
        features = flattened[0] * flattened[1] * flattened[2]
        yield Flatten(path="head.flatten", inputs=(last,))
        last = "head.flatten"
    elif spec.head_pool != "none":
        yield GlobalPool(path="head.pool", inputs=(last,), op=spec.head_pool)
        last = "head.pool"
    if spec.head != "none":
        yield Dense(
            path="head.fc", inputs=(last,), in_features=features, out_features=spec.classes, flattened=flattened
        )
        if spec.head == "softmax":
            yield Softmax(path="head.softmax", inputs=("head.fc",))


def _map_shape(spec: ResNetSpec, channels: int) -> Shape:
    """Shape of the last stage's output at the spec's own input size."""
    backbone = spec.replace(head="none", head_pool="none")
    return output_shapes(backbone.layers, (*spec.input_size, spec.in_channels))[spec.stage_outputs[-1]]


# Published conventions: what each source does differently from torchvision, for both kinds of block.
CONVENTIONS: dict[str, dict[str, Any]] = {
    # The authors' Caffe release: pooling without padding, with the last window kept ("ceil").
    "paper": {"stride_in": "conv1", "pool_padding": "ceil"},
    "keras_applications": {
        "stride_in": "conv1",
        "conv_bias": True,
        "bn_eps": 1.001e-5,
        "bn_momentum": 0.99,
        "running_variance": "biased",
        "head": "softmax",
    },
    # The functional model with `res2a_branch2a`; its 7x7 average is global at the size 224 it was written for.
    "keras_classic": {
        "stride_in": "conv1",
        "pool_padding": "valid",
        "conv_bias": True,
        "bn_eps": 1e-3,
        "bn_momentum": 0.99,
        "running_variance": "biased",
        "head": "softmax",
    },
    "flax_examples": {"pool_padding": "same", "block_padding": "same", "running_variance": "biased"},
    # Dive into Deep Learning, PyTorch edition, section 8.6: basic blocks only.
    "d2l": {"conv_bias": True, "shortcut_norm": False},
}


def _variants() -> dict[str, ResNetSpec]:
    named: tuple[tuple[int, Block, tuple[int, ...]], ...] = (
        (18, "basic", (2, 2, 2, 2)),
        (34, "basic", (3, 4, 6, 3)),
        (50, "bottleneck", (3, 4, 6, 3)),
        (101, "bottleneck", (3, 4, 23, 3)),
        (152, "bottleneck", (3, 8, 36, 3)),
    )
    depths = {f"resnet{depth}": ResNetSpec(block=block, blocks=blocks) for depth, block, blocks in named}
    r50, r101 = depths["resnet50"], depths["resnet101"]
    wider = {
        "wide_resnet50_2": r50.replace(width_per_group=128),
        "wide_resnet101_2": r101.replace(width_per_group=128),
        "resnext50_32x4d": r50.replace(groups=32, width_per_group=4),
        "resnext101_32x8d": r101.replace(groups=32, width_per_group=8),
        "resnext101_64x4d": r101.replace(groups=64, width_per_group=4),
    }
    # Section 4.2 of the paper: 6n+2 layers, three stages, parameter-free shortcuts.
    cifar = {
        f"resnet{6 * n + 2}": ResNetSpec(
            block="basic",
            blocks=(n, n, n),
            widths=(16, 32, 64),
            stem_kernel=3,
            stem_stride=1,
            stem_width=16,
            stem_pool=False,
            shortcut="zero_pad",
            classes=10,
        )
        for n in (3, 5, 7, 9, 18)
    }
    conventions = {
        f"{name}.{convention}": spec.replace(**changes)
        for convention, changes in CONVENTIONS.items()
        for name, spec in depths.items()
        if convention != "d2l" or spec.block == "basic"
    }
    return depths | wider | cifar | conventions


VARIANTS = _variants()
# How the names of the family and its variants begin, and how people write that.
TITLES = {"resnet": "ResNet", "wide_resnet": "WideResNet", "resnext": "ResNeXt"}
Spec = ResNetSpec
