"""Dropout in training: which values are kept is decided once, and every framework's own layer is told."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common import architectures
from common.architectures.vgg import VGGSpec
from common.training import dropout, metrics

pytestmark = pytest.mark.slow

SPEC = VGGSpec(convs=(1,), widths=(4,), hidden=(300, 200), dropout=(0.5, 0.2), classes=3, map_size=(1, 1))
PLACES = np.arange(40, 48)


def made(places=PLACES, seed=3, spec=SPEC, size=(6, 6)):
    return dropout.masks(spec, size, seed, places)


class TestMasks:
    def test_each_dropout_has_one_of_the_shape_of_its_output(self):
        assert {path: (mask.shape, mask.dtype) for path, mask in made().items()} == {
            "head.dropout1": ((8, 300), np.dtype(bool)),
            "head.dropout2": ((8, 200), np.dtype(bool)),
        }

    def test_a_network_without_dropout_has_none(self):
        assert made(spec=architectures.find("resnet18"), size=(64, 64)) == {}

    def test_values_are_dropped_at_the_rate_of_the_layer(self):
        for path, rate in (("head.dropout1", 0.5), ("head.dropout2", 0.2)):
            kept = made(np.arange(2000))[path]
            deviation = (rate * (1 - rate) / kept.size) ** 0.5
            assert abs(kept.mean() - (1 - rate)) < 5 * deviation
            assert abs(kept.mean(axis=0) - (1 - rate)).max() < 5 * deviation * kept.shape[1] ** 0.5

    def test_an_image_takes_its_masks_with_it(self):
        order = np.random.default_rng(0).permutation(len(PLACES))
        for path, mask in made(PLACES[order]).items():
            assert np.array_equal(mask, made()[path][order])
        for part in (slice(0, 4), slice(4, 8)):  # of two processes
            assert all(np.array_equal(mask, made()[path][part]) for path, mask in made(PLACES[part]).items())

    def test_images_layers_and_seeds_share_none(self):
        spec = SPEC.replace(hidden=(300, 300), dropout=(0.5, 0.5))
        rows = [row.tobytes() for seed in (0, 1) for mask in made(seed=seed, spec=spec).values() for row in mask]
        assert len(set(rows)) == 2 * 2 * len(PLACES)

    def test_they_never_change(self):
        digest = sha256(b"".join(np.packbits(mask).tobytes() for mask in made().values())).hexdigest()
        assert digest[:16] == "0628bc9531e73a70"


# y = dropout(x W) V, in training with a given mask, in eval mode, and in training as a user runs it.
NETWORKS = {
    "torch": """
import torch
from torch import nn
from resnet_torch.layers import given_dropout
model = nn.Sequential(nn.Linear(6, 50, bias=False), nn.Dropout(RATE), nn.Linear(50, 2, bias=False)).double()
for layer, kernel in ((model[0], W), (model[2], V)):
    layer.weight.data = torch.tensor(kernel.T)
inputs = torch.tensor(X)
with given_dropout(model, {"1": torch.tensor(MASK)}):
    given, evaluated = model.train()(inputs), model.eval()(inputs)
own = [model.train()(inputs) for _ in range(2)]
""",
    "keras": """
import keras
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
from resnet_keras.layers import with_masks
inputs = keras.Input((6,))
x = keras.layers.Dense(50, use_bias=False)(inputs)
x = keras.layers.Dropout(RATE, name="drop")(x)
y = keras.layers.Dense(2, use_bias=False)(x)
model = keras.Model(inputs, keras.layers.Add()([y, keras.ops.zeros_like(y)]))
masked = with_masks(model, ["drop"])
assert [id(v) for v in masked.weights] == [id(v) for v in model.weights]
for variable, kernel in zip(model.weights, (W, V)):
    variable.assign(kernel)
given, evaluated = masked((X, MASK), training=True), masked((X, MASK), training=False)
own = [model(X, training=True) for _ in range(2)]
again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(masked))
again.set_weights(masked.get_weights())
assert np.array_equal(np.asarray(again((X, MASK), training=True)), np.asarray(given))
""",
    "flax": """
