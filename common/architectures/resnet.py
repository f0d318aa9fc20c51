"""ResNet: the specification, the layer walk, and the named variants.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385); ResNeXt: Xie et al., 2017
(arXiv:1611.05431); wide ResNet: Zagoruyko and Komodakis, 2016 (arXiv:1605.07146).
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from sys import float_info
from typing import Any, ClassVar, Literal, Self, get_args

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
from common.errors import InputError, SpecError

Block = Literal["basic", "bottleneck"]
ConvName = Literal["conv1", "conv2"]
Shortcut = Literal["projection", "zero_pad"]
HeadPool = Literal["average", "max", "flatten", "none"]
Head = Literal["logits", "softmax", "none"]

# A field whose default is None follows from the others; it is filled in at construction and never None afterwards.
_CHOICES: dict[str, tuple[str, ...]] = {
    "block": get_args(Block),
    "stem_padding": ("symmetric", "same", "valid"),
    "pool_padding": get_args(Padding),
    "block_padding": ("symmetric", "same"),
    "stride_in": get_args(ConvName),
    "shortcut": get_args(Shortcut),
    "running_variance": get_args(RunningVariance),
    "head_pool": get_args(HeadPool),
    "head": get_args(Head),
}
_POSITIVE = (
    "expansion",
    "groups",
    "width_per_group",
    "in_channels",
    "classes",
    "stem_kernel",
    "stem_stride",
    "stem_width",
)
_MOST_BLOCKS = 10_000  # a walk of more would only look like one that hangs
_FLAGS = ("stem_pool", "conv_bias", "norm", "shortcut_norm")


@dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """Everything that fixes the function a ResNet computes; the defaults are torchvision's ResNet.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed.
    """

    family: ClassVar[str] = "resnet"

    block: Block
    blocks: tuple[int, ...]  # blocks in each stage
    widths: tuple[int, ...] = (64, 128, 256, 512)  # of each stage, before expansion
    expansion: int = None  # type: ignore[assignment]  # output channels / width: 4 for bottleneck, 1 for basic
    groups: int = 1  # of the 3x3 convolution of a bottleneck
    width_per_group: int = 64  # inner width of a bottleneck = width * width_per_group // 64 * groups
    in_channels: int = 3
    classes: int = 1000

    stem_kernel: int = 7
    stem_stride: int = 2
    stem_width: int = 64
    stem_padding: Padding = "symmetric"
    stem_pool: bool = True  # the 3x3 max-pool with stride 2
    pool_padding: Padding = "symmetric"

    block_padding: Padding = "symmetric"
    stride_in: ConvName = None  # type: ignore[assignment]  # conv2 for bottleneck ("v1.5"), conv1 for basic
    shortcut: Shortcut = "projection"  # option B of the paper, or its parameter-free option A
    replace_stride_with_dilation: tuple[bool, ...] = None  # type: ignore[assignment]  # each stage after the first
    conv_bias: bool = False

    norm: bool = True
    shortcut_norm: bool = None  # type: ignore[assignment]  # as norm
    bn_eps: float = 1e-5
    bn_momentum: float = 0.9  # share of the old running value that is kept
    running_variance: RunningVariance = "unbiased"  # N / (N - 1), or biased

    head_pool: HeadPool = "average"
    head: Head = "logits"
    input_size: tuple[int, int] = None  # type: ignore[assignment]  # with a flattened head only; otherwise ()

    def __post_init__(self) -> None:
        self._check_types()
        bottleneck = self.block == "bottleneck"
        self._fill("expansion", 4 if bottleneck else 1)
        self._fill("stride_in", "conv2" if bottleneck else "conv1")
        self._fill("shortcut_norm", self.norm)
        self._fill("replace_stride_with_dilation", (False,) * (len(self.blocks) - 1))
        self._fill("input_size", ())
        self._check_contradictions()

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name == "stride_in"):
                raise _invalid(name, value, "one of " + ", ".join(allowed))
        for name in _POSITIVE:
            value = getattr(self, name)
            if not _is_count(value) and not (value is None and name == "expansion"):
                raise _invalid(name, value, "an integer of at least 1")
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "shortcut_norm"):
                raise _invalid(name, value, "true or false")
        for name in ("blocks", "widths"):
            value = _as_tuple(getattr(self, name))
            if value is None or not value or not all(map(_is_count, value)):
                raise _invalid(name, getattr(self, name), "a list of one or more integers of at least 1")
            object.__setattr__(self, name, value)
        dilated = _as_tuple(self.replace_stride_with_dilation)
        if self.replace_stride_with_dilation is not None:
            if dilated is None or not all(isinstance(flag, bool) for flag in dilated):
                raise _invalid("replace_stride_with_dilation", self.replace_stride_with_dilation, "a list of booleans")
            object.__setattr__(self, "replace_stride_with_dilation", dilated)
        if self.input_size is not None:
            size = _as_tuple(self.input_size)
            if size is None or len(size) not in (0, 2) or not all(map(_is_count, size)):
                raise _invalid("input_size", self.input_size, "a list of height and width, or an empty one")
            object.__setattr__(self, "input_size", size)
        for name, low, high, range_ in (
            ("bn_eps", 0.0, float_info.max, "a number above 0"),
            ("bn_momentum", 0.0, 1.0, "a number above 0 and below 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
                raise _invalid(name, value, range_)
            object.__setattr__(self, name, float(value))

    def _check_contradictions(self) -> None:
        stages = len(self.blocks)
        if sum(self.blocks) > _MOST_BLOCKS:
            raise _invalid("blocks", self.blocks, f"at most {_MOST_BLOCKS} in all")
        if len(self.widths) != stages:
            raise _invalid("widths", self.widths, f"{stages} entries, as many as blocks has")
        if len(self.replace_stride_with_dilation) != stages - 1:
            value = self.replace_stride_with_dilation
            raise _invalid("replace_stride_with_dilation", value, f"{stages - 1} entries, one a stage after the first")
        if self.block == "basic":
            for name, only in (("expansion", 1), ("groups", 1), ("width_per_group", 64)):
                if getattr(self, name) != only:
                    raise _invalid(name, getattr(self, name), f"{only} with block basic")
        for width in self.widths:
            if self.inner_width(width) < 1:
                raise _invalid("width_per_group", self.width_per_group, f"at least {-(-64 // width)} at width {width}")
        for name in ("stem_padding", "block_padding", "pool_padding"):
            kernel = self.stem_kernel if name == "stem_padding" else 3
            if getattr(self, name) == "symmetric" and kernel % 2 == 0:
                raise _invalid("stem_kernel", kernel, "an odd number with stem_padding symmetric")
        if self.shortcut_norm and not self.norm:
            raise _invalid("shortcut_norm", True, "false where norm is false")
        if self.shortcut == "zero_pad":
            channels = [self.stem_width, *(width * self.expansion for width in self.widths)]
            if channels != sorted(channels):
                raise _invalid("shortcut", "zero_pad", f"projection where a stage has fewer channels: {channels}")
        if self.head == "none" and self.head_pool == "flatten":
            raise _invalid("head_pool", "flatten", "average, max or none with head none")
        if self.head != "none" and self.head_pool == "none":
            raise _invalid("head_pool", "none", f"average, max or flatten with head {self.head}")
        if (self.head_pool == "flatten") != bool(self.input_size):
            expected = (
                "height and width with head_pool flatten"
                if not self.input_size
                else "empty unless head_pool is flatten"
            )
            raise _invalid("input_size", self.input_size, expected)
        if self.input_size:
            try:
                output_shapes(self.layers, (*self.input_size, self.in_channels))
            except InputError as error:
                raise _invalid("input_size", self.input_size, f"a size the network can take ({error})") from None

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed.

        Fields that follow from a changed one (`block`, `blocks`, `norm`) start anew unless they are given too.
        """
        known = {field.name for field in fields(self)}
        for name in changes.keys() - known:
            raise SpecError(f"unknown field {name!r} in a {self.family} spec; allowed: {', '.join(sorted(known))}")
        anew: dict[str, Any] = {}
        if changes.get("block", self.block) != self.block:
            anew |= {"expansion": None, "stride_in": None}
        if changes.get("norm", self.norm) != self.norm:
            anew |= {"shortcut_norm": None}
        if len(changes.get("blocks", self.blocks)) != len(self.blocks):
            anew |= {"replace_stride_with_dilation": None}
        if changes.get("head_pool", self.head_pool) != self.head_pool:
            anew |= {"input_size": None}
        return replace(self, **(anew | changes))

    def with_output_stride(self, output_stride: int) -> Self:
        """The same weights at a finer stride: the last stages dilate instead (DeepLab's output stride 8, 16, 32)."""
        stride = self.replace(replace_stride_with_dilation=None).output_stride
        for last in range(len(self.blocks)):
            if stride == output_stride:
                kept = len(self.blocks) - 1 - last
                return self.replace(replace_stride_with_dilation=(False,) * kept + (True,) * last)
            stride //= 2
        raise _invalid(
            "output_stride", output_stride, f"the network's stride or a half, quarter, … down to {stride * 2}"
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


def _invalid(name: str, value: Any, expected: str) -> SpecError:
    return SpecError(f"{name}={value!r} is not allowed in a resnet spec; expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _as_tuple(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, list | tuple) else None


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
Spec = ResNetSpec
