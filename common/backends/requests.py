"""What any backend can be asked beside a record: to write a checkpoint of its own format, and to say what it sees."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import weights as canonical
from common.architectures import Spec
from common.backends.messages import Clock
from common.backends.protocol import Backend


@dataclass(frozen=True, kw_only=True)
class SaveCheckpoint:
    """Write the canonical weights in the file `weights` to `output`, in the framework's own format."""

    spec: Spec
    weights: Path
    output: Path

    def perform(self, backend: Backend, clock: Clock) -> None:
        with clock.step("save"):
            backend.save(self.spec, canonical.mapped(self.weights), self.output)


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The output of `layer` in one float32 pass in eval mode over `images` (N, H, W, C)."""

    spec: Spec
    weights: Path  # a safetensors file of canonical weights
    images: np.ndarray
    layer: str

    def perform(self, backend: Backend, clock: Clock) -> np.ndarray:
        with clock.step("build"):
            model = backend.build(self.spec, "float32")
        with clock.step("load"):
            backend.load(model, canonical.mapped(self.weights))
        with clock.step("eval"):
            labels = np.zeros(len(self.images), np.int64)
            arrays = backend.run(model, self.images, labels, training=False, gradients=False)
        return np.ascontiguousarray(arrays[f"tap/{self.layer}"])
