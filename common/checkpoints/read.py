"""A reference in, a checkpoint out: fetched, known by its content, parsed once."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeVar

from common import architectures, names
from common.architectures import Spec
from common.architectures.marks import Mark, marked
from common.checkpoints import beside, canonical
from common.checkpoints.checkpoint import Checkpoint, Origin
from common.checkpoints.containers import Source, container_of
from common.checkpoints.inference import exactly, infer
from common.errors import CheckpointError, SpecError, WeightsError
from common.images import PRESETS
from common.names import CANONICAL
from common.sources.downloads import Fetched, fetch
from common.weights import LazyWeights, Weights, check_names, shapes, validate

Reference = str | PathLike[str]
Given = Reference | Checkpoint | Weights  # what a builder's `weights` may be
S = TypeVar("S", bound=Spec)


def read(
    reference: Reference,
    *,
    variant: str | None = None,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
    classes: int | None = None,
    in_channels: int | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """The checkpoint behind a reference: a path, a URL, or a name of published weights as `sources` knows them.

    What shapes cannot say comes from the format's convention, from another `convention` by name, or from `changes` by
    field. `classes` makes a new head of that size, `in_channels` adapts what reads the image; both are noted.
    `variant` is the network for which a name as "keras:imagenet" asks, `progress` shows a download. Raises
    `WeightsError`, in one line, for what is not there, damaged, unsafe, of no known format or not a whole network.
    """
    # A path stays one, whatever it looks like.
    given = reference if isinstance(reference, Path) else fspath(reference)
    fetched = fetch(given, variant=variant, progress=progress)
    container = container_of(fetched.path)
    try:
        source = container.read(fetched.path)
        origin = Origin(
            path=fetched.path,
            reference=str(reference),
            container=source.container,
            notes=(*fetched.notes, *source.notes),
        )
        if not canonical.recognises(source.metadata):
            found = _foreign(source, origin, fetched, convention, changes)
        elif convention is not None or changes:
            raise CheckpointError("a canonical file states its own spec; no convention or field can be set")
        else:
            found = _canonical(source, origin)
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(
            message if message.startswith(str(fetched.path)) else f"{fetched.path}: {message}"
        ) from None
    if in_channels is not None:
        found = found.with_channels(in_channels)
    return found if classes is None else found.with_classes(classes)


def read_for(spec: Spec, given: Reference | Checkpoint, *, free: Collection[str] = ()) -> Checkpoint:
    """The weights of a checkpoint for a network that is known: `spec`, fields in `free` aside.

    A canonical file states its spec and is held to it. A foreign one states none: what its shapes show must be
    `spec`'s, and the rest is taken from `spec`. With ``head`` among the free fields, a classifier and pools are left
    off where `spec` has no classifier. Fields that the marks of the spec call free are free, and what they call extra
    is left off where `spec` has none. Raises `WeightsError` naming the fields that differ.
    """
    found = given if isinstance(given, Checkpoint) else read(given)
    check_family(spec, found)
    here, there = spec, found.spec
    if "head" in free and spec.head == "none":
        here, there = here.with_head(head="none"), there.with_head(head="none")  # however they pool: that has no arrays
    unwanted = {name: False for name in marked(spec, Mark.EXTRA) if not getattr(spec, name)}
    there = there.replace(**unwanted)
    open_ = {*free, *marked(spec, Mark.FREE)}
    if found.origin.format != CANONICAL:
        # Shapes do show whether there is a classifier.
        open_ |= set(marked(spec, Mark.UNSEEN)) - (
            {"head"} if (spec.head == "none") != (there.head == "none") else set()
        )
    ours, theirs = architectures.to_dict(here), architectures.to_dict(there)
    differing = [name for name in ours if name not in open_ and _matters(there, name, here, ours, theirs)]
    if differing:
        told = ", ".join(f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in differing)
        raise WeightsError(f"{found.origin}: these are the weights of another network: {told}")
    check_names(
        f"{found.origin}: not the weights of this network", shapes(spec).keys() & found.weights.keys(), shapes(spec)
    )
    weights = LazyWeights({name: _getter(found.weights, name) for name in shapes(spec)})
    if found.origin.format == CANONICAL:
        try:
            validate(spec, weights)
        except WeightsError as error:
            raise WeightsError(f"{found.origin}: {error}") from None
    return replace(found, spec=spec, weights=weights)


def weights_for(spec: Spec, given: Given, *, free: Collection[str] = ()) -> Weights:
    """The weights for a network of `spec`, of whatever a builder's user gives: a reference, a checkpoint as `read_for`
    holds it to the spec, or the weights themselves."""
    return given if isinstance(given, Mapping) else read_for(spec, given, free=free).weights


def adopt(
    spec: S,
    given: Given | None,
    variant: str,
    progress: bool | None = None,
) -> tuple[S, Checkpoint | Weights | None]:
    """`spec`, a builder's own, with the conventions of the weights that are to be loaded into it; and these.

    So a builder that is given foreign weights computes what the library computes that they come from. A canonical file
    changes nothing: `read_for` holds it to its own spec. `variant` is the name of the builder's network. Raises
    `WeightsError`.
    """
    if given is None or isinstance(given, Mapping):
        return spec, given
    found = given if isinstance(given, Checkpoint) else read(given, variant=variant, progress=progress)
    check_family(spec, found)
    if found.origin.format == CANONICAL:
        return spec, found
    return spec.replace(**{name: getattr(found.spec, name) for name in marked(spec, Mark.ADOPTED)}), found


def check_family(spec: Spec, found: Checkpoint) -> None:
    """Raise `WeightsError` where the weights are those of another family."""
    if found.spec.family != spec.family:
        raise WeightsError(
            f"{found.origin}: these are the weights of a {found.spec.family}, and the network is a {spec.family}"
        )


def _foreign(
    source: Source, origin: Origin, fetched: Fetched, convention: str | None, changes: Mapping[str, Any] | None
) -> Checkpoint:
    known = fetched.known
    inferred = infer(source, convention or (known.convention if known else None), changes)
    naming = inferred.naming
    told = beside.told(naming, fetched.path)
    preset = known.preprocessing if known else naming.preprocessing
    return Checkpoint(
        spec=inferred.spec,
        weights=inferred.weights,
        preprocessing=None if preset is None else replace(PRESETS[preset], **(known.changes if known else {})),
        class_names=told.class_names if len(told.class_names) == inferred.spec.classes else (),
        origin=replace(
            origin,
            format=naming.name,
            assumed=inferred.assumed,
            ignored=inferred.ignored,
            notes=(*origin.notes, *told.notes),
        ),
    )


def _canonical(source: Source, origin: Origin) -> Checkpoint:
    found = canonical.stated(source.metadata, origin)
    naming = names.canonical(found.spec.family)
    shapes_there = {name: tensor.shape for name, tensor in source.tensors.items()}
    weights, _ = exactly(found.spec, naming, source.tensors, naming.found(shapes_there, found.spec))
    canonical.check(source.metadata, weights)
    return replace(found, weights=weights)


def _matters(there: Spec, name: str, spec: Spec, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two specs differ in a field, and the network with it: a field may be of a head that neither has."""
    if ours[name] == theirs[name]:
        return False
    try:
        return there.replace(**{name: getattr(spec, name)}).layers != there.layers
    except SpecError:
        return True


def _getter(weights: Weights, name: str) -> Any:
    return lambda: weights[name]
