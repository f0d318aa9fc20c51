"""How a field of a spec and the arrays of weights hang together: said once, in the field's annotation.

Inference reads it (what must a convention say?), builders (what do foreign weights bring along?) and loaders (are these
the weights of another network?).
"""

from enum import Flag, auto
from typing import Any

from common.fields import extras


class Mark(Flag):
    """Marks of a field; none at all: names or shapes of the weights show its value."""

    UNSEEN = auto()  # nothing in the weights shows it: a convention must say it
    ADOPTED = auto()  # a builder's network takes it from foreign weights, since no argument of its own says it
    FREE = auto()  # the same weights mean the same under another value
    # True: there are more arrays, of further classifiers, without which the rest is the same network.
    EXTRA = auto()


def marked(spec: Any, mark: Mark) -> tuple[str, ...]:
    """The fields of a spec, or of a class of specs, that have the mark."""
    cls = spec if isinstance(spec, type) else type(spec)
    return tuple(name for name, marks in extras(cls, Mark).items() if mark in marks)
