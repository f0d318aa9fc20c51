"""What the ``config.json`` of Hugging Face transformers says of any network: its classes."""

from collections.abc import Mapping, Sequence
from typing import Any


def labels(classes: int, class_names: Sequence[str]) -> dict[str, Any]:
    """The two tables between numbers and names of classes; without names those that the library gives."""
    numbered = {str(number): name for number, name in enumerate(class_names or map(_label, range(classes)))}
    return {"id2label": numbered, "label2id": {label: int(number) for number, label in numbered.items()}}


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a config; none where it has none, or those that the library gives."""
    found = config.get("id2label")
    names = [found.get(str(number)) for number in range(len(found))] if isinstance(found, Mapping) else []
    known = all(isinstance(name, str) and name.isprintable() for name in names) and names != list(
        map(_label, range(len(names)))
    )
    return tuple(map(str, names)) if known else ()


def _label(number: int) -> str:
    return f"LABEL_{number}"
