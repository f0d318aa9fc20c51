"""The networks of the catalogue, each small, and of a kind that people port."""

import numpy as np

from tests.faults.planting import Network, conv, norm

MEAN, STD = (np.array(one, np.float32) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
HEADS = 3  # of attention
GROUPS = 2

_UNIT = {"one": (8, 8), "two": (8, 8), "three": (8, 12)}

RESIDUAL = Network(
    shapes={
        **conv("stem", 3, 3, 3, 8),
        **norm("stem_norm", 8),
        **{
            name: shape
            for unit, (read, made) in _UNIT.items()
            for name, shape in {
                **conv(f"{unit}.conv1", 3, 3, read, made),
                **norm(f"{unit}.norm1", made),
                **conv(f"{unit}.conv2", 3, 3, made, made),
                **norm(f"{unit}.norm2", made),
            }.items()
        },
        **conv("three.projection", 1, 1, 8, 12),
        **norm("three.projection_norm", 12),
        **conv("head", 12, 7, bias=True),
    },
    image=(31, 34, 3),
)
PLAIN = Network(
    shapes={
        **conv("conv1", 3, 3, 3, 8, bias=True),
        **norm("norm", 8),
        **conv("conv2", 3, 3, 8, 12, bias=True),
        **conv("dense1", 72, 16, bias=True),
        **conv("dense2", 16, 10, bias=True),
    },
    image=(18, 17, 3),
    pixels=True,
    batch=4,
)
MOBILE = Network(
    shapes={
        **conv("stem", 3, 3, 3, 8),
        **norm("stem_norm", 8),
        **conv("expand", 1, 1, 8, 16),
        **norm("expand_norm", 16),
        **conv("depth", 3, 3, 1, 16),
        **norm("depth_norm", 16),
        **conv("squeeze", 16, 4, bias=True),
        **conv("excite", 4, 16, bias=True),
        **conv("project", 1, 1, 16, 8),
        **norm("project_norm", 8),
        **conv("grouped", 3, 3, 4, 8, bias=True),
        **conv("head", 8, 6, bias=True),
    },
    image=(20, 19, 3),
)
_BLOCKS = ("first", "second")
VIT = Network(
    shapes={
        **conv("patch", 4, 4, 3, 24, bias=True),
        "token.table": (1, 1, 24),
        "position.table": (1, 13, 24),
        **{
            name: shape
            for block in _BLOCKS
            for name, shape in {
                **norm(f"{block}.norm1", 24, running=False),
                **conv(f"{block}.qkv", 24, 72, bias=True),
                **conv(f"{block}.out", 24, 24, bias=True),
                **norm(f"{block}.norm2", 24, running=False),
                **conv(f"{block}.up", 24, 40, bias=True),
                **conv(f"{block}.down", 40, 24, bias=True),
            }.items()
        },
        **norm("norm", 24, running=False),
        **conv("head", 24, 5, bias=True),
    },
    image=(12, 16, 3),
    batch=2,
)
MIXER = Network(
    shapes={
        **conv("patch", 48, 16, bias=True),
        **{
            name: shape
            for block in _BLOCKS
            for name, shape in {
                **norm(f"{block}.norm1", 16, running=False),
                **conv(f"{block}.tokens_up", 12, 20, bias=True),
                **conv(f"{block}.tokens_down", 20, 12, bias=True),
                **norm(f"{block}.norm2", 16, running=False),
                **conv(f"{block}.channels_up", 16, 24, bias=True),
                **conv(f"{block}.channels_down", 24, 16, bias=True),
            }.items()
        },
        **norm("norm", 16, running=False),
        **conv("head", 16, 5, bias=True),
    },
    image=(12, 16, 3),
    batch=2,
)
UNET = Network(
    shapes={
        **conv("down", 3, 3, 3, 6, bias=True),
        **conv("left", 1, 1, 6, 4, bias=True),
        **conv("middle1", 1, 1, 6, 3, bias=True),
        **conv("middle2", 3, 3, 3, 5, bias=True),
        **conv("right", 1, 1, 6, 3, bias=True),
        **conv("bottom", 3, 3, 12, 8, bias=True),
        **norm("bottom_norm", 8, running=False),
        **conv("up", 3, 3, 20, 4, bias=True),
    },
    image=(14, 12, 3),
    batch=2,
)
LRN = Network(
    shapes={
        **conv("conv1", 5, 5, 3, 8, bias=True),
        **conv("conv2", 3, 3, 4, 12, bias=True),
        **conv("dense1", 144, 16, bias=True),
        **conv("dense2", 16, 6, bias=True),
    },
    image=(29, 38, 3),
)
NETWORKS = {
    "residual": RESIDUAL,
    "plain": PLAIN,
    "mobile": MOBILE,
    "vit": VIT,
    "mixer": MIXER,
    "unet": UNET,
    "lrn": LRN,
}
