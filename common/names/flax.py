"""The names of Flax's imagenet example: ``params/BottleneckResNetBlock_0/Conv_0/kernel``, ``batch_stats/bn_init/mean``.

A native name is the path of a variable, its collection first. Blocks are numbered through all stages, so that names
alone do not say where a stage begins: see `_Flax.skeleton`.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any

from common.architectures.resnet import CONVENTIONS
from common.checkpoints.base import KernelLayout, Skeleton, Source, Stored, widened_bfloat16
from common.errors import CheckpointError

BLOCKS = {"basic": "ResNetBlock", "bottleneck": "BottleneckResNetBlock"}
_LAYERS = {"stem.conv": "conv_init", "stem.norm": "bn_init", "head.fc": "Dense_0"}
_IN_BLOCK = {
    **{f"conv{i + 1}": f"Conv_{i}" for i in range(3)},
    **{f"norm{i + 1}": f"BatchNorm_{i}" for i in range(3)},
    "shortcut.conv": "conv_proj",
    "shortcut.norm": "norm_proj",
}
# Kind of layer -> canonical role -> (collection, native leaf).
LEAVES: dict[str, dict[str, tuple[str, str]]] = {
    "conv": {"kernel": ("params", "kernel"), "bias": ("params", "bias")},
    "dense": {"kernel": ("params", "kernel"), "bias": ("params", "bias")},
    "norm": {
        "scale": ("params", "scale"),
        "bias": ("params", "bias"),
        "mean": ("batch_stats", "mean"),
        "var": ("batch_stats", "var"),
    },
}
COLLECTIONS = ("params", "batch_stats")
# What else a train state holds.
_IGNORED = ("opt_state", "step", "epoch", "dynamic_scale", "rng", "rngs", "dropout_rng", "key", "config", "metrics")
_CONV = re.compile(r"params/(ResNetBlock|BottleneckResNetBlock)_(0|[1-9][0-9]{0,5})/Conv_([0-9])/kernel")
# Around the variables, as in {"model": state}, or in a state whose `params` are all of the variables.
_INSIDE = re.compile(r"((?:(?:model|state|train_state|variables|params)/)*)params/(?!batch_stats/)")
# Types of arrays that can be read -> bytes of an element.
DTYPES = {"bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
DTYPES |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}


class _Flax:
    name = "flax"
    title = "the Flax example"
    kernels: KernelLayout = "HWIO"
    convention: Mapping[str, Any] = CONVENTIONS["flax_examples"]

    def skeleton(self, tensors: Mapping[str, Stored]) -> Skeleton | None:
        """A stage begins where a block has other output channels than the one before it, or projects its shortcut.

        So two stages of one width are seen as one where the second neither strides nor projects: with dilation, or
        with parameter-free shortcuts. No shape tells them apart.
        """
        last: dict[int, tuple[int, str]] = {}  # number of a block -> the last of its convolutions, and its class
        for match in filter(None, map(_CONV.fullmatch, tensors)):
            number, found = int(match[2]), (int(match[3]), match[1])
            last[number] = max(last.get(number, found), found)
        if not last:
            return None
        gap = next((number for number in range(len(last)) if number not in last), None)
        if gap is not None:
            raise CheckpointError(f"the blocks have a gap: number {gap} is missing, and {max(last)} is there")
        starts, width_before = [], None
        for number, (conv, cls) in sorted(last.items()):
            block = f"params/{cls}_{number}"
            width = tensors[f"{block}/Conv_{conv}/kernel"].shape[-1:]
            if width != width_before or f"{block}/conv_proj/kernel" in tensors:
                starts.append(number)
            width_before = width
        blocks = tuple(after - before for before, after in pairwise((*starts, len(last))))
        return Skeleton(block="basic" if last[0][1] == BLOCKS["basic"] else "bottleneck", blocks=blocks)

    def array(self, layer: str, kind: str, role: str, skeleton: Skeleton) -> str:
        collection, leaf = LEAVES[kind][role]
        return "/".join((collection, *module_path(layer, skeleton), leaf))

    def ignored(self, name: str) -> bool:
        return _ignored(name)


NAMINGS = {"flax": _Flax()}


def module_path(layer: str, skeleton: Skeleton) -> tuple[str, ...]:
    """Path of the module of a layer that has arrays."""
    where, _, rest = layer.partition(".")
    if where != "stages":
        return (_LAYERS[layer],)
    stage, _, block, part = rest.split(".", 3)
    return block_name(int(stage), int(block), skeleton), _IN_BLOCK[part]


def block_name(stage: int, block: int, skeleton: Skeleton) -> str:
    """Name of a block's module: blocks are numbered through all stages."""
    first = (0, *accumulate(skeleton.blocks))[stage]
    return f"{BLOCKS[skeleton.block]}_{first + block}"


def variables(leaves: Mapping[str, Stored | None], container: str, notes: Iterable[str] = ()) -> Source:
    """The source in the leaves of a tree, which is the variables or a train state; None is a leaf that is no array.

    A leaf has any dtype by name, and reads as the bits, uint16, of a bfloat16. What is around the variables is taken
    off, with a note. Raises `CheckpointError` for a leaf of the variables that is not of NumPy's types or bfloat16, and
    for two leaves that would have one name.
    """
    around = [match[1] for path in leaves if not _ignored(path) and (match := _INSIDE.match(path))]
    prefix = min(around, key=len, default="")
    found = [*notes, *([f"the variables were inside {prefix.removesuffix('/')!r}"] if prefix else [])]
    tensors: dict[str, Stored] = {}
    for path, leaf in leaves.items():
        name = path.removeprefix(prefix)
        if name in tensors:
            raise CheckpointError(f"{name} is there twice, inside and outside {prefix.removesuffix('/')!r}")
        if leaf is not None and leaf.dtype in DTYPES:
            tensors[name] = _readable(leaf)
        elif name.partition("/")[0] in COLLECTIONS:
            what = "no array" if leaf is None else f"of dtype {leaf.dtype}"
            raise CheckpointError(
                f"{path} is {what}; expected an array of float32 or another type of NumPy, or bfloat16"
            )
    if any(leaf is not None and leaf.dtype == "bfloat16" for leaf in leaves.values()):
        found.append("bfloat16 arrays are read as float32, exactly")
    return Source(container=container, tensors=tensors, notes=tuple(found))


def _readable(leaf: Stored) -> Stored:
    if leaf.dtype != "bfloat16":
        return leaf
    return Stored(shape=leaf.shape, dtype="float32", read=lambda: widened_bfloat16(leaf.read()))


def _ignored(name: str) -> bool:
    top = name.partition("/")[0]
    return top in _IGNORED or top == "ema" or top.startswith("ema_")
