"""Inception v3's layers in every community's names: torchvision's and timm's, which are the same; keras.applications';
and in Flax, which has none of its own, the canonical ones.

keras.applications gives most layers no name, and Keras numbers them in the order in which a process makes them:
``conv2d``, ``conv2d_1``, …; a second model goes on where the first one ended, and Keras 1 and 2 began with
``conv2d_1``. So a number says nothing until those of a file are ranked: the least is of the stem's first convolution.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from common.architectures.inception_v3 import CONVENTIONS, MOST_MODULES, InceptionV3Spec
from common.architectures.layers import Shape
from common.errors import CheckpointError
from common.names import Family, Naming, Place, ShapeOf
from common.names.roles import FLAX, KERAS, PYTORCH
from common.names.shapes import check_gap, kernels

# fmt: off
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #               torchvision        keras.applications     Flax
    "stem.affine":  ("transform",      "transform_input",     None),
    "stem.1a":      ("Conv2d_1a_3x3",  None,                  "stem.1a"),
    "stem.2a":      ("Conv2d_2a_3x3",  None,                  "stem.2a"),
    "stem.2b":      ("Conv2d_2b_3x3",  None,                  "stem.2b"),
    "stem.3b":      ("Conv2d_3b_1x1",  None,                  "stem.3b"),
    "stem.4a":      ("Conv2d_4a_3x3",  None,                  "stem.4a"),
    "stem.pool1":   ("maxpool1",       None,                  None),
    "stem.pool2":   ("maxpool2",       None,                  None),
    "aux.pool":     ("AuxLogits.avg_pool2d", "aux_pool",      None),
    "aux.conv0":    ("AuxLogits.conv0", "aux_conv0",          "aux.conv0"),
    "aux.conv1":    ("AuxLogits.conv1", "aux_conv1",          "aux.conv1"),
    "aux.average":  ("AuxLogits.adaptive_avg_pool2d", "aux_avg_pool", None),
    "aux.fc":       ("AuxLogits.fc",   "aux_predictions",     "aux.fc"),
    "head.pool":    ("avgpool",        "avg_pool",            None),
    "head.dropout": ("dropout",        "dropout",             None),
    "head.fc":      ("fc",             "predictions",         "head.fc"),
    "head.softmax": ("softmax",        "predictions_softmax", None),
}
# fmt: on
_PARTS = {"conv": "conv", "norm": "bn", "relu": "relu"}  # of a convolution with what follows it, in torchvision
_FIRST_LETTER = {0: "b", 1: "a", 2: "a"}  # Mixed_5b, Mixed_6a and Mixed_7a
_TORCH_BLOCK = re.compile(r"Mixed_([567])([a-z])\.(\w+)\.(conv|bn)")
# What Keras calls a layer that is given no name, by the kind of layer.
_NUMBERED = {
    "conv": "conv2d",
    "norm": "batch_normalization",
    "relu": "activation",
    "max_pool": "max_pooling2d",
    "average_pool": "average_pooling2d",
}
_NUMBER = re.compile(r"(conv2d|batch_normalization)(?:_([1-9]\d{0,8}))?")


def _torchvision(spec: InceptionV3Spec) -> dict[str, str]:
    """torchvision's name of every layer that has one."""
    found: dict[str, str] = {}
    for layer in spec.layers:
        where, _, part = layer.path.rpartition(".")
        if layer.path.startswith("stages."):
            _, s, _, b, *inside = layer.path.split(".")
            block = f"Mixed_{5 + int(s)}{chr(ord(_FIRST_LETTER[int(s)]) + int(b))}"
            if part == "pool":
                name = f"{block}.max_pool2d" if block in ("Mixed_6a", "Mixed_7a") else f"{block}.avg_pool2d"
            elif layer.kind == "concat":  # the calls of one module
                count = sum(name.startswith(f"{block}.cat") for name in found.values())
                name = f"{block}.cat_{count}" if count else f"{block}.cat"
            else:
                name = f"{block}.{inside[0]}.{_PARTS[part]}"
        else:
            row = _LAYERS[where if part in _PARTS else layer.path]
            name = f"{row[0]}.{_PARTS[part]}" if part in _PARTS else str(row[0])
        found[layer.path] = name
    return found


def _keras(spec: InceptionV3Spec) -> dict[str, str]:
    """The names of keras.applications in a process that has made nothing before. Auxiliary branches, which it has not,
    have names of their own, and the numbers of the others do not follow from them."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}

    def numbered(name: str) -> str:
        counts[name] = counts.get(name, -1) + 1
        return f"{name}_{counts[name]}" if counts[name] else name

    blocks = [path for stage in spec.blocks for path in stage]
    wide = spec.blocks[2][1:]
    mixed = len(blocks) - len(wide)
    for layer in spec.layers:
        where, _, part = layer.path.rpartition(".")
        if layer.kind == "concat":
            if part == "concat":
                name = f"mixed{blocks.index(where)}"
            else:
                name = f"mixed{mixed}_{wide.index(where)}" if part == "branch3x3" else numbered("concatenate")
        elif (row := _LAYERS.get(where if part in _PARTS else layer.path)) and row[1]:
            name = f"{row[1]}_{_PARTS[part]}" if part in _PARTS else row[1]
        else:
            name = numbered(_NUMBERED[layer.kind])
        found[layer.path] = name
    return found


def _flax(spec: InceptionV3Spec) -> dict[str, str]:
    return {layer.path: layer.path for layer in spec.layers if layer.arrays}


def _torchvision_places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
    """The places of those of the names that are torchvision's, of any number of modules."""
    kinds = {"conv": "conv", "bn": "norm"}
    around = {
        f"{row[0]}.{part}": Place(f"{path}.{kind}", kind)
        for path, row in _LAYERS.items()
        if path.startswith(("stem.", "aux.conv"))
        for part, kind in kinds.items()
    }
    around |= {str(row[0]): Place(path, "dense") for path, row in _LAYERS.items() if path.endswith(".fc")}
    found: dict[str, Place] = {}
    for name in names:
        if match := _TORCH_BLOCK.fullmatch(name):
            s, letter, branch, part = int(match[1]) - 5, match[2], match[3], match[4]
            if (b := ord(letter) - ord(_FIRST_LETTER[s])) >= 0:
                found[name] = Place(f"stages.{s}.blocks.{b}.{branch}.{kinds[part]}", kinds[part])
    return found and found | {name: around[name] for name in names if name in around}


