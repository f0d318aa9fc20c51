"""Weights move between any two frameworks, bitwise, through canonical names."""

from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flax import linen as nn
from written import save_weights

import resnet_flax
import resnet_keras
import resnet_torch
from common import architectures, checkpoints, weights
from common.architectures import Spec
from common.architectures.resnet import ResNetSpec
from common.errors import WeightsError
from common.weights import Weights

VARIANTS = ("resnet18.d2l", "resnet50", "resnext50_32x4d", "resnet20", "resnet50.keras_applications")


class TorchModel:
    def __init__(self, spec: Spec) -> None:
        self.model = resnet_torch.from_spec(spec)

    def load(self, given: Weights) -> None:
        resnet_torch.load_weights(self.model, given)

    def export(self) -> Weights:
        return resnet_torch.export_weights(self.model)


class KerasModel:
    def __init__(self, spec: Spec) -> None:
        self.model = resnet_keras.from_spec(spec)

    def load(self, given: Weights) -> None:
        resnet_keras.load_weights(self.model, given)

    def export(self) -> Weights:
        return resnet_keras.export_weights(self.model)


class FlaxModel:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def load(self, given: Weights) -> None:
        self.variables = resnet_flax.to_variables(self.spec, given)

    def export(self) -> Weights:
        return resnet_flax.from_variables(self.spec, self.variables)


MODELS = {"torch": TorchModel, "keras": KerasModel, "flax": FlaxModel}


def equal(a: Weights, b: Weights) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", [VARIANTS[0], *(pytest.param(name, marks=pytest.mark.long) for name in VARIANTS[1:])])
@pytest.mark.parametrize(("a", "b"), list(permutations(MODELS, 2)))
def test_a_to_b_to_a_is_bitwise(a: str, b: str, name: str) -> None:
    spec = architectures.find(name)
    first, there, back = MODELS[a](spec), MODELS[b](spec), MODELS[a](spec)
    given = weights.randomize(spec, dtype="float32")
    first.load(given)
    there.load(first.export())
    back.load(there.export())
    assert equal(back.export(), given)


TINY = ResNetSpec(block="basic", blocks=(1, 1), widths=(4, 8), stem_width=4, classes=5)
PACKAGES = [resnet_torch, resnet_keras, resnet_flax]


def exported(model: Any) -> Weights:
    if isinstance(model, nn.Module):
        module, variables = model.unbind()
        return resnet_flax.from_variables(module.spec, variables)
    package = resnet_torch if isinstance(model, torch.nn.Module) else resnet_keras
    found: Weights = package.export_weights(model)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn_momentum": 0.99}, "bn_momentum is 0.9 there and 0.99 here"),
        ({"running_variance": "biased"}, "running_variance is 'unbiased' there and 'biased' here"),
        ({"head": "softmax"}, "head is 'logits' there and 'softmax' here"),
        ({"head_pool": "max"}, "head_pool is 'average' there and 'max' here"),
        ({"bn_eps": 1e-3}, "bn_eps is 1e-05 there and 0.001 here"),
    ],
)
def test_a_canonical_file_of_another_network_is_refused_alike(
    tmp_path: Path, package: ModuleType, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, TINY, weights.randomize(TINY, dtype="float32"))
    with pytest.raises(WeightsError, match=message):
        package.from_spec(TINY.replace(**changes), weights=path)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_weights_may_be_a_reference_a_checkpoint_or_arrays(tmp_path: Path, package: ModuleType) -> None:
    drawn = weights.randomize(TINY, dtype="float32")
    for name in ("w.safetensors", "w.pth"):
        save_weights(tmp_path / name, TINY, drawn)
        for given in (tmp_path / name, str(tmp_path / name), checkpoints.read(tmp_path / name), drawn):
            assert equal(exported(package.from_spec(TINY, weights=given)), drawn)
    # The same weights at a finer stride.
    finer = TINY.replace(replace_stride_with_dilation=(True,))
    assert equal(exported(package.from_spec(finer, weights=tmp_path / "w.safetensors")), drawn)


@pytest.mark.slow
def test_arguments_of_a_keras_builder_leave_what_they_say_to_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    spec = architectures.find("resnet20").replace(**architectures.conventions("resnet")["keras_applications"])
    drawn = weights.randomize(spec, dtype="float32")
    save_weights(path, spec, drawn)
    features = resnet_keras.ResNet20(weights=path, include_top=False, pooling="max")
    assert set(exported(features)) == {name for name in drawn if not name.startswith("head.")}
    assert equal(exported(resnet_keras.ResNet20(weights=path, classifier_activation=None)), drawn)
    with pytest.raises(WeightsError, match="classes is 10 there and 7 here"):
        resnet_keras.ResNet20(weights=path, classes=7)
