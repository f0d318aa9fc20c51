"""One process per backend for the whole run: importing TensorFlow alone takes seconds."""

from collections.abc import Iterator

import pytest

from common.backend import COLUMNS
from common.check import Session


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
