"""Defects planted in the PyTorch backend. What each must be caught by stands in catalogue.py."""

from importlib import import_module
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_torch import backend as probe
from resnet_torch import layers
from resnet_torch.layers import SqueezeExcitation
from tests.mutants.planting import after_build, in_loading, not_loaded, replaced


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@after_build
def eps(model: Any) -> None:
    for norm in _norms(model):
        norm.eps = 1.1e-5


@after_build
def momentum_as_decay(model: Any) -> None:
    for norm in _norms(model):
        norm.momentum = 1 - norm.momentum


@after_build
def stride_on_the_other_convolution(model: Any) -> None:
    block = model.layer2[0]
    block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


@after_build
def stem_without_relu(model: Any) -> None:
    model.relu = nn.Identity()


@after_build
def same_padding_in_the_stem(model: Any) -> None:
    model.conv1.padding = (0, 0)
    model.conv1.register_forward_pre_hook(lambda module, inputs: F.pad(inputs[0], (2, 3, 2, 3)))


@after_build
def pool_with_ceil_mode(model: Any) -> None:
    model.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)


@after_build
def bgr(model: Any) -> None:
    model.conv1.register_forward_pre_hook(lambda module, inputs: inputs[0].flip(1))


@after_build
def bfloat16_in_one_layer(model: Any) -> None:
    conv = model.layer2[0].conv2
    if conv.weight.dtype == torch.float32:
        narrow = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: narrow(x.bfloat16().float(), weight, bias)


@after_build
def tf32_in_one_layer(model: Any) -> None:
    """What a GPU does to float32 where TF32 is allowed: 10 bits of mantissa in each factor."""
    conv = model.layer2[0].conv3
    if conv.weight.dtype == torch.float32:
        exact = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: exact(_tf32(x), _tf32(weight), bias)


def _tf32(x: Tensor) -> Tensor:
    scale = 2.0**13 + 1
    return x * scale - (x * scale - x)


@after_build
def shortcut_detached(model: Any) -> None:
    block = model.layer2[1]

    def forward(x: Tensor) -> Tensor:
        out = block.relu(block.bn1(block.conv1(x)))
        out = block.relu(block.bn2(block.conv2(out)))
        return block.relu(block.bn3(block.conv3(out)) + x.detach())

    block.forward = forward


@after_build
def norms_stay_in_eval_mode(model: Any) -> None:
    for norm in _norms(model):
        norm.register_forward_pre_hook(lambda module, inputs: module.eval() and None)


@after_build
def maximum_for_the_average(model: Any) -> None:
    if isinstance(model.avgpool, nn.AdaptiveAvgPool2d):
        model.avgpool = nn.AdaptiveMaxPool2d((1, 1))


@after_build
def zeros_on_both_sides(model: Any) -> None:
    shortcut = model.layer2[0].downsample
    half = shortcut.extra // 2
    shortcut.forward = lambda x: F.pad(x[:, :, ::2, ::2], [0, 0, 0, 0, half, half])


@after_build
def odd_pixels_in_the_shortcut(model: Any) -> None:
    shortcut = model.layer2[0].downsample
    shortcut.forward = lambda x: F.pad(x[:, :, 1::2, 1::2], [0, 0, 0, 0, 0, shortcut.extra])


@after_build
def dilation_forgotten(model: Any) -> None:
    conv = model.layer2[1].conv2
    conv.dilation = conv.padding = (1, 1)