def _keras_places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
    """The places of Keras' names, each number by its rank among those of its kind."""
    ranked: dict[str, list[str]] = {"conv2d": [], "batch_normalization": []}
    numbers = {name: match for name in names if (match := _NUMBER.fullmatch(name))}
    for name in sorted(numbers, key=lambda name: int(numbers[name][2] or 0)):
        ranked[numbers[name][1]].append(name)
    units = _units(*_counts([shape_of(name, "conv", "kernel") for name in ranked["conv2d"]]))
    if len(ranked["conv2d"]) < len(units) // 2:
        return {}
    found: dict[str, Place] = {}
    for kind, part in (("conv2d", "conv"), ("batch_normalization", "norm")):
        found |= {name: Place(f"{unit}.{part}", part) for name, unit in zip(ranked[kind], units, strict=False)}
    for path, row in _LAYERS.items():
        if path.endswith(".fc"):
            found[str(row[1])] = Place(path, "dense")
        elif path.startswith("aux.conv"):
            found |= {f"{row[1]}_{_PARTS[part]}": Place(f"{path}.{part}", part) for part in ("conv", "norm")}
    return {name: place for name, place in found.items() if name in names}


def _counts(shapes: list[Shape | None]) -> tuple[int, int, int]:
    """How many modules there are at each resolution, by the windows of all convolutions in their order: the third of a
    module is 5x5 at the first resolution, and 1x7 at the second but for the one that halves; the last have nine."""
    windows = [shape and shape[:2] for shape in shapes]
    at = 5
    first = second = 0
    while windows[at + 2 : at + 3] == [(5, 5)] and first < MOST_MODULES:
        first, at = first + 1, at + 7
    at += 4
    while windows[at + 2 : at + 3] == [(1, 7)] and second < MOST_MODULES:
        second, at = second + 1, at + 10
    third = round((len(windows) - at - 6) / 9)
    return max(first, 1), max(second, 1), min(max(third, 1), MOST_MODULES)


def _units(first: int, second: int, third: int) -> list[str]:
    """Paths of all convolutions with what follows them, but the auxiliary ones, in the order of the walk."""
    spec = InceptionV3Spec(
        unit=1, pool_features=(1,) * first, channels_7x7=(1,) * second, wide_modules=third, aux=False
    )
    return [layer.path.removesuffix(".conv") for layer in spec.layers if layer.kind == "conv"]


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any width and number of modules; and of as many classes as it alone has, what the
    network of the Frechet Inception distance is besides."""
    kernel = kernels(shapes)
    found: dict[str, set[int]] = {"0": set(), "1": set(), "2": set()}
    for name in shapes:
        if name.startswith("stages."):
            _, s, _, b, _ = name.split(".", 4)
            found[s].add(int(b))
    for s, blocks in found.items():
        if len(blocks) < (1 if s == "0" else 2):
            raise CheckpointError(f"of the modules Mixed_{5 + int(s)} there are {len(blocks)}; is the file whole?")
        check_gap(f"modules Mixed_{5 + int(s)}", blocks)
    fields: dict[str, Any] = {
        "unit": kernel("stem.1a.conv")[3] // 2,
        "pool_features": tuple(kernel(f"stages.0.blocks.{b}.branch_pool.conv")[3] for b in sorted(found["0"])),
        "channels_7x7": tuple(kernel(f"stages.1.blocks.{b}.branch7x7_1.conv")[3] for b in sorted(found["1"])[1:]),
        "wide_modules": len(found["2"]) - 1,
        "in_channels": kernel("stem.1a.conv")[2],
        "norm": "stem.1a.norm.bias" in shapes,
        "bn_scale": "stem.1a.norm.scale" in shapes or "stem.1a.norm.bias" not in shapes,
        "aux": "aux.fc.kernel" in shapes,
    }
    dense = shapes.get("head.fc.kernel")
    if dense is None:
        return fields
    fields["classes"] = dense[1]
    if dense[1] == CONVENTIONS["fid"]["classes"] and not fields["aux"] and fields["bn_scale"]:
        fields |= {name: CONVENTIONS["fid"][name] for name in ("count_padding", "last_pool")}
    return fields


def _naming(name: str, layers: Callable[[InceptionV3Spec], dict[str, str]], **options: Any) -> Naming:
    return Naming(family=InceptionV3Spec.family, name=name, layers=layers, **options)


TORCHVISION = _naming(
    "torchvision",
    _torchvision,
    title="torchvision",
    roles=PYTORCH,
    places=_torchvision_places,
    preprocessing="torchvision_299",
    aliases=("timm",),
)
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    _keras,
    title="keras.applications",
    roles=KERAS,
    places=_keras_places,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_tf_299",
    aliases=("keras",),
)
CANONICAL_FLAX = _naming("flax", _flax, title="our Flax models", roles=FLAX, preprocessing="torchvision_299")
FAMILY = Family(namings=(TORCHVISION, KERAS_APPLICATIONS, CANONICAL_FLAX), fields=fields_from)
