"""What every family of this backend is made of, and linen does another way."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from common.architectures import Spec
from common.architectures.layers import Padding, RunningVariance, adaptive_windows
from common.errors import InputError

ModuleDef = Callable[..., Any]


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


def tap(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """`x`; recorded where the caller of `apply` made the collection ``taps`` mutable, and free of cost otherwise."""
    if not module.is_initializing():  # `init` makes every collection mutable
        module.sow("taps", name, x)
    return x


def window_padding(padding: Padding, kernel: int, dilation: int = 1) -> str | list[tuple[int, int]]:
    """The padding argument of `nn.Conv` and `nn.max_pool`."""
    if padding == "symmetric":
        return [(dilation * (kernel - 1) // 2,) * 2] * 2
    if padding == "ceil":  # for a 3x3 window with stride 2: at odd sizes the extra row is never reached
        return [(0, 1)] * 2
    # SAME puts the odd row and column at the end: at even sizes a stride of 2 reads other pixels than symmetric does.
    return padding.upper()


def conv_layer(
    filters: int, kernel: int, strides: int = 1, dilation: int = 1, *, padding: Padding, **kwargs: Any
) -> nn.Conv:
    """A square convolution; `kwargs` as in `nn.Conv`."""
    pads = window_padding(padding, kernel, dilation)
    kwargs |= {"kernel_dilation": dilation, "conv_general_dilated_cls": lambda: convolve}
    return nn.Conv(filters, (kernel, kernel), strides, pads, **kwargs)


def norm_layer(
    *, train: bool, eps: float, momentum: float, running_variance: RunningVariance, axis_name: str | None, **dtypes: Any
) -> ModuleDef:
    """Makes batch norms; `momentum` is the share of the old value, as in a spec."""
    return partial(
        nn.BatchNorm if running_variance == "biased" else BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=eps,
        axis_name=axis_name,
        use_fast_variance=False,  # E[x²] - E[x]² loses digits where a mean is large against its deviation
        # "At least float32" is exactly float32 for the initial running statistics, which double precision outgrows.
        force_float32_reductions=jnp.finfo(dtypes["param_dtype"]).bits <= 32,
        **dtypes,
    )


def no_norm(**_: Any) -> Callable[[jax.Array], jax.Array]:
    """In the place of a norm, where a spec has none."""
    return lambda x: x


def adaptive_pool(x: jax.Array, cells: Sequence[int], reduce: Callable[..., jax.Array]) -> jax.Array:
    """`reduce`, `jnp.mean` or `jnp.max`, over windows that divide a map into `cells` rows and columns, at any size:
    see `common.architectures.layers.AdaptivePool`."""
    for axis, count in enumerate(cells, start=1):
        windows = adaptive_windows(x.shape[axis], count)
        x = jnp.stack([reduce(lax.slice_in_dim(x, *window, axis=axis), axis=axis) for window in windows], axis=axis)
    return x
