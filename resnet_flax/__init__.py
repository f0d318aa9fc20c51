"""ResNet in Flax linen: ``resnet_flax.ResNet50(num_classes=10)`` and its siblings, or `from_spec` for any spec.

JAX and Flax are imported when the first of these names is used, so that the process that runs a check can set JAX's
environment before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from common.architectures import Spec
from common.errors import BackendMissing

if TYPE_CHECKING:
    from resnet_flax.resnet import (
        ResNet,
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
    )
    from resnet_flax.weights import from_variables, read_variables, to_variables

_MODULES = {
    "resnet": (
        "ResNet",
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
        "ResNeXt50_32x4d",
        "ResNeXt101_32x8d",
        "ResNeXt101_64x4d",
        "WideResNet50_2",
        "WideResNet101_2",
    ),
    "weights": ("from_variables", "read_variables", "to_variables"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["from_spec", *_HOME]  # noqa: PLE0604


def from_spec(spec: Spec, **options: Any) -> Any:
    """The module of any specification; `options` as in the `from_spec` of its family (`dtype`, `weights`, …).

    Raises `BackendMissing` where JAX or Flax is not installed.
    """
    return _load(spec.family).from_spec(spec, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_load(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


def _load(module: str) -> Any:
    try:
        import flax  # noqa: F401
        import jax  # noqa: F401
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("jax", "jaxlib", "flax"):
            raise
        missing = {"flax": "Flax"}.get(str(error.name).partition(".")[0], "JAX")
        raise BackendMissing(f"{missing} is not installed; run: pip install 'resnet-parity[flax]'") from None
    return import_module(f"{__package__}.{module}")
