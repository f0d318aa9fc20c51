"""A twin of the Flax imagenet example's ResNet, for its structure and names: its code is in no package.

Written from the published facts: compact modules, ``conv_init`` 7x7/2 with padding 3, ``bn_init``, a SAME max-pool,
blocks that stride in the 3x3 convolution, ``conv_proj`` and ``norm_proj``, a mean over the map, one Dense.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

DEPTHS = {"resnet18": (False, (2, 2, 2, 2)), "resnet50": (True, (3, 4, 6, 3)), "resnet101": (True, (3, 4, 23, 3))}


class ResNetBlock(nn.Module):
    filters: int
    strides: int
    norm: Any
    conv: Any

    @nn.compact
    def __call__(self, x):
        residual = x
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm()(self.conv(self.filters, (3, 3))(y))
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return nn.relu(residual + y)


class BottleneckResNetBlock(nn.Module):
    filters: int
    strides: int
    norm: Any
    conv: Any

    @nn.compact
    def __call__(self, x):
        residual = x
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm()(self.conv(4 * self.filters, (1, 1))(y))
        if residual.shape != y.shape:
            residual = self.conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return nn.relu(residual + y)


class ResNet(nn.Module):
    variant: str

    @nn.compact
    def __call__(self, x, train: bool = True):
        bottleneck, stages = DEPTHS[self.variant]
        conv = partial(nn.Conv, use_bias=False, dtype=x.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=x.dtype)
        x = conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        block = BottleneckResNetBlock if bottleneck else ResNetBlock
        for stage, count in enumerate(stages):
            for number in range(count):
                strides = 2 if stage > 0 and number == 0 else 1
                x = block(64 * 2**stage, strides, norm, conv)(x)
        return nn.Dense(1000, dtype=x.dtype)(jnp.mean(x, axis=(1, 2)))
