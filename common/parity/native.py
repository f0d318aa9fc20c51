"""A network of ours as any user's model: what a check falls back on to say where and why a backend differs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from common import architectures
from common import weights as canonical
from common.architectures import Spec
from common.backends.messages import Clock, Request
from common.backends.process import BackendProcess
from common.foreign.protocol import Forced, Layout, Trace
from common.parity import record
from common.parity.hosts import Ask, Here, in_layout
from common.parity.record import Record


@dataclass(frozen=True, kw_only=True)
class Network:
    """A spec with weights, as a backend's users would have it."""

    spec: Mapping[str, Any]
    weights: Path
    values: Mapping[str, np.ndarray] | None = None  # by the backend's own names, in the place of the weights

    @contextmanager
    def at_work(self, backend: Any, dtype: str) -> Iterator[Here]:
        """Built and loaded in this process, and at work in the dtype."""
        model = backend.build(architectures.from_dict(dict(self.spec)), dtype)
        backend.load(model, canonical.mapped(self.weights))
        host = Here(backend.native(model))
        with host.at_work(dtype):
            if self.values is not None:
                host.runner.load(self.values)
            yield host


@dataclass(frozen=True, kw_only=True)
class RecordNative:
    """Run the network as a user's model, and write its record to `output`. The images of `ask` are channels last."""

    network: Network
    ask: Ask
    output: Path

    def perform(self, backend: Any, clock: Clock) -> None:
        with clock.step("localise"):
            with self.network.at_work(backend, self.ask.dtype) as host:
                found = host.record(_turned(self.ask, host.layout))
            record.write(self.output, found, found.manifest)


@dataclass(frozen=True, kw_only=True)
class ForceNative:
    """One pass of the network with other arrays than its own."""

    network: Network
    ask: Ask
    training: bool
    forced: Mapping[str, Forced]

    def perform(self, backend: Any, clock: Clock) -> Trace:
        with clock.step("localise"), self.network.at_work(backend, self.ask.dtype) as host:
            return host.forced(_turned(self.ask, host.layout), self.training, self.forced)


def _turned(ask: Ask, layout: Layout) -> Ask:
    return replace(ask, inputs=in_layout(ask.inputs, "channels_last", layout))


class Column:
    """The network in a backend's process: see `common.parity.hosts.Host`."""

    def __init__(
        self,
        name: str,
        network: Network,
        process: BackendProcess,
        folder: Path,
        wrap: Callable[[Request[Any]], Request[Any]] = lambda request: request,
    ) -> None:
        """`wrap` is what a request is put into before it is sent."""
        self.name = self.title = self.backend = name
        self.layout: Layout = "channels_last"
        self.lacks: frozenset[str] = frozenset()
        self.network = network
        self._process, self._folder, self._wrap = process, folder, wrap

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[None]:
        yield

    def record(self, ask: Ask) -> Record:
        output = self._folder / f"{self.name}-native-{ask.dtype}.safetensors"
        self._process.ask(self._wrap(RecordNative(network=self.network, ask=ask, output=output)))
        return Record.read(output, self.name)

    def forced(self, ask: Ask, training: bool, forced: Mapping[str, Forced]) -> Trace:
        request = ForceNative(network=self.network, ask=ask, training=training, forced=forced)
        found: Trace = self._process.ask(self._wrap(request))
        return found


def images_of(path: Path, dtype: str) -> np.ndarray:
    """The images (N, H, W, C) of a batch on disk."""
    images: np.ndarray = load_file(path)["images"].astype(dtype)
    return images


def network(spec: Spec, weights: Path) -> Network:
    """The network of a spec whose weights lie in a file."""
    return Network(spec=architectures.to_dict(spec), weights=weights)
