"""VGG's layers in every community's names: torchvision, timm, keras.applications; and in Flax, which has none of its
own, the canonical ones."""

from collections.abc import Callable, Mapping
from typing import Any

from common.architectures.layers import Shape
from common.architectures.vgg import CONVENTIONS, VGGSpec
from common.errors import CheckpointError
from common.names import Family, Naming
from common.names.roles import FLAX, KERAS, PYTORCH

# fmt: off
_COLUMNS = ("torchvision", "timm", "keras_applications", "flax")
# ``{block}`` counts from 0 and ``{block1}`` from 1, ``{i}`` is the number of a layer in its block or in the head,
# ``{n}`` its place in torchvision's `features`, and ``{c}`` that in its `classifier`.
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #             torchvision        timm                 keras.applications     Flax
    "conv":      ("features.{n}",    "features.{n}",      "block{block1}_conv{i}", "blocks.{block}.conv{i}"),
    "norm":      ("features.{n}",    "features.{n}",      "block{block1}_bn{i}",   "blocks.{block}.norm{i}"),
    "relu":      ("features.{n}",    None,                "block{block1}_relu{i}", None),
    "pool":      ("features.{n}",    None,                "block{block1}_pool",    None),
    "head.pool": ("avgpool",         None,                "pool",                  None),
    "head.flatten": (None,           None,                "flatten",               None),
    "head.fcN":  ("classifier.{c}",  "pre_logits.fc{i}",  "fc{i}",                 "head.fc{i}"),
    "head.relu": ("classifier.{c}",  None,                "fc{i}_relu",            None),
    "head.dropout": ("classifier.{c}", None,              "fc{i}_dropout",         None),
    "head.fc":   ("classifier.{c}",  "head.fc",           "predictions",           "head.fc"),
    "head.softmax": ("softmax",      None,                "predictions_softmax",   None),
}
# fmt: on
_IN_CLASSIFIER = ("fc", "relu", "dropout")  # in this order, for each hidden layer, dropout at rate 0 too


def _layers(column: str) -> Callable[[VGGSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: VGGSpec) -> dict[str, str]:
        found = {}
        feature = 0
        for layer in spec.layers:
            where, *middle, last = layer.path.split(".")
            kind = last.rstrip("0123456789")
            number = last.removeprefix(kind)
            words: dict[str, Any] = {"i": number}
            if where == "blocks":
                words |= {"block": middle[0], "block1": int(middle[0]) + 1, "n": feature}
                feature += 1
                row = kind
            else:
                row = "head.fcN" if kind == "fc" and number else f"head.{kind}"
                if kind in _IN_CLASSIFIER:
                    before = int(number) - 1 if number else len(spec.hidden)
                    words["c"] = 3 * before + _IN_CLASSIFIER.index(kind)
            if (name := _LAYERS[row][index]) is not None:
                found[layer.path] = name.format(**words)
        return found

    return names


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any width."""
    blocks: dict[int, dict[int, Shape]] = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and name.endswith(".kernel"):
            _, block, layer, _ = name.split(".")
            blocks.setdefault(int(block), {})[int(layer.removeprefix("conv"))] = shape
    if sorted(blocks) != list(range(len(blocks))) or "blocks.0.conv1.kernel" not in shapes:
        raise CheckpointError("a block or its first convolution is missing; is the file whole?")
    lasts = [convs[max(convs)] for _, convs in sorted(blocks.items())]
    fields: dict[str, Any] = {
        "convs": tuple(len(convs) for _, convs in sorted(blocks.items())),
        "widths": tuple(last[3] for last in lasts),
        "pointwise": tuple(last[0] == 1 for last in lasts),
        "in_channels": shapes["blocks.0.conv1.kernel"][2],
        "norm": "blocks.0.norm1.scale" in shapes,
    }
    dense = shapes.get("head.fc.kernel")
    if dense is None:
        return fields
    count = sum(name.startswith("head.fc") and name.endswith(".kernel") for name in shapes) - 1
    if missing := [i for i in range(1, count + 1) if f"head.fc{i}.kernel" not in shapes]:
        raise CheckpointError(f"dense layer {missing[0]} is missing; is the file whole?")
    return fields | {"hidden": tuple(shapes[f"head.fc{i}.kernel"][1] for i in range(1, count + 1)), "classes": dense[1]}


def _naming(name: str, **options: Any) -> Naming:
    return Naming(family=VGGSpec.family, name=name, layers=_layers(name), **options)


TORCHVISION = _naming("torchvision", title="torchvision", roles=PYTORCH, preprocessing="torchvision")
# Its first two dense layers are convolutions over the whole map, and over one pixel.
TIMM = _naming(
    "timm",
    title="timm",
    roles=PYTORCH,
    preprocessing="torchvision",
    as_convolutions=frozenset({"head.fc1", "head.fc2"}),
)
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    title="keras.applications",
    roles=KERAS,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_caffe",
    aliases=("keras",),
)
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX, preprocessing="torchvision")
FAMILY = Family(namings=(TORCHVISION, TIMM, KERAS_APPLICATIONS, CANONICAL_FLAX), fields=fields_from)
