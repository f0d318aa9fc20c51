"""A user's own PyTorch model: watched, steered, and left as it was."""

import copy
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from common.errors import ModelError
from common.foreign.operations import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GlobalPool,
    GroupNorm,
    LayerNorm,
    LocalResponseNorm,
    Pad,
    Pool,
    Softmax,
)
from common.foreign.protocol import LATER_OUTPUT, Forced
from resnet_torch.foreign import adapt
from resnet_torch.layers import BiasedBatchNorm2d, SameConv2d, SameMaxPool2d


class Functional(nn.Module):
    """With `F` in forward, and layers whose inputs come from there."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.log_softmax(self.fc(F.gelu(self.conv2(x)).mean((2, 3))), dim=-1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.relu(out)


class InPlace(nn.Module):
    """What the shortcut carries has gone through the ReLU, which works in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.norm(x)
        return self.conv(self.relu(x)) + x


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.step = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.again = self.first

    def forward(self, x):
        for _ in range(3):
            x = self.step(x)
        return self.again(self.first(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
        )
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, tokens):
        x = self.blocks(self.embed(tokens))
        return self.attention(x, x, value=x)


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, image):
        x = self.embed(rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(x))[:, 0]


class Pair(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor | None


@dataclass
class Output:
    logits: torch.Tensor
    hidden: list


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return OrderedDict(
            first=Pair(a, None), second=Output(logits=b, hidden=[a, (b, None)]), which=b.argmax(-1), none=None
        )


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right, scale=None):
        return self.left(left) + self.right(right) * (1 if scale is None else scale)


class OfDict(Named):
    def forward(self, batch):
        return self.left(batch["left"]) + self.right(batch["right"])


def sequential():
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Dropout(0.5), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(36, 5)),
    )


DRAWN = np.random.default_rng(0)
IMAGES = DRAWN.normal(size=(2, 3, 8, 8)).astype(np.float32)
ROWS = DRAWN.normal(size=(3, 4)).astype(np.float32)
TOKENS = DRAWN.integers(0, 11, (2, 5))
TWO = {"left": ROWS, "right": ROWS[:, :2].copy()}
STYLES = {
    "sequential": (sequential, [IMAGES]),
    "functional": (Functional, [IMAGES]),
    "residual": (Residual, [IMAGES]),
    "in place": (InPlace, [IMAGES]),
    "shared": (Shared, [ROWS]),
    "attention": (Attention, [TOKENS]),
    "patches": (Patches, [IMAGES]),
    "nested": (Nested, [ROWS]),
    "named": (Named, TWO),
    "of a dict": (OfDict, TWO),
    "recurrent": (lambda: nn.LSTM(4, 3, 2, dropout=0.5), [ROWS]),
    "one layer": (lambda: nn.Linear(4, 2), [ROWS]),
}


def drawn(make, seed=0):
    """A model with no value as it was made."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for array in (*model.parameters(), *model.buffers()):
            if array.is_floating_point():
                array.copy_(torch.rand_like(array) + 0.1)
                array[..., 0] *= -1 if array.ndim > 1 else 1
    return model


def run(model, inputs, dtype="float64", **options):
    with adapt(model).at_work(dtype) as runner:
        return runner.run(inputs, **options)


def plain(model, inputs, dtype):
    model = copy.deepcopy(model).to(getattr(torch, dtype)).eval()
    tensors = {str(i): one for i, one in enumerate(inputs)} if isinstance(inputs, list) else inputs
    tensors = {name: torch.tensor(one) for name, one in tensors.items()}
    tensors = {name: one.to(getattr(torch, dtype)) if one.is_floating_point() else one for name, one in tensors.items()}
    if isinstance(model, OfDict):
        return model(tensors)
    return model(**tensors) if isinstance(inputs, dict) else model(*tensors.values())


def equal(one, other):
    """Bitwise, of arrays in dicts and tuples."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other, strict=True))
    return (one is None and other is None) or (one.dtype == other.dtype and np.array_equal(one, other))


