"""DenseNet's layers in every community's names: torchvision and timm, keras.applications, KerasHub; and in Flax, which
has none of its own, the canonical ones."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from fractions import Fraction
from math import ceil
from typing import Any

from common.architectures.densenet import CONVENTIONS, DenseNetSpec
from common.architectures.layers import Shape
from common.errors import CheckpointError
from common.names import Family, Naming, Place, ShapeOf
from common.names.roles import FLAX, KERAS, PYTORCH
from common.names.shapes import check_gap, kernels

# fmt: off
_COLUMNS = ("torchvision", "keras_applications", "keras_hub", "flax")
# Of a dense layer and of a transition. ``{b}`` and ``{i}`` count blocks and their layers from 0, ``{b1}`` and ``{i1}``
# from 1; in Keras the stem is stage 1, so that ``{b2}`` is the first block's.
_PLACES: dict[str, tuple[str, ...]] = {
    # torchvision and timm, keras.applications, KerasHub, Flax
    "layer":      ("features.denseblock{b1}.denselayer{i1}", "conv{b2}_block{i1}",
                   "stack{b1}_block{i1}", "blocks.{b}.layers.{i}"),
    "transition": ("features.transition{b1}", "pool{b2}",
                   "transition{b1}", "transitions.{b}"),
}
# ``{}`` is one of these.
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #                   torchvision, timm  keras.applications  KerasHub      Flax
    "stem.conv":       ("features.conv0",  "conv1_conv",       "conv1_conv",  "stem.conv"),
    "stem.norm":       ("features.norm0",  "conv1_bn",         "conv1_bn",    "stem.norm"),
    "stem.relu":       ("features.relu0",  "conv1_relu",       "conv1_relu",  "stem.relu"),
    "stem.pool":       ("features.pool0",  "pool1",            "pool1",       "stem.pool"),
    "layer.norm1":     ("{}.norm1",        "{}_0_bn",          "{}_1_bn",     "{}/norm1"),
    "layer.relu1":     ("{}.relu1",        "{}_0_relu",        "{}_1_relu",   "{}/relu1"),
    "layer.conv1":     ("{}.conv1",        "{}_1_conv",        "{}_1_conv",   "{}/conv1"),
    "layer.norm2":     ("{}.norm2",        "{}_1_bn",          "{}_2_bn",     "{}/norm2"),
    "layer.relu2":     ("{}.relu2",        "{}_1_relu",        "{}_2_relu",   "{}/relu2"),
    "layer.conv2":     ("{}.conv2",        "{}_2_conv",        "{}_2_conv",   "{}/conv2"),
    "layer.dropout":   ("{}.dropout",      "{}_dropout",       "{}_dropout",  "{}/dropout"),
    "layer.concat":    (None,              "{}_concat",        "{}_concat",   "{}/concat"),
    "transition.norm": ("{}.norm",         "{}_bn",            "{}_bn",       "{}/norm"),
    "transition.relu": ("{}.relu",         "{}_relu",          "{}_relu",     "{}/relu"),
    "transition.conv": ("{}.conv",         "{}_conv",          "{}_conv",     "{}/conv"),
    "transition.pool": ("{}.pool",         "{}_pool",          "{}_pool",     "{}/pool"),
    "head.norm":       ("features.norm5",  "bn",               "bn",          "head.norm"),
    "head.relu":       ("relu",            "relu",             "relu",        "head.relu"),
    "head.pool":       ("avgpool",         "avg_pool",         "pooler",      "head.pool"),
    "head.fc":         ("classifier",      "predictions",      "predictions", "head.fc"),
    "head.softmax":    ("softmax",         "predictions_softmax", "predictions_softmax", "head.softmax"),
}
# fmt: on
_HOLDING = {
    row: {"conv": "conv", "norm": "norm", "fc": "dense"}[kind]
    for row in _LAYERS
    if (kind := row.partition(".")[2].rstrip("12")) in ("conv", "norm", "fc")
}
# Spellings of layers in files of old: torchvision's published weights are of the time when a module's name could have a
# dot in it, Keras' of the time when a layer's could have a slash.
_ALSO: dict[str, dict[str, str]] = {
    "torchvision": {f"layer.{kind}{number}": f"{{}}.{kind}.{number}" for kind in ("norm", "conv") for number in (1, 2)},
    "keras_applications": {"stem.conv": "conv1/conv", "stem.norm": "conv1/bn"},
}
_COUNTERS = {"{b}": 0, "{i}": 0, "{b1}": 1, "{i1}": 1, "{b2}": 2}  # and what each counts from


def _layers(column: str) -> Callable[[DenseNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: DenseNetSpec) -> dict[str, str]:
        found = {}
        for layer in spec.layers:
            where, *numbers, part = layer.path.split(".")
            if where == "blocks":
                row, block, inner = f"layer.{part}", int(numbers[0]), int(numbers[2])
            elif where == "transitions":
                row, block, inner = f"transition.{part}", int(numbers[0]), 0
            else:
                row, block, inner = layer.path, 0, 0
            if (name := _name(row, _LAYERS[row][index], index)) is not None:
                words = {"b": block, "b1": block + 1, "b2": block + 2, "i": inner, "i1": inner + 1}
                found[layer.path] = name.format(**words)
        return found

    return names


def _places(column: str) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of names that are a column's; none where no dense layer is among them."""
    index = _COLUMNS.index(column)
    spellings = [(row, _LAYERS[row][index]) for row in _HOLDING] + list(_ALSO.get(column, {}).items())
    names = ((row, _name(row, spelling, index)) for row, spelling in spellings)
    rows = [(re.compile(_pattern(name), re.ASCII), row) for row, name in names if name is not None]

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        found: dict[str, Place] = {}
        inside = False
        for name in names:
            for pattern, row in rows:
                if (match := pattern.fullmatch(name)) is None:
                    continue
                where, part = row.split(".")
                block, layer = (_number(match, letter) for letter in "bi")
                if min(block, layer) < 0:
                    continue
                prefix = {"layer": f"blocks.{block}.layers.{layer}", "transition": f"transitions.{block}"}
                found[name] = Place(f"{prefix.get(where, where)}.{part}", _HOLDING[row])
                inside = inside or where == "layer"
        return found if inside else {}

    return places


