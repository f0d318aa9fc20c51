"""How far correct networks stand from the limit of level L1, and how far planted defects.

    python benchmarks/gate.py 1000 [FILE]

Runs so many random small networks in PyTorch, Keras and Flax in float64: eval, train and gradients. Prints, for every
pair of columns and every way of making ρ, quantiles of the ratio ‖a - b‖ / ρ over all arrays, the largest, and how many
networks it would call different; then the planted defects that are nearest to the limit. FILE (gate.jsonl) gets a line
for each network: what is in it is not run again, so that a run can be broken off and continued.
"""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from common.architectures.resnet import ResNetSpec
from common.backends.columns import ALIASES, cores
from common.backends.process import BackendProcess
from common.images import sample_photos
from common.parity.case import Case, Inputs, Task
from common.parity.gate import Gate
from common.parity.levels import DRAWS, ORDERS, RESPONSE_FACTOR
from common.parity.orders import orders
from common.parity.record import Record, distance, norm
from common.parity.recording import RecordNetwork
from common.parity.session import Session

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from mutants.bench import Bench  # noqa: E402
from mutants.catalogue import MUTANTS  # noqa: E402

COLUMNS = ("torch", "keras:tensorflow", "flax")
PAIRS = tuple(combinations(range(len(COLUMNS)), 2))
# Few shapes, many networks: what JAX compiles for one serves the next.
SHAPES = ((2, 50), (2, 33), (3, 41), (5, 33))  # images, pixels
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
class ByOrder:
    """A record, and the response to every order by itself, which a record does not keep."""

    made: RecordNetwork
    images: int

    def perform(self, backend: Any, clock: Any) -> None:
        for number in range(1, len(orders(self.images)) + 1):
            # The last one is the record itself, with the response.
            last = number == len(orders(self.images))
            output = self.made.output.with_suffix(f".{number}")
            replace(self.made, output=output, orders=number, draws=self.made.draws if last else 0).perform(
                backend, clock
            )


class Lane:
    """A process of each column, of one thread each."""

    def __init__(self) -> None:
        self.processes = {column: BackendProcess(column, threads=1) for column in COLUMNS}

    def measure(self, number: int) -> dict[str, Any]:
        """What the table needs of one network, of every array: distances by pair, the one-ulp response with its floor,
        and the response of every column to 1, 2 … orders."""
        case = random_case(number)
        with TemporaryDirectory() as folder:
            task = Task(name="float64", dtype="float64", values="float64", modes=case.modes, orders=ORDERS)
            inputs = Inputs(case, Path(folder), [task])
            records: dict[str, list[Record]] = {}
            for column, process in self.processes.items():
                output = Path(folder) / column.replace(":", "-")
                wanted = replace(task, draws=DRAWS if column == COLUMNS[0] else 0)
                process.ask(ByOrder(made=inputs.request(wanted, column, 1, output), images=case.batch))
                records[column] = [Record(output.with_suffix(f".{n + 1}")) for n in range(len(orders(case.batch)))]
            return rows(records)


def rows(records: dict[str, list[Record]]) -> dict[str, Any]:
    last = {column: made[-1] for column, made in records.items()}
    reference = last[COLUMNS[0]]
    norms = {name: norm(reference[name]) for name in reference.arrays}
    gate = Gate("L1", reference, None, last, frozenset(), reference.arrays, norms)
    return {
        str(name): {
            "norm": size,
            "response": gate.least(name, "L1"),
            "distances": [distance(last[COLUMNS[a]][name], last[COLUMNS[b]][name]) for a, b in PAIRS],
            "orders": [[r.order_response[name] for r in records[column]] for column in COLUMNS],
        }
        for name, size in norms.items()
    }


def run(count: int, path: Path) -> list[dict[str, Any]]:
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    left = iter(sorted(set(range(count)) - {entry["number"] for entry in done}))
    started, before = time.perf_counter(), len(done)
    with path.open("a") as file, ThreadPoolExecutor(cores()) as pool:

        def work(lane: int) -> None:
            mine = Lane()
            for number in left:
                entry = {"number": number, "arrays": mine.measure(number)}
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
            of_order = [found.ratio for found in compared.order_dependent if found.backend == backend]
            found.append((max([*there, *of_order]) / RESPONSE_FACTOR, mutant.name))
            print(f"{len(found)} mutants", file=sys.stderr, flush=True)
    print("\nplanted defects of level L1 nearest to the limit, in limits:")
    for ratio, name in sorted(found)[:8]:
        print(f"  {ratio:.3g}  {name}")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    show(run(count, Path(sys.argv[2] if len(sys.argv) > 2 else "gate.jsonl")))
    show_mutants()


if __name__ == "__main__":
    import gate  # what is asked of a process must be known there by the name of a module

    gate.main()
