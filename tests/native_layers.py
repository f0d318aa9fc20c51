"""Runs every case of `layer_cases` in one framework: ``python -m tests.native_layers torch results.npz``.

Of each case and size: the output and all slopes in float64 in training, with the mask of stochastic depth given, the
output in eval mode, and that of integers in float32 where the layer is exact. And what stochastic depth makes of 400
images of ones where nobody gives it a mask.
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import numpy as np

from common.names.roles import FLAX, KERAS, PYTORCH
from common.weights.layouts import to_canonical, to_native
from tests.layer_cases import CASES, EVEN, EXACT, ODD
from tests.scripts import unoptimised

MOVED = 0, 3, 1, 2  # from channels last to channels first
BACK = 0, 2, 3, 1


def run(engine):
    """(case, size, dtype) -> arrays by name."""
    one, own = {"torch": (in_torch, torch_draws), "flax": (in_flax, flax_draws), "keras": (in_keras, keras_draws)}[
        engine
    ]
    if engine == "keras":
        check_keras()
    with unoptimised() if engine == "flax" else nullcontext():
        results = {f"own {what}": array for what, array in own(np.ones((400, 2, 2, 3), np.float32)).items()}
        for cases, dtype in ((CASES, "float64"), (EXACT, "float32")):
            for name, case in cases.items():
                for size in (EVEN, ODD):
                    inputs, arrays, slopes, mask = case.drawn(size, dtype)
                    for what, array in one(case.layer, inputs, arrays, slopes, mask).items():
                        results[f"{name}|{size}|{dtype}|{what}"] = array
    return results


def in_torch(layer, inputs, arrays, slopes, mask):
    import torch

    from resnet_torch import layers

    module = torch_module(layer).to(getattr(torch, str(slopes.dtype)))
    state = {
        PYTORCH.array("", layer.kind, role).removeprefix("."): torch.tensor(
            to_native(array, layer, role, "OIHW").copy()
        )
        for role, array in arrays.items()
    }
    module.load_state_dict(module.state_dict() | state)
    x = [torch.tensor(one.transpose(MOVED), requires_grad=True) for one in inputs]
    given = {"": torch.tensor(mask).permute(MOVED)} if layer.kind == "stochastic_depth" else {}
    with layers.given_dropout(module, given):
        # Some of the modules work in place, and a leaf of the graph is not theirs.
        evaluated = module.eval()(*(one * 1 for one in x))
        y = module.train()(*(one * 1 for one in x))
    found = {"output": y.permute(BACK), "eval": evaluated.permute(BACK)}
    parameters = dict(module.named_parameters())
    of_all = torch.autograd.grad(y, [*x, *parameters.values()], torch.tensor(slopes.transpose(MOVED)))
    names = [f"input{i}" for i in range(len(x))]
    roles = {PYTORCH.array("", layer.kind, role).removeprefix("."): role for role in arrays}
    found |= {name: slope.permute(BACK) for name, slope in zip(names, of_all, strict=False)}
    found = {name: tensor.detach().numpy() for name, tensor in found.items()}
    for native, slope in zip(parameters, of_all[len(x) :], strict=True):
        found[roles[native]] = to_canonical(slope.numpy(), layer, roles[native], "OIHW")
    return found


def torch_draws(x):
    import torch

    from resnet_torch.layers import StochasticDepth

    module, x = StochasticDepth(0.3), torch.tensor(x.transpose(MOVED))
    return {"eval": module.eval()(x).numpy()} | {str(i): module.train()(x).numpy() for i in range(2)}


def torch_module(layer):
    import torch
    from torch import nn

    from resnet_torch import layers

    class Cat(nn.Module):
        def forward(self, *x):
            return torch.cat(x, dim=1)

    class Times(nn.Module):
        def forward(self, x, gate):
            return x * gate

    match layer.kind:
        case "conv" | "depthwise":
            options = {"dilation": layer.dilation, "groups": layer.groups, "bias": layer.bias}
            ends = layer.in_channels, layer.out_channels
            return layers.conv2d(*ends, layer.kernel, layer.stride, padding=layer.padding, **options)
        case "pad":
            return nn.ZeroPad2d(layer.amount)
        case "max_pool":
            return layers.max_pool2d(layer.kernel, layer.stride, padding=layer.padding)
        case "average_pool":
            counted = layer.count_padding
            return layers.avg_pool2d(layer.kernel, layer.stride, padding=layer.padding, count_padding=counted)
        case "lrn":
            return layers.local_response_norm(layer.size, alpha=layer.alpha, beta=layer.beta, k=layer.k)
        case "norm":
            options = {"eps": layer.eps, "momentum": layer.momentum, "running_variance": layer.running_variance}
            return layers.batch_norm2d(**options, scale=layer.scale)(layer.channels)
        case "stochastic_depth":
            return layers.StochasticDepth(layer.rate)
        case "affine":
            return layers.Affine(layer.scale, layer.shift)
        case "global_pool":
            return (nn.AdaptiveAvgPool2d if layer.op == "average" else nn.AdaptiveMaxPool2d)(1)
        case "concat":
            return Cat()
        case "gate":
            return Times()
    return layers.ACTIVATIONS[layer.kind]()


def in_keras(layer, inputs, arrays, slopes, mask):
    import keras

    from resnet_keras import backend
    from resnet_keras.layers import with_masks

    keras.config.set_floatx(str(slopes.dtype))
    keras.config.set_dtype_policy(str(slopes.dtype))
    # Any size: what pads a map must not need to know it before it is there.
    x = [keras.Input((*(None if n > 1 else n for n in one.shape[1:3]), one.shape[3])) for one in inputs]
    model = keras.Model(x if len(x) > 1 else x[0], keras_output(layer, *x))
    if layer.kind == "stochastic_depth":
        model = with_masks(model, ["layer"])
        inputs = [*inputs, mask]
    native = {role: KERAS.array("", layer.kind, role).removeprefix("/") for role in arrays}
    variables = {role: getattr(model.get_layer("layer"), name) for role, name in native.items()}
    for role, variable in variables.items():
        variable.assign(to_native(arrays[role], layer, role, "HWCM"))
    roles = {id(variable): role for role, variable in variables.items()}
    trained = [roles[id(variable)] for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]

    def forward(parameters, first, *_):
        # A backend differentiates in its parameters and one batch of images; here other inputs are among the first.
        images = [first, *(parameters[f"input{i}"] for i in range(1, len(x)))]
        fed = fed_to(model, [*images, *(keras.ops.convert_to_tensor(one) for one in inputs[len(images) :])])
        y, _ = model.stateless_call([parameters[role] for role in trained], others, fed, training=True)
        return keras.ops.sum(y * keras.ops.convert_to_tensor(slopes)), y

    tensors = fed_to(model, [keras.ops.convert_to_tensor(one) for one in inputs])
    evaluated = keras.ops.convert_to_numpy(at_any_size(model)(tensors))
    adapter = {"tensorflow": backend._tensorflow, "jax": backend._jax, "torch": backend._torch}[keras.backend.backend()]
    images = [keras.ops.convert_to_tensor(one) for one in inputs[: len(x)]]
    values = {role: keras.ops.stop_gradient(variables[role].value) for role in trained}
    values |= {f"input{i}": image for i, image in enumerate(images) if i}
    _, y, (of_parameters, of_image) = adapter(forward, True)(values, images[0])
    found = {"output": y.detach() if hasattr(y, "detach") else y, "eval": evaluated, "input0": of_image} | of_parameters
    found = {name: keras.ops.convert_to_numpy(one) for name, one in found.items()}
    if "kernel" in found:
        found["kernel"] = to_canonical(found["kernel"], layer, "kernel", "HWCM")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    again.set_weights(model.get_weights())
    assert np.array_equal(keras.ops.convert_to_numpy(again(tensors, training=False)), evaluated), layer.path
    return found


def fed_to(model, tensors):
    """Tensors as the model takes them: one, several, or images with a mask."""
    return tensors[0] if len(tensors) == 1 else type(model.input)(tensors)


def at_any_size(model):
    """The model in eval mode, on TensorFlow with sizes that are not known before, as in `predict`."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return lambda x: model(x, training=False)
    import tensorflow as tf

    shapes = fed_to(model, [tf.TensorSpec(x.shape, x.dtype) for x in model.inputs])
    return tf.function(lambda x: model(x, training=False), input_signature=[shapes])


