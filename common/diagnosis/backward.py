"""Why what comes back through a layer differs, where its output does not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from common.diagnosis.arithmetic import norm_pullback
from common.diagnosis.evidence import Finding, LayerEvidence
from common.diagnosis.trials import MOST, Change, Goal, as_finding, plain
from common.foreign.operations import Activation, BatchNorm, GroupNorm, LayerNorm, Operation

# Slopes that people give an activation where it has none.
_AT_ZERO = (0.0, 0.5, 1.0)


def explain_backward(evidence: LayerEvidence, place: str) -> list[Finding]:
    """Causes of other gradients, best first; empty where they agree, or nothing explains one of them."""
    if evidence.backward is None:
        return []
    reference, yours = evidence.backward
    named: list[tuple[str, np.ndarray | None, np.ndarray | None]] = []
    for at, (one, other) in enumerate(zip(reference.of_inputs, yours.of_inputs, strict=False)):
        named.append(("its input" if len(reference.of_inputs) == 1 else f"its input {at + 1}", one, other))
    named += [(f"`{role}`", one, yours.of_arrays.get(role)) for role, one in reference.of_arrays.items()]
    kept: list[Finding] = []
    for name, one, other in named:
        if one is None or not one.any():
            continue
        goal = Goal(one, np.zeros_like(one) if other is None else other, 0.0)
        if goal.before <= goal.relative:
            continue
        found = _explained(evidence, name, goal, place)
        if not found:
            return []
        if not kept or kept[0].cause != found[0].cause:
            kept += found
        elif kept[0].cause == "detached":
            kept[0] = _with_another(kept[0], name)
    return kept[:MOST]


def _with_another(finding: Finding, name: str) -> Finding:
    """One tensor more that nothing comes back to."""
    return replace(finding, yours=f"{finding.yours}, nor to {name}")


def _explained(evidence: LayerEvidence, name: str, goal: Goal, place: str) -> list[Finding]:
    found = []
    for change, predicted in _hypotheses(evidence, name, goal):
        left = goal.left(predicted)
        if goal.explained(left):
            found.append((change.cost, left, change))
    found.sort(key=lambda one: one[:2])
    backend = evidence.yours.backend
    return [as_finding((change,), left, goal, place=place, backend=backend) for _, left, change in found]


def _hypotheses(evidence: LayerEvidence, name: str, goal: Goal) -> Iterator[tuple[Change, np.ndarray]]:
    """What may have become of what came back."""
    assert evidence.backward is not None
    reference = evidence.backward[0]
    cotangent = reference.cotangent.astype(np.float64)
    yield (
        Change(cause="detached", yours=f"lets no gradient through to {name}", reference="lets it pass", cost=0.8),
        np.zeros_like(goal.reference),
    )
    square = float(np.vdot(goal.reference, goal.reference))
    factor = float(np.vdot(goal.reference, goal.yours)) / square
    for at, one in enumerate(plain(factor)):
        if one not in (0.0, 1.0):
            change = Change(
                cause="gradient_scaled",
                yours=f"gives {name} {one:.6g} times the gradient",
                reference="the gradient itself",
                cost=1.5 + at / 10,
            )
            yield change, one * goal.reference
    operation = evidence.reference.operation
    if not name.startswith("its input") or not evidence.inputs:
        return
    x = evidence.inputs[0].astype(np.float64)
    if cotangent.shape == goal.reference.shape:
        through = Change(
            cause="straight_through",
            yours="gives its input what came to its output, as it is",
            reference="differentiates",
            cost=1.2,
        )
        yield through, cotangent
    scale = evidence.reference.arrays.get("scale")
    yield from _of_norm(operation, x, cotangent, scale, evidence.training)
    if isinstance(operation, Activation) and (x == 0).any():
        for slope in _AT_ZERO:
            change = Change(
                cause="gradient_at_zero",
                yours=f"has a gradient of {slope:g} at 0",
                reference="another",
                facts={"at_zero": _at_zero(goal.reference, cotangent, x)},
            )
            yield change, np.where(x == 0, slope * cotangent, goal.reference)


def _at_zero(gradient: np.ndarray, cotangent: np.ndarray, x: np.ndarray) -> float:
    kept = (x == 0) & (cotangent != 0)
    return float(np.median(gradient[kept] / cotangent[kept])) if kept.any() else 0.0


def _of_norm(
    operation: Operation | None, x: np.ndarray, cotangent: np.ndarray, scale: np.ndarray | None, training: bool
) -> Iterator[tuple[Change, np.ndarray]]:
    """Of a norm whose statistics are constants to the gradient."""
    if not isinstance(operation, LayerNorm | GroupNorm) and not (isinstance(operation, BatchNorm) and training):
        return
    scale = None if scale is None else scale.astype(np.float64)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("mean and variance", {"through_mean": False, "through_var": False}),
        ("mean", {"through_mean": False}),
        ("variance", {"through_var": False}),
    ]
    for statistics, settings in ways:
        change = Change(
            cause="statistics_detached",
            yours=f"takes the {statistics} for constants on the way back",
            reference="differentiates through them",
            facts={"statistics": statistics},
        )
        yield change, norm_pullback(x, cotangent, operation, scale, **settings)
