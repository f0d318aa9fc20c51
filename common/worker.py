"""What runs inside a backend's process: `python -m common.worker COLUMN THREADS`, requests and replies as JSON lines.

Only `common.backend.Worker` starts it. Its standard output carries replies alone; whatever the framework prints goes
to standard error, which the asking process keeps and shows only if this one crashes.
"""

import ctypes
import gc
import importlib
import json
import os
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import load_file, save_file

from common import architectures, record
from common import weights as canonical
from common.backend import COLUMNS, Backend
from common.errors import ParityError
from common.files import reason
from common.record import Manifest


class Clock:
    """Adds up the seconds spent on each thing, and tells the asking process what is being done."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def step(self, what: str, detail: str = "") -> Iterator[None]:
        self._say({"event": "step", "step": f"{what} {detail}".strip()})
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def make_record(backend: Backend, column: str, threads: int, request: Mapping[str, Any], clock: Clock) -> None:
    """Run a network and write its record.

    The request holds `manifest` (the fields of `record.Manifest` that do not depend on the backend), `weights` and
    `inputs` (paths), `output` (path), `draws` (of the one-ulp response; 0 for none), and `plant` (a defect that a test
    plants, ``module:function``, or none).
    """
    given = request["manifest"]
    spec = architectures.from_dict(given["spec"])
    modes = tuple(given["modes"])
    dtype = given["dtype"]
    with _planted(request.get("plant"), backend):
        # A tensor at a time: held whole, the weights of a large network are a gigabyte that nothing needs.
        weights = canonical.mapped(request["weights"])
        images, labels = (load_file(request["inputs"])[name] for name in ("images", "labels"))
        images = images.astype(dtype)
        with clock.step("build"):
            model = backend.build(spec, dtype)
        with clock.step("load"):
            backend.load(model, weights)
            exported = backend.export(model)
            not_restored = [
                name
                for name in canonical.shapes(spec)
                if name not in exported or not np.array_equal(exported[name], weights[name].astype(dtype))
            ]
            not_restored += [name for name in exported if name not in weights]
        arrays: dict[str, np.ndarray] = {}
        for run in record.passes(modes):
            with clock.step(run):
                arrays |= _run(backend, model, run, images, labels, gradients="grad" in modes)
        response: dict[str, float] = {}
        for draw in range(request["draws"]):
            with clock.step("response", f"{draw + 1} of {request['draws']}"):
                moved = canonical.perturb(weights, seed=draw)
                backend.load(model, moved)
                moved_images = canonical.perturb_array(images, draw, "input")
                for run in record.passes(modes):
                    changed = _run(backend, model, run, moved_images, labels, gradients="grad" in modes)
                    for name, array in changed.items():
                        change = record.distance(array, arrays[name])
                        response[name] = max(response.get(name, 0.0), change)
        described = backend.describe()
    wanted = set(record.expected_arrays(spec, modes, images.shape))
    device = described.pop("device")
    manifest = Manifest(
        **given,
        backend=column,
        versions=described,
        device=device,
        threads=threads,
        draws=request["draws"],
        response={name: change for name, change in response.items() if name in wanted},
        not_restored=tuple(not_restored),
    )
    with clock.step("write"):
        record.write(request["output"], {name: arrays[name] for name in arrays if name in wanted}, manifest)


def _run(
    backend: Backend, model: Any, run: str, images: np.ndarray, labels: np.ndarray, *, gradients: bool
) -> dict[str, np.ndarray]:
    gradients = gradients and run != "exact"
    arrays = backend.run(model, images, labels, training=run == "train", gradients=gradients)
    return {f"{run}/{name}": array for name, array in arrays.items()}


def _planted(plant: str | None, backend: Backend) -> AbstractContextManager[None]:
    """The context in which a planted defect is at work: `module:function`, called with the backend."""
    if plant is None:
        return nullcontext()
    module, function = plant.split(":")
    context: AbstractContextManager[None] = getattr(importlib.import_module(module), function)(backend)
    return context


def save_checkpoint(backend: Backend, column: str, threads: int, request: Mapping[str, Any], clock: Clock) -> None:
    """Write canonical weights in the framework's own format: `spec`, `weights` (a path), `output` (a path)."""
    with clock.step("save"):
        spec, weights = architectures.from_dict(request["spec"]), canonical.mapped(request["weights"])
        backend.save(spec, weights, Path(request["output"]))


def predict(backend: Backend, column: str, threads: int, request: Mapping[str, Any], clock: Clock) -> None:
    """One float32 pass in eval mode: `spec`, `weights` and `images` (paths), `layer` whose output goes to `output`."""
    spec = architectures.from_dict(request["spec"])
    with clock.step("build"):
        model = backend.build(spec, "float32")
    with clock.step("load"):
        backend.load(model, canonical.mapped(request["weights"]))
    with clock.step("eval"):
        images = load_file(request["images"])["images"]
        labels = np.zeros(len(images), np.int64)
        arrays = backend.run(model, images, labels, training=False, gradients=False)
    save_file({"outputs": np.ascontiguousarray(arrays[f"tap/{request['layer']}"])}, request["output"])


OPERATIONS: dict[str, Callable[[Backend, str, int, dict[str, Any], Clock], None]] = {
    "record": make_record,
    "save": save_checkpoint,
    "predict": predict,
}


def _take_standard_output() -> TextIO:
    """Standard output for replies alone: whatever else writes to it, C++ included, goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _give_memory_back() -> None:
    """Return what the allocator keeps: a process waits while others work, and a deep network leaves gigabytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _peak_bytes() -> int:
    """The largest resident set of this process so far."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    # On Linux `getrusage` counts the process that started this one too, from before it became this program.
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _read_requests(requests: "queue.Queue[dict[str, Any]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    # The asking process is gone: nobody waits for what is being computed.
    os._exit(0)


def main() -> None:
    """Answer requests until the asking process is gone."""
    name, threads = sys.argv[1], int(sys.argv[2])
    out = _take_standard_output()

    def say(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    backend: Backend | None = None
    while True:
        request = requests.get()
        clock = Clock(say)
        try:
            if backend is None:
                with clock.step("import"):
                    backend = importlib.import_module(COLUMNS[name].probe).start(threads)
            OPERATIONS[request.pop("operation")](backend, name, threads, request, clock)
        except Exception as error:
            if not isinstance(error, ParityError):
                traceback.print_exc()
            say({"event": "error", "kind": type(error).__name__, "message": reason(error)})
        else:
            _give_memory_back()
            say({"event": "done", "seconds": clock.seconds, "peak_bytes": _peak_bytes()})


if __name__ == "__main__":
    main()
