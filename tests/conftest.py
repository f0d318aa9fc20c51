"""One process per backend for the whole run: importing TensorFlow alone takes seconds."""

import gc
import os
import sys
from collections.abc import Iterator
from operator import attrgetter

import pytest

from common.check import Session

# The suite checks many networks that share their shapes: JAX compiles their operations once for all of them.
os.environ.setdefault("RESNET_PARITY_JIT", "0")


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """The three frameworks."""
    with Session(["torch", "keras", "flax"]) as session:
        yield session


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Models and compiled programs of one file would take gigabytes from the next."""
    yield
    for name, clear in (("jax", "clear_caches"), ("keras", "utils.clear_session")):
        if name in sys.modules:
            attrgetter(clear)(sys.modules[name])()
    gc.collect()
