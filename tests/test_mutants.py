"""The proof that the proof works: every planted defect is caught where the catalogue says, and no equivalent is."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from common.architectures import Spec
from common.backends.columns import ALIASES
from common.images import sample_photos
from common.parity.case import DTYPES, Case
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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(session: Session) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(session, stack)


def _case(spec: Spec, size: tuple[int, int], dtypes: tuple[str, ...]) -> Case:
    return Case(variant="mutant", spec=spec, size=size, photos=tuple(sample_photos()), dtypes=dtypes)


def _where(compared: Comparison) -> tuple[str, str]:
    """Section and place of the first thing that is wrong."""
    if compared.problems:
        return compared.problems[0].section, compared.problems[0].place
    tensor = compared.first.tensor if compared.first else next(p.tensor for p in compared.precision if not p.passed)
    return tensor.section, tensor.label


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught_at_its_level_and_layer_and_laid_to_its_backend(
    bench: Bench, mutant: Mutant
) -> None:
    # Float32 is needed for what only float32 shows.
    dtypes = DTYPES if mutant.level == "L2" else ("float64",)
    compared = bench.check(_case(mutant.spec, mutant.size, dtypes), mutant.backend, mutant.path)
    failed = [comparison for comparison in compared if not comparison.passed]
    assert failed, "the defect was not caught"
    assert (failed[0].level, *_where(failed[0])) == (mutant.level, mutant.section, mutant.at)
    assert failed[0].odd_one_out == ALIASES.get(mutant.backend, mutant.backend)


@pytest.mark.parametrize("mutant", OF_ORDER, ids=lambda mutant: mutant.name)
def test_what_depends_on_the_order_of_the_batch_is_a_finding_of_its_own(bench: Bench, mutant: OfOrder) -> None:
    case = replace(_case(BASE, SIZE, ("float64",)), batch=IMAGES_OF_ORDER)
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
    compared = bench.check(_case(BASE.replace(**equivalent.changes), SIZE, DTYPES), equivalent.backend, equivalent.path)
    assert all(comparison.passed for comparison in compared), equivalent.why


def test_every_mutant_is_listed_once_and_there_are_at_least_25_over_all_backends() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 25
    assert {mutant.backend for mutant in MUTANTS} == {"torch", "keras", "flax"}
