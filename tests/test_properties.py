"""Any valid specification is one function in three frameworks, not only the named ones."""

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from test_parity import explain

from common.architectures.resnet import ResNetSpec, Shortcut
from common.errors import InputError
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import Session


@st.composite
def specs(draw: st.DrawFn, most_stages: int = 3, channels: tuple[int, ...] = (4, 8, 12, 16)) -> ResNetSpec:
    """Small specs over every field that changes the function."""
    bottleneck = draw(st.booleans())
    stages = draw(st.integers(1, most_stages))
    norm = draw(st.booleans()) or draw(st.booleans())
    head_pool, head = draw(
        st.sampled_from(
            [("average", "logits"), ("average", "softmax"), ("max", "logits"), ("average", "none"), ("none", "none")]
        )
    )
    # Few, since Keras on TensorFlow compiles every grouped convolution each time anew.
    groups = draw(st.sampled_from([1] * 6 + [2, 4])) if bottleneck else 1
    widths = sorted(draw(st.lists(st.sampled_from(channels), min_size=stages, max_size=stages)))
    # Where a bottleneck's expansion pads, nearly all of a shortcut is zero: rightly refused as too empty.
    shortcut: Shortcut = draw(st.sampled_from(["projection"] * 2 + (["none"] if bottleneck else ["zero_pad", "none"])))
    dilation = tuple(draw(st.booleans()) for _ in range(stages - 1))
    return ResNetSpec(
        block="bottleneck" if bottleneck else "basic",
        blocks=tuple(draw(st.lists(st.integers(1, 2), min_size=stages, max_size=stages))),
        widths=tuple(widths),
        expansion=draw(st.sampled_from([2, 4])) if bottleneck else 1,
        groups=groups,
        in_channels=draw(st.sampled_from([1, 3, 4])),
        classes=draw(st.sampled_from([2, 7])),
        stem_kernel=draw(st.sampled_from([1, 3, 5, 7])),
        stem_stride=draw(st.sampled_from([1, 2])),
        stem_width=4,
        stem_padding=draw(st.sampled_from(["symmetric", "same", "valid"])),
        stem_pool=draw(st.booleans()),
        pool_padding=draw(st.sampled_from(["symmetric", "same", "valid", "ceil"])),
        block_padding=draw(st.sampled_from(["symmetric", "same"])),
        stride_in=draw(st.sampled_from(["conv1", "conv2"])),
        shortcut=shortcut,
        replace_stride_with_dilation=dilation,
        deep_stem=draw(st.sampled_from([(), (), (4, 8)])),
        unused_projection=shortcut == "projection" and draw(st.booleans()),
        shortcut_pool=shortcut == "projection" and not any(dilation) and draw(st.booleans()),
        squeeze=draw(st.sampled_from([(), (), (8,) * stages])),
        relu_before_add=shortcut != "none" and draw(st.booleans()),
        relu_after_add=shortcut == "none" or draw(st.booleans()),
        shared=draw(st.sampled_from(["none", "none", "conv", *(["norm"] if norm else [])])),
        conv_bias=draw(st.booleans()),
        norm=norm,
        shortcut_norm=norm and draw(st.booleans()),
        bn_eps=draw(st.sampled_from([1e-5, 1.001e-5, 1e-3])),
        bn_momentum=draw(st.sampled_from([0.9, 0.99])),
        running_variance=draw(st.sampled_from(["unbiased", "biased"])),
        head_pool=head_pool,  # type: ignore[arg-type]
        head=head,  # type: ignore[arg-type]
    )


# Images of 33 to 50 pixels whatever the network, so that batch statistics are over thousands of pixels of few channels;
# or few pixels of the last map, as in the networks of the literature: so many, and a part of one more.
LARGE = st.tuples(st.integers(2, 5), st.integers(33, 50), st.integers(33, 50))
FEW = st.tuples(st.integers(2, 5), st.floats(3, 6), st.floats(3, 6))


def _check(session: Session, spec: ResNetSpec, size: tuple[int, int], batch: int) -> None:
    try:
        case = Case(
            variant="random",
            spec=spec,
            size=size,
            batch=batch,
            photos=tuple(sample_photos()),
            dtypes=("float64",),
        )
    except InputError:  # valid padding leaves nothing
        assume(False)
    result = session.check(case)
    # Where the response is too large to decide anything, or dead units leave hardly a number, the check says so. That
    # does not pass, but shows no defect either.
    assume({d.verdict for c in result.comparisons for d in c.differences} != {"same", "undecided"})
    assume(not any("too empty to compare" in problem.what for c in result.comparisons for problem in c.problems))
    assert result.passed, explain(result)


# Few shapes and widths, many networks: what JAX compiles for one serves the next.
SHAPES = st.sampled_from([(2, 33, 50), (3, 41, 34)])


def _agree(examples: int, seed: int, shapes: st.SearchStrategy[tuple[int, float, float]], **small: Any) -> Any:
    @seeded(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
        database=None,
    )
    @given(spec=specs(**small), shape=shapes)
    def check(session: Session, spec: ResNetSpec, shape: tuple[int, float, float]) -> None:
        batch, *size = shape
        height, width = (n if isinstance(n, int) else int(n * spec.output_stride) for n in size)
        _check(session, spec, (height, width), batch)

    return check


@pytest.mark.slow
def test_random_specs_sizes_and_batches_agree(session: Session) -> None:
    _agree(20, 0, SHAPES, most_stages=2, channels=(4, 8))(session)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 6))
def test_many_random_specs_sizes_and_batches_agree(session: Session, seed: int) -> None:
    _agree(20, seed, st.one_of(LARGE, FEW))(session)


@pytest.mark.slow
def test_sums_of_equal_terms_are_no_difference(session: Session) -> None:
    # Below the average the gradient of a bias is a sum of thousands of equal terms: what `levels.floor` is for.
    spec = ResNetSpec(
        block="basic", blocks=(1,), widths=(4,), in_channels=1, classes=2, stem_kernel=1, stem_stride=1, stem_width=4,
        stem_pool=False, conv_bias=True, norm=False, shortcut_norm=False,
    )  # fmt: skip
    photos = tuple(sample_photos())
    result = session.check(Case(variant="sums", spec=spec, size=(49, 49), photos=photos, dtypes=("float64",)))
    assert result.passed, explain(result)
