"""How far correct networks stand from the limit of level L1, and how far planted defects.

    python benchmarks/gate.py 1000 [FILE]

Runs so many random small networks in PyTorch, Keras and Flax in float64: eval, train and gradients. Prints, for every
pair of columns and every way of making ρ, quantiles of the ratio ‖a - b‖ / ρ over all arrays, the largest, and how many
networks it would call different; then the planted defects that are nearest to the limit. FILE (gate.jsonl) gets a line
for each network: what is in it is not run again, so that a run can be broken off and continued.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common import architectures, weights
from common.architectures.resnet import ResNetSpec
from common.backends.columns import ALIASES, cores
from common.backends.process import BackendProcess
from common.images import sample_photos
from common.parity.case import Case, Inputs, Task
from common.parity.levels import DRAWS, ORDERS, RESPONSE_FACTOR, UNIT, floor
from common.parity.names import KINDS, ArrayName
from common.parity.orders import orders
from common.parity.record import distance, norm
from common.parity.recording import RecordNetwork
from common.parity.session import Session
from common.parity.subjects import Keep, SpecPasses, arrays_of_passes

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.mutants.bench import Bench
from tests.mutants.catalogue import MUTANTS

COLUMNS = ("torch", "keras:tensorflow", "flax")
PAIRS = tuple(combinations(range(len(COLUMNS)), 2))
# Few shapes, many networks: what JAX compiles for one serves the next.
SHAPES = ((2, 50), (2, 33), (3, 41), (5, 33))  # images, pixels
RENEWED = 60  # networks after which processes are renewed
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
WAYS = {
    "the larger": lambda response, a, b: np.maximum(response, np.maximum(a, b)),
    "orders added": lambda response, a, b: np.maximum(response, a + b),
    "all added": lambda response, a, b: response + a + b,
}


def random_case(number: int) -> Case:
    """Case `number`: a network of one to three stages of 4 to 16 channels, always the same one."""
    draw = np.random.default_rng(number)
    stages = int(draw.integers(1, 4))
    bottleneck = bool(draw.random() < 0.3)
    images, pixels = SHAPES[draw.integers(len(SHAPES))]
    norm = bool(draw.random() < 0.85)
    head_pool, head = [("average", "logits"), ("average", "softmax"), ("max", "logits"), ("average", "none")][
        draw.choice(4, p=[0.6, 0.15, 0.15, 0.1])
    ]
    spec = ResNetSpec(
        block="bottleneck" if bottleneck else "basic",
        blocks=tuple(int(n) for n in draw.integers(1, 3, stages)),
        widths=tuple(sorted(int(n) for n in draw.choice([4, 8, 16], stages))),
        expansion=2 if bottleneck else 1,
        classes=7,
        stem_kernel=int(draw.choice([1, 3, 7])),
        stem_stride=int(draw.integers(1, 3)),
        stem_width=int(draw.choice([4, 8])),
        stem_pool=bool(draw.random() < 0.3),
        conv_bias=bool(draw.random() < 0.3),
        norm=norm,
        shortcut_norm=norm,
        bn_eps=float(draw.choice([1e-5, 1e-3])),
        running_variance=str(draw.choice(["unbiased", "biased"])),  # type: ignore[arg-type]
        head_pool=head_pool,  # type: ignore[arg-type]
        head=head,  # type: ignore[arg-type]
    )
    return Case(
        variant=f"random {number}",
        spec=spec,
        size=(pixels, pixels),
        batch=images,
        photos=tuple(sample_photos()),
        seed=number,
        dtypes=("float64",),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a column computed of a network, and the largest change of every array by ulps and by each order."""

    arrays: dict[ArrayName, np.ndarray]
    response: dict[ArrayName, float]
    orders: list[dict[ArrayName, float]]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """As `RecordNetwork`, with the response to every order by itself."""

    request: RecordNetwork

    def perform(self, backend: Any, clock: Any) -> Measured:
        batch = load_file(self.request.inputs)
        subject = SpecPasses(
            backend,
            architectures.from_dict(dict(self.request.subject)),
            weights.mapped(self.request.weights),
            batch["images"],
            batch["labels"],
            self.request.modes,
            0,
            clock,
        )
        arrays: dict[ArrayName, np.ndarray] = {}
        subject.run(arrays.__setitem__)
        names = {ArrayName.parse(array.name) for array in subject.arrays}
        arrays = {name: array for name, array in arrays.items() if name in names}

        def largest(changes: dict[ArrayName, float]) -> Keep:
            def keep(name: ArrayName, array: np.ndarray) -> None:
                if name in arrays:
                    changes[name] = max(changes.get(name, 0.0), distance(array, arrays[name]))

            return keep

        by_order: list[dict[ArrayName, float]] = [{} for _ in orders(len(batch["labels"]))]
        for order, changes in zip(orders(len(batch["labels"])), by_order, strict=True):
            subject.run(largest(changes), order=order)
        response: dict[ArrayName, float] = {}
        for draw in range(self.request.draws):
            subject.run(largest(response), draw=draw)
        return Measured(arrays=arrays, response=response, orders=by_order)


