"""Why what a model is given differs: images in other channels, another range, or turned."""

from collections.abc import Iterator, Mapping
from itertools import permutations, product

import numpy as np

from common.diagnosis.coarse import precision_findings
from common.diagnosis.evidence import Finding
from common.diagnosis.trials import FEWEST, Change, Changes, Goal, findings

# What people make of a pixel of 0..1, as a factor and an addend for every channel.
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
_Affine = tuple[np.ndarray, np.ndarray]
_FORMS: Mapping[str, _Affine] = {
    "pixels of 0..1": (np.ones(1), np.zeros(1)),
    "pixels of 0..255": (np.full(1, 255.0), np.zeros(1)),
    "pixels of -1..1": (np.full(1, 2.0), np.full(1, -1.0)),
    "pixels of -0.5..0.5": (np.ones(1), np.full(1, -0.5)),
    "pixels normalised by ImageNet's mean and deviation": (1 / _STD, -_MEAN / _STD),
    "pixels less ImageNet's mean": (np.ones(1), -_MEAN),
    "pixels of 0..255 less ImageNet's mean": (np.full(1, 255.0), -255 * _MEAN),
    # As Caffe's models have them, with means of BGR rounded to a thousandth.
    "pixels of 0..255 less Caffe's mean": (np.full(1, 255.0), -np.array([123.68, 116.779, 103.939])),
    "pixels normalised by CLIP's mean and deviation": (
        1 / np.array([0.26862954, 0.26130258, 0.27577711]),
        -np.array([0.48145466, 0.4578275, 0.40821073]) / np.array([0.26862954, 0.26130258, 0.27577711]),
    ),
    "pixels normalised by CIFAR-10's mean and deviation": (
        1 / np.array([0.2470, 0.2435, 0.2616]),
        -np.array([0.4914, 0.4822, 0.4465]) / np.array([0.2470, 0.2435, 0.2616]),
    ),
}
_NORMALISED = frozenset(name for name, (factor, _) in _FORMS.items() if factor.size > 1 or "less" in name)
# How far two affine maps may be from each other that are the same; means are written with three digits and more.
_NEAR = 1e-6


@np.errstate(all="ignore")
def explain_input(
    reference: np.ndarray, yours: np.ndarray, *, backend: str = "", place: str = "the input", limit: float = 0.0
) -> list[Finding]:
    """What makes of the reference's images (N, H, W, C) those of yours, best first; empty where nothing does: other
    channels, height and width exchanged or flipped, and for each channel a factor and an addend."""
    goal = Goal(reference, yours, limit)
    if goal.before <= max(goal.relative, limit / goal.norm) or reference.ndim != 4 or yours.ndim != 4:
        return []
    rows = []
    for geometry, turned in _turned(goal.reference):
        if turned.shape != goal.yours.shape:
            continue
        for order in (
            permutations(range(turned.shape[-1])) if turned.shape[-1] <= 4 else [tuple(range(turned.shape[-1]))]
        ):
            image = turned[..., list(order)]
            for changes, predicted in _tried(image, goal, geometry, order):
                rows.append((goal.left(predicted), changes))
    named = findings(rows, goal, place=place, backend=backend)
    return named or precision_findings(None, goal, place=place, backend=backend)


