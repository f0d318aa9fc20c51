"""The tree of variables or of a whole train state that Flax's users save, whichever container holds it."""

import re
from collections.abc import Iterable, Mapping

from common.checkpoints.containers import Source, Stored, source
from common.errors import CheckpointError
from common.names.roles import FLAX

# What of a train state are the network's variables.
_COLLECTIONS = ("params", "batch_stats")
# Around the variables, as in {"model": state}, or in a state whose `params` are all of the variables.
_INSIDE = re.compile(r"((?:(?:model|state|train_state|variables|params)/)*)params/(?!batch_stats/)")
# Types of arrays that can be read -> bytes of an element.
DTYPES = {"bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
DTYPES |= {f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)}


def variables(leaves: Mapping[str, Stored | None], container: str, notes: Iterable[str] = ()) -> Source:
    """The source in the leaves of a tree, which is the variables or a train state; None is a leaf that is no array.

    A leaf has any dtype by name, and reads as the bits, uint16, of a bfloat16. What is around the variables is taken
    off, with a note. Raises `CheckpointError` for a leaf of the variables that is not of NumPy's types or bfloat16, and
    for two leaves that would have one name.
    """
    around = [match[1] for path in leaves if not FLAX.ignored.fullmatch(path) and (match := _INSIDE.match(path))]
    prefix = min(around, key=len, default="")
    found = [*notes, *([f"the variables were inside {prefix.removesuffix('/')!r}"] if prefix else [])]
    tensors: dict[str, Stored] = {}
    for path, leaf in leaves.items():
        name = path.removeprefix(prefix)
        if name in tensors:
            raise CheckpointError(f"{name} is there twice, inside and outside {prefix.removesuffix('/')!r}")
        if leaf is not None and leaf.dtype in DTYPES:
            tensors[name] = leaf
        elif name.partition("/")[0] in _COLLECTIONS:
            what = "no array" if leaf is None else f"of dtype {leaf.dtype}"
            raise CheckpointError(
                f"{path} is {what}; expected an array of float32 or another type of NumPy, or bfloat16"
            )
    return source(container, tensors, notes=found)
