"""A user's model in Flax, for a comparison: `adapt` is what common/foreign/protocol.py asks for."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flax import linen as nn

from common.errors import ModelError
from common.foreign.protocol import Adapter, Layout, Runner
from resnet_flax.backend import describe
from resnet_flax.foreign_runner import FlaxRunner, Network, settings


class FlaxAdapter:
    """See `Adapter`. `make` copies the model in a dtype."""

    backend = "flax"
    layout: Layout = "channels_last"

    def __init__(self, title: str, make: Callable[[str], Network], lacks: frozenset[str] = frozenset()) -> None:
        self.title, self.lacks, self._make = title, lacks, make

    def describe(self) -> dict[str, str]:
        return describe()

    @contextmanager
    def at_work(self, dtype: str) -> Iterator[Runner]:
        with settings(dtype):
            network = self._make(dtype)
        yield FlaxRunner(network)


def adapt(model: Any) -> Adapter:
    """`model` is a linen module with its variables, ``(module, variables)``, or a bound one, or an `nnx.Module`.

    Raises `ModelError` for anything else.
    """
    nnx = sys.modules.get("flax.nnx")  # who has such a module has imported it
    if isinstance(model, nn.Module):
        if model.scope is None:
            raise ModelError(f"`{_title(model)}` comes without variables; give (module, variables), or bind them")
        return _linen(*model.unbind())
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        module, variables = model
        if not isinstance(variables, Mapping):
            found = type(variables).__name__
            raise ModelError(f"the variables of `{_title(module)}` are a {found}; a dict of collections was expected")
        return _linen(module, variables)
    if nnx is not None and isinstance(model, nnx.Module):
        from resnet_flax.foreign_nnx import NnxNetwork

        _callable(model)
        return FlaxAdapter(_title(model), lambda dtype: NnxNetwork(model, dtype))
    raise ModelError(
        f"a {_title(model)} is no model of Flax; give (module, variables), a bound linen module, or an nnx.Module"
    )


def _linen(module: nn.Module, variables: Mapping[str, Any]) -> Adapter:
    from resnet_flax.foreign_linen import LinenNetwork, lacks

    _callable(module)
    return FlaxAdapter(_title(module), lambda dtype: LinenNetwork(module, variables, dtype), lacks(module, variables))


def _callable(module: Any) -> None:
    if not callable(module):
        raise ModelError(f"`{_title(module)}` has no method __call__, which a comparison calls")


def _title(model: Any) -> str:
    return type(model).__name__
