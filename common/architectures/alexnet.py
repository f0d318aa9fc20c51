"""AlexNet: the specification, the layer walk, and the named variants.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012: two GPUs
shared it, hence the groups. torchvision's is another network, of Krizhevsky's "One weird trick for parallelizing
convolutional neural networks", 2014 (arXiv:1404.5997): one tower, narrower, without local response norms.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    INPUT,
    AdaptivePool,
    Conv,
    Dense,
    Dropout,
    Flatten,
    GlobalPool,
    Layer,
    LocalResponseNorm,
    MaxPool,
    ReLU,
    Shape,
    Softmax,
    output_shapes,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, Size, check_dense_head, head_changes
from common.errors import ParityError, SpecError
from common.fields import Bound, Checked, Count, Counts, Natural, Positive, Share

HeadPool = Literal["adaptive", "adaptive_max", "flatten", "average", "max", "none"]

KERNELS = (11, 5, 3, 3, 3)  # of the convolutions, the first at a stride of 4
GROUPED = (2, 4, 5)  # convolutions that saw the half of the maps that was on their own GPU
POOLED = (1, 2, 5)  # convolutions with a max-pool of stride 2 behind
NORMED = (1, 2)  # convolutions with a local response norm behind, where there are any

_CONVENTION = Mark.UNSEEN | Mark.ADOPTED
_FREE = Mark.UNSEEN | Mark.FREE
_Five = Annotated[
    tuple[Count, ...], Bound("a list of five integers of at least 1", lambda widths: len(widths) == len(KERNELS))
]
_Rates = Annotated[tuple[Share, ...], Bound("a list of shares of at least 0 and below 1", lambda rates: True), _FREE]


@dataclass(frozen=True, kw_only=True)
class AlexNetSpec(Checked):
    """Everything that fixes the function an AlexNet computes; the defaults are torchvision's.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "alexnet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "an alexnet spec"

    widths: _Five = (64, 192, 384, 256, 256)  # of the convolutions
    groups: Count = 1  # of the second, fourth and fifth
    in_channels: Count = 3
    classes: Count = 1000

    padding: Annotated[Natural, _CONVENTION] = 2  # of the first convolution
    # Local response norms behind the ReLU of the first two convolutions: before the pool, or behind it (CaffeNet).
    lrn: Annotated[Literal["none", "before_pool", "behind_pool"], _CONVENTION] = "none"
    lrn_size: Annotated[Count, _CONVENTION] = 5
    lrn_alpha: Annotated[Positive, _CONVENTION] = (
        1e-4  # of the sum itself; Caffe's and PyTorch's numbers are 5 times it
    )
    lrn_beta: Annotated[Positive, _CONVENTION] = 0.75
    lrn_k: Annotated[Positive, _CONVENTION] = 2.0
    pool_padding: Annotated[Literal["valid", "ceil"], _CONVENTION] = "valid"  # ceil keeps the pixels that are left over
    last_pool: Annotated[Count, _CONVENTION] = 3  # side of the window of the last pool; that of the others is 3

    # What the dense layers read: the last map averaged to `map_size` cells at any size of images, or as it is, at
    # `input_size` alone. Without dense layers the map, or a vector of its averages or maxima.
    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "adaptive"
    map_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]  # (6, 6) with an adaptive pool, else ()
    hidden: Counts = (4096, 4096)  # of the dense layers before the classifier, fc6 and fc7 of the paper
    dense_activation: Annotated[Literal["relu", "none"], _CONVENTION] = "relu"  # behind each of these
    dropout: _Rates = None  # type: ignore[assignment]  # of each of these; 0.5, and 0 is no layer
    dropout_place: Annotated[Literal["before", "behind"], _FREE] = "before"  # each of these, or it and its ReLU
    head: Annotated[Head, Mark.UNSEEN] = "logits"
    input_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]  # with head_pool flatten only, else ()

    def __post_init__(self) -> None:
        super().__post_init__()
        adaptive = self.head_pool in ("adaptive", "adaptive_max")
        self.follow("map_size", (6, 6) if adaptive else ())
        self.follow("dropout", (0.5,) * len(self.hidden))
        self.follow("input_size", ())
        for number in GROUPED:
            reads, width = self.widths[number - 2], self.widths[number - 1]
            fits = reads % self.groups == 0 and width % self.groups == 0
            self.require("groups", fits, f"a divisor of {reads} and {width}, the channels around convolution {number}")
        count = len(self.hidden)
        self.require("dropout", len(self.dropout) == count, f"{count} entries, as many as hidden has")
        check_dense_head(self)

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed.

        Fields that follow from a changed one (`hidden`, `head_pool`) start anew unless they are given too.
        """
        self.check_names(changes)
        anew: dict[str, Any] = {}
        hidden = changes.get("hidden")
        if isinstance(hidden, list | tuple) and len(hidden) != len(self.hidden):
            anew |= {"dropout": None}
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
        return 32

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
            lrn="none",
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
        """Paths of layers that are used together: each convolution and each dense layer with what follows it; in order,
        every layer once."""
        groups: list[list[str]] = []
        for layer in self.layers:
            if layer.arrays:
                groups.append([])
            groups[-1].append(layer.path)
        return tuple(map(tuple, groups))

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the outputs of the pools, at strides of 8, 16 and 32."""
        return tuple(f"features.pool{i}" for i in POOLED)


