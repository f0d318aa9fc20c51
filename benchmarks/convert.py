"""Converting ResNet-152 between formats, against each format's plain library.

    python benchmarks/convert.py [REPEATS]

For every pair, ours (`checkpoints.read`, `checkpoints.write`) against reading the source and writing the target with
the plain libraries: torch, safetensors, h5py, flax.serialization, orbax. Each measurement is in a process of its own
that has done the same with a small network before, since much is imported at its first use; the rounds are interleaved,
the figures medians. Memory is the growth of the process's own resident set while it converts, in copies of the weights,
of a conversion that is not timed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from typing import Any

from memory import Peak, resident

VARIANT = "resnet152"
SMALL = "resnet18"
# Format -> the name of its file, and what `--to` calls it.
FORMATS = {
    "canonical": ("w.safetensors", "canonical"),
    "pth": ("w.pth", "torchvision"),
    "huggingface": ("h.safetensors", "huggingface"),
    "weights.h5": ("w.weights.h5", "keras_applications"),
    "h5": ("w.h5", "keras_classic"),
    "msgpack": ("w.msgpack", "flax"),
    "orbax": ("orbax", "flax"),
}


def plain(format_: str) -> tuple[Callable[[Path], Any], Callable[[Any, Path], None]]:
    """(read everything, write it again) with the library of a format alone."""
    if format_ in ("canonical", "huggingface"):
        from safetensors.numpy import load_file, save_file

        return load_file, lambda content, path: save_file(content, path)
    if format_ == "pth":
        import torch

        return lambda path: torch.load(path, weights_only=True), torch.save
    if format_ in ("weights.h5", "h5"):
        return read_h5, write_h5
    if format_ == "msgpack":
        from flax import serialization

        return (
            lambda path: serialization.msgpack_restore(path.read_bytes()),
            lambda content, path: path.write_bytes(serialization.msgpack_serialize(content)),
        )
    import orbax.checkpoint as ocp

    checkpointer = ocp.StandardCheckpointer()

    def save(content: Any, path: Path) -> None:
        checkpointer.save(path.absolute(), content)
        checkpointer.wait_until_finished()

    return lambda path: checkpointer.restore(path.absolute()), save


def read_h5(path: Path) -> dict[str, Any]:
    import h5py

    arrays: dict[str, Any] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return arrays


def write_h5(arrays: Mapping[str, Any], path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def child(what: str, source: str, target: str, folder: Path) -> str:
    """One measurement: seconds, and for ours the peak in copies of the weights."""
    given = folder / FORMATS[source][0]
    if what == "orbax process":
        return orbax_process(folder)
    if what in ("ours", "memory"):
        from common import checkpoints

        file, to = FORMATS[target]
        checkpoints.write(folder / "made" / f"small-{file}", checkpoints.read(folder / SMALL / given.name), to)
        before = resident()
        # What samples the memory takes its share of the interpreter, a thousand times a second.
        with Peak() if what == "memory" else nullcontext() as peak:
            started = time.perf_counter()
            found = checkpoints.read(given)
            checkpoints.write(folder / "made" / file, found, to)
            seconds = time.perf_counter() - started
        size = sum(found.weights[name].nbytes for name in found.weights)
        return f"{seconds} {(peak.bytes - before) / size if peak else 0}"
    read, write = plain(source)
    write(read(folder / SMALL / given.name), folder / "made" / f"small-{given.name}")
    started = time.perf_counter()
    content = read(given)
    if what == "write":
        started = time.perf_counter()
        write(content, folder / "made" / FORMATS[source][0])
    return f"{time.perf_counter() - started} 0"


def orbax_process(folder: Path) -> str:
    """The same of the process of its own that writes an orbax folder, from when its imports are done."""
    import numpy as np

    from common import architectures
    from common import weights as canonical
    from resnet_flax.backend import start

    backend = start(os.cpu_count() or 1)
    small = architectures.find(SMALL)
    backend.save(small, canonical.init(small), folder / "made" / "small")  # what orbax imports at its first use
    weights = canonical.mapped(folder / FORMATS["canonical"][0])
    before = resident()
    with Peak() as peak:
        started = time.perf_counter()
        backend.save(architectures.find(VARIANT), weights, folder / "made" / "orbax")
        seconds = time.perf_counter() - started
    size = sum(np.prod(shape) for shape in canonical.shapes(architectures.find(VARIANT)).values()) * 4
    return f"{seconds} {(peak.bytes - before) / size}"


def measure(what: str, source: str, target: str, folder: Path) -> tuple[float, float]:
    """A measurement in a process of its own."""
    made = folder / "made"
    subprocess.run(["rm", "-rf", str(made)], check=True)
    made.mkdir()
    command = [sys.executable, __file__, what, source, target, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        raise SystemExit(f"{what} {source} {target}: {done.stderr[-800:]}")
    seconds, copies = done.stdout.split()[-2:]
    return float(seconds), float(copies)


def main() -> None:
    if len(sys.argv) == 5:
        print(child(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])))
        return
    from common import architectures, checkpoints
    from common import weights as canonical

    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    pairs = list(permutations(FORMATS, 2))
    plain_seconds: dict[tuple[str, str], list[float]] = {}
    ours: dict[tuple[str, str], list[float]] = {}
    copies: dict[tuple[str, str], float] = {}
    writing: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant, beside in ((VARIANT, folder), (SMALL, folder / SMALL)):
            spec = architectures.find(variant)
            given = checkpoints.Checkpoint(spec=spec, weights=canonical.randomize(spec, dtype="float32"))
            beside.mkdir(exist_ok=True)
            for file, to in FORMATS.values():
                checkpoints.write(beside / file, given, to)
        del given
        for _ in range(repeats):
            for format_ in FORMATS:
                for what in ("read", "write"):
                    plain_seconds.setdefault((what, format_), []).append(measure(what, format_, format_, folder)[0])
            for pair in pairs:
                ours.setdefault(pair, []).append(measure("ours", *pair, folder)[0])
            writing.append(measure("orbax process", "canonical", "orbax", folder))
        for pair in pairs:
            copies[pair] = measure("memory", *pair, folder)[1]
    print(f"{VARIANT}, float32, median of {repeats}; at most 2 times and 2.2 copies are the aim")
    print(f"{'':30} {'ours':>8} {'plain':>10} {'ratio':>8} {'copies':>8}")
    for source, target in pairs:
        seconds, memory = statistics.median(ours[source, target]), copies[source, target]
        library = statistics.median(plain_seconds["read", source]) + statistics.median(plain_seconds["write", target])
        print(f"{source:>14} -> {target:<12} {seconds:7.3f} s {library:8.3f} s {seconds / library:8.2f} {memory:8.2f}")
    seconds, memory = statistics.median(s for s, _ in writing), max(c for _, c in writing)
    print(f"the process that writes an orbax folder, for its part, imports done: {seconds:.3f} s, {memory:.2f} copies")


if __name__ == "__main__":
    main()
