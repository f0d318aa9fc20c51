"""Canonical weights: a mapping from canonical name to NumPy array, names and shapes as the layer walk gives them.

Convolution kernels are HWIO, dense kernels (in, out), everything else is a vector of channels.
"""

from common.weights.arrays import (
    LazyWeights,
    Weights,
    check_names,
    contiguous,
    digest,
    layer_arrays,
    mapped,
    role_of,
    shapes,
    suspicious,
    validate,
)
from common.weights.initial import Scheme, init
from common.weights.perturbation import perturb, perturb_array
from common.weights.random import EXACT_INTEGER, integers, randomize

__all__ = [
    "EXACT_INTEGER",
    "LazyWeights",
    "Scheme",
    "Weights",
    "check_names",
    "contiguous",
    "digest",
    "init",
    "integers",
    "layer_arrays",
    "mapped",
    "perturb",
    "perturb_array",
    "randomize",
    "role_of",
    "shapes",
    "suspicious",
    "validate",
]