def apart(one, other):
    """The largest relative difference."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((apart(one[name], other[name]) for name in one), default=0)
    if isinstance(one, tuple):
        return max((apart(*pair) for pair in zip(one, other, strict=True)), default=0)
    if one is None or other is None:
        assert one is other
        return 0
    scale = max(np.abs(one).max(initial=0), 1e-12)
    return np.abs(one.astype(float) - other.astype(float)).max(initial=0) / scale


@pytest.fixture(params=STYLES)
def styled(request):
    make, inputs = STYLES[request.param]
    return drawn(make), inputs


@pytest.fixture
def no_fused_attention():
    """PyTorch computes attention by another kernel where no gradients are asked for and nobody watches."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("no_fused_attention")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_results_are_those_of_the_model_itself(styled, dtype):
    model, inputs = styled
    expected = torch.utils._pytree.tree_leaves(plain(model, inputs, dtype))
    results = list(run(model, inputs, dtype).results.values())
    if isinstance(plain(model, inputs, dtype), OrderedDict):  # of a class that PyTorch does not look into
        value = plain(model, inputs, dtype)
        first, second = value["first"], value["second"]
        expected = [first.logits, second.logits, second.hidden[0], second.hidden[1][0], value["which"]]
    for one, other in zip(results, [one.detach() for one in expected if one is not None], strict=True):
        np.testing.assert_array_equal(one, other.numpy(), strict=True)


def test_every_call_is_seen_in_the_order_in_which_the_calls_ended():
    trace = run(drawn(Shared), [ROWS])
    assert [call.name for call in trace.calls] == [
        *("step.0", "step.1", "step", "step.0#2", "step.1#2", "step#2", "step.0#3", "step.1#3", "step#3"),
        *("first", "first#2"),
    ]
    assert [call.layer for call in trace.calls if not call.leaf] == ["step"] * 3
    assert trace.inputs["step#2"] == ()
    assert trace.outputs["step#2"] is not None
    np.testing.assert_array_equal(trace.inputs["step.0#2"][0], trace.outputs["step.1"][0])
    assert {call.kind for call in trace.calls} == {"Linear", "Tanh", "Sequential"}


def test_an_attention_whose_projection_nobody_calls_is_one_layer():
    trace = run(drawn(Attention), [TOKENS])
    calls = {call.name: call for call in trace.calls}
    assert calls["attention"].leaf
    assert not calls["blocks.layers.0"].leaf
    assert "attention.out_proj" not in calls
    assert len(trace.inputs["attention"]) == 3  # the value by keyword, behind the others
    assert {"in_proj_weight", "out_proj.weight"} <= set(calls["attention"].arrays)
    assert calls["embed"].operation == Embedding()
    assert trace.inputs["embed"][0].dtype == np.int64


@pytest.mark.parametrize(("model", "name"), [(nn.Linear(4, 2), "linear"), (nn.LSTM(4, 3), "lstm")])
def test_a_model_of_one_layer_goes_by_its_class(model, name):
    trace = run(model, [ROWS])
    assert [call.name for call in trace.calls] == [name]
    assert equal(trace.outputs[name][0], next(iter(trace.results.values())))


def test_what_is_computed_later_in_place_does_not_change_what_was_noted_down():
    trace = run(drawn(Residual), [IMAGES])
    assert (trace.outputs["bn1"][0] < 0).any()
    np.testing.assert_array_equal(trace.outputs["relu"][0], np.maximum(trace.outputs["bn1"][0], 0))
    assert (trace.inputs["relu#2"][0] != trace.outputs["bn2"][0]).any()


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_given_its_own_values_is_the_same_pass(styled, training):
    model, inputs = styled
    with adapt(model).at_work("float64") as runner:
        own = runner.run(inputs, training=training, gradients=True)
        forced = {
            call.name: Forced(
                inputs=own.inputs[call.name], outputs=own.outputs[call.name], cotangents=own.cotangents[call.name]
            )
            for call in own.calls
            if call.leaf
        }
        again = runner.run(inputs, training=training, gradients=True, forced=forced)
    assert equal(again.results, own.results)
    assert equal(again.outputs, own.outputs)
    assert equal(again.statistics, own.statistics)
    assert own.loss != 0
    assert own.loss == again.loss
    for what in ("gradients", "of_inputs", "cotangents"):
        assert apart(getattr(own, what), getattr(again, what)) < 1e-14


@pytest.mark.usefixtures("no_fused_attention")
def test_watching_gradients_changes_no_value(styled):
    model, inputs = styled
    with adapt(model).at_work("float64") as runner:
        assert apart(runner.run(inputs).results, runner.run(inputs, gradients=True).results) < 1e-14


def test_a_layer_given_other_inputs_computes_what_it_computes_of_them_alone():
    model, other = drawn(Residual), drawn(Residual, seed=1)
    with adapt(model).at_work("float64") as runner, adapt(other).at_work("float64") as reference:
        theirs = reference.run([IMAGES])
        leaves = [call for call in theirs.calls if call.leaf]
        forced = {call.name: Forced(inputs=theirs.inputs[call.name]) for call in leaves}
        trace = runner.run([IMAGES], forced=forced)
    double = copy.deepcopy(model).double().eval()
    for call in leaves:
        alone = double.get_submodule(call.layer)(torch.tensor(theirs.inputs[call.name][0]))
        np.testing.assert_array_equal(trace.outputs[call.name][0], alone.detach().numpy())
    # What came was noted down, not what was put there.
    np.testing.assert_array_equal(trace.inputs["bn1"][0], trace.outputs["conv1"][0])


