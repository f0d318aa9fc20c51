"""What runs inside a backend's process, `python -m common.backends.worker COLUMN THREADS`: JSON lines in and out.

Only `common.backends.process.BackendProcess` starts it. Its standard output carries replies alone;
whatever the framework prints goes to standard error, which the asking process keeps and shows only if this one crashes.
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
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import load_file, save_file

from common import architectures
from common import weights as canonical
from common.backends.clock import Clock
from common.backends.process import COLUMNS, Backend
from common.errors import ParityError
from common.files import reason
from common.parity.recording import make_record


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
