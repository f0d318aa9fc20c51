"""The networks in PyTorch: as modules, as `nn.Sequential`, as functions of own parameters, and with einops."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from tests.faults.networks import GROUPS, HEADS, MEAN, STD
from tests.faults.planting import Plan, Weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "none": lambda x: x,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "none": nn.Identity,
}


def parameter(array: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.tensor(np.ascontiguousarray(array)))


def kernel(array: np.ndarray) -> np.ndarray:
    """Of a convolution or a dense layer, as PyTorch has it."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def rows_first(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """A dense kernel behind a map (height, width, channels), for one that is flattened channels first."""
    return array.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(array.shape)


def conv(w: Weights, name: str, plan: Plan, *, stride: int = 1, pad: int | None = None, groups: int = 1) -> nn.Conv2d:
    size = w[f"{name}.kernel"].shape
    bias = f"{name}.bias" in w and plan(f"{name}.bias", True)
    layer = nn.Conv2d(
        size[2] * groups,
        size[3],
        size[:2],
        stride=plan(f"{name}.stride", stride),
        padding=plan(f"{name}.pad", size[0] // 2 if pad is None else pad),
        dilation=plan(f"{name}.dilation", 1),
        groups=groups,
        bias=bias,
    )
    layer.weight = parameter(kernel(w[f"{name}.kernel"]))
    if bias:
        layer.bias = parameter(w[f"{name}.bias"])
    return layer


def dense(w: Weights, name: str, plan: Plan) -> nn.Linear:
    bias = plan(f"{name}.bias", True)
    layer = nn.Linear(*w[f"{name}.kernel"].shape, bias=bias)
    layer.weight = parameter(kernel(w[f"{name}.kernel"]))
    if bias:
        layer.bias = parameter(w[f"{name}.bias"])
    return layer


def batch_norm(w: Weights, name: str, plan: Plan) -> nn.BatchNorm2d:
    width = len(w[f"{name}.scale"])
    layer = nn.BatchNorm2d(width, eps=plan(f"{name}.eps", 1e-5), momentum=plan(f"{name}.momentum", 0.1))
    layer.weight, layer.bias = parameter(w[f"{name}.scale"]), parameter(w[f"{name}.bias"])
    layer.running_mean, layer.running_var = torch.tensor(w[f"{name}.mean"]), torch.tensor(w[f"{name}.var"])
    return layer


def layer_norm(w: Weights, name: str, plan: Plan) -> nn.LayerNorm:
    layer = nn.LayerNorm(len(w[f"{name}.scale"]), eps=plan(f"{name}.eps", 1e-6))
    layer.weight, layer.bias = parameter(w[f"{name}.scale"]), parameter(w[f"{name}.bias"])
    return layer


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


# Residual network, of modules.


class Unit(nn.Module):
    def __init__(self, w: Weights, name: str, plan: Plan, stride: int = 1) -> None:
        super().__init__()
        self.name, self.plan = name, plan
        self.conv1, self.norm1 = conv(w, f"{name}.conv1", plan, stride=stride), batch_norm(w, f"{name}.norm1", plan)
        self.conv2, self.norm2 = conv(w, f"{name}.conv2", plan), batch_norm(w, f"{name}.norm2", plan)
        self.shortcut = nn.Sequential()
        if stride > 1:
            projection = conv(w, f"{name}.projection", plan, stride=stride)
            self.shortcut = nn.Sequential(projection, batch_norm(w, f"{name}.projection_norm", plan))

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.plan(f"{self.name}.act", "relu")]
        y = self.norm2(self.conv2(act(self.norm1(self.conv1(x)))))
        x = self.shortcut(x)
        if self.plan(f"{self.name}.detach", False):
            y = y.detach()
        last = ACTIVATIONS[self.plan(f"{self.name}.last", "relu")]
        if self.plan(f"{self.name}.before", False):
            return last(y) + x
        return last(x + y)


class Residual(nn.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.stem, self.stem_norm = conv(w, "stem", plan, stride=2), batch_norm(w, "stem_norm", plan)
        self.pool = nn.MaxPool2d(3, 2, padding=plan("pool.pad", 1), ceil_mode=plan("pool.ceil", False))
        if plan("pool.average", False):
            self.pool = nn.AvgPool2d(3, 2, 1)
        units = {name: Unit(w, name, plan, stride=1 if name != "three" else 2) for name in ("one", "two", "three")}
        if plan("two.shares", False):
            units["two"].conv1 = units["one"].conv1
        self.units = nn.ModuleList([units[name] for name in plan("units", ("one", "two", "three"))])
        self.head = dense(w, "head", plan)

    def forward(self, x: Tensor) -> Tensor:
        x = rounded(x, self.plan("stem.input", None))
        x = ACTIVATIONS[self.plan("stem.act", "relu")](self.stem_norm(self.stem(x)))
        x = self.pool(x)
        for unit in self.units:
            x = unit(x)
        return self.head(rounded(x.mean((2, 3)), self.plan("head.input", None)))


def rounded(x: Tensor, dtype: str | None) -> Tensor:
    return x if dtype is None else x.to(getattr(torch, dtype)).to(x.dtype)


# Plain network, as nn.Sequential and as a function of own parameters.


def sequential(w: Weights, plan: Plan) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("normalise", Normalise()),
        ("0", conv(w, "conv1", plan)),
        ("1", batch_norm(w, "norm", plan)),
        ("2", MODULES[plan("conv1.act", "relu")]()),
        ("3", nn.AvgPool2d(2) if plan("pool1.average", False) else nn.MaxPool2d(2)),
        ("4", conv(w, "conv2", plan, stride=2)),
        ("5", MODULES[plan("conv2.act", "relu")]()),
        ("6", nn.AvgPool2d(3, 2, padding=1, count_include_pad=plan("pool2.counted", True))),
        ("7", nn.Flatten()),
        ("8", dense({**w, "dense1.kernel": rows_first(w["dense1.kernel"], (3, 2, 12))}, "dense1", plan)),
        ("9", MODULES[plan("dense1.act", "relu")]()),
        ("10", nn.Dropout(0.5)),
        ("11", dense(w, "dense2", plan)),
        ("12", nn.Softmax(dim=1)),
    ]
    if plan("softmax", True) is False:
        layers = layers[:-1]
    return nn.Sequential(OrderedDict(layers))


def tf32(x: Tensor) -> Tensor:
    """Rounded to 11 significant bits."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(fraction * 2**11), exponent - 11).to(x.dtype)


