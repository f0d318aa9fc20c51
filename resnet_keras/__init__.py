"""Networks for Keras 3, on whichever backend Keras runs: ``from resnet_keras import ResNet50``.

Importing this package loads nothing; Keras comes with the first name that is asked for.
"""

from typing import TYPE_CHECKING, Any

from common.architectures import title
from common.backends.facade import Facade

if TYPE_CHECKING:
    import keras

_facade: "Facade[keras.Model]" = Facade(
    __name__,
    frameworks={
        "keras": ("Keras", "keras"),
        "tensorflow": ("TensorFlow", "keras"),
        "jax": ("JAX", "flax"),
        "torch": ("PyTorch", "torch"),
    },
    spelling=title,
    others={"stage_outputs": "applications", **dict.fromkeys(("load_weights", "export_weights"), "weights")},
)
from_spec, from_checkpoint, framework = _facade.from_spec, _facade.from_checkpoint, _facade.framework
__all__ = _facade.names


def __getattr__(name: str) -> Any:
    return _facade.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
