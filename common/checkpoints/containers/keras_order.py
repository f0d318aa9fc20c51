"""The layers of a Keras 3 file that names none, as those of the first releases: who is who shows in the order.

There a layer is its class and a number in the order of `model.layers`. In both communities' code that is the order of
execution, but for a projection, which stands beside the last layers of its block: before them in keras.applications,
after them in the classic code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.architectures.layers import Shape
from common.checkpoints.base import Skeleton
from common.errors import CheckpointError
from common.names.resnet import applications_layer, classic_layer


@dataclass
class _Block:
    convs: list[int]  # numbers of the convolutions of the branch
    projection: int | None = None


def names_by_order(kernels: Sequence[Shape], norms: int, classes: int | None) -> tuple[list[str], list[str], str]:
    """Names for convolutions of these shapes, for so many norms, and for the classifier.

    Raises `CheckpointError` where they are not those of a ResNet, or where two layers of a block could be either.
    """
    if len(kernels) < 3 or any(len(kernel) != 4 for kernel in kernels):
        raise _unknown(f"{len(kernels)} convolutions are not those of a ResNet")
    bottleneck = kernels[1][0] == 1
    blocks, before = (_bottlenecks if bottleneck else _basics)(kernels)
    stages = _stages(blocks, kernels)
    skeleton = Skeleton(block="bottleneck" if bottleneck else "basic", blocks=tuple(map(len, stages)), classes=classes)
    projections = sum(block.projection is not None for block in blocks)
    if norms not in (0, len(kernels), len(kernels) - projections):
        raise _unknown(f"{norms} norms do not go with {len(kernels)} convolutions")
    layer = applications_layer if before else classic_layer
    conv_names, norm_names = [layer("stem.conv", skeleton)] * len(kernels), [layer("stem.norm", skeleton)]
    for s, stage in enumerate(stages):
        for b, block in enumerate(stage):
            path = f"stages.{s}.blocks.{b}"
            order = [f"norm{i + 1}" for i in range(len(block.convs))]
            for i, number in enumerate(block.convs):
                conv_names[number] = layer(f"{path}.conv{i + 1}", skeleton)
            if block.projection is not None:
                conv_names[block.projection] = layer(f"{path}.shortcut.conv", skeleton)
                if norms == len(kernels):
                    order.insert(len(order) - before, "shortcut.norm")
            norm_names += [layer(f"{path}.{part}", skeleton) for part in order]
    return conv_names, norm_names[:norms], layer("head.fc", skeleton)


def _bottlenecks(kernels: Sequence[Shape]) -> tuple[list[_Block], bool]:
    """The blocks, and whether projections come first: a 1x1 convolution on either side of each larger one, and the
    projection beside the second."""
    middles = [number for number in range(1, len(kernels)) if kernels[number][0] > 1]
    ends = [number - 1 for number in middles[1:]] + [len(kernels)]
    blocks, before = [], set()
    for middle, end in zip(middles, ends, strict=True):
        if end - middle not in (2, 3):
            raise _unknown(f"{end - middle - 1} convolutions follow on the {middle}th, 1 or 2 expected")
        inner, block_input = kernels[middle][3], kernels[middle - 1][2]
        if end - middle == 3 and inner != block_input:
            before.add(kernels[middle + 1][2] == block_input)
        blocks.append(_Block(convs=[middle - 1, middle], projection=middle + 1 if end - middle == 3 else None))
    projected = any(block.projection is not None for block in blocks)
    if len(before) > 1 or (projected and not before):
        raise _unknown("which convolutions are projections does not show")
    first = before != {False}
    for block, end in zip(blocks, ends, strict=True):
        block.convs.append(end - 1 if first or block.projection is None else end - 2)
        if block.projection is not None and not first:
            block.projection = end - 1
    return blocks, first


def _basics(kernels: Sequence[Shape]) -> tuple[list[_Block], bool]:
    """The blocks, and whether projections come first: two larger convolutions each, a 1x1 beside the second."""
    larger = [number for number in range(1, len(kernels)) if kernels[number][0] > 1]
    if len(larger) % 2:
        raise _unknown(f"{len(larger)} larger convolutions make no pairs")
    starts, seconds = larger[::2], larger[1::2]
    blocks, before = [], set()
    for start, second, end in zip(starts, seconds, [*starts[1:], len(kernels)], strict=True):
        if end - start not in (2, 3):
            raise _unknown(f"a block of {end - start} convolutions")
        projection = None
        if end - start == 3:
            before.add(second == start + 2)
            projection = start + 1 if second == start + 2 else start + 2
        blocks.append(_Block(convs=[start, second], projection=projection))
    if len(before) > 1:
        raise _unknown("projections come before and after the layers beside them")
    return blocks, before != {False}


def _stages(blocks: Sequence[_Block], kernels: Sequence[Shape]) -> list[list[_Block]]:
    """A stage begins with a projection, or with another number of channels."""
    stages: list[list[_Block]] = []
    channels = 0
    for block in blocks:
        if not stages or block.projection is not None or kernels[block.convs[-1]][3] != channels:
            stages.append([])
        stages[-1].append(block)
        channels = kernels[block.convs[-1]][3]
    return stages


def _unknown(why: str) -> CheckpointError:
    return CheckpointError(
        f"the file names no layers, and their order does not tell them ({why}); save it again with a newer Keras"
    )
