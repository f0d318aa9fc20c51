"""ResNet's layers in every community's names: torchvision and timm, Hugging Face, Keras today and once, Flax.

Keras' classic names (``res2a_branch2a``) are Caffe's and those of the first Keras ResNet-50; our own Keras models carry
them. keras.applications has no basic blocks: the same scheme is used for them.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_lowercase
from typing import Any

from common.architectures.layers import Shape
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.errors import CheckpointError
from common.names import Beside, Family, Naming, Place, ShapeOf, Told
from common.names.roles import FLAX, KERAS, PYTORCH

_HF = "resnet.embedder.embedder"
# fmt: off
_COLUMNS = ("torchvision", "huggingface", "keras_applications", "keras_classic", "flax")
# The layers with arrays. ``{}`` is the name of the block; see the tables of blocks below.
_HOLDING: dict[str, tuple[str, ...]] = {
    #                 torchvision        Hugging Face                keras.applications  classic      Flax's example
    "stem.conv":     ("conv1",           f"{_HF}.convolution",       "conv1_conv",  "conv1",          "conv_init"),
    "stem.norm":     ("bn1",             f"{_HF}.normalization",     "conv1_bn",    "bn_conv1",       "bn_init"),
    "conv1":         ("{}.conv1",        "{}.layer.0.convolution",   "{}_1_conv",   "res{}_branch2a", "{}/Conv_0"),
    "norm1":         ("{}.bn1",          "{}.layer.0.normalization", "{}_1_bn",     "bn{}_branch2a",  "{}/BatchNorm_0"),
    "conv2":         ("{}.conv2",        "{}.layer.1.convolution",   "{}_2_conv",   "res{}_branch2b", "{}/Conv_1"),
    "norm2":         ("{}.bn2",          "{}.layer.1.normalization", "{}_2_bn",     "bn{}_branch2b",  "{}/BatchNorm_1"),
    "conv3":         ("{}.conv3",        "{}.layer.2.convolution",   "{}_3_conv",   "res{}_branch2c", "{}/Conv_2"),
    "norm3":         ("{}.bn3",          "{}.layer.2.normalization", "{}_3_bn",     "bn{}_branch2c",  "{}/BatchNorm_2"),
    "shortcut.conv": ("{}.downsample.0", "{}.shortcut.convolution",  "{}_0_conv",   "res{}_branch1",  "{}/conv_proj"),
    "shortcut.norm": ("{}.downsample.1", "{}.shortcut.normalization","{}_0_bn",     "bn{}_branch1",   "{}/norm_proj"),
    # The classic name counts the classes, and keeps its number where people change it.
    "head.fc":       ("fc",              "classifier.1",             "predictions", "fc{classes}",    "Dense_0"),
}
# The others, where a community has names for them.
_OTHERS: dict[str, tuple[str | None, ...]] = {
    #                 torchvision      keras.applications     classic
    "stem.relu":     ("relu",          "conv1_relu",          "conv1_relu"),
    "stem.pool":     ("maxpool",       "pool1_pool",          "pool1"),
    "relu1":         ("{}.relu",       "{}_1_relu",           "res{}_branch2a_relu"),
    "relu2":         ("{}.relu",       "{}_2_relu",           "res{}_branch2b_relu"),
    "shortcut.pad":  ("{}.downsample", "{}_0_pad",            "res{}_branch1"),
    "add":           (None,            "{}_add",              "res{}"),
    "relu":          ("{}.relu",       "{}_out",              "res{}_relu"),
    "head.pool":     ("avgpool",       "avg_pool",            "pool5"),
    "head.flatten":  (None,            "flatten",             "flatten"),
    "head.softmax":  ("softmax",       "predictions_softmax", "prob"),
}
# fmt: on
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
    parameter-free shortcuts. No shape tells them apart.
    """
    numbered = {int(block.rpartition("_")[2]): block for block in blocks}
    _check_gap("blocks", numbered)
    places: dict[str, tuple[int, int]] = {}
    stage, index, width = -1, 0, None
    for _, block in sorted(numbered.items()):
        kernels = (shape_of(f"{block}/Conv_{i}", "conv", "kernel") for i in (2, 1, 0))
        found = next((kernel[-1] for kernel in kernels if kernel), None)
        if stage < 0 or found != width or shape_of(f"{block}/conv_proj", "conv", "kernel"):
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
        found = {}
        for layer in spec.layers:
            block, part = "", layer.path
            if part.startswith("stages."):
                _, stage, _, number, part = part.split(".", 4)
                block = _BLOCKS[column].name(spec, int(stage), int(number))
            if (name := table.get(part)) is not None:
                found[layer.path] = name.replace("{}", block).replace("{classes}", str(spec.classes))
        return found

    return names


