"""What people get wrong in convolutions, dense layers and embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import numpy as np

from common.diagnosis import words
from common.diagnosis.arithmetic import Pads, pads_of
from common.diagnosis.remedies import of_padding
from common.diagnosis.trials import Change, Goal, Trial, Work, changed, with_arrays
from common.foreign.operations import Conv, Dense, Embedding, Padding, Pool

_STRIDES, _DILATIONS = range(1, 5), range(1, 5)
# More pads than these are not tried axis by axis.
_MOST_PADS = 400
# What pads cost that are the same on all axes.
_PLAIN = 1.2


def conv_edits(work: Work, goal: Goal, *, wide: bool = True) -> Iterator[Trial]:
    """Of a convolution; `wide`: other pads on each axis too."""
    operation, x, kernel = work.operation, work.inputs[0], work.arrays["kernel"]
    assert isinstance(operation, Conv)
    target, sizes, window = goal.yours.shape[1:-1], x.shape[1:-1], kernel.shape[:-2]
    if len(target) != len(sizes):
        return
    yield from padding_edits(work, goal, window, "convolution", wide=wide)
    for mode in ("zeros", "reflect", "replicate", "circular"):
        if mode != operation.padding_mode:
            yield _setting(work, replace(operation, padding_mode=mode), "padding_mode", "padding_mode")
    for strides in product(_STRIDES, repeat=len(sizes)):
        if strides != operation.strides and (len(set(strides)) == 1 or len(sizes) == 2):
            other = replace(operation, strides=strides)
            for padded in _reaching(other, sizes, window, target):
                yield _setting(work, padded, "stride", "strides", cost=1.0 if len(set(strides)) == 1 else 1.5)
    if max(window) > 1:
        for by in _DILATIONS:
            other = replace(operation, dilation=(by,) * len(sizes))
            if other.dilation != operation.dilation:
                for padded in _reaching(other, sizes, window, target):
                    yield _setting(work, padded, "dilation", "dilation")
    yield from _kernels(work, kernel, wide=wide)
    yield from _interleaved(work, operation, kernel)
    yield from bias_edits(work)


def _setting(work: Work, other: Conv, cause: str, name: str, cost: float = 1.0) -> Trial:
    """A convolution of another setting, and of whatever padding goes with it."""
    operation = work.operation
    assert isinstance(operation, Conv)
    value = getattr(operation, name)
    facts = {name: value if isinstance(value, str) else words.one(value)}
    yours, reference = words.setting(other, name), words.setting(operation, name)
    if other.padding != operation.padding:
        yours, cost = f"{yours} and {words.padding(other.padding)}", cost + 0.2
    return changed(
        work, Change(cause=cause, yours=yours, reference=reference, facts=facts, cost=cost, slot=name), operation=other
    )


def _reaching(operation: Conv, sizes: Sequence[int], window: Sequence[int], target: Sequence[int]) -> Iterator[Conv]:
    """It with its own padding, and with those that people write, where the output has the shape that is wanted."""
    half: Padding = tuple(((span - 1) * by // 2,) * 2 for span, by in zip(window, operation.dilation, strict=True))
    none: Padding = ((0, 0),) * len(sizes)
    known: set[Pads] = set()
    for pads in (operation.padding, half, none, "same"):
        one = replace(operation, padding=pads)
        resolved = pads_of(one, sizes, window)
        if resolved not in known and _counts(one, resolved, sizes, window) == tuple(target):
            known.add(resolved)
            yield one


def _counts(operation: Conv | Pool, pads: Pads, sizes: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    dilation = operation.dilation if isinstance(operation, Conv) else (1,) * len(sizes)
    axes = zip(sizes, pads, window, operation.strides, dilation, strict=True)
    return tuple((size + sum(pad) - (span - 1) * by - 1) // step + 1 for size, pad, span, step, by in axes)


def padding_edits(work: Work, goal: Goal, window: Sequence[int], layer: str, *, wide: bool = True) -> Iterator[Trial]:
    """All pads that give the output its shape, those that people write at a lower cost."""
    operation, sizes = work.operation, work.inputs[0].shape[1:-1]
    assert isinstance(operation, Conv | Pool)
    target = goal.yours.shape[1:-1]
    dilation = operation.dilation if isinstance(operation, Conv) else (1,) * len(sizes)
    own = pads_of(operation, sizes, window)
    facts = of_padding(own, same=operation.padding == "same", layer=layer)
    known = {own}
    for cost, padding in _paddings(sizes, window, operation.strides, dilation, target):
        if cost > _PLAIN and not wide:
            break
        other = replace(operation, padding=padding)
        pads = pads_of(other, sizes, window)
        if pads in known:
            continue
        known.add(pads)
        # SAME is what this padding is called only where no symmetric one is the same.
        said: Padding = pads if padding == "same" and all(before == behind for before, behind in pads) else padding
        yours, reference = words.padding(said), words.padding(operation.padding)
        change = Change(cause="padding", yours=yours, reference=reference, cost=cost, facts=facts)
        yield changed(work, change, operation=other)


def _paddings(
    sizes: Sequence[int], window: Sequence[int], strides: Sequence[int], dilation: Sequence[int], target: Sequence[int]
) -> Iterator[tuple[float, Padding]]:
    yield 1.0, "same"
    yield 1.0, ((0, 0),) * len(sizes)
    yield 1.0, tuple(((span - 1) * by // 2,) * 2 for span, by in zip(window, dilation, strict=True))
    axes = []
    for size, span, step, by, count in zip(sizes, window, strides, dilation, target, strict=True):
        reach = (span - 1) * by + 1
        least = (count - 1) * step + reach - size
        totals = [total for total in range(least, least + step) if 0 <= total <= 2 * reach]
        axes.append([(before, total - before) for total in totals for before in range(total + 1)])
    shared = set(axes[0]).intersection(*axes[1:])
    yield from ((_PLAIN, (pads,) * len(sizes)) for pads in sorted(shared, key=lambda one: abs(one[0] - one[1])))
    if len(axes) > 1 and np.prod([len(one) for one in axes]) <= _MOST_PADS:
        yield from ((2.0, pads) for pads in product(*axes))


def _kernels(work: Work, kernel: np.ndarray, *, wide: bool) -> Iterator[Trial]:
    """Kernels that were loaded in another order, or are read in one."""
    spatial = tuple(range(kernel.ndim - 2))
    i, o = kernel.ndim - 2, kernel.ndim - 1
    ways: list[tuple[str, str, np.ndarray]] = []
    turned = kernel.transpose(*spatial, o, i)
    flipped = np.flip(kernel, spatial)
    ways.append(("kernel_transposed", "has its kernel's inputs and outputs exchanged", turned))
    if len(spatial) == 2:
        ways.append(("kernel_transposed", "has its kernel's height and width exchanged", kernel.transpose(1, 0, i, o)))
        ways.append(("kernel_transposed", "has its kernel's axes in reverse order", kernel.transpose(1, 0, o, i)))
    ways.append(("kernel_flipped", "flips its kernel", flipped))
    ways.append(("kernel_flipped", "flips its kernel, its inputs and outputs exchanged", np.flip(turned, spatial)))
    if wide:
        # (out, in, height, width) as if it were (height, width, in, out). A copy, where all others are views.
        reread = kernel.transpose(o, i, *spatial).reshape(kernel.shape)
        ways.append(("kernel_transposed", "has its kernel reshaped where it is to be transposed", reread))
    if kernel.shape[-2] in {3, 4}:
        order = [2, 1, 0, 3][: kernel.shape[-2]]
        ways.append(("input_bgr", "reads the channels as BGR", kernel[..., order, :]))
    said = {"input_bgr": "as RGB", "kernel_flipped": "correlates", "kernel_transposed": "has them as they are"}
    for cause, yours, other in ways:
        if other.shape == kernel.shape:
            change = Change(cause=cause, yours=yours, reference=said[cause], slot="kernel")
            yield changed(work, change, arrays=with_arrays(work, kernel=other))


def _interleaved(work: Work, operation: Conv, kernel: np.ndarray) -> Iterator[Trial]:
    """Channels of groups that lie one group after another, or take turns."""
    groups, x = operation.groups, work.inputs[0]
    if groups == 1:
        return
    bias = work.arrays.get("bias")
    sides = {"reads": x.shape[-1], "makes": kernel.shape[-1]}
    for side, channels in sides.items():
        for parts in {groups, channels // groups} - {1, channels}:
            order = np.arange(channels).reshape(parts, -1).T.ravel()
            change = Change(
                cause="groups_interleaved",
                yours=f"{side} the channels of its groups in turn ({parts} by {channels // parts})",
                reference=f"{side} them group by group",
                slot=f"groups {side}",
            )
            if side == "reads":
                yield changed(work, change, inputs=(x[..., order], *work.inputs[1:]))
            else:
                after = (*work.after, partial(np.take, indices=order, axis=-1))
                yield changed(work, change, after=after)
                read = replace(
                    change,
                    yours=f"has the kernels of its groups in turn ({parts} by {channels // parts})",
                    reference="has them group by group",
                )
                shuffled = with_arrays(work, kernel=kernel[..., order], bias=None if bias is None else bias[order])
                yield changed(work, read, arrays=shuffled)


def bias_edits(work: Work) -> Iterator[Trial]:
    """Of anything that may add a bias."""
    bias = work.arrays.get("bias")
    if bias is None:
        return
    missing = Change(cause="bias_missing", yours="adds no bias", reference="adds one", slot="bias")
    yield changed(work, missing, arrays=with_arrays(work, bias=None))
    twice = Change(cause="bias_twice", yours="adds its bias twice", reference="once", slot="bias")
    yield changed(work, twice, arrays=with_arrays(work, bias=2 * bias))
    negative = Change(cause="bias_twice", yours="subtracts its bias", reference="adds it", slot="bias", cost=1.5)
    yield changed(work, negative, arrays=with_arrays(work, bias=-bias))


def dense_edits(work: Work, goal: Goal, *, wide: bool = True) -> Iterator[Trial]:
    """Of a dense layer."""
    assert isinstance(work.operation, Dense)
    kernel = work.arrays["kernel"]
    yield from bias_edits(work)

    def of_kernel(cause: str, yours: str, reference: str, other: np.ndarray, **settings: Any) -> Trial:
        change = Change(cause=cause, yours=yours, reference=reference, slot="kernel", **settings)
        return changed(work, change, arrays=with_arrays(work, kernel=other))

    if kernel.shape[0] == kernel.shape[1]:
        yield of_kernel("kernel_transposed", "has its kernel transposed", "as it is", kernel.T)
    elif min(kernel.shape) > 1 and wide:
        reread = kernel.T.reshape(kernel.shape)
        yield of_kernel("kernel_transposed", "has its kernel reshaped where it is to be transposed", "as it is", reread)
    for shape, axes in _maps(kernel.shape[0]):
        order = np.arange(kernel.shape[0]).reshape(shape).transpose(axes).ravel()
        there, here = " x ".join(map(str, shape)), " x ".join(str(shape[axis]) for axis in axes)
        yours, reference = f"reads the row as a map of {here} flattened", f"as one of {there}"
        if here == there:
            yours, reference = f"reads the row as a map of {here} with height and width exchanged", "as it is"
        cost = 1.0 if len(shape) == 2 else 1.2
        change = Change(cause="flatten_order", yours=yours, reference=reference, cost=cost, slot="kernel")
        # The rows of the input in the opposite order: they are fewer than the kernel's values.
        if wide or len(shape) == 2:
            yield changed(work, change, inputs=(work.inputs[0][..., np.argsort(order)],))


def _maps(features: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes that a row may have been a map of, and other orders of their axes: channels first or last, and of square
    images height and width exchanged."""
    for first in range(2, features):
        if features % first == 0:
            yield (first, features // first), (1, 0)
            side = isqrt(first)
            if side * side == first:
                yield (side, side, features // first), (1, 0, 2)
                yield (features // first, side, side), (0, 2, 1)
                yield (side, side, features // first), (2, 1, 0)
                yield (features // first, side, side), (2, 1, 0)


def embedding_edits(work: Work, goal: Goal) -> Iterator[Trial]:
    """Of an embedding."""
    assert isinstance(work.operation, Embedding)
    index, table = work.inputs[0].astype(np.intp), work.arrays["table"]
    for by in (1, -1):
        shifted = np.clip(index + by, 0, len(table) - 1)
        yours = f"looks up the entry {'behind' if by > 0 else 'before'} each"
        change = Change(cause="index_shifted", yours=yours, reference="the entry itself", slot="index")
        yield changed(work, change, inputs=(shifted, *work.inputs[1:]))
    zeroed = table.copy()
    zeroed[0] = 0.0
    change = Change(
        cause="array_differs",
        yours="has zeros for entry 0",
        reference="has values",
        slot="table",
        facts={"roles": "table"},
    )
    yield changed(work, change, arrays=with_arrays(work, table=zeroed))
