"""The table of planted faults."""

from importlib import import_module
from typing import Any

import numpy as np

from tests.faults.networks import NETWORKS
from tests.faults.planting import Edit, Fault, Model, Plan, Twice, bfloat16, changed, initial, swapped

MODELS = {
    "torch modules": Model(network="residual", module="torch_models", make="Residual"),
    "linen compact": Model(network="residual", module="flax_models", make="compact"),
    "nnx": Model(network="residual", module="flax_models", make="NnxResidual"),
    "torch sequential": Model(network="plain", module="torch_models", make="sequential"),
    "torch functional": Model(network="plain", module="torch_models", make="Functional"),
    "keras functional": Model(network="plain", module="keras_models", make="functional"),
    "torch mobile": Model(network="mobile", module="torch_models", make="Mobile"),
    "linen setup": Model(network="mobile", module="flax_models", make="mobile"),
    "keras subclass": Model(network="mobile", module="keras_models", make="mobile"),
    "torch transformer": Model(network="vit", module="torch_models", make="Transformer"),
    "linen transformer": Model(network="vit", module="flax_models", make="transformer"),
    "keras transformer": Model(network="vit", module="keras_models", make="transformer"),
    "torch einops": Model(network="mixer", module="torch_models", make="mixer"),
    "nnx mixer": Model(network="mixer", module="flax_models", make="NnxMixer"),
    "torch branches": Model(network="unet", module="torch_models", make="Branches"),
    "keras branches": Model(network="unet", module="keras_models", make="branches"),
    "torch responses": Model(network="lrn", module="torch_models", make="responses"),
    "linen responses": Model(network="lrn", module="flax_models", make="responses"),
}
CLEAN = (
    ("torch modules", "linen compact"),
    ("torch modules", "nnx"),
    ("nnx", "linen compact"),
    ("torch sequential", "torch functional"),
    ("torch functional", "keras functional"),
    ("keras functional", "torch sequential"),
    ("torch mobile", "linen setup"),
    ("linen setup", "keras subclass"),
    ("torch transformer", "linen transformer"),
    ("keras transformer", "torch transformer"),
    ("torch einops", "nnx mixer"),
    ("torch branches", "keras branches"),
    ("torch responses", "linen responses"),
)

# A running variance is unbiased in PyTorch alone: of batch norms, models of one framework are compared in training.
ALL = ("eval", "train", "grad")
BOTH = ("float64", "float32")


def _reshaped(kernel: np.ndarray) -> np.ndarray:
    """(out, in, height, width) as it lies, read as (height, width, in, out)."""
    return kernel.transpose(*range(kernel.ndim - 1, kernel.ndim - 3, -1), *range(kernel.ndim - 2)).reshape(kernel.shape)


