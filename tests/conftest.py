"""One process per backend for the whole run: importing TensorFlow alone takes seconds."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest

from common.check import Session

# The suite checks many networks that share their shapes: JAX compiles their operations once for all of them.
os.environ.setdefault("RESNET_PARITY_JIT", "0")


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """The three frameworks, their records in memory: on disk, writing them takes longer than computing them."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 16 * 2**30
    with Session(["torch", "keras", "flax"], scratch=memory if roomy else None) as session:
        yield session


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Models and compiled programs of one file would take gigabytes from the next."""
    yield
    for name, clear in (("jax", "clear_caches"), ("keras", "utils.clear_session")):
        if name in sys.modules:
            attrgetter(clear)(sys.modules[name])()
    gc.collect()
