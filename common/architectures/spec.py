"""What every family's specification offers; the rest of the project uses nothing else of it."""

from itertools import count
from typing import Annotated, Any, Literal, Protocol, Self

from common.architectures.layers import Dense, Layer, output_shapes
from common.architectures.marks import Mark, marked
from common.errors import InputError
from common.fields import Bound, Checked, Count

Head = Literal["logits", "softmax", "none"]
# Of the images, where the network takes one size only; otherwise empty.
Size = Annotated[
    tuple[Count, ...], Bound("a list of height and width, or an empty one", lambda size: len(size) in (0, 2))
]


class Spec(Protocol):
    """A frozen dataclass of one family. Two equal ones are the same function of the same weights."""

    @property
    def family(self) -> str: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def classes(self) -> int:
        """Of its classifier; means nothing where `head` is ``none``."""
        ...

    @property
    def head(self) -> Head:
        """What it returns: ``logits`` or ``softmax`` of classes, or ``none``: features."""
        ...

    @property
    def input_size(self) -> tuple[int, ...]:
        """Height and width of the images, where it takes one size only; otherwise empty."""
        ...

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of the images that such a network is usually fed."""
        ...

    @property
    def output_stride(self) -> int:
        """Pixels of the image per pixel of the last map, in each direction: the least size of an image."""
        ...

    @property
    def exact_twin(self) -> Self:
        """The same geometry without the layers that round: integers pass through it unchanged (level L0)."""
        ...

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layer walk: every layer in execution order; the last one's output is the network's. A dense layer that
        no other reads gives auxiliary logits, which only training and its loss know."""
        ...

    @property
    def layer_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of layers that are used together, in order, every layer once: what is sharded as one."""
        ...

    @property
    def stage_outputs(self) -> tuple[str, ...]:
        """Paths of the last layer at each resolution: the levels of a feature pyramid."""
        ...

    def replace(self, **changes: Any) -> Self:
        """The same with some fields changed, and what follows from them. Raises `SpecError`."""
        ...

    def with_head(
        self, *, classes: int | None = None, head: Head | None = None, pool: Literal["average", "max", "none"] = "none"
    ) -> Self:
        """The same network with another number of classes, or another end; with `head` ``none`` the last map, pooled
        by `pool`."""
        ...


def output(spec: Spec) -> Layer:
    """The layer whose output is the network's."""
    return spec.layers[-1]


def running(spec: Spec, training: bool) -> tuple[Layer, ...]:
    """The layers of the walk that run in training mode, or in eval mode."""
    return tuple(layer for layer in spec.layers if not layer.unused and (training or not layer.training_only))


def outputs(spec: Spec, training: bool) -> tuple[str, ...]:
    """Paths of the layers whose outputs the network returns in a mode: its own, then the auxiliary logits, those from
    the deepest layer first, as torchvision has them."""
    layers = running(spec, training)
    read = {path for layer in layers for path in layer.inputs}
    auxiliary = [layer.path for layer in layers[:-1] if isinstance(layer, Dense) and layer.path not in read]
    return (layers[-1].path, *reversed(auxiliary))


def logits(spec: Spec) -> str | None:
    """Path of the layer that gives the classes' logits, whatever follows it; None where there is no classifier."""
    if spec.head == "none":
        return None
    last = spec.layers[-1]
    return last.inputs[0] if spec.head == "softmax" else last.path


def least_size(spec: Spec) -> int:
    """Side of the smallest square images that a network of this kind takes, of any size that a flattened head has; at
    least its output stride."""
    bare = spec.with_head(head="none")
    for side in count(bare.output_stride):
        try:
            output_shapes(bare.layers, (side, side, bare.in_channels))
        except InputError:
            continue
        break
    return side


def head_changes(spec: Spec, usual_pool: str, *, classes: int | None, head: Head | None, pool: str) -> dict[str, Any]:
    """The fields by which `with_head` changes a spec; a network without a classifier gets one behind `usual_pool`, and
    what is extra goes with a classifier."""
    changes: dict[str, Any] = {} if classes is None else {"classes": classes}
    if head == "none":
        return changes | {"head": "none", "head_pool": pool} | dict.fromkeys(marked(spec, Mark.EXTRA), False)
    if head is not None:
        changes |= {"head": head} | ({"head_pool": usual_pool} if spec.head == "none" else {})
    return changes


def check_dense_head(spec: Any) -> None:
    """Raise the spec's error where `head_pool`, `map_size`, `input_size` and `head` contradict each other, in a network
    whose dense layers read a flattened map: of cells, at any size of images, or as it is, at one size."""
    checked: Checked = spec
    adaptive = spec.head_pool in ("adaptive", "adaptive_max")
    if spec.head == "none":
        bare = spec.head_pool in ("average", "max", "none")
        checked.require("head_pool", bare, "average, max or none with head none")
    else:
        dense = adaptive or spec.head_pool == "flatten"
        checked.require("head_pool", dense, f"adaptive, adaptive_max or flatten with head {spec.head}")
    with_cells = "height and width with an adaptive head_pool, empty otherwise"
    checked.require("map_size", bool(spec.map_size) == adaptive, with_cells)
    if spec.head_pool == "flatten":
        checked.require("input_size", bool(spec.input_size), "height and width with head_pool flatten")
        check_input_size(spec)
    else:
        checked.require("input_size", not spec.input_size, "empty unless head_pool is flatten")


def check_input_size(spec: Any) -> None:
    """Raise the spec's error where the network cannot take the one size that it says it takes."""
    checked: Checked = spec
    try:
        output_shapes(spec.layers, (*spec.input_size, spec.in_channels))
    except InputError as error:
        checked.require("input_size", False, f"a size the network can take ({error})")
