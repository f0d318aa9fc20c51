"""The networks in Flax: linen in its compact form and with setup, and nnx."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

from tests.faults.networks import GROUPS, HEADS
from tests.faults.planting import Plan, Weights

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky": nn.leaky_relu,
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": nn.gelu,
    "sigmoid": nn.sigmoid,
    "hard_sigmoid": nn.hard_sigmoid,
    "none": lambda x: x,
}
Tree = dict[str, Any]


def padding(pad: Any) -> Any:
    return pad if isinstance(pad, str) else [(pad, pad)] * 2


def params(w: Weights, name: str) -> Tree:
    """A layer's, by role."""
    roles = ("kernel", "scale", "bias")
    return {role: jnp.asarray(w[f"{name}.{role}"]) for role in roles if f"{name}.{role}" in w}


def stats(w: Weights, name: str) -> Tree:
    return {role: jnp.asarray(w[f"{name}.{role}"]) for role in ("mean", "var")}


def conv(w: Weights, name: str, plan: Plan, *, stride: int = 1, pad: int | None = None, groups: int = 1) -> Tree:
    """Arguments of a convolution."""
    size = w[f"{name}.kernel"].shape
    return {
        "features": size[3],
        "kernel_size": size[:2],
        "strides": plan(f"{name}.stride", stride),
        "padding": padding(plan(f"{name}.pad", size[0] // 2 if pad is None else pad)),
        "kernel_dilation": plan(f"{name}.dilation", 1),
        "feature_group_count": groups,
        "use_bias": f"{name}.bias" in w and plan(f"{name}.bias", True),
        "dtype": plan(f"{name}.dtype", None),
    }


def batch_norm(name: str, plan: Plan, train: bool) -> Tree:
    running = plan(f"{name}.running", None)
    return {
        "use_running_average": not train if running is None else running,
        "epsilon": plan(f"{name}.eps", 1e-5),
        "momentum": plan(f"{name}.momentum", 0.9),
        "use_fast_variance": False,
    }


# Residual network: compact, with the names that Flax gives.


class Unit(nn.Module):
    w: Weights
    name_in_plan: str
    plan: Plan
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        w, name, plan = self.w, self.name_in_plan, self.plan
        act = ACTIVATIONS[plan(f"{name}.act", "relu")]
        y = nn.Conv(**conv(w, f"{name}.conv1", plan, stride=self.stride))(x)
        y = act(nn.BatchNorm(**batch_norm(f"{name}.norm1", plan, train))(y))
        y = nn.Conv(**conv(w, f"{name}.conv2", plan))(y)
        y = nn.BatchNorm(**batch_norm(f"{name}.norm2", plan, train))(y)
        if self.stride > 1:
            x = nn.Conv(**conv(w, f"{name}.projection", plan, stride=self.stride))(x)
            x = nn.BatchNorm(**batch_norm(f"{name}.projection_norm", plan, train))(x)
        if plan(f"{name}.detach", False):
            y = jax.lax.stop_gradient(y)
        last = ACTIVATIONS[plan(f"{name}.last", "relu")]
        return last(y) + x if plan(f"{name}.before", False) else last(x + y)


class Compact(nn.Module):
    w: Weights
    plan: Plan

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        w, plan = self.w, self.plan
        x = nn.Conv(**conv(w, "stem", plan, stride=2))(x)
        x = ACTIVATIONS[plan("stem.act", "relu")](nn.BatchNorm(**batch_norm("stem_norm", plan, train))(x))
        pool = nn.avg_pool if plan("pool.average", False) else nn.max_pool
        x = pool(x, (3, 3), (2, 2), padding(plan("pool.pad", 1)))
        for name in plan("units", ("one", "two", "three")):
            x = Unit(w, name, plan, 2 if name == "three" else 1)(x, train)
        return nn.Dense(len(w["head.bias"]))(x.mean((1, 2)))


def compact(w: Weights, plan: Plan) -> tuple[nn.Module, Tree]:
    of_params: Tree = {"Conv_0": params(w, "stem"), "BatchNorm_0": params(w, "stem_norm"), "Dense_0": params(w, "head")}
    of_stats: Tree = {"BatchNorm_0": stats(w, "stem_norm")}
    for number, unit in enumerate(plan("units", ("one", "two", "three"))):
        convs, norms = ["conv1", "conv2"], ["norm1", "norm2"]
        if unit == "three":
            convs, norms = [*convs, "projection"], [*norms, "projection_norm"]
        place = f"Unit_{number}"
        of_params[place] = {f"Conv_{i}": params(w, f"{unit}.{one}") for i, one in enumerate(convs)}
        of_params[place] |= {f"BatchNorm_{i}": params(w, f"{unit}.{one}") for i, one in enumerate(norms)}
        of_stats[place] = {f"BatchNorm_{i}": stats(w, f"{unit}.{one}") for i, one in enumerate(norms)}
    return Compact(w, plan), {"params": of_params, "batch_stats": of_stats}


# The same in nnx.


def nnx_conv(w: Weights, name: str, plan: Plan, *, stride: int = 1, groups: int = 1) -> nnx.Conv:
    settings = conv(w, name, plan, stride=stride, groups=groups)
    made, size = settings.pop("features"), w[f"{name}.kernel"].shape
    layer = nnx.Conv(size[2] * groups, made, rngs=nnx.Rngs(0), **settings)
    return loaded(layer, w, name)


def nnx_norm(w: Weights, name: str, plan: Plan) -> nnx.BatchNorm:
    settings = batch_norm(name, plan, True)
    layer = nnx.BatchNorm(len(w[f"{name}.scale"]), rngs=nnx.Rngs(0), **settings)
    return loaded(layer, w, name)


def loaded(layer: Any, w: Weights, name: str) -> Any:
    for role in ("kernel", "scale", "bias", "mean", "var"):
        held = getattr(layer, role, None)
        if f"{name}.{role}" in w and held is not None:
            held[...] = jnp.asarray(w[f"{name}.{role}"])
    return layer


class NnxUnit(nnx.Module):
    def __init__(self, w: Weights, name: str, plan: Plan, stride: int = 1) -> None:
        self.first, self.first_norm = (
            nnx_conv(w, f"{name}.conv1", plan, stride=stride),
            nnx_norm(w, f"{name}.norm1", plan),
        )
        self.second, self.second_norm = nnx_conv(w, f"{name}.conv2", plan), nnx_norm(w, f"{name}.norm2", plan)
        self.shortcut = nnx.List([])
        if stride > 1:
            projection = nnx_conv(w, f"{name}.projection", plan, stride=stride)
            self.shortcut = nnx.List([projection, nnx_norm(w, f"{name}.projection_norm", plan)])
        self.act = plan(f"{name}.act", "relu")
        self.last, self.before = plan(f"{name}.last", "relu"), plan(f"{name}.before", False)
        self.detach = plan(f"{name}.detach", False)

    def __call__(self, x: Array) -> Array:
        y = ACTIVATIONS[self.act](self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        for layer in self.shortcut:
            x = layer(x)
        if self.detach:
            x = jax.lax.stop_gradient(x)
        last = ACTIVATIONS[self.last]
        return last(y) + x if self.before else last(x + y)


class NnxResidual(nnx.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        self.stem, self.stem_norm = nnx_conv(w, "stem", plan, stride=2), nnx_norm(w, "stem_norm", plan)
        units = plan("units", ("one", "two", "three"))
        self.blocks = nnx.List([NnxUnit(w, name, plan, 2 if name == "three" else 1) for name in units])
        if plan("two.shares", False):
            self.blocks[1].first = self.blocks[0].first
        self.head = loaded(nnx.Linear(*w["head.kernel"].shape, rngs=nnx.Rngs(0)), w, "head")
        self.act, self.pad = plan("stem.act", "relu"), plan("pool.pad", 1)

    def __call__(self, x: Array) -> Array:
        x = ACTIVATIONS[self.act](self.stem_norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding(self.pad))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


# Depthwise and grouped convolutions: with setup.


class Gate(nn.Module):
    w: Weights
    plan: Plan

    def setup(self) -> None:
        self.squeeze, self.excite = nn.Dense(4), nn.Dense(16)

    def __call__(self, x: Array) -> Array:
        means = x.max((1, 2)) if self.plan("gate.max", False) else x.mean((1, 2))
        gate = self.excite(nn.silu(self.squeeze(means)))
        return ACTIVATIONS[self.plan("gate.act", "sigmoid")](gate)[:, None, None]


class Mobile(nn.Module):
    w: Weights
    plan: Plan

    def setup(self) -> None:
        w, plan = self.w, self.plan
        settings = {"stem": {"stride": 2}, "expand": {}, "depth": {"stride": 2, "groups": 16}, "project": {}}
        self.convs = {name: nn.Conv(**conv(w, name, plan, **more)) for name, more in settings.items()}
        self.norms = {
            name: nn.BatchNorm(epsilon=plan(f"{name}_norm.eps", 1e-5), use_fast_variance=False) for name in settings
        }
        self.gate = Gate(w, plan)
        self.grouped = nn.Conv(**conv(w, "grouped", plan, groups=GROUPS))
        self.head = nn.Dense(6, use_bias=plan("head.bias", True))

    def __call__(self, x: Array, train: bool = False) -> Array:
        act = ACTIVATIONS[self.plan("act", "silu")]
        for name in self.convs:
            if name == "project" and self.plan("gate", True):
                x = x * self.gate(x)
            x = self.norms[name](self.convs[name](x), use_running_average=not train)
            x = x if name == "project" else act(x)
        x = x + nn.relu(self.grouped(x))
        return self.head(x.mean((1, 2)))


def mobile(w: Weights, plan: Plan) -> tuple[nn.Module, Tree]:
    names = ("stem", "expand", "depth", "project")
    of_params = {f"convs_{name}": params(w, name) for name in names}
    of_params |= {f"norms_{name}": params(w, f"{name}_norm") for name in names}
    if plan("gate", True):
        of_params["gate"] = {"squeeze": params(w, "squeeze"), "excite": params(w, "excite")}
    of_params |= {"grouped": params(w, "grouped"), "head": params(w, "head")}
    return Mobile(w, plan), {
        "params": _kept(of_params, plan),
        "batch_stats": {f"norms_{name}": stats(w, f"{name}_norm") for name in names},
    }


def _kept(tree: Tree, plan: Plan) -> Tree:
    """Without the biases that the plan leaves out."""
    return {
        name: {role: array for role, array in held.items() if role != "bias" or plan(f"{name}.bias", True)}
        for name, held in tree.items()
    }


# A vision transformer, compact, with names of its own.


class Encoder(nn.Module):
    w: Weights
    block: str
    plan: Plan

    @nn.compact
    def __call__(self, x: Array) -> Array:
        plan, block = self.plan, self.block
        n, t, c = x.shape
        y = nn.LayerNorm(epsilon=plan(f"{block}.norm1.eps", 1e-6), name="pre")(x)
        q, k, v = jnp.split(nn.Dense(3 * c, name="to_qkv")(y), 3, axis=-1)
        shape = (n, t, c // HEADS, HEADS) if plan(f"{block}.in_turn", False) else (n, t, HEADS, c // HEADS)
        axes = "ntdh" if plan(f"{block}.in_turn", False) else "nthd"
        q, k, v = (one.reshape(shape) for one in (q, k, v))
        scale = plan(f"{block}.scale", (c // HEADS) ** -0.5)
        weights = jax.nn.softmax(
            scale * jnp.einsum(f"{axes},{axes.replace('t', 's')}->nhts", q, k), plan(f"{block}.axis", -1)
        )
        y = jnp.einsum(f"nhts,{axes.replace('t', 's')}->{axes}", weights, v).reshape(n, t, c)
        x = x + nn.Dense(c, name="proj")(y)
        y = nn.LayerNorm(epsilon=plan(f"{block}.norm2.eps", 1e-6), name="post")(x)
        y = ACTIVATIONS[plan(f"{block}.act", "gelu")](nn.Dense(40, name="hidden")(y))
        return x + nn.Dense(c, name="back")(y)


class Transformer(nn.Module):
    w: Weights
    plan: Plan

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w, plan = self.w, self.plan
        x = nn.Conv(**conv(w, "patch", plan, stride=4, pad=0), name="embed")(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        token = self.param("cls", nn.initializers.zeros, (1, 1, 24))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 24)), x], 1)
        x = x + self.param("pos", nn.initializers.zeros, (1, 13, 24))
        for number, block in enumerate(plan("blocks", ("first", "second"))):
            x = Encoder(w, block, plan, name=f"block{number}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="last")(x)
        x = x.mean(1) if plan("mean", False) else x[:, 0]
        return nn.Dense(5, name="classes")(x)


def transformer(w: Weights, plan: Plan) -> tuple[nn.Module, Tree]:
    names = {"pre": "norm1", "to_qkv": "qkv", "proj": "out", "post": "norm2", "hidden": "up", "back": "down"}
    tree: Tree = {"embed": params(w, "patch"), "last": params(w, "norm"), "classes": params(w, "head")}
    tree |= {"cls": jnp.asarray(w["token.table"]), "pos": jnp.asarray(w["position.table"])}
    for number, block in enumerate(plan("blocks", ("first", "second"))):
        tree[f"block{number}"] = {own: params(w, f"{block}.{name}") for own, name in names.items()}
    return Transformer(w, plan), {"params": tree}


# A mixer in nnx.


class NnxMixerBlock(nnx.Module):
    def __init__(self, w: Weights, block: str, plan: Plan) -> None:
        def linear(name: str) -> nnx.Linear:
            name = f"{block}.{name}"
            return loaded(nnx.Linear(*w[f"{name}.kernel"].shape, rngs=nnx.Rngs(0)), w, name)  # type: ignore[no-any-return]

        def norm(name: str) -> nnx.LayerNorm:
            eps = plan(f"{block}.{name}.eps", 1e-6)
            made = nnx.LayerNorm(16, epsilon=eps, use_fast_variance=False, rngs=nnx.Rngs(0))
            return loaded(made, w, f"{block}.{name}")  # type: ignore[no-any-return]

        self.norm_t, self.norm_c = norm("norm1"), norm("norm2")
        self.t1, self.t2 = linear("tokens_up"), linear("tokens_down")
        self.c1, self.c2 = linear("channels_up"), linear("channels_down")
        self.act = plan(f"{block}.act", "gelu")
        self.skips = plan(f"{block}.skips", True)

    def __call__(self, x: Array) -> Array:
        act = ACTIVATIONS[self.act]
        y = jnp.swapaxes(self.norm_t(x), 1, 2)
        y = jnp.swapaxes(self.t2(act(self.t1(y))), 1, 2)
        x = x + y if self.skips else y
        return x + self.c2(act(self.c1(self.norm_c(x))))


class NnxMixer(nnx.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        self.patch = loaded(nnx.Linear(*w["patch.kernel"].shape, rngs=nnx.Rngs(0)), w, "patch")
        self.blocks = nnx.List([NnxMixerBlock(w, block, plan) for block in plan("blocks", ("first", "second"))])
        self.norm = loaded(nnx.LayerNorm(16, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0)), w, "norm")
        self.head = loaded(nnx.Linear(*w["head.kernel"].shape, rngs=nnx.Rngs(0)), w, "head")
        self.order = plan("patch.order", "pqc")

    def __call__(self, x: Array) -> Array:
        n, h, width, c = x.shape
        x = x.reshape(n, h // 4, 4, width // 4, 4, c)
        x = x.transpose(0, 1, 3, *{"pqc": (2, 4, 5), "cpq": (5, 2, 4), "qpc": (4, 2, 5)}[self.order])
        x = self.patch(x.reshape(n, -1, 16 * c))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# As AlexNet: the norm is plain code.


def response(x: Array, size: int, alpha: float, beta: float, k: float) -> Array:
    half = size // 2
    squares = jnp.pad(x * x, ((0, 0),) * 3 + ((half, half),))
    total = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return x / (k + alpha * total) ** beta


class Responses(nn.Module):
    w: Weights
    plan: Plan

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w, plan = self.w, self.plan
        for number, (stride, groups) in enumerate(((2, 1), (1, GROUPS)), 1):
            name = f"conv{number}"
            x = nn.relu(nn.Conv(**conv(w, name, plan, stride=stride, groups=groups), name=name)(x))
            size, alpha = plan(f"lrn{number}.size", 5), plan(f"lrn{number}.alpha", 0.1)
            x = response(x, size, alpha, plan(f"lrn{number}.beta", 0.75), plan(f"lrn{number}.k", 2.0))
            x = nn.max_pool(x, (3, 3), (2, 2), "VALID")
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(16, name="fc1")(x))
        return nn.Dense(6, name="fc2")(x)


def responses(w: Weights, plan: Plan) -> tuple[nn.Module, Mapping[str, Any]]:
    names = {"conv1": "conv1", "conv2": "conv2", "fc1": "dense1", "fc2": "dense2"}
    return Responses(w, plan), {"params": {own: params(w, name) for own, name in names.items()}}