def keras_draws(x):
    from keras import ops

    from resnet_keras.layers import stochastic_depth

    layer = stochastic_depth(0.3, "drop")
    found = {"eval": layer(x, training=False)} | {str(i): layer(x, training=True) for i in range(2)}
    return {name: ops.convert_to_numpy(one) for name, one in found.items()}


def check_keras():
    """What the cases do not show: our layers with channels first, and a depthwise kernel on its way in and out."""
    import keras

    from common.architectures.layers import DepthwiseConv
    from resnet_keras import layers as own
    from resnet_keras import weights

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    x = np.random.default_rng(0).normal(size=(2, *ODD, 3))
    for make in (
        partial(own.LocalResponseNormalization, 5, 0.3, 0.75, 2.0),
        partial(own.Affine, (1.0, 2.0, 3.0), (0.1, 0.2, 0.3)),
        partial(own.PaddedAveragePooling2D, (3, 2), 2, "same", True),
        partial(own.PaddedAveragePooling2D, (3, 2), 2, "ceil", False),
        partial(own.LowestPadding2D, ((1, 0), (2, 3))),
    ):
        last, first = make(data_format="channels_last"), make(data_format="channels_first")
        y, z = (keras.ops.convert_to_numpy(one) for one in (last(x), first(x.transpose(MOVED).copy())))
        np.testing.assert_allclose(z.transpose(BACK), y, rtol=1e-14)
        assert first.compute_output_shape((2, 3, *ODD)) == z.shape

    class Walk:
        layers = (DepthwiseConv(path="d", inputs=("input",), kernel=3, stride=1, padding="same", in_channels=3),)

    images = keras.Input((None, None, 3))
    options = {"padding": "same", "use_bias": False, "data_format": "channels_last", "name": "layer"}
    model = keras.Model(images, own.depthwise_conv2d(images, 3, **options))
    kernel = np.random.default_rng(0).normal(size=(3, 3, 1, 3))
    with patch.object(weights, "layer_names", lambda spec: {"d": "layer"}):
        weights.load_weights(model, {"d.kernel": kernel}, Walk())
        native = keras.ops.convert_to_numpy(model.get_layer("layer").kernel)
        assert np.array_equal(native, kernel.swapaxes(2, 3))
        assert np.array_equal(weights.export_weights(model, Walk())["d.kernel"], kernel)


