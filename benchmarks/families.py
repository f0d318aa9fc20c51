"""A step, a forward pass, building and exporting of each family, against torchvision and keras.applications.

    .venv-peers/bin/python benchmarks/families.py torch|keras [ROUNDS [THREADS [VARIANT …]]]

Batch 8, size 224, float32, SGD with momentum. Steps are our trainer's, eight in a row, against a plain loop of PyTorch
in its default layout or `train_on_batch` without XLA, its faster setting on a CPU; a forward pass is in eval mode,
model against model. A network is built with random weights, and exported by `torch.export` or to a SavedModel; these
two take three rounds. Both take turns, and so does who begins; seconds are medians over the rounds, the ratio is the
median of the rounds' ratios, ours to theirs. The environment is that of `make test-peers`. Flax has no community's
network of these families to compare with.
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from common import architectures
from common import weights as canonical
from common.training import dropout
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch

BATCH, SIZE, STEPS = 8, 224, 8
RECIPE = TrainingRecipe(learning_rate=0.01, batch_size=BATCH)
VARIANTS = ("densenet121", "efficientnet_b0", "vgg16")
SLOW = ("build", "export")
Pairs = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def our_step(backend: Any, spec: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    trainer = backend.trainer(spec, RECIPE, "float32")
    trainer.load(canonical.init(spec))
    masks = dropout.masks(spec, (SIZE, SIZE), 0, np.arange(BATCH))
    batch = Minibatch(images=images, labels=labels, learning_rate=RECIPE.learning_rate, masks=masks)
    return lambda: trainer.fit([batch] * STEPS, lambda measured: True)


def of_torch(variant: str, images: np.ndarray, labels: np.ndarray, threads: int) -> Pairs:
    import torch
    import torchvision
    from torch.nn import functional as F

    import resnet_torch
    from resnet_torch import backend as probe

    backend = probe.start(threads)
    # What a check needs, a user's program does not have: both are measured as they are used.
    torch.use_deterministic_algorithms(False)
    spec = architectures.find(variant)
    model = getattr(torchvision.models, variant)()
    optimizer = torch.optim.SGD(model.parameters(), RECIPE.learning_rate, RECIPE.momentum)
    inputs = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    targets = torch.tensor(labels)

    def steps() -> None:
        model.train()
        for _ in range(STEPS):
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    def forward(network: Any) -> Callable[[], Any]:
        def run() -> None:
            network.eval()
            with torch.inference_mode():
                network(inputs)

        return run

    def export(network: Any) -> Callable[[], Any]:
        return lambda: torch.export.export(network.eval(), (inputs,))

    ours, theirs = resnet_torch.from_spec(spec), getattr(torchvision.models, variant)()
    return {
        "step": (our_step(backend, spec, images, labels), steps),
        "forward": (forward(ours), forward(theirs)),
        "build": (getattr(resnet_torch, variant), getattr(torchvision.models, variant)),
        "export": (export(ours), export(theirs)),
    }


def of_keras(variant: str, images: np.ndarray, labels: np.ndarray, threads: int) -> Pairs:
    from resnet_keras import backend as probe

    backend = probe.start(threads)
    import keras

    import resnet_keras

    spec = architectures.find(f"{variant}.keras_applications")
    name = architectures.title(variant)
    model = getattr(keras.applications, name)(weights=None)
    optimizer = keras.optimizers.SGD(RECIPE.learning_rate, RECIPE.momentum)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=False)

    def steps() -> None:
        for _ in range(STEPS):
            model.train_on_batch(images, labels)

    def forward(network: Any) -> Callable[[], Any]:
        network.compile(jit_compile=False)
        return lambda: network.predict_on_batch(images)

    def export(network: Any) -> Callable[[], Any]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                network.export(folder, verbose=False)

        return run

    ours, theirs = resnet_keras.from_spec(spec), getattr(keras.applications, name)(weights=None)
    return {
        "step": (our_step(backend, spec, images, labels), steps),
        "forward": (forward(ours), forward(theirs)),
        "build": (
            partial(getattr(resnet_keras, name), weights=None),
            partial(getattr(keras.applications, name), weights=None),
        ),
        "export": (export(ours), export(theirs)),
    }


def main() -> None:
    framework, *rest = sys.argv[1:]
    rounds, threads = (int(text) for text in [*rest[:2], *("5", "2")[len(rest[:2]) :]])
    generator = np.random.default_rng(0)
    images = generator.standard_normal((BATCH, SIZE, SIZE, 3)).astype(np.float32)
    labels = generator.integers(0, 1000, BATCH)
    print(f"{framework}, {rounds} rounds, {threads} threads{'':16} ours, s  theirs, s   ratio", flush=True)
    for variant in rest[2:] or VARIANTS:
        pairs = {"torch": of_torch, "keras": of_keras}[framework](variant, images, labels, threads)
        for what, pair in pairs.items():
            seconds: list[tuple[float, ...]] = []
            # The first round is slower: traced, and memory is asked for.
            for number in range(1 + (min(rounds, 3) if what in SLOW else rounds)):
                found = [0.0, 0.0]
                for who in (0, 1) if number % 2 else (1, 0):
                    gc.collect()  # a network of the round before is not freed in this one's time
                    started = time.perf_counter()
                    pair[who]()
                    found[who] = (time.perf_counter() - started) / (STEPS if what == "step" else 1)
                if number:
                    seconds.append(tuple(found))
            ours, theirs = (statistics.median(column) for column in zip(*seconds, strict=True))
            ratio = statistics.median(a / b for a, b in seconds)
            print(f"{variant:20} {what:20} {ours:12.3f} {theirs:10.3f} {ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
