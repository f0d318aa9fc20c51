"""What a difference of two backends in one array is, and when it is too large: the gate of levels L0, L1 and L2."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Literal

from common.architectures.layers import Layer, Shape, output_shapes
from common.parity import steps
from common.parity.levels import DECIDABLE, RESPONSE_FACTOR, UNIT, floor, floor_of_mean
from common.parity.record import Record

Level = Literal["L0", "L1", "L2"]
# `reported`: the response is too large for a gate at this level, and the level asks only for the figure.
Verdict = Literal["same", "different", "undecided", "reported"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two backends' difference in one array, and what it is held against."""

    tensor: str  # name in the record, "<pass>/<kind>/<canonical name>"
    pair: tuple[str, str]
    level: Level
    distance: float  # ‖a - b‖
    norm: float  # ‖reference‖
    response: float  # the limit over RESPONSE_FACTOR: ρ, or the floor of its kind of array; 0 at level L0
    verdict: Verdict

    @property
    def error(self) -> float:
        """Relative to the norm of the reference; absolute where that is zero."""
        return self.distance / self.norm if self.norm else self.distance

    @property
    def ratio(self) -> float:
        """The distance in one-ulp responses."""
        return self.distance / self.response if self.response else (0.0 if self.distance == 0 else inf)

    @property
    def mode(self) -> str:
        """The mode of the check it belongs to: eval, train, grad, steps or exact."""
        return self.section.split(",")[0]

    @property
    def section(self) -> str:
        """The mode, for gradients with the pass they were taken in, for steps with the kind of array."""
        return section(self.tensor)

    @property
    def step(self) -> int | None:
        """The optimiser step after which it shows, counted from 1; None in other modes than steps."""
        return steps.number(self.tensor)

    @property
    def place(self) -> str:
        """The canonical name alone."""
        return place(self.tensor)


def section(tensor: str) -> str:
    """The part of a check that an array belongs to: a mode, for gradients with the pass, for steps with the kind of
    array; ``weights`` for a weight."""
    run, _, rest = tensor.partition("/")
    kind = rest.partition("/")[0]
    if steps.number(tensor) is not None:
        return f"steps, {kind}"
    return "weights" if not rest else f"grad, {run}" if kind == "grad" else run


def place(tensor: str) -> str:
    """The canonical name in the name of an array."""
    return tensor.split("/", 2)[-1]


_SEVERITY: tuple[Verdict, ...] = ("reported", "same", "undecided", "different")


def rank(difference: Difference) -> tuple[int, float]:
    """How much a difference matters in a report: first by its verdict, then by its size."""
    return _SEVERITY.index(difference.verdict), difference.ratio


# Kinds of arrays that are gradients or come of them, with the power of the gradients that they hold.
_GRADIENTS = {"grad": 1, "velocity": 1, "moment1": 1, "moment2": 2}


def _in_time(name: str) -> tuple[str, float] | None:
    """The pass, and the time within it, of a value that changes when a unit flips: gradients of a pass all at once, and
    in mode steps the loss and the statistics of a step before what comes of its gradients."""
    if (step := steps.number(name)) is not None:
        forward = name.split("/")[1] in ("loss", "stat")
        return "steps", step if forward else step + 0.5
    return (section(name), 0.0) if "/grad/" in name else None


class Gate:
    """Decides about differences, by the responses of the reference."""

    def __init__(
        self,
        reference: Record,
        float32: Record | None,
        norms: Mapping[str, float],
    ) -> None:
        layers = reference.spec.layers
        self._response = reference.manifest.response
        self._dtype = reference.manifest.dtype
        self._float32 = float32.manifest.response if float32 is not None else {}
        self._norms = norms
        self._layer_of = _layer_of(layers)
        self._summed = _summed(layers, reference.manifest.shape)
        self._flipped: dict[str, float] = {}
        self._largest: dict[tuple[str, str, str], float] = {}
        for name, value in norms.items():
            key = self._group(name)
            self._largest[key] = max(self._largest.get(key, 0.0), value)

    def _group(self, name: str) -> tuple[str, str, str]:
        run, kind, *rest = name.split("/", 2)
        return run, kind, self._layer_of.get(rest[0], rest[0]) if rest else ""

    def _flips(self, name: str, responses: Mapping[str, float]) -> bool:
        """Whether `name` is a gradient of a float32 pass in which rounding flips choices of ReLU or max-pool, or comes
        of such a gradient in mode steps.

        One flipped unit changes the gradients of its own layer by percents and of no other, and three draws show
        some of those that may flip: where one gradient shows it, no other of the pass is safe.
        """
        if (place_in_time := _in_time(name)) is None:
            return False
        part, time = place_in_time
        if part not in self._flipped:
            limit = DECIDABLE["float32"]
            shown = (_in_time(n) for n in self._norms if responses.get(n, 0.0) > limit * self._norms[n])
            self._flipped[part] = min((found[1] for found in shown if found and found[0] == part), default=inf)
        return time >= self._flipped[part]

    def _floor(self, name: str) -> float:
        kind, terms = self._group(name)[1], self._summed.get(place(name), 1)
        if kind == "stat" and steps.number(name) is not None:
            return floor_of_mean(terms)
        return floor(terms * _GRADIENTS.get(kind, 0))

    def judge(self, difference: Difference) -> Difference:
        name, level = difference.tensor, difference.level
        if level == "L0":
            verdict: Verdict = "same" if difference.distance == 0 else "different"
            return replace(difference, response=0.0, verdict=verdict)
        dtype = "float32" if level == "L2" else self._dtype
        responses = self._float32 if level == "L2" and self._dtype == "float64" else self._response
        measured = responses.get(name, 0.0)
        response = max(measured, self._floor(name) * UNIT[dtype] * self._norms[name])
        verdict = "same" if difference.distance <= RESPONSE_FACTOR * response else "different"
        too_large = DECIDABLE[dtype] * (self._largest[self._group(name)] if level == "L1" else self._norms[name])
        if (
            level == "L2"
            and not name.startswith("eval/tap/")
            and (measured > too_large or self._flips(name, responses))
        ):
            verdict = "reported"
        elif verdict == "same" and (response == inf or (level == "L1" and measured > too_large)):
            verdict = "undecided"
        return replace(difference, response=response, verdict=verdict)


def _layer_of(layers: Iterable[Layer]) -> dict[str, str]:
    """Path of the layer that a canonical name of a parameter or statistic belongs to."""
    return {name: layer.path for layer in layers for name in layer.arrays}


def _summed(layers: Iterable[Layer], batch: Shape) -> dict[str, int]:
    """How many terms the gradient of a bias sums over, or a running statistic: one for every image and pixel of its
    layer's output."""
    count, *image = batch
    shapes = output_shapes(layers, tuple(image))
    return {
        name: count * prod(shapes[layer.path][:-1])
        for layer in layers
        for name in layer.arrays
        if name.endswith(".bias") or name in layer.statistics
    }