def test_outputs_that_are_replaced_are_what_follows_sees():
    model = drawn(Functional)
    own = run(model, [IMAGES])
    put = np.ones_like(own.outputs["conv2"][0])
    trace = run(model, [IMAGES], forced={"conv2": Forced(outputs=(put,))}, gradients=True)
    assert equal(trace.outputs["conv2"], own.outputs["conv2"])
    gelu = torch.nn.functional.gelu(torch.ones((), dtype=torch.float64)).item()
    np.testing.assert_allclose(trace.inputs["fc"][0], gelu, rtol=1e-15)
    assert np.abs(trace.gradients["conv1.weight"]).max() > 0


def test_cotangents_are_the_slopes_by_each_output():
    model = drawn(Functional)
    trace = run(model, [IMAGES], gradients=True)
    double = copy.deepcopy(model).double().eval()
    kept = {}
    for name, layer in double.named_children():
        layer.register_forward_hook(lambda module, args, output, name=name: kept.update({name: output}))
    x = torch.tensor(IMAGES, dtype=torch.float64, requires_grad=True)
    returned = double(x)
    loss = (returned.square() / 2 + returned.sin()).mean()
    wanted = torch.autograd.grad(loss, [*kept.values(), x, *double.parameters()])
    slopes = dict(zip([*kept, "x", *dict(double.named_parameters())], (one.numpy() for one in wanted), strict=True))
    assert trace.loss == loss.item()
    for name in kept:
        np.testing.assert_allclose(trace.cotangents[name][0], slopes[name], rtol=1e-13, atol=1e-18)
    np.testing.assert_allclose(trace.of_inputs["0"], slopes["x"], rtol=1e-13, atol=1e-18)
    for name in trace.gradients:
        np.testing.assert_allclose(trace.gradients[name], slopes[name], rtol=1e-13, atol=1e-18)


def test_the_cotangent_of_a_dropout_is_not_that_of_what_it_was_given():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)

        def forward(self, x):
            x = self.fc(x)
            return x + 2 * self.drop(x)

    trace = run(drawn(Beside), [ROWS], gradients=True, training=True)
    np.testing.assert_allclose(3 * trace.cotangents["drop"][0], 2 * trace.cotangents["fc"][0], rtol=1e-15)


def test_a_cotangent_that_is_replaced_is_what_goes_on_and_not_what_is_noted_down():
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)))
    own = run(model, [ROWS], gradients=True)
    put = np.ones((3, 3))
    trace = run(model, [ROWS], gradients=True, forced={"0": Forced(cotangents=(put,))})
    assert equal(trace.cotangents, own.cotangents)
    np.testing.assert_allclose(trace.gradients["0.bias"], 3)
    np.testing.assert_allclose(trace.of_inputs["0"], put @ model[0].weight.detach().numpy().astype(float))
    assert equal(trace.gradients["2.weight"], own.gradients["2.weight"])


def test_later_outputs_count_less_in_the_loss():
    trace = run(drawn(Nested), [ROWS], gradients=True)
    floating = [one for one in trace.results.values() if one.dtype == np.float64]
    assert list(trace.results) == ["first.logits", "second.logits", "second.hidden.0", "second.hidden.1.0", "which"]
    expected = sum(LATER_OUTPUT**i * (np.square(one) / 2 + np.sin(one)).mean() for i, one in enumerate(floating))
    np.testing.assert_allclose(trace.loss, expected, rtol=1e-15)


def test_a_loss_of_the_users_own_is_of_what_the_model_returns():
    trace = run(drawn(Nested), [ROWS], gradients=True, loss=lambda out: out["second"].logits.sum())
    np.testing.assert_allclose(trace.gradients["b.bias"], 3)
    assert np.all(trace.cotangents["b"][0] == 1)


def test_what_no_gradient_reaches_has_zeros_for_one_and_no_cotangent():
    class Detached(Shared):
        def forward(self, x):
            self.step(x)
            return self.first(x).detach() + self.step[0](x)

    model = drawn(Detached)
    model.step[0].bias.requires_grad_(False)
    with adapt(model).at_work("float64") as runner:
        assert runner.trained == {
            "first.weight": True,
            "first.bias": True,
            "step.0.weight": True,
            "step.0.bias": False,
        }
        trace = runner.run([ROWS], gradients=True)
    assert not trace.gradients["first.weight"].any()
    assert trace.gradients["step.0.weight"].any()
    assert "step.0.bias" not in trace.gradients
    assert trace.cotangents["first"] == (None,)
    assert trace.cotangents["step.0#2"][0].any()


