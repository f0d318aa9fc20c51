"""A fault planted in plain code between layers, or in what a model is given, is named, and no other."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.diagnosis.causes import AND, CAUSES
from common.diagnosis.evidence import GlueEvidence
from common.diagnosis.glue import explain_glue
from common.diagnosis.images import explain_input
from tests.diagnosis_evidence import LIMIT, Fault, drawn, first, last, tensor

SHAPE = (2, 8, 8, 6)
SOURCES = {name: drawn(*SHAPE, seed=at) for at, name in enumerate(("bn2", "shortcut", "conv1", "stem"))}
GATE = {"project": drawn(2, 8, 8, 6), "squeeze": 3 * drawn(2, 1, 1, 6, seed=1)}
TOKENS = {name: drawn(2, 10, 12, seed=at) for at, name in enumerate(("query", "key", "value"))}


def of(call, wrong, sources=SOURCES, backend="torch"):
    """Two formulas of the sources, as PyTorch computes them with channels first."""

    def make():
        given = [first(x) if x.ndim > 3 else tensor(x) for x in sources.values()]
        reference, yours = (last(one) if one.ndim > 3 else one.numpy() for one in (call(*given), wrong(*given)))
        return evidence(reference, yours, sources, backend)

    return make


def evidence(reference, yours, sources=SOURCES, backend="torch"):
    return GlueEvidence(
        training=False,
        place="the input of head",
        backend=backend,
        sources=sources,
        reference=reference,
        yours=yours,
        limit=LIMIT * float(np.linalg.norm(reference)),
    )


def core(q, k, v, heads=3, scale=None, axis=-1):
    """Attention's core."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((scale * q @ k.transpose(-1, -2)).softmax(axis) @ v).transpose(1, 2).flatten(2)


def patches(x, order):
    """An image (N, C, H, W) as rows of patches of 2."""
    split = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # N C h p w q
    return split.permute(*order).flatten(3).flatten(1, 2)


def added(x, y, *_):
    return F.relu(x + y)


