"""DenseNet: the specification, the layer walk, and the named variants.

Huang et al., "Densely Connected Convolutional Networks", 2016 (arXiv:1608.06993), DenseNet-BC: table 1 has the variants
for ImageNet, here as the authors' own code and torchvision have them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Dropout,
    GlobalPool,
    Layer,
    MaxPool,
    Padding,
    ReLU,
    RunningVariance,
    Softmax,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Counts, Natural, Positive, Share

HeadPool = Literal["average", "max", "none"]

_MOST_LAYERS = 2_000  # dense layers; a walk of more would only look like one that hangs
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_Compression = Annotated[float, Bound("a number above 0 and at most 1", lambda share: 0 < share <= 1)]


@dataclass(frozen=True, kw_only=True)
class DenseNetSpec(Checked):
    """Everything that fixes the function a DenseNet computes; the defaults are torchvision's DenseNet.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed.
    """

    family: ClassVar[str] = "densenet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a densenet spec"

    blocks: Counts  # dense layers in each block
    growth_rate: Count = 32  # channels that each of them adds, k in the paper
    bottleneck: Count = 4  # channels between its two convolutions, in growth rates
    compression: _Compression = 0.5  # share of the channels that a transition keeps, theta in the paper
    stem_width: Count = 64
    in_channels: Count = 3
    classes: Count = 1000

    stem_padding: Annotated[Literal["symmetric", "same"], _CONVENTION] = "symmetric"
    pool_padding: Annotated[Padding, _CONVENTION] = "symmetric"  # of the stem's max-pool
    transition_padding: Annotated[Natural, _CONVENTION] = 0  # of the 1x1 convolution: some pad it by mistake
    transition_pool: Annotated[Literal["average", "max"], _CONVENTION] = "average"
    conv_bias: Annotated[bool, Mark.ADOPTED] = False  # of dense layers and transitions; the stem has none

    norm: Annotated[bool, Mark.ADOPTED] = True
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-5
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased

    dropout: Annotated[Share, Mark.UNSEEN | Mark.FREE] = 0.0  # of what each dense layer adds; 0 is no layer
    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    head: Annotated[Head, Mark.UNSEEN] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("blocks", sum(self.blocks) <= _MOST_LAYERS, f"at most {_MOST_LAYERS} in all")
        if self.head != "none":
            self.require("head_pool", self.head_pool != "none", f"average or max with head {self.head}")
        channels = min(channels for channels, _ in self.widths[:-1]) if len(self.blocks) > 1 else 0
        kept = not channels or self.transition_width(channels) >= 1
        self.require("compression", kept, f"a share of {channels} channels that leaves one")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed."""
        self.check_names(changes)
        return replace(self, **changes)

    def with_head(self, *, classes: int | None = None, head: Head | None = None, pool: HeadPool = "none") -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves the classifier off and returns the last map, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Empty: it takes images of any size."""
        return ()

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        return 224, 224

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return int(2 ** (len(self.blocks) + 1))

    def transition_width(self, channels: int) -> int:
        """Channels behind a transition that reads so many, rounded down (section 3 of the paper)."""
        return int(channels * self.compression + 1e-9)  # a product that is whole may be a last bit below it

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Channels behind each block, and behind the transition after it; the last block has none."""
        widths = []
        channels = self.stem_width
        for count in self.blocks:
            before = channels + count * self.growth_rate
            channels = self.transition_width(before)
            widths.append((before, channels))
        return tuple(widths)

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        return self.replace(
            norm=False,
            conv_bias=True,
            transition_pool="max",
            dropout=0.0,
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            head="none" if self.head == "none" else "logits",
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_walk(self))

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: the stem, each dense layer and transition, the head; in order, every
        layer once."""
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(layer.path.rpartition(".")[0], []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the blocks' outputs, at strides of 4, 8, 16, …"""
        return tuple(f"blocks.{b}.layers.{count - 1}.concat" for b, count in enumerate(self.blocks))


