"""`assert_same`: one line in a test-suite."""

from typing import Any

from common.parity.models import ModelsResult, compare_models
from common.report import models as tables


class DifferentModels(AssertionError):
    """Two models are not shown to be one function. Says the table, the first layer and the diagnosis; `result` has
    them as data."""

    def __init__(self, result: ModelsResult) -> None:
        super().__init__(tables.text(tables.result(result)))
        self.result = result


def assert_same(*models: Any, inputs: Any, **options: Any) -> ModelsResult:
    """Compare models as `compare_models` does, whose arguments these are, and return the result.

    Raises `DifferentModels`, an `AssertionError`, where they are not shown to be one function; `ModelError` and
    `InputError` as there.
    """
    __tracebackhide__ = True
    found = compare_models(*models, inputs=inputs, **options)
    if not found.passed:
        raise DifferentModels(found)
    return found
