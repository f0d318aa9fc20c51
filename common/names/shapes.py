"""What families ask of a file's canonical shapes when they tell the fields of a spec from them."""

from collections.abc import Callable, Collection, Mapping

from common.architectures.layers import Shape
from common.errors import CheckpointError


def kernels(shapes: Mapping[str, Shape]) -> Callable[[str], Shape]:
    """The shape of a layer's kernel by the layer's path; it raises `CheckpointError` for one that is not there."""

    def kernel(layer: str) -> Shape:
        shape = shapes.get(f"{layer}.kernel")
        if shape is None:
            raise CheckpointError(f"no kernel of {layer} is there; is the file whole?")
        return shape

    return kernel


def check_gap(what: str, numbers: Collection[int]) -> None:
    """Raise `CheckpointError` where one is missing in between: the file is not whole."""
    # Not the difference to a whole range: a hostile name may hold any number.
    if numbers and max(numbers) >= len(numbers):
        gap = next(number for number in range(len(numbers)) if number not in numbers)
        raise CheckpointError(f"the {what} have a gap: number {gap} is missing, and {max(numbers)} is there")