def _turned(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Images as they are, exchanged, flipped; the words are empty for the first."""
    for exchanged, up, across in product((False, True), repeat=3):
        ways = ["has height and width exchanged"] * exchanged
        ways += ["is flipped upside down"] * up + ["is flipped left to right"] * across
        image = x.swapaxes(1, 2) if exchanged else x
        axes = (1,) * up + (2,) * across
        yield " and ".join(ways), np.flip(image, axes)


def _tried(
    image: np.ndarray, goal: Goal, geometry: str, order: tuple[int, ...]
) -> Iterator[tuple[Changes, np.ndarray]]:
    """With the values as they are, and with those that the affine map makes which fits best."""
    changes: list[Change] = []
    if geometry:
        costs = 1.0 + 0.2 * geometry.count(" and ")
        changes.append(Change(cause="input_transposed", yours=geometry, reference="is as it is", cost=costs))
    if order != tuple(range(len(order))):
        turned = order == tuple(reversed(range(len(order))))
        names = "BGR" if turned and len(order) == 3 else f"the order {', '.join(map(str, order))}"
        said = "in RGB" if len(order) == 3 else "in theirs"
        cost = 1.0 if turned else 1.2
        changes.append(Change(cause="input_bgr", yours=f"has its channels in {names}", reference=said, cost=cost))
    if changes:
        yield tuple(changes), image
    if image.size < FEWEST * image.shape[-1]:
        return
    factor, addend = _fitted(image, goal.yours)
    predicted = image * factor + addend
    if changes and _normalised_as_before(factor, addend, order):
        named = Change(
            cause="input_bgr",
            yours="normalises them as if they were in the reference's order",
            reference="by their own numbers",
            cost=0.2,
        )
        yield (*changes, named), predicted
    elif np.ptp(factor) > _NEAR or np.ptp(addend) > _NEAR * (1 + np.abs(addend).max()):
        yield (*changes, _of_channels(image, factor, addend, order)), predicted
    elif abs(factor[0] - 1) > _NEAR or abs(addend[0]) > _NEAR:
        yield (*changes, _of_all(image, float(factor[0]), float(addend[0]), order)), predicted


def _fitted(image: np.ndarray, yours: np.ndarray) -> _Affine:
    """Factor and addend of every channel, by least squares."""
    x, y = image.reshape(-1, image.shape[-1]), yours.reshape(-1, yours.shape[-1])
    centred = x - x.mean(axis=0)
    square = np.maximum((centred * centred).sum(axis=0), 1e-300)
    factor = (centred * y).sum(axis=0) / square
    return factor, y.mean(axis=0) - factor * x.mean(axis=0)


def _of_all(image: np.ndarray, factor: float, addend: float, order: tuple[int, ...]) -> Change:
    """The same for all channels: another range."""
    known = _known(image, np.array([factor]), np.array([addend]), order, normalised=False)
    yours, reference = known or (f"is {factor:.6g} times that of the reference, plus {addend:.6g}", "has its own range")
    form = reference.removeprefix("has ") if known else f"(x - {addend:.6g}) / {factor:.6g}"
    return Change(
        cause="input_range", yours=yours, reference=reference, facts={"form": form}, cost=1.0 if known else 1.5
    )


def _of_channels(image: np.ndarray, factor: np.ndarray, addend: np.ndarray, order: tuple[int, ...]) -> Change:
    """Other for each: normalised otherwise."""
    known = _known(image, factor, addend, order, normalised=True)
    if known:
        yours, reference = known
        form = reference.removeprefix("has ")
        return Change(cause="input_normalised", yours=yours, reference=reference, facts={"form": form})
    mean, deviation = -addend / factor, 1 / factor
    return Change(
        cause="input_normalised",
        yours=f"is that of the reference less {_row(mean)}, divided by {_row(deviation)}",
        reference="is not changed so",
        facts={"form": f"x * {_row(deviation)} + {_row(mean)}"},
        cost=1.5,
    )


def _row(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{one:.4g}" for one in values) + ")"


def _normalised_as_before(factor: np.ndarray, addend: np.ndarray, order: tuple[int, ...]) -> bool:
    """Whether channels in another order are normalised by what the others are normalised by."""
    for name in _NORMALISED:
        a, b = _FORMS[name]
        if len(order) == len(b) and order != tuple(range(len(order))):
            ratio = a / _of(a, order)
            if not _apart(factor, addend, ratio, b - _of(b, order) * ratio):
                return True
    return False


def _of(values: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Numbers of channels in that order."""
    return values[list(order)] if len(values) == len(order) else values


def _known(
    image: np.ndarray, factor: np.ndarray, addend: np.ndarray, order: tuple[int, ...], *, normalised: bool
) -> tuple[str, str] | None:
    """Two forms of pixels between which that map leads, the values of the reference being of the first; the one is
    normalised, or both are, where the map is another for every channel."""
    channels = image.shape[-1]
    best: tuple[float, str, str] | None = None
    low, high = image.min(axis=(0, 1, 2)), image.max(axis=(0, 1, 2))
    for (first, (a, b)), (second, (c, d)) in product(_FORMS.items(), repeat=2):
        if first == second or max(one.size for one in (a, b, c, d)) > max(channels, 1):
            continue
        if normalised != bool({first, second} & _NORMALISED):
            continue
        # Channels in another order, each by its own numbers.
        a, b = _of(a, order), _of(b, order)
        # Those of yours may be what they would be in the reference's order.
        others = [(_of(c, order), _of(d, order)), (c, d)]
        if all(_apart(factor, addend, c / a, d - c / a * b) for c, d in others):
            continue
        # The reference's values as pixels of 0..1: how far they lie outside.
        pixels = (np.stack([low, high]) - b) / a
        outside = float(np.maximum(np.maximum(-pixels, pixels - 1), 0).max())
        # And how little of the range they fill, where several forms hold them.
        row = (outside + (0.1 if float(np.ptp(pixels)) < 0.05 else 0.0), f"has {second}", f"has {first}")
        best = row if best is None or row[0] < best[0] else best
    twice = _twice(factor, addend)
    if twice is not None and (best is None or best[0] > 0.5):
        return twice
    return None if best is None else best[1:]


def _twice(factor: np.ndarray, addend: np.ndarray) -> tuple[str, str] | None:
    """A form that yours makes of the reference's values, whatever they are: once more than there."""
    for name, (a, b) in _FORMS.items():
        if name not in _NORMALISED:
            continue
        if not _apart(factor, addend, a, b):
            return f"is normalised once more, to {name}", "has what was normalised once"
        if not _apart(factor, addend, 1 / a, -b / a):
            return "is not normalised", f"has {name}"
    return None


def _apart(factor: np.ndarray, addend: np.ndarray, other_factor: np.ndarray, other_addend: np.ndarray) -> bool:
    if np.abs(factor / other_factor - 1).max() > _NEAR:
        return True
    return bool(np.abs(addend - other_addend).max() > _NEAR * (1 + np.abs(other_addend).max()))
