"""The table of the planted faults: for each the cause, the answer, the rank of the cause among the answers, seconds.

    python benchmarks/diagnose.py [WORD …]

Of all faults, or of those with one of the words in their name or their models; `clean` and `twice` for the models
without a fault and those with two. Everything runs in this process, on one thread of every framework.
"""

import os
import sys
import time

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"}
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import tensorflow as tf
import torch

from tests.faults.catalogue import CLEAN, FAULTS, TWICE
from tests.faults.judging import answer, clean
from tests.faults.planting import Fault

torch.set_num_threads(1)
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)


def chosen(words: list[str], *names: str) -> bool:
    return not words or any(word in name for word in words for name in names)


def of_faults(faults: list[Fault]) -> None:
    print(f"{'fault':30} {'models':38} {'cause':28} {'answer':28} rank  s")
    ranks: list[int | None] = []
    started = time.perf_counter()
    for fault in faults:
        found = answer(fault)
        ranks.append(found.rank(fault))
        said = found.findings[0].cause if found.findings else "none"
        models = f"{fault.reference} > {fault.port}"
        more = "" if len(found.defects) == 1 else f"  {len(found.defects)} defects"
        print(
            f"{fault.name:30} {models:38} {fault.cause:28} {said:28} {ranks[-1] or '-':>4} {found.seconds:5.1f}{more}",
            flush=True,
        )
    first, three = ranks.count(1), sum(rank in (1, 2, 3) for rank in ranks)
    seconds = time.perf_counter() - started
    print(f"{len(ranks)} faults: {first} named first, {three} among the first three; {seconds:.0f} s")


def main(words: list[str]) -> None:
    faults = [fault for fault in FAULTS if chosen(words, fault.name, fault.reference, fault.port)]
    if faults:
        of_faults(faults)
    for pair in CLEAN if not words or "clean" in words else ():
        found = clean(*pair)
        accused = ", ".join(one.place for one in found.diagnosis.defects)
        print(f"{pair[0]:18} {pair[1]:18} {'the same' if found.passed else f'accused: {accused}'} {found.seconds:5.1f}")
    for fault in TWICE if not words or "twice" in words else ():
        both = answer(fault)
        causes = " and ".join(cause for cause, _ in fault.causes)
        said = " and ".join(one.best.cause if one.best else "none" for one in both.defects)
        print(f"{fault.name:40} {causes:38} {said:38} {both.seconds:5.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
