"""EfficientNet: the specification, the layer walk, and the named variants.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019 (arXiv:1905.11946), table 1
and section 3.3; its block is that of MobileNetV2 (arXiv:1801.04381) with squeeze and excitation (arXiv:1709.01507).
EfficientNet-Lite is the same without the latter, for hardware that has neither its gate nor SiLU.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from common.architectures.layers import (
    ACTIVATIONS,
    INPUT,
    Activation,
    Add,
    Affine,
    BatchNorm,
    Conv,
    Dense,
    DepthwiseConv,
    Dropout,
    Gate,
    GlobalPool,
    Layer,
    RunningVariance,
    Softmax,
    StochasticDepth,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Positive, Share

HeadPool = Literal["average", "max", "none"]

_MOST_BLOCKS = 10_000  # a walk of more would only look like one that hangs
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_Numbers = Annotated[tuple[float, ...], Bound("a list of numbers", lambda numbers: True), _CONVENTION]
_Deviations = Annotated[tuple[Positive, ...], Bound("a list of numbers above 0", lambda numbers: True), _CONVENTION]
# Table 1 of the paper, B0: what the strides of other depths are as well.
_EXPAND, _KERNELS, _STRIDES = (1, 6, 6, 6, 6, 6, 6), (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
_WIDTHS, _REPEATS = (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)


class Block(NamedTuple):
    """What one inverted residual block is made of."""

    path: str
    in_channels: int
    expanded: int  # channels of its depthwise convolution
    squeezed: int  # channels between the two convolutions of its gate; 0 for none
    out_channels: int
    kernel: int
    stride: int
    drop: float  # probability that its branch is left out of an image in training

    @property
    def residual(self) -> bool:
        """Whether its input is added to what it computes."""
        return self.stride == 1 and self.in_channels == self.out_channels


@dataclass(frozen=True, kw_only=True)
class EfficientNetSpec(Checked):
    """Everything that fixes the function an EfficientNet computes; the defaults are torchvision's B0.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "efficientnet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "an efficientnet spec"

    widths: Counts = _WIDTHS  # of each stage
    repeats: Counts = _REPEATS  # blocks of each stage
    expand: Counts = _EXPAND  # by how much a stage's blocks widen their input; at 1 they have no convolution for it
    kernels: Counts = _KERNELS  # of a stage's depthwise convolutions
    strides: Annotated[Counts, Mark.UNSEEN] = None  # type: ignore[assignment]  # of a stage's first block; B0's
    stem_width: Count = 32
    head_width: Count = 1280
    # Of squeeze and excitation, as a share of the width that the block reads, not of the widened one; 0 for none.
    se_ratio: Annotated[float, Bound("a share of at least 0 and at most 1", lambda x: 0 <= x <= 1)] = 0.25
    in_channels: Count = 3
    classes: Count = 1000

    activation: Annotated[Activation, _CONVENTION] = "silu"
    gate_activation: Annotated[Activation, _CONVENTION] = "sigmoid"
    padding: Annotated[Literal["symmetric", "same"], _CONVENTION] = "symmetric"  # differ at stride 2 and even sizes
    norm: bool = True
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-5
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased

    # Where the network normalises its images itself, (x / 255 - mean) / std of each channel; empty where its users do.
    input_mean: _Numbers = ()
    input_std: _Deviations = ()

    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    dropout: Annotated[Share, Mark.UNSEEN | Mark.FREE] = 0.2  # before the classifier; 0 is no layer
    # Of block i of N, residual or not: this share of i / N; only residual ones have a branch to leave out.
    stochastic_depth: Annotated[Share, Mark.UNSEEN | Mark.FREE] = 0.2
    head: Annotated[Head, Mark.UNSEEN] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, most = len(self.widths), _MOST_BLOCKS
        self.follow("strides", (_STRIDES + (1,) * stages)[:stages])
        for name in ("repeats", "expand", "kernels", "strides"):
            self.require(name, len(getattr(self, name)) == stages, f"{stages} entries, as many as widths has")
        self.require("repeats", sum(self.repeats) <= most, f"at most {most} in all")
        self.require("kernels", all(kernel % 2 for kernel in self.kernels), "odd numbers")
        for name in ("input_mean", "input_std"):
            fits = len(getattr(self, name)) in (0, self.in_channels)
            self.require(name, fits, f"{self.in_channels} entries, one a channel, or none")
        both = len(self.input_mean) == len(self.input_std)
        self.require("input_std", both, "as many entries as input_mean has")
        if self.head != "none":
            self.require("head_pool", self.head_pool != "none", f"average or max with head {self.head}")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed.

        Strides follow a new number of stages, and one mean and deviation of all channels a new number of channels,
        unless they are given too.
        """
        self.check_names(changes)
        anew: dict[str, Any] = {}
        widths, channels = changes.get("widths"), changes.get("in_channels")
        if isinstance(widths, list | tuple) and len(widths) != len(self.widths):
            anew |= {"strides": None}
        if isinstance(channels, int) and len({*zip(self.input_mean, self.input_std, strict=True)}) == 1:
            anew |= {name: getattr(self, name)[:1] * channels for name in ("input_mean", "input_std")}
        return replace(self, **(anew | changes))

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        returns the map of the last convolution, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Empty: it takes images of any size."""
        return ()

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return 2 * prod(self.strides)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed; the paper scales them with the depth."""
        side = scaled_as(self).size if scaled_as(self) else 224  # type: ignore[union-attr]
        return side, side

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        return self.replace(
            norm=False,
            se_ratio=0.0,
            activation="relu6" if self.activation == "relu6" else "relu",
            input_mean=(),
            input_std=(),
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            dropout=0.0,
            stochastic_depth=0.0,
            head="none" if self.head == "none" else "logits",
        )

    @property
    def stages(self) -> Iterator[tuple[Block, ...]]:
        """The blocks of each stage."""
        channels, before, every = self.stem_width, 0, sum(self.repeats)
        for s, (width, count, ratio) in enumerate(zip(self.widths, self.repeats, self.expand, strict=True)):
            blocks = []
            for b in range(count):
                blocks.append(
                    Block(
                        path=f"stages.{s}.blocks.{b}",
                        in_channels=channels,
                        expanded=channels * ratio,
                        squeezed=max(1, int(channels * self.se_ratio)) if self.se_ratio else 0,
                        out_channels=width,
                        kernel=self.kernels[s],
                        stride=self.strides[s] if b == 0 else 1,
                        drop=self.stochastic_depth * before / every,
                    )
                )
                channels, before = width, before + 1
            yield tuple(blocks)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_walk(self))

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: the stem, each block, the last convolution, the classifier; in order,
        every layer once."""
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            where, part = layer.path.rsplit(".", 1)
            group = "classifier" if part in ("pool", "dropout", "fc", "softmax") else where
            groups.setdefault(group, []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the last stage's output at each resolution, at strides of 2, 4, 8, …"""
        last = {layer.path.rsplit(".", 1)[0]: layer.path for layer in self.layers}
        ends = [last[blocks[-1].path] for blocks in self.stages]
        return tuple(ends[s] for s in self.levels)

    @property
    def levels(self) -> tuple[int, ...]:
        """The stages that are the last ones at their resolution."""
        return tuple(s for s, after in enumerate((*self.strides[1:], 2)) if after > 1)


class _Walk:
    """Layers one after another: each reads the one before."""

    def __init__(self, spec: EfficientNetSpec) -> None:
        self.spec, self.last = spec, INPUT

    def layer(self, kind: type[Layer], path: str, **options: Any) -> Layer:
        made = kind(path=path, **({"inputs": (self.last,)} | options))
        self.last = path
        return made

    def conv(self, path: str, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1) -> Iterator[Layer]:
        sides: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": self.spec.padding}
        yield self.layer(Conv, path, in_channels=in_channels, out_channels=out_channels, **sides)
        yield from self.norm(path, out_channels)

    def norm(self, path: str, channels: int) -> Iterator[Layer]:
        spec = self.spec
        if spec.norm:
            where, _, part = path.rpartition(".")
            yield self.layer(
                BatchNorm,
                f"{where}.norm" if part == "conv" else f"{path}_norm",
                channels=channels,
                eps=spec.bn_eps,
                momentum=spec.bn_momentum,
                running_variance=spec.running_variance,
            )

    def act(self, path: str) -> Layer:
        return self.layer(ACTIVATIONS[self.spec.activation], path)

    def block(self, block: Block) -> Iterator[Layer]:
        """Wide inside and narrow outside: expand, depthwise, gate, project; nothing behind the projection."""
        spec, path, shortcut = self.spec, block.path, self.last
        if block.expanded != block.in_channels:
            yield from self.conv(f"{path}.expand", block.in_channels, block.expanded)
            yield self.act(f"{path}.expand_act")
        sides: dict[str, Any] = {"kernel": block.kernel, "stride": block.stride, "padding": spec.padding}
        yield self.layer(DepthwiseConv, f"{path}.depthwise", in_channels=block.expanded, **sides)
        yield from self.norm(f"{path}.depthwise", block.expanded)
        yield self.act(f"{path}.depthwise_act")
        if block.squeezed:
            gated = self.last
            point: dict[str, Any] = {"kernel": 1, "stride": 1, "padding": "valid", "bias": True}
            yield self.layer(GlobalPool, f"{path}.squeeze_pool", op="average", keep=True)
            for part, channels, out_channels, activation in (
                ("squeeze", block.expanded, block.squeezed, spec.activation),
                ("excite", block.squeezed, block.expanded, spec.gate_activation),
            ):
                yield self.layer(Conv, f"{path}.{part}", in_channels=channels, out_channels=out_channels, **point)
                yield self.layer(ACTIVATIONS[activation], f"{path}.{part}_act")
            yield self.layer(Gate, f"{path}.gate", inputs=(gated, self.last))
        yield from self.conv(f"{path}.project", block.expanded, block.out_channels)
        if block.residual:
            if block.drop:
                yield self.layer(StochasticDepth, f"{path}.drop", rate=block.drop)
            yield self.layer(Add, f"{path}.add", inputs=(self.last, shortcut))


def _walk(spec: EfficientNetSpec) -> Iterator[Layer]:
    walk = _Walk(spec)
    if spec.input_mean:
        pairs = list(zip(spec.input_mean, spec.input_std, strict=True))
        scale, shift = tuple(1 / (255 * std) for _, std in pairs), tuple(-mean / std for mean, std in pairs)
        yield walk.layer(Affine, "stem.affine", scale=scale, shift=shift)
    yield from walk.conv("stem.conv", spec.in_channels, spec.stem_width, kernel=3, stride=2)
    yield walk.act("stem.act")
    for blocks in spec.stages:
        for block in blocks:
            yield from walk.block(block)
    yield from walk.conv("head.conv", spec.widths[-1], spec.head_width)
    yield walk.act("head.act")
    if spec.head_pool != "none":
        yield walk.layer(GlobalPool, "head.pool", op=spec.head_pool)
    if spec.head == "none":
        return
    if spec.dropout:
        yield walk.layer(Dropout, "head.dropout", rate=spec.dropout)
    yield walk.layer(Dense, "head.fc", in_features=spec.head_width, out_features=spec.classes)
    if spec.head == "softmax":
        yield walk.layer(Softmax, "head.softmax")


class Scaling(NamedTuple):
    """How a variant is made from B0: by how much wider and deeper it is, its images, and its dropout."""

    width: float
    depth: float
    size: int
    dropout: float

    def channels(self, count: int) -> int:
        """The nearest multiple of 8, but never less than nine tenths of what was asked for: B3's first stage."""
        wanted = count * self.width
        rounded = max(8, int(wanted + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * wanted else rounded


# Of google-research's reference code, as every port has it; its images of 260 pixels are 288 in torchvision's B2. Sizes
# of Lite 3 and 4 are those of the published weights: the table in that code says 280 and 300.
SCALINGS = {
    "efficientnet_b0": Scaling(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": Scaling(1.0, 1.1, 240, 0.2),
    "efficientnet_b2": Scaling(1.1, 1.2, 260, 0.3),
    "efficientnet_b3": Scaling(1.2, 1.4, 300, 0.3),
    "efficientnet_b4": Scaling(1.4, 1.8, 380, 0.4),
    "efficientnet_b5": Scaling(1.6, 2.2, 456, 0.4),
    "efficientnet_b6": Scaling(1.8, 2.6, 528, 0.5),
    "efficientnet_b7": Scaling(2.0, 3.1, 600, 0.5),
    "efficientnet_lite0": Scaling(1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": Scaling(1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": Scaling(1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": Scaling(1.2, 1.4, 300, 0.3),
    "efficientnet_lite4": Scaling(1.4, 1.8, 380, 0.3),
}
# From B5 on torchvision's weights are ports from TensorFlow, and its norms are made for these.
_TORCHVISION_LARGE = {"bn_eps": 1e-3, "bn_momentum": 0.99}
_TIMM = {"bn_momentum": 0.9, "dropout": 0.0, "stochastic_depth": 0.0}
_IMAGENET = {"input_mean": (0.485, 0.456, 0.406), "input_std": (0.229, 0.224, 0.225)}

# Published conventions: what each source does differently from torchvision.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "keras_applications": {
        "padding": "same",
        "bn_eps": 1e-3,
        "bn_momentum": 0.99,
        "running_variance": "biased",
        "head": "softmax",
        **_IMAGENET,
    },
    # Ports of Keras' weights, whose images are normalised outside.
    "huggingface": {"padding": "same", "bn_eps": 1e-3, "bn_momentum": 0.99, "running_variance": "biased"},
    # timm's `efficientnet_*`, and its `tf_efficientnet_*`, which are ports. It drops nothing unless it is asked to.
    "timm": {"padding": "symmetric", "bn_eps": 1e-5, **_TIMM},
    "timm_tf": {"padding": "same", "bn_eps": 1e-3, **_TIMM},
}


def _scaled(name: str, scaling: Scaling) -> EfficientNetSpec:
    lite = "lite" in name
    repeats = [ceil(count * scaling.depth) for count in _REPEATS]
    own: dict[str, Any] = {"dropout": scaling.dropout, "widths": tuple(map(scaling.channels, _WIDTHS))}
    if lite:
        # Neither stem nor head is scaled, nor is the number of blocks of the first and the last stage.
        repeats[0], repeats[-1] = _REPEATS[0], _REPEATS[-1]
        own |= {"se_ratio": 0.0, "activation": "relu6"}
    else:
        own |= {"stem_width": scaling.channels(32), "head_width": scaling.channels(1280)}
        own |= _TORCHVISION_LARGE if name[-1] in "567" else {}
    return EfficientNetSpec(repeats=tuple(repeats), **own)


def _variants() -> dict[str, EfficientNetSpec]:
    plain = {name: _scaled(name, scaling) for name, scaling in SCALINGS.items()}
    others = {
        f"{name}.{convention}": spec.replace(**changes)
        for name, spec in plain.items()
        for convention, changes in CONVENTIONS.items()
        if convention not in ("keras_applications", "huggingface") or "lite" not in name
    }
    return plain | others


def plain_variant(**fields: Any) -> str | None:
    """The name of the variant without a convention that has these values in its fields."""
    names = (name for name in SCALINGS if all(getattr(VARIANTS[name], field) == fields[field] for field in fields))
    return next(names, None)


def scaled_as(spec: EfficientNetSpec) -> Scaling | None:
    """The scaling that gives a network these widths and numbers of blocks, with or without its gates."""
    name = plain_variant(widths=spec.widths, repeats=spec.repeats)
    return SCALINGS[name] if name else None


VARIANTS = _variants()
TITLES = {
    "efficientnet": "EfficientNet",
    "efficientnet_b": "EfficientNetB",
    "efficientnet_lite": "EfficientNetLite",
}
Spec = EfficientNetSpec
