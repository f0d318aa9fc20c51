"""Reports for machines: JSON for scripts, JUnit XML for continuous integration."""

import json
import re
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from common import architectures
from common.errors import RecordError
from common.files import written
from common.parity import steps
from common.parity.compare import Comparison
from common.parity.gate import Difference, OrderDependence, place, rank, section
from common.parity.levels import RESPONSE_FACTOR
from common.parity.session import Result
from common.training import recipe as recipes

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_json(path: Path, results: Sequence[Result]) -> None:
    """Write the results of a check. Raises `RecordError` where the file cannot be written."""
    _write(path, json.dumps(as_json(results), indent=2, allow_nan=False) + "\n")


def as_json(results: Sequence[Result]) -> dict[str, Any]:
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
        "failures": [
            {"variant": result.case.variant, "backend": backend, "error": str(error)}
            for result in results
            for backend, error in result.failures.items()
        ],
        "versions": {name: dict(versions) for result in results for name, versions in result.versions.items()},
    }


def _entry(result: Result, compared: Comparison) -> dict[str, Any]:
    case = result.case
    return {
        "variant": case.variant,
        "dtype": compared.dtype,
        "level": compared.level,
        "passed": compared.passed,
        "backends": list(compared.backends),
        "size": list(case.size),
        "batch": case.batch,
        "seed": case.seed,
        "input": result.source,
        "arrays": len({d.tensor for d in compared.differences}),
        "modes": _modes(compared),
        "first_difference": _difference(compared.first) if compared.first else None,
        "odd_one_out": compared.odd_one_out if not compared.passed else None,
        "order_dependent": [_order_dependence(found) for found in compared.order_dependent],
        "problems": [vars(problem) for problem in compared.problems],
        "imprecise": [
            vars(p) | {"error": _finite(p.error), "median": _finite(p.median)}
            for p in compared.precision
            if not p.passed
        ],
        "float32_inside": {name: list(layers) for name, layers in compared.float32_inside.items()},
        "spec": architectures.to_dict(case.spec),
        "recipe": recipes.to_dict(case.training) if "steps" in compared.modes else None,
    }


def _modes(compared: Comparison) -> dict[str, dict[str, Any]]:
    modes: dict[str, dict[str, Any]] = {}
    for difference in sorted(compared.worst(), key=rank):
        modes.setdefault(difference.mode, {})[" | ".join(difference.pair)] = _difference(difference)
    return modes


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "error": _finite(difference.error),
        "response": _finite(difference.response / difference.norm if difference.norm else difference.response),
        "ratio": _finite(difference.ratio),
        "tensor": difference.place,
        "pass": difference.tensor.split("/")[0],
        "kind": difference.tensor.split("/")[1],
        "step": difference.step,
        "pair": list(difference.pair),
        "level": difference.level,
        "verdict": difference.verdict,
    }


def _order_dependence(found: OrderDependence) -> dict[str, Any]:
    return {
        "backend": found.backend,
        "tensor": place(found.tensor),
        "pass": found.tensor.split("/")[0],
        "kind": found.tensor.split("/")[1],
        "step": steps.number(found.tensor),
        "error": _finite(found.error),
        "ratio": _finite(found.ratio),
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if isfinite(value) else None


def write_junit(path: Path, results: Sequence[Result]) -> None:
    """Write the results as JUnit XML, a test case for every variant, dtype, mode and pair. Raises `RecordError`."""
    suites = ElementTree.Element("testsuites", name="resnet-parity")
    for result in results:
        suite = ElementTree.SubElement(suites, "testsuite", name=result.case.variant)
        for compared in result.comparisons:
            _add_cases(suite, compared)
        for backend, error in result.failures.items():
            case = ElementTree.SubElement(suite, "testcase", classname=result.case.variant, name=backend)
            ElementTree.SubElement(case, "error", message=str(error))
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("./testcase/failure"))))
        suite.set("errors", str(len(suite.findall("./testcase/error"))))
        suite.set("time", f"{result.seconds:.3f}")
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode", xml_declaration=True)
    # The last output of a crashed process may hold characters, colours for one, that XML cannot.
    _write(path, _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text) + "\n")


def _add_cases(suite: ElementTree.Element, compared: Comparison) -> None:
    classname = f"{compared.variant}.{compared.level}.{compared.dtype}"
    for difference in compared.worst():
        name = f"{difference.section} {' | '.join(difference.pair)}"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
        if difference.verdict in ("different", "undecided"):
            after = f" after step {difference.step}" if difference.step else ""
            message = f"{difference.verdict} at {difference.place}{after}: relative error {difference.error:.2e}"
            ElementTree.SubElement(case, "failure", message=f"{message}, {difference.ratio:.3g} responses")
    for found in compared.order_dependent:
        name = f"{section(found.tensor)} {found.backend} in another order"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
        message = f"depends on the order of the batch at {place(found.tensor)}: relative change {found.error:.2e}"
        ElementTree.SubElement(case, "failure", message=f"{message}, {found.ratio:.3g} one-ulp responses")
    for problem in compared.problems:
        case = ElementTree.SubElement(
            suite, "testcase", classname=classname, name=f"{problem.backend} {problem.tensor}"
        )
        ElementTree.SubElement(case, "failure", message=problem.what)
    for precision in compared.precision:
        if not precision.passed:
            name = f"precision {precision.backend} {precision.tensor}"
            case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
            ElementTree.SubElement(case, "failure", message=f"{precision.error:.2e}, median {precision.median:.2e}")


def _write(path: Path, text: str) -> None:
    with written(path, RecordError) as beside:
        beside.write_text(text, encoding="utf-8")
