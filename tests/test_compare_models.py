"""Any two models, of whatever framework, are compared by the levels, matched without a table, and left as they were."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError, ModelError, RecordError
from common.parity import DifferentModels, ModelsResult, assert_same, compare_models
from common.parity import record as records
from common.parity.hosts import Ask, Here
from common.parity.matching import in_one_view, turns
from common.parity.record import Record
from common.parity.session import compare_files

IMAGES = np.random.default_rng(0).normal(size=(3, 3, 12, 10)).astype(np.float32)


class Modules(nn.Module):
    """Every step a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 6 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(x)))
        return self.fc(x.flatten(1))


class Functions(nn.Module):
    """The same with other names, and with functions where there are no arrays."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.first = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm_of_first = nn.BatchNorm2d(8, eps=1e-3 if fault == "eps" else 1e-5)
        self.second = nn.Conv2d(8, 8, 3, 1, 1)
        self.norm_of_second = nn.BatchNorm2d(8, momentum=0.3 if fault == "momentum" else 0.1)
        self.head = nn.Linear(8 * 6 * 5, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_of_first(self.first(x)))
        y = self.norm_of_second(self.second(x))
        if self.fault == "detached":
            y = y.detach()
        if self.fault == "random":
            y = F.dropout(y, 0.5)
        return self.head(F.relu(x + y).flatten(1))


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, array in model.state_dict().items():
        if array.dtype == torch.float32:
            low, high = (0.5, 1.5) if "var" in name else (-0.6, 0.6)
            array.copy_(torch.rand(array.shape, generator=generator) * (high - low) + low)
    return model.eval()


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return drawn(Modules())


def port(original: nn.Module, fault: str = "") -> nn.Module:
    model = Functions(fault)
    model.load_state_dict(dict(zip(model.state_dict(), original.state_dict().values(), strict=True)))
    return model.eval()


def verdicts(found: ModelsResult) -> dict[str, bool]:
    return {compared.level: compared.passed for compared in found.comparisons}


def test_two_styles_of_one_network_are_the_same_in_both_levels_and_all_modes(original: nn.Module) -> None:
    found = assert_same(original, port(original), inputs=IMAGES)
    assert verdicts(found) == {"L1": True, "L2": True}
    assert found.modes == ("eval", "train", "grad")
    (pair,) = found.pairs
    assert dict(pair.matching.calls) == {
        "conv1": "first",
        "bn1": "norm_of_first",
        "conv2": "second",
        "bn2": "norm_of_second",
        "fc": "head",
    }
    # What is a module in the one is code before the next layer in the other.
    assert pair.matching.arrays["tap/relu"][0] == "into/second"
    assert pair.matching.arrays["tap/relu#2"][0] == "into/head"
    assert pair.matching.unmatched == ((), ())
    assert {name for name, _ in pair.matching.parameters.values()} == {
        name for name in port(original).state_dict() if "num_batches" not in name
    }


@pytest.mark.parametrize(
    ("fault", "cause", "place"),
    [
        ("eps", "eps", "norm_of_first (bn1)"),
        ("momentum", "momentum", "norm_of_second (bn2)"),
        ("detached", "detached", "norm_of_second (bn2)"),
    ],
)
def test_a_difference_is_an_assertion_with_the_layer_and_the_mistake(
    original: nn.Module, fault: str, cause: str, place: str
) -> None:
    with pytest.raises(DifferentModels) as raised:
        assert_same(original, port(original, fault), inputs=IMAGES)
    (defect,) = raised.value.result.diagnosis.defects
    assert defect.best is not None
    assert (defect.best.cause, defect.place) == (cause, place)
    text = str(raised.value)
    assert "NOT SHOWN TO BE THE SAME" in text
    assert f"`{place}`: yours" in text
    assert "first backwards" in text if fault == "detached" else "first forwards" in text


def test_a_float32_model_alone_is_no_float64_twin_and_the_comparison_says_so(original: nn.Module) -> None:
    class Casting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).float()

    found = compare_models(Casting(original), Casting(port(original)), inputs=IMAGES, modes=("eval",))
    assert verdicts(found) == {"L2": True}
    assert any("no float64 twin" in note and "Casting" in note for note in found.notes)


def test_nothing_stays_in_the_models_or_the_process(original: nn.Module) -> None:
    other = port(original, "eps").train()
    before = {name: array.clone() for name, array in other.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    compare_models(original, other, inputs=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(array, before[name]) for name, array in other.state_dict().items())
    assert other.training
    assert not original.training
    assert all(p.grad is None for p in (*original.parameters(), *other.parameters()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*original.modules(), *other.modules()))


def test_three_models_are_compared_in_all_pairs(original: nn.Module) -> None:
    found = compare_models(
        original, port(original), port(original, "eps"), inputs=IMAGES, names=("a", "b", "c"), modes=("eval",)
    )
    assert {d.pair for d in found.comparisons[0].differences} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert found.comparisons[0].odd_one_out == "c"
    assert [bool(pair.localised) for pair in found.pairs] == [False, True]


def test_steps_of_the_users_own_are_compared_after_each(original: nn.Module) -> None:
    def train(rate: float) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        def begin(model: nn.Module) -> Callable[[Tensor], Tensor]:
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)

            def step(x: Tensor) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                return loss.detach()

            return step

        return begin

    batches = [IMAGES, IMAGES[::-1] * 0.5]
    options: dict[str, Any] = {"inputs": IMAGES, "batches": batches, "modes": ("eval",), "dtypes": ("float64",)}
    assert_same(original, port(original), train=[train(0.01)] * 2, **options)
    found = compare_models(original, port(original), train=[train(0.01), train(0.011)], **options)
    first = found.comparisons[0].first
    assert first is not None
    assert (first.tensor.step, first.tensor.kind) == (1, "param")


def test_a_function_of_arrays_is_compared_by_what_it_returns() -> None:
    def mean(x: np.ndarray) -> np.ndarray:
        return x.mean((2, 3))

    assert_same(mean, lambda x: x.sum((2, 3)) / x[0, 0].size, inputs=IMAGES)
    with pytest.raises(DifferentModels, match="output"):
        assert_same(mean, lambda x: x.mean((2, 3)) * (1 + 1e-9), inputs=IMAGES)
    found = compare_models(nn.AdaptiveAvgPool2d(1), mean, inputs=IMAGES)
    assert found.passed


def test_an_onnx_file_is_held_to_float32(original: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own, of how it exports
        torch.onnx.export(original, (torch.tensor(IMAGES),), path, dynamo=False, input_names=["x"])
    found = compare_models(original, path, inputs=IMAGES)
    assert found.passed
    assert verdicts(found) == {"L2": True}
    assert found.modes == ("eval",)
    assert any("float64" in note for note in found.notes)
    assert not compare_models(port(original, "eps"), path, inputs=IMAGES).passed
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="onnxruntime cannot load it"):
        compare_models(original, broken, inputs=IMAGES)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((2, 3)), x.amax((2, 3))


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2).mean((2, 3))


class NoArray(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return "a word"


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("what nobody foresaw")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Two(), "returns 1 output .*and Two 2"),
        (InPlace(), "changes its input 0 in place"),
        (NoArray(), "returned a str|no array|returns a str"),
        (Raising(), "KeyError"),
        (nn.Flatten(), "no order of axes makes them one"),
        (nn.Module, "is no model; expected a torch.nn.Module"),
        (None, "None is no model"),
        ("somewhere/model.pkl", "is no model; expected"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(model: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as raised:
        compare_models(lambda x: x.mean((2, 3)), model, inputs=IMAGES)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_random_in_eval_mode_is_named_with_the_layer(original: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"Functions is random in eval mode.*first at the input of head"):
        compare_models(original, port(original, "random"), inputs=IMAGES)


def test_arguments_that_contradict_each_other_are_refused(original: nn.Module) -> None:
    for options, message in (
        ({"names": ["a"]}, "names has 1 entries for 2 models"),
        ({"layouts": ["NCHW", "CHWN"]}, "layout 'CHWN' is unknown"),
        ({"modes": ()}, "no mode is left"),
    ):
        with pytest.raises(InputError, match=message):
            compare_models(original, original, inputs=IMAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 model given"):
        compare_models(original, inputs=IMAGES)
    with pytest.raises(ModelError, match="the table names 'conv9', which is no layer and no parameter of Modules"):
        compare_models(original, port(original), inputs=IMAGES, matching={"conv9": "first"})
    with pytest.raises(ModelError, match=r"is no array|has values of type"):
        compare_models(original, original, inputs=["a word"])
    with pytest.raises(ModelError, match="is empty"):
        compare_models(original, original, inputs=IMAGES[:0])


def test_the_users_table_decides(original: nn.Module) -> None:
    found = compare_models(
        original, port(original), inputs=IMAGES, matching={"conv1": "first", "fc.bias": "head.bias"}, modes=("eval",)
    )
    assert found.passed
    assert found.pairs[0].matching.parameters["fc.bias"][0] == "head.bias"


def made(model: nn.Module, path: Path, draws: int, inputs: np.ndarray = IMAGES) -> Record:
    host = Here(model, name=path.stem)
    ask = Ask(inputs=[inputs.astype(np.float64)], dtype="float64", modes=("eval", "grad"), draws=draws, orders=3)
    with host.at_work("float64"):
        found = host.record(ask)
    records.write(path, found, found.manifest)
    return Record.read(path)


def test_records_of_models_are_compared_without_them(original: nn.Module, tmp_path: Path) -> None:
    first = made(original, tmp_path / "a.safetensors", 3)
    same = made(port(original), tmp_path / "b.safetensors", 0)
    other = made(port(original, "eps"), tmp_path / "c.safetensors", 0)
    (compared,) = compare_files([first.path, same.path])
    assert compared.passed
    (compared,) = compare_files([other.path, first.path])
    assert compared.first is not None
    assert str(compared.first.tensor) == "eval/tap/bn1"
    elsewhere = made(original, tmp_path / "d.safetensors", 0, IMAGES[::-1])
    with pytest.raises(RecordError, match="records of different inputs: 0 is not the same"):
        in_one_view([first, elsewhere])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 3, 4, 5), (2, 4, 5, 3)),
        ((2, 3, 1, 1), (2, 3)),
        ((2, 3, 4, 5), (2, 20, 3)),
        ((2, 60), (2, 4, 5, 3)),
        ((2, 7, 3), (7, 2, 3)),
        ((2, 3, 4, 5, 6), (2, 4, 5, 6, 3)),
    ],
)
def test_an_array_goes_to_the_other_layout_and_back(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=b)
    found = list(turns(a, "channels_first", b, "channels_last"))
    assert found
    for turn in found:
        assert turn(array).shape == a == turn.turned
        np.testing.assert_array_equal(turn.back(turn(array)), array)
