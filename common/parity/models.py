"""Compare models of the user's own: any two or more, of whatever framework, by the levels of docs/numerics.md."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from common.diagnosis.evidence import Diagnosis, Finding
from common.errors import InputError, ModelError
from common.foreign.files import as_inputs
from common.foreign.protocol import Inputs, Layout, Loss
from common.parity.compare import Comparison, compare
from common.parity.diagnose import diagnose
from common.parity.hosts import Ask, Here, Host, cast, in_layout
from common.parity.levels import DRAWS, ORDERS
from common.parity.localise import Localised, localise, localise_records
from common.parity.matching import Matching, aligned, match
from common.parity.names import Mode
from common.parity.record import Manifest, Record
from common.parity.subjects import passes

# Of what was asked, the two records by the reference's names, and how many defects were found.
AsSpec = Callable[[Ask, tuple[Record, Record], int], Finding | None]
LAYOUTS: dict[str, Layout] = {"NCHW": "channels_first", "NHWC": "channels_last"}
_MODES: tuple[Mode, ...] = ("eval", "train", "grad")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The reference and another model."""

    reference: str
    other: str
    matching: Matching
    localised: Localised | None = None  # where they differ
    diagnosis: Diagnosis | None = None


@dataclass(frozen=True, kw_only=True)
class ModelsResult:
    """What a comparison of models found."""

    names: tuple[str, ...]
    modes: tuple[Mode, ...]
    comparisons: tuple[Comparison, ...]  # one for each level
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()  # what could not be done, and why
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all of them are one function, as far as was looked."""
        return bool(self.comparisons) and all(compared.passed for compared in self.comparisons)

    @property
    def diagnosis(self) -> Diagnosis:
        """Every defect that was found in any of the models."""
        return Diagnosis(defects=tuple(d for pair in self.pairs if pair.diagnosis for d in pair.diagnosis.defects))


def compare_models(
    *models: Any,
    inputs: Any,
    names: Sequence[str] | None = None,
    layouts: Sequence[str | None] | None = None,
    matching: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    modes: Sequence[Mode] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    loss: Loss | Sequence[Loss] | None = None,
    train: Sequence[Callable[[Any], Callable[..., Any]]] | None = None,
    batches: Sequence[Any] = (),
    progress: Callable[[str, str], None] = lambda name, step: None,
) -> ModelsResult:
    """Compare two models or more; the first is the reference.

    A model is a `torch.nn.Module`, a `torch.export` program, a Keras model, a linen module with its variables as
    ``(module, variables)`` or bound, an `nnx.Module`, the path of an ONNX file or of a SavedModel, or a function of
    arrays. `inputs` are one array, several in a list, or a dictionary, with images as the first model has them; NCHW
    and NHWC are told by the models' kinds, and by `layouts` ("NCHW", "NHWC" or None for each) where that is wrong.
    `matching` says which layer or parameter of the first is which of the other, where names, values and order do not.
    `modes` are those of eval, train and grad that are wanted; all that every model can, unless they are given. `loss`
    is a function of what a model returns, one for all or one each. `train`, a function each, is given the model and
    returns one that takes a step with a batch of `batches`.

    Nothing of it stays in the models or the process. Raises `ModelError` for a model that cannot be run or compared,
    `InputError` for arguments that contradict each other.
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} model given; a comparison needs at least two")
    for option, given in (("names", names), ("layouts", layouts), ("train", train)):
        if given is not None and len(given) != len(models):
            raise InputError(f"{option} has {len(given)} entries for {len(models)} models; give one for each")
    hosts: list[Host] = []
    for number, model in enumerate(models):
        layout = layouts[number] if layouts else None
        host = Here(model, layout=layout_of(layout), name=names[number] if names else None)
        if "layout" in host.lacks and not layout and hosts:
            host.layout = hosts[0].layout
        hosts.append(host)
    _distinct(hosts)
    return compare_hosts(
        hosts,
        as_inputs(inputs),
        tables=_each(matching, len(models) - 1),
        modes=None if modes is None else tuple(modes),
        dtypes=dtypes,
        losses=_each(loss, len(models)),
        trains=list(train) if train else [None] * len(models),
        batches=tuple(as_inputs(batch) for batch in batches),
        progress=progress,
    )


