"""The networks in Keras: functional, with other names, and subclassed."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from tests.faults.networks import GROUPS, HEADS, MEAN, STD, UNET
from tests.faults.planting import Plan, Weights

_TANH = float(np.sqrt(2 / np.pi))
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": ops.relu,
    "relu6": ops.relu6,
    "leaky": ops.leaky_relu,
    "silu": ops.silu,
    # TensorFlow's own have their constants in float32.
    "gelu": lambda x: 0.5 * x * (1.0 + ops.erf(x / number(np.sqrt(2.0), x))),
    "own_gelu_tanh": lambda x: ops.gelu(x, approximate=True),
    "own_gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + ops.tanh(number(_TANH, x) * (x + number(0.044715, x) * x**3))),
    "sigmoid": ops.sigmoid,
    "hard_sigmoid": ops.hard_sigmoid,
    "none": lambda x: x,
}


def number(value: float, like: Any) -> np.ndarray:
    """As an array of that dtype: TensorFlow makes float32 of a plain one first."""
    return np.array(value, keras.backend.standardize_dtype(like.dtype))


def load(layer: Any, w: Weights, name: str) -> None:
    """By Keras' own names of what a built layer holds."""
    roles = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    for variable in layer.weights:
        role = roles.get(variable.name, variable.name)
        if role in ("kernel", "bias", "scale", "mean", "var"):
            variable.assign(w[f"{name}.{role}"].reshape(tuple(variable.shape)))


def load_all(model: Any, w: Weights, names: dict[str, str]) -> Any:
    """`names` are of weights, by the names of layers."""
    for own, name in names.items():
        layer = model.get_layer(own)
        load(layer, w, name)
    return model


def conv(w: Weights, name: str, plan: Plan, *, stride: int = 1, groups: int = 1, **settings: Any) -> dict[str, Any]:
    size = w[f"{name}.kernel"].shape
    return {
        "filters": size[3],
        "kernel_size": size[:2],
        "strides": plan(f"{name}.stride", stride),
        "padding": plan(f"{name}.pad", "same" if stride == 1 else "valid"),
        "dilation_rate": plan(f"{name}.dilation", 1),
        "groups": groups,
        "use_bias": f"{name}.bias" in w and plan(f"{name}.bias", True),
        "dtype": plan(f"{name}.dtype", None),
        **settings,
    }


# Plain network, functional.


def functional(w: Weights, plan: Plan) -> Any:
    given = keras.Input((18, 17, 3), name="picture")
    x = given[..., ::-1] if plan("bgr", False) else given
    x = x * plan("range", 1.0) if plan("range", 1.0) != 1.0 else x
    x = ops.flip(x, 2) if plan("transposed", False) else x
    for _ in range(plan("normalised", 1)):
        x = (x - MEAN) / STD
    x = layers.Conv2D(**conv(w, "conv1", plan), name="entry")(x)
    eps, momentum = plan("norm.eps", 1e-5), plan("norm.momentum", 0.9)
    x = layers.BatchNormalization(
        epsilon=eps, momentum=momentum, trainable=plan("norm.trainable", True), name="entry_bn"
    )(x)
    x = ACTIVATIONS[plan("conv1.act", "relu")](x)
    pool = layers.AveragePooling2D if plan("pool1.average", False) else layers.MaxPooling2D
    x = pool(2, name="shrink")(x)
    if plan("conv2.pad", "valid") == "valid":
        x = layers.ZeroPadding2D(1, name="border")(x)
    act = {"activation": plan("conv2.act", "relu")}
    x = layers.Conv2D(**conv(w, "conv2", plan, stride=2, **act), name="deeper")(x)
    if plan("pool2.counted", True):
        x = layers.AveragePooling2D(3, 2, name="mean")(layers.ZeroPadding2D(1, name="border2")(x))
    else:
        x = layers.AveragePooling2D(3, 2, padding="same", name="mean")(x)
    x = layers.Flatten(name="row")(x)
    x = layers.Dense(16, activation=plan("dense1.act", "relu"), name="hidden")(x)
    x = layers.Dropout(0.5, name="drop")(x)
    x = layers.Dense(10, name="scores")(x)
    for number in range(plan("softmaxes", 1)):
        x = layers.Softmax(name=f"probabilities{number or ''}")(x)
    model = keras.Model(given, x, name="plain")
    names = {"entry": "conv1", "entry_bn": "norm", "deeper": "conv2", "hidden": "dense1", "scores": "dense2"}
    return load_all(model, w, names)


# Branches and concatenation, functional.


