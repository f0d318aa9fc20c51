"""A training step of ResNet-50 by `FlaxTrainer`, against the jitted step of the Flax imagenet example.

    python benchmarks/train_flax.py [REPEATS [THREADS]]

The example's code is in no package; its model is tests/peers/flax_twin.py, and `example_step` its train step, written
anew with the example's defaults: SGD with Nesterov momentum, decay as a penalty in the loss, fast variance, SAME
padding, JAX's 32-bit mode. Its state is donated, which the example itself leaves out. Both take batch 8 at 224x224 in
float32, in turns; what `FlaxTrainer` copies to the device and reads back in every step counts. Figures are medians.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from common import architectures
from common import weights as canonical
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch
from resnet_flax import backend as probe

SIZE, BATCH = 224, 8


def example(images: np.ndarray, labels: np.ndarray) -> Any:
    """A function that takes one step of the example."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training import train_state

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "peers"))
    from flax_twin import ResNet

    class TrainState(train_state.TrainState):
        batch_stats: Any

    def example_step(state: TrainState, batch: dict[str, Any]) -> Any:
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
            targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
            return loss + 0.5 * 1e-4 * penalty, (updates, logits)

        (loss, (updates, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
        return state, {"loss": loss, "accuracy": accuracy}

    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 100)
    model, step = ResNet("resnet50"), jax.jit(example_step, donate_argnums=0)
    with jax.enable_x64(False):
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
        state = TrainState.create(
            apply_fn=model.apply, tx=optax.sgd(schedule, momentum=0.9, nesterov=True), **variables
        )
    batch = {"image": images, "label": labels.astype(np.int32)}

    def take() -> None:
        nonlocal state
        with jax.enable_x64(False):
            state, measured = step(state, batch)
            jax.block_until_ready((state, measured))

    return take


def own(backend: Any, images: np.ndarray, labels: np.ndarray) -> Any:
    """A function that takes one step of `FlaxTrainer`."""
    spec = architectures.find("resnet50")
    recipe = TrainingRecipe(nesterov=True, weight_decay=1e-4, decay_norms_and_biases=False)
    trainer = backend.trainer(spec, recipe, "float32")
    trainer.load(canonical.init(spec))
    batch = Minibatch(images=images, labels=labels, learning_rate=0.01)
    return lambda: trainer.fit([batch], lambda measured: True)


def main() -> None:
    repeats, threads = (int(text) for text in (sys.argv[1:] + ["10", "2"][len(sys.argv) - 1 :]))
    backend = probe.start(threads)
    generator = np.random.default_rng(0)
    images = generator.standard_normal((BATCH, SIZE, SIZE, 3), np.float32)
    labels = generator.integers(0, 1000, BATCH)
    steps = {"example": example(images, labels), "own": own(backend, images, labels)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 2:  # the first compiles
                seconds[name].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(seconds["example"], seconds["own"], strict=True)]
    for name, found in seconds.items():
        print(f"{name:8} {statistics.median(found):6.2f} s a step  ({min(found):.2f} … {max(found):.2f})")
    print(
        f"ratio    {statistics.median(ratios):6.2f}    ({min(ratios):.2f} … {max(ratios):.2f}), at least 1.2 asked for"
    )


if __name__ == "__main__":
    main()
