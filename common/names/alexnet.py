"""AlexNet's layers in every community's names: torchvision's; those of tutorials in PyTorch; Caffe's, which our Keras
models have, since keras.applications has no AlexNet; and in Flax, which has none either, the canonical ones."""

from collections.abc import Callable, Mapping
from typing import Any

from common.architectures import to_dict
from common.architectures.alexnet import CONVENTIONS, KERNELS, VARIANTS, AlexNetSpec
from common.architectures.layers import Shape
from common.names import Family, Naming
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
    """The fields that shapes show, of any width; and where they are a variant's, all of its fields."""
    kernels = [shapes.get(f"features.conv{i}.kernel", (1, 1, 1, 0)) for i in range(1, len(KERNELS) + 1)]
    widths = tuple(kernel[-1] for kernel in kernels)
    # The kernels of the second have the channels of a group of the first's.
    fields: dict[str, Any] = {"widths": widths, "groups": widths[0] // kernels[1][-2]}
    dense = [shapes[name] for i in range(1, len(shapes)) if (name := f"head.fc{i}.kernel") in shapes]
    if "head.fc.kernel" in shapes and dense:
        fields |= {"hidden": tuple(kernel[1] for kernel in dense)}
    alike = (spec for spec in VARIANTS.values() if fields.items() <= vars(spec).items())
    fields = next(map(to_dict, alike), {}) | fields | {"in_channels": kernels[0][-2]}
    for derived in ("family", "classes"):
        fields.pop(derived, None)
    return fields | ({"classes": shapes["head.fc.kernel"][1]} if "head.fc.kernel" in shapes else {})


def _naming(name: str, **options: Any) -> Naming:
    options = {"preprocessing": "torchvision"} | options
    return Naming(family=AlexNetSpec.family, name=name, layers=_layers(name), **options)


TORCHVISION = _naming("torchvision", title="torchvision", roles=PYTORCH)
TUTORIAL = _naming("tutorial", title="the tutorials", roles=PYTORCH, convention=CONVENTIONS["tutorial"])
KERAS_NAMES = _naming("keras", title="our Keras models", roles=KERAS, aliases=("keras_applications",))
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX)
FAMILY = Family(namings=(TORCHVISION, TUTORIAL, KERAS_NAMES, CANONICAL_FLAX), fields=fields_from)
