"""Why a layer of two models differs: hypotheses of what one does otherwise, tried until one makes the other of it."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from common.diagnosis import words
from common.diagnosis.arrays import array_edits
from common.diagnosis.backward import explain_backward
from common.diagnosis.coarse import precision_findings
from common.diagnosis.evidence import Finding, LayerEvidence, Side
from common.diagnosis.identify import identified
from common.diagnosis.linear import conv_edits, dense_edits, embedding_edits
from common.diagnosis.norms import norm_edits
from common.diagnosis.pointwise import activation_edits, behind, response_edits, softmax_edits
from common.diagnosis.pools import flatten_edits, global_edits, merge_edits, pad_edits, pool_edits
from common.diagnosis.running import explain_statistics
from common.diagnosis.trials import Change, Goal, Trial, Work, search
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Embedding,
    Flatten,
    GlobalPool,
    GroupNorm,
    LayerNorm,
    LocalResponseNorm,
    Merge,
    Operation,
    Pad,
    Pool,
    Softmax,
)

# What is tried of what yours says of itself costs half.
_SAID = 0.5


@np.errstate(all="ignore")
def explain_layer(evidence: LayerEvidence) -> list[Finding]:
    """What makes the reference's layer compute what yours computes: causes, best first, of which the first explains the
    difference to rounding and the last may leave some. Empty where no hypothesis explains it.

    Outputs are explained where they differ, else the statistics that a pass in training mode leaves, else what comes
    back. A finding of outputs and statistics both names two causes.
    """
    place = place_of(evidence)
    if not evidence.reference.outputs or not evidence.yours.outputs:
        return []
    goal = Goal(evidence.reference.outputs[0], evidence.yours.outputs[0], evidence.limit)
    statistics = explain_statistics(evidence, place)
    if goal.before * goal.norm <= goal.limit:
        return statistics or explain_backward(evidence, place)
    inputs = tuple(one if one.dtype.kind in "iu" else one.astype(np.float64) for one in evidence.inputs)
    arrays = {role: array.astype(np.float64) for role, array in evidence.reference.arrays.items()}
    reference = evidence.reference
    if not inputs:
        return precision_findings(None, goal, place=place, backend=evidence.yours.backend)
    work = identified(
        reference.operation, inputs, arrays, reference.outputs[0], training=evidence.training, limit=evidence.limit
    )
    backend = evidence.yours.backend
    if work is None:
        return precision_findings(None, goal, place=place, backend=backend)
    base = work

    def edits(work: Work, goal: Goal) -> Iterator[Trial]:
        single = work is base
        yield from _edits(work, goal, backend, single=single)
        yield from behind(work, goal, single=single)
        yield from array_edits(work, evidence.yours, arrays)
        if single:
            yield from _said(work, evidence.yours, goal)

    found = search(base, edits, goal, place=place, backend=backend)
    found = found or precision_findings(base, goal, place=place, backend=backend)
    return _with_statistics(found, statistics)


def place_of(evidence: LayerEvidence) -> str:
    """The layer by its name in yours; with the reference's in brackets where that is another."""
    yours, reference = evidence.yours.layer, evidence.reference.layer
    return yours if yours == reference else f"{yours} ({reference})"


def _edits(work: Work, goal: Goal, backend: str, *, single: bool) -> Iterator[Trial]:
    """By what the reference does."""
    match work.operation:
        case Conv():
            yield from conv_edits(work, goal, wide=single)
        case Dense():
            yield from dense_edits(work, goal, wide=single)
        case Embedding():
            yield from embedding_edits(work, goal)
        case BatchNorm() | LayerNorm() | GroupNorm():
            yield from norm_edits(work, goal, wide=single)
        case Pool():
            yield from pool_edits(work, goal, backend, wide=single)
        case GlobalPool():
            yield from global_edits(work, goal)
        case Activation():
            yield from activation_edits(work, goal)
        case Softmax():
            yield from softmax_edits(work, goal)
        case LocalResponseNorm():
            yield from response_edits(work, goal)
        case Flatten():
            yield from flatten_edits(work, goal)
        case Merge():
            yield from merge_edits(work, goal)
        case Pad():
            yield from pad_edits(work, goal)


