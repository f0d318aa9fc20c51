"""One process per backend for the whole run: importing TensorFlow alone takes seconds."""

import os
from collections.abc import Iterator

import pytest

from common.backend import COLUMNS
from common.check import Session

# The suite checks many networks that share their shapes: JAX compiles their operations once for all of them.
os.environ.setdefault("RESNET_PARITY_JIT", "0")


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """The three frameworks."""
    with Session(["torch", "keras", "flax"]) as session:
        yield session


@pytest.fixture(scope="session")
def all_columns() -> Iterator[Session]:
    """The three frameworks, Keras on each of its engines."""
    with Session(list(COLUMNS)) as session:
        yield session
