"""ResNets in Flax linen, laid out as in the Flax imagenet example: ``from resnet_flax import ResNet50``.

Importing this package loads nothing; JAX and Flax come with the first name that is asked for, so that the process
that runs a check can set JAX's environment before.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from common import errors
from common.architectures import Spec

if TYPE_CHECKING:
    from flax import linen as nn

    from resnet_flax.resnet import ResNet as ResNet
    from resnet_flax.resnet import ResNet18 as ResNet18
    from resnet_flax.resnet import ResNet20 as ResNet20
    from resnet_flax.resnet import ResNet32 as ResNet32
    from resnet_flax.resnet import ResNet34 as ResNet34
    from resnet_flax.resnet import ResNet44 as ResNet44
    from resnet_flax.resnet import ResNet50 as ResNet50
    from resnet_flax.resnet import ResNet56 as ResNet56
    from resnet_flax.resnet import ResNet101 as ResNet101
    from resnet_flax.resnet import ResNet110 as ResNet110
    from resnet_flax.resnet import ResNet152 as ResNet152
    from resnet_flax.resnet import ResNeXt50_32x4d as ResNeXt50_32x4d
    from resnet_flax.resnet import ResNeXt101_32x8d as ResNeXt101_32x8d
    from resnet_flax.resnet import ResNeXt101_64x4d as ResNeXt101_64x4d
    from resnet_flax.resnet import WideResNet50_2 as WideResNet50_2
    from resnet_flax.resnet import WideResNet101_2 as WideResNet101_2
    from resnet_flax.weights import from_variables as from_variables
    from resnet_flax.weights import read_variables as read_variables
    from resnet_flax.weights import to_variables as to_variables

_PUBLIC = {
    "resnet": (
        "ResNet",
        *(f"ResNet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)),
        *("WideResNet50_2", "WideResNet101_2"),
        *("ResNeXt50_32x4d", "ResNeXt101_32x8d", "ResNeXt101_64x4d"),
    ),
    "weights": ("to_variables", "from_variables", "read_variables"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["from_checkpoint", "from_spec", *_MODULES]


def from_spec(spec: Spec, **options: Any) -> "nn.Module":
    """The module of any valid spec; `options` are those of the family's own `from_spec`.

    Raises `BackendMissing` if JAX or Flax is not installed.
    """
    with framework():
        family = import_module(f"{__package__}.{spec.family}")
    module: nn.Module = family.from_spec(spec, **options)
    return module


def from_checkpoint(
    reference: str | PathLike[str],
    *,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> "nn.Module":
    """The model of a checkpoint, in the conventions of its format: a path, a URL or a name of known weights.

    `convention` and `changes` are those of `common.checkpoints.load`; `options` are those of `from_spec`. Raises
    `WeightsError`, and `BackendMissing` if JAX or Flax is not installed.
    """
    from common import checkpoints  # not before it is asked for: importing this package loads nothing

    spec, path = checkpoints.network(reference, convention=convention, changes=changes)
    return from_spec(spec, weights=path, **options)


def framework() -> AbstractContextManager[None]:
    """Around an import of JAX, Flax and what belongs to them: raises `BackendMissing` if one is not installed."""
    names = {"jax": "JAX", "jaxlib": "JAX", "flax": "Flax", "optax": "Optax", "orbax": "Orbax"}
    return errors.framework({module: (name, "flax") for module, name in names.items()})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with framework():
        return getattr(import_module(f"{__package__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
