"""The batches of a training: which examples, in which order, prepared by whom.

**Order.** Of every epoch the training images are shuffled anew by a permutation that the recipe's seed and the number
of the epoch name: they are sorted by random words of Philox (Salmon et al. 2011). Its first `steps_per_epoch` batches
are taken, and the rest, fewer than a batch, is left for other epochs. So an epoch holds no image twice, and each once
where the batch divides their number. Batch k is a function of (data, recipe, k): a training that goes on at step k
needs nothing else to know, on whatever processes it ran before.

**Replicas.** Each takes its equal part of every batch, the first the first. **Workers** prepare whole batches each, in
turn; the bytes do not depend on how many there are. Without any a thread does.

**Augmentation.** Example i of batch k has position k * batch_size + i, and the random numbers of that place.

**Validation.** The recipe's `validation` held-out images are the last of a fixed permutation of the training images,
whatever the seed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from common.datasets.base import Dataset, Examples, Subset, fixed_permutation
from common.errors import RecipeError
from common.images import Preprocessing, preprocess
from common.training import augmentation as augmentations
from common.training import streams
from common.training.augment import DRAWS, examples
from common.training.augmentation import Augmentation, CentreCrop, Normalise, Resize
from common.training.loaders import Team
from common.training.recipe import TrainingRecipe, shared
from common.training.trainer import SINGLE, Replica

Arrays = tuple[np.ndarray, np.ndarray]
Make = Callable[[int], Arrays]

_WORDS = 4  # of a block of Philox
_AHEAD = 2  # so many batches are ready, or in the making, while one is used


def steps_per_epoch(dataset: Dataset, recipe: TrainingRecipe) -> int:
    """Whole batches in the training images, without those held out. Raises `RecipeError` where there is none."""
    count = len(dataset.train) - recipe.validation
    if count < recipe.batch_size:
        held = f" after {recipe.validation} held out" if recipe.validation else ""
        raise RecipeError(
            f"batch_size={recipe.batch_size}; {dataset.name} has {max(0, count)} training images{held}; "
            f"set a smaller batch_size{' or validation' if recipe.validation else ''}"
        )
    return count // recipe.batch_size


def training_batches(
    dataset: Dataset,
    recipe: TrainingRecipe,
    *,
    start: int,
    stop: int,
    replica: Replica = SINGLE,
    workers: int = 0,
    dtype: str = "float32",
) -> Iterator[Arrays]:
    """This replica's part of the batches of steps `start` … `stop` - 1: images (N, H, W, C) in `dtype`, holding float32
    values, and labels (N,) in int64. None before `start` is computed.

    With `workers` that many processes prepare them, otherwise a thread. Raises `RecipeError` for a batch that is larger
    than the training set or cannot be shared evenly, `DataError` for an image that cannot be read, and `TrainingError`
    for a worker that ended.
    """
    share = shared(recipe.batch_size, replica.count, "processes")
    steps = steps_per_epoch(dataset, recipe)
    trained, _ = _parts(dataset, recipe)
    load = _load(dataset, recipe, trained, dtype, key=streams.key(recipe.seed, streams.AUGMENTATION))
    train = _Train(load, recipe.seed, recipe.batch_size, steps, replica.rank * share, share)
    return _prepared(train, range(start, stop), workers)


def evaluation_batches(
    dataset: Dataset,
    recipe: TrainingRecipe,
    *,
    replica: Replica = SINGLE,
    workers: int = 0,
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
) -> Iterator[Arrays]:
    """This replica's part of the test images in order, or of those held out where the recipe holds some out, in batches
    of the recipe's size. All replicas have equally many; the last is filled up with zeros of label -1.

    They are prepared as the recipe says, or by `preprocessing`. Raises as `training_batches`.
    """
    share = shared(recipe.batch_size, replica.count, "processes")
    _, tested = _parts(dataset, recipe)
    load: _Load | _Prepared = _load(dataset, recipe, tested, dtype, key=None)
    if preprocessing is not None:
        load = _Prepared(tested, preprocessing, dtype)
    count = -(-len(tested) // recipe.batch_size)
    return _prepared(_Test(load, recipe.batch_size, replica.rank * share, share), range(count), workers)


@dataclass(frozen=True)
class _Load:
    """Examples by number, augmented where there is a key to random numbers, else as images to test with."""

    examples: Examples
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str
    key: np.ndarray | None

    def __call__(self, indices: np.ndarray, position: int) -> Arrays:
        """The examples of these numbers, which stand at `position` and the places after it."""
        draws = None if self.key is None else draws_at(self.key, position, len(indices))
        images = self.examples.images(indices)
        values = examples(images, self.augmentation, self.mean, self.std, draws)
        return values.astype(self.dtype, copy=False), self.examples.labels[indices]


@dataclass(frozen=True)
class _Prepared:
    """Examples by number, prepared as photographs are for a network that says how it wants them."""

    examples: Examples
    preprocessing: Preprocessing
    dtype: str

    def __call__(self, indices: np.ndarray, position: int) -> Arrays:
        pictures = (Image.fromarray(image) for image in self.examples.images(indices))
        values = np.stack([preprocess(picture, self.preprocessing) for picture in pictures])
        return values.astype(self.dtype, copy=False), self.examples.labels[indices]


@dataclass(frozen=True)
class _Train:
    """Step k into this replica's part of its batch: `share` examples from `offset` on."""

    load: _Load
    seed: int
    batch_size: int
    steps: int  # of an epoch
    offset: int
    share: int

    def __call__(self, step: int) -> Arrays:
        epoch, within = divmod(step, self.steps)
        first = within * self.batch_size + self.offset
        indices = _order(self.seed, epoch, len(self.load.examples))[first : first + self.share]
        return self.load(indices, step * self.batch_size + self.offset)