class Filter(nn.Module):
    """A convolution with names of its own."""

    def __init__(self, w: Weights, name: str, plan: Plan, stride: int = 1) -> None:
        super().__init__()
        self.filters, self.offset = parameter(kernel(w[f"{name}.kernel"])), parameter(w[f"{name}.bias"])
        self.stride, self.pad = plan(f"{name}.stride", stride), plan(f"{name}.pad", 1)
        self.tf32 = plan(f"{name}.tf32", False)
        self.times = plan(f"{name}.bias_times", 1)

    def forward(self, x: Tensor) -> Tensor:
        filters = tf32(self.filters) if self.tf32 else self.filters
        x = F.conv2d(tf32(x) if self.tf32 else x, filters, None, self.stride, self.pad)
        for _ in range(self.times):
            x = x + self.offset[:, None, None]
        return x


class Affine(nn.Module):
    def __init__(self, w: Weights, name: str, plan: Plan) -> None:
        super().__init__()
        self.gain, self.shift = parameter(w[f"{name}.scale"]), parameter(w[f"{name}.bias"])
        self.register_buffer("mu", torch.tensor(w[f"{name}.mean"]))
        self.register_buffer("sigma2", torch.tensor(w[f"{name}.var"]))
        self.eps, self.batch = plan(f"{name}.eps", 1e-5), plan(f"{name}.batch", False)
        self.frozen = plan(f"{name}.frozen", False)

    def forward(self, x: Tensor) -> Tensor:
        training = (self.training or self.batch) and not self.frozen
        return F.batch_norm(x, self.mu, self.sigma2, self.gain, self.shift, training, 0.1, self.eps)


class Product(nn.Module):
    def __init__(self, w: Weights, name: str, plan: Plan) -> None:
        super().__init__()
        self.matrix, self.offset = parameter(w[f"{name}.kernel"]), parameter(w[f"{name}.bias"])
        self.biased = plan(f"{name}.bias", True)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.offset if self.biased else x @ self.matrix


