"""GoogLeNet: the specification, the layer walk, and the named variants.

Szegedy et al., "Going Deeper with Convolutions", 2014 (arXiv:1409.4842), table 1; also called Inception v1. What the
paper leaves open, as its local response norms, is from the authors' Caffe model. Batch norm came later.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from common.architectures.layers import (
    INPUT,
    TRANSFORM_SCALE,
    TRANSFORM_SHIFT,
    AdaptivePool,
    Affine,
    AveragePool,
    BatchNorm,
    Concat,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalPool,
    Layer,
    LocalResponseNorm,
    MaxPool,
    Padding,
    ReLU,
    RunningVariance,
    Softmax,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Between, Bound, Checked, Count, Positive, Share

HeadPool = Literal["average", "max", "none"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"  # of the modules of a stage
FIRST_STAGE = 3  # the number of the first stage of modules in the paper
_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_FREE = Mark.UNSEEN | Mark.FREE
_Stages = Annotated[
    tuple[Count, Count, Count],
    Bound("a list of three integers from 1 to 26", lambda counts: max(counts) <= len(LETTERS)),
]
# Table 1 of the paper.
_WIDTHS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class Module(NamedTuple):
    """What one Inception module is made of: the widths of its branches, in the order of their concatenation."""

    path: str  # inception3a, inception3b, …
    in_channels: int
    direct: int  # the 1x1 convolution
    reduce3: int  # the 1x1 convolution before the 3x3 one
    wide3: int
    reduce5: int  # the same for that of `large_kernel`
    wide5: int
    projection: int  # the 1x1 convolution behind the pool

    @property
    def stage(self) -> str:
        """The number of its stage, 3, 4 or 5."""
        return self.path[-2]

    @property
    def out_channels(self) -> int:
        return self.direct + self.wide3 + self.wide5 + self.projection


@dataclass(frozen=True, kw_only=True)
class GoogLeNetSpec(Checked):
    """Everything that fixes the function a GoogLeNet computes; the defaults are torchvision's.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed.
    """

    family: ClassVar[str] = "googlenet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a googlenet spec"

    stem: tuple[Count, Count, Count] = (64, 64, 192)  # widths of its convolutions: 7x7, 1x1, 3x3
    stages: _Stages = (2, 5, 2)  # modules of each, which a pool ends; the paper's 3a, 3b, 4a, …, 5b
    # Of each module: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
    widths: tuple[tuple[Count, Count, Count, Count, Count, Count], ...] = _WIDTHS
    # Side of the third branch's window: in torchvision's published weights, and in slim's, the paper's 5x5 is a 3x3.
    large_kernel: Literal[3, 5] = 3
    in_channels: Count = 3
    classes: Count = 1000

    norm: bool = True  # behind every convolution, which has a bias where there is none
    bn_scale: bool = True
    bn_eps: Annotated[Positive, _CONVENTION] = 1e-3
    bn_momentum: Annotated[Between, _CONVENTION] = 0.9  # share of the old running value that is kept
    running_variance: Annotated[RunningVariance, _CONVENTION] = "unbiased"  # N / (N - 1), or biased

    # x * std / 0.5 + (mean - 0.5) / 0.5 of each channel: images of ImageNet's mean and deviation go back to -1 … 1.
    transform_input: Annotated[bool, _CONVENTION] = False
    stem_padding: Annotated[Literal["symmetric", "same"], _CONVENTION] = "symmetric"  # differ at even sizes
    pool_padding: Annotated[Literal["ceil", "same", "valid"], _CONVENTION] = "ceil"  # of pools of stride 2
    last_pool: Annotated[Literal[2, 3], _CONVENTION] = 2  # side of the window of the last of these; that of others is 3
    lrn: Annotated[bool, _CONVENTION] = False  # local response norms around the stem's second and third convolution
    lrn_size: Annotated[Count, _CONVENTION] = 5
    lrn_alpha: Annotated[Positive, _CONVENTION] = 2e-5  # of the sum itself; Caffe's and PyTorch's 1e-4 is 5 times it
    lrn_beta: Annotated[Positive, _CONVENTION] = 0.75
    lrn_k: Annotated[Positive, _CONVENTION] = 1.0

    # Auxiliary heads, which run in training alone: behind the first module of the second stage and its last but one.
    aux: Annotated[bool, Mark.EXTRA] = True
    aux_widths: tuple[Count, Count] = (128, 1024)  # of their 1x1 convolution and of their first dense layer
    # Adaptive to `aux_map` cells; or an average of 5x5 windows at a stride of 3, of which a map of that size must come.
    aux_pool: Annotated[Literal["adaptive", "window"], _CONVENTION] = "adaptive"
    aux_map: Annotated[tuple[Count, Count], Mark.UNSEEN] = (4, 4)
    aux_dropout: Annotated[Share, _FREE] = 0.7  # behind their first dense layer and its ReLU; 0 is no layer

    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "average"
    dropout: Annotated[Share, _FREE] = 0.2  # before the classifier
    head: Annotated[Head, Mark.UNSEEN] = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        count = sum(self.stages)
        self.require("widths", len(self.widths) == count, f"{count} entries, one for each module of stages")
        self.require("transform_input", not self.transform_input or self.in_channels == 3, "false unless in_channels=3")
        if self.head != "none":
            self.require("head_pool", self.head_pool != "none", f"average or max with head {self.head}")
        if self.aux:
            self.require("aux", self.head != "none", "false with head none")
            self.require("aux", self.stages[1] >= 3, "false unless the second stage has 3 modules or more")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed."""
        self.check_names(changes)
        return replace(self, **changes)

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, of its auxiliary heads as well, or another end: ``logits``,
        ``softmax``, or ``none``, which has no auxiliary heads and returns the last map, pooled by `pool` into a vector
        an image."""
        return self.replace(**head_changes(self, "average", classes=classes, head=head, pool=pool))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Empty: it takes images of any size."""
        return ()

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return 32

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        return 224, 224

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        return self.replace(
            norm=False,
            transform_input=False,
            lrn=False,
            aux=False,
            head_pool="max" if self.head_pool == "average" else self.head_pool,
            dropout=0.0,
            head="none" if self.head == "none" else "logits",
        )

    @property
    def modules(self) -> tuple[tuple[Module, ...], ...]:
        """The modules of each stage."""
        channels, rows, found = self.stem[-1], iter(self.widths), []
        for stage, count in enumerate(self.stages, start=FIRST_STAGE):
            modules = []
            for letter in LETTERS[:count]:
                modules.append(Module(f"inception{stage}{letter}", channels, *next(rows)))
                channels = modules[-1].out_channels
            found.append(tuple(modules))
        return tuple(found)

    @property
    def auxiliary(self) -> dict[str, str]:
        """Path of each module that has an auxiliary head behind it -> path of that head: aux1, aux2."""
        middle = self.modules[1]
        return {middle[0].path: "aux1", middle[-2].path: "aux2"} if self.aux else {}

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order."""
        return tuple(_Walk(self).layers())

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together: the stem, each module with the pool behind it, each auxiliary head,
        the end; in order, every layer once."""
        groups: dict[str, list[str]] = {}
        for layer in self.layers:
            groups.setdefault(layer.path.partition(".")[0], []).append(layer.path)
        return tuple(map(tuple, groups.values()))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the outputs of the stages of modules, at strides of 8, 16 and 32."""
        return tuple(f"{modules[-1].path}.concat" for modules in self.modules)


class _Walk:
    """Layers one after another: each reads the one before."""

    def __init__(self, spec: GoogLeNetSpec) -> None:
        self.spec, self.last = spec, INPUT

    def layer(self, kind: type[Layer], path: str, **options: Any) -> Layer:
        made = kind(path=path, **({"inputs": (self.last,)} | options))
        self.last = path
        return made

    def conv(
        self, path: str, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, **options: Any
    ) -> Iterator[Layer]:
        """A convolution, its norm and its ReLU."""
        spec = self.spec
        padding: Padding = spec.stem_padding if stride > 1 else "symmetric"
        sides: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding}
        width: dict[str, Any] = {"in_channels": in_channels, "out_channels": out_channels}
        yield self.layer(Conv, path, **width, **sides, bias=not spec.norm, **options)
        if spec.norm:
            yield self.layer(
                BatchNorm,
                f"{path}_norm",
                channels=out_channels,
                eps=spec.bn_eps,
                momentum=spec.bn_momentum,
                running_variance=spec.running_variance,
                scale=spec.bn_scale,
                **options,
            )
        yield self.layer(ReLU, f"{path}_relu", **options)

    def pool(self, path: str, kernel: int = 3) -> Layer:
        return self.layer(MaxPool, path, kernel=kernel, stride=2, padding=self.spec.pool_padding)

    def norms_responses(self, path: str) -> Iterator[Layer]:
        spec = self.spec
        if spec.lrn:
            numbers = {"size": spec.lrn_size, "alpha": spec.lrn_alpha, "beta": spec.lrn_beta, "k": spec.lrn_k}
            yield self.layer(LocalResponseNorm, path, **numbers)

    def layers(self) -> Iterator[Layer]:
        spec = self.spec
        if spec.transform_input:
            yield self.layer(Affine, "stem.affine", scale=TRANSFORM_SCALE, shift=TRANSFORM_SHIFT)
        first, second, third = spec.stem
        yield from self.conv("stem.conv1", spec.in_channels, first, 7, 2)
        yield self.pool("stem.pool1")
        yield from self.norms_responses("stem.lrn1")
        yield from self.conv("stem.conv2", first, second)
        yield from self.conv("stem.conv3", second, third, 3)
        yield from self.norms_responses("stem.lrn2")
        yield self.pool("stem.pool2")
        for modules, side in zip(spec.modules, (3, spec.last_pool, None), strict=True):
            for module in modules:
                yield from self.module(module)
                trunk = self.last
                if (aux := spec.auxiliary.get(module.path)) is not None:
                    yield from self.head(aux, module.out_channels)
                    self.last = trunk
            if side is not None:
                yield self.pool(f"{module.path}.pool", side)
        if spec.head_pool != "none":
            yield self.layer(GlobalPool, "head.pool", op=spec.head_pool)
        if spec.head == "none":
            return
        if spec.dropout:
            yield self.layer(Dropout, "head.dropout", rate=spec.dropout)
        yield self.layer(Dense, "head.fc", in_features=module.out_channels, out_features=spec.classes)
        if spec.head == "softmax":
            yield self.layer(Softmax, "head.softmax")

    def module(self, module: Module) -> Iterator[Layer]:
        """Four branches of one input, side by side."""
        spec, path, inputs, channels = self.spec, module.path, self.last, module.in_channels
        outputs = []
        yield from self.conv(f"{path}.branch1", channels, module.direct)
        outputs.append(self.last)
        for branch, reduced, width, kernel in (
            ("branch2", module.reduce3, module.wide3, 3),
            ("branch3", module.reduce5, module.wide5, spec.large_kernel),
        ):
            self.last = inputs
            yield from self.conv(f"{path}.{branch}_reduce", channels, reduced)
            yield from self.conv(f"{path}.{branch}", reduced, width, kernel)
            outputs.append(self.last)
        self.last = inputs
        yield self.layer(MaxPool, f"{path}.branch4_pool", kernel=3, stride=1, padding="symmetric")
        yield from self.conv(f"{path}.branch4", channels, module.projection)
        yield self.layer(Concat, f"{path}.concat", inputs=(*outputs, self.last))

    def head(self, path: str, channels: int) -> Iterator[Layer]:
        """An auxiliary head, which gives logits."""
        spec, own = self.spec, {"training_only": True}
        (height, cells), (width, hidden) = spec.aux_map, spec.aux_widths
        if spec.aux_pool == "adaptive":
            yield self.layer(AdaptivePool, f"{path}.pool", op="average", height=height, width=cells, **own)
        else:
            window: dict[str, Any] = {"kernel": 5, "stride": 3, "padding": "valid", "count_padding": False}
            yield self.layer(AveragePool, f"{path}.pool", **window, **own)
        yield from self.conv(f"{path}.conv", channels, width, **own)
        yield self.layer(Flatten, f"{path}.flatten", **own)
        shape = (height, cells, width)
        rows = {"in_features": prod(shape), "flattened": shape}
        yield self.layer(Dense, f"{path}.fc1", **rows, out_features=hidden, **own)
        yield self.layer(ReLU, f"{path}.relu1", **own)
        if spec.aux_dropout:
            yield self.layer(Dropout, f"{path}.dropout", rate=spec.aux_dropout, **own)
        yield self.layer(Dense, f"{path}.fc2", in_features=hidden, out_features=spec.classes, **own)


# Published conventions: what each source does differently from torchvision.
CONVENTIONS: dict[str, dict[str, Any]] = {
    # torchvision's published weights, which are a port of the authors' own: its function `googlenet` sets it with them.
    "transform_input": {"transform_input": True},
    # The paper's network as BVLC's Caffe has it (bvlc_googlenet), which divides alpha by the size of the window.
    "caffe": {
        "large_kernel": 5,
        "norm": False,
        "last_pool": 3,
        "lrn": True,
        "lrn_size": 5,
        "lrn_alpha": 2e-5,
        "lrn_beta": 0.75,
        "lrn_k": 1.0,
        "aux_pool": "window",
        "aux_map": (4, 4),
        "dropout": 0.4,
    },
    # inception_v1 of TF-Slim; its classifier is a convolution over one pixel, its class 0 the background.
    "slim": {
        "bn_scale": False,
        "bn_momentum": 0.9997,
        "stem_padding": "same",
        "pool_padding": "same",
        "aux": False,
        "classes": 1001,
    },
}
VARIANTS = {
    "googlenet": GoogLeNetSpec(),
    "googlenet.no_aux": GoogLeNetSpec(aux=False),
    **{f"googlenet.{name}": GoogLeNetSpec(**changes) for name, changes in CONVENTIONS.items()},
}
TITLES = {"googlenet": "GoogLeNet"}
Spec = GoogLeNetSpec
