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
from common.architectures.layers import Activation, Padding, RunningVariance, adaptive_windows, sides_of
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
    """Masks of dropout and stochastic depth by the path of the module."""
    if not masks:
        return {}
    paths = import_module(f"{__package__}.{spec.family}").native_paths(spec)
    return {paths[path]: mask for path, mask in masks.items()}


def given_dropout(masks: Mapping[tuple[str, ...], jax.Array]) -> AbstractContextManager[None]:
    """While it lasts, each `nn.Dropout`, by its path, keeps in training the values where its mask is True.

    A mask is of the shape of the layer's output, (N, 1, 1, 1) for stochastic depth.
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


def window_padding(
    padding: Padding | int, kernel: int | tuple[int, int], stride: int, dilation: int = 1
) -> str | list[tuple[int, int]]:
    """The padding argument of `nn.Conv`, `nn.max_pool` and `nn.avg_pool`."""
    sides = sides_of(kernel)
    match padding:
        case "symmetric":
            return [(dilation * (side - 1) // 2,) * 2 for side in sides]
        case "ceil":  # what lies beyond the last window is never reached, and no window begins beyond the map
            return [(0, min(side, stride) - 1) for side in sides]
        case "same" | "valid":
            # SAME puts the odd row and column at the end: at even sizes a stride of 2 reads other pixels than
            # symmetric does.
            return padding.upper()
    return [(padding, padding)] * 2


def conv_layer(
    filters: int,
    kernel: int | tuple[int, int],
    strides: int = 1,
    dilation: int = 1,
    *,
    padding: Padding | int,
    **kwargs: Any,
) -> nn.Conv:
    """A convolution by a square window or one of (height, width); `kwargs` as in `nn.Conv`.

    A depthwise one has `feature_group_count` equal to `filters`.
    """
    pads = window_padding(padding, kernel, strides, dilation)
    kwargs |= {"kernel_dilation": dilation, "conv_general_dilated_cls": lambda: convolve}
    return nn.Conv(filters, sides_of(kernel), strides, pads, **kwargs)


def zero_pad(x: jax.Array, amount: int) -> jax.Array:
    """Zeros on every side of a map, which count as its pixels do."""
    return jnp.pad(x, [(0, 0), (amount, amount), (amount, amount), (0, 0)])


def max_pool(x: jax.Array, kernel: int | tuple[int, int], stride: int, *, padding: Padding | int) -> jax.Array:
    """The maximum over a window; padded with -inf."""
    return nn.max_pool(x, sides_of(kernel), (stride, stride), window_padding(padding, kernel, stride))


def avg_pool(
    x: jax.Array, kernel: int | tuple[int, int], stride: int, *, padding: Padding | int, count_padding: bool
) -> jax.Array:
    """The average over a window; linen counts the padding unless it is told not to."""
    counted = count_padding and padding != "ceil"
    pads = window_padding(padding, kernel, stride)
    averages = nn.avg_pool(x, sides_of(kernel), (stride, stride), pads, count_include_pad=counted)
    return averages.astype(x.dtype)  # linen counts in its default type


def local_response_norm(x: jax.Array, size: int, *, alpha: float, beta: float, k: float) -> jax.Array:
    """x / (k + alpha * sum of squares over `size` channels) ** beta; linen has none."""
    pads = [(0, 0)] * 3 + [(size // 2, (size - 1) // 2)]
    squares = lax.reduce_window(x * x, 0.0, lax.add, (1, 1, 1, size), (1, 1, 1, 1), pads)
    return x * (k + alpha * squares) ** -beta


def scaled_tanh(x: jax.Array) -> jax.Array:
    """1.7159 tanh(2 x / 3), of LeCun et al. 1998."""
    return 1.7159 * jnp.tanh(x * (2 / 3))


ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "tanh": nn.tanh,
    "scaled_tanh": scaled_tanh,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
}


def affine(x: jax.Array, scale: Sequence[float], shift: Sequence[float]) -> jax.Array:
    """x * scale + shift for each channel."""
    return x * jnp.asarray(scale, x.dtype) + jnp.asarray(shift, x.dtype)


def uniform_in_fan(fan_in: int) -> dict[str, Any]:
    """PyTorch's default initialisation of a convolution or dense layer that reads so many values for each that it
    gives: weights and biases uniform in ±1 / sqrt(fan_in). Flax has no biases that know of a fan_in."""

    def init(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return {"kernel_init": init, "bias_init": init}


def stochastic_depth(rate: float, *, train: bool, name: str | None = None) -> nn.Dropout:
    """Sets whole images (N, height, width, channels) to zero in training: a dropout of one draw an image."""
    return nn.Dropout(rate, broadcast_dims=(1, 2, 3), deterministic=not train, name=name)


def norm_layer(
    *,
    train: bool,
    eps: float,
    momentum: float,
    running_variance: RunningVariance,
    axis_name: str | None,
    scale: bool = True,
    **dtypes: Any,
) -> ModuleDef:
    """Makes batch norms; `momentum` is the share of the old value, as in a spec."""
    return partial(
        nn.BatchNorm if running_variance == "biased" else BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=eps,
        axis_name=axis_name,
        use_scale=scale,
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
