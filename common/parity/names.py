"""Names of the arrays of a record, as a type: which pass or step, what kind of array, whose.

Written ``eval/tap/stem.conv``, ``train/grad/input``, ``eval/loss`` and, of mode steps, ``step07/param/head.fc.kernel``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

# `exact`: integers through an integer network (level L0).
Mode = Literal["eval", "train", "grad", "steps", "exact"]
MODES: tuple[Mode, ...] = ("eval", "train", "grad")  # unless others are asked for
Pass = Literal["eval", "train", "exact"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a kind of array is to rounding."""

    # It comes of gradients, and so jumps where rounding flips a choice of ReLU or max-pool.
    backward: bool
    # The power of the gradients that it holds: a sum of them, or of their squares.
    power: int = 0
    compared: bool = True


KINDS = {
    "tap": Kind(backward=False),
    "into": Kind(backward=False),  # an input of a layer that no layer gave
    "result": Kind(backward=False),  # what the model returns
    "given": Kind(backward=False),  # what it was called with
    "weight": Kind(backward=False),  # a parameter or statistic before the pass
    "loss": Kind(backward=False),
    "stat": Kind(backward=False),
    "grad": Kind(backward=True, power=1),
    # What comes back to the output of a layer. Where a ReLU gave zero, a tie of a max-pool sends it to any of several
    # places, and none of that goes further: two of one function may differ.
    "cotangent": Kind(backward=True, power=1, compared=False),
    "velocity": Kind(backward=True, power=1),
    "moment1": Kind(backward=True, power=1),
    "moment2": Kind(backward=True, power=2),
    "param": Kind(backward=True),
    "ema": Kind(backward=True),
}

_OF_GRAD = ("grad", "cotangent")


@dataclass(frozen=True)
class ArrayName:
    """An array of a record: its pass, or in mode steps the step, its kind, and the canonical name of what it is of."""

    run: Pass | int  # a step is counted from 1
    kind: str  # one of KINDS
    place: str = ""  # the loss has none

    @classmethod
    def parse(cls, text: str) -> Self:
        """The name that `str` wrote. Raises `ValueError`."""
        run, _, rest = text.partition("/")
        kind, _, place = rest.partition("/")
        step = run.removeprefix("step")
        if kind not in KINDS or (kind == "loss") != (not place):
            raise ValueError(f"{text!r} is no name of an array")
        if run in ("eval", "train", "exact"):
            return cls(run, kind, place)  # type: ignore[arg-type]
        if step == run or not (step.isascii() and step.isdecimal()) or not int(step):
            raise ValueError(f"{text!r} is no name of an array: it begins with no pass and no step")
        return cls(int(step), kind, place)

    def __str__(self) -> str:
        run = f"step{self.run:02d}" if isinstance(self.run, int) else self.run
        return f"{run}/{self.kind}/{self.place}" if self.place else f"{run}/{self.kind}"

    @property
    def is_output(self) -> bool:
        """Whether it is what a layer, or code between layers, gives on the way forward."""
        return self.kind in ("tap", "into", "result")

    @property
    def step(self) -> int | None:
        """The optimiser step after which it is; None in other modes than steps."""
        return self.run if isinstance(self.run, int) else None

    @property
    def mode(self) -> Mode:
        """The mode of the check that it belongs to."""
        if isinstance(self.run, int):
            return "steps"
        return "grad" if self.kind in _OF_GRAD else self.run

    @cached_property
    def section(self) -> str:
        """The mode, for gradients with the pass they were taken in, for steps with the kind of array."""
        if isinstance(self.run, int):
            return f"steps, {self.kind}"
        return f"grad, {self.run}" if self.kind in _OF_GRAD else self.run

    @property
    def label(self) -> str:
        """The canonical name of what it is of; of the loss, ``loss``."""
        return f"the input of {self.place}" if self.kind == "into" else self.place or self.kind

    @property
    def where(self) -> str:
        """The label, with the step where it has one."""
        return f"{self.label}, step {self.run}" if isinstance(self.run, int) else self.label
