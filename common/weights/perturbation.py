"""Weights moved by rounding, as the one-ulp response of a network needs them."""

from collections.abc import Callable

import numpy as np

from common.weights.arrays import LazyWeights, Weights
from common.weights.random import generator_for


def perturb(weights: Weights, seed: int) -> Weights:
    """The same weights with every value moved by -1, 0 or +1 unit in the last place, at random."""
    return LazyWeights({name: _perturbed(weights, name, seed) for name in weights})


def perturb_array(array: np.ndarray, seed: int, name: str) -> np.ndarray:
    """`array` with every value moved by -1, 0 or +1 unit in its last place, at random; zeros stay."""
    bits = array.view(f"i{array.itemsize}")
    # Of IEEE numbers the next larger one in magnitude has the next larger bit pattern.
    steps = generator_for(seed, f"ulp of {name}").integers(-1, 2, array.shape, dtype=np.int8)
    steps[array == 0] = 0
    return (bits + steps).view(array.dtype)


def _perturbed(weights: Weights, name: str, seed: int) -> Callable[[], np.ndarray]:
    return lambda: perturb_array(weights[name], seed, name)
