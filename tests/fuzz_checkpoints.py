"""Loads mutated copies of one checkpoint and says, as JSON lines, what came of each: run in a process of its own.

    python tests/fuzz_checkpoints.py FILE FIRST COUNT

A library in C may end the process at a hostile file; the test that started it sees that, and after which mutation.
"""

import json
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from common import checkpoints
from common import weights as canonical
from common.errors import WeightsError

# Beyond what the libraries themselves take: a header that claims more must not be believed.
MEMORY = 6 * 2**30


def mutated(raw: bytes, generator: np.random.Generator) -> bytes:
    """A copy with a few bytes flipped, cut off, repeated, zeroed or put in."""
    data = bytearray(raw)
    # Half of all aim at the ends, where the headers of most formats are.
    ends = generator.random() < 0.5

    def place() -> int:
        if not ends:
            return int(generator.integers(0, len(data)))
        near = int(generator.integers(0, min(4096, len(data))))
        return near if generator.random() < 0.5 else len(data) - 1 - near

    for _ in range(int(generator.integers(1, 5))):
        at, length = place(), int(generator.integers(1, 64))
        kind = generator.integers(0, 8)
        if kind < 4:
            data[at] ^= 1 << int(generator.integers(0, 8))
        elif kind == 4:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 5:
            data[at:at] = generator.integers(0, 256, length, dtype=np.uint8).tobytes()
        elif kind == 6:
            data[at : at + length] = data[:length]
        elif generator.random() < 0.3:
            del data[at:]
        else:
            del data[at : at + length]
        if not data:
            return b""
    return bytes(data)


def outcome(path: Path, expected: str) -> str:
    try:
        found = checkpoints.read(path)
        digest = canonical.digest({name: found.weights[name] for name in found.weights})
    except WeightsError as error:
        message = str(error)
        return "refused" if "\n" not in message and len(message) < 2000 else f"a message of more than a line: {message}"
    except Exception as error:  # the very thing that must not happen
        return f"{type(error).__name__}: {error}"
    return "same" if digest == expected else "changed"


def main() -> None:
    source, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    expected = canonical.digest(checkpoints.read(source).weights)
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.name
        for seed in range(first, first + count):
            generator = np.random.default_rng(seed)
            if source.is_file():
                copy.write_bytes(mutated(source.read_bytes(), generator))
            else:
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(source, copy)
                victim = files[int(generator.integers(len(files)))]
                (copy / victim.relative_to(source)).write_bytes(mutated(victim.read_bytes(), generator))
            print(json.dumps({"seed": seed}), flush=True)
            print(json.dumps({"outcome": outcome(copy, expected)}), flush=True)
        # Of this program alone: what `getrusage` says includes the process that started it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(json.dumps({"peak_kib": int(status["VmHWM"].split()[0])}))


if __name__ == "__main__":
    main()
