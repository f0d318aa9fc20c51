"""ResNet's layers in every community's names: torchvision and timm, Hugging Face, Keras today and once, Flax.

Keras' classic names (``res2a_branch2a``) are Caffe's and those of the first Keras ResNet-50; our own Keras models carry
them. keras.applications has no basic blocks: the same scheme is used for them.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_lowercase, digits
from typing import Any

from common.architectures.layers import Shape
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.errors import CheckpointError
from common.names import Beside, Family, Naming, Place, ShapeOf, Told, transformers
from common.names.roles import FLAX, KERAS, PYTORCH
from common.names.shapes import check_gap, kernels

_HF = "resnet.embedder.embedder"
# fmt: off
_COLUMNS = ("torchvision", "huggingface", "keras_applications", "keras_classic", "flax")
# The layers with arrays. ``{}`` is the name of the block; see the tables of blocks below. ``{i}`` is the number of
# a convolution before the stem's own; ``{conv}``, ``{norm}`` and ``{relu}`` their places in timm's `conv1`.
_HOLDING: dict[str, tuple[str | None, ...]] = {
    #                torchvision       Hugging Face                keras.applic.    classic           Flax's example
    "stem.conv":    ("conv1",          f"{_HF}.convolution",       "conv1_conv",    "conv1",          "conv_init"),
    "stem.norm":    ("bn1",            f"{_HF}.normalization",     "conv1_bn",      "bn_conv1",       "bn_init"),
    "stem.convN":   ("conv1.{conv}",   None,                       "conv1_{i}_conv","conv1_{i}",      "conv_init_{i}"),
    "stem.normN":   ("conv1.{norm}",   None,                       "conv1_{i}_bn",  "bn_conv1_{i}",   "bn_init_{i}"),
    "conv1":        ("{}.conv1",       "{}.layer.0.convolution",   "{}_1_conv",     "res{}_branch2a", "{}/Conv_0"),
    "norm1":        ("{}.bn1",         "{}.layer.0.normalization", "{}_1_bn",       "bn{}_branch2a",  "{}/BatchNorm_0"),
    "conv2":        ("{}.conv2",       "{}.layer.1.convolution",   "{}_2_conv",     "res{}_branch2b", "{}/Conv_1"),
    "norm2":        ("{}.bn2",         "{}.layer.1.normalization", "{}_2_bn",       "bn{}_branch2b",  "{}/BatchNorm_1"),
    "conv3":        ("{}.conv3",       "{}.layer.2.convolution",   "{}_3_conv",     "res{}_branch2c", "{}/Conv_2"),
    "norm3":        ("{}.bn3",         "{}.layer.2.normalization", "{}_3_bn",       "bn{}_branch2c",  "{}/BatchNorm_2"),
    "shortcut.conv":("{}.downsample.0","{}.shortcut.convolution",  "{}_0_conv",     "res{}_branch1",  "{}/conv_proj"),
    "shortcut.norm":("{}.downsample.1","{}.shortcut.normalization","{}_0_bn",       "bn{}_branch1",   "{}/norm_proj"),
    "se.conv1":     ("{}.se.fc1",      None,                       "{}_se_reduce",  "res{}_se_reduce","{}/se_reduce"),
    "se.conv2":     ("{}.se.fc2",      None,                       "{}_se_expand",  "res{}_se_expand","{}/se_expand"),
    # The classic name counts the classes, and keeps its number where people change it.
    "head.fc":      ("fc",             "classifier.1",             "predictions",   "fc{classes}",    "Dense_0"),
}
# The others, where a community has names for them.
_OTHERS: dict[str, tuple[str | None, ...]] = {
    #                 torchvision               keras.applications     classic
    "stem.relu":     ("relu",                   "conv1_relu",          "conv1_relu"),
    "stem.reluN":    ("conv1.{relu}",           "conv1_{i}_relu",      "conv1_{i}_relu"),
    "stem.pool":     ("maxpool",                "pool1_pool",          "pool1"),
    "relu1":         ("{}.relu",                "{}_1_relu",           "res{}_branch2a_relu"),
    "relu2":         ("{}.relu",                "{}_2_relu",           "res{}_branch2b_relu"),
    "relu3":         ("{}.relu",                "{}_3_relu",           "res{}_branch2c_relu"),
    "se.pool":       ("{}.se.avgpool",          "{}_se_squeeze",       "res{}_se_squeeze"),
    "se.relu":       ("{}.se.activation",       "{}_se_relu",          "res{}_se_relu"),
    "se.sigmoid":    ("{}.se.scale_activation", "{}_se_sigmoid",       "res{}_se_sigmoid"),
    "se.gate":       ("{}.se",                  "{}_se_excite",        "res{}_se_excite"),
    "shortcut.pool": (None,                     "{}_0_pool",           "res{}_branch1_pool"),
    "shortcut.pad":  ("{}.downsample",          "{}_0_pad",            "res{}_branch1"),
    "add":           (None,                     "{}_add",              "res{}"),
    "relu":          ("{}.relu",                "{}_out",              "res{}_relu"),
    "head.pool":     ("avgpool",                "avg_pool",            "pool5"),
    "head.flatten":  (None,                     "flatten",             "flatten"),
    "head.softmax":  ("softmax",                "predictions_softmax", "prob"),
}
# fmt: on
# timm's ResNet-D has its average pool before the projection, or nothing in its place where that does not stride.
_BEHIND_POOL = {
    "shortcut.pool": "{}.downsample.0",
    "shortcut.conv": "{}.downsample.1",
    "shortcut.norm": "{}.downsample.2",
}
_COLUMNS_OF_OTHERS = ("torchvision", "keras_applications", "keras_classic")
_KINDS = {"conv": "conv", "norm": "norm", "fc": "dense"}  # by the last word of a path
_FLAX_BLOCKS = {"basic": "ResNetBlock", "bottleneck": "BottleneckResNetBlock"}
_NUMBER = r"(?:0|[1-9]\d{0,4})"


def block_names(count: int) -> list[str]:
    """Classic names of the blocks of a stage: a, b, c, …; in Caffe's form a, b1, b2, … beyond the alphabet."""
    if count <= len(ascii_lowercase):
        return list(ascii_lowercase[:count])
    return ["a", *(f"b{i}" for i in range(1, count))]