def _walk(spec: AlexNetSpec) -> Iterator[Layer]:
    last = INPUT
    channels = spec.in_channels
    for i, (width, kernel) in enumerate(zip(spec.widths, KERNELS, strict=True), start=1):
        path = f"features.conv{i}"
        yield Conv(
            path=path,
            inputs=(last,),
            in_channels=channels,
            out_channels=width,
            kernel=kernel,
            stride=4 if i == 1 else 1,
            padding=spec.padding if i == 1 else "symmetric",
            groups=spec.groups if i in GROUPED else 1,
            bias=True,
        )
        yield ReLU(path=f"features.relu{i}", inputs=(path,))
        last, channels = f"features.relu{i}", width
        norm = LocalResponseNorm(
            path=f"features.lrn{i}",
            inputs=(f"features.pool{i}" if spec.lrn == "behind_pool" else last,),
            size=spec.lrn_size,
            alpha=spec.lrn_alpha,
            beta=spec.lrn_beta,
            k=spec.lrn_k,
        )
        if i in NORMED and spec.lrn == "before_pool":
            yield norm
            last = norm.path
        if i in POOLED:
            side = spec.last_pool if i == POOLED[-1] else 3
            yield MaxPool(path=f"features.pool{i}", inputs=(last,), kernel=side, stride=2, padding=spec.pool_padding)
            last = f"features.pool{i}"
        if i in NORMED and spec.lrn == "behind_pool":
            yield norm
            last = norm.path

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
        dropped = f"head.dropout{i}"
        if rate and spec.dropout_place == "before":
            yield Dropout(path=dropped, inputs=(last,), rate=rate)
            last = dropped
        path = f"head.fc{i}"
        flattened = shape if i == 1 else None
        yield Dense(path=path, inputs=(last,), in_features=features, out_features=hidden, flattened=flattened)
        last, features = path, hidden
        if spec.dense_activation == "relu":
            yield ReLU(path=f"head.relu{i}", inputs=(last,))
            last = f"head.relu{i}"
        if rate and spec.dropout_place == "behind":
            yield Dropout(path=dropped, inputs=(last,), rate=rate)
            last = dropped
    yield Dense(path="head.fc", inputs=(last,), in_features=features, out_features=spec.classes)
    if spec.head == "softmax":
        yield Softmax(path="head.softmax", inputs=("head.fc",))


def _map_shape(spec: AlexNetSpec) -> Shape:
    """Shape of the map that the dense layers read."""
    if spec.map_size:
        return (*spec.map_size, spec.widths[-1])
    bare = spec.with_head(head="none")
    return output_shapes(bare.layers, (*spec.input_size, spec.in_channels))[bare.layers[-1].path]


# Published conventions: the widths of each source, and all that no shape shows.
_TORCHVISION: dict[str, Any] = {
    "padding": 2,
    "lrn": "none",
    "pool_padding": "valid",
    "last_pool": 3,
    "head_pool": "adaptive",
    "map_size": None,
    "dense_activation": "relu",
    "dropout": None,
    "dropout_place": "before",
    "head": "logits",
    "input_size": None,
}
_PAPER = _TORCHVISION | {
    "widths": (96, 256, 384, 384, 256),
    "groups": 2,
    "padding": 0,
    "lrn": "before_pool",
    "lrn_size": 5,
    "lrn_alpha": 1e-4,
    "lrn_beta": 0.75,
    "lrn_k": 2.0,
    "head_pool": "flatten",
    "dropout_place": "behind",
    "input_size": (227, 227),  # the paper prints 224, of which its own maps do not come out
}
# bvlc_alexnet divides alpha by the size of the window, and its k is 1.
_CAFFE = _PAPER | {"lrn_alpha": 2e-5, "lrn_k": 1.0, "pool_padding": "ceil"}
# The paper's widths without its two GPUs and its norms, as it is mostly drawn.
_SINGLE_TOWER = _TORCHVISION | {
    "widths": (96, 256, 384, 384, 256),
    "head_pool": "flatten",
    "dropout_place": "behind",
    "input_size": (224, 224),
}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "torchvision": _TORCHVISION,
    "paper": _PAPER,
    "caffe": _CAFFE,
    "caffenet": _CAFFE | {"lrn": "behind_pool"},
    "single_tower": _SINGLE_TOWER,
    # alexnet_v2 of TF-Slim; its dense layers are convolutions over the whole map.
    "slim": _SINGLE_TOWER | {"widths": (64, 192, 384, 384, 256), "padding": 0},
    # Without activations between them three dense layers are one linear map.
    "tutorial": _SINGLE_TOWER
    | {"last_pool": 2, "dense_activation": "none", "dropout": (0.0, 0.0), "dropout_place": "before"},
}
VARIANTS = {
    "alexnet" if name == "torchvision" else f"alexnet.{name}": AlexNetSpec(**changes)
    for name, changes in CONVENTIONS.items()
}
TITLES = {"alexnet": "AlexNet"}
Spec = AlexNetSpec
