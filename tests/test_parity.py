"""The frameworks compute the same function: every named variant, at even and odd sizes, and who is wrong if not."""

from collections.abc import Iterable
from dataclasses import replace

import pytest

from common import architectures
from common.architectures import Spec
from common.architectures.resnet import CONVENTIONS, ResNetSpec
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import CheckResult, Session
from common.report.console import result as as_table

PHOTOS = tuple(sample_photos())
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Sizes at which batch statistics are over enough values for float64 to decide: at least 8 a channel in the last stage.
SMALL = {f"{family}{depth}": 32 for family in ("resnet", "plain") for depth in (20, 32, 44, 56, 110)}


def twin(spec: ResNetSpec) -> ResNetSpec:
    """Two stages of `spec`, a quarter as wide: every convention, the first block of each stage and one that is neither.
    More depth, width and groups are the same code with other numbers: `make test-long`."""
    return replace(
        spec,
        blocks=(1, 2),
        widths=tuple(width // 4 for width in spec.widths[:2]),
        groups=min(spec.groups, 4),
        width_per_group=64,
        replace_stride_with_dilation=(False,),
        stem_width=spec.stem_width // 4,
        deep_stem=tuple(width // 4 for width in spec.deep_stem),
        squeeze=spec.squeeze[:2],
        classes=10,
    )


def kinds() -> dict[str, ResNetSpec]:
    """The twins that differ, each under the name of the first variant that has it."""
    found: dict[ResNetSpec, str] = {}
    for name in architectures.variants():
        spec = architectures.find(name)
        if isinstance(spec, ResNetSpec):
            found.setdefault(twin(spec), name)
    return {name: spec for spec, name in found.items()}


KINDS = kinds() | {
    # Several forms in one network, since each alone takes as long.
    "bottlenecks": twin(architectures.find("resnet50d")).replace(squeeze=(16, 32), relu_before_add=True, shared="norm"),
    "basic blocks": twin(architectures.find("resnet18.unused_projection")).replace(
        squeeze=(8, 8), relu_after_add=False, shared="conv"
    ),
}
# Every value of every field that the twins differ in, in as few of them as have it.
SHORT = (
    *("resnext50_32x4d", "resnet20", "resnet50.paper", "resnet50.keras_applications", "resnet18.keras_classic"),
    *("resnet18.flax_examples", "resnet18.d2l", "plain20", "bottlenecks", "basic blocks"),
)


def explain(result: CheckResult) -> str:
    """The console report, for the message of a failing test."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    Console(file=text, width=160).print(as_table(result))
    return text.getvalue()


def check(session: Session, name: str, size: int | tuple[int, int], **options: object) -> CheckResult:
    spec = options.pop("spec", None) or architectures.find(name)
    options = {"spec": spec, "dtypes": ("float64",), "photos": PHOTOS} | options
    size = (size, size) if isinstance(size, int) else size
    return session.check(Case(variant=name, size=size, **options))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SHORT else [pytest.mark.long]) for name in KINDS]
)
def test_every_kind_of_network_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    """Even one way and odd the other: 65 = 1 mod 32, where every SAME padding is symmetric, and nowhere else."""
    result = check(session, name, (64, 65), spec=KINDS[name])
    assert result.passed, explain(result)


def field_values(specs: Iterable[Spec]) -> set[tuple[str, str]]:
    """Every value of every field, with its field."""
    return {(field, repr(value)) for spec in specs for field, value in architectures.to_dict(spec).items()}


def test_the_short_list_has_every_value_of_every_field() -> None:
    assert field_values(KINDS[name] for name in SHORT) == field_values(KINDS.values())


@pytest.mark.long
def test_resnet50_is_one_function_in_three_frameworks(session: Session) -> None:
    result = check(session, "resnet50", (64, 65))
    assert result.passed, explain(result)


@pytest.mark.long
@pytest.mark.parametrize("name", architectures.variants())
def test_every_named_variant_is_one_function_in_three_frameworks(session: Session, name: str) -> None:
    size = architectures.find(name).input_size or (SMALL.get(name, 64),) * 2
    result = check(session, name, size)
    assert result.passed, explain(result)


@pytest.mark.long
@pytest.mark.parametrize("name", [*DEPTHS, *(f"resnet18.{convention}" for convention in CONVENTIONS)])
def test_sizes_are_no_special_case(session: Session, name: str) -> None:
    result = check(session, name, 65)
    assert result.passed, explain(result)


@pytest.mark.long
def test_resnet50_at_full_size(session: Session) -> None:
    result = check(session, "resnet50", 224)
    assert result.passed, explain(result)