def _classic_index(block: str) -> int:
    # Caffe's form stands for short stages too (res4b22 in ResNet-101).
    return ascii_lowercase.index(block) if len(block) == 1 else int(block[1:])


def _flax_block(spec: ResNetSpec, stage: int, block: int) -> str:
    # Blocks are numbered through all stages.
    return f"{_FLAX_BLOCKS[spec.block]}_{(0, *accumulate(spec.blocks))[stage] + block}"


def _flax_places(blocks: Collection[str], shape_of: ShapeOf) -> dict[str, tuple[int, int]]:
    """A stage begins where a block has other output channels than the one before it, or projects its shortcut.

    So two stages of one width are seen as one where the second neither strides nor projects: with dilation, or with
    parameter-free shortcuts. No shape tells them apart. Where every block of several has a projection, some are not
    used, and widths alone tell stages apart.
    """
    numbered = {int(block.rpartition("_")[2]): block for block in blocks}
    check_gap("blocks", numbered)
    places: dict[str, tuple[int, int]] = {}
    stage, index, width = -1, 0, None
    projecting = {block for block in blocks if shape_of(f"{block}/conv_proj", "conv", "kernel")}
    telling = projecting if projecting < set(blocks) else set()
    for _, block in sorted(numbered.items()):
        kernels = (shape_of(f"{block}/Conv_{i}", "conv", "kernel") for i in (2, 1, 0))
        found = next((kernel[-1] for kernel in kernels if kernel), None)
        if stage < 0 or found != width or block in telling:
            stage, index = stage + 1, 0
        places[block] = stage, index
        index, width = index + 1, found
    return places


def _each(parsed: Callable[[re.Match[str]], tuple[int, int]], pattern: str) -> "_Places":
    """Places of blocks whose name says stage and block."""
    return lambda blocks, shape_of: {
        block: parsed(match) for block in blocks if (match := re.fullmatch(pattern, block, re.ASCII))
    }


