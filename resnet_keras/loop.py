"""What stands between batches and `Model.fit`: how Keras is given them, and what it is asked after every step."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import keras

from common.training.trainer import Measured, Minibatch
from resnet_keras import distributed
from resnet_keras.objective import numbered


class Feed:
    """Batches as `Model.fit` takes them, held until their step ends.

    Keras takes batches ahead of the step it is at, TensorFlow in a thread of its own, and under `tf.distribute` begins
    twice. So one batch more is read before one is given away: the learning rate is known when a step begins, and
    whether there is another one when it ends. Behind the images are the masks of the paths in `dropout`; the labels
    come once for each of so many `outputs`. An error while reading ends the batches; those before it are trained.
    """

    def __init__(self, batches: Iterable[Minibatch], dropout: Sequence[str] = (), outputs: int = 1) -> None:
        self.error: Exception | None = None
        self._dropout = dropout
        self._outputs = outputs
        self._batches = iter(batches)
        self._held: deque[Minibatch] = deque()
        self._done = 0
        self._lock = threading.Lock()
        self._read()

    def __bool__(self) -> bool:
        """Whether there is a step to be taken."""
        return bool(self._held)

    @property
    def learning_rate(self) -> float:
        """Of the step that is to be taken."""
        return self._held[0].learning_rate

    def done(self) -> None:
        """The step is taken."""
        with self._lock:
            self._done += 1
            self._held.popleft()

    def close(self) -> None:
        """From here on nothing more is read: a thread of TensorFlow's may outlive `fit` by a moment."""
        with self._lock:
            self._batches = iter(())

    def examples(self) -> Any:
        """What `fit` and `evaluate` take."""
        if keras.backend.backend() != "tensorflow":
            return self._generate()
        import tensorflow as tf

        first = keras.tree.map_structure(
            lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), self._example(self._held[0])
        )
        # There is nothing to tune, and the thread that would sleeps on for up to half a minute when all is done.
        options = tf.data.Options()
        options.autotune.enabled = False
        return tf.data.Dataset.from_generator(self._generate, output_signature=first).prefetch(2).with_options(options)

    def _example(self, batch: Minibatch) -> tuple[Any, Any]:
        masks = [batch.masks[path] for path in self._dropout]
        labels = batch.labels if self._outputs == 1 else (batch.labels,) * self._outputs
        return (batch.images, *masks) if masks else batch.images, labels

    def _generate(self) -> Iterator[tuple[Any, Any]]:
        position = 0
        while (batch := self._at(position)) is not None:
            position += 1
            yield self._example(batch)

    def _at(self, position: int) -> Minibatch | None:
        with self._lock:
            index = position - self._done
            if index == len(self._held) - 1:
                self._read()
            return self._held[index] if index < len(self._held) else None

    def _read(self) -> None:
        try:
            self._held.extend(islice(self._batches, 1))
        except Exception as error:  # raised again where `fit` ends: TensorFlow would make it one of its own
            self.error = error
            self._batches = iter(())


class Steps(keras.callbacks.Callback):  # type: ignore[misc]
    """Gives every step the learning rate of its batch, and tells `after` what it measured."""

    def __init__(
        self, model: keras.Model, feed: Feed, after: Callable[[Measured], bool], weights: Sequence[float]
    ) -> None:
        """`weights` are those of the outputs' losses."""
        super().__init__()
        self.stopped = False
        self._weights = weights
        self._trained = model  # asking for `self.model` costs a copy of the state on JAX
        self._feed = feed
        self._after = after
        self._rate: float | None = None

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        rate = self._feed.learning_rate
        if rate != self._rate:
            self.model.optimizer.learning_rate = self._rate = rate

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._feed.done()
        self.stopped = not self._after(measured(logs, self._weights, distributed.replicas(self._trained)))
        # Keras warns where a generator ends before it was told to stop.
        self._trained.stop_training = self.stopped or not self._feed


class Evaluation(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends an evaluation with its last batch: Keras warns where a generator just ends."""

    def __init__(self, model: keras.Model, feed: Feed) -> None:
        super().__init__()
        self._evaluated = model
        self._feed = feed

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._feed.done()
        self._evaluated.stop_evaluating = not self._feed


def measured(found: dict[str, Any], weights: Sequence[float] = (1.0,), replicas: int = 1) -> Measured:
    """What the `Tally` of every output found, whose losses have these weights, of each of so many replicas on average;
    what is correct is the first one's."""
    correct, count = (float(found[name]) * replicas for name in ("correct", "count"))
    losses = (float(found[numbered("loss_sum", output)]) * replicas for output in range(len(weights)))
    loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return Measured(loss=loss / count if count else 0.0, correct=round(correct), count=round(count))
