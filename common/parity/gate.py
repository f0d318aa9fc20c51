"""What a difference of two backends in one array is, and when it is too large: the gate of levels L0, L1 and L2."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Literal

from common.architectures.layers import Layer, Shape, output_shapes
from common.parity import steps
from common.parity.levels import DECIDABLE, ORDER_LIMIT, RESPONSE_FACTOR, UNIT, floor, rho
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
    response: float  # the limit over RESPONSE_FACTOR: ρ of the pair; 0 at level L0
    verdict: Verdict
    ordered: bool = True  # whether both were run in other orders too; a single image has none

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


@dataclass(frozen=True, kw_only=True)
class OrderDependence:
    """A backend whose result depends on the order of the batch beyond rounding, where that first shows."""

    backend: str
    tensor: str
    change: float  # ‖another order - the given one‖
    norm: float  # ‖reference‖
    response: float  # the one-ulp response of the reference, or its floor

    @property
    def error(self) -> float:
        """Relative to the norm of the reference; absolute where that is zero."""
        return self.change / self.norm if self.norm else self.change

    @property
    def ratio(self) -> float:
        """The change in one-ulp responses."""
        return self.change / self.response if self.response else inf


class Gate:
    """Decides about differences, by the responses of the reference and of the two that are compared.

    `records` are the columns by their label, `soft` those of them that are held to level L2 in a float64 comparison.
    """

    def __init__(
        self,
        level: Level,
        reference: Record,
        float32: Record | None,
        records: Mapping[str, Record],
        soft: Set[str],
        norms: Mapping[str, float],
    ) -> None:
        layers = reference.spec.layers
        self._level = level
        self._response = reference.manifest.response
        self._dtype = reference.manifest.dtype
        self._float32 = float32.manifest.response if float32 is not None else {}
        self._records = records
        self._soft = soft
        self._norms = norms
        self._layer_of = _layer_of(layers)
        self._summed = _summed(layers, reference.manifest.shape)
        self._flipped: dict[tuple[tuple[str, ...], str], float] = {}
        self._largest: dict[tuple[str, str, str], float] = {}
        for name, value in norms.items():
            key = self._group(name)
            self._largest[key] = max(self._largest.get(key, 0.0), value)

    def level(self, *backends: str) -> Level:
        """The level that a backend or a pair is held to."""
        return "L2" if self._soft & set(backends) else self._level

    def order_dependence(self, backend: str) -> OrderDependence | None:
        """What shows that a backend depends on the order of the batch beyond rounding, in the first array of the norms
        that does."""
        for name, norm in self._norms.items():
            response = 0.0 if self._level == "L0" else self._least(name, self.level(backend))
            change = self._records[backend].manifest.order_response.get(name, 0.0)
            if not change <= ORDER_LIMIT * response and not self._only_reported(name, (backend,)):
                return OrderDependence(backend=backend, tensor=name, change=change, norm=norm, response=response)
        return None

    def judge(self, difference: Difference) -> Difference:
        name, pair, level = difference.tensor, difference.pair, self.level(*difference.pair)
        difference = replace(difference, level=level)
        if level == "L0":
            return replace(difference, response=0.0, verdict="same" if difference.distance == 0 else "different")
        ordered = all(self._records[backend].manifest.orders for backend in pair)
        measured, response = self._measured(name, pair), self._rho(name, pair)
        verdict: Verdict = "same" if difference.distance <= RESPONSE_FACTOR * response else "different"
        amplified = level == "L1" and measured > DECIDABLE[self._dtype] * self._largest[self._group(name)]
        if self._only_reported(name, pair):
            verdict = "reported"
        elif amplified or response == inf if verdict == "same" else not ordered:
            verdict = "undecided"
        return replace(difference, response=response, verdict=verdict, ordered=ordered)

    def _group(self, name: str) -> tuple[str, str, str]:
        run, kind, *rest = name.split("/", 2)
        return run, kind, self._layer_of.get(rest[0], rest[0]) if rest else ""

    def _one_ulp(self, name: str, level: Level) -> float:
        responses = self._float32 if level == "L2" and self._dtype == "float64" else self._response
        return responses.get(name, 0.0)

    def _least(self, name: str, level: Level) -> float:
        """The one-ulp response, or the floor of its kind of array."""
        dtype = "float32" if level == "L2" else self._dtype
        kind, terms = self._group(name)[1], self._summed.get(place(name), 1)
        return max(self._one_ulp(name, level), floor(terms * _GRADIENTS.get(kind, 0)) * UNIT[dtype] * self._norms[name])

    def _orders(self, name: str, backends: Sequence[str]) -> list[float]:
        """Order responses, as far as they are rounding: what is more is a fault of that backend and excuses nothing."""
        limit = ORDER_LIMIT * self._least(name, self.level(*backends))
        changes = (self._records[backend].manifest.order_response.get(name, 0.0) for backend in backends)
        return [change if change <= limit else 0.0 for change in changes]

    def _measured(self, name: str, pair: tuple[str, str]) -> float:
        return rho(self._one_ulp(name, self.level(*pair)), *self._orders(name, pair))

    def _rho(self, name: str, pair: tuple[str, str]) -> float:
        return rho(self._least(name, self.level(*pair)), *self._orders(name, pair))

    def _only_reported(self, name: str, backends: tuple[str, ...]) -> bool:
        """Whether the level asks only for the figure, since rounding flips choices of ReLU or max-pool.

        One flipped unit changes the gradients of its own layer by percents and of no other, and three draws show
        some of those that may flip: where one gradient shows it, no other of the pass is safe.
        """
        if self.level(*backends) != "L2" or name.startswith("eval/tap/"):
            return False
        if self._shaken(name, backends):
            return True
        if (place_in_time := _in_time(name)) is None:
            return False
        part, time = place_in_time
        if (backends, part) not in self._flipped:
            shown = (_in_time(n) for n in self._norms if self._shaken(n, backends))
            times = [found[1] for found in shown if found and found[0] == part]
            self._flipped[backends, part] = min(times, default=inf)
        return time >= self._flipped[backends, part]

    def _shaken(self, name: str, backends: Sequence[str]) -> bool:
        """Whether the float32 response of an array, to an ulp or to other orders, is too large for a gate."""
        flips = (found := _in_time(name)) is not None and found != ("steps", 1)
        # What is no gradient and comes of none moves smoothly, and a fault of a backend excuses nothing.
        changes = (
            [self._records[backend].manifest.order_response.get(name, 0.0) for backend in backends]
            if flips
            else self._orders(name, backends)
        )
        return max(self._one_ulp(name, "L2"), *changes) > DECIDABLE["float32"] * self._norms[name]


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
