"""What people get wrong in arrays: those that were never loaded, and those that hold something else."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod, sqrt

import numpy as np

from common.diagnosis.evidence import Side
from common.diagnosis.precision import TITLES, rounded
from common.diagnosis.trials import Change, Trial, Work, changed

# Fewer random values do not tell of which initialiser they are.
_FEWEST = 64
_STATISTICS = frozenset({"mean", "var"})


def array_edits(work: Work, yours: Side, reference: Mapping[str, np.ndarray]) -> Iterator[Trial]:
    """Each array of yours in the place of the reference's, and all of them."""
    roles = [
        role
        for role, array in yours.arrays.items()
        if not (work.stored and role in _STATISTICS)
        and (role not in reference or not np.array_equal(array, reference[role]))
        and (role not in work.arrays or array.shape == work.arrays[role].shape)
    ]
    changes = {role: change_of(role, yours.arrays, reference) for role in roles}
    for role, change in changes.items():
        yield changed(work, change, arrays={**work.arrays, role: yours.arrays[role].astype(np.float64)})
    if len(roles) > 1:
        loaded = [role for role in roles if changes[role].cause == "never_loaded"]
        for some in dict.fromkeys((tuple(loaded), tuple(roles))):
            if len(some) > 1:
                arrays = {role: yours.arrays[role].astype(np.float64) for role in some}
                together = _together([changes[role] for role in some], some)
                yield changed(work, together, arrays={**work.arrays, **arrays})


def change_of(role: str, arrays: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> Change:
    """What it is to hold this array in the place of the reference's."""
    held = initial(role, arrays)
    if role not in reference:
        if role == "bias":
            return Change(cause="bias_extra", yours="adds a bias", reference="adds none", slot=role)
        return Change(
            cause="array_differs",
            yours=f"has a {role}",
            reference="has none",
            cost=2.0,
            slot=role,
            facts={"roles": role},
        )
    if held is not None and initial(role, reference) != held:
        return Change(
            cause="never_loaded",
            yours=f"still holds its initial values, {held}, in {role}",
            reference="others",
            # Ones and zeros are no accident; values of some distribution may be.
            cost=0.8 if held in {"zeros", "ones"} else 2.5,
            facts={"roles": role},
            slot=role,
        )
    for precision, name in TITLES.items():
        if np.array_equal(rounded(reference[role], precision), arrays[role]):
            return Change(
                cause="precision",
                yours=f"holds its {role} rounded to {name}",
                reference="as it is",
                cost=2.0,
                facts={"detail": precision},
                slot=role,
            )
    return Change(
        cause="array_differs",
        yours=f"holds another {role}",
        reference=f"one that differs by {_distance(arrays[role], reference[role]):.2g} of its norm",
        cost=3.0,
        facts={"roles": role},
        slot=role,
    )


def _together(changes: list[Change], roles: tuple[str, ...]) -> Change:
    """The same of several arrays."""
    names = ", ".join(roles[:-1]) + f" and {roles[-1]}"
    if all(one.cause == "precision" and one.facts == changes[0].facts for one in changes):
        title = TITLES[changes[0].facts["detail"]]
        return replace(changes[0], yours=f"holds its {names} rounded to {title}", slot="arrays")
    loaded = all(one.cause == "never_loaded" for one in changes)
    return Change(
        cause="never_loaded" if loaded else "array_differs",
        yours=f"still holds its initial values in {names}" if loaded else f"holds others in {names}",
        reference="others" if loaded else "its own",
        cost=max(one.cost for one in changes) + 0.1 * len(roles),
        facts={"roles": names},
        slot="arrays",
    )


def _distance(array: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(array - reference)) / (float(np.linalg.norm(reference)) or 1.0)


def initial(role: str, arrays: Mapping[str, np.ndarray]) -> str | None:
    """The initialiser whose values an array holds, in words; None where it is that of none."""
    array = arrays[role]
    for value, name in ((0.0, "zeros"), (1.0, "ones")):
        if (array == value).all():
            return name
    kernel = arrays.get("kernel")
    if (
        array.size < _FEWEST
        or (role in {"kernel", "bias"} and kernel is None)
        or role not in {"kernel", "bias", "table"}
    ):
        return None
    if kernel is not None:
        reads, makes = prod(kernel.shape[:-1]), kernel.shape[-1] * prod(kernel.shape[:-2])
    else:
        reads, makes = array.shape[-1], array.shape[0]
    mean, deviation = float(array.mean()), float(array.std())
    if not deviation or abs(mean) > 5 * deviation / sqrt(array.size):
        return None
    farthest = float(np.abs(array).max())
    if farthest <= sqrt(3) * deviation * 1.1:
        # Of n uniform values the farthest lies within a share of a few 1 / n of the bound.
        bounds = {
            "uniform as PyTorch draws them": 1 / sqrt(reads),
            "Glorot-uniform": sqrt(6 / (reads + makes)),
            "He-uniform": sqrt(6 / reads),
            "LeCun-uniform": sqrt(3 / reads),
            "uniform within 0.05": 0.05,
        }
        return next(
            (name for name, bound in bounds.items() if bound * (1 - 12 / array.size) <= farthest <= bound), None
        )
    deviations = {
        "LeCun-normal": 1 / sqrt(reads),
        "He-normal": sqrt(2 / reads),
        "Glorot-normal": sqrt(2 / (reads + makes)),
        "He-normal by what it makes": sqrt(2 / makes),
        "normal of deviation 1": 1.0,
        "normal of deviation 0.02": 0.02,
        "normal of deviation 0.01": 0.01,
    }
    near = 4 / sqrt(2 * array.size)
    return next((name for name, one in deviations.items() if abs(deviation / one - 1) <= near), None)
