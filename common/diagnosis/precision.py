"""Coarser numbers than float64: what they make of values, and how to see that values are theirs."""

from collections.abc import Mapping

import numpy as np

# Significant bits, the one before the point included.
BITS: Mapping[str, int] = {"float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}
TITLES: Mapping[str, str] = {"float32": "float32", "tf32": "TF32", "float16": "float16", "bfloat16": "bfloat16"}


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """Each value as the nearest of that precision, ties to even; as float64."""
    if precision in {"float32", "float16"}:
        with np.errstate(over="ignore"):
            narrow: np.ndarray = x.astype(precision).astype(np.float64)
        return narrow
    fraction, exponent = np.frexp(x)
    bits = BITS[precision]
    near: np.ndarray = np.ldexp(np.rint(np.ldexp(fraction, bits)), exponent - bits)
    return near


def representable(x: np.ndarray, precision: str) -> bool:
    """Whether the values are all of that precision."""
    return bool(np.array_equal(rounded(x, precision), x))


def unit(precision: str) -> float:
    """Half the distance from 1 to the next number."""
    return float(2.0 ** -BITS[precision])
