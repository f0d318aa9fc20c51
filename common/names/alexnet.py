"""AlexNet's layers in every community's names: torchvision's; those of tutorials in PyTorch; Caffe's, which our Keras
models have, since keras.applications has no AlexNet; and in Flax, which has none either, the canonical ones."""

from collections.abc import Callable, Mapping
from typing import Any

from common.architectures.alexnet import CONVENTIONS, GROUPED, AlexNetSpec
from common.architectures.layers import Shape
from common.names import Family, Naming, fields_of_variant
from common.names.roles import FLAX, KERAS, PYTORCH

# fmt: off
_COLUMNS = ("torchvision", "tutorial", "keras", "flax")
# ``{i}`` is the number of a layer as in the paper, where the dense layers go on from 6, ``{j}`` their own from 1,
# ``{n}`` the place in torchvision's `features`, and ``{c}`` that in its `classifier`.
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #                 torchvision       tutorial      Caffe, Keras    Flax
    "features.conv":  ("features.{n}",   "conv{i}.0",  "conv{i}",      "features.conv{i}"),
    "features.relu":  ("features.{n}",   None,         "relu{i}",      None),
    "features.lrn":   ("features.{n}",   None,         "norm{i}",      None),
    "features.pool":  ("features.{n}",   None,         "pool{i}",      None),
    "head.pool":      ("avgpool",        None,         "pool",         None),
    "head.flatten":   (None,             None,         "flatten",      None),
    "head.fc":        ("classifier.{c}", "fc{j}",      "fc{i}",        "head.{last}"),
    "head.relu":      ("classifier.{c}", None,         "relu{i}",      None),
    "head.dropout":   ("classifier.{c}", None,         "drop{i}",      None),
    "head.softmax":   ("softmax",        None,         "prob",         None),
}
# fmt: on


def _layers(column: str) -> Callable[[AlexNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: AlexNetSpec) -> dict[str, str]:
        # For each dense layer three places, that of a dropout at rate 0 and of no activation too.
        order = ("dropout", "fc", "relu") if spec.dropout_place == "before" else ("fc", "relu", "dropout")
        found = {}
        feature = 0
        for layer in spec.layers:
            where, last = layer.path.split(".")
            kind = last.rstrip("0123456789")
            number = int(last.removeprefix(kind) or len(spec.hidden) + 1)
            words: dict[str, Any] = {"i": number, "j": number, "n": feature, "last": last}
            if where == "features":
                feature += 1
            else:
                words["i"] = len(spec.widths) + number
                if kind in order:
                    # There is no dropout of the last one, before or behind.
                    place = 0 if number > len(spec.hidden) else order.index(kind)
                    words["c"] = 3 * (number - 1) + place
            if (name := _LAYERS[f"{where}.{kind}"][index]) is not None:
                found[layer.path] = name.format(**words)
        return found

    return names


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any width; the others are those of the variant that is most like them."""
    fields = fields_of_variant(AlexNetSpec.family, shapes)
    kernels = [shapes.get(f"features.conv{i}.kernel", (1, 1)) for i in range(1, len(fields["widths"]) + 1)]
    fields["widths"] = tuple(kernel[-1] for kernel in kernels)
    fields["groups"] = fields["widths"][GROUPED[0] - 2] // kernels[GROUPED[0] - 1][-2]
    hidden = [shapes[name][1] for i in range(1, len(shapes)) if (name := f"head.fc{i}.kernel") in shapes]
    if hidden and fields["head"] != "none":
        fields["hidden"] = tuple(hidden)
        fields["dropout"] = fields["dropout"] if len(hidden) == len(fields["dropout"]) else None
    return fields


def _naming(name: str, **options: Any) -> Naming:
    options = {"preprocessing": "torchvision"} | options
    return Naming(family=AlexNetSpec.family, name=name, layers=_layers(name), **options)


TORCHVISION = _naming("torchvision", title="torchvision", roles=PYTORCH)
TUTORIAL = _naming("tutorial", title="the tutorials", roles=PYTORCH, convention=CONVENTIONS["tutorial"])
KERAS_NAMES = _naming("keras", title="our Keras models", roles=KERAS, aliases=("keras_applications",))
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX)
FAMILY = Family(namings=(TORCHVISION, TUTORIAL, KERAS_NAMES, CANONICAL_FLAX), fields=fields_from)
