"""GoogLeNet's layers in every community's names: torchvision's; those of the authors' Caffe model; our Keras models',
which are torchvision's without dots, since keras.applications has no GoogLeNet; and in Flax, which has none either, the
canonical ones."""

import re
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from common.architectures.googlenet import CONVENTIONS, FIRST_STAGE, LETTERS, GoogLeNetSpec
from common.architectures.layers import Shape
from common.names import Family, Naming, Place, ShapeOf
from common.names.roles import FLAX, KERAS, PYTORCH
from common.names.shapes import check_gap, kernels

# fmt: off
_COLUMNS = ("torchvision", "caffe")
# A convolution with what is behind it. ``{}`` is the number and the letter of a module, or the number of a head.
_CONVS: dict[str, tuple[str, str]] = {
    #                 torchvision                   Caffe
    "stem.conv1":     ("conv1",                     "conv1/7x7_s2"),
    "stem.conv2":     ("conv2",                     "conv2/3x3_reduce"),
    "stem.conv3":     ("conv3",                     "conv2/3x3"),
    "branch1":        ("inception{}.branch1",       "inception_{}/1x1"),
    "branch2_reduce": ("inception{}.branch2.0",     "inception_{}/3x3_reduce"),
    "branch2":        ("inception{}.branch2.1",     "inception_{}/3x3"),
    "branch3_reduce": ("inception{}.branch3.0",     "inception_{}/5x5_reduce"),
    "branch3":        ("inception{}.branch3.1",     "inception_{}/5x5"),
    "branch4":        ("inception{}.branch4.1",     "inception_{}/pool_proj"),
    "aux.conv":       ("aux{}.conv",                "loss{}/conv"),
}
_OTHERS: dict[str, tuple[str, str | None]] = {
    "stem.affine":    ("transform",                 None),
    "stem.pool1":     ("maxpool1",                  None),
    "stem.lrn1":      ("norm1",                     None),
    "stem.lrn2":      ("norm2",                     None),
    "stem.pool2":     ("maxpool2",                  None),
    "branch4_pool":   ("inception{}.branch4.0",     None),
    "concat":         ("inception{}",               None),
    "pool":           ("maxpool{stage}",            None),
    "aux.pool":       ("aux{}.pool",                None),
    "aux.flatten":    ("aux{}.flatten",             None),
    "aux.fc1":        ("aux{}.fc1",                 "loss{}/fc"),
    "aux.relu1":      ("aux{}.relu",                None),
    "aux.dropout":    ("aux{}.dropout",             None),
    "aux.fc2":        ("aux{}.fc2",                 "loss{}/classifier"),
    "head.pool":      ("avgpool",                   None),
    "head.dropout":   ("dropout",                   None),
    "head.fc":        ("fc",                        "loss3/classifier"),
    "head.softmax":   ("softmax",                   None),
}
# fmt: on
_PATH = re.compile(r"(?:inception(..)|aux(.)|stem|head)\.(.*?)(_norm|_relu)?")
_BEHIND = {None: ".conv", "_norm": ".bn", "_relu": ".relu"}  # in torchvision, of a convolution's row


