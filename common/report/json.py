"""The results of a check as JSON, for scripts."""

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from common.diagnosis.evidence import Diagnosis, Finding
from common.errors import RecordError
from common.files import written
from common.parity.compare import Comparison, Difference, rank
from common.parity.gate import OrderDependence
from common.parity.levels import RESPONSE_FACTOR
from common.parity.localise import Added
from common.parity.models import ModelsResult, Pair
from common.parity.names import ArrayName
from common.parity.session import CheckResult


def write_json(path: Path, results: Sequence[CheckResult]) -> None:
    """Write the results of a check. Raises `RecordError` where the file cannot be written."""
    with written(path, RecordError) as beside:
        beside.write_text(json.dumps(as_json(results), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def as_json(results: Sequence[CheckResult]) -> dict[str, Any]:
    """The results as JSON data: `passed`, and one entry in `checks` for every variant and dtype.

    An entry's `modes` hold, by mode and pair (``"torch | flax"``), the difference that is largest when measured in
    one-ulp responses, one that fails before one that does not: its relative error, the response (relative too) that it
    is held against, and where it is. ``kind`` is tap, loss, stat, grad, or in mode steps one of those of
    common/parity/steps.py, and ``step`` the optimiser step after which it shows.
    """
    return {
        "passed": bool(results) and all(result.passed for result in results),
        "limit": RESPONSE_FACTOR,
        "checks": [_entry(result, compared) for result in results for compared in result.comparisons],
        "explained": [{"variant": result.variant, **_explained(pair)} for result in results for pair in result.pairs],
        "failures": [
            {"variant": result.variant, "backend": backend, "error": str(error)}
            for result in results
            for backend, error in result.failures.items()
        ],
        "versions": {name: dict(versions) for result in results for name, versions in result.versions.items()},
    }


def write_models(path: Path, result: ModelsResult) -> None:
    """Write the result of a comparison of models. Raises `RecordError` where the file cannot be written."""
    with written(path, RecordError) as beside:
        beside.write_text(json.dumps(models_as_json(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def models_as_json(result: ModelsResult) -> dict[str, Any]:
    """The comparison of a user's models as JSON data: `levels` as the `checks` of `as_json`, and one entry in `pairs`
    for the reference and each other model: what was matched, what each layer adds, and the diagnosis."""
    return {
        "passed": result.passed,
        "models": list(result.names),
        "modes": list(result.modes),
        "limit": RESPONSE_FACTOR,
        "levels": [
            {"dtype": compared.dtype, **_compared(compared), "notes": list(result.notes)}
            for compared in result.comparisons
        ],
        "pairs": [
            {
                **_explained(pair),
                "layers": [list(names) for names in pair.matching.calls],
                "parameters": {name: other for name, (other, _) in pair.matching.parameters.items()},
                "unmatched": [list(names) for names in pair.matching.unmatched],
            }
            for pair in result.pairs
        ],
        "versions": {name: dict(versions) for name, versions in result.versions.items()},
    }


def _explained(pair: Pair) -> dict[str, Any]:
    return {
        "models": [pair.reference, pair.other],
        "added": [_added(one) for one in pair.localised.failing] if pair.localised else [],
        "diagnosis": diagnosis_as_json(pair.diagnosis) if pair.diagnosis else [],
        "as_spec": _finding(pair.diagnosis.as_spec) if pair.diagnosis and pair.diagnosis.as_spec else None,
    }


def diagnosis_as_json(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """A defect each: its place, the cause that explains it, or null, and the one that comes next."""
    return [
        {
            "place": defect.place,
            "best": _finding(defect.best) if defect.best else None,
            "runner_up": _finding(defect.runner_up) if defect.runner_up else None,
        }
        for defect in diagnosis.defects
    ]


def _finding(found: Finding) -> dict[str, Any]:
    return vars(found) | {
        "sentence": found.sentence,
        "before": _finite(found.before),
        "after": _finite(found.after),
    }


def _added(one: Added) -> dict[str, Any]:
    return vars(one) | {"added": _finite(one.added), "inherited": _finite(one.inherited or 0.0)}


def _entry(result: CheckResult, compared: Comparison) -> dict[str, Any]:
    facts = dict(result.facts)
    recipe = facts.pop("recipe")
    return {
        "variant": result.variant,
        "dtype": compared.dtype,
        **facts,
        "input": result.source,
        **_compared(compared),
        "spec": dict(compared.subject),
        "recipe": recipe if "steps" in compared.modes else None,
    }


def _compared(compared: Comparison) -> dict[str, Any]:
    """What one level found."""
    return {
        "level": compared.level,
        "passed": compared.passed,
        "backends": list(compared.backends),
        "arrays": len({d.tensor for d in compared.differences}),
        "modes": _modes(compared),
        "first_difference": _difference(compared.first) if compared.first else None,
        "odd_one_out": compared.odd_one_out if not compared.passed else None,
        "order_dependent": [_order_dependence(found) for found in compared.order_dependent],
        "problems": [vars(problem) | {"tensor": str(problem.tensor)} for problem in compared.problems],
        "imprecise": [
            vars(p) | {"tensor": str(p.tensor), "error": _finite(p.error), "median": _finite(p.median)}
            for p in compared.precision
            if not p.passed
        ],
        "float32_inside": {name: list(layers) for name, layers in compared.float32_inside.items()},
    }


def _modes(compared: Comparison) -> dict[str, dict[str, Any]]:
    modes: dict[str, dict[str, Any]] = {}
    for difference in sorted(compared.worst(), key=rank):
        modes.setdefault(difference.tensor.mode, {})[" | ".join(difference.pair)] = _difference(difference)
    return modes


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "error": _finite(difference.error),
        "response": _finite(difference.response / difference.norm if difference.norm else difference.response),
        "ratio": _finite(difference.ratio),
        **_name(difference.tensor),
        "pair": list(difference.pair),
        "level": difference.level,
        "verdict": difference.verdict,
    }


def _name(name: ArrayName) -> dict[str, Any]:
    return {
        "tensor": name.label,
        "pass": str(name).partition("/")[0],
        "kind": name.kind,
        "step": name.step,
    }


def _order_dependence(found: OrderDependence) -> dict[str, Any]:
    return {
        "backend": found.backend,
        **_name(found.tensor),
        "error": _finite(found.error),
        "ratio": _finite(found.ratio),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if isfinite(value) else None
