"""An ONNX file as a model, by onnxruntime: in float32, in eval mode, outputs alone."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from common.errors import ModelError, framework
from common.files import reason
from common.foreign.protocol import Forced, Inputs, Layout, Loss, Trace

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


def adapt(path: str | PathLike[str]) -> "OnnxAdapter":
    """The adapter of an ONNX file. Raises `ModelError` for one that onnxruntime cannot load, `BackendMissing`."""
    return OnnxAdapter(Path(path))


class OnnxAdapter:
    """See `common.foreign.protocol.Adapter`."""

    backend = "onnxruntime"
    layout: Layout = "channels_first"
    lacks = frozenset({"layers", "gradients", "training", "float64"})

    def __init__(self, path: Path) -> None:
        self.title = path.name
        with framework({"onnxruntime": ("onnxruntime", "onnx")}):
            import onnxruntime
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings of the optimiser go to the terminal otherwise
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has a class of its own for every status, with no common one
            raise ModelError(f"{path}: onnxruntime cannot load it: {reason(error)}") from None

    def describe(self) -> dict[str, str]:
        versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "numpy")}
        return versions | {"python": platform.python_version(), "device": self._session.get_providers()[0].lower()}

    @contextmanager
    def at_work(self, dtype: str) -> Iterator["OnnxRunner"]:
        if dtype == "float64":
            raise ModelError(f"{self.title} is a file in float32 and has no float64 twin; compare in float32")
        yield OnnxRunner(self._session, self.title)


class OnnxRunner:
    """See `common.foreign.protocol.Runner`."""

    trained: Mapping[str, bool] = {}

    def __init__(self, session: Any, title: str) -> None:
        self._session, self._title = session, title

    def values(self) -> dict[str, np.ndarray]:
        return {}

    def load(self, values: Mapping[str, np.ndarray]) -> None:
        """Its arrays are in the file."""

    def run(
        self,
        inputs: Inputs,
        *,
        training: bool = False,
        gradients: bool = False,
        loss: Loss | None = None,
        forced: Mapping[str, Forced] | None = None,
    ) -> Trace:
        wanted = self._session.get_inputs()
        names = [one.name for one in wanted]
        named = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
        if set(named) != set(names) or len(inputs) != len(names):
            raise ModelError(f"{self._title} takes {len(names)} inputs ({', '.join(names)}), not {len(inputs)}")
        fed: dict[str, np.ndarray] = {
            one.name: named[one.name].astype(_DTYPES.get(one.type, np.float32)) for one in wanted
        }
        try:
            returned = self._session.run(None, fed)
        except Exception as error:
            raise ModelError(f"{self._title}: onnxruntime cannot run it: {reason(error)}") from None
        outputs = [one.name for one in self._session.get_outputs()]
        if len(outputs) == 1:
            outputs = [""]
        return Trace(results=dict(zip(outputs, map(np.asarray, returned), strict=True)))

    def steps(self, train: Callable[[Any], Callable[..., Any]], batches: Sequence[Inputs]) -> NoReturn:
        raise ModelError(f"{self._title} is a file for inference and cannot be trained")
