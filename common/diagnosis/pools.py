"""What people get wrong in pools, and in what only moves values: flattening, merging, padding."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product
from typing import Any

import numpy as np

from common.diagnosis import arithmetic, words
from common.diagnosis.linear import padding_edits
from common.diagnosis.remedies import activation_words, family, of_padding
from common.diagnosis.trials import Change, Goal, Trial, Work, changed
from common.foreign.operations import Flatten, GlobalPool, Merge, Pad, Pool

_WINDOWS, _STRIDES = range(1, 8), range(1, 5)
# More inputs than these are not tried in every order.
_MOST_ORDERED = 5


def pool_edits(work: Work, goal: Goal, backend: str, *, wide: bool = True) -> Iterator[Trial]:
    """Of a pool."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, Pool)
    axes = len(operation.window)
    yield from _modes(work, operation)
    if goal.yours.ndim == x.ndim:
        yield from padding_edits(work, goal, operation.window, "pool", wide=wide)
    if operation.mode == "average":
        facts = _counted(operation)
        yield _setting(work, replace(operation, counted=not operation.counted), "pool_counted", "counted", **facts)
    other = replace(operation, ceil=not operation.ceil)
    # A window over the end is SAME's padding where the size is even. PyTorch's pools know it alone.
    likely = 0.9 if family(backend) == "torch" else 1.1
    yield _setting(work, other, "pool_ceil", "ceil", likely, ceil=operation.ceil)
    # PyTorch's models ported from Caffe's have a window over the end where others have a border.
    either = family(backend) == "torch" and goal.yours.ndim == x.ndim and not operation.ceil
    for padded in _reaching(other, goal, x) if either else ():
        if padded.padding not in (operation.padding, "same"):
            yield _setting(work, padded, "pool_ceil", "ceil", likely, ceil=operation.ceil)
    for size in _WINDOWS if wide else (2, 3):
        other = replace(operation, window=(size,) * axes)
        for padded in _reaching(other, goal, x):
            if other.window != operation.window:
                window = words.one(operation.window)
                yield _setting(work, padded, "pool_window", "window", window=window)
    for step in _STRIDES if wide else (1, 2):
        other = replace(operation, strides=(step,) * axes)
        if other.strides != operation.strides:
            yield _setting(work, other, "stride", "strides", strides=words.one(operation.strides))
    pads = arithmetic.pads_of(operation, x.shape[1:-1], operation.window)
    if operation.mode == "max" and any(map(any, pads)):
        # What a layer of zero padding before the pool makes of it; behind a ReLU that is the same.
        zeros = Change(
            cause="padding_mode",
            yours="pads with zeros",
            reference="with what never is a maximum",
            cost=1.2,
            facts={"padding_mode": "minus infinity"},
        )
        bare = replace(operation, padding=((0, 0),) * axes)
        yield changed(work, zeros, operation=bare, inputs=(np.pad(x, ((0, 0), *pads, (0, 0))),))
    if operation.mode == "average":
        # LeNet's pools sum.
        total = Change(
            cause="scale_factor",
            yours="takes the sum of a window",
            reference="takes its average",
            cost=1.2,
            facts={"factor": 1 / float(np.prod(operation.window))},
        )
        area = float(np.prod(operation.window))
        yield changed(work, total, after=(*work.after, lambda output: output * area))


def _modes(work: Work, operation: Pool) -> Iterator[Trial]:
    """The other of maximum and average; an average that counts the borders, and one that does not."""
    yield _mode(work, operation)
    if operation.mode == "max":
        yield _mode(work, replace(operation, counted=not operation.counted), cost=1.1)


def _mode(work: Work, operation: Pool | GlobalPool, cost: float = 1.0) -> Trial:
    """The other of maximum and average."""
    other = replace(operation, mode="max" if operation.mode == "average" else "average")
    known, yours = {"max": "maximum", "average": "average"}[operation.mode], words.mode(other.mode)
    if isinstance(other, Pool) and other.mode == "average" and any(map(any, other.padding)):
        yours = f"{yours} and {words.setting(other, 'counted')}"
    keras = (
        ("GlobalMax" if operation.mode == "max" else "GlobalAverage")
        if isinstance(operation, GlobalPool)
        else (operation.mode.capitalize())
    )
    flax = "max_pool" if operation.mode == "max" else "avg_pool"
    facts = {"mode": known, "keras_pool": f"{keras}Pooling2D", "flax_pool": f"nn.{flax}"}
    change = Change(
        cause="average_for_maximum", yours=yours, reference=f"the {known}", facts=facts, cost=cost, slot="mode"
    )
    return changed(work, change, operation=other)


def _counted(operation: Pool) -> dict[str, Any]:
    """Facts of what the borders are in an average."""
    keras = "pad with zeros before a pool with padding='valid'" if operation.counted else "give padding='same'"
    return {"counted": operation.counted, "keras_counted": keras}


def _setting(work: Work, other: Pool, cause: str, name: str, cost: float = 1.0, **facts: Any) -> Trial:
    operation = work.operation
    assert isinstance(operation, Pool)
    yours, reference, cost = words.setting(other, name), words.setting(operation, name), cost
    if other.padding != operation.padding:
        yours, cost = f"{yours} and {words.padding(other.padding)}", cost + 0.2
    change = Change(cause=cause, yours=yours, reference=reference, facts=facts, cost=cost, slot=name)
    return changed(work, change, operation=other)


def _reaching(operation: Pool, goal: Goal, x: np.ndarray) -> Iterator[Pool]:
    """It with its own padding and those that people write."""
    axes = len(operation.window)
    half = tuple((span // 2, span // 2) for span in operation.window)
    for padding in dict.fromkeys((operation.padding, ((0, 0),) * axes, half, "same")):
        yield replace(operation, padding=padding)


def global_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of a pool of all pixels."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, GlobalPool)
    yield _mode(work, operation)
    pixels = int(np.prod(x.shape[1:-1]))
    total = Change(
        cause="scale_factor",
        yours="takes the sum of all pixels",
        reference="takes their average",
        cost=1.2,
        facts={"factor": 1 / pixels},
    )
    if operation.mode == "average":
        yield changed(work, total, after=(*work.after, lambda output: output * pixels))
    axes = tuple(range(1, x.ndim - 1))
    first = Change(
        cause="pool_window",
        yours="takes the first pixel",
        reference="all pixels",
        cost=1.3,
        facts={"window": x.shape[1:-1]},
    )
    corner = (slice(None), *(slice(0, 1) if operation.keep else 0 for _ in axes))
    yield changed(work, first, function=lambda work: work.inputs[0][corner])


def flatten_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of a map that is made a row."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, Flatten)
    for axes, yours in flattenings(x.ndim):
        change = Change(
            cause="flatten_order", yours=yours, reference=words.setting(operation, "channels"), slot="flatten"
        )
        yield changed(work, change, function=lambda work, axes=axes: work.inputs[0].transpose(axes).reshape(len(x), -1))


def flattenings(ndim: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """Orders in which a map's axes may be flattened, and what yours does then."""
    spatial, channels = tuple(range(1, ndim - 1)), ndim - 1
    yield (0, *spatial, channels), "flattens with its channels last"
    yield (0, channels, *spatial), "flattens with its channels first"
    if len(spatial) > 1:
        yield (0, *reversed(spatial), channels), "flattens with its channels last, width before height"
        yield (0, channels, *reversed(spatial)), "flattens with its channels first, width before height"
        yield (0, 1, channels, 2), "flattens with its channels between height and width"


def merge_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of several arrays that become one."""
    operation, inputs = work.operation, work.inputs
    assert isinstance(operation, Merge)
    count = len(inputs)
    names = [chr(ord("a") + at) for at in range(count)]
    known = _expression(operation.how, names)
    if work.activation is not None:
        known = f"{activation_words(work.activation.name)}({known})"

    def of(cause: str, yours: str, cost: float = 1.0, **settings: Any) -> Trial:
        change = Change(
            cause=cause,
            yours=yours,
            reference=f"computes {known}",
            cost=cost,
            facts={"expression": known},
            slot=cause,
        )
        return changed(work, change, **settings)

    for how in ("add", "multiply", "concatenate", "average", "maximum", "subtract"):
        if how != operation.how:
            yield of("merge", f"computes {_expression(how, names)}", operation=Merge(how=how))
    if count <= _MOST_ORDERED:
        for order in permutations(range(count)):
            if order != tuple(range(count)) and operation.how in {"concatenate", "subtract"}:
                yours = f"computes {_expression(operation.how, [names[at] for at in order])}"
                yield of("order", yours, inputs=tuple(inputs[at] for at in order))
    for left in range(1, count):
        for kept in combinations(range(count), left):
            yours = f"computes {_expression(operation.how, [names[at] for at in kept])}"
            yield of("branch_missing", yours, 1.0 + count - left, inputs=tuple(inputs[at] for at in kept))
    if work.activation is not None:
        name, title = work.activation, activation_words(work.activation.name)
        for some in product((False, True), repeat=count):
            if any(some):
                parts = [f"{title}({one})" if there else one for one, there in zip(names, some, strict=True)]
                changed_inputs = tuple(
                    arithmetic.activate(name.name, one, name.slope) if there else one
                    for one, there in zip(inputs, some, strict=True)
                )
                yours = f"computes {_expression(operation.how, parts)}"
                yield of("activation_before_addition", yours, inputs=changed_inputs, activation=None)


def _expression(how: str, names: list[str]) -> str:
    signs = {"add": " + ", "multiply": " * ", "subtract": " - "}
    return signs[how].join(names) if how in signs else f"{how}({', '.join(names)})"


def pad_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of zeros around an image."""
    operation, x = work.operation, work.inputs[0]
    assert isinstance(operation, Pad)
    if goal.yours.ndim != x.ndim:
        return
    axes = []
    for size, there in zip(x.shape[1:-1], goal.yours.shape[1:-1], strict=True):
        axes.append([(before, there - size - before) for before in range(max(there - size, 0) + 1)])
    facts = of_padding(operation.padding, same=False, layer="layer")
    for pads in product(*axes):
        if pads != operation.padding and min(map(min, pads)) >= 0:
            yours, reference = words.padding(pads), words.padding(operation.padding)
            cost = 1.0 if len(set(pads)) == 1 else 1.5
            change = Change(cause="padding", yours=yours, reference=reference, cost=cost, facts=facts)
            yield changed(work, change, operation=Pad(padding=pads))
    around = ((0, 0), *operation.padding, (0, 0))
    for mode in ("edge", "reflect", "wrap"):
        change = Change(
            cause="padding_mode",
            yours=f"pads with the image ({mode})",
            reference="pads with zeros",
            facts={"padding_mode": "zeros"},
        )
        yield changed(work, change, function=lambda work, mode=mode: np.pad(work.inputs[0], around, mode=mode))
