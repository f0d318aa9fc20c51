"""Keys of Philox (Salmon et al. 2011): what is random in a training comes from the recipe's seed, each use apart.

The words of NumPy's bit generators never change, unlike what NumPy makes of them, as its shuffles.
"""

import numpy as np

ORDER, AUGMENTATION, DROPOUT = range(3)  # what the seed is used for


def key(seed: int, *use: int) -> np.ndarray:
    """A key, (2,) in uint64. Spread out: of neighbouring seeds, and of uses, nothing else may be alike."""
    return np.random.SeedSequence(seed, spawn_key=use).generate_state(2, np.uint64)