_Places = Callable[[Collection[str], ShapeOf], dict[str, tuple[int, int]]]


@dataclass(frozen=True)
class _Blocks:
    """How a community names the blocks: of a spec, by stage and number; as a pattern; and the way back."""

    name: Callable[[ResNetSpec, int, int], str]
    pattern: str
    places: _Places


def _numbered(name: str, stage: int, block: int) -> _Blocks:
    """Blocks with the numbers of their stage and their own in the name, the first of each as given."""
    pattern = re.escape(name).replace(r"\{\}", f"({_NUMBER})")
    # The headless model of Hugging Face leaves the beginning away.
    pattern = pattern.replace(r"resnet\.", r"(?:resnet\.)?")
    return _Blocks(
        lambda spec, s, b: name.format(s + stage, b + block),
        pattern,
        _each(lambda match: (int(match[1]) - stage, int(match[2]) - block), pattern),
    )


_BLOCKS = {
    "torchvision": _numbered("layer{}.{}", 1, 0),
    "huggingface": _numbered("resnet.encoder.stages.{}.layers.{}", 0, 0),
    "keras_applications": _numbered("conv{}_block{}", 2, 1),
    "keras_classic": _Blocks(
        lambda spec, s, b: f"{s + 2}{block_names(spec.blocks[s])[b]}",
        r"\d{1,5}?(?:[a-z]|b\d{1,5})",
        _each(lambda match: (int(match[1]) - 2, _classic_index(match[2])), r"(\d{1,5}?)([a-z]|b\d{1,5})"),
    ),
    "flax": _Blocks(_flax_block, rf"(?:{'|'.join(_FLAX_BLOCKS.values())})_(?:0|[1-9]\d{{0,5}})", _flax_places),
}
# Older spellings.
_ALSO = {"keras_applications": {"probs": Place("head.fc", "dense")}}


def _layers(column: str) -> Callable[[ResNetSpec], dict[str, str]]:
    """Of a spec, the names in a column of every layer that has one there."""
    index = _COLUMNS.index(column)
    table: dict[str, str | None] = {layer: row[index] for layer, row in _HOLDING.items()}
    if column in _COLUMNS_OF_OTHERS:
        index = _COLUMNS_OF_OTHERS.index(column)
        table |= {layer: row[index] for layer, row in _OTHERS.items()}

    def names(spec: ResNetSpec) -> dict[str, str]:
        rows = dict(table)
        if column == "torchvision" and spec.shortcut_pool:
            rows |= _BEHIND_POOL
        if column == "torchvision" and spec.deep_stem:
            rows |= {"stem.conv": f"conv1.{3 * len(spec.deep_stem)}"}
        found: dict[str, str] = {}
        for layer in spec.layers:
            block, part, number = "", layer.path, 0
            if part.startswith("stages."):
                _, stage, _, b, part = part.split(".", 4)
                block = _BLOCKS[column].name(spec, int(stage), int(b))
            elif part.startswith("stem.") and part[-1].isdigit():
                kind = part.rstrip(digits)
                part, number = f"{kind}N", int(part.removeprefix(kind))
            if layer.shares in found:
                found[layer.path] = found[layer.shares]
            elif (name := rows.get(part)) is not None:
                words = {"{}": block, "{classes}": spec.classes, "{i}": number}
                words |= {"{conv}": 3 * number - 3, "{norm}": 3 * number - 2, "{relu}": 3 * number - 1}
                for word, value in words.items():
                    name = name.replace(word, str(value))
                found[layer.path] = name
        return found

    return names