@after_build
def norm_over_half_the_batch(model: Any) -> None:
    """The statistics of the first images alone, as of one process of several that train together."""
    if not isinstance(model.bn1, nn.BatchNorm2d):
        return
    norm, exact = model.bn1, model.bn1.forward

    def forward(x: Tensor) -> Tensor:
        if not norm.training:
            return exact(x)
        half = x[: len(x) // 2]
        exact(half)
        variance, mean = torch.var_mean(half.detach(), (0, 2, 3), correction=0)
        return F.batch_norm(x, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)

    norm.forward = forward


@after_build
def output_of_the_neighbour(model: Any) -> None:
    conv = model.layer2[0].conv2
    if conv.weight.dtype == torch.float64:
        conv.register_forward_hook(lambda module, inputs, output: output + 1e-9 * output.roll(1, 0))


loss_is_the_sum = replaced(probe.F, "cross_entropy", lambda x, y: F.nll_loss(F.log_softmax(x, 1), y, reduction="sum"))


biased_variance = replaced(layers.nn, "BatchNorm2d", layers.BiasedBatchNorm2d)


@in_loading
def kernel_transposed(weights: dict[str, Any]) -> dict[str, Any]:
    name = "stages.1.blocks.0.conv2.kernel"
    return weights | {name: weights[name].transpose(1, 0, 2, 3)}


@in_loading
def kernel_reshaped(weights: dict[str, Any]) -> dict[str, Any]:
    """An equal-size reshape from HWIO to OIHW, where a transpose is due."""
    kernel = weights["stem.conv.kernel"]
    return weights | {"stem.conv.kernel": kernel.reshape(kernel.transpose(3, 2, 0, 1).shape).transpose(2, 3, 1, 0)}


@in_loading
def gammas_swapped(weights: dict[str, Any]) -> dict[str, Any]:
    a, b = "stages.0.blocks.0.norm1.scale", "stages.0.blocks.0.norm2.scale"
    return weights | ({a: weights[b], b: weights[a]} if a in weights else {})


@in_loading
def beta_off_by_a_thousandth(weights: dict[str, Any]) -> dict[str, Any]:
    name = "stages.1.blocks.0.norm2.bias"
    return weights | ({name: weights[name] * 1.001} if name in weights else {})


@in_loading
def flattened_channels_first(weights: dict[str, Any]) -> dict[str, Any]:
    kernel = weights["head.fc.kernel"]
    swapped = kernel.reshape(-1, 64, kernel.shape[1]).swapaxes(0, 1)
    return weights | {"head.fc.kernel": swapped.reshape(kernel.shape)}


@not_loaded
def statistics_not_loaded(weights: dict[str, Any]) -> dict[str, Any]:
    initial = {".mean": 0.0, ".var": 1.0}
    return {n: a * 0 + initial[n[n.rindex(".") :]] if n.endswith((".mean", ".var")) else a for n, a in weights.items()}


@not_loaded
def weights_stored_in_float32(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: array.astype("float32") for name, array in weights.items()}


@in_loading
def dense_bias_shifted(weights: dict[str, Any]) -> dict[str, Any]:
    return weights | {"head.fc.bias": np.roll(weights["head.fc.bias"], 1)}


# Forms of ResNet.


@after_build
def gate_without_its_sigmoid(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, SqueezeExcitation):
            module.scale_activation = nn.Identity()


@after_build
def pixels_picked_in_place_of_the_average(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.AvgPool2d):
            module.forward = lambda x: x[:, :, ::2, ::2]


@after_build
def shared_norm_averages_once(model: Any) -> None:
    """The statistics of the second use are lost."""
    for block in (*model.layer1, *model.layer2) if _norms(model) else ():
        momenta = cycle((block.bn1.momentum, 0.0))
        block.bn1.register_forward_pre_hook(
            lambda norm, inputs, momenta=momenta: setattr(norm, "momentum", next(momenta))
        )


# VGG.


@in_loading
def dense_rows_channels_first(weights: dict[str, Any]) -> dict[str, Any]:
    """Rows in the order of channel, height and width, as PyTorch flattens, where they are of height, width, channel."""
    kernel = weights["head.fc1.kernel"]
    rows = kernel.reshape(9, -1, kernel.shape[1]).swapaxes(0, 1)
    return weights | {"head.fc1.kernel": rows.reshape(kernel.shape)}


@after_build
def adaptive_pool_resized(model: Any) -> None:
    """An interpolation to the same size."""
    if isinstance(model.avgpool, nn.AdaptiveAvgPool2d):
        model.avgpool.forward = lambda x: F.interpolate(x, (3, 3), mode="bilinear")


@after_build
def no_relu_between_dense_layers(model: Any) -> None:
    model.classifier[1] = nn.Identity()


@after_build
def softmax_twice(model: Any) -> None:
    if model.softmax is not None:
        model.softmax = nn.Sequential(nn.Softmax(dim=1), nn.Softmax(dim=1))


# ResNet with pre-activation.


@after_build
def relu_after_the_addition(model: Any) -> None:
    model.layers[0][0].register_forward_hook(lambda module, inputs, output: output.relu())


@after_build
def no_relu_at_the_end(model: Any) -> None:
    model.relu = nn.Identity()


@after_build
def no_norm_at_the_end(model: Any) -> None:
    if isinstance(model.bn, nn.BatchNorm2d):
        exact = model.bn.forward
        model.bn.forward = lambda x: x + 0 * exact(x)  # its arrays stay in the graph


@after_build
def projection_of_the_sum(model: Any) -> None:
    """The shortcut branches off before the pre-activation."""
    model.layers[0][0].projects = False


@after_build
def identity_behind_the_activation(model: Any) -> None:
    model.layers[0][1].projects = True


# DenseNet.


def _new_first(block: nn.ModuleDict) -> Any:
    def forward(x: Tensor) -> Tensor:
        for layer in block.values():
            x = torch.cat([layer([x]), x], 1)
        return x

    return forward


@after_build
def new_features_first(model: Any) -> None:
    """The same channels in another order, so that every shape fits."""
    for module in model.features:
        if isinstance(module, nn.ModuleDict):
            module.forward = _new_first(module)


@after_build
def relu_in_place_of_the_features(model: Any) -> None:
    """What a layer reads is rectified for all that read it after."""
    for name, module in model.named_modules():
        if name.endswith("relu1"):
            module.inplace = True


@after_build
def transition_padded(model: Any) -> None:
    """As tutorials do: the map grows by a ring of the bias."""
    model.features.transition1.conv.padding = (1, 1)


@after_build
def no_relu_behind_the_last_norm(model: Any) -> None:
    model.relu = nn.Identity()


# LeNet and AlexNet.


@after_build
def no_activation_between_dense_layers(model: Any) -> None:
    for i in (3, 4):
        setattr(model, f"relu{i}", nn.Identity())


@after_build
def pools_by_maximum(model: Any) -> None:
    """As in most of today's ports."""
    for name in ("pool1", "pool2"):
        setattr(model, name, nn.MaxPool2d(2, 2))


def _response_norms(model: nn.Module) -> list[nn.LocalResponseNorm]:
    return [module for module in model.modules() if isinstance(module, nn.LocalResponseNorm)]


@after_build
def alpha_divided_twice(model: Any) -> None:
    """The paper's number handed to PyTorch, which divides it by the size of the window."""
    for norm in _response_norms(model):
        norm.alpha /= norm.size


@after_build
def k_of_one(model: Any) -> None:
    """PyTorch's default, and Caffe's."""
    for norm in _response_norms(model):
        norm.k = 1.0


@in_loading
def groups_interleaved(weights: dict[str, Any]) -> dict[str, Any]:
    """Grouped kernels taken as if the group were innermost in the output channels."""
    kernel = weights["features.conv2.kernel"]
    half = kernel.shape[-1] // 2
    turned = kernel.reshape(*kernel.shape[:-1], 2, half).swapaxes(-1, -2).reshape(kernel.shape)
    return weights | {"features.conv2.kernel": turned}


def _as_they_are(spec: Any, masks: Any, device: Any) -> Any:
    """Masks of a flattened map in canonical order, whose channels are the last: PyTorch has flattened them first."""
    return {layers.nodes(spec)[path].module: torch.tensor(mask, device=device) for path, mask in masks.items()}


dropout_mask_channels_last = replaced(probe, "native_masks", _as_they_are)


@after_build
def dropout_behind_the_dense_layers(model: Any) -> None:
    """As in the paper, where torchvision has it before: the modules of a classifier that moved by one."""
    classifier, own = model.classifier, model.classifier.forward
    moved = nn.Sequential(*(classifier[i] for i in (1, 2, 0, 4, 5, 3, 6)))
    classifier.forward = lambda x: moved(x) if classifier.training else own(x)


# EfficientNet.


@after_build
def relu6_for_silu(model: Any) -> None:
    """As a much-read port has it: names, shapes and counts are all the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.SiLU):
                setattr(module, name, nn.ReLU6(inplace=True))


@after_build
def residual_missing(model: Any) -> None:
    """Of integers too little would be left to be compared: the exact twin keeps its own."""
    block = model.features[2][1]
    if isinstance(block.stochastic_depth, layers.StochasticDepth):
        block.forward = lambda x: block.stochastic_depth(block.block(x))


same_padding_of_an_even_size = replaced(
    layers,
    "pad_same",
    lambda x, height, width, stride, dilation, value: F.pad(
        x, [(width - stride) // 2, (width - 1) // 2, (height - stride) // 2, (height - 1) // 2], value=value
    ),
)


@after_build
def deviations_taken_for_variances(model: Any) -> None:
    """The root of what Keras' published files call variance, and no second division by it."""
    if isinstance(model.normalize, layers.Affine):
        own, stds = model.normalize, model.spec.input_std
        own.scale = [scale * std**0.5 for scale, std in zip(own.scale, stds, strict=True)]
        own.shift = [shift * std**0.5 for shift, std in zip(own.shift, stds, strict=True)]


# Inception v3.


@after_build
def average_of_the_borders_the_other_way(model: Any) -> None:
    """torchvision's weights in Keras' network, and the reverse."""
    for module in model.modules():
        if isinstance(module, nn.AvgPool2d):
            module.count_include_pad = not module.count_include_pad


@after_build
def average_in_the_last_module(model: Any) -> None:
    """torchvision's network with the weights by which the Frechet Inception distance is defined."""
    if model.spec.branch_pool == "average":
        model.Mixed_7c.avg_pool2d = nn.AvgPool2d(3, 1, padding=1)


@after_build
def columns_for_rows(model: Any) -> None:
    """1x7 where 7x1 belongs: the same padding, the same number of parameters."""
    conv = model.Mixed_6b.branch7x7_2.conv
    own = conv.forward
    conv.forward = lambda x: own(x.transpose(2, 3)).transpose(2, 3)


@after_build
def auxiliary_windows_adapt(model: Any) -> None:
    """Windows that divide the map into as many cells begin elsewhere."""
    if model.AuxLogits is not None:
        model.AuxLogits.avg_pool2d = nn.AdaptiveAvgPool2d((5, 5))


# GoogLeNet.


@after_build
def input_transformed_twice(model: Any) -> None:
    if model.spec.transform_input:
        once = model.transform.forward
        model.transform.forward = lambda x: once(once(x))


googlenet = import_module("resnet_torch.googlenet")  # of the package it is the builder that has this name
_modules = googlenet._modules


def _second_first(spec: Any) -> dict[str, nn.Module]:
    """Each head reads the map of the other."""
    modules = _modules(spec)
    return modules | ({name: modules.pop(name) for name in ("aux2", "aux1")} if spec.aux else {})


auxiliary_heads_swapped = replaced(googlenet, "_modules", _second_first)


@after_build
def auxiliary_outputs_swapped(model: Any) -> None:
    own = model.forward

    def forward(x: Any) -> Any:
        found = own(x)
        return type(found)(found[0], found[2], found[1]) if isinstance(found, tuple) else found

    model.forward = forward


# Equivalents.


@after_build
def channels_last_memory(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


@after_build
def zeros_around_the_pool(model: Any) -> None:
    model.maxpool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))


@after_build
def addition_the_other_way_round(model: Any) -> None:
    for stage in (model.layer1, model.layer2):
        for block in stage:
            block.forward = _shortcut_first(block)


def _shortcut_first(block: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        out = block.relu(block.bn1(block.conv1(x)))
        out = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(out)))))
        return block.relu((x if block.downsample is None else block.downsample(x)) + out)

    return forward