def _layers(column: str) -> Callable[[GoogLeNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: GoogLeNetSpec) -> dict[str, str]:
        found = {layer.path: _name(layer.path, index) for layer in spec.layers}
        return {path: name for path, name in found.items() if name is not None}

    return names


def _name(path: str, index: int) -> str | None:
    """The name of one layer in a column."""
    match = _PATH.fullmatch(path)
    assert match is not None
    module, head, part, behind = match.groups()
    row = part if module else f"aux.{part}" if head else f"{path.partition('.')[0]}.{part}"
    name = _CONVS[row][index] if row in _CONVS else _OTHERS[row][index]
    if name is None or (index == 1 and behind):
        return None
    suffix = _BEHIND[behind] if row in _CONVS and index == 0 else ""
    return name.format(module or head, stage=(module or "")[:1]) + suffix


def _keras(spec: GoogLeNetSpec) -> dict[str, str]:
    """torchvision's names, whose dots Keras would take for the edges of a graph."""
    return {path: name.replace(".", "_") for path, name in _layers("torchvision")(spec).items()}


def _canonical(spec: GoogLeNetSpec) -> dict[str, str]:
    return {layer.path: layer.path for layer in spec.layers}


def _places(
    layers: Callable[[GoogLeNetSpec], dict[str, str]],
) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of names that are those of the largest network there is; none where no module is among them."""

    @cache
    def largest() -> dict[str, Place]:
        count = len(LETTERS)
        spec = GoogLeNetSpec(stages=(count,) * 3, widths=((1,) * 6,) * 3 * count)
        names = layers(spec)
        return {names[x.path]: Place(x.path, x.kind) for x in spec.layers if x.arrays and x.path in names}

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        found = {name: largest()[name] for name in names if name in largest()}
        return found if any(place.path.startswith("inception") for place in found.values()) else {}

    return places


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any depth and width."""
    kernel = kernels(shapes)
    stages: list[set[int]] = [set(), set(), set()]
    for name in shapes:
        where = name.partition(".")[0]
        if where.startswith("inception"):
            stages[int(where[-2]) - FIRST_STAGE].add(LETTERS.index(where[-1]))
    for stage, modules in enumerate(stages, start=FIRST_STAGE):
        check_gap(f"modules inception{stage}a, b, …", modules)
    paths = [
        f"inception{stage}{letter}"
        for stage, modules in enumerate(stages, start=FIRST_STAGE)
        for letter in LETTERS[: len(modules)]
    ]
    branches = ("branch1", "branch2_reduce", "branch2", "branch3_reduce", "branch3", "branch4")
    first = kernel("stem.conv1")
    fields: dict[str, Any] = {
        "stem": tuple(kernel(f"stem.conv{i}")[3] for i in (1, 2, 3)),
        "stages": tuple(map(len, stages)),
        "widths": tuple(tuple(kernel(f"{path}.{branch}")[3] for branch in branches) for path in paths),
        "large_kernel": kernel(f"{paths[0]}.branch3")[0] if paths else 0,
        "in_channels": first[2],
        "norm": "stem.conv1_norm.bias" in shapes,
        "bn_scale": "stem.conv1_norm.scale" in shapes or "stem.conv1_norm.bias" not in shapes,
        "aux": any(name.startswith("aux") for name in shapes),
    }
    if fields["aux"]:
        fields["aux_widths"] = kernel("aux1.conv")[3], kernel("aux1.fc1")[1]
    dense = shapes.get("head.fc.kernel")
    return fields if dense is None else fields | {"classes": dense[1]}


def _naming(name: str, layers: Callable[[GoogLeNetSpec], dict[str, str]], **options: Any) -> Naming:
    options = {"preprocessing": "torchvision"} | options
    return Naming(family=GoogLeNetSpec.family, name=name, layers=layers, places=_places(layers), **options)


TORCHVISION = _naming(
    "torchvision",
    _layers("torchvision"),
    title="torchvision",
    roles=PYTORCH,
    # A file is mostly the published one or grown out of it, of which torchvision's function makes this.
    convention=CONVENTIONS["transform_input"],
)
# As converters of caffemodel files to PyTorch keep them; there is no container for the file itself.
CAFFE = _naming(
    "caffe",
    _layers("caffe"),
    title="Caffe",
    roles=PYTORCH,
    convention=CONVENTIONS["caffe"],
    preprocessing="caffe",
)
KERAS_NAMES = _naming("keras", _keras, title="our Keras models", roles=KERAS, aliases=("keras_applications",))
CANONICAL_FLAX = _naming("flax", _canonical, title="our Flax models", roles=FLAX)
FAMILY = Family(namings=(TORCHVISION, CAFFE, KERAS_NAMES, CANONICAL_FLAX), fields=fields_from)
