"""The results of a check as JUnit XML, for continuous integration."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from common.errors import RecordError
from common.files import written
from common.parity.compare import Comparison
from common.parity.session import CheckResult

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_junit(path: Path, results: Sequence[CheckResult]) -> None:
    """Write the results as JUnit XML, a test case for every variant, dtype, mode and pair. Raises `RecordError`."""
    suites = ElementTree.Element("testsuites", name="resnet-parity")
    for result in results:
        suite = ElementTree.SubElement(suites, "testsuite", name=result.variant)
        for compared in result.comparisons:
            _add_cases(suite, compared)
        for backend, error in result.failures.items():
            case = ElementTree.SubElement(suite, "testcase", classname=result.variant, name=backend)
            ElementTree.SubElement(case, "error", message=str(error))
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("./testcase/failure"))))
        suite.set("errors", str(len(suite.findall("./testcase/error"))))
        suite.set("time", f"{result.seconds:.3f}")
    ElementTree.indent(suites)
    text = ElementTree.tostring(suites, encoding="unicode", xml_declaration=True)
    # The last output of a crashed process may hold characters, colours for one, that XML cannot.
    text = _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)
    with written(path, RecordError) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def _add_cases(suite: ElementTree.Element, compared: Comparison) -> None:
    classname = f"{compared.variant}.{compared.level}.{compared.dtype}"
    for difference in compared.worst():
        name = f"{difference.tensor.section} {' | '.join(difference.pair)}"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
        if difference.verdict in ("different", "undecided"):
            tensor = difference.tensor
            after = f" after step {tensor.step}" if tensor.step else ""
            message = f"{difference.verdict} at {tensor.label}{after}: relative error {difference.error:.2e}"
            ElementTree.SubElement(case, "failure", message=f"{message}, {difference.ratio:.3g} responses")
    for found in compared.order_dependent:
        name = f"{found.tensor.section} {found.backend} in another order"
        case = ElementTree.SubElement(suite, "testcase", classname=classname, name=name)
        message = f"depends on the order of the batch at {found.tensor.where}: relative change {found.error:.2e}"
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
