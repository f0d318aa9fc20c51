"""EfficientNet's layers in every community's names: torchvision, timm, keras.applications; and in Flax, which has none
of its own, the canonical ones."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from common.architectures.efficientnet import CONVENTIONS, VARIANTS, EfficientNetSpec, plain_variant
from common.architectures.layers import Shape
from common.errors import CheckpointError
from common.names import Constants, Family, Naming, Place, ShapeOf
from common.names.roles import FLAX, KERAS, PYTORCH

# fmt: off
_COLUMNS = ("torchvision", "timm", "keras_applications", "flax")
# ``{s}`` and ``{b}`` are the numbers of a stage and of a block in it; ``{s1}`` counts from 1, ``{letter}`` is its
# in Keras, ``{top}`` the place of the last convolution. Where a block does not expand its other parts move up: ``{d}``,
# ``{g}`` and ``{p}`` are the places of depthwise, gate and projection in torchvision's `block`, ``{nd}`` and ``{np}``
# timm's numbers of their norms; and what timm calls `conv_pw` is the projection there, and the expansion elsewhere.
_BLOCK = ("features.{s1}.{b}.", "blocks.{s}.{b}.", "block{s1}{letter}_", "stages.{s}.blocks.{b}.")
_PARTS: dict[str, tuple[str | None, ...]] = {
    # part: (kind)     torchvision                    timm               keras.applications      Flax
    "expand":         ("block.0.0",                   "conv_pw",         "expand_conv",          "expand"),
    "expand_norm":    ("block.0.1",                   "bn1",             "expand_bn",            "expand_norm"),
    "expand_act":     ("block.0.2",                   None,              "expand_activation",    None),
    "depthwise":      ("block.{d}.0",                 "conv_dw",         "dwconv",               "depthwise"),
    "depthwise_norm": ("block.{d}.1",                 "bn{nd}",          "bn",                   "depthwise_norm"),
    "depthwise_act":  ("block.{d}.2",                 None,              "activation",           None),
    "squeeze_pool":   ("block.{g}.avgpool",           None,              "se_squeeze",           None),
    "squeeze":        ("block.{g}.fc1",               "se.conv_reduce",  "se_reduce",            "squeeze"),
    "squeeze_act":    ("block.{g}.activation",        None,              "se_reduce_activation", None),
    "excite":         ("block.{g}.fc2",               "se.conv_expand",  "se_expand",            "excite"),
    "excite_act":     ("block.{g}.scale_activation",  None,              "se_expand_activation", None),
    "gate":           ("block.{g}.mul",               None,              "se_excite",            None),
    "project":        ("block.{p}.0",                 "conv_{pw}",       "project_conv",         "project"),
    "project_norm":   ("block.{p}.1",                 "bn{np}",          "project_bn",           "project_norm"),
    "drop":           ("stochastic_depth",            None,              "drop",                 None),
    "add":            ("add",                         None,              "add",                  None),
}
_ENDS: dict[str, tuple[str | None, ...]] = {
    "stem.affine":    ("normalize",                   None,              "normalization",        None),
    "stem.conv":      ("features.0.0",                "conv_stem",       "stem_conv",            "stem.conv"),
    "stem.norm":      ("features.0.1",                "bn1",             "stem_bn",              "stem.norm"),
    "stem.act":       ("features.0.2",                None,              "stem_activation",      None),
    "head.conv":      ("features.{top}.0",            "conv_head",       "top_conv",             "head.conv"),
    "head.norm":      ("features.{top}.1",            "bn2",             "top_bn",               "head.norm"),
    "head.act":       ("features.{top}.2",            None,              "top_activation",       None),
    "head.pool":      ("avgpool",                     None,              "avg_pool",             None),
    "head.dropout":   ("classifier.0",                None,              "top_dropout",          None),
    "head.fc":        ("classifier.1",                "classifier",      "predictions",          "head.fc"),
    "head.softmax":   ("softmax",                     None,              "predictions_softmax",  None),
}
# fmt: on
_KINDS = {"depthwise": "depthwise", "fc": "dense", "norm": "norm", "expand_norm": "norm", "depthwise_norm": "norm"}
_KINDS |= {"project_norm": "norm"}
_CONVOLUTIONS = ("expand", "squeeze", "excite", "project")


def _words(expands: bool, gated: bool) -> dict[str, Any]:
    depthwise = int(expands)
    numbers = {"d": depthwise, "g": depthwise + 1, "p": depthwise + 1 + gated, "nd": depthwise + 1, "np": depthwise + 2}
    return numbers | {"pw": "pwl" if expands else "pw"}


def _letter(block: int) -> str:
    """Keras counts blocks by letters, and no published network has more of them than there are."""
    return chr(ord("a") + block) if block < 26 else f"z{block}"


def _layers(column: str) -> Callable[[EfficientNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)

    def names(spec: EfficientNetSpec) -> dict[str, str]:
        found = {}
        paths = [layer.path for layer in spec.layers]
        here = set(paths)
        for path in paths:
            where, _, part = path.rpartition(".")
            if where.startswith("stages"):
                _, s, _, b = where.split(".")
                words = _words(f"{where}.expand" in here, f"{where}.gate" in here)
                words |= {"s": s, "s1": int(s) + 1, "b": b, "letter": _letter(int(b))}
                name = _PARTS[part][index]
                name = name and _BLOCK[index] + name
            else:
                words = {"top": len(spec.widths) + 1}
                name = _ENDS[path][index]
            if name is not None:
                found[path] = name.format(**words)
        return found

    return names


def _form(index: int, expands: bool, gated: bool) -> dict[str, str]:
    """What the parts of a block that hold arrays are called in a column; the part by its name."""
    without = (*(() if expands else ("expand", "expand_norm")), *(() if gated else ("squeeze", "excite")))
    words, holders = _words(expands, gated), (*_CONVOLUTIONS, *_KINDS)
    rows = {part: row[index] for part, row in _PARTS.items() if part in holders and part not in without}
    return {name.format(**words): part for part, name in rows.items() if name is not None}


def _places(column: str) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of a column's names, of any number of stages and blocks."""
    index = _COLUMNS.index(column)
    forms = [_form(index, expands, gated) for expands in (True, False) for gated in (True, False)]
    start = re.escape(_BLOCK[index]).replace(r"\{s1\}", r"(?P<s1>\d{1,4})").replace(r"\{s\}", r"(?P<s>\d{1,4})")
    start = start.replace(r"\{b\}", r"(?P<b>\d{1,4})").replace(r"\{letter\}", r"(?P<letter>[a-z]|z\d{2,4})")
    address = re.compile(start)

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        blocks: dict[tuple[int, int], dict[str, str]] = {}
        for name in names:
            if found := address.match(name):
                words = found.groupdict()
                stage = int(words["s1"]) - 1 if "s1" in words else int(words["s"])
                letter = words.get("letter", "")
                block = int(words["b"]) if "b" in words else int(letter[1:] or ord(letter) - ord("a"))
                blocks.setdefault((stage, block), {})[name[found.end() :]] = name
        table: dict[str, Place] = {}
        for (s, b), rests in blocks.items():
            form = min(forms, key=lambda form: len(form.keys() ^ rests.keys()))
            for rest, name in rests.items():
                if rest in form:
                    table[name] = Place(f"stages.{s}.blocks.{b}.{form[rest]}", _KINDS.get(form[rest], "conv"))
        stages = 1 + max((s for s, _ in blocks), default=0)
        for path, row in _ENDS.items():
            part = path.rpartition(".")[2]
            if (end := row[index]) is not None and part in ("conv", "norm", "fc"):
                name = end.format(top=stages + 1)
                if name in names and name not in table:
                    table[name] = Place(path, _KINDS.get(part, "conv"))
        return table

    return places


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any width, depth and kernel; and of a published scaling what its own norms and
    dropout are."""
    kernels = {name.removesuffix(".kernel"): shape for name, shape in shapes.items() if name.endswith(".kernel")}
    found = {tuple(map(int, path.split(".")[1:4:2])) for path in kernels if path.startswith("stages.")}
    repeats = [sum(stage == s for stage, _ in found) for s in range(1 + max((s for s, _ in found), default=-1))]
    ends = [end for end in ("stem.conv", "head.conv") if end not in kernels]
    lost = [f"stages.{s}.blocks.{b}" for s, count in enumerate(repeats) for b in range(count) if (s, b) not in found]
    blocks = [f"stages.{s}.blocks.{b}" for s, count in enumerate(repeats) for b in range(count)]
    lost += [
        f"{block}.{part}" for block in blocks for part in ("depthwise", "project") if f"{block}.{part}" not in kernels
    ]
    if not all(repeats) or not repeats or ends or lost:
        raise CheckpointError(f"{(*ends, *lost, 'a stage')[0]} is missing; is the file whole?")
    firsts = [f"stages.{s}.blocks.0" for s in range(len(repeats))]
    read = [kernels["stem.conv"][3], *(kernels[f"{first}.project"][3] for first in firsts)]
    fields: dict[str, Any] = {
        "widths": tuple(read[1:]),
        "repeats": tuple(repeats),
        "expand": tuple(kernels[f"{b}.depthwise"][3] // width for b, width in zip(firsts, read, strict=False)),
        "kernels": tuple(kernels[f"{first}.depthwise"][0] for first in firsts),
        "stem_width": kernels["stem.conv"][3],
        "head_width": kernels["head.conv"][3],
        "in_channels": kernels["stem.conv"][2],
        "norm": "stem.norm.scale" in shapes,
    }
    squeezed = [
        (kernels[f"{b}.squeeze"][3], w) for b, w in zip(firsts, read, strict=False) if f"{b}.squeeze" in kernels
    ]
    if not squeezed:
        fields |= {"se_ratio": 0.0, "activation": "relu6"}  # EfficientNet-Lite's
    elif any(int(width * 0.25) != count for count, width in squeezed if count > 1):
        count, width = max(squeezed)
        fields |= {"se_ratio": count / width}
    name = plain_variant(widths=fields["widths"], repeats=fields["repeats"], head_width=fields["head_width"])
    if name:
        spec = VARIANTS[name]
        fields |= {field: getattr(spec, field) for field in ("bn_eps", "bn_momentum", "dropout")}
    dense = shapes.get("head.fc.kernel")
    return fields if dense is None else fields | {"classes": dense[1]}


# The layer `normalization` of keras.applications. Keras divides by the root of what is called variance there. In the
# published files that is the deviation of ImageNet's images, and the model that is made for them divides by its root
# once more in a layer without arrays; one that is made without them has a mean of 0 and a variance of 1.
_PUBLISHED = {"mean": CONVENTIONS["keras_applications"]["input_mean"]}
_PUBLISHED |= {"variance": CONVENTIONS["keras_applications"]["input_std"]}


def _published(**arrays: Any) -> bool:
    return all(
        np.shape(arrays[role]) == (3,) and np.allclose(arrays[role], _PUBLISHED[role], 1e-4, 0) for role in arrays
    )


def normalization(spec: EfficientNetSpec) -> dict[str, np.ndarray]:
    """Mean, variance and count as keras.applications stores them; none where the images come normalised."""
    if not spec.input_mean:
        return {}
    mean, std = np.array(spec.input_mean), np.array(spec.input_std)
    variance = std if _published(mean=mean, variance=std) else std**2
    return {"mean": mean.astype(np.float32), "variance": variance.astype(np.float32), "count": np.zeros((), np.int32)}


def _told(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The fields that these arrays say. Raises `CheckpointError` where they cannot be."""
    if not arrays:
        return {"input_mean": (), "input_std": ()}
    if missing := [role for role in ("mean", "variance") if role not in arrays]:
        raise CheckpointError(f"normalization/{missing[0]} is missing; is the file whole?")
    mean, variance = arrays["mean"], arrays["variance"]
    if mean.ndim != 1 or mean.shape != variance.shape or not (np.isfinite(mean).all() and (variance > 0).all()):
        raise CheckpointError(
            f"normalization holds mean {mean.tolist()} and variance {variance.tolist()}, none of an image"
        )
    # The shortest decimals that are these numbers, as people wrote them.
    exact = tuple(float(str(value)) for value in mean)
    if _published(mean=mean, variance=variance):
        return {"input_mean": exact, "input_std": tuple(float(str(value)) for value in variance)}
    return {"input_mean": exact, "input_std": tuple(np.sqrt(variance.astype(np.float64)).tolist())}


def _naming(name: str, **options: Any) -> Naming:
    return Naming(family=EfficientNetSpec.family, name=name, layers=_layers(name), places=_places(name), **options)


TORCHVISION = _naming("torchvision", title="torchvision", roles=PYTORCH, preprocessing="timm")
TIMM = _naming("timm", title="timm", roles=PYTORCH, convention=CONVENTIONS["timm"], preprocessing="timm")
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    title="keras.applications",
    roles=KERAS,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_raw",
    aliases=("keras",),
    constants=Constants(
        layer="normalization",
        # Keras numbers such layers in the order in which a process makes them.
        pattern=re.compile(r"normalization(_\d+)?/(?P<role>mean|variance|count)"),
        arrays=normalization,
        fields=_told,
    ),
)
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX, preprocessing="timm")
FAMILY = Family(namings=(TORCHVISION, TIMM, KERAS_APPLICATIONS, CANONICAL_FLAX), fields=fields_from)
