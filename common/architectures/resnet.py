"""ResNet: the specification, the layer walk, and the named variants.

He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385); ResNeXt: Xie et al., 2017
(arXiv:1611.05431); wide ResNet: Zagoruyko and Komodakis, 2016 (arXiv:1605.07146); squeeze and excitation: Hu et al.,
2017 (arXiv:1709.01507); ResNet-D: He et al., 2018 (arXiv:1812.01187), section 4.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    Add,
    AveragePool,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    Gate,
    GlobalPool,
    Layer,
    MaxPool,
    Padding,
    ReLU,
    RunningVariance,
    Shape,
    Sigmoid,
    Softmax,
    ZeroPadShortcut,
    output_shapes,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, Size, check_input_size, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Positive

Block = Literal["basic", "bottleneck"]
ConvName = Literal["conv1", "conv2"]
Shortcut = Literal["projection", "zero_pad", "none"]
Shared = Literal["none", "norm", "conv"]
HeadPool = Literal["average", "max", "flatten", "none"]

_MOST_BLOCKS = 10_000  # a walk of more would only look like one that hangs

# A convention alone says these, and a builder takes them from weights that follow another one.
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
# The same weights at a finer stride: what DeepLab does to a trained network.
_DILATION = Annotated[tuple[bool, ...], Bound("a list of booleans", lambda flags: True), Mark.UNSEEN | Mark.FREE]
_Widths = Annotated[tuple[Count, ...], Bound("a list of widths", lambda widths: True)]


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
    deep_stem: _Widths = ()  # of convolutions before the stem's; the first has its stride (ResNet-C and -D)
    stem_pool: Annotated[bool, _CONVENTION] = True  # the 3x3 max-pool with stride 2
    pool_padding: Annotated[Padding, _CONVENTION] = "symmetric"

    block_padding: Annotated[Literal["symmetric", "same"], _CONVENTION] = "symmetric"
    # conv2 for bottleneck ("v1.5"), conv1 for basic
    stride_in: Annotated[ConvName, _CONVENTION] = None  # type: ignore[assignment]
    # Option B of the paper; its parameter-free option A; or none at all: the plain networks of its section 4.
    shortcut: Annotated[Shortcut, Mark.UNSEEN] = "projection"
    # A block whose shortcut is its input has a projection too, of which nothing is used.
    unused_projection: Annotated[bool, Mark.ADOPTED] = False
    shortcut_pool: Annotated[bool, _CONVENTION] = False  # 2x2 averages stride, not the projection (ResNet-D)
    squeeze: _Widths = ()  # channels of squeeze and excitation, in each stage; empty for none
    relu_before_add: Annotated[bool, _CONVENTION] = False  # behind a block's last norm as well
    relu_after_add: Annotated[bool, _CONVENTION] = True
    # What a block uses a second time: its first norm, or convolution and norm, in place of a second one of that shape.
    shared: Annotated[Shared, Mark.ADOPTED] = "none"
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
        self.require("squeeze", len(self.squeeze) in (0, stages), f"{stages} entries, as many as blocks has, or none")
        self.require("shared", self.norm or self.shared != "norm", "none or conv where norm is false")
        projects = self.shortcut == "projection" or not self.unused_projection
        self.require("unused_projection", projects, "false without projections")
        if self.shortcut_pool:
            self.require("shortcut_pool", self.shortcut == "projection", "false without a projection")
            # What strides there could not be told by dilation of a 1x1 convolution.
            self.require("shortcut_pool", not any(self.replace_stride_with_dilation), "false with dilation")
        odd = self.stem_padding != "symmetric" or self.stem_kernel % 2 == 1
        self.require("stem_kernel", odd, "an odd number with stem_padding symmetric")
        self.require("shortcut_norm", self.norm or not self.shortcut_norm, "false where norm is false")
        if self.shortcut == "none":
            self.require("relu_after_add", self.relu_after_add, "true without a shortcut")
            self.require("relu_before_add", not self.relu_before_add, "false without a shortcut")
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
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

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
            unused_projection=False,
            shortcut_pool=False,
            squeeze=(),
            shared="conv" if self.shared == "conv" else "none",
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
        last = "relu" if self.relu_after_add else "add"
        return tuple(f"stages.{s}.blocks.{n - 1}.{last}" for s, n in enumerate(self.blocks))


def _walk(spec: ResNetSpec) -> Iterator[Layer]:
    last = yield from _stem(spec)
    channels, dilation = spec.stem_width, 1
    for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
        dilated = s > 0 and spec.replace_stride_with_dilation[s - 1]
        for b in range(count):
            stride = spec.stage_strides[s] if b == 0 else 1
            # A convolution keeps the dilation it had up to the one whose stride was taken away, and doubles after it.
            before, dilation = dilation, dilation * 2 if dilated and b == 0 else dilation
            last = yield from _block(spec, s, b, last, channels, stride, (before, dilation))
            channels = width * spec.expansion

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


# A part of the walk: it yields its layers and returns the path of the last.
_Part = Generator[Layer, None, str]


def _conv(spec: ResNetSpec, path: str, last: str, in_channels: int, channels: int, kernel: int, **hyper: Any) -> Conv:
    return Conv(
        path=path,
        inputs=(last,),
        in_channels=in_channels,
        out_channels=channels,
        kernel=kernel,
        **({"stride": 1, "padding": spec.block_padding, "bias": spec.conv_bias} | hyper),
    )


def _norm(spec: ResNetSpec, path: str, last: str, channels: int) -> BatchNorm:
    return BatchNorm(
        path=path,
        inputs=(last,),
        channels=channels,
        eps=spec.bn_eps,
        momentum=spec.bn_momentum,
        running_variance=spec.running_variance,
    )


def _stem(spec: ResNetSpec) -> _Part:
    last, channels, stride = INPUT, spec.in_channels, spec.stem_stride
    numbered = [(str(i), width) for i, width in enumerate(spec.deep_stem, start=1)]
    for number, width in (*numbered, ("", spec.stem_width)):
        conv, norm, relu = (f"stem.{kind}{number}" for kind in ("conv", "norm", "relu"))
        options = {"stride": stride, "padding": spec.stem_padding}
        yield _conv(spec, conv, last, channels, width, spec.stem_kernel, **options)
        if spec.norm:
            yield _norm(spec, norm, conv, width)
        yield ReLU(path=relu, inputs=(norm if spec.norm else conv,))
        last, channels, stride = relu, width, 1
    if spec.stem_pool:
        yield MaxPool(path="stem.pool", inputs=(last,), kernel=3, stride=2, padding=spec.pool_padding)
        last = "stem.pool"
    return last


def _block(
    spec: ResNetSpec, stage: int, number: int, first: str, in_channels: int, stride: int, dilations: tuple[int, int]
) -> _Part:
    block, width = f"stages.{stage}.blocks.{number}", spec.widths[stage]
    inner, out_channels = spec.inner_width(width), width * spec.expansion
    strided = int(spec.stride_in == "conv2")
    if spec.block == "bottleneck":
        shapes = [(inner, 1), (inner, 3), (out_channels, 1)]
    else:
        shapes = [(inner, 3), (out_channels, 3)]
    last, channels = first, in_channels
    kept: dict[str, Layer] = {}  # the first convolution and its norm
    for i, (width_out, kernel) in enumerate(shapes):
        conv: Layer = _conv(
            spec,
            f"{block}.conv{i + 1}",
            last,
            channels,
            width_out,
            kernel,
            stride=stride if i == strided else 1,
            dilation=1 if kernel == 1 else dilations[i > strided],
            groups=spec.groups if (spec.block, i) == ("bottleneck", 1) else 1,
        )
        conv = _shared(kept, conv, spec.shared == "conv" and i == 1)
        yield conv
        last, channels = conv.path, width_out
        if spec.norm:
            norm: Layer = _norm(spec, f"{block}.norm{i + 1}", last, channels)
            norm = _shared(kept, norm, i == 1 and (spec.shared == "norm" or conv.shares is not None))
            yield norm
            last = norm.path
        if i < len(shapes) - 1:
            yield ReLU(path=f"{block}.relu{i + 1}", inputs=(last,))
            last = f"{block}.relu{i + 1}"
    if spec.squeeze:
        last = yield from _squeeze(f"{block}.se", last, channels, spec.squeeze[stage])
    if spec.relu_before_add:
        yield ReLU(path=f"{block}.relu{len(shapes)}", inputs=(last,))
        last = f"{block}.relu{len(shapes)}"
    if spec.shortcut != "none":
        shortcut = yield from _shortcut(spec, f"{block}.shortcut", first, in_channels, out_channels, stride)
        yield Add(path=f"{block}.add", inputs=(last, shortcut))
        last = f"{block}.add"
    if spec.relu_after_add:
        yield ReLU(path=f"{block}.relu", inputs=(last,))
        last = f"{block}.relu"
    return last


def _shared(kept: dict[str, Layer], layer: Layer, wanted: bool) -> Layer:
    """The layer, with the arrays of the first of its kind in the block where that is `wanted` and it is the same."""
    first = kept.setdefault(layer.kind, layer)
    if wanted and replace(first, path=layer.path, inputs=layer.inputs) == layer:
        return replace(layer, shares=first.path)
    return layer


def _shortcut(spec: ResNetSpec, path: str, last: str, in_channels: int, out_channels: int, stride: int) -> _Part:
    if stride == 1 and in_channels == out_channels:
        if spec.unused_projection:
            yield from _projection(spec, path, last, in_channels, out_channels, 1, unused=True)
        return last
    if spec.shortcut == "zero_pad":
        yield ZeroPadShortcut(path=f"{path}.pad", inputs=(last,), stride=stride, channels=out_channels)
        return f"{path}.pad"
    if spec.shortcut_pool and stride != 1:
        # The last window of an odd side is smaller, and averages what it has.
        options: dict[str, Any] = {"kernel": stride, "stride": stride, "padding": "ceil", "count_padding": False}
        yield AveragePool(path=f"{path}.pool", inputs=(last,), **options)
        last, stride = f"{path}.pool", 1
    return (yield from _projection(spec, path, last, in_channels, out_channels, stride))


def _projection(
    spec: ResNetSpec, path: str, last: str, in_channels: int, out_channels: int, stride: int, unused: bool = False
) -> _Part:
    yield _conv(spec, f"{path}.conv", last, in_channels, out_channels, 1, stride=stride, unused=unused)
    if not spec.shortcut_norm:
        return f"{path}.conv"
    yield replace(_norm(spec, f"{path}.norm", f"{path}.conv", out_channels), unused=unused)
    return f"{path}.norm"


def _squeeze(path: str, last: str, channels: int, width: int) -> _Part:
    """Squeeze and excitation: a gate a channel, of what all pixels have in common (Hu et al. 2017, figure 2)."""
    yield GlobalPool(path=f"{path}.pool", inputs=(last,), op="average", keep=True)
    one: dict[str, Any] = {"kernel": 1, "stride": 1, "padding": "valid", "bias": True}
    yield Conv(path=f"{path}.conv1", inputs=(f"{path}.pool",), in_channels=channels, out_channels=width, **one)
    yield ReLU(path=f"{path}.relu", inputs=(f"{path}.conv1",))
    yield Conv(path=f"{path}.conv2", inputs=(f"{path}.relu",), in_channels=width, out_channels=channels, **one)
    yield Sigmoid(path=f"{path}.sigmoid", inputs=(f"{path}.conv2",))
    yield Gate(path=f"{path}.gate", inputs=(last, f"{path}.sigmoid"))
    return f"{path}.gate"


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


# What tutorials and ports have in place of the paper's block, knowingly or not.
GALLERY: dict[str, dict[str, Any]] = {
    "early_relu": {"relu_before_add": True},
    "no_last_relu": {"relu_after_add": False},
    "shared_norm": {"shared": "norm"},
    "shared_conv": {"shared": "conv"},  # a bottleneck has no two alike
    "unused_projection": {"unused_projection": True},
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
    # Without shortcuts: section 4.2 again, figure 6 left.
    plain = {name.replace("resnet", "plain"): spec.replace(shortcut="none") for name, spec in cifar.items()}
    # A sixteenth of the channels, in eights, as in timm.
    squeeze = {"basic": (8, 8, 16, 32), "bottleneck": (16, 32, 64, 128)}
    squeezed = {f"se{name}": spec.replace(squeeze=squeeze[spec.block]) for name, spec in depths.items()}
    d = {
        f"{name}d": spec.replace(deep_stem=(32, 32), stem_kernel=3, shortcut_pool=True) for name, spec in depths.items()
    }
    conventions = {
        f"{name}.{convention}": spec.replace(**changes)
        for convention, changes in CONVENTIONS.items()
        for name, spec in depths.items()
        if convention != "d2l" or spec.block == "basic"
    }
    gallery = {
        f"{name}.{form}": depths[name].replace(**changes)
        for form, changes in GALLERY.items()
        for name in ("resnet18", "resnet50")
        if form != "shared_conv" or depths[name].block == "basic"
    }
    for name in ("resnet18", "resnet50"):
        gallery[f"{name}.extra_block"] = depths[name].replace(blocks=tuple(n + 1 for n in depths[name].blocks))
    return depths | wider | squeezed | d | cifar | plain | conventions | gallery


VARIANTS = _variants()
# How the names of the family and its variants begin, and how people write that.
TITLES = {
    "resnet": "ResNet",
    "wide_resnet": "WideResNet",
    "resnext": "ResNeXt",
    "seresnet": "SEResNet",
    "plain": "Plain",
}
Spec = ResNetSpec
