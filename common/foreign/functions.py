"""A plain function of arrays as a model: what it returns is compared, and nothing can be seen inside."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from common.errors import ModelError
from common.files import reason
from common.foreign.protocol import Forced, Inputs, Layout, Loss, Trace


def adapt(function: Callable[..., Any]) -> "FunctionAdapter":
    """The adapter of a function that is called with NumPy arrays and returns arrays, nested as it likes."""
    return FunctionAdapter(function)


class FunctionAdapter:
    """See `common.foreign.protocol.Adapter`."""

    backend = "function"
    layout: Layout = "channels_last"
    lacks = frozenset({"layers", "gradients", "training", "layout"})

    def __init__(self, function: Callable[..., Any]) -> None:
        self.title = getattr(function, "__name__", type(function).__name__)
        self._function = function

    def describe(self) -> dict[str, str]:
        return {"numpy": np.__version__, "python": platform.python_version(), "device": "cpu"}

    @contextmanager
    def at_work(self, dtype: str) -> Iterator["FunctionRunner"]:
        yield FunctionRunner(self._function, self.title, dtype)


class FunctionRunner:
    """See `common.foreign.protocol.Runner`. A function has no arrays of its own that could be moved."""

    trained: Mapping[str, bool] = {}

    def __init__(self, function: Callable[..., Any], title: str, dtype: str) -> None:
        self._function, self._title, self._dtype = function, title, dtype

    def values(self) -> dict[str, np.ndarray]:
        return {}

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """It has none."""

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        named = inputs if isinstance(inputs, Mapping) else {str(i): array for i, array in enumerate(inputs)}
        given = {
            name: array.astype(self._dtype) if array.dtype.kind == "f" else np.array(array)
            for name, array in named.items()
        }
        before = {name: array.copy() for name, array in given.items()}
        try:
            returned = self._function(**given) if isinstance(inputs, Mapping) else self._function(*given.values())
        except Exception as error:
            raise ModelError(f"{self._title} raises {type(error).__name__}: {reason(error)}") from error
        results = flattened(returned, self._title)
        for path, array in results.items():
            if array.dtype.kind == "f" and array.dtype != self._dtype:
                raise ModelError(
                    f"{self._title} returns {array.dtype}{f' at {path}' if path else ''} for inputs of {self._dtype}; "
                    f"it computes in {array.dtype} inside"
                )
        changed = tuple(name for name, array in given.items() if not np.array_equal(array, before[name]))
        return Trace(results=results, changed_inputs=changed)

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> NoReturn:
        raise ModelError(f"{self._title} is a function and has nothing to train")


def flattened(returned: Any, title: str) -> dict[str, np.ndarray]:
    """The arrays in what a function returned, by path. Raises `ModelError` for what is no array."""
    found: dict[str, np.ndarray] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            for key, one in value.items():
                walk(one, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list | tuple) and not _is_number(value):
            for key, one in enumerate(value):
                walk(one, f"{path}.{key}" if path else str(key))
        elif value is not None:
            # asarray first: asked for a copy, PyTorch's and TensorFlow's tensors warn under NumPy 2.
            array = np.array(np.asarray(value.detach().cpu() if hasattr(value, "detach") else value))
            if array.dtype.kind not in "fiub":
                raise ModelError(f"{title} returns a {type(value).__name__}{f' at {path}' if path else ''}, no array")
            found[path] = array

    walk(returned, "")
    if not found:
        raise ModelError(f"{title} returns nothing that is an array")
    return found


def _is_number(value: Any) -> bool:
    return hasattr(value, "__array__")
