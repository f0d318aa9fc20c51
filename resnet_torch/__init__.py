"""ResNets in PyTorch, as torchvision lays them out: ``from resnet_torch import resnet50``.

Importing this package loads nothing; PyTorch comes with the first name that is asked for.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from common import errors
from common.architectures import Spec

if TYPE_CHECKING:
    from torch import nn

    from resnet_torch.resnet import ResNet as ResNet
    from resnet_torch.resnet import resnet18 as resnet18
    from resnet_torch.resnet import resnet20 as resnet20
    from resnet_torch.resnet import resnet32 as resnet32
    from resnet_torch.resnet import resnet34 as resnet34
    from resnet_torch.resnet import resnet44 as resnet44
    from resnet_torch.resnet import resnet50 as resnet50
    from resnet_torch.resnet import resnet56 as resnet56
    from resnet_torch.resnet import resnet101 as resnet101
    from resnet_torch.resnet import resnet110 as resnet110
    from resnet_torch.resnet import resnet152 as resnet152
    from resnet_torch.resnet import resnext50_32x4d as resnext50_32x4d
    from resnet_torch.resnet import resnext101_32x8d as resnext101_32x8d
    from resnet_torch.resnet import resnext101_64x4d as resnext101_64x4d
    from resnet_torch.resnet import wide_resnet50_2 as wide_resnet50_2
    from resnet_torch.resnet import wide_resnet101_2 as wide_resnet101_2
    from resnet_torch.weights import export_weights as export_weights
    from resnet_torch.weights import load_weights as load_weights

_PUBLIC = {
    "resnet": (
        "ResNet",
        *(f"resnet{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)),
        *("wide_resnet50_2", "wide_resnet101_2"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    ),
    "weights": ("load_weights", "export_weights"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["from_checkpoint", "from_spec", *_MODULES]


def from_spec(spec: Spec, **options: Any) -> "nn.Module":
    """The model of any valid spec; `options` are those of the family's own `from_spec`.

    Raises `BackendMissing` if PyTorch is not installed.
    """
    with framework():
        family = import_module(f"{__package__}.{spec.family}")
    model: nn.Module = family.from_spec(spec, **options)
    return model


def from_checkpoint(
    reference: str | PathLike[str],
    *,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> "nn.Module":
    """The model of a checkpoint, in the conventions of its format: a path, a URL or a name of known weights.

    `convention` and `changes` are those of `common.checkpoints.load`; `options` are those of `from_spec`. Raises
    `WeightsError`, and `BackendMissing` if PyTorch is not installed.
    """
    from common import checkpoints  # not before it is asked for: importing this package loads nothing

    spec, path = checkpoints.network(reference, convention=convention, changes=changes)
    return from_spec(spec, weights=path, **options)


def framework() -> AbstractContextManager[None]:
    """Around an import of PyTorch: raises `BackendMissing` if it is not installed."""
    return errors.framework({"torch": ("PyTorch", "torch")})


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with framework():
        return getattr(import_module(f"{__package__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
