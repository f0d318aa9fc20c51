"""What runs inside a backend's process, `python -m common.backends.worker COLUMN THREADS`: requests in, messages out.

Only `common.backends.process.BackendProcess` starts it. Its standard output carries messages alone;
whatever the framework prints goes to standard error, which the asking process keeps and shows only if this one crashes.
"""

import ctypes
import gc
import importlib
import os
import pickle
import queue
import resource
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from common.backends.columns import PROCESSES
from common.backends.messages import Clock, Done, Failed, Request, Step
from common.backends.protocol import Backend
from common.errors import ParityError
from common.files import reason


def _take_standard_output() -> BinaryIO:
    """Standard output for messages alone: whatever else writes to it, C++ included, goes to standard error."""
    messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return messages


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


def _read_requests(requests: "queue.Queue[Request[Any] | Exception]") -> None:
    while True:
        try:
            requests.put(pickle.load(sys.stdin.buffer))
        except EOFError:
            # The asking process is gone: nobody waits for what is being computed.
            os._exit(0)
        except Exception as error:  # of a request that is not known here
            requests.put(error)


def main() -> None:
    """Answer requests until the asking process is gone."""
    name, threads = sys.argv[1], int(sys.argv[2])
    out = _take_standard_output()

    def say(message: Step | Done | Failed) -> None:
        pickle.dump(message, out)
        out.flush()

    requests: queue.Queue[Request[Any] | Exception] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    backend: Backend | None = None
    while True:
        request = requests.get()
        clock = Clock(say)
        try:
            if isinstance(request, Exception):
                raise request
            if backend is None:
                with clock.step("import"):
                    backend = importlib.import_module(PROCESSES[name].backend).start(threads)
                gc.collect()
                gc.freeze()  # a framework is a million objects that live as long as the process
            answer = request.perform(backend, clock)
        except Exception as error:
            if not isinstance(error, ParityError):
                traceback.print_exc()
            say(Failed(kind=type(error).__name__, message=reason(error)))
        else:
            _give_memory_back()
            say(Done(answer=answer, seconds=clock.seconds, peak_bytes=_peak_bytes()))


if __name__ == "__main__":
    main()
