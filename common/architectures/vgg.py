"""VGG: the specification, the layer walk, and the named variants.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014 (arXiv:1409.1556),
table 1: configurations A, B, C, D and E, here called by their number of layers. Batch norm came later, in PyTorch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    AdaptivePool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalPool,
    Layer,
    MaxPool,
    ReLU,
    RunningVariance,
    Shape,
    Softmax,
    output_shapes,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, Size, check_dense_head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Positive, Share

HeadPool = Literal["adaptive", "adaptive_max", "flatten", "average", "max", "none"]

_MOST_CONVOLUTIONS = 10_000  # a walk of more would only look like one that hangs
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_Flags = Annotated[tuple[bool, ...], Bound("a list of booleans", lambda flags: True)]
_Rates = Annotated[
    tuple[Share, ...], Bound("a list of shares of at least 0 and below 1", lambda rates: True), Mark.UNSEEN | Mark.FREE
]


@dataclass(frozen=True, kw_only=True)
class VGGSpec(Checked):
    """Everything that fixes the function a VGG computes; the defaults are torchvision's VGG.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "vgg"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a vgg spec"

    convs: Counts  # convolutions in each block, which a 2x2 max-pool ends
    widths: Counts = (64, 128, 256, 512, 512)  # of each block
    pointwise: _Flags = None  # type: ignore[assignment]  # blocks whose last convolution is 1x1 (configuration C); none
    in_channels: Count = 3
    classes: Count = 1000

    norm: bool = False  # behind every convolution, which keeps its bias
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-5
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased

    # What the dense layers read: the last map averaged to `map_size` cells at any size of images, or as it is, at
    # `input_size` alone. Without dense layers the map, or a vector of its averages or maxima.
    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "adaptive"
    map_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]  # (7, 7) with an adaptive pool, else ()
    hidden: Counts = (4096, 4096)  # of the dense layers before the classifier, fc6 and fc7 of the paper
    dropout: _Rates = None  # type: ignore[assignment]  # behind each of these and its ReLU; 0.5, and 0 is no layer
    head: Annotated[Head, Mark.UNSEEN] = "logits"
    input_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]  # with head_pool flatten only, else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        adaptive = self.head_pool in ("adaptive", "adaptive_max")
        self.follow("pointwise", (False,) * len(self.convs))
        self.follow("map_size", (7, 7) if adaptive else ())
        self.follow("dropout", (0.5,) * len(self.hidden))
        self.follow("input_size", ())
        blocks, most = len(self.convs), _MOST_CONVOLUTIONS
        self.require("convs", sum(self.convs) <= most, f"at most {most} in all")
        self.require("widths", len(self.widths) == blocks, f"{blocks} entries, as many as convs has")
        self.require("pointwise", len(self.pointwise) == blocks, f"{blocks} entries, as many as convs has")
        count = len(self.hidden)
        self.require("dropout", len(self.dropout) == count, f"{count} entries, as many as hidden has")
        check_dense_head(self)

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed.

        Fields that follow from a changed one (`convs`, `hidden`, `head_pool`) start anew unless they are given too.
        """
        self.check_names(changes)
        anew: dict[str, Any] = {}
        for name, follower in (("convs", "pointwise"), ("hidden", "dropout")):
            value, before = changes.get(name), getattr(self, name)
            if isinstance(value, list | tuple) and len(value) != len(before):
                anew |= {follower: None}
        if changes.get("head_pool", self.head_pool) != self.head_pool:
            anew |= {"map_size": None, "input_size": None}
        return replace(self, **(anew | changes))

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves all dense layers off and returns the last map, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "adaptive", classes=classes, head=head, pool=pool))

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return int(2 ** len(self.convs))

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        height, width = self.input_size or (224, 224)
        return height, width

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        maxima = {"adaptive": "adaptive_max", "average": "max"}
        return self.replace(
            norm=False,
            head_pool=maxima.get(self.head_pool, self.head_pool),
            map_size=self.map_size,
            input_size=self.input_size,
            dropout=(0.0,) * len(self.hidden),
            head="none" if self.head == "none" else "logits",
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_walk(self))

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: each block, and each dense layer with what follows it; in order,
        every layer once."""
        groups: dict[str, list[str]] = {}
        group = ""
        for layer in self.layers:
            where, part = layer.path.rsplit(".", 1)
            if where != "head":
                group = where
            elif layer.kind == "dense" or not group.startswith("head"):
                group = f"head.{part}"
            groups.setdefault(group, []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the blocks' outputs, at strides of 2, 4, 8, …"""
        return tuple(f"blocks.{b}.pool" for b in range(len(self.convs)))


def _walk(spec: VGGSpec) -> Iterator[Layer]:
    last = INPUT
    channels = spec.in_channels
    for b, (count, width) in enumerate(zip(spec.convs, spec.widths, strict=True)):
        for i in range(1, count + 1):
            block = f"blocks.{b}"
            yield Conv(
                path=f"{block}.conv{i}",
                inputs=(last,),
                in_channels=channels,
                out_channels=width,
                kernel=1 if spec.pointwise[b] and i == count else 3,
                stride=1,
                padding="symmetric",
                bias=True,
            )
            last, channels = f"{block}.conv{i}", width
            if spec.norm:
                yield BatchNorm(
                    path=f"{block}.norm{i}",
                    inputs=(last,),
                    channels=width,
                    eps=spec.bn_eps,
                    momentum=spec.bn_momentum,
                    running_variance=spec.running_variance,
                )
                last = f"{block}.norm{i}"
            yield ReLU(path=f"{block}.relu{i}", inputs=(last,))
            last = f"{block}.relu{i}"
        yield MaxPool(path=f"blocks.{b}.pool", inputs=(last,), kernel=2, stride=2, padding="valid")
        last = f"blocks.{b}.pool"

    if spec.head_pool in ("average", "max"):
        yield GlobalPool(path="head.pool", inputs=(last,), op="average" if spec.head_pool == "average" else "max")
    if spec.head == "none":
        return
    if spec.map_size:
        height, width = spec.map_size
        op: Literal["average", "max"] = "average" if spec.head_pool == "adaptive" else "max"
        yield AdaptivePool(path="head.pool", inputs=(last,), op=op, height=height, width=width)
        last = "head.pool"
    yield Flatten(path="head.flatten", inputs=(last,))
    last = "head.flatten"
    shape = _map_shape(spec)
    features = prod(shape)
    for i, (hidden, rate) in enumerate(zip(spec.hidden, spec.dropout, strict=True), start=1):
        path = f"head.fc{i}"
        yield Dense(
            path=path, inputs=(last,), in_features=features, out_features=hidden, flattened=shape if i == 1 else None
        )
        yield ReLU(path=f"head.relu{i}", inputs=(path,))
        last, features = f"head.relu{i}", hidden
        if rate:
            yield Dropout(path=f"head.dropout{i}", inputs=(last,), rate=rate)
            last = f"head.dropout{i}"
    yield Dense(path="head.fc", inputs=(last,), in_features=features, out_features=spec.classes)
    if spec.head == "softmax":
        yield Softmax(path="head.softmax", inputs=("head.fc",))


def _map_shape(spec: VGGSpec) -> Shape:
    """Shape of the map that the dense layers read."""
    if spec.map_size:
        return (*spec.map_size, spec.widths[-1])
    bare = spec.with_head(head="none")
    return output_shapes(bare.layers, (*spec.input_size, spec.in_channels))[bare.stage_outputs[-1]]


# Published conventions: what each source does differently from torchvision.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "paper": {"head_pool": "flatten", "input_size": (224, 224)},
    # Has VGG-16 and -19 only, and nothing that tells training: no dropout, no batch norm.
    "keras_applications": {
        "head_pool": "flatten",
        "input_size": (224, 224),
        "dropout": (0.0, 0.0),
        "head": "softmax",
    },
}


def _variants() -> dict[str, VGGSpec]:
    # Table 1 of the paper: configurations A, B, D and E.
    depths = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
    plain = {f"vgg{depth}": VGGSpec(convs=convs) for depth, convs in depths.items()}
    normed = {f"{name}_bn": spec.replace(norm=True) for name, spec in plain.items()}
    # Configuration C: the third convolution of a block is 1x1.
    c = {"vgg16_c": plain["vgg16"].replace(pointwise=(False, False, True, True, True))}
    conventions = {f"{name}.paper": spec.replace(**CONVENTIONS["paper"]) for name, spec in (plain | c).items()}
    keras = CONVENTIONS["keras_applications"]
    conventions |= {f"{name}.keras_applications": plain[name].replace(**keras) for name in ("vgg16", "vgg19")}
    return plain | normed | c | conventions


VARIANTS = _variants()
TITLES = {"vgg": "VGG"}
Spec = VGGSpec