def measure(processes: dict[str, BackendProcess], number: int) -> dict[str, Any]:
    """What the table needs of every array of one network: distances by pair, the one-ulp response with its floor, and
    the response of every column to 1, 2 … orders."""
    case = random_case(number)
    terms = {ArrayName.parse(a.name): a.terms for a in arrays_of_passes(case.spec, case.modes, shape_of(case))}
    with TemporaryDirectory() as folder:
        task = Task(name="float64", dtype="float64", values="float64", modes=case.modes)
        inputs = Inputs(case, Path(folder), [task])
        found = {}
        for column, process in processes.items():
            wanted = replace(task, draws=DRAWS if column == COLUMNS[0] else 0)
            found[column] = process.ask(Measure(request=inputs.request(wanted, column, 1, Path(folder) / "unused")))
    reference = found[COLUMNS[0]]
    rows = {}
    for name, summed in terms.items():
        size = norm(reference.arrays[name])
        least = floor(summed * KINDS[name.kind].power) * UNIT["float64"] * size
        rows[str(name)] = {
            "norm": size,
            "response": max(reference.response[name], least),
            "distances": [distance(found[COLUMNS[a]].arrays[name], found[COLUMNS[b]].arrays[name]) for a, b in PAIRS],
            "orders": [
                np.maximum.accumulate([changes[name] for changes in found[column].orders]).tolist()
                for column in COLUMNS
            ],
        }
    return rows


def shape_of(case: Case) -> tuple[int, ...]:
    return (case.batch, *case.size, case.spec.in_channels)


def run(count: int, path: Path) -> list[dict[str, Any]]:
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    left = iter(sorted(set(range(count)) - {entry["number"] for entry in done}))
    started, before = time.perf_counter(), len(done)
    with path.open("a") as file, ThreadPoolExecutor(cores()) as pool:

        def work(lane: int) -> None:
            # What JAX compiled for a network stays in its process, 20 MB each: processes are renewed.
            while numbers := list(islice(left, RENEWED)):
                with ExitStack() as stack:
                    processes = {c: stack.enter_context(BackendProcess(c, threads=1)) for c in COLUMNS}
                    for number in numbers:
                        entry = {"number": number, "arrays": measure(processes, number)}
                        done.append(entry)
                        file.write(json.dumps(entry) + "\n")
                        file.flush()
                        if len(done) % 10 == 0:
                            each = (time.perf_counter() - started) / (len(done) - before)
                            print(f"{len(done)} of {count} networks, {each:.2f} s each", file=sys.stderr, flush=True)

        list(pool.map(work, range(cores())))
    return [entry for entry in done if entry["number"] < count]


