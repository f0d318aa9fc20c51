"""The Vision Transformer of `vit_torch.py` in linen, and the weights of that one in it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import vit_torch

Variables = dict[str, Any]


class Block(nn.Module):
    """Attention, then two dense layers; each behind a norm, and added to what came in."""

    heads: int
    gelu: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(self.norm(name="norm1")(x))
        y = nn.Dense(4 * x.shape[-1], name="up")(self.norm(name="norm2")(x))
        return x + nn.Dense(x.shape[-1], name="down")(self.gelu(y))


class ViT(nn.Module):
    """Images (N, H, W, 3) to logits (N, classes)."""

    patch: int = 8
    width: int = 64
    depth: int = 4
    heads: int = 2
    classes: int = 10
    gelu: Callable[..., Any] = partial(nn.gelu, approximate=False)
    eps: float = 1e-5  # PyTorch's default; linen's is 1e-6

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.LayerNorm, epsilon=self.eps)
        x = nn.Conv(self.width, (self.patch, self.patch), self.patch, padding="VALID", name="embed")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for number in range(self.depth):
            x = Block(self.heads, self.gelu, norm, name=f"block{number}")(x)
        return nn.Dense(self.classes, name="head")(norm(name="norm")(x)[:, 0])


def port(state: Mapping[str, Any]) -> Variables:
    """The variables of a linen `ViT` from the state dict of the one in PyTorch."""
    arrays = {name: jnp.asarray(tensor.numpy()) for name, tensor in state.items()}

    def dense(name: str) -> Variables:
        return {"kernel": arrays[f"{name}.weight"].T, "bias": arrays[f"{name}.bias"]}

    def norm(name: str) -> Variables:
        return {"scale": arrays[f"{name}.weight"], "bias": arrays[f"{name}.bias"]}

    def attention(name: str) -> Variables:
        # One matrix there, three here; and here the heads have an axis of their own.
        width, heads = arrays[f"{name}.out.bias"].shape[0], ViT.heads
        shape = (heads, width // heads)
        kernels = jnp.split(arrays[f"{name}.qkv.weight"].T, 3, axis=1)
        biases = jnp.split(arrays[f"{name}.qkv.bias"], 3)
        parts: Variables = {
            part: {"kernel": kernel.reshape(width, *shape), "bias": bias.reshape(shape)}
            for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        out = dense(f"{name}.out")
        return parts | {"out": {"kernel": out["kernel"].reshape(*shape, width), "bias": out["bias"]}}

    params: Variables = {
        "embed": {"kernel": arrays["embed.weight"].transpose(2, 3, 1, 0), "bias": arrays["embed.bias"]},
        "token": arrays["token"],
        "positions": arrays["positions"],
        "norm": norm("norm"),
        "head": dense("head"),
    }
    for number in range(ViT.depth):
        name = f"blocks.{number}"
        params[f"block{number}"] = {
            "norm1": norm(f"{name}.norm1"),
            "attention": attention(f"{name}.attention"),
            "norm2": norm(f"{name}.norm2"),
            "up": dense(f"{name}.mlp.0"),
            "down": dense(f"{name}.mlp.2"),
        }
    return {"params": params}


def _ported() -> Variables:
    original, _ = vit_torch.model()
    return port(original.state_dict())


def model() -> tuple[ViT, Variables]:
    """The port."""
    return ViT(), _ported()


def faulty_gelu() -> tuple[ViT, Variables]:
    """The port with linen's own default of GELU, which is the tanh form."""
    return ViT(gelu=nn.gelu), _ported()


def faulty_eps() -> tuple[ViT, Variables]:
    """The port with linen's own default of epsilon."""
    return ViT(eps=1e-6), _ported()
