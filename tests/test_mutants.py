"""The proof that the proof works: every planted defect is caught where the catalogue says, and no equivalent is."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from mutants.catalogue import BASE, EQUIVALENTS, MUTANTS, SIZE, Equivalent, Mutant

from common.architectures.resnet import ResNetSpec
from common.backend import ALIASES
from common.case import DTYPES, Case, Inputs
from common.check import Session, compare_case
from common.compare import Comparison, place, section
from common.images import sample_photos
from common.record import Record


class Bench:
    """Runs only the backend with the defect; what the others compute of the same case is kept."""

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self._session = session
        self._stack = stack
        self._prepared: dict[tuple[ResNetSpec, tuple[str, ...]], Inputs] = {}
        self._clean: dict[tuple[Inputs, str], dict[str, Record]] = {}

    def check(self, spec: ResNetSpec, backend: str, plant: str, dtypes: tuple[str, ...]) -> list[Comparison]:
        backend = ALIASES.get(backend, backend)
        if (spec, dtypes) not in self._prepared:
            case = Case(variant="mutant", spec=spec, size=SIZE, photos=tuple(sample_photos()), dtypes=dtypes)
            self._prepared[spec, dtypes] = self._stack.enter_context(self._session.prepared(case))
        inputs = self._prepared[spec, dtypes]
        reference = self._session.references[0]
        records = {}
        for column in self._session.columns:
            if column == backend:
                module = f"tests.mutants.of_{backend.split(':')[0]}"
                records[column] = self._session.run(column, inputs, column == reference, plant=f"{module}:{plant}")
                continue
            if (inputs, column) not in self._clean:
                self._clean[inputs, column] = self._session.run(column, inputs, column == reference)
            records[column] = self._clean[inputs, column]
        return compare_case(inputs.case, records, reference)


@pytest.fixture(scope="module")
def bench(session: Session) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(session, stack)


def _where(compared: Comparison) -> tuple[str, str]:
    """Section and place of the first thing that is wrong."""
    if compared.problems:
        tensor = compared.problems[0].tensor
    elif compared.first is not None:
        tensor = compared.first.tensor
    else:
        tensor = next(p.tensor for p in compared.precision if not p.passed)
    return section(tensor), place(tensor)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught_at_its_level_and_layer_and_laid_to_its_backend(
    bench: Bench, mutant: Mutant
) -> None:
    # Float32 is needed for what only float32 shows.
    dtypes = DTYPES if mutant.level == "L2" else ("float64",)
    compared = bench.check(BASE.replace(**mutant.changes), mutant.backend, mutant.plant, dtypes)
    failed = [comparison for comparison in compared if not comparison.passed]
    assert failed, "the defect was not caught"
    assert (failed[0].level, *_where(failed[0])) == (mutant.level, mutant.section, mutant.at)
    assert failed[0].odd_one_out == ALIASES.get(mutant.backend, mutant.backend)


@pytest.mark.parametrize("equivalent", EQUIVALENTS, ids=lambda equivalent: equivalent.name)
def test_a_change_that_computes_the_same_function_is_not_a_defect(bench: Bench, equivalent: Equivalent) -> None:
    compared = bench.check(BASE.replace(**equivalent.changes), equivalent.backend, equivalent.plant, DTYPES)
    assert all(comparison.passed for comparison in compared), equivalent.why


def test_every_mutant_is_listed_once_and_there_are_at_least_25_over_all_backends() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 25
    assert {mutant.backend for mutant in MUTANTS} == {"torch", "keras", "flax"}
