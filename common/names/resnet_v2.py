"""The layers of a pre-activation ResNet in every community's names: timm and keras.applications; in our PyTorch models
torchvision's way to name a ResNet; and in Flax, which has none of its own, the canonical ones."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from common.architectures.layers import Shape
from common.architectures.resnet_v2 import CONVENTIONS, ResNetV2Spec
from common.errors import CheckpointError
from common.names import Family, Naming, Place, ShapeOf
from common.names.roles import FLAX, KERAS, PYTORCH
from common.names.shapes import kernels

# fmt: off
_COLUMNS = ("torchvision", "timm", "keras_applications", "flax")
# ``{s}`` and ``{b}`` count stages and blocks from 0, ``{b1}`` blocks from 1 and ``{s2}`` stages from 2.
_BLOCK = ("layers.{s}.{b}.", "stages.{s}.blocks.{b}.", "conv{s2}_block{b1}_", "stages.{s}.blocks.{b}.")
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #                 torchvision's way  timm               keras.applications     Flax
    "stem.conv":      ("conv1",          "stem.conv",       "conv1_conv",          "stem.conv"),
    "stem.pad":       ("pad",            None,              "pool1_pad",           None),
    "stem.pool":      ("maxpool",        None,              "pool1_pool",          None),
    "norm1":          ("bn1",            "norm1",           "preact_bn",           "norm1"),
    "relu1":          ("relu",           None,              "preact_relu",         None),
    "conv1":          ("conv1",          "conv1",           "1_conv",              "conv1"),
    "norm2":          ("bn2",            "norm2",           "1_bn",                "norm2"),
    "relu2":          ("relu",           None,              "1_relu",              None),
    "conv2":          ("conv2",          "conv2",           "2_conv",              "conv2"),
    "norm3":          ("bn3",            "norm3",           "2_bn",                "norm3"),
    "relu3":          ("relu",           None,              "2_relu",              None),
    "conv3":          ("conv3",          "conv3",           "3_conv",              "conv3"),
    "shortcut.conv":  ("downsample",     "downsample.conv", "0_conv",              "shortcut.conv"),
    "shortcut.pool":  ("downsample",     None,              "0_pool",              None),
    "add":            (None,             None,              "out",                 None),
    "head.norm":      ("bn",             "norm",            "post_bn",             "head.norm"),
    "head.relu":      ("relu",           None,              "post_relu",           None),
    "head.pool":      ("avgpool",        None,              "avg_pool",            None),
    "head.fc":        ("fc",             "head.fc",         "predictions",         "head.fc"),
    "head.softmax":   ("softmax",        None,              "predictions_softmax", None),
}
# fmt: on
_KINDS = {"conv": "conv", "norm": "norm", "fc": "dense"}  # of layers with arrays, by the last word of the path
_OLDER = {"keras_applications": {"probs": Place("head.fc", "dense")}}  # an older spelling


def _layers(column: str) -> Callable[[ResNetV2Spec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: ResNetV2Spec) -> dict[str, str]:
        found = {}
        for layer in spec.layers:
            part, before = layer.path, ""
            if part.startswith("stages."):
                _, s, _, b, part = part.split(".", 4)
                before = _BLOCK[index].format(s=s, b=b, s2=int(s) + 2, b1=int(b) + 1)
            if (name := _LAYERS[part][index]) is not None:
                found[layer.path] = before + name
        return found

    return names


def _places(column: str) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of names that are a column's, for networks of any depth; none where no block is among them."""
    index = _COLUMNS.index(column)
    first_stage, first_block = (2, 1) if "{s2}" in _BLOCK[index] else (0, 0)
    count = r"(0|[1-9]\d{0,4})"
    block = re.compile(re.sub(r"\\{\w+\\}", lambda _: count, re.escape(_BLOCK[index])) + "(.+)", re.ASCII)
    in_blocks: dict[str, str] = {}
    around = dict(_OLDER.get(column, {}))
    for path, row in _LAYERS.items():
        name, kind = row[index], _kind(path)
        if name is not None and kind and path.startswith(("stem.", "head.")):
            around[name] = Place(path, kind)
        elif name is not None and kind:
            in_blocks[name] = path

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        inside = {}
        for name in names:
            match = block.fullmatch(name)
            if match is None or (path := in_blocks.get(match[3])) is None:
                continue
            stage, number = int(match[1]) - first_stage, int(match[2]) - first_block
            if min(stage, number) >= 0:
                inside[name] = Place(f"stages.{stage}.blocks.{number}.{path}", _kind(path))
        return inside and inside | {name: around[name] for name in names if name in around}

    return places


def _kind(path: str) -> str:
    """Of a layer that holds arrays; empty for one that does not."""
    return _KINDS.get(path.rpartition(".")[2].rstrip("123"), "")


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any depth and width; and what they tell of the source: convolutions without
    biases are timm's network, or with a small stem the paper's for CIFAR."""
    kernel = kernels(shapes)
    found: dict[int, set[int]] = {}
    for name in shapes:
        if name.startswith("stages."):
            _, stage, _, block, _ = name.split(".", 4)
            found.setdefault(int(stage), set()).add(int(block))
    if sorted(found) != list(range(len(found))) or any(max(of) >= len(of) for of in found.values()):
        raise CheckpointError("a stage or a block is missing; is the file whole?")
    stem, bias, small = kernel("stem.conv"), "stem.conv.bias" in shapes, kernel("stem.conv")[0] < 7
    inner = [kernel(f"stages.{stage}.blocks.0.conv1")[3] for stage in range(len(found))]
    outer = kernel("stages.0.blocks.0.conv3")[3]
    fields: dict[str, Any] = {
        "blocks": tuple(len(blocks) for _, blocks in sorted(found.items())),
        "widths": tuple(inner),
        "expansion": outer // max(inner[0], 1),
        "in_channels": stem[2],
        "stem_kernel": stem[0],
        "stem_width": stem[3],
        "norm": "head.norm.scale" in shapes,
        **({} if bias else CONVENTIONS["paper" if small else "timm"]),
        "conv_bias": bias,
    }
    if small:
        fields |= {"stem_stride": 1, "stem_pool": False}
    dense = shapes.get("head.fc.kernel")
    return fields if dense is None else fields | {"classes": dense[1]}


def _naming(name: str, **options: Any) -> Naming:
    return Naming(family=ResNetV2Spec.family, name=name, layers=_layers(name), places=_places(name), **options)


# torchvision has no such network; its way to name one is what many repositories have.
TORCHVISION = _naming(
    "torchvision",
    title="our PyTorch models",
    roles=PYTORCH,
    preprocessing="keras_tf",
    aliases=("pytorch",),
)
# Its classifier is a convolution of one pixel.
TIMM = _naming(
    "timm",
    title="timm",
    roles=PYTORCH,
    preprocessing="timm_95_inception",
    as_convolutions=frozenset({"head.fc"}),
)
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    title="keras.applications",
    roles=KERAS,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_tf",
    aliases=("keras",),
    shortcut_first=True,
)
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX, preprocessing="keras_tf")
FAMILY = Family(namings=(TORCHVISION, TIMM, KERAS_APPLICATIONS, CANONICAL_FLAX), fields=fields_from)