def keras_output(layer, *x):
    import keras

    from resnet_keras import layers as own

    named = {"data_format": "channels_last", "name": "layer"}
    match layer.kind:
        case "conv":
            options = {"dilation_rate": layer.dilation, "groups": layer.groups, "use_bias": layer.bias}
            padding = {"padding": layer.padding}
            return own.conv2d(*x, layer.out_channels, layer.kernel, layer.stride, **padding, **options, **named)
        case "depthwise":
            options = {"padding": layer.padding, "use_bias": layer.bias}
            return own.depthwise_conv2d(*x, layer.kernel, layer.stride, **options, **named)
        case "pad":
            return keras.layers.ZeroPadding2D(layer.amount, **named)(*x)
        case "max_pool":
            return own.max_pool2d(*x, layer.kernel, layer.stride, padding=layer.padding, **named)
        case "average_pool":
            options = {"padding": layer.padding, "count_padding": layer.count_padding}
            return own.average_pool2d(*x, layer.kernel, layer.stride, **options, **named)
        case "lrn":
            return own.LocalResponseNormalization(layer.size, layer.alpha, layer.beta, layer.k, **named)(*x)
        case "norm":
            biased = layer.running_variance == "biased"
            norm = keras.layers.BatchNormalization if biased else own.UnbiasedBatchNormalization
            return norm(momentum=layer.momentum, epsilon=layer.eps, scale=layer.scale, name="layer")(*x)
        case "stochastic_depth":
            return own.stochastic_depth(layer.rate, name="layer")(*x)
        case "affine":
            return own.Affine(layer.scale, layer.shift, **named)(*x)
        case "global_pool":
            pool = {"average": keras.layers.GlobalAveragePooling2D, "max": keras.layers.GlobalMaxPooling2D}[layer.op]
            return pool(keepdims=True, **named)(*x)
        case "concat":
            return keras.layers.Concatenate(axis=-1, name="layer")(x)
        case "gate":
            return keras.layers.Multiply(name="layer")(x)
    return keras.layers.Activation(own.ACTIVATIONS[layer.kind], name="layer")(*x)


