"""A user's own model as a subject: its passes, with names for every array that a layer takes or gives.

An input that some layer gave before, or the model was called with, has its name already; one that plain code made has
the name of the layer that takes it. So what stands between layers is seen where it goes in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from common.backends.messages import Clock
from common.errors import ModelError
from common.foreign.operations import Activation, Dropout, Flatten, to_data
from common.foreign.protocol import Inputs, Loss, Runner, Trace
from common.parity.levels import RANDOM
from common.parity.names import ArrayName, Mode, Pass
from common.parity.record import Array, LayerCall, Source, distance, finite, norm
from common.parity.subjects import Keep, passes
from common.weights import LazyWeights, perturb_array

_EXACT = (Activation, Dropout, Flatten)


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One pass: its calls, and every array by name, without those that are another's again."""

    calls: tuple[LayerCall, ...]
    arrays: Mapping[ArrayName, np.ndarray]


class ModelPasses:
    """A user's model at work: modes eval, train and grad."""

    def __init__(
        self, runner: Runner, inputs: Inputs, modes: tuple[Mode, ...], loss: Loss | None, clock: Clock, title: str
    ) -> None:
        """Raises `ModelError` for a model that fails, is random in eval mode, or changes what it is given."""
        self._runner, self._modes, self._loss, self._clock, self._title = runner, modes, loss, clock, title
        self.given = named(inputs)
        self._as_list = not isinstance(inputs, Mapping)
        self.values = runner.values()  # every array that the model holds
        self.trained = tuple(name for name, trained in runner.trained.items() if trained)
        self._looked: dict[Pass, Looked] = {}
        for run in passes(modes):
            with clock.step(run):
                trace = self._trace(run, self.given)
            if trace.changed_inputs:
                raise ModelError(
                    f"{title} changes its input {trace.changed_inputs[0]} in place, so that no two passes are alike; "
                    "copy it first"
                )
            self._looked[run] = look(run, trace, self.given)
        self._refuse_random()
        self.arrays = tuple(self._described())
        self._axes: dict[ArrayName, tuple[int, ...] | None] = {}

    @property
    def calls(self) -> tuple[LayerCall, ...]:
        """Those of all passes."""
        return tuple(call for looked in self._looked.values() for call in looked.calls)

    def extra(self) -> Iterator[tuple[ArrayName, np.ndarray]]:
        """What went in: the inputs of the model and the arrays that it holds."""
        run = next(iter(self._looked))
        for name, array in self.given.items():
            yield ArrayName(run, "given", name), array
        for name, array in self.values.items():
            yield ArrayName(run, "weight", name), array

    def not_restored(self) -> list[str]:
        return []

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        given = self.given
        if draw is None and order is None:
            for looked in self._looked.values():
                for name, array in looked.arrays.items():
                    keep(name, array)
            return
        if draw is not None:
            given = {name: _moved(array, draw, name) for name, array in given.items()}
            self._runner.load(_all_moved(self.values, draw))
        if order is not None:
            given = {name: array[order] for name, array in given.items()}
        try:
            for run, looked in self._looked.items():
                found = named_arrays(run, self._trace(run, given), looked.calls)
                loss = ArrayName(run, "loss")
                if order is not None and _differ(found.get(loss), looked.arrays.get(loss)):
                    # A loss of the user's own may hold labels, in the first order: it is another loss then.
                    found = {name: array for name, array in found.items() if name.mode != "grad" and name != loss}
                for name, array in found.items():
                    if name in looked.arrays and array.shape == looked.arrays[name].shape:
                        back = array if order is None else self._put_back(name, array, order, looked.arrays[name])
                        if back is not None:
                            keep(name, back)
        finally:
            if draw is not None:
                self._runner.load(self.values)

    def _trace(self, run: Pass, given: Mapping[str, np.ndarray]) -> Trace:
        inputs: Inputs = list(given.values()) if self._as_list else given
        gradients = "grad" in self._modes
        return self._runner.run(inputs, training=run == "train", gradients=gradients, loss=self._loss)

    def _put_back(
        self, name: ArrayName, array: np.ndarray, order: np.ndarray, reference: np.ndarray
    ) -> np.ndarray | None:
        """The array with its images in the first order; None where it does not say where its images are.

        Which axis counts images is found by trying: all of them but the right one leave another array.
        """
        back = np.argsort(order)
        if name.kind in ("grad", "loss", "stat") and not name.place.startswith("input"):
            return array
        candidates = list(_batch_shapes(array.shape, len(order)))
        if name not in self._axes:
            size = norm(reference)
            self._axes[name] = next(
                (
                    shape
                    for shape in candidates
                    if distance(_taken(array, shape, back), reference) <= RANDOM[str(reference.dtype)] * size
                ),
                candidates[0] if candidates and name.kind == "result" else None,
            )
        found = self._axes[name]
        return None if found is None else _taken(array, found, back)

    def _refuse_random(self) -> None:
        """Two passes in eval mode give one result. Raises `ModelError` naming the layer where they first differ."""
        if "eval" not in self._looked:
            return
        looked = self._looked["eval"]
        again = named_arrays("eval", self._trace("eval", self.given), looked.calls)
        for name, array in looked.arrays.items():
            other = again.get(name)
            if other is None or other.shape != array.shape:
                where = "is not there in a second pass" if other is None else "has another shape in a second pass"
                raise ModelError(f"{self._title} is not the same from call to call: {name.label} {where}")
            if name.kind in ("tap", "into", "result") and not _close(other, array):
                raise ModelError(
                    f"{self._title} is random in eval mode: two passes of the same input differ, first at "
                    f"{name.label}; switch dropout and noise off, or seed them inside"
                )

    def _described(self) -> Iterator[Array]:
        """Every array that is compared, forward first."""
        late = ("grad", "cotangent")
        for looked in self._looked.values():
            by_output = {(source.name): call for call in looked.calls for source in call.outputs[:1]}
            terms = {
                held["name"]: max(1, int(np.prod(call.outputs[0].shape)) // max(1, self.values[held["name"]].size))
                for call in looked.calls
                if call.outputs
                for role, held in call.arrays.items()
                if role == "bias" and held["name"] in self.values
            }
            owners = {held["name"]: call.layer for call in looked.calls for held in call.arrays.values()}
            names = [name for name in looked.arrays if name.mode in self._modes]
            ordered = [n for n in names if n.kind not in late] + [n for n in names if n.kind in late]
            for name in ordered:
                call = by_output.get(short(name))
                exact = call is None or not call.leaf or (call.operation or {}).get("operation") in _EXACT_NAMES
                yield Array(
                    name=str(name),
                    shape=looked.arrays[name].shape,
                    layer=owners.get(name.place, name.place),
                    terms=terms.get(name.place, 1) if name.kind == "grad" else 1,
                    rounds=name.kind == "tap" and not exact,
                    sparse=name.kind != "result",
                    # A mask inside, or what a maximum is padded with.
                    compared=name.kind not in ("tap", "into") or not np.isinf(looked.arrays[name]).any(),
                )


class ModelSteps:
    """Steps of the user's own with a model: mode steps. After each are kept the loss and every array."""

    def __init__(
        self,
        runner: Runner,
        batches: Sequence[Inputs],
        train: Callable[[Any], Callable[..., Any]],
        clock: Clock,
        title: str,
    ) -> None:
        """Raises `ModelError` for steps that fail, or are not the same twice."""
        self._runner, self._train, self._title = runner, train, title
        self._batches = batches
        self._values = runner.values()
        with clock.step("steps"):
            self._first = self._taken(batches)
        again = self._taken(batches)
        for name, array in self._first.items():
            if name not in again or not _close(again[name], array):
                raise ModelError(f"the steps of {title} are random: taken again, {name.where} is another; seed them")
        self.arrays = tuple(
            Array(name=str(name), shape=array.shape, layer=name.place, sparse=True)
            for name, array in self._first.items()
        )

    def not_restored(self) -> list[str]:
        return []

    def run(self, keep: Keep, *, draw: int | None = None, order: np.ndarray | None = None) -> None:
        batches = self._batches
        if draw is not None:
            batches = [_each(b, lambda a, key, n=n: _moved(a, draw, f"{key} of {n}")) for n, b in enumerate(batches)]  # type: ignore[misc]
            self._runner.load(_all_moved(self._values, draw))
        if order is not None:
            batches = [_each(batch, lambda a, key: a[order]) for batch in batches]
        try:
            plain = draw is None and order is None
            for name, array in (self._first if plain else self._taken(batches)).items():
                keep(name, array)
        finally:
            if draw is not None:
                self._runner.load(self._values)

    def _taken(self, batches: Sequence[Inputs]) -> dict[ArrayName, np.ndarray]:
        found: dict[ArrayName, np.ndarray] = {}
        for number, state in enumerate(self._runner.steps(self._train, batches), 1):
            if state.get("") is not None:
                found[ArrayName(number, "loss")] = np.asarray(state[""])
            for trained, kind in ((False, "stat"), (True, "param")):
                for name, is_trained in self._runner.trained.items():
                    if is_trained == trained and name in state and state[name].dtype.kind == "f":
                        found[ArrayName(number, kind, name)] = state[name]
        return found


def _each(inputs: Inputs, change: Callable[[np.ndarray, str], np.ndarray]) -> Inputs:
    if isinstance(inputs, Mapping):
        return {name: change(array, name) for name, array in inputs.items()}
    return [change(array, str(number)) for number, array in enumerate(inputs)]


_EXACT_NAMES = {kind.__name__ for kind in _EXACT}


def named(inputs: Inputs) -> dict[str, np.ndarray]:
    """The arrays that a model is called with, by name or position."""
    return dict(inputs) if isinstance(inputs, Mapping) else {str(i): array for i, array in enumerate(inputs)}


def images_in(inputs: Inputs) -> int:
    """How many images the batch has: 1 where that cannot be told, and it has no other order."""
    counts = {array.shape[:1] for array in named(inputs).values()}
    return counts.pop()[0] if len(counts) == 1 and () not in counts else 1


def short(name: ArrayName) -> str:
    """Without the pass, as `Source` has it."""
    return f"{name.kind}/{name.place}"


def look(run: Pass, trace: Trace, given: Mapping[str, np.ndarray]) -> Looked:
    """Names for all arrays of a pass. An array that is another's again, reshaped or with its channels moved, has that
    one's name."""
    known: dict[int, list[tuple[str, np.ndarray]]] = {}
    for name, array in given.items():
        known.setdefault(array.size, []).append((f"given/{name}", array))
    calls: list[LayerCall] = []
    for call in trace.calls:
        inputs = tuple(
            _source(array, known, f"into/{_numbered(call.name, i)}")
            for i, array in enumerate(trace.inputs.get(call.name, ()))
        )
        outputs = tuple(
            _source(array, known, f"tap/{_numbered(call.name, i)}")
            for i, array in enumerate(trace.outputs.get(call.name, ()))
        )
        calls.append(
            LayerCall(
                run=run,  # type: ignore[arg-type]
                name=call.name,
                layer=call.layer,
                kind=call.kind,
                leaf=call.leaf,
                operation=to_data(call.operation),
                arrays={role: asdict(held) for role, held in call.arrays.items()},
                inputs=inputs,
                outputs=outputs,
            )
        )
    return Looked(calls=tuple(calls), arrays=named_arrays(run, trace, calls))


def named_arrays(run: Pass, trace: Trace, calls: Sequence[LayerCall]) -> dict[ArrayName, np.ndarray]:
    """The arrays of a pass, by the names that `calls` give them; in the order in which they come about."""
    found: dict[ArrayName, np.ndarray] = {}
    cotangents: dict[ArrayName, np.ndarray] = {}
    for call in calls:
        for side, kind in ((trace.inputs, "into"), (trace.outputs, "tap")):
            sources = call.inputs if kind == "into" else call.outputs
            for number, (source, array) in enumerate(zip(sources, side.get(call.name, ()), strict=False)):
                place = _numbered(call.name, number)
                if source.name == f"{kind}/{place}":
                    found[ArrayName(run, kind, place)] = array
        if call.leaf:
            for number, back in enumerate(trace.cotangents.get(call.name, ())):
                if back is not None:
                    cotangents[ArrayName(run, "cotangent", _numbered(call.name, number))] = back
    for path, array in trace.results.items():
        found[ArrayName(run, "result", path or "output")] = array
    if trace.loss is not None:
        found[ArrayName(run, "loss")] = trace.loss
    for name, array in trace.statistics.items():
        found[ArrayName(run, "stat", name)] = array
    found |= dict(reversed(cotangents.items()))
    for name, array in reversed(trace.gradients.items()):
        found[ArrayName(run, "grad", name)] = array
    for name, array in trace.of_inputs.items():
        found[ArrayName(run, "grad", f"input {name}")] = array
    comparable = ((name, _comparable(array)) for name, array in found.items())
    return {name: number for name, number in comparable if number is not None}


def _comparable(array: np.ndarray) -> np.ndarray | None:
    """Floating-point arrays as they are, or in float32 where NumPy has no arithmetic for them, as for bfloat16;
    integers as numbers; nothing of what is no number."""
    if array.dtype in (np.float32, np.float64):
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.float64)
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError):
        return None


