"""Weights move between any two frameworks, bitwise, through canonical names."""

from itertools import permutations

import numpy as np
import pytest

import resnet_flax
import resnet_keras
import resnet_torch
from common import architectures, weights
from common.architectures import Spec
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
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("a", "b"), list(permutations(MODELS, 2)))
def test_a_to_b_to_a_is_bitwise(a: str, b: str, name: str) -> None:
    spec = architectures.find(name)
    first, there, back = MODELS[a](spec), MODELS[b](spec), MODELS[a](spec)
    given = weights.randomize(spec, dtype="float32")
    first.load(given)
    there.load(first.export())
    back.load(there.export())
    assert equal(back.export(), given)
