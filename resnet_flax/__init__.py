"""Networks in Flax linen, laid out as in the Flax imagenet example: ``from resnet_flax import ResNet50``.

Importing this package loads nothing; JAX and Flax come with the first name that is asked for.
"""

from typing import TYPE_CHECKING, Any

from common.architectures import title, variants_of
from common.backends.facade import Facade, families

if TYPE_CHECKING:
    from flax import linen as nn

_facade: "Facade[nn.Module]" = Facade(
    __name__,
    frameworks={
        "jax": ("JAX", "flax"),
        "jaxlib": ("JAX", "flax"),
        "flax": ("Flax", "flax"),
        "optax": ("Optax", "flax"),
        "orbax": ("Orbax", "flax"),
    },
    spelling=title,
    others={
        # Of a family that is called as one of its variants, that name is the builder's.
        **{title(family): family for family in families(__name__) if family not in variants_of(family)},
        **dict.fromkeys(("to_variables", "from_variables", "read_variables"), "weights"),
    },
)
from_spec, from_checkpoint, framework = _facade.from_spec, _facade.from_checkpoint, _facade.framework
__all__ = _facade.names


def __getattr__(name: str) -> Any:
    return _facade.find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