def _places(column: str, *, behind_pool: bool = False) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of names that are a column's; none where no block is among them.

    With `behind_pool` those of timm's ResNet-D alone, and without it those of all others.
    """
    index, blocks = _COLUMNS.index(column), _BLOCKS[column]
    named = {layer: row[index] for layer, row in _HOLDING.items()}
    if behind_pool:
        named |= {layer: name for layer, name in _BEHIND_POOL.items() if layer in _HOLDING}
    rows = [
        (re.compile(_pattern(name, blocks.pattern), re.ASCII), layer, _kind(layer))
        for layer, name in named.items()
        if name is not None
    ]

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        matches = [
            (name, match, layer, kind)
            for name in names
            for pattern, layer, kind in rows
            if (match := pattern.fullmatch(name)) and _fits(layer, kind, match, name, shape_of)
        ]
        inside = {match["block"] for _, match, _, _ in matches if "block" in match.groupdict()}
        where = blocks.places(inside, shape_of)
        if not where:
            return {}
        if behind_pool and not any(layer.startswith("shortcut.") for _, _, layer, _ in matches):
            return {}
        found = {name: place for name, place in _ALSO.get(column, {}).items() if name in names}
        for name, match, layer, kind in matches:
            if "block" not in match.groupdict():
                found[name] = Place(layer.replace("N", str(_number(match))), kind)
            elif min(place := where[match["block"]]) >= 0:
                found[name] = Place(f"stages.{place[0]}.blocks.{place[1]}.{layer}", kind)
        return _last_is_the_stem(found)

    return places


def _fits(layer: str, kind: str, match: re.Match[str], name: str, shape_of: ShapeOf) -> bool:
    """Whether a name that has the form of a layer's is one: two forms may be alike."""
    number = match.groupdict().get("place")
    if number is not None and (int(number) - (kind == "norm")) % 3:
        return False
    if layer.startswith("shortcut."):
        return (shape_of(name, "conv", "kernel") is not None) == (kind == "conv")
    return True


def _number(match: re.Match[str]) -> int:
    """The number of a convolution of the stem, or of its norm."""
    groups = match.groupdict()
    return int(groups["place"]) // 3 + 1 if groups.get("place") else int(groups.get("i") or 0)


def _last_is_the_stem(found: dict[str, Place]) -> dict[str, Place]:
    """timm numbers the stem's own convolution as those before it."""
    numbered = {name: place for name, place in found.items() if re.fullmatch(r"stem\.conv\d+", place.path)}
    if numbered and all(place.path != "stem.conv" for place in found.values()):
        last = max(numbered, key=lambda name: int(numbered[name].path.removeprefix("stem.conv")))
        found[last] = Place("stem.conv", "conv")
    return found


def _kind(layer: str) -> str:
    return _KINDS[layer.rpartition(".")[2].rstrip("123N")]


def _pattern(name: str, block: str) -> str:
    pattern = re.escape(name).replace(r"\{\}", f"(?P<block>{block})").replace(r"\{classes\}", r"\d{1,9}")
    for word, group in (("i", "i"), ("conv", "place"), ("norm", "place")):
        pattern = pattern.replace(rf"\{{{word}\}}", f"(?P<{group}>{_NUMBER})")
    return re.sub(r"^resnet\\\.", r"(?:resnet\\.)?", pattern)