def branches(w: Weights, plan: Plan) -> Any:
    def made(name: str, **settings: Any) -> Any:
        return layers.Conv2D(**conv(w, name, plan, **settings), name=f"k_{name}")

    given = keras.Input(UNET.image)
    skip = made("down", activation=plan("down.act", "relu"))(given)
    middle = made("middle2")(made("middle1", activation="relu")(skip))
    pool = layers.MaxPooling2D if plan("right.max", False) else layers.AveragePooling2D
    if plan("right.counted", False):
        pooled = layers.AveragePooling2D(3, 1, name="blur")(layers.ZeroPadding2D(1)(skip))
    else:
        pooled = pool(3, 1, padding="same", name="blur")(skip)
    found = {"left": made("left")(skip), "middle": middle, "right": made("right")(pooled)}
    order = plan("order", ("left", "middle", "right"))
    wide = layers.ReLU(name="wide")(layers.Concatenate(name="mixed")([found[name] for name in order]))
    norm = layers.GroupNormalization(
        plan("bottom_norm.groups", GROUPS), epsilon=plan("bottom_norm.eps", 1e-5), name="k_norm"
    )
    deep = layers.ReLU(name="deep")(norm(made("bottom", stride=2)(layers.ZeroPadding2D(1, name="frame")(wide))))
    deep = layers.UpSampling2D(2, name="double")(deep)
    parts = [wide, deep] if plan("join.skip_first", True) else [deep, wide]
    model = keras.Model(given, made("up")(layers.Concatenate(name="joined")(parts)), name="branches")
    convs = ("down", "left", "middle1", "middle2", "right", "bottom", "up")
    return load_all(model, w, {f"k_{name}": name for name in convs} | {"k_norm": "bottom_norm"})


# Depthwise convolutions, subclassed.


class Gate(layers.Layer):
    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(**settings)
        self.plan = plan
        self.reduce, self.expand = layers.Dense(4, activation="silu", name="reduce"), layers.Dense(16, name="expand")

    def call(self, x: Any) -> Any:
        means = ops.max(x, (1, 2)) if self.plan("gate.max", False) else ops.mean(x, (1, 2))
        gate = ACTIVATIONS[self.plan("gate.act", "sigmoid")](self.expand(self.reduce(means)))
        return x * gate[:, None, None] if self.plan("gate", True) else x


class Mobile(keras.Model):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__(name="mobile")
        self.plan = plan
        self.pad = layers.ZeroPadding2D(1)
        self.entry = layers.Conv2D(**conv(w, "stem", plan, stride=2), name="entry")
        self.wide = layers.Conv2D(**conv(w, "expand", plan), name="wide")
        self.depth = layers.DepthwiseConv2D(
            3, plan("depth.stride", 2), padding=plan("depth.pad", "valid"), use_bias=False, name="depth"
        )
        self.narrow = layers.Conv2D(**conv(w, "project", plan), name="narrow")
        names = ("entry", "wide", "depth", "narrow")
        owners = ("stem", "expand", "depth", "project")
        self.norms = [
            layers.BatchNormalization(epsilon=plan(f"{of}_norm.eps", 1e-5), momentum=0.9, name=f"bn_{name}")
            for name, of in zip(names, owners, strict=True)
        ]
        self.gate = Gate(plan, name="gate")
        self.grouped = layers.Conv2D(**conv(w, "grouped", plan, groups=GROUPS, activation="relu"), name="grouped")
        self.head = layers.Dense(6, name="head")

    def call(self, x: Any, training: bool = False) -> Any:
        act = ACTIVATIONS[self.plan("act", "silu")]
        x = act(self.norms[0](self.entry(self.pad(x)), training=training))
        x = act(self.norms[1](self.wide(x), training=training))
        if self.plan("depth.pad", "valid") == "valid":
            x = self.pad(x)
        x = self.gate(act(self.norms[2](self.depth(x), training=training)))
        x = self.norms[3](self.narrow(x), training=training)
        x = x + self.grouped(x)
        return self.head(ops.mean(x, (1, 2)))


def mobile(w: Weights, plan: Plan) -> Any:
    model = Mobile(w, plan)
    model(np.zeros((1, 20, 19, 3), "float32"))
    held = {
        model.entry: "stem",
        model.wide: "expand",
        model.narrow: "project",
        model.gate.reduce: "squeeze",
        model.gate.expand: "excite",
        model.grouped: "grouped",
        model.head: "head",
    }
    for layer, name in held.items():
        load(layer, w, name)
    depth = w["depth.kernel"].transpose(0, 1, 3, 2)  # (height, width, in, multiplier)
    model.depth.weights[0].assign(depth)
    for norm, name in zip(model.norms, ("stem", "expand", "depth", "project"), strict=True):
        load(norm, w, f"{name}_norm")
    return model


