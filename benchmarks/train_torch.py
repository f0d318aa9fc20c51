"""A training step of ResNet-50 in PyTorch: our trainer against torchvision's model in its default layout.

    .venv-peers/bin/python benchmarks/train_torch.py [ROUNDS] [THREADS]

Batch 8, size 224, float32, SGD with momentum and weight decay. Both take turns, a step each; the figures are medians
over the rounds, the ratio is the median of the rounds' ratios. torchvision needs the environment of `make test-peers`.
"""

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.models import resnet50

from common import architectures
from common import weights as canonical
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch
from resnet_torch import backend as probe

BATCH, SIZE = 8, 224
RECIPE = TrainingRecipe(learning_rate=0.01, weight_decay=1e-4)


def ours(images: np.ndarray, labels: np.ndarray, threads: int) -> Callable[[], None]:
    spec = architectures.find("resnet50")
    trainer = probe.start(threads).trainer(spec, RECIPE, "float32")
    trainer.load(canonical.init(spec))
    batch = Minibatch(images=images, labels=labels, learning_rate=RECIPE.learning_rate)
    return lambda: trainer.fit([batch], lambda measured: True)


def torchvision(images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    model = resnet50()
    optimizer = torch.optim.SGD(model.parameters(), RECIPE.learning_rate, RECIPE.momentum, weight_decay=1e-4)
    inputs = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    targets = torch.tensor(labels)

    def step() -> None:
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def main() -> None:
    rounds, threads = (int(value) for value in [*sys.argv[1:3], *("20", "2")[len(sys.argv) - 1 :]])
    generator = np.random.default_rng(0)
    images = generator.standard_normal((BATCH, SIZE, SIZE, 3)).astype(np.float32)
    labels = generator.integers(0, 1000, BATCH)
    steps = {"ours": ours(images, labels, threads), "torchvision": torchvision(images, labels)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 2:  # the first are slower: memory is asked for, kernels are made
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        print(f"{name:12} {statistics.median(times):.3f} s  ({min(times):.3f} at best)")
    ratios = [a / b for a, b in zip(seconds["torchvision"], seconds["ours"], strict=True)]
    print(f"torchvision / ours: {statistics.median(ratios):.2f} over {rounds} rounds, {threads} threads")


if __name__ == "__main__":
    main()