def _places(column: str) -> Callable[[Collection[str], ShapeOf], dict[str, Place]]:
    """The places of names that are a column's; none where no block is among them."""
    index, blocks = _COLUMNS.index(column), _BLOCKS[column]
    rows = [
        (re.compile(_pattern(row[index], blocks.pattern), re.ASCII), layer, _kind(layer))
        for layer, row in _HOLDING.items()
    ]

    def places(names: Collection[str], shape_of: ShapeOf) -> dict[str, Place]:
        matches = {
            name: (match, layer, kind)
            for name in names
            for pattern, layer, kind in rows
            if (match := pattern.fullmatch(name))
        }
        inside = {match["block"] for match, _, _ in matches.values() if "block" in match.groupdict()}
        where = blocks.places(inside, shape_of)
        if not where:
            return {}
        found = {name: place for name, place in _ALSO.get(column, {}).items() if name in names}
        for name, (match, layer, kind) in matches.items():
            if "block" not in match.groupdict():
                found[name] = Place(layer, kind)
            elif min(place := where[match["block"]]) >= 0:
                found[name] = Place(f"stages.{place[0]}.blocks.{place[1]}.{layer}", kind)
        return found

    return places


def _kind(layer: str) -> str:
    return _KINDS[layer.rpartition(".")[2].rstrip("123")]


def _pattern(name: str, block: str) -> str:
    pattern = re.escape(name).replace(r"\{\}", f"(?P<block>{block})").replace(r"\{classes\}", r"\d{1,9}")
    return re.sub(r"^resnet\\\.", r"(?:resnet\\.)?", pattern)


def _check_gap(what: str, numbers: Collection[int]) -> None:
    """Raise `CheckpointError` where one is missing in between: the file is not whole."""
    # Not the difference to a whole range: a hostile name may hold any number.
    if numbers and max(numbers) >= len(numbers):
        gap = next(number for number in range(len(numbers)) if number not in numbers)
        raise CheckpointError(f"the {what} have a gap: number {gap} is missing, and {max(numbers)} is there")


def _blocks_in(names: Iterable[str]) -> tuple[int, ...]:
    """Number of blocks of every stage among canonical names."""
    stages: dict[int, set[int]] = {}
    for name in names:
        if name.startswith("stages."):
            _, stage, _, block, _ = name.split(".", 4)
            stages.setdefault(int(stage), set()).add(int(block))
    _check_gap("stages", stages)
    for number, blocks in sorted(stages.items()):
        _check_gap(f"blocks of stage {number}", blocks)
    return tuple(len(blocks) for _, blocks in sorted(stages.items()))


def fields_from(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that shapes show, of any depth and width; and the stem's, where its kernel is a CIFAR network's."""

    def kernel(layer: str) -> Shape:
        shape = shapes.get(f"{layer}.kernel")
        if shape is None:
            raise CheckpointError(f"no kernel of {layer} is there; is the file whole?")
        return shape

    blocks = _blocks_in(shapes)
    bottleneck = any(name.endswith(".conv3.kernel") for name in shapes)
    firsts = [f"stages.{stage}.blocks.0" for stage in range(len(blocks))]
    inner = [kernel(f"{first}.conv1")[3] for first in firsts]
    outer = [kernel(f"{first}.conv{3 if bottleneck else 2}")[3] for first in firsts]
    read = [kernel(f"{first}.conv2")[2] for first in firsts][-1]
    stem = kernel("stem.conv")
    expansion = 4 if bottleneck and all(width % 4 == 0 for width in outer) else 1
    widths = tuple(width // expansion for width in outer)
    projected = [first for first in firsts if f"{first}.shortcut.conv.kernel" in shapes]
    fields: dict[str, Any] = {
        "block": "bottleneck" if bottleneck else "basic",
        "blocks": blocks,
        "widths": widths,
        "expansion": expansion,
        "in_channels": stem[2],
        "stem_kernel": stem[0],
        "stem_width": stem[3],
        "conv_bias": "stem.conv.bias" in shapes,
        "norm": "stem.norm.scale" in shapes,
        "shortcut": "projection" if projected or len(set(outer)) == 1 else "zero_pad",
    }
    if stem[0] < 7:
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
        labels = {str(index): name for index, name in enumerate(class_names or map(_label, range(spec.classes)))}
        config |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
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


def _label(index: int) -> str:
    return f"LABEL_{index}"


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
    labels = config.get("id2label")
    names = [labels.get(str(index)) for index in range(len(labels))] if isinstance(labels, Mapping) else []
    known = all(isinstance(name, str) and name.isprintable() for name in names) and names != list(
        map(_label, range(len(names)))
    )
    return Told(notes=notes, class_names=tuple(map(str, names)) if known else ())


def _naming(name: str, **options: Any) -> Naming:
    return Naming(family=ResNetSpec.family, name=name, layers=_layers(name), places=_places(name), **options)


TORCHVISION = _naming(
    "torchvision",
    title="torchvision and timm",
    roles=PYTORCH,
    preprocessing="torchvision",
    aliases=("timm", "pytorch"),
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
    namings=(TORCHVISION, HUGGING_FACE, KERAS_APPLICATIONS, KERAS_CLASSIC, FLAX_EXAMPLE), fields=fields_from
)