class Functional(nn.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.register_buffer("centre", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("spread", torch.tensor(STD)[:, None, None])
        self.entry, self.affine = Filter(w, "conv1", plan), Affine(w, "norm", plan)
        self.deeper = Filter(w, "conv2", plan, stride=2)
        first = w["dense1.kernel"] if plan("flatten.last", False) else rows_first(w["dense1.kernel"], (3, 2, 12))
        self.hidden, self.scores = Product({**w, "dense1.kernel": first}, "dense1", plan), Product(w, "dense2", plan)
        self.register_buffer("dropped", torch.tensor(np.random.default_rng(3).random((4, 16)) < 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan("bgr", False):
            x = x.flip(1)
        if plan("transposed", False):
            x = x.flip(2)
        x = x * plan("range", 1)
        for _ in range(plan("normalised", 1)):
            x = (x - self.centre) / self.spread
        x = self.affine(self.entry(x))
        x = F.max_pool2d(ACTIVATIONS[plan("conv1.act", "relu")](x), 2)
        x = ACTIVATIONS[plan("conv2.act", "relu")](self.deeper(x))
        if plan("pool2.max", False):
            x = F.max_pool2d(x, 3, 2, padding=1)
        else:
            x = F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=plan("pool2.counted", True))
        x = x.permute(0, 2, 3, 1).flatten(1) if plan("flatten.last", False) else x.flatten(1)
        x = ACTIVATIONS[plan("dense1.act", "relu")](self.hidden(x))
        if plan("dropout", False):
            x = torch.where(self.dropped, 0.0, 2.0 * x)
        x = self.scores(F.dropout(x, 0.5, self.training))
        for _ in range(plan("softmaxes", 1)):
            x = F.softmax(x, -1)
        return x


# Depthwise and grouped convolutions, with a gate.


class Mobile(nn.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        act = MODULES[plan("act", "silu")]

        def unit(name: str, activation: Callable[[], nn.Module] | None, **settings: Any) -> nn.Sequential:
            layers = [conv(w, name, plan, **settings), batch_norm(w, f"{name}_norm", plan)]
            return nn.Sequential(*layers, *([activation()] if activation else []))

        self.stem, self.expand = unit("stem", act, stride=2), unit("expand", act)
        self.depth = unit("depth", act, stride=plan("depth.stride", 2), groups=16)
        self.fc1, self.fc2 = dense(w, "squeeze", plan), dense(w, "excite", plan)
        self.project = unit("project", None)
        self.grouped = conv(w, "grouped", plan, groups=GROUPS)
        self.head = dense(w, "head", plan)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        x = self.depth(self.expand(self.stem(x)))
        means = x.amax((2, 3)) if plan("gate.max", False) else x.mean((2, 3))
        gate = self.fc2(F.silu(self.fc1(means)))
        if plan("gate", True):
            x = x * ACTIVATIONS[plan("gate.act", "sigmoid")](gate)[:, :, None, None]
        x = self.project(x)
        x = x + F.relu(self.grouped(x))
        return self.head(x.mean((2, 3)))


# A vision transformer.


class Attention(nn.Module):
    def __init__(self, w: Weights, name: str, plan: Plan) -> None:
        super().__init__()
        self.name, self.plan = name, plan
        self.qkv, self.out = dense(w, f"{name}.qkv", plan), dense(w, f"{name}.out", plan)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        scale = self.plan(f"{self.name}.scale", (c // HEADS) ** -0.5)
        weights = (scale * q @ k.transpose(-2, -1)).softmax(self.plan(f"{self.name}.axis", -1))
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))


class Encoder(nn.Module):
    def __init__(self, w: Weights, name: str, plan: Plan) -> None:
        super().__init__()
        self.norm1, self.norm2 = layer_norm(w, f"{name}.norm1", plan), layer_norm(w, f"{name}.norm2", plan)
        self.attention = Attention(w, name, plan)
        self.fc1, self.fc2 = dense(w, f"{name}.up", plan), dense(w, f"{name}.down", plan)
        self.act = ACTIVATIONS[plan(f"{name}.act", "gelu")]
        self.skips = plan(f"{name}.skips", True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x))
        x = x + y if self.skips else y
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.patch = conv(w, "patch", plan, stride=4, pad=0)
        self.cls, self.pos = parameter(w["token.table"]), parameter(w["position.table"])
        self.layers = nn.ModuleList([Encoder(w, name, plan) for name in plan("blocks", ("first", "second"))])
        self.norm, self.head = layer_norm(w, "norm", plan), dense(w, "head", plan)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = (x.transpose(2, 3) if self.plan("patch.columns", False) else x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        x = x + self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


# A mixer, with einops.


class Across(nn.Module):
    """A perceptron over tokens or channels, beside which its input passes."""

    def __init__(self, w: Weights, block: str, of: str, plan: Plan) -> None:
        super().__init__()
        number = 1 if of == "tokens" else 2
        act = nn.GELU(approximate=plan(f"{block}.{of}.gelu", "none"))
        inner: list[nn.Module] = [dense(w, f"{block}.{of}_up", plan), act, dense(w, f"{block}.{of}_down", plan)]
        if of == "tokens":
            inner = [Rearrange("b t c -> b c t"), *inner, Rearrange("b c t -> b t c")]
        self.norm, self.mix = layer_norm(w, f"{block}.norm{number}", plan), nn.Sequential(*inner)
        self.skips = plan(f"{block}.{of}.skips", True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.norm(x))
        return x + y if self.skips else y


def mixer(w: Weights, plan: Plan) -> nn.Module:
    patches = plan("patches", "b c (h p) (w q) -> b (h w) (p q c)")
    layers: list[nn.Module] = [Rearrange(patches, p=4, q=4), dense(w, "patch", plan)]
    for block in plan("blocks", ("first", "second")):
        layers += [Across(w, block, "tokens", plan), Across(w, block, "channels", plan)]
    return nn.Sequential(
        *layers, layer_norm(w, "norm", plan), Reduce("b t c -> b c", plan("mean", "mean")), dense(w, "head", plan)
    )


# Branches and concatenation.


class Branches(nn.Module):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        names = ("down", "left", "middle1", "middle2", "right", "bottom", "up")
        self.convs = nn.ModuleDict({name: conv(w, name, plan, stride=1 + (name == "bottom")) for name in names})
        self.norm = nn.GroupNorm(plan("bottom_norm.groups", GROUPS), 8, eps=plan("bottom_norm.eps", 1e-5))
        self.norm.weight, self.norm.bias = parameter(w["bottom_norm.scale"]), parameter(w["bottom_norm.bias"])

    def forward(self, x: Tensor) -> Tensor:
        plan, convs = self.plan, self.convs
        skip = F.relu(convs["down"](x))
        counted = plan("right.counted", False)
        branches = {
            "left": convs["left"](skip),
            "middle": convs["middle2"](F.relu(convs["middle1"](skip))),
            "right": convs["right"](F.avg_pool2d(skip, 3, 1, 1, count_include_pad=counted)),
        }
        wide = F.relu(torch.cat([branches[name] for name in plan("order", ("left", "middle", "right"))], 1))
        deep = F.relu(self.norm(convs["bottom"](wide)))
        deep = rearrange(deep.repeat_interleave(4, 1), "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
        joined = (wide, deep) if plan("join.skip_first", True) else (deep, wide)
        return convs["up"](torch.cat(joined, 1))


# As AlexNet, with local response norms.


def responses(w: Weights, plan: Plan) -> nn.Module:
    def norm(name: str) -> nn.Module:
        size, alpha = plan(f"{name}.size", 5), plan(f"{name}.alpha", 0.5)
        return nn.LocalResponseNorm(size, alpha=alpha, beta=plan(f"{name}.beta", 0.75), k=plan(f"{name}.k", 2.0))

    features = nn.Sequential(
        OrderedDict(
            conv1=conv(w, "conv1", plan, stride=2),
            relu1=nn.ReLU(),
            lrn1=norm("lrn1"),
            pool1=nn.MaxPool2d(3, 2),
            conv2=conv(w, "conv2", plan, groups=GROUPS),
            relu2=nn.ReLU(),
            lrn2=norm("lrn2"),
            pool2=nn.MaxPool2d(3, 2),
        )
    )
    first = {**w, "dense1.kernel": rows_first(w["dense1.kernel"], (3, 4, 12))}
    classifier = nn.Sequential(
        OrderedDict(fc1=dense(first, "dense1", plan), relu=nn.ReLU(), fc2=dense(w, "dense2", plan))
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
