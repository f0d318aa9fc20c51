"""The frameworks compute the same function: every named variant, at even and odd sizes, and who is wrong if not."""

from pathlib import Path

import pytest

from common import architectures
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.backend import COLUMNS
from common.check import Case, Result, Session
from common.images import sample_photos
from common.report.console import result as as_table

PHOTOS = tuple(sample_photos())
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Sizes at which batch statistics are over enough values for float64 to decide: at least 8 a channel in the last stage.
SMALL = {"resnet20": 32, "resnet32": 32, "resnet44": 32, "resnet56": 32, "resnet110": 32}


def explain(result: Result) -> str:
    """The console report, for the message of a failing test."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=160).print(as_table(result))
    return text.getvalue()


def check(session: Session, name: str, size: int, **options: object) -> Result:
    spec = architectures.find(name)
    assert isinstance(spec, ResNetSpec)
    options = {"dtypes": ("float64",), "photos": PHOTOS} | options
    return session.check(Case(variant=name, spec=spec, size=(size, size), **options))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.variants())
def test_every_named_variant_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    result = check(session, name, SMALL.get(name, 64))
    assert result.passed, explain(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DEPTHS, *(f"resnet18.{convention}" for convention in CONVENTIONS)])
def test_sizes_are_no_special_case(session: Session, name: str) -> None:
    """65 = 1 mod 32: every SAME padding is symmetric there, and nowhere else."""
    result = check(session, name, 65)
    assert result.passed, explain(result)


@pytest.mark.slow
def test_resnet50_at_full_size(session: Session) -> None:
    result = check(session, "resnet50", 224)
    assert result.passed, explain(result)


@pytest.mark.slow
def test_keras_on_its_other_engines_is_float32_precise_and_named_where_it_rounds(all_columns: Session) -> None:
    result = check(all_columns, "resnet18.keras_applications", 64, dtypes=("float64", "float32"))
    assert result.passed, explain(result)
    spec = architectures.find("resnet18.keras_applications")
    norms = [layer.path for layer in spec.layers if layer.kind == "norm"]
    pooled = [layer.path for layer in spec.layers if layer.kind == "global_pool"]
    dense = [layer.path for layer in spec.layers if layer.kind == "dense"]
    inside = next(c for c in result.comparisons if c.dtype == "float64" and c.level == "L1").float32_inside
    assert set(inside["keras:jax"]) == {*norms, *pooled}
    assert {*norms, *pooled, *dense} <= set(inside["keras:torch"])


@pytest.mark.parametrize("column", COLUMNS)
def test_a_defect_in_any_column_is_laid_to_that_column(all_columns: Session, column: str, tmp_path: Path) -> None:
    spec = ResNetSpec(block="basic", blocks=(1, 1), widths=(8, 16), stem_width=8, classes=10)
    case = Case(variant="tiny", spec=spec, size=(32, 32), photos=PHOTOS, dtypes=("float64", "float32"))
    plant = {column: f"tests.mutants.of_{column.split(':')[0]}:dense_bias_shifted"}
    result = all_columns.check(case, plant=plant)
    for compared in result.comparisons:
        assert not compared.passed
        assert compared.odd_one_out == column
        assert compared.first is not None
        assert compared.first.place == "head.fc"
