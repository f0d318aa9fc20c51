"""The steps by which an image becomes an example, in the order in which they stand in a recipe.

``resize`` and ``centre_crop`` are of every image; ``crop``, ``resized_crop``, ``flip`` and ``jitter`` are random, and
of images to train on: `tested` says what an image to test with undergoes instead. ``normalise`` is the last; without
it images are normalised as the data set usually is. A step stands once in a list, so that its name is enough to find it
in a setting, and its random numbers (common/training/augment.py) are its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from common.errors import ParityError, RecipeError
from common.fields import Bound, Checked, Count, Natural, NotNegative, Positive

Size = tuple[int, int]  # height and width
Hue = Annotated[float, Bound("a number of 0 … 0.5", lambda x: 0 <= x <= 0.5)]
Means = Annotated[tuple[float, ...], Bound("a list of one or more numbers", bool)]
Deviations = Annotated[tuple[Positive, ...], Bound("a list of one or more numbers above 0", bool)]


@dataclass(frozen=True, kw_only=True)
class Step(Checked):
    """One step; its field `step` names its kind. Raises `RecipeError`."""

    error: ClassVar[type[ParityError]] = RecipeError
    title: ClassVar[str] = "a step of the augmentation, as {step = 'flip'}"

    step: str

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """The step that ``data["step"]`` names; only that kind, where a kind is asked."""
        if cls is not Step or not isinstance(data, Mapping):
            return super().from_data(data)
        if "step" not in data:
            raise RecipeError(
                f"field 'step' is missing in a step of the augmentation; expected one of {', '.join(KINDS)}"
            )
        return cast(Self, kind(data["step"]).from_data(data))

    def output(self, size: Size | None) -> Size | None:
        """The height and width of an image after this step; None, of images that differ, where they still do. Raises
        `RecipeError` for one that is too small."""
        return size


@dataclass(frozen=True, kw_only=True)
class Resize(Step):
    """The shorter side resized to `size`, the longer in proportion."""

    title: ClassVar[str] = "the step 'resize'"
    step: Literal["resize"] = "resize"
    size: Count

    def output(self, size: Size | None) -> Size | None:
        # torchvision rounds the longer side down.
        return size and (self.size * size[0] // min(size), self.size * size[1] // min(size))


@dataclass(frozen=True, kw_only=True)
class CentreCrop(Step):
    """The square of `size` in the middle; black around an image that is smaller."""

    title: ClassVar[str] = "the step 'centre_crop'"
    step: Literal["centre_crop"] = "centre_crop"
    size: Count

    def output(self, size: Size | None) -> Size | None:
        return self.size, self.size


@dataclass(frozen=True, kw_only=True)
class Crop(Step):
    """A random square of `size`, or as much as the image has been, of the image with black around it."""

    title: ClassVar[str] = "the step 'crop'"
    step: Literal["crop"] = "crop"
    size: Count | None = None
    pad: Natural = 0  # pixels of black on every side

    def output(self, size: Size | None) -> Size | None:
        if self.size is None:
            return size
        if size and min(size) + 2 * self.pad < self.size:
            raise RecipeError(
                f"a crop of {self.size}x{self.size} does not fit into images of {size[0]}x{size[1]} with pad="
                f"{self.pad}; resize them first, as --set augmentation.resize.size={self.size}"
            )
        return self.size, self.size


@dataclass(frozen=True, kw_only=True)
class ResizedCrop(Step):
    """A random part of 8 to 100 % of the area, resized to the square of `size`, or as large as the image has been
    (Szegedy et al. 2015)."""

    title: ClassVar[str] = "the step 'resized_crop'"
    step: Literal["resized_crop"] = "resized_crop"
    size: Count | None = None

    def output(self, size: Size | None) -> Size | None:
        return (self.size, self.size) if self.size else size


@dataclass(frozen=True, kw_only=True)
class Flip(Step):
    """Left and right, half of the time."""

    title: ClassVar[str] = "the step 'flip'"
    step: Literal["flip"] = "flip"


@dataclass(frozen=True, kw_only=True)
class Jitter(Step):
    """Colours changed by random factors, one after the other in a random order; what is 0 is left as it is.

    The first three are multiplied by 1 ± the field, nothing below 0; the hue turns by ± the field, of a full turn.
    """

    title: ClassVar[str] = "the step 'jitter'"
    step: Literal["jitter"] = "jitter"
    brightness: NotNegative = 0.0
    contrast: NotNegative = 0.0
    saturation: NotNegative = 0.0
    hue: Hue = 0.0


@dataclass(frozen=True, kw_only=True)
class Normalise(Step):
    """By channel, of values 0 … 1: less the mean, divided by the deviation. One value is for all channels."""

    title: ClassVar[str] = "the step 'normalise'"
    step: Literal["normalise"] = "normalise"
    mean: Means
    std: Deviations

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("std", len(self.std) == len(self.mean), f"as many values as mean={self.mean!r}")


Augmentation = tuple[Step, ...]

# In their usual order, which is the place of one that a setting adds.
KINDS: dict[str, type[Step]] = {
    "resize": Resize,
    "centre_crop": CentreCrop,
    "crop": Crop,
    "resized_crop": ResizedCrop,
    "flip": Flip,
    "jitter": Jitter,
    "normalise": Normalise,
}


def kind(name: Any) -> type[Step]:
    """The kind of step of this name. Raises `RecipeError`."""
    if isinstance(name, str) and name in KINDS:
        return KINDS[name]
    near = get_close_matches(str(name), KINDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(KINDS)}"
    raise RecipeError(f"unknown step {name!r} of the augmentation; {hint}")


def check(steps: Augmentation) -> None:
    """Raise `RecipeError` for a step that is there twice, and for one after the normalisation."""
    names = [step.step for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"the augmentation has the step {name!r} {names.count(name)} times; expected it once")
    if "normalise" in names[:-1]:
        raise RecipeError(f"the augmentation normalises before its step {names[-1]!r}; put 'normalise' last")


def normalisation(steps: Augmentation) -> Normalise | None:
    """How the steps normalise, where they say."""
    return next((step for step in steps if isinstance(step, Normalise)), None)


def tested(steps: Augmentation) -> Augmentation:
    """The steps of an image to test with, none of them random: where a square of it is trained on, its middle.

    What was trained on parts of images is tested on the middle of one, as 224 of 256.
    """
    made: list[Step] = []
    for step in steps:
        match step:
            case Crop(size=int(side)):
                made.append(CentreCrop(size=side))
            case ResizedCrop(size=int(side)):
                made += [Resize(size=round(side * 8 / 7)), CentreCrop(size=side)]
            case Resize() | CentreCrop() | Normalise():
                made.append(step)
    return tuple(made)


def output(steps: Iterable[Step], size: Size | None) -> Size | None:
    """The height and width that a network sees of images of `size`; None where they differ. Raises `RecipeError` for
    images that are too small for a crop."""
    for step in steps:
        size = step.output(size)
    return size


def sized(steps: Augmentation, side: int | None) -> Augmentation:
    """The steps with which the network sees a square of this side: the last step that cuts one cuts this, of images
    resized to no less, or to this if they were just so large; where none does, images are resized first, and their
    middle is taken.

    None: images stay as large as they come.
    """
    cut = max((n for n, step in enumerate(steps) if _cuts(step)), default=None)
    if side is not None and cut is not None:
        before = getattr(steps[cut], "size", None)
        made = list(steps)
        for n, step in enumerate(steps):
            if isinstance(step, Resize):
                made[n] = Resize(size=max(step.size, side) if n < cut and step.size != before else side)
            elif n == cut:
                made[n] = Step.from_data(asdict(step) | {"size": side})
        return tuple(made)
    free = tuple(
        replace(step, size=None) if isinstance(step, Crop | ResizedCrop) else step
        for step in steps
        if not isinstance(step, Resize | CentreCrop)
    )
    return free if side is None else (Resize(size=side), CentreCrop(size=side), *free)


def _cuts(step: Step) -> bool:
    """Whether it makes images of one size, or may."""
    return isinstance(step, CentreCrop | ResizedCrop) or (isinstance(step, Crop) and step.size is not None)


def changed(steps: Augmentation, settings: Mapping[str, Any]) -> Augmentation:
    """The steps with settings, by name: ``STEP.FIELD``, with the step at its usual place where it is missing; ``STEP``,
    true or false, of one that is there or is not; ``size``, of the square that the network sees. Raises `RecipeError`.
    """
    tables = {step.step: asdict(step) for step in steps}
    order = list(tables)
    for name, value in settings.items():
        if name == "size":
            continue
        step, _, field = name.partition(".")
        _check_name(step, field)
        if not field and (value is None or value is False):
            if tables.pop(step, None):
                order.remove(step)
            continue
        if not field and value is not True:
            raise RecipeError(f"augmentation.{name}={value!r}; expected true or false, or one of {_settings(step)}")
        if step not in tables:
            tables[step] = {"step": step}
            rank = list(KINDS).index
            order.insert(next((n for n, one in enumerate(order) if rank(one) > rank(step)), len(order)), step)
        if field:
            tables[step][field] = value
    made = tuple(Step.from_data(tables[step]) for step in order)
    if "size" not in settings:
        return made
    side = settings["size"]
    if side is not None and (type(side) is not int or side < 1):
        raise RecipeError(f"augmentation.size={side!r}; expected an integer of at least 1, or none")
    return sized(made, side)


def _check_name(step: str, field: str) -> None:
    """Raise `RecipeError` for the name of a setting that is none."""
    if step not in KINDS:
        near = get_close_matches(step, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of size, {', '.join(map(_settings, KINDS))}"
        raise RecipeError(f"unknown setting augmentation.{step}{field and '.'}{field}; {hint}")
    if field:
        KINDS[step].check_names({field: None})


def _settings(step: str) -> str:
    """The names of the settings of a step's fields; of one that has none, its own."""
    names: Sequence[str] = [field.name for field in fields(KINDS[step]) if field.name != "step"]
    return ", ".join(f"{step}.{name}" for name in names) or step