def _walk(spec: DenseNetSpec) -> Iterator[Layer]:
    def conv(path: str, inputs: str, in_channels: int, out_channels: int, kernel: int, **hyper: Any) -> Conv:
        options: dict[str, Any] = {"stride": 1, "padding": "symmetric", "bias": spec.conv_bias} | hyper
        return Conv(
            path=path,
            inputs=(inputs,),
            in_channels=in_channels,
            out_channels=out_channels,
            kernel=kernel,
            **options,
        )

    def activated(norm: str, relu: str, inputs: str, channels: int) -> Iterator[Layer]:
        if spec.norm:
            yield BatchNorm(
                path=norm,
                inputs=(inputs,),
                channels=channels,
                eps=spec.bn_eps,
                momentum=spec.bn_momentum,
                running_variance=spec.running_variance,
            )
        yield ReLU(path=relu, inputs=(norm if spec.norm else inputs,))

    channels, growth, inner = spec.stem_width, spec.growth_rate, spec.bottleneck * spec.growth_rate
    stem = {"stride": 2, "padding": spec.stem_padding, "bias": False}
    yield conv("stem.conv", INPUT, spec.in_channels, channels, 7, **stem)
    yield from activated("stem.norm", "stem.relu", "stem.conv", channels)
    yield MaxPool(path="stem.pool", inputs=("stem.relu",), kernel=3, stride=2, padding=spec.pool_padding)
    last = "stem.pool"
    for b, count in enumerate(spec.blocks):
        for i in range(count):
            layer = f"blocks.{b}.layers.{i}"
            yield from activated(f"{layer}.norm1", f"{layer}.relu1", last, channels)
            yield conv(f"{layer}.conv1", f"{layer}.relu1", channels, inner, 1)
            yield from activated(f"{layer}.norm2", f"{layer}.relu2", f"{layer}.conv1", inner)
            yield conv(new := f"{layer}.conv2", f"{layer}.relu2", inner, growth, 3)
            if spec.dropout:
                yield Dropout(path=f"{layer}.dropout", inputs=(new,), rate=spec.dropout)
                new = f"{layer}.dropout"
            # What was there comes first, what is new last.
            yield Concat(path=f"{layer}.concat", inputs=(last, new))
            last, channels = f"{layer}.concat", channels + growth
        if b == len(spec.blocks) - 1:
            break
        transition, kept = f"transitions.{b}", spec.transition_width(channels)
        yield from activated(f"{transition}.norm", f"{transition}.relu", last, channels)
        relu = f"{transition}.relu"
        yield conv(f"{transition}.conv", relu, channels, kept, 1, padding=spec.transition_padding)
        last, channels = f"{transition}.pool", kept
        window: dict[str, Any] = {"inputs": (f"{transition}.conv",), "kernel": 2, "stride": 2, "padding": "valid"}
        if spec.transition_pool == "average":
            yield AveragePool(path=last, count_padding=False, **window)
        else:
            yield MaxPool(path=last, **window)

    # A dense layer begins with its activation, so that the last one's output has had none.
    yield from activated("head.norm", "head.relu", last, channels)
    last = "head.relu"
    if spec.head_pool != "none":
        yield GlobalPool(path="head.pool", inputs=(last,), op=spec.head_pool)
        last = "head.pool"
    if spec.head != "none":
        yield Dense(path="head.fc", inputs=(last,), in_features=channels, out_features=spec.classes)
    if spec.head == "softmax":
        yield Softmax(path="head.softmax", inputs=("head.fc",))


# Published conventions: what each source does differently from torchvision, which is the authors' own.
_KERAS: dict[str, Any] = {"bn_eps": 1.001e-5, "bn_momentum": 0.99, "running_variance": "biased"}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "keras_applications": _KERAS | {"head": "softmax"},
    "keras_hub": _KERAS | {"stem_padding": "same", "pool_padding": "same"},
    # A form that PyTorch tutorials teach: a ring of the bias around every transition's map.
    "tutorial": {"conv_bias": True, "transition_padding": 1},
}


def _variants() -> dict[str, DenseNetSpec]:
    blocks = {
        121: (6, 12, 24, 16),
        161: (6, 12, 36, 24),
        169: (6, 12, 32, 32),
        201: (6, 12, 48, 32),
        264: (6, 12, 64, 48),
    }
    wide: dict[int, dict[str, Any]] = {161: {"growth_rate": 48, "stem_width": 96}}
    plain = {f"densenet{depth}": DenseNetSpec(blocks=counts, **wide.get(depth, {})) for depth, counts in blocks.items()}
    published = ("densenet121", "densenet169", "densenet201")
    conventions = {
        f"{name}.{convention}": plain[name].replace(**CONVENTIONS[convention])
        for convention in ("keras_applications", "keras_hub")
        for name in published
    }
    tutorial = {"densenet121.tutorial": plain["densenet121"].replace(**CONVENTIONS["tutorial"])}
    return plain | conventions | tutorial


VARIANTS = _variants()
TITLES = {"densenet": "DenseNet"}
Spec = DenseNetSpec
