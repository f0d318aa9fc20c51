"""Why what a batch norm keeps after a pass in training mode differs."""

from collections.abc import Iterator

import numpy as np

from common.diagnosis.arithmetic import moments
from common.diagnosis.evidence import Finding, LayerEvidence, Statistics
from common.diagnosis.norms import facts_of_momentum, kept_share
from common.diagnosis.trials import Change, Goal, findings, plain
from common.foreign.operations import BatchNorm

_ROLES = ("mean", "var")


def explain_statistics(evidence: LayerEvidence, place: str) -> list[Finding]:
    """Causes of other running statistics, best first; empty where they agree, or nothing explains it."""
    if evidence.statistics is None or not evidence.inputs:
        return []
    reference, yours = evidence.statistics
    if any(role not in one.after or role not in one.before for one in (reference, yours) for role in _ROLES):
        return []
    x = evidence.inputs[0].astype(np.float64)
    if any(one.after[role].shape != x.shape[-1:] for one in (reference, yours) for role in _ROLES):
        return []
    goal = Goal(_row(reference), _row(yours), 0.0)
    # The limit of outputs does not hold for these: a few roundings of sums over the batch.
    if goal.before <= goal.relative:
        return []
    kept, unbiased = _law(reference, x, evidence)
    found = [
        (goal.left(np.concatenate(predicted)), changes)
        for changes, predicted in _hypotheses(reference, yours, x, kept, unbiased)
    ]
    return findings(found, goal, place=place, backend=evidence.yours.backend)


def _row(statistics: Statistics) -> np.ndarray:
    return np.concatenate([statistics.after[role].astype(np.float64) for role in _ROLES])


def _law(reference: Statistics, x: np.ndarray, evidence: LayerEvidence) -> tuple[float, bool]:
    """The share of the old value that the reference keeps, and whether its variance is the unbiased one."""
    mean, var = moments(x, BatchNorm(eps=0.0, momentum=None))
    count = x.size / x.shape[-1]
    kept = kept_share(_old(reference, "mean"), reference.after["mean"].astype(np.float64), mean)
    operation = evidence.reference.operation
    if isinstance(operation, BatchNorm) and operation.momentum is not None and not np.isfinite(kept):
        kept = operation.momentum
    kept = next((one for one in plain(kept) if abs(one - kept) < 1e-6), kept)
    lefts = [
        float(np.linalg.norm(kept * _old(reference, "var") + (1 - kept) * one - reference.after["var"]))
        for one in (var, var * count / max(count - 1, 1))
    ]
    return kept, lefts[1] < lefts[0]


def _old(statistics: Statistics, role: str) -> np.ndarray:
    return statistics.before[role].astype(np.float64)


def _hypotheses(
    reference: Statistics, yours: Statistics, x: np.ndarray, kept: float, unbiased: bool
) -> Iterator[tuple[tuple[Change, ...], tuple[np.ndarray, np.ndarray]]]:
    """What may be otherwise, and the mean and variance that come of it."""
    mean, biased = moments(x, BatchNorm(eps=0.0, momentum=None))
    count = x.size / x.shape[-1]
    variances = {False: biased, True: biased * count / max(count - 1, 1)}
    old = (_old(reference, "mean"), _old(reference, "var"))

    def after(share: float, many: bool, start: tuple[np.ndarray, np.ndarray] = old) -> tuple[np.ndarray, np.ndarray]:
        return share * start[0] + (1 - share) * mean, share * start[1] + (1 - share) * variances[many]

    facts = facts_of_momentum(kept)
    frozen = Change(
        cause="statistics_not_updated",
        yours="leaves its running statistics as they are",
        reference="updates them",
        cost=0.9,
    )
    yield (frozen,), (_old(yours, "mean"), _old(yours, "var"))
    titles = {False: "keeps the biased variance of the batch", True: "keeps N / (N - 1) times the batch's variance"}
    form = Change(
        cause="variance_biased" if unbiased else "variance_unbiased",
        yours=titles[not unbiased],
        reference=titles[unbiased],
    )
    yield (form,), after(kept, not unbiased)
    meant = Change(
        cause="momentum",
        yours=f"keeps {1 - kept:.6g} of the old statistics in a step",
        reference=f"keeps {kept:.6g}: the momentum of one framework is 1 - that of another",
        facts=facts,
        cost=0.9,
    )
    yield (meant,), after(1 - kept, unbiased)
    solved = kept_share(old[0], yours.after["mean"].astype(np.float64), mean)
    for at, share in enumerate(plain(solved)):
        other = Change(
            cause="momentum",
            yours=f"keeps {share:.6g} of the old statistics in a step",
            reference=f"keeps {kept:.6g}",
            facts=facts,
            cost=1.0 + at / 10,
        )
        yield (other,), after(share, unbiased)
        yield (other, form), after(share, not unbiased)
    if any(not np.array_equal(reference.before[role], yours.before[role]) for role in _ROLES):
        start = Change(
            cause="never_loaded",
            yours="began with other running statistics",
            reference="with its own",
            facts={"roles": "mean and var"},
        )
        yield (start,), after(kept, unbiased, (_old(yours, "mean"), _old(yours, "var")))
    exchanged = Change(cause="mean_var_swapped", yours="keeps mean and variance exchanged", reference="as they are")
    first, second = after(kept, unbiased)
    yield (exchanged,), (second, first)
