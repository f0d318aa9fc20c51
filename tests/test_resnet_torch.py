"""The PyTorch backend: torchvision's names, every field of a spec, exact weights, and taps that are what they say."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402

from written import save_weights

import resnet_torch
from common import weights as canonical
from common.architectures import find, running
from common.architectures.layers import INPUT, output_shapes
from common.architectures.resnet import VARIANTS, ResNetSpec
from common.errors import BackendError, InputError, SpecError, WeightsError
from resnet_torch import backend as probe
from resnet_torch.layers import BiasedBatchNorm2d, SameConv2d
from resnet_torch.resnet import nodes
from resnet_torch.weights import slots

SMALL = ResNetSpec(block="bottleneck", blocks=(2, 1, 1), widths=(8, 12, 16), expansion=2, stem_width=6, classes=5)
BASIC = ResNetSpec(block="basic", blocks=(1, 2, 1), widths=(6, 8, 10), stem_width=6, classes=5)

# One spec for each value of each field, several at a time where they do not touch.
SPECS = {
    "bottleneck": SMALL,
    "basic": BASIC,
    "basic, stride in conv2": BASIC.replace(stride_in="conv2"),
    "bottleneck, stride in conv1": SMALL.replace(stride_in="conv1"),
    "one stage": SMALL.replace(blocks=(1,), widths=(8,)),
    "five stages": BASIC.replace(blocks=(1,) * 5, widths=(4, 6, 8, 10, 12), stem_pool=False),
    "groups": SMALL.replace(groups=4, width_per_group=32),
    "all SAME, biased": SMALL.replace(
        stem_padding="same", pool_padding="same", block_padding="same", running_variance="biased"
    ),
    "SAME stem with an even kernel": BASIC.replace(stem_padding="same", stem_kernel=4, stem_stride=3),
    "SAME stem narrower than its stride": BASIC.replace(stem_padding="same", stem_kernel=1, stem_stride=3),
    "valid stem and pool": SMALL.replace(stem_padding="valid", pool_padding="valid"),
    "ceil": SMALL.replace(pool_padding="ceil", bn_eps=1e-3, bn_momentum=0.99),
    "zero-pad shortcut": BASIC.replace(shortcut="zero_pad", stem_kernel=3, stem_stride=1, stem_pool=False),
    "biases, projection without norm": BASIC.replace(conv_bias=True, shortcut_norm=False),
    "no norm": SMALL.replace(norm=False, conv_bias=True),
    "dilated": SMALL.replace(replace_stride_with_dilation=(True, True)),
    "dilated SAME in conv1": SMALL.replace(
        replace_stride_with_dilation=(False, True), block_padding="same", stride_in="conv1"
    ),
    "dilated basic": BASIC.replace(replace_stride_with_dilation=(True, True)),
    "dilated basic in conv2": BASIC.replace(replace_stride_with_dilation=(True, True), stride_in="conv2"),
    "max head, softmax": SMALL.replace(head_pool="max", head="softmax", in_channels=2),
    "flattened head": SMALL.replace(head_pool="flatten", input_size=(33, 46), in_channels=4),
    "pooled features": SMALL.replace(head="none"),
    "feature map": SMALL.replace(head="none", head_pool="none", in_channels=1),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
# A compiler takes a second for each.
every_third_spec = pytest.mark.parametrize(
    "spec",
    [pytest.param(s, marks=[pytest.mark.long] if i % 3 else [], id=name) for i, (name, s) in enumerate(SPECS.items())],
)


@pytest.fixture(scope="module")
def backend():
    return probe.start(1)


def batch(spec, size=None, count=3, seed=0):
    generator = np.random.default_rng(seed)
    height, width = size or spec.input_size or (33, 46)
    images = generator.standard_normal((count, height, width, spec.in_channels))
    return images, generator.integers(0, spec.classes, count)


def random_model(spec, dtype="float64"):
    model = resnet_torch.from_spec(spec).to(getattr(torch, dtype))
    resnet_torch.load_weights(model, canonical.randomize(spec))
    return model


# --- The walk in plain NumPy: what every tap must be ---------------------------------------------------------------


def reference(spec, weights, images, training):
    """Every tap and running statistic of the spec, from the definitions of its layers."""
    taps, statistics = {INPUT: images}, {}
    for layer in spec.layers:
        x, *others = (taps[path] for path in layer.inputs)
        arrays = {name.removeprefix(f"{layer.path}."): weights[name] for name in layer.arrays}
        if layer.kind == "conv":
            y = convolution(layer, x, **arrays)
        elif layer.kind == "norm":
            mean, var, count = arrays["mean"], arrays["var"], x.size // x.shape[-1]
            if training:
                kept = layer.momentum
                mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
                stored = var * count / (count - 1) if layer.running_variance == "unbiased" else var
                statistics[f"{layer.path}.mean"] = kept * arrays["mean"] + (1 - kept) * mean
                statistics[f"{layer.path}.var"] = kept * arrays["var"] + (1 - kept) * stored
            y = (x - mean) / np.sqrt(var + layer.eps) * arrays["scale"] + arrays["bias"]
        elif layer.kind == "relu":
            y = np.maximum(x, 0)
        elif layer.kind == "add":
            y = x + others[0]
        elif layer.kind == "max_pool":
            y = windows(layer, x, -np.inf).max(axis=(-1, -2))
        elif layer.kind == "zero_pad":
            y = x[:, :: layer.stride, :: layer.stride]
            y = np.pad(y, ((0, 0), (0, 0), (0, 0), (0, layer.channels - y.shape[-1])))
        elif layer.kind == "global_pool":
            y = (x.mean if layer.op == "average" else x.max)(axis=(1, 2))
        elif layer.kind == "flatten":
            y = x.reshape(len(x), -1)
        elif layer.kind == "dense":
            y = x @ arrays["kernel"] + arrays["bias"]
        else:
            assert layer.kind == "softmax"
            y = np.exp(x - x.max(axis=1, keepdims=True))
            y = y / y.sum(axis=1, keepdims=True)
        taps[layer.path] = y
    return taps, statistics


def windows(layer, x, fill):
    x = np.pad(x, ((0, 0), *layer.spatial_padding(x.shape[1:]), (0, 0)), constant_values=fill)
    extent = layer.dilation * (layer.kernel - 1) + 1
    view = np.lib.stride_tricks.sliding_window_view(x, (extent, extent), axis=(1, 2))
    return view[:, :: layer.stride, :: layer.stride, :, :: layer.dilation, :: layer.dilation]


def convolution(layer, x, kernel, bias=0.0):
    view = windows(layer, x, 0.0)
    view = view.reshape(*view.shape[:3], layer.groups, -1, layer.kernel, layer.kernel)
    kernel = kernel.reshape(*kernel.shape[:3], layer.groups, -1)
    output = np.einsum("nhwgcij,ijcgo->nhwgo", view, kernel, optimize=True)
    return output.reshape(*output.shape[:3], -1) + bias


def distance(a, b):
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@each_spec
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_every_tap_and_statistic_is_what_the_walk_defines(backend, spec, training):
    weights = canonical.randomize(spec)
    images, labels = batch(spec)
    results = backend.run(random_model(spec), images, labels, training=training, gradients=False)
    taps, statistics = reference(spec, weights, images, training)
    expected = {f"tap/{layer.path}" for layer in spec.layers} | {f"stat/{name}" for name in statistics} | {"loss"}
    assert results.keys() == expected
    for name, value in (*taps.items(), *statistics.items()):
        if name != INPUT:
            found = results[f"tap/{name}" if name in taps else f"stat/{name}"]
            assert found.dtype == np.float64
            assert distance(found, value) < (1e-12 if training else 1e-13), name
    output = taps[spec.layers[-1].path]
    if spec.head == "none":
        loss = np.mean(output**2) / 2
    else:
        probabilities = np.exp(output - output.max(axis=1, keepdims=True)) if spec.head == "logits" else output
        probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
        loss = -np.log(probabilities[range(len(labels)), labels]).mean()
    assert results["loss"] == pytest.approx(loss, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups", "flattened head", "all SAME, biased", "zero-pad shortcut", "no norm"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_the_slope_of_the_loss_in_canonical_layout(backend, name, training):
    spec = SPECS[name]
    model, weights = random_model(spec), canonical.randomize(spec)
    images, labels = batch(spec)
    results = backend.run(model, images, labels, training=training, gradients=True)
    parameters = {name: shape for layer in spec.layers for name, shape in layer.parameters.items()}
    assert {key for key in results if key.startswith("grad/")} == {"grad/input", *(f"grad/{n}" for n in parameters)}
    # One random direction through all tensors at once would hide one in another: each has its own.
    generator = np.random.default_rng(1)
    for tensor, shape in [*parameters.items(), (INPUT, images.shape)]:
        gradient = results[f"grad/{tensor}"]
        assert gradient.shape == shape
        direction = generator.standard_normal(shape)
        direction *= 1e-6 / np.linalg.norm(direction)
        losses = []
        for sign in (1, -1):
            moved = dict(weights) if tensor == INPUT else weights | {tensor: weights[tensor] + sign * direction}
            pixels = images + sign * direction if tensor == INPUT else images
            backend.load(model, moved)
            losses.append(backend.run(model, pixels, labels, training=training, gradients=False)["loss"])
        slope = (losses[0] - losses[1]) / 2
        scale = 1e-6 * np.linalg.norm(gradient)
        assert slope == pytest.approx((gradient * direction).sum(), abs=2e-4 * scale + 1e-14), tensor


# --- Names -----------------------------------------------------------------------------------------------------------


def torchvision_names(blocks, convs):
    """The public list of torchvision's state_dict, written down from its module tree."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for i in range(1, convs + 1):
                names += [f"{prefix}.conv{i}.weight", *(f"{prefix}.bn{i}.{n}" for n in norm)]
            if block == 0 and (stage > 1 or convs == 3):
                names += [f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{n}" for n in norm)]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("name", "blocks", "convs", "parameters", "statistics"),
    [
        ("resnet18", (2, 2, 2, 2), 2, 11_689_512, 9_600),
        ("resnet34", (3, 4, 6, 3), 2, 21_797_672, 17_024),
        ("resnet50", (3, 4, 6, 3), 3, 25_557_032, 53_120),
        ("resnet101", (3, 4, 23, 3), 3, 44_549_160, 105_344),
        ("resnet152", (3, 8, 36, 3), 3, 60_192_808, 151_424),
        ("wide_resnet50_2", (3, 4, 6, 3), 3, 68_883_240, None),
        ("wide_resnet101_2", (3, 4, 23, 3), 3, 126_886_696, None),
        ("resnext50_32x4d", (3, 4, 6, 3), 3, 25_028_904, None),
        ("resnext101_32x8d", (3, 4, 23, 3), 3, 88_791_336, None),
        ("resnext101_64x4d", (3, 4, 23, 3), 3, 83_455_272, None),
    ],
)
def test_state_dict_has_torchvisions_names_in_its_order_and_sizes(name, blocks, convs, parameters, statistics):
    with torch.device("meta"):
        model = getattr(resnet_torch, name)()
    assert list(model.state_dict()) == torchvision_names(blocks, convs)
    assert sum(p.numel() for p in model.parameters()) == parameters
    running = sum(buffer.numel() for key, buffer in model.named_buffers() if "running" in key)
    assert running == (statistics or running)