# The cause that a setting is, where the setting's name is not one.
_CAUSES = {
    "strides": "stride",
    "padding_mode": "padding_mode",
    "axes": "norm_axes",
    "centred": "norm_not_centred",
    "mode": "average_for_maximum",
    "window": "pool_window",
    "counted": "pool_counted",
    "ceil": "pool_ceil",
    "size": "lrn",
    "alpha": "lrn",
    "beta": "lrn",
    "k": "lrn",
    "mean": "lrn",
    "axis": "softmax_axis",
    "channels": "flatten_order",
    "how": "merge",
    "name": "activation",
    "slope": "activation",
}
# Settings that do not decide an output.
_SILENT = frozenset({"momentum", "unbiased", "rate", "keep"})


def _said(work: Work, yours: Side, goal: Goal) -> Iterator[Trial]:
    """All at once that yours says it does otherwise, with its own arrays: where more than two settings differ, no
    pair would do. Those are left out that change nothing."""
    operation, other = work.operation, yours.operation
    if other is None or type(other) is not type(operation):
        return
    settings = {
        one.name: getattr(other, one.name)
        for one in fields(other)
        if one.name not in _SILENT and getattr(other, one.name) != getattr(operation, one.name)
    }
    base = replace(work, arrays=_own_arrays(work, yours))
    if not _makes(replace(base, operation=replace(operation, **settings)), goal):
        return
    for name in list(settings):
        fewer = {one: value for one, value in settings.items() if one != name}
        if _makes(replace(base, operation=replace(operation, **fewer)), goal):
            settings = fewer
    changes = [_change_of_setting(operation, replace(operation, **{name: settings[name]}), name) for name in settings]
    changes += _changes_of_arrays(work, base)
    if changes:
        yield Trial(changes=tuple(changes), work=replace(base, operation=replace(operation, **settings)))


def _own_arrays(work: Work, yours: Side) -> dict[str, np.ndarray]:
    """Arrays of yours; in training mode with the statistics of the batch."""
    own = {role: array.astype(np.float64) for role, array in yours.arrays.items()}
    return {**own, **{role: work.arrays[role] for role in work.stored}}


def _changes_of_arrays(work: Work, base: Work) -> list[Change]:
    """What differs of the arrays, where it does."""
    missing = [role for role in work.arrays if role not in base.arrays]
    others = [
        role
        for role, array in base.arrays.items()
        # A kernel of another shape is what another setting comes with.
        if role not in work.arrays
        or (array.shape == work.arrays[role].shape and not np.array_equal(array, work.arrays[role]))
    ]
    causes = {"bias": "bias_missing", "scale": "scale_missing"}
    changes = [
        Change(
            cause=causes.get(role, "array_differs"),
            yours=f"has no {role}",
            reference="has one",
            facts={"roles": role},
            cost=_SAID,
            slot=role,
        )
        for role in missing
    ]
    if others:
        names = ", ".join(others)
        changes.append(
            Change(
                cause="array_differs",
                yours=f"holds another {names}",
                reference="its own",
                cost=3.0,
                facts={"roles": names},
                slot="arrays",
            )
        )
    return changes


def _makes(work: Work, goal: Goal) -> bool:
    """Whether it computes what yours computes."""
    try:
        with np.errstate(all="ignore"):
            return goal.explained(goal.left(work.computed()))
    except (ValueError, KeyError, IndexError):
        return False


def _change_of_setting(operation: Operation, other: Operation, name: str) -> Change:
    """What it is that one setting is another."""
    return Change(
        cause=_CAUSES.get(name, name),
        yours=words.doing(other) if name in {"name", "slope"} else words.setting(other, name),
        reference=words.doing(operation) if name in {"name", "slope"} else words.setting(operation, name),
        cost=_SAID,
        facts={one.name: _fact(getattr(operation, one.name)) for one in fields(operation)},
        slot=name,
    )


def _fact(value: Any) -> Any:
    """A setting as a remedy speaks of it."""
    return words.one(value) if isinstance(value, tuple) and value and isinstance(value[0], int) else value


def _with_statistics(found: list[Finding], statistics: list[Finding]) -> list[Finding]:
    """Outputs that differ, and statistics beside: two causes, where one is not the other's."""
    if not found or not statistics or statistics[0].cause in found[0].cause:
        return found
    first, second = found[0], statistics[0]
    both = replace(
        first,
        cause=f"{first.cause}+{second.cause}",
        yours=f"{first.yours} and {second.yours}",
        reference=f"{first.reference} and {second.reference}",
        remedy=f"{first.remedy} {second.remedy}".strip(),
        after=max(first.after, second.after),
        cost=first.cost + second.cost,
    )
    return [both, *found[1:]]
