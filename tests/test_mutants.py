"""The proof that the proof works: every planted defect is caught where the catalogue says, and no equivalent is."""

import pytest
from mutants.catalogue import BASE, EQUIVALENTS, MUTANTS, SIZE, Equivalent, Mutant

from common.architectures.resnet import ResNetSpec
from common.backend import ALIASES
from common.check import Case, Result, Session
from common.compare import Comparison
from common.images import sample_photos


def _check(session: Session, spec: ResNetSpec, backend: str, plant: str) -> Result:
    case = Case(variant=plant, spec=spec, size=SIZE, photos=tuple(sample_photos()))
    module = f"tests.mutants.of_{backend.split(':')[0]}"
    result = session.check(case, plant={ALIASES.get(backend, backend): f"{module}:{plant}"})
    assert not result.failures
    return result


def _where(compared: Comparison) -> tuple[str, str]:
    """Section and place of the first thing that is wrong."""
    if compared.problems:
        run, *_, place = compared.problems[0].tensor.split("/", 2)
        return run if "/" in compared.problems[0].tensor else "", place
    if compared.first is not None:
        return compared.first.section, compared.first.place
    imprecise = next(p for p in compared.precision if not p.passed)
    return "eval", imprecise.tensor.split("/", 2)[-1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_defect_is_caught_at_its_level_and_layer_and_laid_to_its_backend(
    session: Session, mutant: Mutant
) -> None:
    result = _check(session, BASE.replace(**mutant.changes), mutant.backend, mutant.plant)
    failed = [compared for compared in result.comparisons if not compared.passed]
    assert failed, "the defect was not caught"
    section, place = _where(failed[0])
    assert (failed[0].level, section or mutant.section, place) == (mutant.level, mutant.section, mutant.at)
    assert failed[0].odd_one_out == ALIASES.get(mutant.backend, mutant.backend)


@pytest.mark.parametrize("equivalent", EQUIVALENTS, ids=lambda equivalent: equivalent.name)
def test_a_change_that_computes_the_same_function_is_not_a_defect(session: Session, equivalent: Equivalent) -> None:
    result = _check(session, BASE.replace(**equivalent.changes), equivalent.backend, equivalent.plant)
    assert result.passed, equivalent.why


def test_every_mutant_is_listed_once_and_there_are_at_least_25_over_all_backends() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 25
    assert {mutant.backend for mutant in MUTANTS} == {"torch", "keras", "flax"}
