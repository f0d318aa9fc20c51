"""A training step of ResNet-50 in Keras on TensorFlow: our trainer against keras.applications' `train_on_batch`.

    python benchmarks/train_keras.py [ROUNDS [THREADS]]

Batch 8, size 224, float32, SGD with momentum; `jit_compile` off for keras.applications, its faster setting on a CPU.
Both take turns, a few steps each, and what a call of `fit` costs besides its steps counts. Seconds are medians over the
rounds, of the clock and of the processor, which other work on the machine disturbs less; so are the rounds' ratios.
The network is once torchvision's ResNet-50, whose strides are on the 3x3 convolutions (5 % more multiply-adds), and
once keras.applications' own.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from common import architectures
from common import weights as canonical
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch
from resnet_keras import backend as probe

BATCH, SIZE, STEPS = 8, 224, 3
RECIPE = TrainingRecipe(learning_rate=0.01, batch_size=BATCH)


def ours(backend: Any, variant: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    spec = architectures.find(variant)
    trainer = backend.trainer(spec, RECIPE, "float32")
    trainer.load(canonical.init(spec))
    batches = [Minibatch(images=images, labels=labels, learning_rate=RECIPE.learning_rate)] * STEPS
    return lambda: trainer.fit(batches, lambda measured: True)


def applications(images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    import keras

    model = keras.applications.ResNet50(weights=None)
    optimizer = keras.optimizers.SGD(RECIPE.learning_rate, RECIPE.momentum)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)

    def take() -> None:
        for _ in range(STEPS):
            model.train_on_batch(images, labels)

    return take


def main() -> None:
    rounds, threads = (int(value) for value in [*sys.argv[1:], "10", "2"][:2])
    generator = np.random.default_rng(0)
    images = generator.standard_normal((BATCH, SIZE, SIZE, 3)).astype(np.float32)
    labels = generator.integers(0, 1000, BATCH)
    backend = probe.start(threads)
    variants = ("resnet50", "resnet50.keras_applications")
    takes = {variant: ours(backend, variant, images, labels) for variant in variants}
    takes["keras.applications"] = applications(images, labels)
    clocks = (time.perf_counter, time.process_time)
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in takes}
    for take in takes.values():  # traced, and warm
        take()
    for _ in range(rounds):
        for name, take in takes.items():
            started = [clock() for clock in clocks]
            take()
            seconds[name].append(tuple((clock() - s) / STEPS for clock, s in zip(clocks, started, strict=True)))
    print(f"{rounds} rounds of {STEPS} steps, {threads} threads{'':8} s     faster     s of CPU  faster")
    for name, times in seconds.items():
        line = f"{name:36}"
        for clock in range(len(clocks)):
            ratios = [b[clock] / a[clock] for a, b in zip(times, seconds["keras.applications"], strict=True)]
            line += f"{statistics.median(one[clock] for one in times):10.3f} {statistics.median(ratios):8.2f}x"
        print(line)


if __name__ == "__main__":
    main()