def test_training_keeps_batch_statistics_of_the_pass_alone():
    model = drawn(sequential)
    with adapt(model).at_work("float64") as runner:
        before = runner.values()
        trace = runner.run([IMAGES], training=True)
        assert equal(runner.values(), before)
        assert equal(runner.run([IMAGES], training=True).results, trace.results)
    batch = trace.inputs["1"][0]
    mean = 0.9 * before["1.running_mean"] + 0.1 * batch.mean((0, 2, 3))
    np.testing.assert_allclose(trace.statistics["1.running_mean"], mean, rtol=1e-13)
    assert set(trace.statistics) == {"1.running_mean", "1.running_var"}
    assert equal(trace.outputs["4"], trace.inputs["4"])  # the dropout


class Worse(Residual):
    def forward(self, x):
        self.bn1(x)
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_grad_enabled(False)
        raise KeyError("no such\nthing")


@pytest.mark.parametrize("make", [Residual, Worse])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_users_model_and_process_are_left_as_they_were(make, dtype):
    model = drawn(make)
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    model.register_forward_hook(lambda *_: None)

    def state():
        return (
            {name: array.clone() for name, array in model.state_dict().items()},
            {name: (one.requires_grad, one.grad, id(one)) for name, one in model.named_parameters()},
            [module.training for module in model.modules()],
            [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
            torch.get_rng_state(),
            (random.getstate(), str(np.random.get_state())),
            (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        )

    before, inputs = state(), [IMAGES.copy()]
    with adapt(model).at_work(dtype) as runner:
        for options in ({}, {"training": True}, {"training": True, "gradients": True}):
            if make is Worse:
                with pytest.raises(ModelError):
                    runner.run(inputs, **options)
            else:
                runner.run(inputs, **options)
        runner.load({name: np.zeros_like(array) for name, array in runner.values().items()})
        random.random(), np.random.rand(), torch.rand(1)
    after = state()
    for one, other in zip(before, after, strict=True):
        assert str(one) == str(other)
    np.testing.assert_array_equal(inputs[0], IMAGES)


def test_what_is_random_in_eval_mode_shows():
    class Noisy(Functional):
        def forward(self, x):
            return super().forward(x) + F.dropout(x.mean(), 0.5, True) + torch.rand(())

    with adapt(drawn(Noisy)).at_work("float32") as runner:
        one, other = runner.run([IMAGES]), runner.run([IMAGES])
    assert equal(one.outputs, other.outputs)
    assert not equal(one.results, other.results)


def test_values_are_read_and_set_by_name():
    model = drawn(sequential)
    with adapt(model).at_work("float64") as runner:
        values = runner.values()
        assert set(values) == set(runner.trained) == set(model.state_dict())
        assert values["0.weight"].dtype == np.float64
        assert values["1.num_batches_tracked"].dtype == np.int64
        assert runner.trained["0.weight"]
        assert not runner.trained["1.running_var"]
        halved = values["0.weight"] / 3  # of more digits than float32 has
        runner.load({"0.weight": halved[::-1, ::-1]})
        assert equal(runner.values()["0.weight"], halved[::-1, ::-1])
        with pytest.raises(ModelError, match=r"'0.weight' of shape \(2,\), and has \(4, 3, 3, 3\)"):
            runner.load({"0.weight": np.ones(2)})
        with pytest.raises(ModelError, match=r"'9.weight' of shape .* has no such array"):
            runner.load({"9.weight": np.ones(2)})


def test_tied_weights_are_one_array_under_their_first_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    with adapt(drawn(Tied)).at_work("float64") as runner:
        assert list(runner.trained) == ["embed.weight"]
        calls = {call.name: call for call in runner.run([TOKENS]).calls}
        runner.load({"embed.weight": np.ones((11, 4))})
        assert np.all(runner.run([TOKENS]).results[""] == 4)
    assert calls["head"].arrays["kernel"].name == calls["embed"].arrays["table"].name == "embed.weight"


def test_a_model_with_a_part_in_bfloat16_stays_so_in_float32():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3).bfloat16()

        def forward(self, x):
            return self.fc(x.to(self.fc.weight.dtype)).to(x.dtype)

    model = drawn(Half)
    trace = run(model, [ROWS], "float32")
    np.testing.assert_array_equal(trace.results[""], model(torch.tensor(ROWS)).detach().numpy())
    assert trace.outputs["fc"][0].dtype == np.float32
    wide = run(model, [ROWS]).results[""]
    assert 1e-4 < apart(wide, trace.results[""]) < 2e-2


class Rounds(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.fc, self.how = nn.Linear(4, 4), how

    def forward(self, x):
        return self.how(self.fc(x), self.fc)


def scripted_weights(x, fc):
    return F.linear(x, torch.ones(4, 4, dtype=torch.float32))


@pytest.mark.parametrize(
    "how",
    [
        lambda x, fc: x.float().softmax(-1).to(x.dtype),
        lambda x, fc: F.softmax(x, -1, dtype=torch.float32),
        lambda x, fc: fc(x.bfloat16()),
        lambda x, fc: torch.zeros(3, 4, dtype=torch.float32).copy_(x),
        scripted_weights,
        lambda x, fc: torch.ones(3, dtype=torch.float32),
    ],
)
def test_a_cast_inside_leaves_no_float64_twin(how):
    model = nn.Sequential(drawn(lambda: nn.Linear(4, 4)), Rounds(how))
    with (
        adapt(model).at_work("float64") as runner,
        pytest.raises(ModelError, match=r"Sequential, layer '1' \(Rounds\) computes in b?float\d\d inside; compare in"),
    ):
        runner.run([ROWS])


def test_what_takes_its_dtype_from_its_surroundings_has_a_twin():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(4)
            self.scale = torch.full((4,), 0.1)
            self.register_buffer("turn", torch.view_as_complex(torch.ones(2, 2) / 3), persistent=False)

        def forward(self, x):
            mask = torch.zeros_like(x, dtype=torch.float32).double()
            table = torch.sin(torch.arange(4) / torch.linspace(1, 2, 4))
            turned = torch.view_as_real(torch.view_as_complex(x.reshape(3, 2, 2)) * self.turn).flatten(1)
            return self.norm(1e-3 * x) + table + mask + self.scale + turned

    wide, narrow = run(Positions(), [ROWS]).results[""], run(Positions(), [ROWS], "float32").results[""]
    assert wide.dtype == np.float64
    assert apart(wide, narrow) < 1e-6  # with an eps of float64's own it would be 0.05
    table = np.sin(np.arange(4) / np.linspace(1, 2, 4))
    squares = np.square(1e-3 * ROWS.astype(float)).mean(1, keepdims=True) + np.finfo(np.float32).eps
    pairs = ROWS.astype(float).reshape(3, 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * complex(*[float(np.float32(1) / np.float32(3))] * 2)
    turned = np.stack([turned.real, turned.imag], -1).reshape(3, 4)
    expected = 1e-3 * ROWS.astype(float) / np.sqrt(squares) + table + float(np.float32(0.1)) + turned
    np.testing.assert_allclose(wide, expected, rtol=1e-12)


def raising(exception):
    def forward(x):
        raise exception

    return forward


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.fc, self.make = nn.Linear(4, 2), make

    def forward(self, x):
        return self.make(self.fc(x))


class Moves(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc, self.what = nn.Linear(4, 2), what

    def forward(self, x):
        if self.what == "weights":
            self.fc.to("meta")
            return self.fc(x)
        return self.fc(x).to("meta")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3)), r"^Sequential, layer '1' \(Linear\): RuntimeError: mat1 and"),
        (Returns(raising(KeyError("a\nb"))), r"^Returns: KeyError: 'a\\nb'$"),
        (Returns(raising(ValueError("a\nb"))), "^Returns: ValueError: a$"),
        (Returns(raising(AssertionError())), "^Returns: AssertionError$"),
        (Returns(lambda x: x.sum().item()), "^Returns returned a float, not a tensor$"),
        (Returns(lambda x: {"a": [x, "b"]}), "^Returns returned a str as 'a.1', not a tensor$"),
        (Returns(lambda x: [None]), "^Returns returned a list without a tensor$"),
        (Returns(lambda x: None), "^Returns returned a NoneType, not a tensor$"),
        (Named(), r"^Named: TypeError: .*missing 1 required positional argument: 'right'$"),
        (Moves("weights"), "^Moves moved 'fc.weight' from cpu to meta$"),
        (Moves("result"), "^Moves moved its result from cpu to meta$"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(model, message):
    with adapt(model).at_work("float32") as runner, pytest.raises(ModelError, match=message):
        runner.run([ROWS])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": lambda out: out},
            r"the loss of Linear must return a tensor of one number, not one of shape \(3, 2\)",
        ),
        ({"loss": lambda out: 1.0}, "the loss of Linear must return a tensor of one number, not a float"),
        ({"loss": lambda out: out["logits"]}, "the loss of Linear: "),
        ({"forced": {"linear": Forced(outputs=(np.ones(3),))}}, r"output 0 is of shape \(3, 2\), not \(3,\)"),
        ({"forced": {"other": Forced()}}, "Linear made no call 'other'"),
    ],
)
def test_what_a_pass_cannot_be_asked_is_said_in_one_line(options, message):
    with pytest.raises(ModelError, match=message):
        run(nn.Linear(4, 2), [ROWS], gradients=True, **options)


