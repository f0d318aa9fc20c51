"""What the package of a backend offers, by name: the builders of all variants, and loading of any spec or checkpoint.

Nothing is imported before it is asked for: a package costs nothing by itself, and the process that runs a check can set
its framework's environment before.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from types import ModuleType
from typing import Any, Generic, TypeVar

from common import architectures, errors
from common.architectures import Spec

Model = TypeVar("Model")


class Package(ModuleType):
    """A package of which a builder may be called as the module it comes from is, as `alexnet`: the import of the module
    takes the name from no one. The module itself is what ``import package.alexnet`` finds, as ever."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in vars(self)["_facade"].builders):
            super().__setattr__(name, value)


@dataclass(frozen=True)
class Facade(Generic[Model]):
    """The public names of a backend's package, and the modules of the package that they come from.

    A family is offered where the package has a module of its name, with the functions `from_spec` and `builder`: the
    former makes the model of a spec, the latter the public function that makes a named variant, of whose conventions
    it knows.
    """

    package: str
    frameworks: Mapping[str, tuple[str, str]]  # those it needs, as `errors.framework` takes them
    spelling: Callable[[str], str]  # of a builder, from the variant's name
    others: Mapping[str, str]  # public name -> module, of all that is no builder

    @cached_property
    def builders(self) -> dict[str, str]:
        """Public name of every builder -> its variant. A variant with a convention in its name has none of its own."""
        found = (name for family in families(self.package) for name in architectures.variants_of(family))
        return {self.spelling(name): name for name in found if "." not in name}

    @property
    def names(self) -> list[str]:
        """Every public name."""
        return ["from_checkpoint", "from_spec", *self.builders, *self.others]

    def find(self, name: str) -> Any:
        """What a name stands for that the package does not hold. Raises `AttributeError`, and `BackendMissing`."""
        if name in self.others:
            return getattr(self._module(self.others[name]), name)
        if name not in self.builders:
            raise AttributeError(f"module {self.package!r} has no attribute {name!r}")
        variant = self.builders[name]
        build = self._module(architectures.find(variant).family).builder(variant)
        build.__name__ = build.__qualname__ = name
        build.__module__ = self.package
        setattr(sys.modules[self.package], name, build)  # one function each, however often it is asked for
        return build

    def from_spec(self, spec: Spec, **options: Any) -> Model:
        """The native model of any valid spec; `options` are those of the `from_spec` of its family's module.

        Raises `BackendMissing` if the framework is not installed.
        """
        model: Model = self._module(spec.family).from_spec(spec, **options)
        return model

    def from_checkpoint(
        self,
        reference: str | PathLike[str],
        *,
        convention: str | None = None,
        changes: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Model:
        """The model of a checkpoint, in the conventions of its format: a path, a URL or a name of known weights.

        `convention` and `changes` are those of `common.checkpoints.read`; `options` are those of `from_spec`. Raises
        `WeightsError`, and `BackendMissing` if the framework is not installed.
        """
        from common import checkpoints  # not before it is asked for: it costs more than all else here

        found = checkpoints.read(reference, convention=convention, changes=changes)
        return self.from_spec(found.spec, weights=found, **options)

    def framework(self) -> AbstractContextManager[None]:
        """Around an import of the framework and what belongs to it: raises `BackendMissing` if one is not installed."""
        return errors.framework(self.frameworks)

    def _module(self, name: str) -> Any:
        with self.framework():
            return import_module(f"{self.package}.{name}")


def families(package: str) -> list[str]:
    """The families of which a backend's package has a module."""
    return [family for family in architectures.families() if find_spec(f"{package}.{family}")]
