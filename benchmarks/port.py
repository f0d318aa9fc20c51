"""Porting ResNet-152 between two frameworks, against copying the same bytes through a safetensors file.

    python benchmarks/port.py [REPEATS]

Each direction runs in a process of its own, which holds the two frameworks it needs. Port and copy take turns; the
figures are medians of the ratios. Memory is the growth of the process's resident set above source model alone, in
copies of the weights: the target model is one copy, and two copies in all are allowed, source and target.
"""

import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

from memory import Peak, resident

VARIANT = "resnet152"
BACKENDS = ("torch", "keras", "flax")


def exporter(backend: str, spec: Any, weights: Any) -> Callable[[], Any]:
    """A function that exports canonical weights from a native model holding `weights`."""
    if backend == "torch":
        import resnet_torch

        model = resnet_torch.from_spec(spec)
        resnet_torch.load_weights(model, weights)
        return lambda: resnet_torch.export_weights(model)
    if backend == "keras":
        import resnet_keras

        model = resnet_keras.from_spec(spec)
        resnet_keras.load_weights(model, weights)
        return lambda: resnet_keras.export_weights(model)
    import resnet_flax

    variables = resnet_flax.to_variables(spec, weights)
    return lambda: resnet_flax.from_variables(spec, variables)


def importer(backend: str, spec: Any) -> Callable[[Any], Any]:
    """A function that loads canonical weights into a native model."""
    if backend == "torch":
        import resnet_torch

        model = resnet_torch.from_spec(spec)
        return lambda weights: resnet_torch.load_weights(model, weights)
    if backend == "keras":
        import resnet_keras

        model = resnet_keras.from_spec(spec)
        return lambda weights: resnet_keras.load_weights(model, weights)
    import jax

    import resnet_flax

    return lambda weights: jax.block_until_ready(resnet_flax.to_variables(spec, weights))


def measure(source: str, target: str, repeats: int) -> str:
    from safetensors.numpy import load_file, save_file

    from common import architectures
    from common import weights as canonical

    spec = architectures.find(VARIANT)
    given = canonical.randomize(spec, dtype="float32")
    size = sum(array.nbytes for array in given.values())
    export, load = exporter(source, spec, given), importer(target, spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.safetensors"
        ports, copies = [], []
        load(export())
        for _ in range(repeats):
            started = time.perf_counter()
            save_file(given, path)
            load_file(path)
            copies.append(time.perf_counter() - started)
            started = time.perf_counter()
            kept = load(export())
            ports.append(time.perf_counter() - started)
            del kept
    # Torch and Keras models exist before and after; Flax makes its variables. Either way the target is one copy.
    allocates = target == "flax"
    del given
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the repeats have freed must not pass for new memory that costs nothing
    before = resident()
    with Peak() as peak:
        target_model = load(export())
    del target_model
    extra = (peak.bytes - before) / size + (1 if allocates else 2)
    ratio = statistics.median(port / copy for port, copy in zip(ports, copies, strict=True))
    return (
        f"{source:>6} -> {target:<6} {statistics.median(ports):6.3f} s {statistics.median(copies):10.3f} s "
        f"{ratio:8.2f} {extra:10.2f}"
    )


def main() -> None:
    if len(sys.argv) == 4:
        print(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))
        return
    repeats = sys.argv[1] if len(sys.argv) > 1 else "9"
    print(f"{VARIANT}, float32, median of {repeats}; at most 2 of each is the aim")
    print(f"{'':16} {'port':>8} {'file copy':>12} {'ratio':>8} {'copies':>10}")
    for source, target in permutations(BACKENDS, 2):
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
        command = [sys.executable, __file__, source, target, repeats]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
        print(done.stdout.rstrip() if done.returncode == 0 else f"{source} -> {target} failed: {done.stderr[-400:]}")


if __name__ == "__main__":
    main()