def ratios(done: list[dict[str, Any]], number: int, way: Any) -> Iterator[tuple[int, int, str, float]]:
    """(network, pair, array, ratio) of every array, with `number` orders at most."""
    for entry in done:
        for name, row in entry["arrays"].items():
            of_orders = [changes[min(number, len(changes)) - 1] if number else 0.0 for changes in row["orders"]]
            for index, (a, b) in enumerate(PAIRS):
                rho = way(row["response"], of_orders[a], of_orders[b])
                if row["distances"][index]:
                    yield entry["number"], index, name, row["distances"][index] / rho if rho else np.inf


def show(done: list[dict[str, Any]]) -> None:
    heads = [f"{100 * q:g} %" for q in QUANTILES[:-1]]
    print(f"\n{len(done)} networks, {sum(len(e['arrays']) for e in done)} arrays; limit {RESPONSE_FACTOR:g}\n")
    print("| orders | ρ | pair | " + " | ".join(heads) + " | largest | at | networks above the limit |")
    print("|---" * (len(heads) + 6) + "|")
    for number in range(ORDERS + 1):
        for name, way in WAYS.items() if number else [("one-ulp response alone", WAYS["the larger"])]:
            found = list(ratios(done, number, way))
            for index, (a, b) in enumerate(PAIRS):
                own = [(ratio, network, array) for network, pair, array, ratio in found if pair == index]
                values = np.quantile([ratio for ratio, *_ in own], QUANTILES)
                _, network, array = max(own)
                above = len({network for ratio, network, _ in own if ratio > RESPONSE_FACTOR})
                shown = " | ".join(f"{value:.2f}" for value in values)
                print(f"| {number} | {name} | {COLUMNS[a]}, {COLUMNS[b]} | {shown} | {network}: {array} | {above} |")
    excess = [
        (changes[-1] / row["response"], COLUMNS[c], entry["number"], name)
        for entry in done
        for name, row in entry["arrays"].items()
        for c, changes in enumerate(row["orders"])
        if row["response"]
    ]
    print("\nlargest order responses, in one-ulp responses:")
    for ratio, column, network, name in sorted(excess, reverse=True)[:5]:
        print(f"  {ratio:.1f}  {column}, network {network}, {name}")


def show_mutants() -> None:
    """The planted defects of level L1, nearest to the limit first."""
    found = []
    with Session(["torch", "keras", "flax"]) as session, ExitStack() as stack:
        bench = Bench(session, stack)
        for mutant in MUTANTS:
            if mutant.level != "L1" or mutant.section == "weights":
                continue
            photos = tuple(sample_photos())
            case = Case(variant="mutant", spec=mutant.spec, size=mutant.size, photos=photos, dtypes=("float64",))
            (compared,) = (c for c in bench.check(case, mutant.backend, mutant.path) if c.level == "L1")
            backend = ALIASES.get(mutant.backend, mutant.backend)
            there = [
                d.ratio
                for d in compared.differences
                if d.tensor.label == mutant.at and d.tensor.section == mutant.section
            ]
            there += [found.ratio for found in compared.order_dependent if found.backend == backend]
            # An array of zeros is refused by itself, whatever its distance.
            there += [np.inf for problem in compared.problems if problem.place == mutant.at]
            found.append((max(there) / RESPONSE_FACTOR, mutant.name))
            print(f"{len(found)} mutants", file=sys.stderr, flush=True)
    print("\nplanted defects of level L1 nearest to the limit, in limits:")
    for ratio, name in sorted(found)[:8]:
        print(f"  {ratio:.3g}  {name}")


def main() -> None:
    with TemporaryDirectory() as compiled:
        # Operation by operation, each compiled once, by whichever process comes first.
        os.environ |= {
            "RESNET_PARITY_JIT": "0",
            "JAX_COMPILATION_CACHE_DIR": compiled,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        _main()


def _main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    show(run(count, Path(sys.argv[2] if len(sys.argv) > 2 else "gate.jsonl")))
    show_mutants()


if __name__ == "__main__":
    import gate  # what is asked of a process must be known there by the name of a module

    gate.main()