@dataclass(frozen=True)
class _Test:
    """Batch k into this replica's part of it."""

    load: _Load | _Prepared
    batch_size: int
    offset: int
    share: int

    def __call__(self, number: int) -> Arrays:
        first = number * self.batch_size + self.offset
        indices = np.arange(first, min(first + self.share, len(self.load.examples)))
        # A part that is empty takes its shape from some example.
        images, labels = self.load(indices if len(indices) else np.zeros(1, np.int64), first)
        images, labels = images[: len(indices)], labels[: len(indices)]
        missing = self.share - len(indices)
        filled = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        return filled, np.concatenate([labels, np.full(missing, -1, np.int64)])


def preprocessing(dataset: Dataset, recipe: TrainingRecipe) -> Preprocessing | None:
    """How `evaluation_batches` prepares an image, in the words of photographs; None where these cannot say it."""
    steps = [one for one in augmentations.tested(recipe.augmentation) if not isinstance(one, Normalise)]
    size = augmentations.output(steps, dataset.size)
    if dataset.channels != 3 or size is None or size[0] != size[1]:
        return None
    match steps:
        case [Resize(size=side)] | [Resize(size=side), CentreCrop()]:
            before_crop = side
        case [] | [CentreCrop()] if dataset.size:
            before_crop = min(dataset.size)
        case _:
            return None
    mean, std = _normalisation(dataset, recipe)
    return Preprocessing(crop=size[0], resize=before_crop, mean=_three(mean), std=_three(std))


def _normalisation(dataset: Dataset, recipe: TrainingRecipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the deviation, as the recipe says or else as is usual for the data."""
    said = augmentations.normalisation(recipe.augmentation)
    return (said.mean, said.std) if said else (dataset.mean, dataset.std)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values * 3 if len(values) == 1 else values
    return red, green, blue


def draws_at(key: np.ndarray, position: int, count: int) -> np.ndarray:
    """The random numbers (count, `DRAWS`) of the examples at `position` and the places after it."""
    generator = np.random.Generator(np.random.Philox(key=key, counter=position * (DRAWS // _WORDS)))
    return generator.random((count, DRAWS))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers below `count` in the order of an epoch."""
    words = np.random.Philox(key=streams.key(seed, streams.ORDER, epoch)).random_raw(count)
    return np.argsort(words, kind="stable")


def _parts(dataset: Dataset, recipe: TrainingRecipe) -> tuple[Examples, Examples]:
    """The examples to train on and those to evaluate."""
    if not recipe.validation:
        return dataset.train, dataset.test
    order = fixed_permutation(len(dataset.train))
    if recipe.validation >= len(order):
        raise RecipeError(f"validation={recipe.validation}; {dataset.name} has {len(order)} training images in all")
    return Subset(dataset.train, order[: -recipe.validation]), Subset(dataset.train, order[-recipe.validation :])


def _load(dataset: Dataset, recipe: TrainingRecipe, chosen: Examples, dtype: str, key: np.ndarray | None) -> _Load:
    steps = recipe.augmentation if key is not None else augmentations.tested(recipe.augmentation)
    if augmentations.output(steps, dataset.size) is None:
        raise RecipeError(f"the images of {dataset.name} differ in size; set augmentation.size, as 224")
    mean, std = _normalisation(dataset, recipe)
    if len(mean) not in (1, dataset.channels):
        raise RecipeError(
            f"augmentation.normalise.mean={mean!r}; expected {dataset.channels} values for {dataset.name}, or one"
        )
    return _Load(chosen, recipe.augmentation, mean, std, dtype, key)


def _prepared(make: Make, numbers: range, workers: int) -> Iterator[Arrays]:
    """Batches by number, prepared ahead of the one that is asked for: in `workers` processes, or in a thread."""
    team = Team(make, numbers, min(workers, len(numbers))) if workers and numbers else None
    source: Make = make if team is None else team
    thread = ThreadPoolExecutor(1, "batches")
    ahead: deque[Future[Arrays]] = deque()
    try:
        for number in numbers:
            ahead.append(thread.submit(source, number))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
        if team is not None:
            team.close()  # which ends what the thread may be waiting for
        thread.shutdown()
