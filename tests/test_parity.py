"""The frameworks compute the same function: every named variant, at even and odd sizes, and who is wrong if not."""

import pytest

from common import architectures
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import Result, Session
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
