"""Scripts that are run in the process that a session has of a framework anyway: importing TensorFlow takes 7 s."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

from common.parity.session import Session


@dataclass(frozen=True)
class Script:
    """A request to run Python code; the answer is what it printed."""

    code: str

    def perform(self, backend: Any, clock: Any) -> str:
        with redirect_stdout(StringIO()) as printed:
            exec(self.code, {"__name__": "script"})
        return printed.getvalue()


@dataclass(frozen=True)
class KerasScript(Script):
    """The same in Keras as it is when it has just been imported: layers are numbered from the first, numbers are
    float32. A backend that builds a model says itself which it wants."""

    def perform(self, backend: Any, clock: Any) -> str:
        import keras

        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        keras.utils.clear_session()
        return super().perform(backend, clock)


@contextmanager
def unoptimised() -> Iterator[None]:
    """JAX's programs are compiled without optimising them, which takes longer than it saves where they run once. To be
    ended before anything large runs in the same process: a convolution in float64 takes twenty times as long so."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def printed(session: Session, column: str, code: str) -> Any:
    """What `code` prints as JSON in its last line, run in the session's process of that column."""
    kind = KerasScript if column.startswith("keras") else Script
    return json.loads(session.process(column).ask(kind(code)).splitlines()[-1])
