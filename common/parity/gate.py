"""When a difference of two backends in one array is too large: the gate of levels L0, L1 and L2.

What a level asks of an array is one row of `POLICIES`; what a kind of array is to rounding stands in names.py.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf
from typing import Literal

from common.parity.levels import DECIDABLE, ORDER_LIMIT, RESPONSE_FACTOR, UNIT, floor, rho
from common.parity.names import KINDS, ArrayName, Pass
from common.parity.record import Array, Record

Level = Literal["L0", "L1", "L2"]
# `reported`: the response is too large for a gate at this level, and the level asks only for the figure.
Verdict = Literal["same", "different", "undecided", "reported"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a level asks of an array."""

    # Held to equality, not to a response.
    exact: bool = False
    # What follows where rounding alone moves an array by more than DECIDABLE: no decision, or the figure alone.
    shaken: Literal["undecided", "reported", "gated"] = "gated"


def policy(level: Level, name: ArrayName) -> Policy:
    """The row of `POLICIES` for an array: that of outputs in eval mode, or of all others."""
    return POLICIES[level, name.run == "eval" and name.is_output]


POLICIES: dict[tuple[Level, bool], Policy] = {
    ("L0", True): Policy(exact=True),
    ("L0", False): Policy(exact=True),
    ("L1", True): Policy(shaken="undecided"),
    ("L1", False): Policy(shaken="undecided"),
    ("L2", True): Policy(shaken="gated"),
    ("L2", False): Policy(shaken="reported"),
}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a difference is held to, and what comes of it."""

    level: Level
    response: float  # the limit over RESPONSE_FACTOR: ρ of the pair; 0 at level L0
    verdict: Verdict
    ordered: bool = True  # whether both were run in other orders too; a single image has none


@dataclass(frozen=True, kw_only=True)
class OrderDependence:
    """A backend whose result depends on the order of the batch beyond rounding, where that first shows."""

    backend: str
    tensor: ArrayName
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

    `records` are the columns by their label, `soft` those of them that are held to level L2 in a float64 comparison, by
    the response of the record `float32`. `arrays` are all that is compared, in the order in which it comes about, and
    `norms` their norms in the reference. `flips` are the passes of pairs of which one switched a unit off that the
    other left on.
    """

    def __init__(
        self,
        level: Level,
        reference: Record,
        float32: Record | None,
        records: Mapping[str, Record],
        soft: Set[str],
        arrays: Mapping[ArrayName, Array],
        norms: Mapping[ArrayName, float],
        flips: Set[tuple[Pass | int, tuple[str, ...]]] = frozenset(),
    ) -> None:
        self._level = level
        self._response = reference.response
        self._dtype = reference.manifest.dtype
        # In a float64 comparison level L2 is for the soft columns alone.
        self._float32 = float32.response if float32 is not None else {}
        self._records, self._soft = records, soft
        self._arrays, self._norms, self._flips = arrays, norms, flips
        self._flipped: dict[tuple[tuple[str, ...], str], tuple[float, bool]] = {}
        self._largest: dict[tuple[str | int, str, str], float] = {}
        for name, value in norms.items():
            key = self._beside(name)
            self._largest[key] = max(self._largest.get(key, 0.0), value)

    def level(self, *backends: str) -> Level:
        """The level that a backend or a pair is held to."""
        return "L2" if self._soft & set(backends) else self._level

    def order_dependence(self, backend: str) -> OrderDependence | None:
        """What shows that a backend depends on the order of the batch beyond rounding, in the first array that does."""
        for name, norm in self._norms.items():
            level = self.level(backend)
            response = 0.0 if policy(level, name).exact else self.least(name, level)
            change = self._records[backend].order_response.get(name, 0.0)
            if not change <= ORDER_LIMIT * response and not self._only_reported(name, (backend,)):
                return OrderDependence(backend=backend, tensor=name, change=change, norm=norm, response=response)
        return None

    def judge(self, name: ArrayName, pair: tuple[str, str], distance: float) -> Judgement:
        """What comes of a pair's difference in an array."""
        level = self.level(*pair)
        rule = policy(level, name)
        if rule.exact:
            return Judgement(level=level, response=0.0, verdict="same" if distance == 0 else "different")
        ordered = all(self._records[backend].manifest.orders for backend in pair)
        orders = self._orders(name, pair)
        response = rho(self.least(name, level), *orders)
        measured = rho(self._one_ulp(name, level), *orders)
        amplified = rule.shaken == "undecided" and measured > DECIDABLE[self._dtype] * self._largest[self._beside(name)]
        same = distance <= RESPONSE_FACTOR * response
        verdict: Verdict = "same" if same else "different"
        if self._only_reported(name, pair):
            verdict = "reported"
        elif (amplified or response == inf) if same else not ordered and distance <= self._most(name, level):
            verdict = "undecided"
        return Judgement(level=level, response=response, verdict=verdict, ordered=ordered)

    def _most(self, name: ArrayName, level: Level) -> float:
        """Beyond this two differ, whatever their order responses would be."""
        believed = ORDER_LIMIT * (least := self.least(name, level))
        return RESPONSE_FACTOR * rho(least, believed, believed)

    def least(self, name: ArrayName, level: Level) -> float:
        """The one-ulp response, or the floor of its kind of array."""
        dtype = "float32" if level == "L2" else self._dtype
        terms = self._arrays[name].terms * KINDS[name.kind].power
        return max(self._one_ulp(name, level), floor(terms) * UNIT[dtype] * self._norms[name])

    def _one_ulp(self, name: ArrayName, level: Level) -> float:
        responses = self._float32 if level == "L2" and self._dtype == "float64" else self._response
        return responses.get(name, 0.0)

    def _beside(self, name: ArrayName) -> tuple[str | int, str, str]:
        """What arrays are judged beside each other: those of one kind, layer and pass or step."""
        return name.run, name.kind, self._arrays[name].layer

    def _changes(self, name: ArrayName, backends: Sequence[str]) -> list[float]:
        return [self._records[backend].order_response.get(name, 0.0) for backend in backends]

    def _orders(self, name: ArrayName, backends: Sequence[str]) -> list[float]:
        """Order responses, as far as they are rounding: what is more is a fault of that backend and excuses nothing."""
        limit = ORDER_LIMIT * self.least(name, self.level(*backends))
        return [change if change <= limit else 0.0 for change in self._changes(name, backends)]

    def _only_reported(self, name: ArrayName, backends: tuple[str, ...]) -> bool:
        """Whether the level asks only for the figure, since rounding flips choices of ReLU or max-pool.

        One flipped unit changes the gradients of its own layer by percents and of no other, and three draws show
        some of those that may flip: where one gradient shows it, no other of the pass is safe. The two that are
        compared may have flipped another one, which their outputs show.
        """
        if policy(self.level(*backends), name).shaken != "reported":
            return False
        if self._shaken(name, backends) or (KINDS[name.kind].backward and (name.run, backends) in self._flips):
            return True
        if (when := _when(name)) is None:
            return False
        part, time = when
        if (backends, part) not in self._flipped:
            shown = (_when(n) for n in self._norms if self._shaken(n, backends))
            times = [found[1] for found in shown if found and found[0] == part]
            self._flipped[backends, part] = min(times, default=(inf, True))
        return time >= self._flipped[backends, part]

    def _shaken(self, name: ArrayName, backends: Sequence[str]) -> bool:
        """Whether the float32 response of an array, to an ulp or to other orders, is too large for a gate."""
        # What is no gradient and comes of none moves smoothly, and a fault of a backend excuses nothing.
        jumps = _when(name) not in (None, ("steps", (1, False)))
        changes = (self._changes if jumps else self._orders)(name, backends)
        return max(self._one_ulp(name, "L2"), *changes) > DECIDABLE["float32"] * self._norms[name]


def _when(name: ArrayName) -> tuple[str, tuple[float, bool]] | None:
    """Where and when a value changes if a unit flips: gradients of a pass all at once, and of steps the loss and the
    statistics of one before what comes of its gradients, and all that before the next one."""
    backward = KINDS[name.kind].backward
    if isinstance(name.run, int):
        return "steps", (name.run, backward)
    return (name.run, (0, True)) if backward else None
