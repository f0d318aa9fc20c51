"""What the classes of well-known data sets are called."""

from functools import cache
from pathlib import Path

_CLASS_NAMES = Path(__file__).parent / "imagenet_classes.txt"


@cache
def class_names(classes: int) -> list[str] | None:
    """What the outputs of a network of so many classes mean: ImageNet's names for 1000, otherwise unknown."""
    if classes != 1000:
        return None
    return _CLASS_NAMES.read_text(encoding="utf-8").splitlines()