def in_flax(layer, inputs, arrays, slopes, mask):
    import jax

    jax.config.update("jax_enable_x64", True)
    from flax import linen as nn

    from resnet_flax.layers import given_dropout

    class Net(nn.Module):
        @nn.compact
        def __call__(self, *x, train):
            return flax_output(layer, *x, train=train, dtype=slopes.dtype)

    variables = {"params": {}, "batch_stats": {}}
    for role, array in arrays.items():
        collection, module, name = FLAX.array("layer", layer.kind, role).split("/")
        variables[collection].setdefault(module, {})[name] = array

    def forward(params, inputs):
        given = {("layer",): mask} if layer.kind == "stochastic_depth" else {}
        with given_dropout(given):
            return Net().apply(variables | {"params": params}, *inputs, train=True, mutable=["batch_stats"])[0]

    if slopes.dtype == np.float32:  # of which the output alone is asked
        return {"output": np.asarray(jax.jit(forward)(variables["params"], inputs))}

    @jax.jit
    def both(params, inputs, slopes):
        y, pull = jax.vjp(forward, params, inputs)
        return y, pull(slopes), Net().apply(variables | {"params": params}, *inputs, train=False)

    y, (of_params, of_inputs), evaluated = both(variables["params"], inputs, slopes)
    found = {"output": y, "eval": evaluated} | {f"input{i}": slope for i, slope in enumerate(of_inputs)}
    for role in layer.trained:
        _, module, name = FLAX.array("layer", layer.kind, role).split("/")
        found[role] = of_params[module][name]
    return {name: np.asarray(one) for name, one in found.items()}


def flax_draws(x):
    import jax

    from resnet_flax.layers import stochastic_depth

    def drawn(i):
        return stochastic_depth(0.3, train=True).apply({}, x, rngs={"dropout": jax.random.key(i)})

    return {"eval": stochastic_depth(0.3, train=False).apply({}, x)} | {str(i): drawn(i) for i in range(2)}


def flax_output(layer, *x, train, dtype):
    import jax.numpy as jnp

    from resnet_flax import layers

    dtypes = {"dtype": dtype, "param_dtype": dtype}
    match layer.kind:
        case "conv" | "depthwise":
            options = {"padding": layer.padding, "use_bias": layer.bias, "feature_group_count": layer.groups, **dtypes}
            shape = layer.out_channels, layer.kernel, layer.stride, layer.dilation
            return layers.conv_layer(*shape, **options, name="layer")(*x)
        case "pad":
            return layers.zero_pad(*x, layer.amount)
        case "max_pool":
            return layers.max_pool(*x, layer.kernel, layer.stride, padding=layer.padding)
        case "average_pool":
            options = {"padding": layer.padding, "count_padding": layer.count_padding}
            return layers.avg_pool(*x, layer.kernel, layer.stride, **options)
        case "lrn":
            return layers.local_response_norm(*x, layer.size, alpha=layer.alpha, beta=layer.beta, k=layer.k)
        case "norm":
            options = {"eps": layer.eps, "momentum": layer.momentum, "running_variance": layer.running_variance}
            norm = layers.norm_layer(train=train, axis_name=None, scale=layer.scale, **options, **dtypes)
            return norm(name="layer")(*x)
        case "stochastic_depth":
            return layers.stochastic_depth(layer.rate, train=train, name="layer")(*x)
        case "affine":
            return layers.affine(*x, layer.scale, layer.shift)
        case "global_pool":
            return (jnp.mean if layer.op == "average" else jnp.max)(*x, axis=(1, 2), keepdims=True)
        case "concat":
            return jnp.concatenate(x, axis=-1)
        case "gate":
            return x[0] * x[1]
    return layers.ACTIVATIONS[layer.kind](*x)


if __name__ == "__main__":
    framework, _, engine = sys.argv[1].partition(":")
    os.environ |= {"KERAS_BACKEND": engine or "tensorflow", "JAX_ENABLE_X64": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    np.savez(sys.argv[2], **run(framework))