ROW = {"pool": drawn(2, 4, 4, 5)}
GENERATOR = torch.Generator().manual_seed(2)
FAULTS = [
    Fault(
        name="no shortcut", cause="branch_missing", make=of(added, lambda x, *_: F.relu(x)), says="leaves out shortcut"
    ),
    Fault(
        name="ReLU before the addition",
        cause="activation_before_addition",
        make=of(added, lambda x, y, *_: F.relu(x) + y),
        says="ReLU(bn2) + shortcut",
        remedy="Compute ReLU(bn2 + shortcut).",
    ),
    Fault(
        name="ReLU behind the addition",
        cause="activation_before_addition",
        make=of(lambda x, y, *_: x + F.relu(y), added),
        says="ReLU(bn2 + shortcut)",
    ),
    Fault(name="no ReLU", cause="activation_missing", make=of(added, lambda x, y, *_: x + y)),
    Fault(name="SiLU for ReLU", cause="activation", make=of(added, lambda x, y, *_: F.silu(x + y)), says="SiLU"),
    Fault(
        name="a ReLU too many",
        cause="activation_extra",
        make=of(lambda x, y, *_: x + y, added),
        says="takes ReLU",
    ),
    Fault(
        name="another shortcut",
        cause="branch_other",
        make=of(added, lambda x, y, z, *_: F.relu(x + z)),
        says="ReLU(bn2 + conv1)",
    ),
    Fault(
        name="one branch more",
        cause="branch_extra",
        make=of(lambda x, y, *_: x + y, lambda x, y, z, *_: x + y + z),
        says="bn2 + shortcut + conv1",
    ),
    Fault(name="subtracted", cause="merge", make=of(added, lambda x, y, *_: F.relu(x - y)), says="bn2 - shortcut"),
    Fault(
        name="a branch scaled",
        cause="scale_factor",
        make=of(lambda x, y, *_: x + y, lambda x, y, *_: x + 0.1 * y),
        says="0.1 * shortcut",
    ),
    Fault(
        name="two branches of an Inception in another order",
        cause="order",
        make=of(lambda x, y, z, _: torch.cat((x, y, z), 1), lambda x, y, z, _: torch.cat((x, z, y), 1)),
        says="concatenate(bn2, conv1, shortcut)",
    ),
    Fault(
        name="passed through with a ReLU",
        cause="activation_extra",
        make=of(lambda x, *_: x, lambda x, *_: F.relu(x)),
    ),
    Fault(
        name="GELU",
        cause="activation",
        make=of(lambda x, *_: F.gelu(x), lambda x, *_: F.gelu(x, approximate="tanh")),
        says="tanh form of GELU",
        remedy="In PyTorch use F.gelu(x).",
    ),
    Fault(
        name="a hard gate",
        cause="gate",
        make=of(lambda x, s: x * torch.sigmoid(s), lambda x, s: x * F.hardsigmoid(s), GATE),
        says="hard sigmoid",
    ),
    Fault(
        name="no gate",
        cause="gate",
        make=of(lambda x, s: x * torch.sigmoid(s), lambda x, s: x, GATE),
        says="leaves out",
    ),
    Fault(
        name="a gate without its sigmoid",
        cause="gate",
        make=of(lambda x, s: x * torch.sigmoid(s), lambda x, s: x * s, GATE),
    ),
    Fault(
        name="the maximum of all pixels",
        cause="average_for_maximum",
        make=of(lambda x, *_: x.mean((2, 3)), lambda x, *_: x.amax((2, 3))),
    ),
    Fault(
        name="ReLU left out before a global pool",
        cause="activation_missing",
        make=of(lambda x, *_: F.relu(x).mean((2, 3)), lambda x, *_: x.mean((2, 3))),
    ),
    Fault(
        name="flattened with channels last",
        cause="flatten_order",
        make=of(lambda x: x.flatten(1), lambda x: x.permute(0, 2, 3, 1).flatten(1), ROW),
        says="channels last",
    ),
    Fault(
        name="a stem's pool as SAME pads",
        cause="padding",
        make=of(
            lambda x, *_: F.max_pool2d(F.relu(x), 3, 2, 1),
            lambda x, *_: F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1)), 3, 2),
        ),
        says="pads as SAME does",
    ),
    Fault(
        name="a stem's pool that averages",
        cause="average_for_maximum",
        make=of(lambda x, *_: F.max_pool2d(F.relu(x), 3, 2, 1), lambda x, *_: F.avg_pool2d(F.relu(x), 3, 2, 1)),
    ),
    Fault(
        name="a pool and a row in another order",
        cause="flatten_order",
        make=of(
            lambda x, *_: F.max_pool2d(F.relu(x), 2, 2).flatten(1),
            lambda x, *_: F.max_pool2d(F.relu(x), 2, 2).permute(0, 2, 3, 1).flatten(1),
        ),
    ),
    Fault(
        name="softmax twice",
        cause="softmax_twice",
        make=of(lambda x: x.softmax(-1), lambda x: x.softmax(-1).softmax(-1), {"head": drawn(4, 10)}),
    ),
    Fault(
        name="no softmax",
        cause="softmax_missing",
        make=of(lambda x: x.softmax(-1), lambda x: x, {"head": drawn(4, 10)}),
    ),
    Fault(
        name="a softmax too many",
        cause="softmax_extra",
        make=of(lambda x: x, lambda x: x.softmax(-1), {"head": drawn(4, 10)}),
    ),
    Fault(
        name="dropout on",
        cause="dropout_on",
        make=of(
            lambda x: x,
            lambda x: x * (torch.rand(x.shape, generator=GENERATOR) >= 0.2) / 0.8,
            {"fc1": drawn(8, 200)},
        ),
        says="drops 0.2",
    ),
    Fault(
        name="height and width exchanged",
        cause="axes_swapped",
        make=of(lambda x, *_: x, lambda x, *_: x.transpose(2, 3)),
    ),
    Fault(
        name="a constant",
        cause="scale_factor",
        make=of(lambda x, *_: x, lambda x, *_: x / 255),
    ),
    Fault(
        name="q k^T not scaled",
        cause="scale_factor",
        make=of(core, lambda q, k, v: core(q, k, v, scale=1.0), TOKENS),
        says="does not scale",
    ),
    Fault(
        name="softmax over the queries",
        cause="softmax_axis",
        make=of(core, lambda q, k, v: core(q, k, v, axis=-2), TOKENS),
    ),
    Fault(
        name="other heads",
        cause="groups",
        make=of(core, lambda q, k, v: core(q, k, v, heads=6), TOKENS),
        says="6 heads",
    ),
    Fault(
        name="keys for queries",
        cause="order",
        make=of(core, lambda q, k, v: core(k, q, v), TOKENS),
    ),
    Fault(
        name="pixels of a patch in another order",
        cause="axes_swapped",
        make=of(
            lambda x, *_: patches(x, (0, 2, 4, 3, 5, 1)),
            lambda x, *_: patches(x, (0, 2, 4, 1, 3, 5)),
            {"image": drawn(2, 8, 8, 3)},
        ),
    ),
    Fault(
        name="the last token for the first",
        cause="expression",
        make=of(lambda x: x[:, 0], lambda x: x[:, -1], {"norm": drawn(2, 10, 12)}),
        says="token 9 of norm",
    ),
    Fault(
        name="the mean of tokens for the first",
        cause="expression",
        make=of(lambda x: x[:, 0], lambda x: x.mean(1), {"norm": drawn(2, 10, 12)}),
    ),
    Fault(
        name="bfloat16 in an addition",
        cause="precision",
        make=of(added, lambda x, y, *_: F.relu(x.bfloat16() + y.bfloat16()).double()),
        says="bfloat16",
    ),
    Fault(
        name="float32 in an addition",
        cause="precision",
        make=of(added, lambda x, y, *_: F.relu(x.float() + y.float()).double()),
        says="float32",
    ),
    Fault(
        name="two faults: SiLU, and no shortcut",
        cause="activation+branch_missing",
        make=of(added, lambda x, *_: F.silu(x)),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_between_layers_is_named_first(fault):
    found = explain_glue(fault.make())
    assert found, "no hypothesis explains it"
    assert set(found[0].cause.split(AND)) == set(fault.cause.split(AND)), [one.sentence for one in found]
    assert fault.says in found[0].yours
    assert fault.remedy in found[0].remedy
    assert set(found[0].cause.split(AND)) <= set(CAUSES)


def test_what_no_formula_makes_is_not_explained():
    reference = np.maximum(SOURCES["bn2"] + SOURCES["shortcut"], 0.0)
    noise = 1e-3 * drawn(*SHAPE, seed=9)
    assert explain_glue(evidence(reference, reference + noise)) == []
    assert explain_glue(evidence(reference, np.sin(SOURCES["bn2"]) + noise)) == []
    assert explain_glue(evidence(drawn(*SHAPE, seed=11), drawn(*SHAPE, seed=12))) == []
    assert explain_glue(evidence(reference, reference[:, :4])) == []


def test_a_formula_that_is_not_known_still_shows_what_is_done_to_its_value():
    reference = drawn(*SHAPE, seed=11)
    found = explain_glue(evidence(reference, np.maximum(reference, 0.0)))
    assert found[0].cause == "activation_extra"


def test_values_that_agree_are_no_fault():
    reference = SOURCES["bn2"]
    assert explain_glue(evidence(reference, reference)) == []


PIXELS = drawn(2, 8, 8, 3, low=0.0)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def normalised(x):
    return (x - MEAN) / STD


@pytest.mark.parametrize(
    ("reference", "yours", "cause", "says"),
    [
        (PIXELS, PIXELS[..., ::-1], "input_bgr", "BGR"),
        (normalised(PIXELS), normalised(PIXELS)[..., ::-1], "input_bgr", "BGR"),
        (PIXELS, 255 * PIXELS, "input_range", "0..255"),
        (255 * PIXELS, PIXELS, "input_range", "has pixels of 0..1"),
        (PIXELS, 2 * PIXELS - 1, "input_range", "-1..1"),
        (255 * PIXELS, 255 * PIXELS / 127.5 - 1, "input_range", "-1..1"),
        (PIXELS, 0.3 * PIXELS + 0.2, "input_range", "0.3 times"),
        (normalised(PIXELS), PIXELS, "input_normalised", "has pixels of 0..1"),
        (PIXELS, normalised(PIXELS), "input_normalised", "ImageNet's mean and deviation"),
        (normalised(PIXELS), normalised(normalised(PIXELS)), "input_normalised", "once more"),
        (normalised(PIXELS), 255 * PIXELS - 255 * MEAN, "input_normalised", "less ImageNet's mean"),
        (PIXELS, (PIXELS - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4], "input_normalised", "less (0.4, 0.5, 0.6)"),
        (normalised(PIXELS), normalised(PIXELS[..., ::-1]), "input_bgr", "as if they were"),
        (PIXELS, PIXELS.swapaxes(1, 2), "input_transposed", "height and width"),
        (PIXELS, PIXELS[:, :, ::-1], "input_transposed", "left to right"),
        (PIXELS, 255 * PIXELS[..., ::-1], "input_bgr+input_range", "0..255"),
    ],
)
def test_an_input_that_differs_is_named(reference, yours, cause, says):
    found = explain_input(reference, yours)
    assert found
    assert set(found[0].cause.split(AND)) == set(cause.split(AND)), [one.sentence for one in found]
    assert says in found[0].yours


def test_an_input_that_is_another_is_not_explained():
    assert explain_input(PIXELS, drawn(2, 8, 8, 3, seed=4)) == []
    assert explain_input(PIXELS, PIXELS) == []