def _in_turn(kernel: np.ndarray) -> np.ndarray:
    """What two groups make, one of each in turn."""
    return kernel.reshape(*kernel.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(kernel.shape)


def _rows_last(kernel: np.ndarray) -> np.ndarray:
    """Rows of a map of 3 by 2 by 12 as if it had been flattened channels first."""
    return kernel.reshape(12, 3, 2, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)


def _both(*edits: Edit) -> Edit:
    def edit(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for one in edits:
            weights = one(weights)
        return weights

    return edit


def _fault(name: str, between: str, cause: str, layer: str, **settings: Any) -> Fault:
    reference, port = between.split(" > ")
    return Fault(name=name, reference=reference, port=port, cause=cause, layer=layer, **settings)


_MODULES, _COMPACT, _NNX = "torch modules", "linen compact", "nnx"
_SEQUENTIAL, _FUNCTIONAL, _KERAS = "torch sequential", "torch functional", "keras functional"

FAULTS = (
    # Padding, strides, dilation
    _fault("SAME", f"{_FUNCTIONAL} > {_KERAS}", "padding", "deeper", plan={"conv2.pad": "same"}),
    _fault("SAME in a stem", f"{_MODULES} > {_COMPACT}", "padding", "stem", plan={"stem.pad": "SAME"}),
    _fault("valid", f"{_MODULES} > {_NNX}", "padding", "stem", plan={"stem.pad": 0}),
    _fault("padding of a pool", f"{_MODULES} > {_COMPACT}", "padding", "Unit_0/Conv_0", plan={"pool.pad": "SAME"}),
    _fault("ceil", f"{_NNX} > {_MODULES}", "pool_ceil", "units.0.conv1", plan={"pool.pad": 0, "pool.ceil": True}),
    _fault(
        "borders not counted", f"{_FUNCTIONAL} > {_SEQUENTIAL}", "pool_counted", "hidden", plan={"pool2.counted": False}
    ),
    _fault(
        "borders counted", "torch branches > keras branches", "pool_counted", "k_right", plan={"right.counted": True}
    ),
    _fault(
        "stride on the other layer",
        f"{_MODULES} > {_COMPACT}",
        "stride",
        "units.2.conv1",
        plan={"three.conv1.stride": 1, "three.conv2.stride": 2},
    ),
    _fault(
        "dilation",
        f"{_MODULES} > {_MODULES}",
        "dilation",
        "units.0.conv2",
        plan={"one.conv2.dilation": 2, "one.conv2.pad": 2},
        also=("padding+dilation",),
        why="it pads otherwise too, so that the map keeps its size",
    ),
    # Kernels
    _fault(
        "transposed",
        f"{_COMPACT} > {_NNX}",
        "kernel_transposed",
        "blocks/1/second",
        weights=changed("two.conv2.kernel", lambda k: k.swapaxes(2, 3)),
    ),
    _fault(
        "height for width",
        f"{_MODULES} > {_COMPACT}",
        "kernel_transposed",
        "Unit_1/Conv_0",
        weights=changed("two.conv1.kernel", lambda k: k.swapaxes(0, 1)),
    ),
    _fault(
        "transposed dense",
        "torch transformer > linen transformer",
        "kernel_transposed",
        "block1/proj",
        weights=changed("second.out.kernel", np.transpose),
    ),
    _fault(
        "flipped",
        f"{_KERAS} > {_SEQUENTIAL}",
        "kernel_flipped",
        "4",
        weights=changed("conv2.kernel", lambda k: k[::-1, ::-1]),
    ),
    _fault(
        "reshaped",
        f"{_FUNCTIONAL} > {_KERAS}",
        "kernel_transposed",
        "entry",
        weights=changed("conv1.kernel", _reshaped),
    ),
    _fault(
        "groups in turn",
        "torch mobile > linen setup",
        "groups_interleaved",
        "grouped",
        weights=_both(changed("grouped.kernel", _in_turn), changed("grouped.bias", _in_turn)),
    ),
    _fault(
        "rows channels first",
        f"{_FUNCTIONAL} > {_KERAS}",
        "flatten_order",
        "hidden",
        weights=changed("dense1.kernel", _rows_last),
    ),
    _fault(
        "flattened channels last",
        f"{_KERAS} > {_FUNCTIONAL}",
        "flatten_order",
        "hidden",
        plan={"flatten.last": True},
        weights=changed("dense1.kernel", _rows_last),
    ),
    _fault("patches channels first", "torch einops > nnx mixer", "axes_swapped", "patch", plan={"patch.order": "cpq"}),
    # Biases
    _fault("bias missing", f"{_SEQUENTIAL} > {_KERAS}", "bias_missing", "deeper", plan={"conv2.bias": False}),
    _fault(
        "bias of a dense layer missing",
        "keras branches > torch branches",
        "bias_missing",
        "convs.up",
        plan={"up.bias": False},
    ),
    _fault("bias twice", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "bias_twice", "entry", plan={"conv1.bias_times": 2}),
    # Norms
    _fault("eps", f"{_SEQUENTIAL} > {_KERAS}", "eps", "entry_bn", plan={"norm.eps": 1e-3}),
    _fault(
        "eps of a layer norm",
        "linen transformer > torch transformer",
        "eps",
        "layers.1.norm2",
        plan={"second.norm2.eps": 1e-5},
    ),
    _fault("momentum", f"{_COMPACT} > {_NNX}", "momentum", "stem_norm", plan={"stem_norm.momentum": 0.1}, modes=ALL),
    _fault("unbiased variance", f"{_NNX} > {_MODULES}", "variance_unbiased", "stem_norm", modes=ALL),
    _fault("biased variance", f"{_SEQUENTIAL} > {_KERAS}", "variance_biased", "entry_bn", modes=ALL),
    _fault(
        "batch statistics", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "batch_statistics", "affine", plan={"norm.batch": True}
    ),
    _fault(
        "running statistics",
        f"{_COMPACT} > {_COMPACT}",
        "running_statistics",
        "Unit_1/BatchNorm_0",
        plan={"two.norm1.running": True},
        modes=ALL,
    ),
    _fault(
        "scale and bias",
        f"{_MODULES} > {_NNX}",
        "scale_bias_swapped",
        "blocks/0/second_norm",
        weights=swapped(("one.norm2.scale", "one.norm2.bias")),
    ),
    _fault(
        "mean and variance",
        f"{_MODULES} > {_COMPACT}",
        "mean_var_swapped",
        "Unit_1/BatchNorm_1",
        weights=swapped(("two.norm2.mean", "two.norm2.var")),
    ),
    _fault("groups of a norm", "torch branches > keras branches", "groups", "k_norm", plan={"bottom_norm.groups": 4}),
    # Arrays
    _fault(
        "never loaded",
        f"{_NNX} > {_MODULES}",
        "never_loaded",
        "units.1.norm2",
        weights=initial("two.norm2.scale", "two.norm2.bias", "two.norm2.mean", "two.norm2.var"),
    ),
    _fault(
        "kernel never loaded",
        "linen setup > torch mobile",
        "never_loaded",
        "grouped",
        weights=initial("grouped.kernel", "grouped.bias"),
    ),
    _fault(
        "arrays of another norm",
        f"{_MODULES} > {_COMPACT}",
        "arrays_swapped",
        "Unit_0/BatchNorm_0",
        weights=swapped(*((f"one.norm1.{role}", f"two.norm1.{role}") for role in ("scale", "bias", "mean", "var"))),
    ),
    _fault(
        "means of another norm",
        f"{_MODULES} > {_NNX}",
        "arrays_swapped",
        "stem_norm",
        weights=swapped(*((f"stem_norm.{role}", f"one.norm2.{role}") for role in ("mean", "var"))),
    ),
    # Activations
    _fault("ReLU6", f"{_COMPACT} > {_NNX}", "activation", "blocks/1/first", plan={"one.last": "relu6"}),
    _fault("leaky ReLU", f"{_KERAS} > {_SEQUENTIAL}", "activation", "10", plan={"dense1.act": "leaky"}),
    _fault("SiLU", f"{_FUNCTIONAL} > {_KERAS}", "activation", "deeper", plan={"conv1.act": "silu"}),
    _fault(
        "ReLU for SiLU", "torch mobile > keras subclass", "activation", "wide", plan={"act": "relu"}, modes=("eval",)
    ),
    _fault(
        "GELU's tanh form",
        "torch transformer > linen transformer",
        "activation",
        "block0/back",
        plan={"first.act": "gelu_tanh"},
    ),
    _fault("exact GELU", "nnx mixer > torch einops", "activation", "2.mix.3", plan={"first.tokens.gelu": "tanh"}),
    _fault("GELU in a stem", f"{_MODULES} > {_COMPACT}", "activation", "Unit_0/Conv_0", plan={"stem.act": "gelu"}),
    _fault(
        "no activation", f"{_COMPACT} > {_MODULES}", "activation_missing", "units.1.conv2", plan={"two.act": "none"}
    ),
    _fault(
        "before the addition",
        f"{_MODULES} > {_NNX}",
        "activation_before_addition",
        "blocks/2/first",
        plan={"two.before": True},
    ),
    _fault("fused activation", "torch branches > keras branches", "activation", "k_down", plan={"down.act": "silu"}),
    # Pools, responses, gates, softmax, dropout
    _fault(
        "average for maximum",
        f"{_MODULES} > {_COMPACT}",
        "average_for_maximum",
        "Unit_0/Conv_0",
        plan={"pool.average": True},
    ),
    _fault(
        "maximum for average",
        "torch branches > keras branches",
        "average_for_maximum",
        "k_right",
        plan={"right.max": True},
    ),
    _fault("alpha", "torch responses > linen responses", "lrn", "conv2", plan={"lrn1.alpha": 0.5}),
    _fault("size", "torch responses > linen responses", "lrn", "fc1", plan={"lrn2.size": 3, "lrn2.alpha": 0.5 / 3}),
    _fault(
        "hard gate",
        "torch mobile > linen setup",
        "gate",
        "convs_project",
        plan={"gate.act": "hard_sigmoid"},
        also=("activation",),
        why="it is the gate's activation",
    ),
    _fault("no gate", "linen setup > torch mobile", "gate", "project", plan={"gate": False}),
    _fault("softmax twice", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "softmax_twice", "", plan={"softmaxes": 2}),
    _fault("no softmax", f"{_SEQUENTIAL} > {_KERAS}", "softmax_missing", "", plan={"softmaxes": 0}),
    _fault(
        "softmax over queries",
        "linen transformer > keras transformer",
        "softmax_axis",
        "encoder_first/attend",
        plan={"first.axis": -2},
    ),
    _fault(
        "scale of attention",
        "torch transformer > linen transformer",
        "scale_factor",
        "block1/proj",
        plan={"second.scale": 24**-0.5},
    ),
    _fault(
        "channels of heads in turn",
        "torch transformer > linen transformer",
        "groups_interleaved",
        "block0/proj",
        plan={"first.in_turn": True},
    ),
    _fault("dropout on", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "dropout_on", "scores", plan={"dropout": True}),
    # The input
    _fault("BGR", f"{_FUNCTIONAL} > {_KERAS}", "input_bgr", "entry", plan={"bgr": True}),
    _fault(
        "0..255",
        f"{_KERAS} > {_FUNCTIONAL}",
        "input_range",
        "entry",
        plan={"range": 255.0},
        also=("input_normalised",),
        why="normalised pixels of 0..255 have another mean for every channel",
    ),
    _fault("normalised twice", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "input_normalised", "entry", plan={"normalised": 2}),
    _fault("not normalised", f"{_SEQUENTIAL} > {_KERAS}", "input_normalised", "entry", plan={"normalised": 0}),
    _fault(
        "transposed input", f"{_SEQUENTIAL} > {_FUNCTIONAL}", "input_transposed", "entry", plan={"transposed": True}
    ),
    # Branches and blocks
    _fault(
        "order of branches",
        "torch branches > keras branches",
        "order",
        "convs.bottom",
        plan={"order": ("middle", "left", "right")},
        also=("axes_swapped",),
    ),
    _fault("skip behind", "keras branches > torch branches", "order", "convs.up", plan={"join.skip_first": False}),
    _fault(
        "skip missing",
        "torch transformer > keras transformer",
        "branch_missing",
        "encoder_second/ln2",
        plan={"second.skips": False},
    ),
    _fault(
        "skip missing in a mixer",
        "nnx mixer > torch einops",
        "branch_missing",
        "blocks/0/norm_c",
        plan={"first.tokens.skips": False},
    ),
    _fault("shared layer", f"{_COMPACT} > {_NNX}", "shared_layer", "Unit_1/Conv_0", plan={"two.shares": True}),
    _fault(
        "layer shared in the reference",
        f"{_MODULES} > {_MODULES}",
        "shared_layer",
        "units.1.conv1",
        plan={"two.shares": True},
    ),
    _fault(
        "block extra",
        f"{_MODULES} > {_MODULES}",
        "block_extra",
        "units.2",
        plan={"units": ("one", "two", "two", "three")},
    ),
    _fault("block missing", f"{_MODULES} > {_COMPACT}", "block_missing", "Unit_1", plan={"units": ("one", "three")}),
    _fault(
        "blocks in another order",
        f"{_MODULES} > {_NNX}",
        "block_order",
        "blocks/0",
        plan={"units": ("two", "one", "three")},
        also=("arrays_swapped",),
        why="their arrays are exchanged",
    ),
    _fault(
        "encoder missing", "linen transformer > torch transformer", "block_missing", "norm", plan={"blocks": ("first",)}
    ),
    # Precision and gradients
    _fault(
        "bfloat16 in a layer",
        f"{_MODULES} > {_COMPACT}",
        "precision",
        "Unit_1/Conv_0",
        plan={"two.conv1.dtype": "bfloat16"},
        dtypes=BOTH,
    ),
    _fault(
        "bfloat16 input", f"{_COMPACT} > {_MODULES}", "precision", "head", plan={"head.input": "bfloat16"}, dtypes=BOTH
    ),
    _fault(
        "TF32 inside",
        f"{_SEQUENTIAL} > {_FUNCTIONAL}",
        "precision",
        "deeper",
        plan={"conv2.tf32": True},
        modes=("eval",),
    ),
    _fault("kernel in bfloat16", f"{_MODULES} > {_NNX}", "precision", "stem", weights=changed("stem.kernel", bfloat16)),
    _fault(
        "Keras' attention",
        "torch transformer > keras transformer",
        "precision",
        "encoder_first/attend",
        plan={"first.attention": "keras"},
    ),
    _fault(
        "TensorFlow's GELU",
        "torch transformer > keras transformer",
        "precision",
        "layers.1.fc2",
        plan={"second.act": "own_gelu"},
    ),
    _fault(
        "TensorFlow's tanh form",
        "torch transformer > keras transformer",
        "activation",
        "layers.0.fc2",
        plan={"first.act": "own_gelu_tanh"},
    ),
    _fault("detached", f"{_MODULES} > {_MODULES}", "detached", "units.1.norm2", plan={"two.detach": True}),
    _fault("detached shortcut", f"{_COMPACT} > {_NNX}", "detached", "blocks/2/shortcut", plan={"three.detach": True}),
)


TWICE = (
    Twice(
        name="eps and before the addition",
        reference=_MODULES,
        port=_COMPACT,
        causes=(("eps", "stem_norm"), ("activation_before_addition", "units.2.conv1")),
        plan={"stem_norm.eps": 1e-3, "two.before": True},
    ),
    Twice(
        name="bias twice and rows channels first",
        reference=_SEQUENTIAL,
        port=_FUNCTIONAL,
        causes=(("bias_twice", "entry"), ("flatten_order", "hidden")),
        plan={"conv1.bias_times": 2},
        weights=changed("dense1.kernel", _rows_last),
    ),
    Twice(
        name="GELU's tanh form and a transposed kernel",
        reference="torch transformer",
        port="keras transformer",
        causes=(("activation", "layers.0.fc2"), ("kernel_transposed", "layers.1.attention.out")),
        plan={"first.act": "gelu_tanh"},
        weights=changed("second.out.kernel", np.transpose),
    ),
    Twice(
        name="eps and a hard gate",
        reference="torch mobile",
        port="keras subclass",
        causes=(("eps", "stem.1"), ("gate", "project.0")),
        plan={"stem_norm.eps": 1e-3, "gate.act": "hard_sigmoid"},
        modes=("eval",),
    ),
    Twice(
        name="borders counted and other groups",
        reference="torch branches",
        port="keras branches",
        causes=(("pool_counted", "convs.right"), ("groups", "norm")),
        plan={"right.counted": True, "bottom_norm.groups": 4},
    ),
)
FAULTS_BY_NAME = {fault.name: fault for fault in FAULTS}


def made(key: str, fault: Fault | Twice | None = None) -> tuple[Any, Plan]:
    """A model, and the plan it was made by."""
    model = MODELS[key]
    weights = NETWORKS[model.network].weights()
    plan = Plan(fault.plan if fault else {})
    if fault and fault.weights:
        weights = fault.weights(weights)
    make = getattr(import_module(f"tests.faults.{model.module}"), model.make)
    found = make(weights, plan)
    if model.module == "torch_models":
        found.eval()
    return found, plan


def images(key: str) -> np.ndarray:
    """As the model takes them."""
    model = MODELS[key]
    found = NETWORKS[model.network].images()
    return np.ascontiguousarray(found.transpose(0, 3, 1, 2)) if model.module == "torch_models" else found
