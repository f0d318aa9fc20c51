"""EfficientNet's layers in every community's names: torchvision, timm, Hugging Face transformers, keras.applications;
and in Flax, which has none of its own, the canonical ones."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from common.architectures.efficientnet import CONVENTIONS, SCALINGS, VARIANTS, EfficientNetSpec, plain_variant
from common.architectures.layers import Shape
from common.errors import CheckpointError
from common.names import Beside, Constants, Family, Naming, Place, ShapeOf, Told, transformers
from common.names.roles import FLAX, KERAS, PYTORCH

# fmt: off
_COLUMNS = ("torchvision", "timm", "keras_applications", "flax", "huggingface")
# ``{s}`` and ``{b}`` are the numbers of a stage and of a block in it; ``{s1}`` counts from 1, ``{n}`` the blocks of all
# stages; ``{letter}`` is a block's in Keras, ``{top}`` the place of the last convolution. Where a block does not expand
# its other parts move up: ``{d}``, ``{g}`` and ``{p}`` are the places of depthwise, gate and projection in
# torchvision's `block`, ``{nd}`` and ``{np}`` timm's numbers of their norms; and what timm calls `conv_pw` is the
# projection there, and the expansion elsewhere.
_BLOCK = (
    "features.{s1}.{b}.", "blocks.{s}.{b}.", "block{s1}{letter}_", "stages.{s}.blocks.{b}.",
    "efficientnet.encoder.blocks.{n}.",
)
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
# A row's last column: transformers names what holds arrays, and nothing moves up.
_OF_TRANSFORMERS = {
    "expand": "expansion.expand_conv",                "expand_norm": "expansion.expand_bn",
    "depthwise": "depthwise_conv.depthwise_conv",     "depthwise_norm": "depthwise_conv.depthwise_norm",
    "squeeze": "squeeze_excite.reduce",               "excite": "squeeze_excite.expand",
    "project": "projection.project_conv",             "project_norm": "projection.project_bn",
    "stem.conv": "efficientnet.embeddings.convolution", "stem.norm": "efficientnet.embeddings.batchnorm",
    "head.conv": "efficientnet.encoder.top_conv",     "head.norm": "efficientnet.encoder.top_bn",
    "head.fc": "classifier",
}
_PARTS, _ENDS = (
    {name: (*row, _OF_TRANSFORMERS.get(name)) for name, row in rows.items()} for rows in (_PARTS, _ENDS)
)
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
                words |= {"n": sum(spec.repeats[: int(s)]) + int(b)}
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
    start = start.replace(r"\{n\}", r"(?P<n>\d{1,4})")
    address = re.compile(start)

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        blocks: dict[tuple[int, int], dict[str, str]] = {}
        for name in names:
            if found := address.match(name):
                words = found.groupdict()
                if "n" in words:
                    blocks.setdefault((0, int(words["n"])), {})[name[found.end() :]] = name
                    continue
                stage = int(words["s1"]) - 1 if "s1" in words else int(words["s"])
                letter = words.get("letter", "")
                block = int(words["b"]) if "b" in words else int(letter[1:] or ord(letter) - ord("a"))
                blocks.setdefault((stage, block), {})[name[found.end() :]] = name
        if column == "huggingface":
            blocks = _by_width(blocks, shape_of)
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


def _by_width(blocks: Mapping[tuple[int, int], dict[str, str]], shape_of: ShapeOf) -> dict[tuple[int, int], Any]:
    """Blocks that are numbered through all stages, by stage and number: one begins where a block gives other channels
    than the one before it. Two stages of one width are seen as one."""
    found: dict[tuple[int, int], Any] = {}
    stage, first, width = -1, 0, None
    for (_, number), rests in sorted(blocks.items()):
        kernel = shape_of(rests.get("projection.project_conv", ""), "conv", "kernel")
        channels = kernel[-1] if kernel else None
        if stage < 0 or channels != width:
            stage, first, width = stage + 1, number, channels
        found[stage, number - first] = rests
    return found


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


def _config_of(spec: EfficientNetSpec, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of transformers' `EfficientNetConfig`. Raises `CheckpointError` for a network that is none of its."""
    scaled = plain_variant(widths=spec.widths, repeats=spec.repeats, head_width=spec.head_width)
    of_training = ("bn_momentum", "running_variance", "stochastic_depth", "dropout")
    taken = {name: getattr(spec, name) for name in ("in_channels", "classes", *of_training)}
    theirs = VARIANTS[scaled or "efficientnet_b0"].replace(**{**HUGGING_FACE.convention, **taken})
    if spec != theirs:
        fields = [name for name, value in vars(theirs).items() if vars(spec).get(name) != value]
        raise CheckpointError(
            f"transformers has no config for a network with {', '.join(f'{f}={getattr(spec, f)!r}' for f in fields)}; "
            "write a file of another name than model.safetensors, which gets none"
        )
    assert scaled is not None
    scaling = SCALINGS[scaled]
    return {
        "architectures": ["EfficientNetForImageClassification"],
        "model_type": "efficientnet",
        "num_channels": spec.in_channels,
        "image_size": scaling.size,
        "width_coefficient": scaling.width,
        "depth_coefficient": scaling.depth,
        "hidden_dim": spec.head_width,
        "dropout_rate": spec.dropout,
        "drop_connect_rate": spec.stochastic_depth,
        "batch_norm_eps": spec.bn_eps,
        # Blocks that stride where their map is odd, at that size.
        "depthwise_padding": _odd_maps(spec, scaling.size),
        **transformers.labels(spec.classes, class_names),
    }


def _odd_maps(spec: EfficientNetSpec, side: int) -> list[int]:
    """Numbers of the blocks whose depthwise convolution strides over a map of odd sides, for square images."""
    side, blocks, found = -(-side // 2), [block for stage in spec.stages for block in stage], []
    for number, block in enumerate(blocks):
        if block.stride == 2:
            found += [number] if side % 2 else []
            side = -(-side // 2)
    return found


def _told_by_config(config: Mapping[str, Any]) -> Told:
    return Told(class_names=transformers.class_names(config) if config.get("model_type") == "efficientnet" else ())


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
HUGGING_FACE = _naming(
    "huggingface",
    title="Hugging Face transformers",
    roles=PYTORCH,
    # Ports of Keras' weights. The library gives PyTorch Keras' momentum, 0.99 of the new: of a training there alone.
    convention=CONVENTIONS["huggingface"],
    preprocessing="keras_torch",
    aliases=("hf",),
    beside=Beside(
        name="config.json",
        weights="model.safetensors",
        write=_config_of,
        free=("architectures", "id2label", "label2id"),
        read=_told_by_config,
    ),
)
CANONICAL_FLAX = _naming("flax", title="our Flax models", roles=FLAX, preprocessing="timm")
FAMILY = Family(namings=(TORCHVISION, TIMM, HUGGING_FACE, KERAS_APPLICATIONS, CANONICAL_FLAX), fields=fields_from)