def layout_of(name: str | None) -> Layout | None:
    """The layout that people call NCHW or NHWC; None for none. Raises `InputError`."""
    if name is not None and name not in LAYOUTS:
        raise InputError(f"layout {name!r} is unknown; expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name] if name else None


def compare_hosts(
    hosts: Sequence[Host],
    inputs: Inputs,
    *,
    tables: Sequence[Mapping[str, str] | None] | None = None,
    modes: tuple[Mode, ...] | None = None,
    dtypes: Sequence[str] = ("float64", "float32"),
    losses: Sequence[Loss | None] | None = None,
    trains: Sequence[Callable[[Any], Callable[..., Any]] | None] | None = None,
    batches: tuple[Inputs, ...] = (),
    progress: Callable[[str, str], None] = lambda name, step: None,
    as_spec: AsSpec | None = None,
) -> ModelsResult:
    """As `compare_models`, of models wherever they run. `as_spec` is asked, where the reference is a network of ours,
    which other one of its family the other model is."""
    started = time.perf_counter()
    notes: list[str] = []
    chosen = chosen_modes(hosts, modes, bool(batches), notes)
    if "float32" in dtypes:
        # Both levels look at one network on one input.
        inputs, batches = cast(inputs, "float32"), tuple(cast(batch, "float32") for batch in batches)
    asks = [
        Ask(
            inputs=in_layout(inputs, hosts[0].layout, host.layout),
            dtype="float64",
            modes=chosen,
            draws=0 if number else DRAWS,
            orders=ORDERS,
            loss=losses[number] if losses else None,
            train=trains[number] if trains else None,
            batches=tuple(in_layout(batch, hosts[0].layout, host.layout) for batch in batches),
        )
        for number, host in enumerate(hosts)
    ]
    comparisons: list[Comparison] = []
    pairs: tuple[Pair, ...] = ()
    versions: dict[str, Mapping[str, str]] = {}
    truth: Record | None = None
    soft: Record | None = None
    # Columns that round to float32 inside a float64 network are held to the float32 response, so that comes first.
    order = sorted(dtypes, key=lambda dtype: dtype != "float32") if any(map(_rounds, hosts)) else list(dtypes)
    for dtype in order:
        try:
            found = _level(
                hosts,
                [_in(ask, dtype) for ask in asks],
                tables,
                truth,
                soft,
                pairs,
                progress,
                as_spec,
            )
        except _NoTwin as error:
            if dtype == "float32" or "float32" not in dtypes:
                raise ModelError(str(error)) from None
            notes.append(f"no float64 twin, so that level L1 is left out: {error}")
            continue
        comparisons.append(found.compared)
        pairs = found.pairs
        truth, soft = (found.reference, soft) if dtype == "float64" else (truth, found.reference)
        versions |= {
            host.name: dict(manifest.versions) | {"device": manifest.device}
            for host, manifest in zip(hosts, found.manifests, strict=True)
        }
        for pair in found.pairs:
            notes += [note for note in _unmatched(pair) if note not in notes]
    return ModelsResult(
        names=tuple(host.name for host in hosts),
        modes=chosen,
        comparisons=tuple(sorted(comparisons, key=lambda compared: compared.level)),
        pairs=pairs,
        notes=tuple(notes),
        versions=versions,
        seconds=time.perf_counter() - started,
    )


def _in(ask: Ask, dtype: str) -> Ask:
    batches = tuple(cast(batch, dtype) for batch in ask.batches)
    return replace(ask, dtype=dtype, inputs=cast(ask.inputs, dtype), batches=batches)


def explain(reference: Host, other: Host, asks: tuple[Ask, Ask]) -> tuple[Pair, tuple[Record, Record]]:
    """Where and why one model differs from another, of which it is known that it does; and their records, by the
    reference's names. Raises `ModelError`."""
    with reference.at_work(asks[0].dtype), other.at_work(asks[1].dtype):
        first, second = reference.record(asks[0]), other.record(asks[1])
        found = match(first, second)
        views = aligned(first, second, found)
        localised = localise(first, other, second, found, views, asks[1])
        pair = Pair(
            reference=reference.name,
            other=other.name,
            matching=found,
            localised=localised,
            diagnosis=diagnose(first, second, found, localised),
        )
        return pair, views


class _NoTwin(Exception):
    """A model that cannot be had in a dtype, or does not compute in it."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    compared: Comparison
    reference: Record  # what of it was compared
    manifests: tuple[Manifest, ...]
    pairs: tuple[Pair, ...]


def _level(
    hosts: Sequence[Host],
    asks: Sequence[Ask],
    tables: Sequence[Mapping[str, str] | None] | None,
    truth: Record | None,
    soft: Record | None,
    before: Sequence[Pair],
    progress: Callable[[str, str], None],
    as_spec: AsSpec | None,
) -> _Level:
    """`before` are the pairs of another level: what was localised there is not looked for again."""
    with ExitStack() as stack:
        records: list[Record] = []
        for host, ask in zip(hosts, asks, strict=True):
            progress(host.name, ask.dtype)
            try:
                stack.enter_context(host.at_work(ask.dtype))
                records.append(host.record(ask))
            except ModelError as error:
                raise _NoTwin(error) from error
        reference, *others = records
        matchings = [match(reference, other, tables[i] if tables else None) for i, other in enumerate(others)]
        views = [aligned(reference, other, found) for other, found in zip(others, matchings, strict=True)]
        seen = {name for _, view in views for name in view.arrays}
        own = reference.restricted(seen)
        compared = compare(
            [own, *(view for _, view in views)],
            float32=soft.restricted(seen) if soft is not None and asks[0].dtype == "float64" else None,
            truth=_truth(own, truth, seen) if asks[0].dtype == "float32" else None,
        )
        pairs = []
        for number, (host, ask, other, view, found) in enumerate(
            zip(hosts[1:], asks[1:], others, views, matchings, strict=True)
        ):
            pair = Pair(reference=hosts[0].name, other=host.name, matching=found)
            if before and before[number].localised is not None:
                pairs.append(before[number])
                continue
            between = compared.of(compared.backends[0], view[1].label)
            if between.differs and other.manifest.calls and reference.manifest.calls:
                progress(host.name, "localise")
                if "layers" in host.lacks:
                    localised = localise_records(reference, other, found, view)
                else:
                    localised = localise(reference, host, other, found, view, ask)
                diagnosis = diagnose(reference, other, found, localised)
                if as_spec is not None:
                    progress(host.name, "specifications")
                    diagnosis = replace(diagnosis, as_spec=as_spec(ask, view, len(diagnosis.defects)))
                # The arrays of its passes are as many as a model's: nobody needs them any more.
                pair = replace(pair, localised=replace(localised, traces={}), diagnosis=diagnosis)
            pairs.append(pair)
        return _Level(
            compared=compared,
            reference=reference.restricted(set(reference.arrays)),
            manifests=tuple(record.manifest for record in records),
            pairs=tuple(pairs),
        )


def _truth(own: Record, truth: Record | None, seen: set[Any]) -> Record | None:
    """The float64 record of exactly these float32 weights and inputs, if that is one."""
    if truth is None:
        return None
    a, b = own.manifest, truth.manifest
    return truth.restricted(seen) if (a.weights, a.inputs) == (b.weights, b.inputs) else None


def _rounds(host: Host) -> bool:
    """Whether it computes parts of a float64 network in float32."""
    return host.backend in ("keras:jax", "keras:torch")


def chosen_modes(
    hosts: Sequence[Host], wanted: tuple[Mode, ...] | None, steps: bool, notes: list[str]
) -> tuple[Mode, ...]:
    """Those that are asked for, or all that every model can; what is left out is added to `notes`.

    Raises `ModelError` for one that a model cannot.
    """
    needs = {"train": "training", "grad": "gradients"}
    found: list[Mode] = []
    for mode in _MODES if wanted is None else wanted:
        lacking = [host.name for host in hosts if needs.get(mode) in host.lacks]
        if lacking and wanted:
            raise ModelError(f"mode {mode} is asked for, and {lacking[0]} has none: leave it out")
        if lacking:
            notes.append(f"mode {mode} is left out: {', '.join(lacking)} has none")
        else:
            found.append(mode)
    if steps:
        found.append("steps")
    if not passes(tuple(found)) and not steps:
        raise InputError("no mode is left to compare in; give modes=('eval',)")
    return tuple(found)


def _unmatched(pair: Pair) -> list[str]:
    ours, theirs = pair.matching.unmatched
    return [
        f"{len(names)} layers of {whose} have no counterpart: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        for whose, names in ((pair.reference, ours), (pair.other, theirs))
        if names
    ]


def _distinct(hosts: Sequence[Host]) -> None:
    """A name of its own for each."""
    names = [host.name for host in hosts]
    for number, host in enumerate(hosts):
        if names.count(host.name) > 1:
            host.name = f"{names[number]} {names[: number + 1].count(names[number])}"


def _each(given: Any, count: int) -> list[Any]:
    """One for each, where one is given for all."""
    return list(given) if isinstance(given, list | tuple) else [given] * count
