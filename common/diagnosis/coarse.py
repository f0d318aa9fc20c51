"""Whether yours computes in a coarser precision: bfloat16, float16, TF32, or float32 inside a float64 network.

What is left is then no rounding of float64. It is recognised by its size, by outputs that are numbers of that
precision, and by a prediction from rounded inputs that leaves far less than there was.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from common.diagnosis.evidence import Finding
from common.diagnosis.precision import TITLES, representable, rounded, unit
from common.diagnosis.trials import Change, Goal, Work, as_finding
from common.parity.levels import EXPLAINED

# A difference is of a precision where it lies within these of its unit: a sum of many terms averages what rounding
# does to each, and a norm of values far from zero cancels.
_LEAST, _GREATEST = 1 / 64, 64.0
# What a prediction leaves of the difference: the order of sums inside it is another.
_LEFT = 0.1
# Float32's own rounding of a sum is as large as what rounding its terms does: there it is enough that the difference
# is noise, which goes with nothing.
_NOISE = 0.1


def precision_findings(work: Work | None, goal: Goal, *, place: str, backend: str) -> list[Finding]:
    """The precision that explains the difference, in at most one finding; `work` computes the reference, if known."""
    if not goal.same_shape or goal.before == 0 or goal.before == float("inf"):
        return []
    found = []
    for name in TITLES:
        if not _LEAST * unit(name) <= goal.before <= _GREATEST * unit(name):
            continue
        with np.errstate(all="ignore"):
            left = min(goal.left(one) for one in _predictions(work, goal, name))
        its_own = representable(goal.yours, name) and not representable(goal.reference, name)
        if its_own or left <= _LEFT * goal.before or (name == "float32" and _is_noise(goal) and left <= goal.before):
            # Of those that hold all outputs the coarsest, of the others the one that leaves least. A TF32 product is
            # kept as float32: outputs of eleven bits are float16's, others TF32's.
            found.append((not its_own, -unit(name) if its_own else left, (name == "tf32") == its_own, left, name))
    return [
        as_finding((_change(name, goal),), left, goal, place=place, backend=backend)
        for *_, left, name in sorted(found)[:1]
    ]


def _change(name: str, goal: Goal) -> Change:
    own = "float64" if goal.relative < EXPLAINED["float32"] else "float32"
    return Change(cause="precision", yours=f"computes in {TITLES[name]}", reference=f"in {own}", facts={"detail": name})


def _predictions(work: Work | None, goal: Goal, name: str) -> Iterator[np.ndarray]:
    """The output rounded, for which nothing of the layer has to be known; what goes into the product; all arrays;
    and all of it."""
    yield rounded(goal.reference, name)
    if work is None:
        return
    inputs = tuple(one if one.dtype.kind in "iu" else rounded(one, name) for one in work.inputs)
    for roles in ({"kernel", "table"}, set(work.arrays)):
        arrays = {role: rounded(array, name) if role in roles else array for role, array in work.arrays.items()}
        output = replace(work, inputs=inputs, arrays=arrays).computed()
        yield output
        yield rounded(output, name)


def _is_noise(goal: Goal) -> bool:
    """Whether the difference goes neither with the output nor to one side."""
    difference = (goal.yours - goal.reference).ravel()
    size = float(np.linalg.norm(difference))
    along = abs(float(np.vdot(difference, goal.reference))) / (size * goal.norm)
    aside = abs(float(difference.sum())) / (size * np.sqrt(difference.size))
    return bool(max(along, aside) < max(_NOISE, 4 / np.sqrt(difference.size)))
