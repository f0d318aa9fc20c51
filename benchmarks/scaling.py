"""The measured costs behind docs/scaling.md: what one training step of a network moves, and what it takes here.

    python benchmarks/scaling.py [VARIANT]

Counts come from the specification, times from this machine: an epoch's worth of nothing is run, a few batches of real
photographs and a real checkpoint are.
"""

import statistics
import sys
import tempfile
import time
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from PIL import Image

from common import architectures, datasets, images
from common import weights as canonical
from common.architectures.layers import output_shapes
from common.backends.columns import cores, start_here
from common.training import pipeline
from common.training.recipe import PRESETS
from common.training.snapshots import Snapshots
from common.training.trainer import Minibatch

IMAGES = 1_281_167  # of ImageNet's training set
BATCH = 8


def photographs(folder: Path) -> None:
    """A data set of photographs as large as ImageNet's usually are, 500 x 375 pixels, JPEG."""
    for path in images.sample_photos():
        for part in ("train", "test"):
            target = folder / part / path.stem
            target.mkdir(parents=True)
            with Image.open(path) as photo:
                for n in range(64 if part == "train" else 1):
                    photo.convert("RGB").resize((500, 375)).save(target / f"{n}.jpg", quality=90)


def input_speed(folder: Path, workers: int) -> float:
    """Images per second that are read, decoded, cut, flipped, coloured and normalised for 224 x 224."""
    dataset = datasets.open(str(folder))
    recipe = PRESETS["imagenet2015"].replace(batch_size=32)
    batches = pipeline.training_batches(dataset, recipe, start=0, stop=12, workers=workers)
    next(batches)
    started = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - started)


def main() -> None:
    variant = sys.argv[1] if len(sys.argv) > 1 else "resnet50"
    spec = architectures.find(variant)
    parameters = sum(layer.parameter_count for layer in spec.layers)
    statistics_ = sum(prod(shape) for layer in spec.layers for shape in layer.statistics.values())
    shapes = output_shapes(spec.layers, (224, 224, spec.in_channels))
    shapes["input"] = (224, 224, spec.in_channels)
    adds = sum(layer.multiply_adds(*(shapes[name] for name in layer.inputs)) for layer in spec.layers)
    print(f"{variant} at 224: {parameters:,} parameters, {statistics_:,} statistics, {adds / 1e9:.2f} G multiply-adds")
    print(f"  a training step: about {6 * adds / 1e9:.1f} GFLOP an image (forward, and twice that backward)")
    print(f"  gradients to all-reduce: {4 * parameters / 1e6:.0f} MB in float32")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder / "photographs")
        for workers in (0, cores()):
            speed = input_speed(folder / "photographs", workers)
            print(f"  input, 500x375 JPEG to 224: {speed:,.0f} images/s with {workers} worker processes")

        backend = start_here("torch", cores())
        recipe = PRESETS["imagenet2015"].replace(batch_size=BATCH)
        trainer = backend.trainer(spec, recipe, "float32")
        trainer.load(canonical.init(spec))
        generator = np.random.default_rng(0)
        batch = Minibatch(
            images=generator.standard_normal((BATCH, 224, 224, spec.in_channels), np.float32),
            labels=np.arange(BATCH),
            learning_rate=0.1,
        )
        times = [time.perf_counter()]

        def after(measured: object) -> bool:
            times.append(time.perf_counter())
            return True

        trainer.fit([batch] * 6, after)
        step = statistics.median(b - a for a, b in pairwise(times[1:]))
        print(f"  a step of {BATCH} images here, PyTorch, {cores()} cores: {step:.2f} s, {BATCH / step:.1f} images/s")
        checkpoints = Snapshots(folder / "checkpoints", keep=1)
        checkpoints.folder.mkdir()
        started = time.perf_counter()
        with checkpoints.writing(1) as state:
            trainer.save(state)
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in checkpoints.folder.rglob("*") if path.is_file())
        print(f"  a checkpoint: {size / 1e6:.0f} MB, {seconds:.2f} s to write, check and flush")
        newest = checkpoints.newest(print)
        assert newest is not None
        started = time.perf_counter()
        trainer.restore(newest.state)
        print(f"  to restore it: {time.perf_counter() - started:.2f} s")

    print()
    print("an epoch of ImageNet, by accelerators and the images/s that each is assumed to train (not measured here):")
    print(f"{'':14}{'images/s':>10}{'epoch':>10}{'input':>12}{'batch':>8}{'steps/s':>9}{'all-reduce':>14}")
    for count in (8, 64, 512):
        for each in (1_000, 2_500):
            total = count * each
            batch_size = 64 * count
            steps = total / batch_size
            # A ring moves 2 (n - 1) / n of the bytes through every accelerator, each step.
            wire = 2 * (count - 1) / count * 4 * parameters * steps
            print(
                f"{count:6} x {each:5,}{total:10,}{IMAGES / total:8.0f} s{total * 110e3 / 1e9:8.2f} GB/s"
                f"{batch_size:8,}{steps:9.1f}{wire / 1e9:9.1f} GB/s"
            )


if __name__ == "__main__":
    main()
