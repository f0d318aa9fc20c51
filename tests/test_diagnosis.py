"""Planted faults are called by their names, models without one are not accused, and of two faults both are named."""

import os
from collections.abc import Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import torch

from tests.faults.catalogue import CLEAN, FAULTS, TWICE
from tests.faults.judging import answer, at, clean
from tests.faults.planting import Fault, Twice

pytestmark = pytest.mark.usefixtures("unoptimised", "one_thread")

# Faults whose cause is not the first answer, but the second or third, and why.
NOT_FIRST: dict[str, str] = {}
# What JAX compiles takes seconds: of those models these run always, the others in `make test-long`.
SHORT = {
    *("momentum", "unbiased variance", "before the addition", "groups in turn", "blocks in another order"),
    *("detached shortcut", "torch modules-nnx"),
}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(table: tuple[Any, ...]) -> list[Any]:
    found = []
    for one in table:
        names = one if isinstance(one, tuple) else (one.reference, one.port)
        label = "-".join(one) if isinstance(one, tuple) else one.name
        slow = any(word in name for word in ("linen", "nnx") for name in names) and label not in SHORT
        found.append(pytest.param(one, id=label.replace(" ", "-"), marks=[pytest.mark.long] if slow else []))
    return found


@pytest.mark.parametrize("fault", rows(FAULTS))
def test_the_cause_of_a_fault_is_the_first_answer(fault: Fault) -> None:
    found = answer(fault)
    assert not found.unread
    assert not found.result.passed
    ranks = (2, 3) if fault.name in NOT_FIRST else (1,)
    said = [(one.cause, one.place, one.sentence) for one in found.findings]
    assert found.rank(fault) in ranks, said
    assert len(found.defects) == 1, [(one.place, one.best and one.best.cause) for one in found.defects]


def test_at_most_a_tenth_of_the_causes_are_not_the_first_answer() -> None:
    assert len(FAULTS) >= 45
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert NOT_FIRST.keys() <= {fault.name for fault in FAULTS}
    assert len(NOT_FIRST) <= len(FAULTS) / 10


@pytest.mark.parametrize("pair", rows(CLEAN))
def test_models_without_a_fault_are_not_accused(pair: tuple[str, str]) -> None:
    found = clean(*pair)
    assert found.passed, [str(one.first) for one in found.comparisons]
    assert not found.diagnosis.defects


@pytest.mark.parametrize("fault", rows(TWICE))
def test_of_two_faults_both_are_named(fault: Twice) -> None:
    found = answer(fault)
    assert not found.unread
    said = [(one.place, one.best.cause if one.best else "") for one in found.defects]
    assert len(said) == 2, said
    for cause, layer in fault.causes:
        assert any(one == cause and at(place, layer) for place, one in said), said
