"""ResNets for Keras 3, on whichever backend Keras runs: TensorFlow, JAX or PyTorch.

Nothing of Keras is imported before a name of this package is used.
"""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any

from common import errors
from common.architectures import Spec

if TYPE_CHECKING:
    import keras

    from resnet_keras.resnet import (
        ResNet18,
        ResNet20,
        ResNet32,
        ResNet34,
        ResNet44,
        ResNet50,
        ResNet56,
        ResNet101,
        ResNet110,
        ResNet152,
        ResNeXt50_32x4d,
        ResNeXt101_32x8d,
        ResNeXt101_64x4d,
        WideResNet50_2,
        WideResNet101_2,
        stage_outputs,
    )
    from resnet_keras.weights import export_weights, load_weights

__all__ = [
    "ResNeXt50_32x4d",
    "ResNeXt101_32x8d",
    "ResNeXt101_64x4d",
    "ResNet18",
    "ResNet20",
    "ResNet32",
    "ResNet34",
    "ResNet44",
    "ResNet50",
    "ResNet56",
    "ResNet101",
    "ResNet110",
    "ResNet152",
    "WideResNet50_2",
    "WideResNet101_2",
    "export_weights",
    "from_checkpoint",
    "from_spec",
    "load_weights",
    "stage_outputs",
]

# What Keras may be missing, as a user knows it, and the extra that brings it.
_FRAMEWORKS = {
    "keras": ("Keras", "keras"),
    "tensorflow": ("TensorFlow", "keras"),
    "jax": ("JAX", "flax"),
    "torch": ("PyTorch", "torch"),
}


def from_spec(spec: Spec, **options: Any) -> "keras.Model":
    """The native model of any valid specification; `options` are those of its family's `from_spec`.

    Raises `BackendMissing` where Keras, or the framework it is to run on, is not installed.
    """
    return _module(spec.family).from_spec(spec, **options)


def from_checkpoint(
    reference: str | PathLike[str],
    *,
    convention: str | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> "keras.Model":
    """The model of a checkpoint, in the conventions of its format: a path, a URL or a name of known weights.

    `convention` and `changes` are those of `common.checkpoints.load`; `options` are those of `from_spec`. Raises
    `WeightsError`, and `BackendMissing` if Keras is not installed.
    """
    from common import checkpoints  # not before it is asked for: importing this package loads nothing

    spec, path = checkpoints.network(reference, convention=convention, changes=changes)
    return from_spec(spec, weights=path, **options)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "weights" if name in ("load_weights", "export_weights") else "resnet"
    return getattr(_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _module(name: str) -> Any:
    with framework():
        return importlib.import_module(f"{__package__}.{name}")


def framework() -> AbstractContextManager[None]:
    """Around an import of Keras: raises `BackendMissing` if it, or the framework below it, is not installed."""
    return errors.framework(_FRAMEWORKS)