def _blocks_in(names: Iterable[str]) -> tuple[int, ...]:
    """Number of blocks of every stage among canonical names."""
    stages: dict[int, set[int]] = {}
    for name in names:
        if name.startswith("stages."):
            _, stage, _, block, _ = name.split(".", 4)
            stages.setdefault(int(stage), set()).add(int(block))
    check_gap("stages", stages)
    for number, blocks in sorted(stages.items()):
        check_gap(f"blocks of stage {number}", blocks)
    return tuple(len(blocks) for _, blocks in sorted(stages.items()))


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any depth and width; and the stem's, where its kernel is a CIFAR network's."""
    kernel = kernels(shapes)
    blocks = _blocks_in(shapes)
    bottleneck = any(name.endswith(".conv3.kernel") for name in shapes)
    firsts = [f"stages.{stage}.blocks.0" for stage in range(len(blocks))]
    inner = [kernel(f"{first}.conv1")[3] for first in firsts]
    shared = _shared(shapes, blocks)
    # A shared convolution is as wide as the first.
    second = [
        f"{first}.conv{1 if shared == 'conv' and f'{first}.conv2.kernel' not in shapes else 2}" for first in firsts
    ]
    outer = [kernel(f"{first}.conv3" if bottleneck else conv)[3] for first, conv in zip(firsts, second, strict=True)]
    read = kernel(second[-1])[2]
    stem = kernel("stem.conv")
    expansion = 4 if bottleneck and all(width % 4 == 0 for width in outer) else 1
    widths = tuple(width // expansion for width in outer)
    projected = [first for first in firsts if f"{first}.shortcut.conv.kernel" in shapes]
    fields: dict[str, Any] = {
        "block": "bottleneck" if bottleneck else "basic",
        "blocks": blocks,
        "widths": widths,
        "expansion": expansion,
        "in_channels": kernel("stem.conv1" if "stem.conv1.kernel" in shapes else "stem.conv")[2],
        "stem_kernel": stem[0],
        "stem_width": stem[3],
        "conv_bias": "stem.conv.bias" in shapes,
        "norm": "stem.norm.scale" in shapes,
        "shortcut_pool": bool(_deep(shapes)),  # in timm they go together, and others have neither
        "deep_stem": tuple(kernel(f"stem.conv{i + 1}")[3] for i in range(_deep(shapes))),
        "squeeze": tuple(kernel(f"{first}.se.conv1")[3] for first in firsts if f"{first}.se.conv1.kernel" in shapes),
        "shared": shared,
        "unused_projection": _unused_projection(shapes, blocks, outer[0]),
        "shortcut": "projection" if projected or len(set(outer)) == 1 else "zero_pad",
    }
    if stem[0] < 7 and not fields["deep_stem"]:
        # The CIFAR networks' stem; a 7x7 one halves the image and pools.
        fields |= {"stem_stride": 1, "stem_pool": False}
    if bottleneck:
        # inner = width * width_per_group // 64 * groups, the same width_per_group in all stages
        groups = inner[-1] // read if read and inner[-1] % read == 0 else 1
        fields |= {"groups": groups, "width_per_group": max(inner[0] * 64 // max(widths[0] * groups, 1), 1)}
    if fields["norm"] and projected:
        fields["shortcut_norm"] = any(f"{first}.shortcut.norm.scale" in shapes for first in projected)
    dense = shapes.get("head.fc.kernel")
    if dense is None:
        return fields
    if dense[0] != outer[-1]:
        raise CheckpointError(
            f"the classifier reads {dense[0]} features of a map with {outer[-1]} channels: a head that flattens, whose "
            "weights do not show the size of its map; such a network can be read from our canonical file only"
        )
    return fields | {"classes": dense[1]}


def _deep(shapes: Mapping[str, Shape]) -> int:
    """The number of convolutions before the stem's own."""
    numbers = {int(match[1]) - 1 for name in shapes if (match := re.match(r"stem\.conv(\d+)\.", name))}
    check_gap("convolutions of the stem", numbers)
    return len(numbers)


def _unused_projection(shapes: Mapping[str, Shape], blocks: Sequence[int], channels: int) -> bool:
    """Whether a block has a projection that needs none. The first of a stage has its own, but for the first stage's
    where it has as many channels as the stem."""
    needless = [f"stages.{s}.blocks.{b}" for s, count in enumerate(blocks) for b in range(1, count)]
    if shapes["stem.conv.kernel"][3] == channels:
        needless.append("stages.0.blocks.0")
    return any(f"{block}.shortcut.conv.kernel" in shapes for block in needless)


def _shared(shapes: Mapping[str, Shape], blocks: Sequence[int]) -> str:
    """What no block has a second one of, where it could be the first: a norm, or a convolution and its norm."""
    # The first block of a stage may widen or stride, and then has two of each.
    later = [f"stages.{s}.blocks.{b}" for s, count in enumerate(blocks) for b in range(1, count)]
    block = (later or ["stages.0.blocks.0"])[0]
    if f"{block}.conv1.kernel" in shapes and f"{block}.conv2.kernel" not in shapes:
        return "conv"
    return "norm" if f"{block}.norm1.scale" in shapes and f"{block}.norm2.scale" not in shapes else "none"


