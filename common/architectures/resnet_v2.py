"""ResNet with pre-activation, "v2": the specification, the layer walk, and the named variants.

He et al., "Identity Mappings in Deep Residual Networks", 2016 (arXiv:1603.05027): norm and ReLU stand before each
convolution, nothing stands behind the addition, and a last norm and ReLU before the head.
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
    GlobalPool,
    Layer,
    MaxPool,
    Pad,
    Padding,
    ReLU,
    RunningVariance,
    Softmax,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Checked, Count, Counts, Positive

ConvName = Literal["conv1", "conv2"]
HeadPool = Literal["average", "max", "none"]
# `zeros` is a padding of zeros that count: behind a convolution without a ReLU they win over what is negative.
PoolPadding = Literal["zeros", "symmetric", "same"]

_MOST_BLOCKS = 10_000  # a walk of more would only look like one that hangs
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED


@dataclass(frozen=True, kw_only=True)
class ResNetV2Spec(Checked):
    """Everything that fixes the function a pre-activation ResNet computes; the defaults are keras.applications', but
    that the head gives logits.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed.
    """

    family: ClassVar[str] = "resnet_v2"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a resnet_v2 spec"

    blocks: Counts  # bottlenecks in each stage
    widths: Counts = (64, 128, 256, 512)  # of each stage, before expansion
    expansion: Count = 4  # output channels / width
    in_channels: Count = 3
    classes: Count = 1000

    stem_kernel: Count = 7
    stem_stride: Annotated[Count, _CONVENTION] = 2
    stem_width: Count = 64
    stem_pool: Annotated[bool, _CONVENTION] = True  # the 3x3 max-pool with stride 2
    pool_padding: Annotated[PoolPadding, _CONVENTION] = "zeros"

    # Where a stage halves the map: its first block, but for the first stage's; or its last one, but for the last
    # stage's, whose shortcut then takes every other pixel.
    stride_at: Annotated[Literal["start", "end"], _CONVENTION] = "end"
    stride_in: Annotated[ConvName, _CONVENTION] = "conv2"
    conv_bias: Annotated[bool, Mark.ADOPTED] = True  # where no norm follows: the stem's, the projections, each conv3

    norm: Annotated[bool, Mark.ADOPTED] = True
    bn_eps: Annotated[Positive, _CONVENTION] = 1.001e-5
    bn_momentum: Annotated[Between, _CONVENTION] = 0.99  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "biased"  # or unbiased, N / (N - 1)

    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    head: Annotated[Head, Mark.UNSEEN] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.blocks)
        self.require("blocks", sum(self.blocks) <= _MOST_BLOCKS, f"at most {_MOST_BLOCKS} in all")
        # The first block of a stage projects its shortcut, and the strided one of a stage's end must not.
        at_end = self.stride_at == "start" or min(self.blocks[:-1], default=2) >= 2
        self.require("blocks", at_end, "2 or more in each stage before the last with stride_at end")
        self.require("widths", len(self.widths) == stages, f"{stages} entries, as many as blocks has")
        self.require("stem_kernel", self.stem_kernel % 2 == 1, "an odd number")
        if self.head == "none":
            return
        self.require("head_pool", self.head_pool != "none", f"average or max with head {self.head}")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed."""
        self.check_names(changes)
        return replace(self, **changes)

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves the classifier off and returns the last map, normalised, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

    def stride(self, stage: int, block: int) -> int:
        """Stride of a block."""
        if self.stride_at == "start":
            return 2 if block == 0 < stage else 1
        return 2 if block == self.blocks[stage] - 1 and stage < len(self.blocks) - 1 else 1

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        pools: int = 2 ** (len(self.blocks) - 1 + self.stem_pool)
        return self.stem_stride * pools

    @property
    def input_size(self) -> tuple[int, ...]:
        """Empty: such a network takes any size."""
        return ()

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
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
            conv_bias=True,
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            head="none" if self.head == "none" else "logits",
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_walk(self))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the last sum at each resolution, which no norm and no ReLU has seen: one for each stage, though
        with `stride_at` ``end`` the last block of a stage is already at the next one's resolution."""
        last = len(self.blocks) - 1
        return tuple(
            f"stages.{s}.blocks.{count - (2 if self.stride_at == 'end' and s < last else 1)}.add"
            for s, count in enumerate(self.blocks)
        )


