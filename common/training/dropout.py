"""Which values dropout keeps: made here once, so that every framework, process and resumed run drops the same ones.

A network of a framework's user draws its own. In a training and in a comparison the framework's layers are given these
masks in place of what they would draw; the rate that the kept values are divided by stays the layer's own.
"""

from collections.abc import Mapping
from hashlib import sha256

import numpy as np

from common.architectures import Spec
from common.architectures.layers import Dropout, Shape, output_shapes
from common.training import streams

# By path of the layer: (N, H, W, C), (N, features), or (N, 1, 1, 1) of stochastic depth; True where a value is kept.
Masks = Mapping[str, np.ndarray]


def layers(spec: Spec) -> tuple[Dropout, ...]:
    """The dropout and the stochastic depth of the walk, in order."""
    return tuple(layer for layer in spec.layers if isinstance(layer, Dropout))


def masks(spec: Spec, size: tuple[int, int], seed: int, positions: np.ndarray) -> dict[str, np.ndarray]:
    """A mask for every dropout and stochastic depth of the walk and images of (height, width) = `size`.

    `positions` (N,) are those of the images in the training: image i of the batch of step k, counted from 0, stands at
    k * batch_size + i. An image's masks follow from the seed, the layer's path and its position alone, and so go with
    it where a batch is shared among processes or put in another order.
    """
    found = layers(spec)
    if not found:
        return {}
    shapes = output_shapes(spec.layers, (*size, spec.in_channels))
    key = streams.key(seed, streams.DROPOUT)
    return {
        layer.path: np.stack([_kept(key, layer, shape, int(position)) for position in positions])
        for layer, shape in ((layer, layer.mask_shape(shapes[layer.path])) for layer in found)
    }


def _kept(key: np.ndarray, layer: Dropout, shape: Shape, position: int) -> np.ndarray:
    # The first word counts the blocks of one mask; the others say whose it is.
    name = int.from_bytes(sha256(layer.path.encode()).digest()[:8], "little")
    generator = np.random.Philox(key=key, counter=np.array([0, position, name, 0], np.uint64))
    kept: np.ndarray = generator.random_raw(int(np.prod(shape))) >= np.uint64(int(layer.rate * 2**64))
    return kept.reshape(shape)