# A vision transformer, subclassed.


class Attention(layers.Layer):
    """Keras' own rounds its scale to float32."""

    def __init__(self, block: str, plan: Plan, **settings: Any) -> None:
        super().__init__(**settings)
        self.query, self.key, self.value = (layers.Dense(24, name=name) for name in ("q", "k", "v"))
        self.out = layers.Dense(24, name="o")
        self.heads, self.axis = plan(f"{block}.heads", HEADS), plan(f"{block}.axis", -1)

    def call(self, x: Any) -> Any:
        depth = 24 // self.heads
        q, k, v = (ops.reshape(one(x), (-1, 13, self.heads, depth)) for one in (self.query, self.key, self.value))
        weights = ops.softmax(ops.einsum("nthd,nshd->nhts", q, k) / number(np.sqrt(depth), q), self.axis)
        return self.out(ops.reshape(ops.einsum("nhts,nshd->nthd", weights, v), (-1, 13, 24)))


class Encoder(layers.Layer):
    def __init__(self, block: str, plan: Plan, **settings: Any) -> None:
        super().__init__(**settings)
        self.ln1 = layers.LayerNormalization(epsilon=plan(f"{block}.norm1.eps", 1e-6), name="ln1")
        self.keras_own = plan(f"{block}.attention", "own") == "keras"
        if self.keras_own:
            self.attend = layers.MultiHeadAttention(HEADS, 24 // HEADS, name="attend")
        else:
            self.attend = Attention(block, plan, name="attend")
        self.ln2 = layers.LayerNormalization(epsilon=plan(f"{block}.norm2.eps", 1e-6), name="ln2")
        self.fc1, self.fc2 = layers.Dense(40, name="fc1"), layers.Dense(24, name="fc2")
        self.act = ACTIVATIONS[plan(f"{block}.act", "gelu")]
        self.skips = plan(f"{block}.skips", True)

    def build(self, shape: Any) -> None:
        super().build(shape)

    def call(self, x: Any) -> Any:
        y = self.ln1(x)
        y = self.attend(y, y) if self.keras_own else self.attend(y)
        x = x + y if self.skips else y
        return x + self.fc2(self.act(self.fc1(self.ln2(x))))


class Transformer(keras.Model):
    def __init__(self, w: Weights, plan: Plan) -> None:
        super().__init__(name="transformer")
        self.patch = layers.Conv2D(**conv(w, "patch", plan, stride=4), name="patch")
        self.token = self.add_weight(shape=(1, 1, 24), name="token")
        self.position = self.add_weight(shape=(1, 13, 24), name="position")
        self.blocks = [Encoder(name, plan, name=f"encoder_{name}") for name in plan("blocks", ("first", "second"))]
        self.norm, self.head = layers.LayerNormalization(epsilon=1e-6, name="norm"), layers.Dense(5, name="head")
        self.columns = plan("patch.columns", False)

    def call(self, x: Any) -> Any:
        x = self.patch(x)
        x = ops.swapaxes(x, 1, 2) if self.columns else x
        x = ops.reshape(x, (-1, 12, 24))
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, 24))
        x = ops.concatenate([token, x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def transformer(w: Weights, plan: Plan) -> Any:
    model = Transformer(w, plan)
    model(np.zeros((1, 12, 16, 3), "float32"))
    model.token.assign(w["token.table"])
    model.position.assign(w["position.table"])
    for layer, name in ((model.patch, "patch"), (model.norm, "norm"), (model.head, "head")):
        load(layer, w, name)
    for encoder, block in zip(model.blocks, plan("blocks", ("first", "second")), strict=True):
        held = {"ln1": "norm1", "ln2": "norm2", "fc1": "up", "fc2": "down"}
        for own, name in held.items():
            load(getattr(encoder, own), w, f"{block}.{name}")
        kernels, biases = np.split(w[f"{block}.qkv.kernel"], 3, 1), np.split(w[f"{block}.qkv.bias"], 3)
        own = encoder.attend
        names = ("query", "key", "value", "out")
        if encoder.keras_own:
            names = ("_query_dense", "_key_dense", "_value_dense", "_output_dense")
        parts = [getattr(own, name) for name in names]
        kernels, biases = [*kernels, w[f"{block}.out.kernel"]], [*biases, w[f"{block}.out.bias"]]
        for dense, kernel, bias in zip(parts, kernels, biases, strict=True):
            dense.kernel.assign(kernel.reshape(tuple(dense.kernel.shape)))
            dense.bias.assign(bias.reshape(tuple(dense.bias.shape)))
    return model