def test_nothing_that_a_loss_could_be_made_of_is_an_error():
    with pytest.raises(ModelError, match="Returns returned nothing of floating point"):
        run(Returns(lambda x: x.argmax(-1)), [ROWS], gradients=True)


class Uncopied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stream = (i for i in range(3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear, "Linear is a class; give an object of it"),
        (3, "a int is neither a torch.nn.Module nor a torch.export.ExportedProgram"),
        (nn.LazyLinear(3), "LazyLinear has no values yet in 'weight'; call it once, or load some"),
        (nn.Linear(3, 2, device="meta"), "Linear has no values yet in 'weight'"),
        (Uncopied(), "Uncopied cannot be copied: TypeError: cannot pickle 'generator' object"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_no_model_is_said_so(model, message):
    with pytest.raises(ModelError, match=message), adapt(model).at_work("float32"):
        pass


def test_a_compiled_model_is_not_taken():
    model = nn.Linear(4, 2)
    model.compile()
    with pytest.raises(ModelError, match="Linear is compiled"):
        adapt(model)


def test_an_input_that_is_changed_in_place_is_named():
    class Changes(Named):
        def forward(self, left, right):
            right += 1
            left.nan_to_num_()
            return super().forward(left, right)

    inputs = {name: array.copy() for name, array in TWO.items()}
    for options in ({}, {"gradients": True}):
        trace = run(drawn(Changes), inputs, **options)
        assert trace.changed_inputs == ("right",)
    assert set(trace.of_inputs) == {"left", "right"}
    assert equal(inputs, TWO)


def test_what_a_model_keeps_of_an_earlier_pass_can_be_copied():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            self.kept = [self.fc(x)]
            return self.kept[0]

    model = drawn(Keeps)
    model(torch.tensor(ROWS))
    with adapt(model).at_work("float64") as runner:
        runner.run([ROWS], gradients=True)
        assert len(runner.steps(lambda model: lambda x: None, [[ROWS]])) == 1


def test_a_weight_that_is_computed_anew_belongs_to_its_layer():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), nn.ReLU())
    trace = run(model, [ROWS], gradients=True)
    assert [call.name for call in trace.calls] == ["0", "1"]
    assert trace.calls[0].operation == Dense()
    assert set(trace.calls[0].arrays) == {
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
    }
    assert trace.gradients["0.parametrizations.weight.original1"].any()


