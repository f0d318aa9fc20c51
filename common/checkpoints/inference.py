"""The specification of a foreign checkpoint: what its shapes show, and what its convention must say.

Depth, block, widths, groups, input channels, classes, biases and norms leave their mark on names and shapes. Strides,
paddings, eps and momentum leave none; they come from a convention and are named as assumed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.architectures.layers import Shape
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.checkpoints.base import Naming, Skeleton, canonical_shape
from common.checkpoints.containers import Stored
from common.errors import CheckpointError, SpecError

# torchvision's own are the defaults of the spec.
NAMED_CONVENTIONS: dict[str, Mapping[str, Any]] = {"torchvision": {}, **CONVENTIONS}

# The fields that no name and no shape shows.
UNSEEN = (
    "stem_stride",
    "stem_padding",
    "stem_pool",
    "pool_padding",
    "block_padding",
    "stride_in",
    "replace_stride_with_dilation",
    "bn_eps",
    "bn_momentum",
    "running_variance",
    "head_pool",
    "head",
    "input_size",
)

ShapeOf = Callable[[str, str, str], Shape | None]


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """A specification, and which of its fields were not seen but assumed."""

    spec: ResNetSpec
    assumed: Mapping[str, Any]


def infer(
    naming: Naming,
    skeleton: Skeleton,
    tensors: Mapping[str, Stored],
    *,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Inferred:
    """The specification behind native tensors.

    `convention` names another one than the naming's own; `changes` set single fields, over both. Raises
    `CheckpointError` for shapes that no ResNet of ours has, `SpecError` for an unknown convention or field.
    """
    if convention is not None and convention not in NAMED_CONVENTIONS:
        raise SpecError(f"unknown convention {convention!r}; expected one of {', '.join(NAMED_CONVENTIONS)}")

    def shape_of(layer: str, kind: str, role: str) -> Shape | None:
        found = tensors.get(naming.array(layer, kind, role, skeleton))
        return None if found is None else canonical_shape(found.shape, kind, role, naming.kernels)

    seen = _seen(skeleton, shape_of)
    unseen = dict(naming.convention if convention is None else NAMED_CONVENTIONS[convention])
    if seen["stem_kernel"] < 7:
        # The CIFAR networks' stem; a 7x7 one halves the image and pools.
        unseen = {"stem_stride": 1, "stem_pool": False} | unseen
    unseen = {name: value for name, value in unseen.items() if name in UNSEEN}
    if skeleton.block == "basic":
        unseen.pop("stride_in", None)
    if seen.get("head") == "none":
        unseen.pop("head", None)
    try:
        spec = ResNetSpec(**{**seen, **unseen})
        if changes:
            spec = spec.replace(**changes)
    except SpecError as error:
        raise CheckpointError(f"the shapes give no network of ours: {error}") from None
    given = changes or {}
    skip = {"input_size", "replace_stride_with_dilation"} | ({"head", "head_pool"} if spec.head == "none" else set())
    assumed = {name: getattr(spec, name) for name in UNSEEN if name not in given and name not in skip}
    if not spec.norm:
        assumed = {k: v for k, v in assumed.items() if k not in ("bn_eps", "bn_momentum", "running_variance")}
    if not spec.stem_pool:
        assumed.pop("pool_padding", None)
    return Inferred(spec=spec, assumed=assumed)


def _seen(skeleton: Skeleton, shape_of: ShapeOf) -> dict[str, Any]:
    """The fields that shapes show."""

    def kernel(layer: str, kind: str = "conv") -> Shape:
        shape = shape_of(layer, kind, "kernel")
        if shape is None:
            raise CheckpointError(
                f"no kernel of {layer} is there, or it has another number of axes; is the file whole?"
            )
        return shape

    bottleneck = skeleton.block == "bottleneck"
    last = 3 if bottleneck else 2
    stem = kernel("stem.conv")
    widths, inner, outer = [], [], []
    groups = 1
    for stage in range(len(skeleton.blocks)):
        first = f"stages.{stage}.blocks.0"
        inner.append(kernel(f"{first}.conv1")[3])
        outer.append(kernel(f"{first}.conv{last}")[3])
        read = kernel(f"{first}.conv2")[2]
        if bottleneck and read and inner[-1] % read == 0:
            groups = inner[-1] // read
    expansion = 4 if bottleneck and all(width % 4 == 0 for width in outer) else 1
    widths = [width // expansion for width in outer]
    fields: dict[str, Any] = {
        "block": skeleton.block,
        "blocks": skeleton.blocks,
        "widths": tuple(widths),
        "expansion": expansion,
        "in_channels": stem[2],
        "stem_kernel": stem[0],
        "stem_width": stem[3],
        "conv_bias": shape_of("stem.conv", "conv", "bias") is not None,
        "norm": shape_of("stem.norm", "norm", "scale") is not None,
    }
    if bottleneck:
        # inner = width * width_per_group // 64 * groups, the same width_per_group in all stages
        fields |= {"groups": groups, "width_per_group": max(inner[0] * 64 // max(widths[0] * groups, 1), 1)}
    heads = [f"stages.{s}.blocks.0.shortcut" for s in range(len(skeleton.blocks))]
    projected = [head for head in heads if shape_of(f"{head}.conv", "conv", "kernel") is not None]
    fields["shortcut"] = "projection" if projected or len(set(outer)) == 1 else "zero_pad"
    if fields["norm"] and projected:
        fields["shortcut_norm"] = any(shape_of(f"{head}.norm", "norm", "scale") is not None for head in projected)
    dense = shape_of("head.fc", "dense", "kernel")
    if dense is None:
        return fields | {"head": "none"}
    if dense[0] != outer[-1]:
        raise CheckpointError(
            f"the classifier reads {dense[0]} features of a map with {outer[-1]} channels: a head that flattens, whose "
            "weights do not show the size of its map; such a network can be read from our canonical file only"
        )
    return fields | {"classes": dense[1]}
