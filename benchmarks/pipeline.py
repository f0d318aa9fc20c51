"""Images per second of the input pipeline alone, against what a training step of resnet20 takes of them.

    python benchmarks/pipeline.py [BATCHES]

The pipeline: CIFAR-10's binary files, full of noise, mapped; padded, cropped, flipped and normalised as in `cifar2015`;
in this process and in workers. Then photographs as in `imagenet2015`: decoded, a random part resized to 224, flipped,
coloured. The steps: each backend in a process of its own, on batches that are ready, its first ones left out.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np

from common import architectures, datasets, images
from common import weights as canonical
from common.backends.columns import cores, start_here
from common.datasets import Dataset
from common.training import pipeline
from common.training.recipe import PRESETS, TrainingRecipe
from common.training.trainer import SINGLE, Minibatch

BACKENDS = ("torch", "keras", "flax")
WARM = 5  # batches or steps before the clock starts


def cifar(folder: Path) -> Dataset:
    """A folder of CIFAR-10's size and form."""
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        records = generator.integers(0, 256, (10_000, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / f"{name}.bin")
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    return datasets.open(str(folder))


def photographs(folder: Path, count: int = 64) -> Dataset:
    """A folder of links to the sample photographs, in two classes."""
    for n in range(count):
        for photo in images.sample_photos():
            (folder / photo.stem).mkdir(exist_ok=True)
            (folder / photo.stem / f"{n}.jpg").symlink_to(photo)
    return datasets.open(str(folder))


def pipeline_speed(dataset: Dataset, recipe: TrainingRecipe, count: int, workers: int) -> tuple[float, float]:
    """Images per second, and images per second that this process was busy."""
    made = pipeline.training_batches(dataset, recipe, start=0, stop=WARM + count, workers=workers)
    for _ in range(WARM):
        next(made)
    clock, busy = time.perf_counter(), time.process_time()
    for _ in made:
        pass
    total = count * recipe.batch_size
    return total / (time.perf_counter() - clock), total / (time.process_time() - busy)


def step_speed(name: str, count: int) -> float:
    """Images per second of resnet20's training steps."""
    recipe = PRESETS["cifar2015"]
    spec = architectures.find("resnet20")
    trainer = start_here(name, cores()).trainer(spec, recipe, "float32", SINGLE)
    trainer.load(canonical.init(spec))
    generator = np.random.default_rng(0)
    batch = Minibatch(
        images=generator.standard_normal((recipe.batch_size, 32, 32, 3), np.float32),
        labels=generator.integers(0, 10, recipe.batch_size),
        learning_rate=0.01,
    )
    ends: list[float] = []

    def after(_: object) -> bool:
        ends.append(time.perf_counter())
        return True

    trainer.fit(repeat(batch, WARM + count), after)
    return count * recipe.batch_size / (ends[-1] - ends[WARM - 1])


def steps(count: int) -> Iterator[tuple[str, float]]:
    for name in BACKENDS:
        command = [sys.executable, __file__, "--step", name, str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield name, float(done.stdout.split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        print(step_speed(sys.argv[2], int(sys.argv[3])))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        small, large = cifar(Path(one)), photographs(Path(other))
        recipe = PRESETS["cifar2015"]
        best = 0.0
        print(f"the pipeline alone, {cores()} cores, batches of {recipe.batch_size}: images/s")
        for workers in range(cores() + 1):
            wall, busy = pipeline_speed(small, recipe, count, workers)
            best = max(best, wall)
            print(f"  32 x 32, {workers} workers: {wall:8,.0f}   (per second this process was busy: {busy:9,.0f})")
        recipe = PRESETS["imagenet2015"].replace(batch_size=32)
        for workers in range(cores() + 1):
            wall, _ = pipeline_speed(large, recipe, max(4, count // 20), workers)
            print(f"  224 x 224 of photographs, {workers} workers: {wall:8,.0f}")
    print("\ntraining steps of resnet20, 32 x 32: images/s, and how many times that the pipeline gives")
    for name, speed in steps(max(5, count // 10)):
        print(f"  {name:6} {speed:8,.0f}   {best / speed:6.1f}x")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    main()
