"""What a diagnosis goes by, and what it comes to.

`common.parity.localise` gathers the evidence. Every array of an image is channels last here, (N, ..., C), whatever the
model has; of the reference and of yours it has one shape, unless the two models themselves compute different shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isinf

import numpy as np

from common.foreign.operations import Operation

_NAMED = 2  # of the places where one defect is again


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model's layer: what it says it is, its arrays, and what it makes of the reference's own input."""

    backend: str  # whose users the remedy is written for: "torch", "keras:tensorflow", "flax", …
    layer: str  # its path in the model; with the call's number where it has several
    kind: str  # the name of its class
    operation: Operation | None  # what it says it does
    arrays: Mapping[str, np.ndarray]  # by role, in the layouts of common/foreign/operations.py; by its own words else
    outputs: tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of a layer in training mode: what it kept before and after the pass, by role."""

    before: Mapping[str, np.ndarray]
    after: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Backward:
    """Of a layer on the way back: what came to its output, the same for both, and what it made of that."""

    cotangent: np.ndarray
    of_inputs: tuple[np.ndarray | None, ...]  # None where nothing came back
    of_arrays: Mapping[str, np.ndarray]  # by role


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """A layer of both models, both given the reference's input; `limit` is what rounding may make of the difference."""

    training: bool
    inputs: tuple[np.ndarray, ...]
    reference: Side
    yours: Side
    limit: float  # of ‖yours - reference‖
    statistics: tuple[Statistics, Statistics] | None = None  # of the reference and of yours, in training
    backward: tuple[Backward, Backward] | None = None


@dataclass(frozen=True, kw_only=True)
class GlueEvidence:
    """What stands between layers as plain code, up to an input of a layer (or the model's output): both models had the
    reference's values in every layer before it.

    `sources` are these values, nearest first: outputs of layers and the model's inputs, by the reference's names.
    """

    training: bool
    place: str  # "the input of layer3.0.conv1"
    backend: str  # of yours
    sources: Mapping[str, np.ndarray]
    reference: np.ndarray
    yours: np.ndarray
    limit: float
    # Of sources that the reference has a layer for and yours has none: what that layer does, and to which of them.
    made: Mapping[str, tuple[Operation, tuple[str, ...]]] = field(default_factory=dict)
    # What yours has in the place of sources that were off before, and goes on computing with.
    inherited: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A cause that was tried, and how much of the difference it leaves."""

    cause: str  # one of common.diagnosis.causes.CAUSES
    place: str  # the layer, by the name in yours; with the reference's in brackets where that is another
    yours: str  # what yours does, in words: "pads as SAME does"
    reference: str  # what the reference does: "pads symmetrically, by 1"
    remedy: str  # what to write, in the framework of yours; "" where there is nothing to say
    before: float  # ‖yours - reference‖ / ‖reference‖
    after: float  # the same with the reference changed by the hypothesis
    # How special it is, for two that leave as little: an eps that is another number says less than a missing bias.
    cost: float = 1.0
    also: tuple[str, ...] = ()  # other places of the same

    @property
    def sentence(self) -> str:
        """The answer with its proof."""
        now = "of another shape now" if isinf(self.before) else f"{self.before:.2g} now"
        proof = f"so changed, the reference agrees with it to {self.after:.0e} ({now})"
        remedy = f" {self.remedy}" if self.remedy else ""
        named = [f"`{place}`" for place in self.also[:_NAMED]]
        rest = len(self.also) - len(named)
        also = f" and also {', '.join(named)}{f' and {rest} more' if rest else ''}" if named else ""
        return f"`{self.place}`{also}: yours {self.yours}, the reference {self.reference}; {proof}.{remedy}"


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One defect: the cause that leaves least, and the next one; None where no hypothesis explains it."""

    place: str
    best: Finding | None
    runner_up: Finding | None = None
    others: tuple[Finding, ...] = ()  # those that follow


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Every defect that was found, in order of execution."""

    defects: tuple[Explained, ...] = field(default=())
    # Of a network of ours: the other one of its family that computes what yours does.
    as_spec: Finding | None = None