def _name(row: str, spelling: str | None, index: int) -> str | None:
    """A spelling with the name of the dense layer or the transition in it, whose numbers are left open."""
    places = _PLACES.get(row.partition(".")[0])
    return spelling if spelling is None or places is None else spelling.replace("{}", places[index])


def _pattern(name: str) -> str:
    pattern = re.escape(name)
    for counter, first in _COUNTERS.items():
        pattern = pattern.replace(re.escape(counter), f"(?P<{counter[1]}{first}>0|[1-9][0-9]{{0,4}})")
    return pattern


def _number(match: re.Match[str], letter: str) -> int:
    """The number in a name, counted from 0; 0 where it has none."""
    numbers = (int(text) - int(group[1]) for group, text in match.groupdict().items() if group[0] == letter)
    return next(numbers, 0)


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any depth and width."""
    kernel = kernels(shapes)
    blocks: dict[int, set[int]] = {}
    for name in shapes:
        if name.startswith("blocks."):
            _, b, _, i, _ = name.split(".", 4)
            blocks.setdefault(int(b), set()).add(int(i))
    check_gap("blocks", blocks)
    for block, layers in sorted(blocks.items()):
        check_gap(f"layers of block {block}", layers)
    stem, growth = kernel("stem.conv"), kernel("blocks.0.layers.0.conv2")
    widths = [kernel(f"transitions.{block}.conv")[2:] for block in range(len(blocks) - 1)]
    fields: dict[str, Any] = {
        "blocks": tuple(len(layers) for _, layers in sorted(blocks.items())),
        "growth_rate": growth[3],
        "bottleneck": max(growth[2] // max(growth[3], 1), 1),
        "stem_width": stem[3],
        "in_channels": stem[2],
        "conv_bias": "blocks.0.layers.0.conv1.bias" in shapes,
        "norm": "stem.norm.scale" in shapes,
    }
    if widths:
        fields["compression"] = _compression(widths)
    dense = shapes.get("head.fc.kernel")
    return fields if dense is None else fields | {"classes": dense[1]}


def _compression(widths: Iterable[tuple[int, ...]]) -> float:
    """The simplest fraction that makes of every transition's channels before it those behind it, rounded down."""
    pairs = [(before, after) for before, after in widths if before > 0]
    least = max((Fraction(after, before) for before, after in pairs), default=Fraction(1))
    below = min((Fraction(after + 1, before) for before, after in pairs), default=Fraction(2))
    for denominator in range(1, max((before for before, _ in pairs), default=1) + 1):
        numerator = ceil(least * denominator)
        if Fraction(numerator, denominator) < below:
            return numerator / denominator
    told = ", ".join(f"{before} to {after}" for before, after in pairs)
    raise CheckpointError(f"no share of the channels is what all transitions keep: {told}")


def _naming(name: str, **options: Any) -> Naming:
    return Naming(family=DenseNetSpec.family, name=name, layers=_layers(name), places=_places(name), **options)


TORCHVISION = _naming(
    "torchvision",
    title="torchvision and timm",
    roles=PYTORCH,
    preprocessing="torchvision",
    aliases=("timm", "pytorch"),
)
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    title="keras.applications",
    roles=KERAS,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_torch",
    aliases=("keras",),
)
KERAS_HUB = _naming(
    "keras_hub",
    title="KerasHub",
    roles=KERAS,
    convention=CONVENTIONS["keras_hub"],
    preprocessing="keras_torch",
)
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX, preprocessing="torchvision")
FAMILY = Family(namings=(TORCHVISION, KERAS_APPLICATIONS, KERAS_HUB, CANONICAL_FLAX), fields=fields_from)