def test_resnet50_has_torchvisions_tensor_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in resnet_torch.resnet50().state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer1.0.conv2.weight"] == (64, 64, 3, 3)
    assert shapes["layer2.0.downsample.0.weight"] == (512, 256, 1, 1)
    assert shapes["layer4.2.conv3.weight"] == (2048, 512, 1, 1)
    assert shapes["layer4.2.bn3.num_batches_tracked"] == ()
    assert shapes["fc.weight"] == (1000, 2048)


@pytest.mark.parametrize("spec", [SMALL, BASIC, SPECS["all SAME, biased"], SPECS["flattened head"]])
def test_nodes_carry_the_names_of_a_traced_graph(spec):
    class Tracer(torch.fx.Tracer):
        """Names a node by the module that makes it and counts repetitions, as torchvision's feature extraction does."""

        def __init__(self):
            super().__init__()
            self.names, self.inside = [], []

        def is_leaf_module(self, module, name):
            return type(module).__module__ == "resnet_torch.layers" or super().is_leaf_module(module, name)

        def call_module(self, module, forward, args, kwargs):
            self.inside.append(self.path_of_module(module))
            try:
                return super().call_module(module, forward, args, kwargs)
            finally:
                self.inside.pop()

        def create_node(self, kind, target, *rest, **options):
            node = super().create_node(kind, target, *rest, **options)
            if kind in ("call_module", "call_function"):
                own = [] if kind == "call_module" else [getattr(target, "__name__", str(target)).removeprefix("i")]
                name = ".".join([*self.inside[-1:], *own])
                count = self.names.count(name) + sum(n.startswith(f"{name}_") for n in self.names)
                self.names.append(f"{name}_{count}" if count else name)
            return node

    tracer = Tracer()
    tracer.trace(resnet_torch.from_spec(spec))
    assert {node.name for node in nodes(spec).values()} <= set(tracer.names)
    assert nodes(spec)["stages.0.blocks.0.add"].name == "layer1.0.add"
    assert nodes(spec)["stages.0.blocks.0.relu"].name == (
        "layer1.0.relu_2" if spec.block == "bottleneck" else "layer1.0.relu_1"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_weight_names_map_one_to_one_onto_the_model_of_every_variant(name):
    spec = find(name)
    with torch.device("meta"):
        state = resnet_torch.from_spec(spec).state_dict()
    table = slots(spec)
    assert list(table) == list(canonical.shapes(spec))
    native = [slot.native for slot in table.values()]
    assert len(set(native)) == len(native)
    assert set(native) == {key for key in state if not key.endswith("num_batches_tracked")}


# --- Shapes, padding, geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["symmetric", "same", "valid", "ceil"])
def test_shapes_follow_the_walk_at_every_size(padding):
    other = "same" if padding == "same" else "symmetric"
    spec = BASIC.replace(
        pool_padding=padding, stem_padding=other if padding == "ceil" else padding, block_padding=other
    ).replace(head="none", head_pool="none", blocks=(1, 1), widths=(4, 4))
    model = resnet_torch.from_spec(spec).eval()
    for height in range(1, 42):
        size = (height, 43 - height)
        try:
            shape = output_shapes(spec.layers, (*size, 3))[spec.stage_outputs[-1]]
        except InputError:
            continue
        assert tuple(model(torch.zeros(1, 3, *size)).shape) == (1, shape[2], *shape[:2]), size


@pytest.mark.parametrize("name", [name for name in VARIANTS if "." in name or "resnet20" in name])
def test_tap_shapes_are_the_walks_in_every_convention(backend, name):
    spec = find(name).replace(blocks=(1,) * len(find(name).blocks), classes=7)
    images, labels = batch(spec, (64, 49), count=1)
    results = backend.run(backend.build(spec, "float32"), images, labels, training=False, gradients=False)
    shapes = output_shapes(running(spec, training=False), (64, 49, 3))
    assert {key.removeprefix("tap/"): value.shape[1:] for key, value in results.items() if key != "loss"} == {
        path: shape for path, shape in shapes.items() if path != INPUT
    }
    assert all(value.dtype == np.float32 for value in results.values())


def test_plain_layers_are_used_wherever_padding_is_symmetric():
    model = resnet_torch.from_spec(find("resnet50.flax_examples"))
    same = [name for name, module in model.named_modules() if isinstance(module, SameConv2d)]
    assert same == ["layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    torchvision = resnet_torch.resnet50()
    kinds = {type(module) for module in torchvision.modules() if not list(module.children())}
    assert kinds == {torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU, torch.nn.MaxPool2d,
                     torch.nn.AdaptiveAvgPool2d, torch.nn.Linear}  # fmt: skip


@pytest.mark.parametrize("spec", [SMALL, SPECS["five stages"], SPECS["feature map"], SPECS["max head, softmax"]])
def test_stages_returns_each_stages_output(backend, spec):
    model = random_model(spec).eval()
    images, labels = batch(spec)
    taps = backend.run(model, images, labels, training=False, gradients=False)
    with torch.no_grad():
        outputs = model.stages(torch.tensor(images).permute(0, 3, 1, 2))
    assert len(outputs) == len(spec.blocks)
    for path, output in zip(spec.stage_outputs, outputs, strict=True):
        assert distance(output.permute(0, 2, 3, 1).numpy(), taps[f"tap/{path}"]) < 1e-14


# --- Batch norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
def test_biased_batch_norm_differs_from_pytorchs_in_the_stored_variance_only(momentum):
    biased = BiasedBatchNorm2d(3, momentum=momentum).double()
    native = torch.nn.BatchNorm2d(3, momentum=momentum).double()
    biased.load_state_dict(native.state_dict(), strict=True)
    expected = torch.ones(3, dtype=torch.float64)
    for step in range(1, 4):
        x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        torch.testing.assert_close(biased(a), native(b), rtol=0, atol=0)
        (biased_grad,) = torch.autograd.grad(biased(a).square().sum() + biased(a)[0].sum(), a)
        (native_grad,) = torch.autograd.grad(native(b).square().sum() + native(b)[0].sum(), b)
        torch.testing.assert_close(biased_grad, native_grad, rtol=0, atol=0)
        for _ in range(3):
            share = momentum if momentum is not None else 1 / float(step * 3 - 2 + _)
            expected = (1 - share) * expected + share * x.var(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(biased.running_mean, native.running_mean, rtol=0, atol=0)
    torch.testing.assert_close(biased.running_var, expected, rtol=1e-14, atol=0)
    assert not torch.allclose(biased.running_var, native.running_var, rtol=1e-3)
    assert biased.num_batches_tracked == native.num_batches_tracked == 9
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    native.running_var.copy_(biased.running_var)
    torch.testing.assert_close(biased.eval()(x), native.eval()(x), rtol=0, atol=0)


def test_momentum_is_pytorchs_share_of_the_new_value():
    assert resnet_torch.resnet18().bn1.momentum == 0.1
    assert resnet_torch.from_spec(find("resnet18.keras_classic")).bn1.momentum == 0.01
    assert resnet_torch.from_spec(find("resnet18.keras_classic")).bn1.eps == 1e-3


# --- Compilers -------------------------------------------------------------------------------------------------------


def agree(model, other, images):
    """Both compute the same from the same state and leave the same state behind."""
    torch.testing.assert_close(other(images), model(images), rtol=1e-13, atol=1e-13)
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-13, atol=0)


@pytest.mark.slow
@every_third_spec
def test_scripting_computes_the_same(spec):
    model = random_model(spec)
    images = torch.tensor(batch(spec)[0]).permute(0, 3, 1, 2)
    scripted = torch.jit.script(copy.deepcopy(model))
    for training in (True, False):
        agree(model.train(training), scripted.train(training), images)
    for mine, theirs in zip(model.stages(images), scripted.stages(images), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@every_third_spec
def test_export_computes_the_same(spec):
    model = random_model(spec)
    images = torch.tensor(batch(spec)[0]).permute(0, 3, 1, 2)
    agree(model, torch.export.export(copy.deepcopy(model), (images,)).module(), images)


@pytest.mark.parametrize("spec", [SMALL, BASIC, SPECS["all SAME, biased"], SPECS["zero-pad shortcut"]])
def test_tracing_computes_the_same(spec):
    model = random_model(spec)
    images = torch.tensor(batch(spec)[0]).permute(0, 3, 1, 2)
    agree(model, torch.fx.symbolic_trace(copy.deepcopy(model)), images)


TINY = SPECS["all SAME, biased"].replace(blocks=(1, 1), widths=(4, 4))


@pytest.mark.slow
def test_export_takes_batches_and_sizes_it_was_not_traced_with():
    model = random_model(TINY).eval()
    auto = torch.export.Dim.AUTO
    images = torch.zeros(2, 3, 33, 46, dtype=torch.float64)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    agree(model, exported.module(), torch.randn(5, 3, 48, 31, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="what torch.compile writes for no vectors is no C++"
)
def test_compile_computes_the_same_without_a_graph_break():
    model = random_model(TINY.replace(head="softmax", blocks=(1,), widths=(4,)))
    images = torch.tensor(batch(TINY)[0]).permute(0, 3, 1, 2)
    twin = copy.deepcopy(model)
    output, expected = torch.compile(twin, fullgraph=True)(images), model(images)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=1e-12, atol=0)


def test_models_pickle_and_copy():
    model = random_model(SPECS["all SAME, biased"]).eval()
    images = torch.randn(1, 3, 40, 40, dtype=torch.float64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
        assert twin.spec == model.spec


# --- Builders --------------------------------------------------------------------------------------------------------


def test_builders_take_torchvisions_keywords():
    model = resnet_torch.resnet50(
        weights=None,
        progress=False,
        num_classes=7,
        zero_init_residual=True,
        groups=2,
        width_per_group=32,
        replace_stride_with_dilation=[False, True, True],
        norm_layer=lambda channels: torch.nn.GroupNorm(2, channels),
    )
    assert model.fc.out_features == 7
    assert model.layer1[0].conv2.groups == 2
    assert [model.layer4[i].conv2.dilation for i in range(3)] == [(2, 2), (4, 4), (4, 4)]
    assert isinstance(model.bn1, torch.nn.GroupNorm)
    assert not model.layer1[0].bn3.weight.any()
    assert model.layer1[0].bn2.weight.all()
    assert tuple(model.stages(torch.zeros(1, 3, 64, 64))[-1].shape) == (1, 2048, 8, 8)
    with pytest.raises(SpecError, match="groups"):
        resnet_torch.resnet18(groups=2)


@pytest.mark.parametrize("name", [name for name in VARIANTS if "." not in name])
def test_every_named_depth_has_a_builder_of_its_spec(name):
    builder = getattr(resnet_torch, name)
    with torch.device("meta"):
        assert builder().spec == find(name)
    assert builder.__name__ == name
    assert name in builder.__doc__


@pytest.mark.parametrize(("progress", "shown"), [(True, "shown.safetensors"), (False, "")])
def test_progress_is_that_of_the_download(tmp_path, capfd, progress, shown):
    save_weights(tmp_path / "shown.safetensors", find("resnet20"), canonical.randomize(find("resnet20"), dtype="f4"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shown.safetensors"
        capfd.readouterr()
        resnet_torch.resnet20(weights=url, progress=progress)
        server.shutdown()
    lines = [line for line in capfd.readouterr().err.splitlines() if '"GET ' not in line]  # the server's own
    assert shown in "".join(lines)
    assert bool(lines) == progress


def test_fresh_models_are_initialised_as_torchvision_does():
    torch.manual_seed(0)
    model = resnet_torch.resnet18()
    kernel = model.layer3[0].conv2.weight
    assert kernel.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert model.fc.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
    assert model.layer1[0].bn2.weight.eq(1).all()
    biased = resnet_torch.from_spec(find("resnet18.d2l"))
    assert not biased.conv1.bias.any()


# --- Weights ---------------------------------------------------------------------------------------------------------


@each_spec
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_go_in_and_out_bitwise(spec, dtype):
    weights = canonical.randomize(spec, dtype=dtype)
    model = resnet_torch.from_spec(spec).to(getattr(torch, dtype))
    resnet_torch.load_weights(model, weights)
    exported = resnet_torch.export_weights(model)
    assert list(exported) == list(weights)
    for name, array in weights.items():
        assert exported[name].dtype == array.dtype
        assert exported[name].tobytes() == array.tobytes(), name


def test_export_gives_views_of_the_model():
    model = resnet_torch.resnet18()
    exported = resnet_torch.export_weights(model)
    with torch.no_grad():
        model.layer1[0].conv1.weight.fill_(3)
        model.fc.weight.fill_(4)
    assert (exported["stages.0.blocks.0.conv1.kernel"] == 3).all()
    kernel = exported["head.fc.kernel"]
    assert kernel.base is not None
    assert kernel.shape == (512, 1000)


def test_weights_of_another_backends_layout_load_without_a_warning(recwarn):
    weights = canonical.randomize(BASIC)
    strided = {name: np.asfortranarray(array) for name, array in weights.items()}
    for array in strided.values():
        array.flags.writeable = False
    model = resnet_torch.from_spec(BASIC).double()
    resnet_torch.load_weights(model, strided)
    assert not recwarn.list
    for name, array in resnet_torch.export_weights(model).items():
        assert np.array_equal(array, weights[name])


def broken(change):
    weights = canonical.randomize(SMALL)
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (broken(lambda w: w.pop("stages.1.blocks.0.shortcut.norm.var")), "missing stages.1.blocks.0.shortcut.norm.var"),
        (broken(lambda w: w.update({"extra.kernel": np.zeros(3)})), "unexpected extra.kernel"),
        (broken(lambda w: w.update({"head.fc.kernel": w["head.fc.kernel"].T})), "head.fc.kernel has shape"),
        (broken(lambda w: w.update({"stem.norm.scale": np.ones(1)})), "stem.norm.scale has shape"),
        (broken(lambda w: w.update({"stem.norm.scale": np.ones(6, int)})), "stem.norm.scale has dtype int64"),
        (canonical.randomize(BASIC), "missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights, message):
    with pytest.raises(WeightsError, match=message):
        resnet_torch.load_weights(resnet_torch.from_spec(SMALL), weights)


def test_a_model_that_is_not_its_specs_is_refused_by_name():
    model = resnet_torch.from_spec(SMALL)
    model.fc = torch.nn.Linear(32, 9)
    with pytest.raises(WeightsError, match=r"fc.weight is \(9, 32\), not \(5, 32\)"):
        resnet_torch.export_weights(model)
    model.fc = torch.nn.Identity()
    with pytest.raises(WeightsError, match=r"missing fc\.weight, fc\.bias"):
        resnet_torch.load_weights(model, canonical.randomize(SMALL))
    model = resnet_torch.from_spec(SMALL)
    model.extra = torch.nn.Linear(1, 1)
    with pytest.raises(WeightsError, match=r"unexpected extra\.weight, extra\.bias"):
        resnet_torch.export_weights(model)


def test_builders_read_canonical_files_of_their_own_spec_only(tmp_path):
    spec = find("resnet20")
    weights = canonical.randomize(spec, dtype="float32")
    save_weights(tmp_path / "r20.safetensors", spec, weights)
    model = resnet_torch.resnet20(weights=tmp_path / "r20.safetensors")
    for name, array in resnet_torch.export_weights(model).items():
        assert np.array_equal(array, weights[name])
    # The same shapes, another function.
    with pytest.raises(WeightsError, match=r"stride_in is 'conv1' there and 'conv2' here"):
        resnet_torch.from_spec(spec.replace(stride_in="conv2"), weights=str(tmp_path / "r20.safetensors"))
    with pytest.raises(WeightsError, match="'IMAGENET1K_V1': there is no such file"):
        resnet_torch.resnet18(weights="IMAGENET1K_V1")


# --- Probe -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all SAME, biased", "basic", "no norm"])
def test_a_run_leaves_no_trace_and_repeats_itself(backend, name):
    spec = SPECS[name]
    model = backend.build(spec, "float64")
    backend.load(model, canonical.randomize(spec))
    model.eval()
    model.layer1.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images, labels = batch(spec)
    kept = images.copy()
    first = backend.run(model, images, labels, training=True, gradients=True)
    backend.run(model, images[:2] + 1, labels[:2], training=True, gradients=False)
    again = backend.run(model, images, labels, training=True, gradients=True)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not model.training
    assert model.layer1.training
    assert np.array_equal(images, kept)


def test_a_failed_run_leaves_no_trace_either(backend):
    model = random_model(BASIC)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.layer3[0].forward = lambda x: x
    images, labels = batch(BASIC)
    with pytest.raises(RuntimeError):
        backend.run(model, images, labels, training=True, gradients=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_a_layer_the_model_does_not_run_is_named(backend):
    model = random_model(SMALL)
    model.layer1[1].forward = lambda x: x
    images, labels = batch(SMALL)
    with pytest.raises(BackendError, match=r"did not run \d+ of \d+ layers: stages.0.blocks.1.conv1"):
        backend.run(model, images, labels, training=False, gradients=False)


def test_taps_and_gradients_are_float32_in_a_float32_model(backend):
    images, labels = batch(SMALL)
    results = backend.run(random_model(SMALL, "float32"), images, labels, training=True, gradients=True)
    assert {value.dtype for value in results.values()} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["all SAME, biased", "zero-pad shortcut", "flattened head", "groups", "ceil"])
def test_integers_pass_exactly_in_float32(backend, name):
    spec = SPECS[name].exact_twin
    weights = canonical.integers(spec)
    model = backend.build(spec, "float32")
    backend.load(model, weights)
    images, labels = batch(spec)
    images = np.clip(np.round(images * 4 + 7), 0, 15)
    results = backend.run(model, images, labels, training=False, gradients=False)
    taps, _ = reference(spec, {key: value.astype(np.float64) for key, value in weights.items()}, images, False)
    assert all(np.array_equal(results[f"tap/{layer.path}"], taps[layer.path]) for layer in spec.layers)


def test_build_makes_a_fresh_model_each_time(backend):
    assert backend.build(BASIC, "float32") is not backend.build(BASIC, "float32")
    assert all(value.dtype == torch.float64 for value in backend.build(BASIC, "float64").parameters())
    facts = backend.describe()
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert facts["threads"] == "1"


def test_start_sets_full_precision(backend):
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 1


# --- In a process of its own -----------------------------------------------------------------------------------------


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize(
    "use", ["resnet_torch.resnet50()", "resnet_torch.from_spec(find('resnet18'))", "import resnet_torch.backend"]
)
def test_without_pytorch_one_line_names_the_extra(use):
    code = f"""
import sys
sys.modules["torch"] = None
import resnet_torch
from common.architectures import find
from common.errors import BackendMissing
try:
    {use}
except BackendMissing as error:
    print(error)
"""
    result = python(code)
    assert result.stdout == "PyTorch is not installed; run: pip install 'resnet-parity[torch]'\n", result.stderr


@pytest.mark.slow
def test_importing_the_package_loads_no_framework_and_building_no_other_one():
    code = """
import sys
import resnet_torch
assert "torch" not in sys.modules
assert "resnet50" in dir(resnet_torch)
resnet_torch.resnet20()
others = {"tensorflow", "keras", "jax", "flax", "optax", "resnet_keras", "resnet_flax", "torchvision"}
assert not others & set(sys.modules), others & set(sys.modules)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_device_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    code = """
from common.errors import BackendError
from resnet_torch import backend as probe
try:
    probe.start(1)
except BackendError as error:
    print(error)
"""
    assert "RESNET_PARITY_DEVICE='cuda' cannot be used" in python(code, RESNET_PARITY_DEVICE="cuda").stdout