def test_a_layer_that_raises_and_is_gone_around_is_no_call():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x)

    assert [call.name for call in run(Tries(), [ROWS]).calls] == ["right"]


def test_checkpointing_calls_no_layer_twice():
    class Checkpointed(Shared):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.step, x, use_reentrant=False)

    import torch.utils.checkpoint

    model = drawn(Checkpointed)
    trace = run(model, [ROWS], gradients=True)
    assert [call.name for call in trace.calls] == ["step.0", "step.1", "step"]
    assert trace.gradients["step.0.weight"].any()


def test_a_scripted_model_has_results_and_no_layers():
    model = torch.jit.script(drawn(Functional))
    adapter = adapt(model)
    assert (adapter.title, adapter.lacks) == ("Functional", {"layers"})
    trace = run(model, [IMAGES], gradients=True)
    assert trace.calls == ()
    assert apart(trace.results, run(drawn(Functional), [IMAGES]).results) < 1e-15
    assert trace.gradients["fc.weight"].any()


def sgd(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def test_steps_of_the_users_own_are_taken_on_a_copy():
    model = drawn(sequential)
    batches = [[IMAGES], [IMAGES[::-1]], [IMAGES * 2]]
    with adapt(model).at_work("float64") as runner:
        before = runner.values()
        taken = runner.steps(sgd, batches)
        assert equal(runner.values(), before)
        assert equal(runner.steps(sgd, batches)[-1], taken[-1])
    double = copy.deepcopy(model).double()
    double[4].p = 0.0
    step = sgd(double)
    losses = [step(torch.tensor(batch[0].copy(), dtype=torch.float64)).item() for batch in batches]
    assert [one[""] for one in taken] == losses
    assert {*taken[0]} - {""} == {*before}
    assert taken[2]["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 3
    for name, array in double.state_dict().items():
        np.testing.assert_array_equal(taken[2][name], array.numpy())


def test_a_step_that_raises_is_said_in_one_line():
    with (
        adapt(drawn(sequential)).at_work("float32") as runner,
        pytest.raises(ModelError, match=r"^Sequential, step 2 of the user's own: RuntimeError: "),
    ):
        runner.steps(sgd, [[IMAGES], [ROWS]])


def test_an_adapter_says_what_the_numbers_depend_on():
    adapter = adapt(Functional())
    assert adapter.describe()["torch"] == torch.__version__
    assert adapter.describe()["device"] == "cpu"
    assert (adapter.backend, adapter.layout, adapter.title, adapter.lacks) == (
        *("torch", "channels_first", "Functional", frozenset()),
    )


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


RELU = nn.ReLU()


@pytest.mark.parametrize(
    ("layer", "shape", "operation"),
    [
        (
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, groups=2),
            (2, 4, 9, 9),
            Conv(strides=(2, 1), padding=((1, 1), (0, 0)), dilation=(2, 2), groups=2),
        ),
        (
            nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect"),
            (2, 4, 9),
            Conv(strides=(1,), padding=((1, 2),), dilation=(1,), padding_mode="reflect"),
        ),
        (
            nn.Conv3d(4, 6, 1, padding="valid"),
            (2, 4, 3, 3, 3),
            Conv(strides=(1,) * 3, padding=((0, 0),) * 3, dilation=(1,) * 3),
        ),
        (SameConv2d(4, 6, 3, 2), (2, 4, 8, 8), Conv(strides=(2, 2), padding="same", dilation=(1, 1))),
        (Own(4, 6, 3), (2, 4, 8, 8), None),
        (nn.ConvTranspose2d(4, 6, 3), (2, 4, 8, 8), None),
        (nn.Linear(4, 6), (2, 4), Dense()),
        (nn.BatchNorm2d(4, eps=1e-3), (2, 4, 3, 3), BatchNorm(eps=1e-3, momentum=0.9, unbiased=True)),
        (nn.BatchNorm1d(4, momentum=None), (2, 4), BatchNorm(eps=1e-5, momentum=None, unbiased=True)),
        (BiasedBatchNorm2d(4), (2, 4, 3, 3), BatchNorm(eps=1e-5, momentum=0.9)),
        (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 3, 3), None),
        (nn.LayerNorm((4, 3)), (2, 4, 3), LayerNorm(eps=1e-5, axes=2)),
        (nn.RMSNorm(4, eps=1e-6), (2, 4), LayerNorm(eps=1e-6, centred=False)),
        (nn.GroupNorm(2, 4), (2, 4, 3), GroupNorm(eps=1e-5, groups=2)),
        (nn.InstanceNorm2d(4), (2, 4, 3, 3), GroupNorm(eps=1e-5, groups=4)),
        (nn.LocalResponseNorm(3), (2, 4, 3), LocalResponseNorm(size=3, alpha=1e-4, beta=0.75, k=1.0, mean=True)),
        (
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            (2, 4, 8, 8),
            Pool(mode="max", window=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), ceil=True),
        ),
        (nn.MaxPool2d(2, dilation=2), (2, 4, 8, 8), None),
        (
            nn.AvgPool1d(2),
            (2, 4, 8),
            Pool(mode="average", window=(2,), strides=(2,), padding=((0, 0),), counted=True),
        ),
        (SameMaxPool2d((3, 3), 2), (2, 4, 8, 8), Pool(mode="max", window=(3, 3), strides=(2, 2), padding="same")),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 8, 8), GlobalPool(mode="average", keep=True)),
        (nn.AdaptiveMaxPool2d((1, 1)), (2, 4, 8, 8), GlobalPool(mode="max", keep=True)),
        (nn.AdaptiveAvgPool2d(7), (2, 4, 8, 8), None),
        (nn.GELU("tanh"), (2, 4), Activation(name="gelu_tanh")),
        (nn.LeakyReLU(0.2), (2, 4), Activation(name="leaky_relu", slope=0.2)),
        (nn.Hardswish(), (2, 4), Activation(name="hard_silu")),
        (nn.Softmax(1), (2, 4, 3), Softmax(axis=-2)),
        (nn.Softmax(1), (2, 4, 3, 3), Softmax(axis=-1)),
        (nn.Dropout(0.3), (2, 4), Dropout(rate=0.3)),
        (nn.Flatten(), (2, 4, 3, 3), Flatten(channels="first")),
        (nn.ZeroPad2d((1, 2, 3, 4)), (2, 4, 3, 3), Pad(padding=((3, 4), (1, 2)))),
        (nn.ConstantPad1d((1, 2), 1.0), (2, 4, 3), None),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_layers_say_what_they_do(layer, shape, operation):
    inputs = [DRAWN.normal(size=shape).astype(np.float32)]
    with adapt(nn.Sequential(layer, nn.Identity())).at_work("float32") as runner:
        (call, last), values = runner.run(inputs).calls, runner.values()
    assert (call.operation, call.kind) == (operation, type(layer).__name__)
    assert last.operation == Activation(name="identity")
    for held in call.arrays.values():
        held.canonical(values[held.name])