import jax
jax.config.update("jax_enable_x64", True)
from flax import linen as nn
from resnet_flax.layers import given_dropout
class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(RATE)(x, deterministic=not train)
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Inner(name="inner")(nn.Dense(50, use_bias=False)(x), train)
        return nn.Dense(2, use_bias=False)(x)
model, params = Net(), {"params": {"Dense_0": {"kernel": W}, "Dense_1": {"kernel": V}}}
def run(mask, train):
    with given_dropout({("inner", "Dropout_0"): mask}):
        return model.apply(params, X, train)
run = jax.jit(run, static_argnums=1)
given, evaluated = run(MASK, True), run(MASK, False)
own = [model.apply(params, X, True, rngs={"dropout": jax.random.key(seed)}) for seed in range(2)]
""",
}
SCRIPT = """
import json
import numpy as np
generator = np.random.default_rng(0)
RATE = 0.3
X, W, V = (generator.standard_normal(shape) for shape in ((4, 6), (6, 50), (50, 2)))
MASK = generator.random((4, 50)) < 0.7
{network}
plain = lambda tensor: np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor)
expected = np.where(MASK, X @ W / 0.7, 0) @ V
print(json.dumps({{
    "given": float(abs(plain(given) - expected).max()),
    "evaluated": float(abs(plain(evaluated) - X @ W @ V).max()),
    "own": bool((plain(own[0]) == plain(own[1])).any()),
}}))
"""


@pytest.mark.parametrize("column", ["torch", "keras:tensorflow", "keras:jax", "flax"])
def test_the_frameworks_own_layer_keeps_what_it_is_given_in_training_alone(column):
    framework, _, engine = column.partition(":")
    code = SCRIPT.format(network=NETWORKS[framework])
    environment = os.environ | ({"KERAS_BACKEND": engine, "JAX_ENABLE_X64": "1"} if engine else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["given"] < 1e-13
    assert found["evaluated"] < 1e-13
    assert not found["own"], "a user's own dropout draws anew at every call"


# A run of a small VGG, in one go and stopped on the way, and the steps it was given.
RUN = """
import sys
from pathlib import Path
from common import datasets
from common.backends.columns import resolve, start_here
from common.training.recipe import TrainingRecipe
from common.training.run import Observer, Plan, Run
from tests.test_training_dropout import SPEC
folder, column = Path(sys.argv[1]), resolve(sys.argv[2])
backend = start_here(column, 1)
recipe = TrainingRecipe(batch_size=256, steps=4, learning_rate=0.05)
spec = SPEC.replace(in_channels=1, classes=10)
plan = Plan(variant="vgg", spec=spec, dataset=datasets.open("digits"), data="digits", recipe=recipe, backend=column)
def run(name, **observer):
    (folder / name).mkdir(exist_ok=True)
    return Run(plan=plan, folder=folder / name, backend=backend).train(Observer(**observer))
run("whole")
asked = []
stopped = run("stopped", stop=lambda: len(asked.append(1) or asked) == 2)
assert stopped.step == 2 and not stopped.finished
assert run("stopped").resumed == 2
"""


@pytest.mark.training
def test_a_run_that_goes_on_drops_what_it_would_have_dropped_in_every_framework(tmp_path):
    losses = {}
    for column in ("torch", "keras", "flax"):
        folder = tmp_path / column
        folder.mkdir()
        arguments = [sys.executable, "-c", RUN, str(folder), column]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        whole, stopped = (load_file(folder / name / "final.safetensors") for name in ("whole", "stopped"))
        assert all(np.array_equal(whole[name], stopped[name]) for name in whole)
        losses[column] = [line["loss"] for line in metrics.read(folder / "whole") if line["kind"] == "train"]
    # float32: in float64 the steps are proved. Other masks change these losses by 1e-3.
    for column in ("keras", "flax"):
        assert losses[column] == pytest.approx(losses["torch"], rel=1e-5)
