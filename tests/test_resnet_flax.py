"""The Flax models: names, shapes, numbers by hand, and the transformations of JAX."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from flax.traverse_util import flatten_dict, unflatten_dict
from written import save_weights

import resnet_flax
from common import weights as canonical
from common.architectures import find, variants
from common.architectures.layers import output_shapes
from common.architectures.resnet import ResNetSpec
from common.errors import InputError, WeightsError
from resnet_flax import backend as probe
from resnet_flax.layers import convolve
from resnet_flax.resnet import native_paths
from resnet_flax.weights import variable_paths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unoptimised")]

TINY = ResNetSpec(block="bottleneck", blocks=(1, 2), widths=(4, 8), stem_width=4, classes=5)
SMALL = TINY.replace(block="basic")


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def backend():
    return probe.FlaxBackend(jit=True)


def shapes_of(module, size=64, channels=3):
    """Shape and dtype of every variable by path, without computing one."""
    images = jax.ShapeDtypeStruct((1, size, size, channels), module.dtype)
    return flatten_dict(jax.eval_shape(module.init, jax.random.key(0), images))


def prepared(spec, size=(33, 34), dtype="float64", batch=2):
    module = resnet_flax.from_spec(spec, dtype=dtype, param_dtype=dtype)
    variables = resnet_flax.to_variables(spec, canonical.randomize(spec), dtype)
    images = np.random.default_rng(0).normal(size=(batch, *size, spec.in_channels)).astype(dtype)
    return module, variables, images


def run(backend, spec, size=(33, 34), *, training=False, gradients=False, dtype="float64"):
    model = backend.build(spec, dtype)
    backend.load(model, canonical.randomize(spec))
    images = np.random.default_rng(0).normal(size=(2, *size, spec.in_channels))
    return backend.run(model, images, np.array([0, 3]), training=training, gradients=gradients)


# Names


def test_resnet50_has_the_variables_of_the_flax_example():
    found = {"/".join(path) for path in shapes_of(resnet_flax.ResNet50())}
    expected = {"params/conv_init/kernel", "params/Dense_0/kernel", "params/Dense_0/bias"}

    def add_norm(name):
        expected.update({f"params/{name}/scale", f"params/{name}/bias"})
        expected.update({f"batch_stats/{name}/mean", f"batch_stats/{name}/var"})

    add_norm("bn_init")
    for block in range(3 + 4 + 6 + 3):
        name = f"BottleneckResNetBlock_{block}"
        for i in range(3):
            expected.add(f"params/{name}/Conv_{i}/kernel")
            add_norm(f"{name}/BatchNorm_{i}")
        if block in (0, 3, 7, 13):
            expected.add(f"params/{name}/conv_proj/kernel")
            add_norm(f"{name}/norm_proj")
    assert found == expected


def test_resnet18_projects_three_of_its_blocks():
    projected = {path[1] for path in shapes_of(resnet_flax.ResNet18()) if "conv_proj" in path}
    assert projected == {"ResNetBlock_2", "ResNetBlock_4", "ResNetBlock_6"}


@pytest.mark.parametrize(
    ("name", "parameters", "statistics"),
    [
        ("ResNet18", 11_689_512, 9_600),
        ("ResNet34", 21_797_672, 17_024),
        ("ResNet50", 25_557_032, 53_120),
        ("ResNet101", 44_549_160, 105_344),
        ("ResNet152", 60_192_808, 151_424),
    ],
)
def test_published_counts(name, parameters, statistics):
    counts = {"params": 0, "batch_stats": 0}
    for path, leaf in shapes_of(getattr(resnet_flax, name)()).items():
        counts[path[0]] += leaf.size
    assert counts == {"params": parameters, "batch_stats": statistics}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, spec in variants().items()
        if spec.family == "resnet" and re.search(r"net(18|50)|20|_", name)  # depth alone makes no other name
    ],
)
def test_name_table_is_a_bijection_onto_the_variables(name):
    spec = find(name)
    expected = canonical.shapes(spec)
    native = {path: leaf.shape for path, leaf in shapes_of(resnet_flax.from_spec(spec)).items()}
    assert {path: expected[name] for name, path in variable_paths(spec).items()} == native
    assert len(set(native_paths(spec).values())) == sum(not layer.shares for layer in spec.layers)


def test_builders_follow_the_flax_example_and_take_changes():
    spec = resnet_flax.ResNet50(num_classes=7).spec
    assert spec == find("resnet50.flax_examples").replace(classes=7)
    assert resnet_flax.ResNet34(block_padding="symmetric").spec.block_padding == "symmetric"
    assert resnet_flax.ResNeXt50_32x4d().spec.groups == 32
    assert resnet_flax.WideResNet50_2().spec.width_per_group == 128
    assert resnet_flax.ResNet110().spec.blocks == (18, 18, 18)
    assert all(getattr(resnet_flax, name) for name in resnet_flax.__all__)


def test_initialisation_is_that_of_the_flax_example():
    module = resnet_flax.from_spec(SMALL.replace(blocks=(1,), widths=(64,), stem_width=64))
    block = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]["ResNetBlock_0"]
    assert not block["BatchNorm_1"]["scale"].any()
    assert (block["BatchNorm_0"]["scale"] == 1).all()
    assert np.var(block["Conv_0"]["kernel"]) == pytest.approx(1 / (9 * 64), rel=0.05)  # LeCun: 1 / fan_in


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "statistics"),
    [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64, jnp.float64),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
def test_every_layer_has_the_dtypes_asked_for(dtype, param_dtype, statistics):
    spec = TINY.replace(conv_bias=True)
    module = resnet_flax.from_spec(spec, dtype=dtype, param_dtype=param_dtype)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    logits, updates = jax.eval_shape(partial(module.apply, mutable=["batch_stats"]), variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(param_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {jnp.dtype(statistics)}
    # A dtype that changed by an update would compile the next step anew, and fail in a scan.
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(statistics)}
    assert logits.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_tap_gradient_and_statistic_has_the_dtype_of_the_model(backend, dtype):
    results = run(backend, TINY, training=True, gradients=True, dtype=dtype)
    assert {str(array.dtype) for array in results.values()} == {dtype}


def test_float64_without_x64_is_refused_when_weights_are_loaded():
    with jax.enable_x64(False), pytest.raises(WeightsError, match="jax_enable_x64"):
        resnet_flax.to_variables(TINY, canonical.randomize(TINY), "float64")


# Numbers


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        *[(SMALL.replace(pool_padding=padding), (33, 34)) for padding in ("symmetric", "same", "valid", "ceil")],
        *[(TINY.replace(stem_padding=padding), (34, 33)) for padding in ("same", "valid")],
        (TINY.replace(block_padding="same", stride_in="conv1"), (64, 65)),
        (TINY.replace(replace_stride_with_dilation=(True,), block_padding="same"), (40, 37)),
        (SMALL.replace(replace_stride_with_dilation=(True,), stride_in="conv2"), (40, 37)),
        (SMALL.replace(stem_kernel=4, stem_stride=3, stem_padding="same", stem_pool=False), (37, 36)),
        (SMALL.replace(shortcut="zero_pad", widths=(4, 4)), (33, 32)),
        (SMALL.replace(norm=False, conv_bias=True, in_channels=1), (32, 32)),
        (SMALL.replace(shortcut_norm=False, head="softmax"), (32, 32)),
        (TINY.replace(groups=2, width_per_group=64, expansion=2, head_pool="max"), (32, 32)),
        (TINY.replace(head_pool="flatten", input_size=(50, 37), head="softmax"), (50, 37)),
        (TINY.replace(head="none", head_pool="none"), (32, 32)),
        (SMALL.replace(stem_stride=1, stem_pool=False, widths=(4, 4)), (1, 1)),
    ],
)
def test_there_is_a_tap_of_the_right_shape_for_every_layer(spec, size):
    module = resnet_flax.from_spec(spec)
    images = jax.ShapeDtypeStruct((2, *size, spec.in_channels), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    flags = {"training": True, "gradients": True}
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    results = jax.eval_shape(partial(probe._pass, spec, module, **flags), variables, images, labels, {})
    expected = output_shapes(spec.layers, (*size, spec.in_channels))
    taps = {f"tap/{path}": (2, *shape) for path, shape in expected.items() if path != "input"}
    assert {name: array.shape for name, array in results.items() if name.startswith("tap/")} == taps


def test_same_padding_at_an_even_size_differs_from_symmetric_and_is_the_same_shape(backend):
    results = [run(backend, SMALL.replace(block_padding=p), (32, 32)) for p in ("same", "symmetric")]
    path = "tap/stages.1.blocks.0.conv1"
    assert results[0][path].shape == results[1][path].shape
    assert np.abs(results[0][path] - results[1][path]).max() > 1e-2
    np.testing.assert_array_equal(results[0]["tap/stem.pool"], results[1]["tap/stem.pool"])


def test_a_strided_block_of_a_single_pixel_keeps_its_projection():
    spec = SMALL.replace(stem_stride=1, stem_pool=False, widths=(4, 4))
    assert ("params", "ResNetBlock_1", "conv_proj", "kernel") in shapes_of(resnet_flax.from_spec(spec), size=1)


@pytest.mark.parametrize("running_variance", ["unbiased", "biased"])
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_running_statistics_by_hand(backend, running_variance, momentum):
    spec = ResNetSpec(
        block="basic", blocks=(1,), widths=(4,), stem_width=4, running_variance=running_variance, bn_momentum=momentum
    )
    results, weights = run(backend, spec, (12, 10), training=True), canonical.randomize(spec)
    for path in ("stem", "stages.0.blocks.0"):
        number = "" if path == "stem" else "1"
        x = results[f"tap/{path}.conv{number}"].reshape(-1, 4)
        for name, new in (("mean", x.mean(0)), ("var", x.var(0, ddof=running_variance == "unbiased"))):
            name = f"{path}.norm{number}.{name}"
            expected = momentum * weights[name] + (1 - momentum) * new
            np.testing.assert_allclose(results[f"stat/{name}"], expected, rtol=1e-14)
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + spec.bn_eps)
    y = y * weights["stages.0.blocks.0.norm1.scale"] + weights["stages.0.blocks.0.norm1.bias"]
    np.testing.assert_allclose(results["tap/stages.0.blocks.0.norm1"].reshape(-1, 4), y, rtol=1e-10, atol=1e-12)


def test_batch_variance_does_not_cancel_where_the_mean_is_large(backend):
    spec = SMALL
    weights = canonical.randomize(spec) | {"stem.norm.mean": np.full(4, 1e3)}
    model = backend.build(spec.replace(conv_bias=True), "float64")
    biased = canonical.randomize(model.spec) | weights | {"stem.conv.bias": np.full(4, 1e6)}
    backend.load(model, biased)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    results = backend.run(model, images, np.array([0, 1]), training=True, gradients=False)
    x = results["tap/stem.conv"].reshape(-1, 4)
    y = (x - x.mean(0)) / np.sqrt(x.var(0) + spec.bn_eps) * weights["stem.norm.scale"] + weights["stem.norm.bias"]
    np.testing.assert_allclose(results["tap/stem.norm"].reshape(-1, 4), y, atol=1e-8)


def test_one_value_per_channel_has_no_unbiased_variance():
    spec = SMALL.replace(blocks=(1,), widths=(4,), stem_pool=False)
    module, variables, images = prepared(spec, (1, 1), batch=1)
    with pytest.raises(InputError, match="one value per channel"):
        module.apply(variables, images, mutable=["batch_stats"])
    module.apply(variables, images, train=False)


@pytest.mark.parametrize("head", ["logits", "softmax"])
def test_loss_is_the_cross_entropy_of_the_labels(backend, head):
    results = run(backend, TINY.replace(head=head))
    logits = results["tap/head.fc"]
    expected = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, (0, 3), strict=True)])
    assert results["loss"] == pytest.approx(expected, rel=1e-13)


def test_gradients_are_the_slopes_of_the_loss(backend):
    model = backend.build(TINY, "float64")
    weights = canonical.randomize(TINY)
    images, labels = np.random.default_rng(1).normal(size=(2, 32, 32, 3)), np.array([4, 1])

    def loss(weights, images):
        backend.load(model, weights)
        return float(backend.run(model, images, labels, training=True, gradients=False)["loss"])

    backend.load(model, weights)
    results = backend.run(model, images, labels, training=True, gradients=True)
    names = {name for layer in TINY.layers for name in layer.parameters}
    assert {name[5:] for name in results if name.startswith("grad/")} == names | {"input"}
    for name in ("stem.conv.kernel", "stages.1.blocks.0.shortcut.norm.scale", "head.fc.bias"):
        direction = np.random.default_rng(2).normal(size=weights[name].shape)
        above, below = (loss(weights | {name: weights[name] + h * direction}, images) for h in (1e-6, -1e-6))
        assert np.vdot(results[f"grad/{name}"], direction) == pytest.approx((above - below) / 2e-6, rel=1e-4)
    direction = np.random.default_rng(3).normal(size=images.shape)
    above, below = (loss(weights, images + h * direction) for h in (1e-6, -1e-6))
    assert np.vdot(results["grad/input"], direction) == pytest.approx((above - below) / 2e-6, rel=1e-4)


# The probe keeps nothing


def test_runs_leave_no_trace_and_loading_takes_effect(backend):
    model, weights = backend.build(TINY, "float64"), canonical.randomize(TINY)
    images, labels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)), np.array([0, 1])
    backend.load(model, weights)
    first = backend.run(model, images, labels, training=True, gradients=False)
    again = backend.run(model, images, labels, training=True, gradients=False)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    exported = backend.export(model)
    assert all(np.array_equal(exported[name], weights[name]) for name in weights)
    backend.load(model, canonical.randomize(TINY, seed=1))
    other = backend.run(model, images, labels, training=True, gradients=False)
    assert not np.array_equal(first["tap/stem.conv"], other["tap/stem.conv"])


def test_a_defect_planted_between_builds_is_seen(backend, monkeypatch):
    before = run(backend, TINY)
    monkeypatch.setattr(nn, "relu", lambda x: jnp.maximum(x, 0.1))
    after = run(backend, TINY)
    assert before["tap/stem.relu"].min() == 0
    assert after["tap/stem.relu"].min() == 0.1


def test_a_module_whose_variables_are_not_those_of_the_table_is_refused(backend):
    model = backend.build(TINY, "float64")
    del model.variables["params"]["Dense_0"]
    with pytest.raises(WeightsError, match="Dense_0"):
        backend.load(model, canonical.randomize(TINY))


@pytest.mark.parametrize(
    ("strides", "padding", "groups"),
    [((1, 1), "SAME", 1), ((2, 3), [(0, 0)] * 2, 1), ((2, 2), [(1, 0), (0, 2)], 1), ((1, 1), "VALID", 2)],
)
def test_a_convolution_of_one_pixel_is_that_of_lax_with_its_slopes(strides, padding, groups):
    numbers = np.random.default_rng(0)
    x, w = numbers.normal(size=(2, 5, 7, 4)), numbers.normal(size=(1, 1, 4 // groups, 6))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups}
    own, of_lax = (
        jax.vjp(lambda x, w, f=f: f(x, w, strides, padding, **options), x, w)
        for f in (convolve, jax.lax.conv_general_dilated)
    )
    assert own[0].shape == of_lax[0].shape
    np.testing.assert_allclose(own[0], of_lax[0], rtol=1e-13, atol=1e-14)
    upstream = numbers.normal(size=own[0].shape)
    for got, expected in zip(own[1](upstream), of_lax[1](upstream), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


# Stage outputs and taps, natively


def test_stage_outputs_on_request():
    module, variables, images = prepared(TINY, (64, 48))
    _, state = module.apply(variables, images, train=False, mutable=["intermediates"])
    c2, c3 = state["intermediates"]["stages"]
    assert (c2.shape, c3.shape) == ((2, 16, 12, 16), (2, 8, 6, 32))
    assert set(state) == {"intermediates"}
    backbone, _, _ = prepared(TINY.replace(head="none", head_pool="none"))
    np.testing.assert_array_equal(backbone.apply(variables, images, train=False), c3)


def test_initialisation_creates_variables_only():
    module = resnet_flax.from_spec(TINY)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert set(variables) == {"params", "batch_stats"}


# JAX's transformations


def test_jit_grad_and_vmap_agree_with_the_plain_call():
    module, variables, images = prepared(TINY, (32, 32), batch=4)

    def forward(variables, images):
        return module.apply(variables, images, train=False)

    plain = forward(variables, images)
    np.testing.assert_allclose(jax.jit(forward)(variables, images), plain, rtol=1e-12)
    mapped = jax.jit(jax.vmap(forward, in_axes=(None, 0)))(variables, images[:, None])
    np.testing.assert_allclose(mapped[:, 0], plain, rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda v: forward(v, images).sum()))(variables)
    np.testing.assert_allclose(gradient["params"]["Dense_0"]["bias"], np.full(5, 4.0))


def test_pmap_and_shard_map_with_statistics_over_all_devices_equal_one_device():
    code = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, PartitionSpec as P
import resnet_flax
from common import weights as canonical
from common.architectures.resnet import ResNetSpec
shard_map = jax.shard_map if hasattr(jax, "shard_map") else __import__("jax.experimental.shard_map").shard_map
assert jax.device_count() == 2
images = np.random.default_rng(0).normal(size=(4, 16, 16, 3))
for running_variance in ("unbiased", "biased"):
    spec = ResNetSpec(block="basic", blocks=(1,), widths=(4,), stem_width=4, running_variance=running_variance)
    variables = resnet_flax.to_variables(spec, canonical.randomize(spec), "float64")
    dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    one = resnet_flax.from_spec(spec, **dtypes)
    many = resnet_flax.from_spec(spec, axis_name="batch", **dtypes)
    step = lambda model: lambda v, x: model.apply(v, x, mutable=["batch_stats"])
    logits, updates = jax.jit(step(one))(variables, images)
    split = {"in_specs": (P(), P("batch")), "out_specs": (P("batch"), P())}
    sharded = shard_map(step(many), mesh=Mesh(jax.devices(), "batch"), **split)
    for got, new in (
        jax.jit(sharded)(variables, images),
        jax.pmap(step(many), "batch", in_axes=(None, 0))(variables, images.reshape(2, 2, 16, 16, 3)),
    ):
        np.testing.assert_allclose(np.reshape(got, logits.shape), logits, rtol=1e-10)
        last = jax.tree.map(lambda a, b: np.reshape(a, (-1, b.size))[-1], new, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), last, updates)
print("agree")
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "agree", done.stderr


# Weights


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weights_come_back_bitwise_as_views(dtype):
    spec = TINY.replace(conv_bias=True)
    weights = canonical.randomize(spec, dtype=dtype)
    variables = resnet_flax.to_variables(spec, weights, dtype)
    for tree in (variables, freeze(variables)):
        back = resnet_flax.from_variables(spec, tree)
        assert list(back) == list(canonical.shapes(spec))
        assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)
    kernel = variables["params"]["conv_init"]["kernel"]
    assert np.shares_memory(resnet_flax.from_variables(spec, variables)["stem.conv.kernel"], np.asarray(kernel))


def test_variables_do_not_change_with_the_arrays_they_were_made_from():
    weights = canonical.randomize(TINY)
    variables = resnet_flax.to_variables(TINY, weights, "float64")
    before = np.array(variables["params"]["conv_init"]["kernel"])
    for array in weights.values():
        array.fill(7)
    np.testing.assert_array_equal(variables["params"]["conv_init"]["kernel"], before)


def test_wrong_weights_are_refused_by_name():
    weights = canonical.randomize(TINY)
    without = {name: array for name, array in weights.items() if name != "head.fc.bias"}
    with pytest.raises(WeightsError, match=r"missing head\.fc\.bias"):
        resnet_flax.to_variables(TINY, without)
    with pytest.raises(WeightsError, match=r"unexpected stem\.conv\.bias"):
        resnet_flax.to_variables(TINY, weights | {"stem.conv.bias": np.zeros(4)})
    transposed = weights | {"head.fc.kernel": weights["head.fc.kernel"].T}
    with pytest.raises(WeightsError, match=r"head\.fc\.kernel has shape \(5, 32\).*\(32, 5\)"):
        resnet_flax.to_variables(TINY, transposed)


def test_wrong_variables_are_refused_by_name():
    flat = flatten_dict(resnet_flax.to_variables(TINY, canonical.randomize(TINY)))
    kernel = ("params", "conv_init", "kernel")
    for changed, message in (
        ({path: leaf for path, leaf in flat.items() if path != kernel}, "missing params/conv_init/kernel"),
        (flat | {("params", "conv_init", "bias"): jnp.zeros(4)}, "unexpected params/conv_init/bias"),
        (flat | {kernel: jnp.zeros((7, 7, 4, 3))}, r"params/conv_init/kernel has shape \(7, 7, 4, 3\)"),
        ({path: leaf for path, leaf in flat.items() if path[0] == "params"}, "missing batch_stats/"),
        (flat | {("intermediates", "x"): jnp.zeros(1)}, "unexpected collections intermediates"),
    ):
        with pytest.raises(WeightsError, match=message):
            resnet_flax.from_variables(TINY, unflatten_dict(changed))


def test_a_file_of_weights_binds_the_module(tmp_path):
    path = tmp_path / "tiny.safetensors"
    weights = canonical.randomize(TINY, dtype="float32")
    save_weights(path, TINY, weights)
    module, variables = resnet_flax.from_spec(TINY, weights=path).unbind()
    assert module.spec == TINY
    assert resnet_flax.from_variables(TINY, variables)["head.fc.bias"].tobytes() == weights["head.fc.bias"].tobytes()
    bound = resnet_flax.from_spec(TINY, weights=str(path))
    assert bound(jnp.zeros((1, 32, 32, 3), jnp.float32), train=False).shape == (1, 5)
    with pytest.raises(WeightsError, match=r"another network: .*classes is 5 there and 1000 here"):
        resnet_flax.ResNet50(weights=path)
    with pytest.raises(WeightsError, match="imagenet"):
        resnet_flax.ResNet50(weights="imagenet")


# Bad input and missing frameworks


@pytest.mark.parametrize("shape", [(1, 32, 32, 4), (32, 32, 3), (1, 2, 2, 3)])
def test_images_that_do_not_fit_are_refused(shape):
    spec = TINY.replace(stem_padding="valid")
    with pytest.raises(InputError):
        jax.eval_shape(resnet_flax.from_spec(spec).init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize(("blocked", "name"), [("jax", "JAX"), ("flax", "Flax")])
@pytest.mark.parametrize("use", ["resnet_flax.ResNet50", "resnet_flax.from_spec(spec)", "resnet_flax.backend.start(1)"])
def test_a_missing_framework_names_the_extra(blocked, name, use):
    code = f"""
import sys
sys.modules[{blocked!r}] = None
import resnet_flax, resnet_flax.backend
from common.architectures import find
from common.errors import BackendMissing
spec = find("resnet18")
try:
    {use}
except BackendMissing as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{name} is not installed; run: pip install 'resnet-parity[flax]'", done.stderr


def test_only_its_own_framework_is_imported_and_only_when_used():
    code = """
import sys
for name in ("torch", "tensorflow", "keras"):
    sys.modules[name] = None
import resnet_flax, resnet_flax.backend
assert "jax" not in sys.modules and "flax" not in sys.modules
resnet_flax.ResNet50()
print("built")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "built", done.stderr


def test_an_unusable_device_is_one_line():
    code = """
from common.errors import BackendError
from resnet_flax import backend as probe
from resnet_flax.layers import convolve
try:
    probe.start(1)
except BackendError as error:
    print(error)
"""
    environment = os.environ | {"RESNET_PARITY_DEVICE": "abacus"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1, done.stderr
    assert "RESNET_PARITY_DEVICE=abacus" in done.stdout
