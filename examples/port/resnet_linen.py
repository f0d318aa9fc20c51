"""ResNet-50 v1.5 in linen, as public repositories write it, and the weights of `resnet50_torch.py` in it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import resnet50_torch

Variables = dict[str, Any]


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1, and the input added."""

    features: int
    strides: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    padding: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = self.conv(self.features, (3, 3), self.strides, padding=self.padding)(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.features, (1, 1), self.strides, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images (N, H, W, 3) to logits (N, classes)."""

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    features: int = 64
    classes: int = 1000
    padding: Any = 1  # of the 3x3 convolutions; "SAME" is what repositories that train from scratch have
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        # PyTorch keeps a share of 0.9 of its running statistics by default.
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = conv(self.features, (7, 7), 2, padding=3, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, size in enumerate(self.stage_sizes):
            for block in range(size):
                x = BottleneckBlock(
                    self.features * 2**stage,
                    2 if stage > 0 and block == 0 else 1,
                    conv,
                    norm,
                    self.padding,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x)
        x = x.mean((1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


def port(state: Mapping[str, Any]) -> Variables:
    """The variables of a linen `ResNet` from the state dict of the one in PyTorch."""
    params: Variables = {}
    statistics: Variables = {}

    def conv(path: tuple[str, ...], name: str) -> None:
        _put(params, (*path, "kernel"), state[f"{name}.weight"].permute(2, 3, 1, 0))  # OIHW to HWIO

    def norm(path: tuple[str, ...], name: str) -> None:
        for into, ours, theirs in (
            (params, "scale", "weight"),
            (params, "bias", "bias"),
            (statistics, "mean", "running_mean"),
            (statistics, "var", "running_var"),
        ):
            _put(into, (*path, ours), state[f"{name}.{theirs}"])

    conv(("stem_conv",), "stem")
    norm(("stem_norm",), "stem_norm")
    for number, size in enumerate(ResNet.stage_sizes):
        for i in range(size):
            block, name = f"stage{number + 1}_block{i + 1}", f"stages.{number}.{i}"
            for place, layer in enumerate(("reduce", "spatial", "expand")):
                conv((block, f"Conv_{place}"), f"{name}.{layer}")
                norm((block, f"BatchNorm_{place}"), f"{name}.{layer}_norm")
            if i == 0:
                conv((block, "shortcut_conv"), f"{name}.project")
                norm((block, "shortcut_norm"), f"{name}.project_norm")
    _put(params, ("head", "kernel"), state["head.weight"].T)
    _put(params, ("head", "bias"), state["head.bias"])
    return {"params": params, "batch_stats": statistics}


def _put(tree: Variables, path: Sequence[str], tensor: Any) -> None:
    *folders, name = path
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = jnp.asarray(tensor.numpy())


def model() -> tuple[ResNet, Variables]:
    """The port."""
    original, _ = resnet50_torch.model()
    return ResNet(), port(original.state_dict())


def faulty_padding() -> tuple[ResNet, Variables]:
    """The port with the padding that linen users are used to: SAME puts the odd pixel behind at stride 2."""
    original, _ = resnet50_torch.model()
    return ResNet(padding="SAME"), port(original.state_dict())