def _walk(spec: ResNetV2Spec) -> Iterator[Layer]:
    def conv(path: str, inputs: str, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> Conv:
        normed = spec.norm and path.endswith(("conv1", "conv2"))  # by the norm of the next convolution
        return Conv(
            path=path,
            inputs=(inputs,),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=kernel,
            stride=stride,
            padding="symmetric",
            bias=spec.conv_bias and not normed,
        )

    def activation(where: str, number: str, inputs: str, channels: int) -> Iterator[Layer]:
        if spec.norm:
            yield BatchNorm(
                path=f"{where}.norm{number}",
                inputs=(inputs,),
                channels=channels,
                eps=spec.bn_eps,
                momentum=spec.bn_momentum,
                running_variance=spec.running_variance,
            )
            inputs = f"{where}.norm{number}"
        yield ReLU(path=f"{where}.relu{number}", inputs=(inputs,))

    yield conv(last := "stem.conv", INPUT, spec.in_channels, spec.stem_width, spec.stem_kernel, spec.stem_stride)
    if spec.stem_pool:
        padding: Padding = "valid" if spec.pool_padding == "zeros" else spec.pool_padding
        if spec.pool_padding == "zeros":
            yield Pad(path="stem.pad", inputs=(last,), amount=1)
            last = "stem.pad"
        yield MaxPool(path="stem.pool", inputs=(last,), kernel=3, stride=2, padding=padding)
        last = "stem.pool"

    channels = spec.stem_width
    for s, (count, width) in enumerate(zip(spec.blocks, spec.widths, strict=True)):
        out_channels = width * spec.expansion
        for b in range(count):
            block, shortcut, stride = f"stages.{s}.blocks.{b}", last, spec.stride(s, b)
            shapes = [(channels, width, 1), (width, width, 3), (width, out_channels, 1)]
            for i, (ins, outs, kernel) in enumerate(shapes, start=1):
                yield from activation(block, str(i), last, ins)
                strided = spec.stride_in == f"conv{i}"
                yield conv(f"{block}.conv{i}", f"{block}.relu{i}", ins, outs, kernel, stride if strided else 1)
                last = f"{block}.conv{i}"
            if b == 0:
                # The projection reads what is normalised and activated, the identity what is not.
                shortcut = f"{block}.shortcut.conv"
                yield conv(shortcut, f"{block}.relu1", channels, out_channels, 1, stride)
            elif stride > 1:
                yield MaxPool(
                    path=f"{block}.shortcut.pool", inputs=(shortcut,), kernel=1, stride=stride, padding="valid"
                )
                shortcut = f"{block}.shortcut.pool"
            yield Add(path=f"{block}.add", inputs=(last, shortcut))
            last, channels = f"{block}.add", out_channels

    yield from activation("head", "", last, channels)
    last = "head.relu"
    if spec.head_pool != "none":
        yield GlobalPool(path="head.pool", inputs=(last,), op=spec.head_pool)
        last = "head.pool"
    if spec.head != "none":
        yield Dense(path="head.fc", inputs=(last,), in_features=channels, out_features=spec.classes)
        if spec.head == "softmax":
            yield Softmax(path="head.softmax", inputs=("head.fc",))


# timm's with batch norm, as `resnetv2_50`: the paper's, but that the 3x3 strides.
_TIMM: dict[str, Any] = {
    "conv_bias": False,
    "pool_padding": "symmetric",
    "stride_at": "start",
    "bn_eps": 1e-5,
    "bn_momentum": 0.9,
    "running_variance": "unbiased",
}
# Published conventions: what each source does differently from keras.applications' network that gives logits.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "keras_applications": {"head": "softmax"},
    "timm": _TIMM,
    # The authors' code for CIFAR (KaimingHe/resnet-1k-layers, resnet-pre-act.lua).
    "paper": _TIMM | {"stride_in": "conv1"},
}


def _variants() -> dict[str, ResNetV2Spec]:
    depths = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    named = {f"resnet{depth}v2": ResNetV2Spec(blocks=blocks) for depth, blocks in depths.items()}
    conventions = {
        f"{name}.{convention}": spec.replace(**changes)
        for convention, changes in CONVENTIONS.items()
        for name, spec in named.items()
    }
    # The paper's for CIFAR, 9n+2 layers.
    cifar = ResNetV2Spec(
        blocks=(18, 18, 18),
        widths=(16, 32, 64),
        stem_kernel=3,
        stem_stride=1,
        stem_width=16,
        stem_pool=False,
        classes=10,
        **CONVENTIONS["paper"],
    )
    return named | {"resnet164v2": cifar} | conventions


VARIANTS = _variants()
# The number stands within the name.
TITLES = {"resnet_v2": "ResNetV2"} | {
    name: name.replace("resnet", "ResNet").replace("v2", "V2") for name in VARIANTS if "." not in name
}
Spec = ResNetV2Spec
