"""What every family of this backend is made of, and linen does another way."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

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
