"""All five columns at once: Keras on each of its engines beside the others."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from test_parity import PHOTOS, check, explain, twin

from common import architectures
from common.architectures.resnet import ResNetSpec
from common.backends.columns import COLUMNS
from common.parity.case import Case
from common.parity.session import Session
from tests.mutants.bench import Bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def all_columns(session: Session) -> Iterator[Session]:
    """With the processes that the suite has anyway."""
    every = Session(list(COLUMNS))
    every.processes |= session.processes
    with every:
        yield every
        session.processes.update({column: every.processes.pop(column) for column in session.columns})


WHOLE = architectures.find("resnet18.keras_applications")


@pytest.mark.parametrize("spec", [twin(WHOLE), pytest.param(WHOLE, marks=pytest.mark.long)], ids=["twin", "whole"])
def test_keras_on_its_other_engines_is_float32_precise_and_named_where_it_rounds(
    all_columns: Session, spec: ResNetSpec
) -> None:
    result = check(all_columns, "resnet18.keras_applications", 64, spec=spec, dtypes=("float64", "float32"))
    assert result.passed, explain(result)
    norms = [layer.path for layer in spec.layers if layer.kind == "norm"]
    pooled = [layer.path for layer in spec.layers if layer.kind == "global_pool"]
    dense = [layer.path for layer in spec.layers if layer.kind == "dense"]
    inside = next(c for c in result.comparisons if c.dtype == "float64" and c.level == "L1").float32_inside
    assert set(inside["keras:jax"]) == {*norms, *pooled}
    assert set(inside["keras:torch"]) == {*norms, *pooled, *dense}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_defect_in_any_column_is_laid_to_that_column(all_columns: Session, column: str) -> None:
    spec = ResNetSpec(block="basic", blocks=(1,), widths=(8,), stem_kernel=3, stem_width=8, stem_pool=False, classes=10)
    case = Case(variant="tiny", spec=spec, size=(32, 32), photos=PHOTOS, dtypes=("float64", "float32"))
    plant = f"tests.mutants.of_{column.split(':')[0]}:dense_bias_shifted"
    with ExitStack() as stack:
        comparisons = Bench(all_columns, stack).check(case, column, plant)
    for compared in comparisons:
        assert not compared.passed
        assert compared.odd_one_out == column
        assert compared.first is not None
        assert compared.first.tensor.label == "head.fc"
