"""Other orders of a batch: of one function any change that they make is rounding, of the backend's own sums."""

import numpy as np

from common.parity.levels import ORDERS


def orders(images: int) -> tuple[np.ndarray, ...]:
    """At most `ORDERS` orders of so many images, each a permutation (images,) and none the given order: rolled by one,
    reversed, shuffled. Two images have one, a single image none."""
    given = np.arange(images)
    found: list[np.ndarray] = []
    candidates = [
        np.roll(given, 1),
        given[::-1],
        *(np.random.default_rng(seed).permutation(given) for seed in range(9)),
    ]
    for order in candidates:
        if not any(np.array_equal(order, other) for other in (given, *found)):
            found.append(order)
    return tuple(found[:ORDERS])
