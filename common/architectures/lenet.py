"""LeNet-5: the specification, the layer walk, and the named variants.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998, section II.B, as it
is built today: its subsampling is a plain pool, its C3 reads all maps, and it ends in a dense layer. That is what
everybody means by LeNet-5; the trainable coefficients, the table of C3 and the distances to bitmaps are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Annotated, Any, ClassVar, Literal, Self

from common.architectures.layers import (
    ACTIVATIONS,
    INPUT,
    AveragePool,
    Conv,
    Dense,
    Flatten,
    GlobalPool,
    Layer,
    MaxPool,
    Shape,
    Softmax,
    output_shapes,
)
from common.architectures.marks import Mark
from common.architectures.spec import Head, Size, check_input_size, head_changes
from common.errors import ParityError, SpecError
from common.fields import Checked, Count, Counts, Natural

# In the order of ResNet's: Python takes annotations that differ in the order alone for one, and errors list them.
HeadPool = Literal["average", "max", "flatten", "none"]
Pool = Literal["average", "max"]
LeNetActivation = Literal["tanh", "scaled_tanh", "sigmoid", "relu", "none"]

_CONVENTION = Mark.UNSEEN | Mark.ADOPTED


@dataclass(frozen=True, kw_only=True)
class LeNetSpec(Checked):
    """Everything that fixes the function a LeNet computes; the defaults are those of the modern LeNet-5.

    Raises `SpecError` for a value that is invalid or contradicts another, naming field, value and what is allowed. A
    field whose default is None follows from the others; it is filled in at construction and never None afterwards.
    """

    family: ClassVar[str] = "lenet"
    error: ClassVar[type[ParityError]] = SpecError
    title: ClassVar[str] = "a lenet spec"

    widths: tuple[Count, Count] = (6, 16)  # of the two 5x5 convolutions, C1 and C3 of the paper
    in_channels: Count = 1
    classes: Count = 10

    padding: Annotated[Natural, _CONVENTION] = 2  # of the first convolution: 28 pixels with 2, or 32 with none
    conv_activation: Annotated[LeNetActivation, _CONVENTION] = "tanh"  # behind each convolution
    pool: Annotated[Pool, _CONVENTION] = "average"  # 2x2
    pool_padding: Annotated[Literal["valid", "ceil"], _CONVENTION] = "valid"  # ceil keeps the last pixel of an odd map
    dense_activation: Annotated[LeNetActivation, _CONVENTION] = "tanh"  # behind each dense layer but the last
    hidden: Counts = (120, 84)  # of the dense layers before the classifier, C5 and F6 of the paper

    head_pool: Annotated[HeadPool, Mark.UNSEEN] = "flatten"  # or, with head none, what becomes of the last map
    head: Annotated[Head, Mark.UNSEEN] = "logits"
    # With head_pool flatten only, else (); that of which the default padding makes the paper's maps.
    input_size: Annotated[Size, Mark.UNSEEN] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        flattened = self.head_pool == "flatten"
        self.follow("input_size", (28, 28) if flattened else ())
        if self.head == "none":
            self.require("head_pool", not flattened, "average, max or none with head none")
        else:
            self.require("head_pool", flattened, f"flatten with head {self.head}")
        if flattened:
            self.require("input_size", bool(self.input_size), "height and width with head_pool flatten")
            check_input_size(self)
        else:
            self.require("input_size", not self.input_size, "empty unless head_pool is flatten")

    def replace(self, **changes: Any) -> Self:
        """This specification with some fields changed; `input_size` starts anew where `head_pool` changes."""
        self.check_names(changes)
        anew = {"input_size": None} if changes.get("head_pool", self.head_pool) != self.head_pool else {}
        return replace(self, **(anew | changes))

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end: ``logits``, ``softmax``, or ``none``, which
        leaves all dense layers off and returns the last map, pooled by `pool` into a vector an image."""
        return self.replace(**head_changes(self, "flatten", classes=classes, head=head, pool=pool))

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction."""
        return 4

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        height, width = self.input_size or (28, 28)
        return height, width

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        maxima = {"average": "max"}
        return self.replace(
            conv_activation="none" if self.conv_activation == "none" else "relu",
            pool="max",
            dense_activation="none" if self.dense_activation == "none" else "relu",
            head_pool=maxima.get(self.head_pool, self.head_pool),
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
        """Paths of the outputs of both pools, S2 and S4 of the paper, at strides of 2 and 4."""
        return ("features.pool1", "features.pool2")


def _walk(spec: LeNetSpec) -> Iterator[Layer]:
    last = INPUT
    channels = spec.in_channels
    for i, width in enumerate(spec.widths, start=1):
        path = f"features.conv{i}"
        yield Conv(
            path=path,
            inputs=(last,),
            in_channels=channels,
            out_channels=width,
            kernel=5,
            stride=1,
            padding=spec.padding if i == 1 else "valid",
            bias=True,
        )
        last, channels = path, width
        if spec.conv_activation != "none":
            yield ACTIVATIONS[spec.conv_activation](path=f"features.act{i}", inputs=(last,))
            last = f"features.act{i}"
        window: dict[str, Any] = {"kernel": 2, "stride": 2, "padding": spec.pool_padding}
        path = f"features.pool{i}"
        if spec.pool == "average":
            yield AveragePool(path=path, inputs=(last,), count_padding=False, **window)
        else:
            yield MaxPool(path=path, inputs=(last,), **window)
        last = path

    if spec.head_pool in ("average", "max"):
        yield GlobalPool(path="head.pool", inputs=(last,), op="average" if spec.head_pool == "average" else "max")
    if spec.head == "none":
        return
    yield Flatten(path="head.flatten", inputs=(last,))
    last = "head.flatten"
    shape = _map_shape(spec)
    features = prod(shape)
    for i, hidden in enumerate(spec.hidden, start=1):
        path = f"head.fc{i}"
        flattened = shape if i == 1 else None
        yield Dense(path=path, inputs=(last,), in_features=features, out_features=hidden, flattened=flattened)
        last, features = path, hidden
        if spec.dense_activation != "none":
            yield ACTIVATIONS[spec.dense_activation](path=f"head.act{i}", inputs=(path,))
            last = f"head.act{i}"
    yield Dense(path="head.fc", inputs=(last,), in_features=features, out_features=spec.classes)
    if spec.head == "softmax":
        yield Softmax(path="head.softmax", inputs=("head.fc",))


def _map_shape(spec: LeNetSpec) -> Shape:
    """Shape of the map that the dense layers read."""
    bare = spec.with_head(head="none")
    return output_shapes(bare.layers, (*spec.input_size, spec.in_channels))[bare.stage_outputs[-1]]


# What each source does differently from the modern LeNet-5, and all that no shape shows.
_MODERN: dict[str, Any] = {
    "padding": 2,
    "conv_activation": "tanh",
    "pool": "average",
    "pool_padding": "valid",
    "dense_activation": "tanh",
    "head_pool": "flatten",
    "head": "logits",
    "input_size": (28, 28),
}
_OF_32 = {"padding": 0, "input_size": (32, 32)}  # the paper's size; its maps are those of 28 with padding
CONVENTIONS: dict[str, dict[str, Any]] = {
    "relu": _MODERN | {"conv_activation": "relu", "pool": "max", "dense_activation": "relu"},
    "scaled_tanh": _MODERN | _OF_32 | {"conv_activation": "scaled_tanh", "dense_activation": "scaled_tanh"},
    # Dive into Deep Learning, section 7.6.
    "d2l": _MODERN | {"conv_activation": "sigmoid", "dense_activation": "sigmoid"},
    # BVLC/caffe, examples/mnist: nothing but maxima between its convolutions and its first dense layer.
    "caffe": _MODERN
    | {
        "widths": (20, 50),
        "hidden": (500,),
        "padding": 0,
        "conv_activation": "none",
        "pool": "max",
        "pool_padding": "ceil",
        "dense_activation": "relu",
    },
    # Without activations between them three dense layers are one linear map.
    "tutorial": _MODERN | _OF_32 | {"conv_activation": "relu", "pool": "max", "dense_activation": "none"},
}
VARIANTS = {"lenet5": LeNetSpec(), **{f"lenet5.{name}": LeNetSpec(**changes) for name, changes in CONVENTIONS.items()}}
TITLES = {"lenet": "LeNet"}
Spec = LeNetSpec
