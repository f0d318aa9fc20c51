"""LeNet's layers in every community's names: those that its many PyTorch ports share, which our Keras models have too;
and in Flax, which has none of its own, the canonical ones."""

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

from common.architectures import to_dict
from common.architectures.layers import Shape
from common.architectures.lenet import VARIANTS, LeNetSpec
from common.names import Family, Naming
from common.names.roles import FLAX, KERAS, PYTORCH, Roles

# fmt: off
_COLUMNS = ("pytorch", "keras", "flax")
# ``{i}`` is the number of a layer among its kind: the classifier is the last of the dense layers. {act} is what the
# spec has for an activation.
_LAYERS: dict[str, tuple[str | None, ...]] = {
    #                 PyTorch      Keras               Flax
    "features.conv": ("conv{i}",   "conv{i}",          "features.conv{i}"),
    "features.act":  ("{act}{i}",  "conv{i}_{act}",    None),
    "features.pool": ("pool{i}",   "pool{i}",          None),
    "head.pool":     ("pool",      "pool",             None),
    "head.flatten":  ("flatten",   "flatten",          None),
    "head.fc":       ("fc{i}",     "fc{i}",            "head.{last}"),
    "head.act":      ("{act}{n}",  "fc{i}_{act}",      None),
    "head.softmax":  ("softmax",   "softmax",          None),
}
# fmt: on


def _layers(column: str) -> Callable[[LeNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: LeNetSpec) -> dict[str, str]:
        found = {}
        for layer in spec.layers:
            where, last = layer.path.split(".")
            kind = last.rstrip("0123456789")
            number = int(last.removeprefix(kind) or len(spec.hidden) + 1)
            if (name := _LAYERS[f"{where}.{kind}"][index]) is not None:
                words = {"i": number, "n": len(spec.widths) + number, "act": layer.kind, "last": last}
                found[layer.path] = name.format(**words)
        return found

    return names


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any width; and where they are a variant's, all of its fields."""
    kernels = [shapes.get(f"features.conv{i}.kernel", (1, 1, 1, 0)) for i in (1, 2)]
    fields: dict[str, Any] = {"widths": tuple(kernel[-1] for kernel in kernels)}
    dense = [shapes[name] for i in range(1, len(shapes)) if (name := f"head.fc{i}.kernel") in shapes]
    if "head.fc.kernel" in shapes and dense:
        fields |= {"hidden": tuple(kernel[1] for kernel in dense)}
    alike = (spec for spec in VARIANTS.values() if fields.items() <= vars(spec).items())
    fields = next(map(to_dict, alike), {"padding": LeNetSpec.padding}) | fields | {"in_channels": kernels[0][-2]}
    for derived in ("family", "classes"):
        fields.pop(derived, None)
    if "head.fc.kernel" not in shapes:
        return fields
    # Of a square map the rows show its side, and this that of the images.
    side = isqrt(dense[0][0] // max(kernels[1][-1], 1)) if dense else 0
    fields["input_size"] = (4 * side + 12 - 2 * fields["padding"],) * 2
    return fields | {"classes": shapes["head.fc.kernel"][1]}


def _naming(name: str, title: str, roles: Roles, *aliases: str) -> Naming:
    # Nobody has published weights, so nobody knows how their images are prepared.
    return Naming(
        family=LeNetSpec.family,
        name=name,
        title=title,
        roles=roles,
        layers=_layers(name),
        preprocessing=None,
        aliases=aliases,
    )


FAMILY = Family(
    namings=(
        _naming("pytorch", "PyTorch's ports", PYTORCH, "torchvision"),
        _naming("keras", "our Keras models", KERAS, "keras_applications"),
        _naming("flax", "our Flax models", FLAX),
    ),
    fields=fields_from,
)
PYTORCH_NAMES, KERAS_NAMES, _ = FAMILY.namings
