"""What the public functions of every family share: a module bound to weights, and the keywords of a builder."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import linen as nn

from common.architectures import Spec
from common.checkpoints import Given, adopt
from resnet_flax.weights import read_variables

Module = TypeVar("Module", bound=nn.Module)


def bound(model: Module, weights: Given | None) -> Module:
    """The module of a family, bound to the variables of a checkpoint that fits its spec if `weights` are given.

    Raises `WeightsError` for weights that cannot be read or are another network's.
    """
    return model if weights is None else model.bind(read_variables(model.spec, weights, model.param_dtype))


def builder(variant: str, spec: Spec, from_spec: Callable[..., Module], convention: str) -> Callable[..., Module]:
    """The public function that makes `spec`, whose classes and other fields become keywords; `convention` says in words
    which of a variant's functions it is."""

    def build(num_classes: int = spec.classes, *, dtype: Any = jnp.float32, **options: Any) -> Module:
        own = {name: options.pop(name) for name in ("param_dtype", "axis_name") if name in options}
        taken, weights = adopt(spec, options.pop("weights", None), variant)
        return from_spec(taken.replace(classes=num_classes, **options), dtype=dtype, weights=weights, **own)

    build.__doc__ = (
        f"{variant} {convention}. `param_dtype`, `axis_name` and `weights` as in `from_spec`; with foreign weights the "
        f"network takes their conventions. Every other keyword is a field of `{type(spec).__name__}` to change."
    )
    return build