def _config_of(spec: ResNetSpec, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of transformers' `ResNetConfig`. Raises `CheckpointError` for a network that is none of its."""
    bottleneck = spec.block == "bottleneck"
    classifier = spec.head != "none"
    config = {
        "architectures": ["ResNetForImageClassification" if classifier else "ResNetModel"],
        "model_type": "resnet",
        "num_channels": spec.in_channels,
        "embedding_size": spec.stem_width,
        "hidden_sizes": [width * spec.expansion for width in spec.widths],
        "depths": list(spec.blocks),
        "layer_type": spec.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": bottleneck and spec.stride_in == "conv1",
    }
    if classifier:
        config |= transformers.labels(spec.classes, class_names)
    theirs = ResNetSpec(
        block=spec.block,
        blocks=spec.blocks,
        widths=spec.widths,
        in_channels=spec.in_channels,
        classes=spec.classes,
        stem_width=spec.stem_width,
        stride_in=spec.stride_in if bottleneck else None,  # type: ignore[arg-type]
        bn_momentum=spec.bn_momentum,  # of training alone
        running_variance=spec.running_variance,
        head="logits" if classifier else "none",
        head_pool="none" if spec.head_pool == "none" else "average",
    )
    if spec != theirs:
        fields = [name for name, value in vars(theirs).items() if vars(spec).get(name) != value]
        raise CheckpointError(
            f"transformers has no config for a network with {', '.join(f'{f}={getattr(spec, f)!r}' for f in fields)}; "
            "write a file of another name than model.safetensors, which gets none"
        )
    return config


def _told_by_config(config: Mapping[str, Any]) -> Told:
    """What a ``config.json`` says and no shape shows. Raises `CheckpointError` for a network that none of ours is."""
    if config.get("model_type") != "resnet":
        return Told()
    if config.get("downsample_in_first_stage") is True or config.get("hidden_act", "relu") != "relu":
        raise CheckpointError(
            "config.json beside it asks for a first stage with stride 2, or for no ReLU; no spec has that"
        )
    notes: tuple[str, ...] = ()
    if config.get("downsample_in_bottleneck") is True:
        notes = ("config.json beside it says downsample_in_bottleneck: set stride_in=conv1",)
    return Told(notes=notes, class_names=transformers.class_names(config))


def _naming(column: str, **options: Any) -> Naming:
    made: dict[str, Any] = {"name": column, "layers": _layers(column), "places": _places(column)}
    return Naming(family=ResNetSpec.family, **(made | options))


TORCHVISION = _naming(
    "torchvision",
    title="torchvision and timm",
    roles=PYTORCH,
    convention={"shortcut_pool": False},
    preprocessing="torchvision",
    aliases=("pytorch",),
)
# Other names for the projections of ResNet-D alone.
TIMM = _naming(
    "torchvision",
    name="timm",
    title="timm",
    places=_places("torchvision", behind_pool=True),
    roles=PYTORCH,
    convention={"shortcut_pool": True},
    preprocessing="torchvision",
)
HUGGING_FACE = _naming(
    "huggingface",
    title="Hugging Face transformers",
    roles=PYTORCH,
    preprocessing="torchvision",
    aliases=("hf",),
    beside=Beside(
        name="config.json",
        weights="model.safetensors",
        write=_config_of,
        free=("architectures", "id2label", "label2id"),
        read=_told_by_config,
    ),
)
KERAS_APPLICATIONS = _naming(
    "keras_applications",
    title="keras.applications",
    roles=KERAS,
    convention=CONVENTIONS["keras_applications"],
    preprocessing="keras_caffe",
    aliases=("keras",),
    shortcut_first=True,
)
KERAS_CLASSIC = _naming(
    "keras_classic",
    title="classic Keras",
    roles=KERAS,
    convention=CONVENTIONS["keras_classic"],
    preprocessing="keras_caffe",
)
FLAX_EXAMPLE = _naming(
    "flax",
    title="the Flax example",
    roles=FLAX,
    convention=CONVENTIONS["flax_examples"],
    preprocessing="flax",
)
FAMILY = Family(
    namings=(TORCHVISION, TIMM, HUGGING_FACE, KERAS_APPLICATIONS, KERAS_CLASSIC, FLAX_EXAMPLE), fields=fields_from
)