def _numbered(name: str, number: int) -> str:
    return f"{name}[{number}]" if number else name


def _source(array: np.ndarray, known: dict[int, list[tuple[str, np.ndarray]]], otherwise: str) -> Source:
    """Where the values of an array were last seen; else it is new, and called `otherwise`."""
    for name, other in reversed(known.get(array.size, ())):
        if other.dtype == array.dtype:
            if _equal(array, other):
                return Source(name=name, shape=array.shape)
            if array.ndim >= 3 and array.ndim <= other.ndim:
                for axes in ((-1, 1), (1, -1)):
                    if _equal(array, np.moveaxis(other, *axes)):
                        return Source(name=name, shape=array.shape, moved=True)
    known.setdefault(array.size, []).append((otherwise, array))
    return Source(name=otherwise, shape=array.shape)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the values are the same in the same order, whatever the shapes."""
    if a.shape != b.shape:
        b = b.reshape(a.shape)
    few = (slice(None, None, max(1, a.shape[0] // 2)),) if a.ndim else ()
    return bool(np.array_equal(a[few].reshape(-1)[:64], b[few].reshape(-1)[:64])) and np.array_equal(a, b)


def _all_moved(values: Mapping[str, np.ndarray], draw: int) -> LazyWeights:
    """One after another, as they are loaded."""
    return LazyWeights({name: partial(_moved, array, draw, name) for name, array in values.items()})


def _moved(array: np.ndarray, draw: int, name: str) -> np.ndarray:
    """Moved by ulps where it is floating point."""
    if array.dtype in (np.float32, np.float64):
        return perturb_array(np.ascontiguousarray(array), draw, name)
    return array


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    first, second = finite(a, b)
    return distance(first, second) <= RANDOM[str(b.dtype)] * norm(second)


def _differ(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and not _close(a, b)


def _batch_shapes(shape: tuple[int, ...], images: int) -> Iterator[tuple[int, ...]]:
    """Ways in which an array may count images: a shape in which they have an axis of their own, and behind it which."""
    for axis, length in enumerate(shape):
        if length == images:
            yield (*shape, axis)
    for axis, length in enumerate(shape):
        if length % images == 0 and length > images:
            yield (*shape[:axis], images, length // images, *shape[axis + 1 :], axis)
            yield (*shape[:axis], length // images, images, *shape[axis + 1 :], axis + 1)


def _taken(array: np.ndarray, shape_and_axis: tuple[int, ...], order: np.ndarray) -> np.ndarray:
    *shape, axis = shape_and_axis
    return np.take(array.reshape(shape), order, axis).reshape(array.shape)


def silent() -> Clock:
    """A clock that nobody listens to."""
    return Clock(lambda step: None)
