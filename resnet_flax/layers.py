"""What every family of this backend is made of, and linen does another way."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from common.architectures import Spec
from common.errors import InputError


class BatchNorm(nn.BatchNorm):
    """Batch norm whose running variance is unbiased, N / (N - 1) times that of the batch; Flax stores the biased one.

    It is called as its parent is because Flax derives the names of variables (``BatchNorm_0``) from the class.
    Raises `InputError` in training mode for a single value per channel, which has no unbiased variance.
    """

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        before: jax.Array = self.get_variable("batch_stats", "var")
        y: jax.Array = super().__call__(x, use_running_average)
        training = not nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if training and not self.is_initializing():
            count = x.size // x.shape[-1] * (lax.psum(1, self.axis_name) if self.axis_name else 1)
            if count < 2:
                raise InputError("one value per channel has no unbiased variance; use more images or a larger size")
            after: jax.Array = self.get_variable("batch_stats", "var")
            self.put_variable("batch_stats", "var", after + (after - self.momentum * before) / (count - 1))
        return y


def native_masks(spec: Spec, masks: Mapping[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """Masks of dropout by the path of the module."""
    if not masks:
        return {}
    paths = import_module(f"{__package__}.{spec.family}").native_paths(spec)
    return {paths[path]: mask for path, mask in masks.items()}


def given_dropout(masks: Mapping[tuple[str, ...], jax.Array]) -> AbstractContextManager[None]:
    """While it lasts, each `nn.Dropout`, by its path, keeps in training the values where its mask is True.

    A mask is of the shape of the layer's output.
    """

    def masked(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.Dropout) or context.method_name != "__call__" or module.path not in masks:
            return call(*args, **kwargs)
        x, *rest = args
        deterministic = rest[0] if rest else kwargs.get("deterministic")
        if nn.merge_param("deterministic", module.deterministic, deterministic):
            return x
        return jnp.where(masks[module.path], x / (1 - module.rate), 0)

    return nn.intercept_methods(masked)


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *, precision: Any = None, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` of NHWC and HWIO, a 1x1 window as the product of matrices that it is.

    On a CPU XLA computes the gradient of a 1x1 kernel as a convolution whose window is the whole image: that alone was
    half of a training step of ResNet-50.
    """
    padded = not isinstance(padding, str) and any(map(any, padding))
    if kernel.shape[:2] != (1, 1) or padded or options["feature_group_count"] > 1:
        return lax.conv_general_dilated(x, kernel, strides, padding, precision=precision, **options)
    x = x[:, :: strides[0], :: strides[1]]
    # Of two axes: the gradient of a product over three begins with a transposed copy of the images.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=precision)
    return y.reshape(*x.shape[:-1], -1)
