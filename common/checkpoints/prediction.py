"""What a checkpoint says of photographs, in one backend or side by side in several."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from common import architectures
from common.backends.columns import cores, resolve
from common.backends.process import BackendProcess
from common.backends.requests import Predict
from common.checkpoints import Checkpoint
from common.errors import InputError
from common.images import PRESETS, Preprocessing, class_names, preprocess


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Class probabilities (images, classes) of each backend, and how far the raw outputs are apart."""

    backends: tuple[str, ...]
    probabilities: tuple[np.ndarray, ...]
    names: Sequence[str]
    largest_difference: float  # of the outputs before the softmax, absolute; 0 for one backend
    preprocessing: Preprocessing


def predict(
    found: Checkpoint,
    photos: Sequence[Path],
    backends: Sequence[str],
    progress: Callable[[str, str], None] = lambda backend, step: None,
) -> Prediction:
    """Run the network of a checkpoint in float32 on photographs, prepared as the checkpoint says. Raises `ParityError`.

    Where it says nothing, photographs are prepared as torchvision's, and a thousand classes are those of ImageNet.
    """
    columns = [resolve(name) for name in backends]
    spec = found.spec
    output = architectures.logits(spec)
    if output is None:
        raise InputError(f"{found.origin}: the network has no classifier, so it predicts no classes")
    preprocessing = found.preprocessing or PRESETS["torchvision"]
    images = np.stack([preprocess(photo, preprocessing) for photo in photos]).astype(np.float32)
    if images.shape[-1] != spec.in_channels:
        raise InputError(f"{found.origin}: the network takes {spec.in_channels} channels, and photographs have 3")
    outputs = []
    with tempfile.TemporaryDirectory(prefix="resnet-parity-") as folder:
        weights = Path(folder) / "weights"
        save_file({key: np.ascontiguousarray(found.weights[key], np.float32) for key in found.weights}, weights)
        for column in columns:
            with BackendProcess(column, threads=cores()) as worker:
                request = Predict(spec=spec, weights=weights, images=images, layer=output)
                outputs.append(worker.ask(request, partial(progress, column)).astype(np.float64))
    classes = outputs[0].shape[1]
    return Prediction(
        backends=tuple(columns),
        probabilities=tuple(_softmax(output) for output in outputs),
        names=found.class_names or class_names(classes) or [f"class {number}" for number in range(classes)],
        largest_difference=max((float(abs(a - b).max()) for a, b in combinations(outputs, 2)), default=0.0),
        preprocessing=preprocessing,
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares
