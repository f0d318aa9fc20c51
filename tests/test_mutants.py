"""The proof that the proof works: every planted defect is caught where the catalogue says, and no equivalent is."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from common.architectures import Spec
from common.backends.columns import ALIASES
from common.images import sample_photos
from common.parity.case import Case
from common.parity.compare import Comparison
from common.parity.session import Session
from tests.mutants.bench import Bench
from tests.mutants.catalogue import (
    BASE,
    EQUIVALENTS,
    IMAGES_OF_ORDER,
    MUTANTS,
    OF_ORDER,
    SIZE,
    Equivalent,
    Mutant,
    OfOrder,
)

pytestmark = [pytest.mark.slow, pytest.mark.mutants]


@pytest.fixture(scope="module")
def bench(session: Session) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(session, stack)


# Defects that no hypothesis explains, and why.
NOT_NAMED = {
    "torch-loss_is_the_sum": "the loss is no layer",
    "keras-label_smoothing": "the loss is no layer",
}

# What is compared before a defect is found, and where it must be: a check looks at the levels, and at the passes of a
# level, in this order. Nothing behind the first finding can change it, and it takes most of the time.
UP_TO: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {
    ("L0", "exact"): {"dtypes": ()},
    ("L1", "eval"): {"dtypes": ("float64",), "modes": ("eval",)},
    ("L1", "train"): {"dtypes": ("float64",), "modes": ("eval", "train")},
}
ALL_OF_FLOAT64: dict[str, tuple[str, ...]] = {"dtypes": ("float64",)}


def _case(spec: Spec, size: tuple[int, int], **options: Any) -> Case:
    return Case(variant="mutant", spec=spec, size=size, photos=tuple(sample_photos()), **options)


def _where(compared: Comparison) -> tuple[str, str]:
    """Section and place of the first thing that is wrong."""
    if compared.problems:
        return compared.problems[0].section, compared.problems[0].place
    order = [difference.tensor for difference in compared.differences]  # of execution
    # A report names both. An imprecise reference measures too large a response, and only the second may tell.
    found = [compared.first.tensor] if compared.first else []
    tensor = min(found + [p.tensor for p in compared.precision if not p.passed], key=order.index)
    return tensor.section, tensor.label


# Images as large as an auxiliary branch of Inception v3 needs take a minute.
@pytest.mark.parametrize(
    "mutant",
    [pytest.param(mutant, marks=[pytest.mark.long] if max(mutant.size) > 200 else []) for mutant in MUTANTS],
    ids=lambda mutant: mutant.name,
)
def test_a_planted_defect_is_caught_at_its_level_and_layer_and_laid_to_its_backend(
    bench: Bench, mutant: Mutant
) -> None:
    # Float32 is needed for what only float32 shows.
    looked_at = {} if mutant.level == "L2" else UP_TO.get((mutant.level, mutant.section), ALL_OF_FLOAT64)
    compared = bench.check(_case(mutant.spec, mutant.size, **looked_at), mutant.backend, mutant.path)
    failed = [comparison for comparison in compared if not comparison.passed]
    assert failed, "the defect was not caught"
    assert (failed[0].level, *_where(failed[0])) == (mutant.level, mutant.section, mutant.at)
    assert failed[0].odd_one_out == ALIASES.get(mutant.backend, mutant.backend)


@pytest.mark.long  # localising and diagnosing takes longer than finding
@pytest.mark.parametrize("mutant", [m for m in MUTANTS if max(m.size) <= 200], ids=lambda mutant: mutant.name)
def test_the_mistake_is_named(bench: Bench, mutant: Mutant) -> None:
    dtypes = ("float64", "float32") if mutant.level == "L2" else ("float64",)
    case = _case(mutant.spec, mutant.size, dtypes=dtypes)
    compared = bench.check(case, mutant.backend, mutant.path)
    pairs = bench.explain(case, mutant.backend, mutant.path, compared)
    named = [defect.best for pair in pairs if pair.diagnosis for defect in pair.diagnosis.defects]
    assert (mutant.name in NOT_NAMED) == (not named or named[0] is None), NOT_NAMED.get(mutant.name, "not named")


@pytest.mark.parametrize("mutant", OF_ORDER, ids=lambda mutant: mutant.name)
def test_what_depends_on_the_order_of_the_batch_is_a_finding_of_its_own(bench: Bench, mutant: OfOrder) -> None:
    case = replace(_case(BASE, SIZE, **ALL_OF_FLOAT64), batch=IMAGES_OF_ORDER)
    compared = next(c for c in bench.check(case, mutant.backend, mutant.path) if not c.passed)
    (found,) = compared.order_dependent
    backend = ALIASES.get(mutant.backend, mutant.backend)
    assert (compared.level, found.backend) == (mutant.level, backend)
    assert (found.tensor.section, found.tensor.label) == (mutant.section, mutant.at)
    assert found.ratio > 1e5
    assert compared.odd_one_out == backend
    # It is no excuse: the others are not taken for the same.
    assert _where(compared) == (mutant.section, mutant.at)


@pytest.mark.parametrize("equivalent", EQUIVALENTS, ids=lambda equivalent: equivalent.name)
def test_a_change_that_computes_the_same_function_is_not_a_defect(bench: Bench, equivalent: Equivalent) -> None:
    compared = bench.check(_case(BASE.replace(**equivalent.changes), SIZE), equivalent.backend, equivalent.path)
    assert all(comparison.passed for comparison in compared), equivalent.why


def test_every_mutant_is_listed_once_and_there_are_at_least_25_over_all_backends() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 25
    assert {mutant.backend for mutant in MUTANTS} == {"torch", "keras", "flax"}