def test_arrays_are_turned_as_their_roles_have_them():
    model = drawn(
        lambda: nn.Sequential(Own(4, 6, (3, 2), groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(144, 5))
    )
    with adapt(model).at_work("float64") as runner:
        calls, values = runner.run([DRAWN.normal(size=(2, 4, 5, 6))]).calls, runner.values()
    conv, norm, _, dense = (
        {role: held.canonical(values[held.name]) for role, held in call.arrays.items()} for call in calls
    )
    assert {role: array.shape for role, array in conv.items()} == {"kernel": (3, 2, 2, 6), "bias": (6,)}
    assert conv["kernel"][1, 0, 1, 4] == values["0.weight"][4, 1, 1, 0]
    assert dense["kernel"][7, 3] == values["3.weight"][3, 7]
    assert set(norm) == {"scale", "bias", "mean", "var"}
    assert equal(norm["var"], values["1.running_var"])


def exported(make, inputs):
    return torch.export.export(drawn(make).eval(), tuple(torch.tensor(one) for one in inputs))


def test_an_exported_program_is_a_row_of_operators():
    program = exported(sequential, [IMAGES])
    adapter = adapt(program)
    assert (adapter.title, adapter.lacks) == ("Sequential", {"training"})
    with adapter.at_work("float64") as runner:
        own = runner.run([IMAGES], gradients=True)
        assert set(runner.trained) == set(drawn(sequential).state_dict())
        leaves = {
            call.name: Forced(
                inputs=own.inputs[call.name], outputs=own.outputs[call.name], cotangents=own.cotangents[call.name]
            )
            for call in own.calls
        }
        again = runner.run([IMAGES], gradients=True, forced=leaves)
        with pytest.raises(ModelError, match="Sequential is an exported program, which has no training mode"):
            runner.run([IMAGES], training=True)
    expected = run(drawn(sequential), [IMAGES], gradients=True)
    assert equal(own.results, expected.results)
    assert apart(own.gradients, expected.gradients) < 1e-14
    assert apart(own.cotangents["batch_norm"], expected.cotangents["1"]) < 1e-14
    assert apart(again.gradients, own.gradients) < 1e-14
    assert equal(again.results, own.results)
    calls = {call.name: call for call in own.calls}
    assert [calls[name].kind for name in ("conv2d", "relu_", "linear")] == ["conv2d", "relu", "linear"]
    assert (calls["conv2d"].layer, calls["conv2d"].operation) == ("0", None)
    assert {role: held.name for role, held in calls["batch_norm"].arrays.items()} == {
        "scale": "1.weight",
        "bias": "1.bias",
        "mean": "1.running_mean",
        "var": "1.running_var",
    }
    assert calls["linear"].arrays["kernel"].axes == (1, 0)
    assert len(own.inputs["batch_norm"]) == 1


@pytest.mark.parametrize("style", ["functional", "residual", "in place", "patches", "attention"])
def test_an_exported_program_computes_what_it_computed(style):
    make, inputs = STYLES[style]
    program = exported(make, inputs)
    expected = program.module()(*(torch.tensor(one) for one in inputs))
    results = run(program, inputs, "float32").results
    expected = expected if isinstance(expected, tuple) else (expected,)
    for one, other in zip(results.values(), expected, strict=True):
        np.testing.assert_array_equal(one, other.detach().numpy())
    assert apart(run(program, inputs).results, run(drawn(make), inputs).results) < 1e-13


def test_an_exported_program_takes_its_inputs_by_name_too():
    program = torch.export.export(drawn(Named).eval(), tuple(torch.tensor(one) for one in TWO.values()))
    assert equal(run(program, TWO).results, run(program, list(TWO.values())).results)


def test_a_traced_graph_that_calls_layers_is_a_module_like_others():
    model = drawn(Residual)
    traced = torch.fx.symbolic_trace(model)
    one, other = run(model, [IMAGES], gradients=True), run(traced, [IMAGES], gradients=True)
    assert [call.name for call in one.calls] == [call.name for call in other.calls]
    assert equal(one.gradients, other.gradients)
