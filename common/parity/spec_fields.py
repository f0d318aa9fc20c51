"""The fields of a specification as hypotheses: which other network of the family computes what yours does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import combinations, islice
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from common import architectures
from common.architectures import Spec
from common.backends.messages import Clock
from common.backends.process import BackendProcess
from common.diagnosis.evidence import Finding
from common.errors import ParityError, SpecError
from common.parity.hosts import Ask, in_layout
from common.parity.levels import EXPLAINED
from common.parity.names import ArrayName
from common.parity.native import Network
from common.parity.own import look, named
from common.parity.record import Record, distance, norm
from common.weights import shapes

_NUMBERS = {"bn_eps": (1e-3, 1e-5, 1e-6), "bn_momentum": (0.1, 0.9, 0.99)}
_MOST_PAIRS = 60


@dataclass(frozen=True, kw_only=True)
class TryFields:
    """What each of these networks leaves of what another model computed, on the weights of the first.

    `wanted` are arrays by the names of the backend's own record: results in eval mode, or statistics after a pass in
    training mode.
    """

    network: Network
    candidates: tuple[Mapping[str, Any], ...]
    ask: Ask
    wanted: Mapping[ArrayName, np.ndarray]

    def perform(self, backend: Any, clock: Clock) -> list[float]:
        with clock.step("specifications"):
            return [self._left(backend, candidate) for candidate in self.candidates]

    def _left(self, backend: Any, candidate: Mapping[str, Any]) -> float:
        network = replace(self.network, spec={**self.network.spec, **candidate})
        found: dict[ArrayName, np.ndarray] = {}
        try:
            with network.at_work(backend, self.ask.dtype) as host:
                inputs = in_layout(self.ask.inputs, "channels_last", host.layout)
                for run in dict.fromkeys(name.run for name in self.wanted):
                    trace = host.runner.run(inputs, training=run == "train")
                    found |= look(run, trace, named(inputs)).arrays  # type: ignore[arg-type]
        except (ParityError, ValueError, RuntimeError):  # a network that cannot be, or takes no such images
            return float("inf")
        left = 0.0
        for name, array in self.wanted.items():
            mine = found.get(name)
            if mine is None or mine.shape != array.shape:
                return float("inf")
            left = max(left, distance(mine, array) / (norm(array) or 1.0))
        return left


def singles(spec: Spec) -> list[dict[str, Any]]:
    """Other networks with the same arrays: one field changed."""
    changes = ({name: value} for name, value in _values(spec))
    return [c for c in changes if (other := _changed(spec, c)) is not None and other.layers != spec.layers]


def pairs(spec: Spec) -> list[dict[str, Any]]:
    """The same with two fields changed."""
    both = (a | b for a, b in combinations(singles(spec), 2) if a.keys() != b.keys())
    return [change for change in islice(both, _MOST_PAIRS) if _changed(spec, change) is not None]


def _values(spec: Spec) -> Iterator[tuple[str, Any]]:
    """Other values of every field: all of a choice, and what some variant or convention of the family has."""
    hints = get_type_hints(type(spec))
    family: str = spec.family
    others = [
        *({name: getattr(v, name) for name in _names(v)} for v in architectures.variants_of(family).values()),
        *architectures.conventions(family).values(),
    ]
    for name in _names(spec):
        value, hint = getattr(spec, name), hints[name]
        if get_origin(hint) is Literal:
            found = list(get_args(hint))
        elif isinstance(value, bool):
            found = [not value]
        else:
            found = [other[name] for other in others if name in other] + list(_NUMBERS.get(name, ()))
            if isinstance(value, tuple) and value and all(isinstance(flag, bool) for flag in value):
                found += [(True,) * len(value), (False,) * len(value)]
        for other in dict.fromkeys(one for one in found if one != value):
            yield name, other


def _names(spec: Spec) -> list[str]:
    return [field.name for field in fields(spec)]  # type: ignore[arg-type]


def _changed(spec: Spec, change: Mapping[str, Any]) -> Spec | None:
    try:
        other = spec.replace(**change)
    except SpecError:
        return None
    return other if shapes(other) == shapes(spec) else None


def wanted(views: tuple[Record, Record]) -> dict[ArrayName, np.ndarray]:
    """What a network must compute to be the other model: its results, or where these are the reference's, its
    statistics after a pass in training mode."""
    ours, theirs = views
    results = {name: theirs[name] for name in theirs.arrays if name.run == "eval" and name.kind == "result"}
    statistics = {name: theirs[name] for name in theirs.arrays if name.run == "train" and name.kind == "stat"}
    same = all(_left(ours[name], array) <= EXPLAINED[ours.manifest.dtype] for name, array in results.items())
    return statistics if same and statistics else results


def _left(mine: np.ndarray, array: np.ndarray) -> float:
    return distance(mine, array) / (norm(array) or 1.0) if mine.shape == array.shape else float("inf")


def finding(spec: Spec, change: Mapping[str, Any], left: float, before: float) -> Finding:
    """The answer in words."""
    words = [f"{name}={value!r}" for name, value in change.items()]
    own = [f"{name}={getattr(spec, name)!r}" for name in change]
    return Finding(
        cause="field",
        place="the specification",
        yours=f"computes what {' and '.join(words)} says",
        reference=f"has {' and '.join(own)}",
        remedy="",
        before=before,
        after=left,
        cost=float(len(change)),
    )


def as_spec(
    spec: Spec, network: Network, process: BackendProcess, ask: Ask, views: tuple[Record, Record], defects: int
) -> Finding | None:
    """The one field, or where there are several defects the two, by which the network becomes the other model; None
    where there are none. `process` is that of the reference's backend, `views` as `common.parity.models.explain` has
    them."""
    goal = wanted(views)
    if not goal or not defects:
        return None
    before = max(_left(views[0][name], array) for name, array in goal.items())
    for changes in (singles(spec), pairs(spec) if defects > 1 else []):
        left = process.ask(TryFields(network=network, candidates=tuple(changes), ask=ask, wanted=goal))
        best = min(range(len(changes)), key=left.__getitem__, default=None)
        if best is not None and left[best] <= EXPLAINED[ask.dtype]:
            return finding(spec, changes[best], left[best], before)
    return None
