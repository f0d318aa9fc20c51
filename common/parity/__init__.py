"""The levels, records and what is compared; `assert_same` and `compare_models` are what a user's tests import."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.parity.models import ModelsResult, compare_models
    from common.report.assertions import DifferentModels, assert_same

__all__ = ["DifferentModels", "ModelsResult", "assert_same", "compare_models"]

# Found when they are asked for: an assertion shows a report, which builds on what is in this package.
_WHERE = {
    "assert_same": "common.report.assertions",
    "DifferentModels": "common.report.assertions",
    "compare_models": "common.parity.models",
    "ModelsResult": "common.parity.models",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
