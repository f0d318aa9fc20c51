"""Training in Keras: the recipe's own update, state that survives, and several devices that take one's steps."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

keras = pytest.importorskip("keras")
# ruff: noqa: E402

from training_reference import DECAYING, check_unused_arrays_stay, noise, reference, relative, same
from training_reference import RECIPES as EVERYWHERE
from training_reference import trained as taken

import resnet_keras
from common import weights as canonical
from common.architectures import find
from common.errors import CheckpointError, DataError, RecipeError, TrainingError
from common.parity.levels import DRAWS, FLOOR, RESPONSE_FACTOR, UNIT
from common.training.recipe import TrainingRecipe, shared
from common.training.trainer import SINGLE, Minibatch, Replica
from resnet_keras import backend as probe
from resnet_keras import distributed
from resnet_keras.layers import UnbiasedBatchNormalization
from resnet_keras.weights import variables

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = find("resnet20").replace(blocks=(1, 1, 1), in_channels=1)
STEPS = 5

RECIPES = {name: recipe.replace(batch_size=8) for name, recipe in EVERYWHERE.items()}
RECIPES["nesterov"] = RECIPES["nesterov"].replace(steps=STEPS)


@pytest.fixture(scope="module", autouse=True)  # threads are set before TensorFlow is first used
def backend():
    return probe.start(1)


def made(recipe, steps=STEPS, dtype="float64", seed=0):
    return noise(recipe, TINY, steps, recipe.batch_size, dtype=dtype, seed=seed)


def begun(backend, recipe, dtype="float64", spec=TINY):
    trainer = backend.trainer(spec, recipe, dtype)
    trainer.load(canonical.randomize(spec))
    return trainer


def trained(trainer, batches):
    """As for every framework. Keras, TensorFlow and JAX may say nothing meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return taken(trainer, iter(batches))


# --- The update, against common/training/recipe.py written in NumPy ------------------------------------------------


@cache
def native():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    return resnet_keras.from_spec(TINY)


def passed(weights, batch, smoothing):
    """Loss and gradients of one pass in training mode, whose running statistics are put into `weights`."""
    import tensorflow as tf

    model, target = native(), np.eye(TINY.classes)[batch.labels] * (1 - smoothing) + smoothing / TINY.classes
    resnet_keras.load_weights(model, weights)
    named = variables(model)
    parameters = {name: variable.value for name, variable in named.items() if variable.trainable}
    with tf.GradientTape() as tape:
        output = model(batch.images, training=True)
        loss = tf.reduce_mean(-tf.reduce_sum(target * tf.nn.log_softmax(output), axis=1))
    gradients = {name: gradient.numpy() for name, gradient in tape.gradient(loss, parameters).items()}
    weights |= {name: variable.numpy() for name, variable in named.items() if name not in parameters}
    return loss.numpy(), gradients


@pytest.mark.parametrize("name", RECIPES)
def test_every_step_is_the_recipe_s_own_update(backend, name):
    batches = made(RECIPES[name])
    found, expected = trained(begun(backend, RECIPES[name]), batches), reference(RECIPES[name], TINY, batches, passed)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        worst = max(ours, key=lambda name: relative(ours[name], theirs[name]))
        assert relative(ours[worst], theirs[worst]) < 1e-13, (step, worst)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_float32_takes_the_same_path(backend, name):
    recipe = RECIPES[name]
    single = trained(begun(backend, recipe, "float32"), made(recipe, 3, "float32"))[-1]
    double = reference(recipe, TINY, made(recipe, 3, "float32"), passed)[-1]
    assert {array.dtype for name, array in single.items() if name != "loss"} == {np.dtype("float32")}
    for key in double:
        assert relative(single[key], double[key]) < 1e-5, key


def test_batch_norm_in_one_operation_is_the_one_in_a_dozen():
    inputs = np.random.default_rng(0).normal(1, 2, (4, 9, 7, 5))
    found = {}
    for kind in ("float64", "float32", "float32 in a dozen"):
        layer = UnbiasedBatchNormalization(momentum=0.9, epsilon=1e-5, dtype=kind[:7])
        layer.build(inputs.shape)
        if kind == "float32 in a dozen":
            layer._fusible = lambda inputs: False
        assert layer._fusible(inputs) == (kind == "float32")
        layer.set_weights([np.arange(5) / 3 + 0.5, np.arange(5) - 2, np.arange(5), np.arange(5) + 0.5])
        outputs, losses = gradients(layer, inputs.astype(kind[:7]))
        found[kind] = [outputs, *losses, *layer.get_weights()]
    for one, dozen, exact in zip(found["float32"], found["float32 in a dozen"], found["float64"], strict=True):
        assert relative(one, exact) < 1e-6
        assert relative(dozen, exact) < 1e-6
    # An epsilon of 1.001e-5, as tf.nn.fused_batch_norm would have it, or a biased variance stand far above that.
    assert relative(found["float64"][-1], found["float64"][-1] * 0.996) > 1e-3


def gradients(layer, inputs):
    import tensorflow as tf

    watched = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(watched)
        outputs = layer(watched, training=True)
        loss = tf.reduce_sum(outputs**3)
    return outputs.numpy(), [g.numpy() for g in tape.gradient(loss, [watched, layer.gamma.value, layer.beta.value])]


def test_the_state_is_whole_before_the_first_step_and_loading_begins_anew(backend):
    recipe, weights = RECIPES["adamw"], canonical.randomize(TINY)
    trainer = begun(backend, recipe)
    before, exported = trainer.arrays(), dict(trainer.export())
    same(exported, weights)
    for key, array in before.items():
        kind, _, name = key.partition("/")
        assert np.array_equal(array, weights[name] if kind in ("param", "stat", "ema") else np.zeros_like(array)), key
    kept = {name: array.copy() for name, array in before.items()}
    first = trained(trainer, made(recipe, 2))
    assert before.keys() == first[0].keys() - {"loss"}
    same(before, kept)  # copies
    same(exported, weights)
    averaged = trainer.export(ema=True)
    state = first[-1]
    for name, array in averaged.items():
        assert np.array_equal(array, state[f"ema/{name}"] if f"ema/{name}" in state else state[f"stat/{name}"])
        assert f"stat/{name}" in state or not np.array_equal(array, state[f"param/{name}"])
    trainer.load(weights)
    for one, other in zip(trained(trainer, made(recipe, 2)), first, strict=True):
        same(one, other)


# TensorFlow asks the processor whether it has bfloat16; oneDNN refuses it where fewer instructions are allowed.
needs_bfloat16 = pytest.mark.skipif(
    os.environ.get("ONEDNN_MAX_CPU_ISA") in ("SSE41", "AVX", "AVX2"),
    reason="no bfloat16 with these instructions",
)


@needs_bfloat16
def test_bfloat16_computes_in_it_and_keeps_float32(backend):
    recipe = TrainingRecipe(learning_rate=0.01, precision="bfloat16", batch_size=8)
    trainer = begun(backend, recipe, "float32")
    mixed = trained(trainer, made(recipe, 3, "float32"))[-1]
    full = reference(recipe, TINY, made(recipe, 3, "float32"), passed)[-1]
    assert trainer._model.get_layer("conv1").compute_dtype == "bfloat16"
    assert all(array.dtype == np.float32 for name, array in mixed.items() if name != "loss")
    assert 1e-4 < relative(mixed["velocity/stem.conv.kernel"], full["velocity/stem.conv.kernel"]) < 0.5
    # Float64 is for proofs.
    assert begun(backend, recipe)._model.get_layer("conv1").compute_dtype == "float64"


# --- The loop ------------------------------------------------------------------------------------------------------


def test_fit_ends_after_the_step_that_says_so(backend):
    recipe = RECIPES["nesterov"]
    batches = made(recipe)
    expected = reference(recipe, TINY, batches, passed)
    trainer, seen, read = begun(backend, recipe), [], []

    def stream():
        for batch in batches:
            read.append(batch)
            yield batch

    def after(measured):
        seen.append(measured)
        return len(seen) != 2

    trainer.fit(stream(), after)
    reading = len(read)
    state = trainer.arrays()
    assert max(relative(state[name], expected[1][name]) for name in state) < 1e-13
    assert [measured.loss for measured in seen] == pytest.approx([float(step["loss"]) for step in expected[:2]], 1e-13)
    # Nothing goes on in a thread: neither reading nor training.
    time.sleep(0.3)
    assert len(read) == reading
    same(trainer.arrays(), state)
    # The next fit goes on from there, and none at all is one too.
    trainer.fit(batches[2:], after)
    trainer.fit([], after)
    state = trainer.arrays()
    assert len(seen) == len(batches)
    assert max(relative(state[name], expected[-1][name]) for name in state) < 1e-13


def test_an_error_in_the_data_is_raised_as_it_is_after_the_steps_before_it(backend):
    recipe = RECIPES["nesterov"]
    batches, seen = made(recipe), []

    def broken():
        yield from batches[:3]
        raise DataError("image 7 cannot be read")

    trainer = begun(backend, recipe)
    with pytest.raises(DataError, match=r"^image 7 cannot be read$"):
        trainer.fit(broken(), lambda measured: not seen.append(measured))
    assert len(seen) == 3
    with pytest.raises(DataError, match=r"^image 7 cannot be read$"):
        trainer.evaluate(broken())
    # Nobody asks for what comes after the end.
    trainer.fit(broken(), lambda measured: False)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(batches, lambda measured: 1 // 0)


def test_a_step_measures_its_own_batch_before_its_update(backend):
    recipe = RECIPES["no momentum"].replace(batch_size=32)
    trainer, batches, seen = begun(backend, recipe), made(recipe, 3), []

    def after(measured):
        seen.append((measured, dict(trainer.export())))
        return True

    trainer.fit(batches, after)
    weights = canonical.randomize(TINY)
    model = backend.build(TINY, "float64")
    for batch, (measured, following) in zip(batches, seen, strict=True):
        backend.load(model, weights)
        output = backend.run(model, batch.images, batch.labels, training=True, gradients=False)
        assert measured.correct == (output["tap/head.fc"].argmax(1) == batch.labels).sum() > 0
        assert measured.count == 32
        assert measured.loss == pytest.approx(float(output["loss"]), rel=1e-13)
        weights = following


def test_evaluations_between_steps_count_no_padding_and_change_nothing(backend):
    recipe = RECIPES["nesterov"]
    trainer, batches, found = begun(backend, recipe), made(recipe), []
    test = made(recipe, 3, seed=1)
    padding = Minibatch(images=np.full_like(test[0].images, 7), labels=np.full(8, -1))
    half = Minibatch(images=test[2].images, labels=np.where(np.arange(8) < 5, test[2].labels, -1))

    def after(measured):
        before = trainer.arrays()
        if len(found) < 2:
            arguments = [*test[:2], half, padding]
            exports = [dict(trainer.export(ema=ema)) for ema in (False, True)]
            found.append(([trainer.evaluate(iter(arguments), ema=ema) for ema in (False, True)], exports))
        same(trainer.arrays(), before)
        return True

    trainer.fit(batches, after)
    images = np.concatenate([batch.images for batch in test])[:21]
    labels = np.concatenate([batch.labels for batch in test])[:21]
    model = backend.build(TINY, "float64")
    for measured, exports in found:
        for one, weights in zip(measured, exports, strict=True):
            backend.load(model, weights)
            expected = backend.run(model, images, labels, training=False, gradients=False)
            assert one.loss == pytest.approx(float(expected["loss"]), rel=1e-12)
            assert (one.correct, one.count) == ((expected["tap/head.fc"].argmax(1) == labels).sum(), 21)
    assert trainer.evaluate([padding]).count == 0
    assert trainer.evaluate([]).count == 0
    # Training went on as if there had been none.
    expected, state = reference(recipe, TINY, batches, passed)[-1], trainer.arrays()
    assert max(relative(state[name], expected[name]) for name in state) < 1e-13


def test_a_softmax_head_is_trained_on_its_log_probabilities(backend):
    recipe = RECIPES["nesterov"]
    batches, softmax = made(recipe, 3), TINY.replace(head="softmax")
    found, expected = (
        trained(begun(backend, recipe, spec=softmax), batches)[-1],
        reference(recipe, TINY, batches, passed)[-1],
    )
    assert max(relative(found[name], expected[name]) for name in found) < 1e-12
    # Without smoothing, probabilities that are 0 in float32 are nobody's loss but their own label's.
    plain, weights = recipe.replace(label_smoothing=0.0), canonical.randomize(TINY)
    trainer = backend.trainer(softmax, plain, "float32")
    trainer.load(weights | {"head.fc.kernel": weights["head.fc.kernel"] * 1e3})
    outputs = backend.build(softmax, "float32")
    backend.load(outputs, trainer.export())
    batch = made(plain, 1, "float32")[0]
    likely = backend.run(outputs, batch.images, batch.labels, training=True, gradients=False)["tap/head.softmax"]
    assert (likely == 0).any()
    state = trained(trainer, [Minibatch(images=batch.images, labels=likely.argmax(1), learning_rate=0.1)])[-1]
    assert all(np.isfinite(array).all() for array in state.values())


def test_what_cannot_be_trained_is_one_line(backend):
    with pytest.raises(TrainingError, match=r"ends in head\.pool and has no classifier"):
        backend.trainer(TINY.replace(head="none"), TrainingRecipe(), "float32")
    trainer = begun(backend, RECIPES["no momentum"])
    for averaged in (lambda: trainer.export(ema=True), lambda: trainer.evaluate([], ema=True)):
        with pytest.raises(TrainingError, match="no moving average of the weights; set ema_decay"):
            averaged()


# --- Saving and restoring ------------------------------------------------------------------------------------------

RESTORED = {
    "nesterov": (RECIPES["nesterov"], "float64"),
    "adamw, bfloat16": (RECIPES["adamw"].replace(precision="bfloat16"), "float32"),
}


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [pytest.param(*case, id=name, marks=[needs_bfloat16] * ("bfloat16" in name)) for name, case in RESTORED.items()],
)
def test_a_restored_training_goes_on_bit_by_bit(backend, tmp_path, recipe, dtype):
    batches, folders = made(recipe, dtype=dtype), {0: tmp_path / "0", 3: tmp_path / "3"}
    first, expected = begun(backend, recipe, dtype), []
    for folder in folders.values():
        folder.mkdir()
    first.save(folders[0])

    def after(measured):
        expected.append(first.arrays() | {"loss": np.float64(measured.loss)})
        if len(expected) == 3:
            first.save(folders[3])
        return True

    first.fit(batches, after)
    second = backend.trainer(TINY, recipe, dtype)
    for at, folder in folders.items():
        second.restore(folder)
        for one, other in zip(trained(second, batches[at:]), expected[at:], strict=True):
            same(one, other)


# Saves in the middle of its training, or restores what another process saved there.
PROCESS = """
import sys
from pathlib import Path
from common import weights
from resnet_keras import backend as probe
from tests.test_training_keras import RECIPES, TINY, made
folder, restored, threads = Path(sys.argv[1]), sys.argv[2] == "restored", int(sys.argv[3])
recipe = RECIPES["nesterov"].replace(batch_size=64)
trainer = probe.start(threads).trainer(TINY, recipe, "float32")
batches, steps = made(recipe, dtype="float32"), 0
def after(measured):
    global steps
    steps += 1
    if steps == 3 and not restored:
        trainer.save(folder)
    return True
if restored:
    trainer.restore(folder)
else:
    trainer.load(weights.randomize(TINY))
trainer.fit(batches[3 if restored else 0:], after)
print(weights.digest(trainer.arrays()))
"""


def environment(**more):
    threads = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return os.environ | threads | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | more


def run(*arguments, **more):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.training
def test_processes_with_two_threads_take_the_same_bits(tmp_path):
    more = {"TF_ENABLE_ONEDNN_OPTS": "1"}  # as a training has it, and a check has not
    whole = run("-c", PROCESS, tmp_path, "whole", 2, **more)
    assert run("-c", PROCESS, tmp_path, "restored", 2, **more) == whole


def damaged(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "changed":
        place = content.index(canonical.randomize(TINY)["head.fc.bias"].tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind == "text":
        path.write_text("no state at all\nof anything\n")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model.weights.h5", b"no arrays")


@pytest.fixture(scope="module")
def saved(backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    trainer = begun(backend, RECIPES["adamw"])
    trainer.save(folder)
    return trainer, folder / "state.keras"


@pytest.mark.parametrize("kind", ["missing", "cut short", "changed", "text", "another archive"])
def test_a_damaged_state_is_refused_in_one_line(saved, tmp_path, kind):
    trainer, path = saved
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    trainer.restore(tmp_path)
    damaged(copy, kind)
    with pytest.raises(CheckpointError) as caught:
        trainer.restore(tmp_path)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "spec", "dtype"),
    [
        (RECIPES["nesterov"], TINY, "float64"),
        (RECIPES["adamw"].replace(ema_decay=None), TINY, "float64"),
        (RECIPES["adamw"], TINY.replace(blocks=(1, 1, 2)), "float64"),
        (RECIPES["adamw"], TINY.replace(in_channels=3), "float64"),
        (RECIPES["adamw"], TINY, "float32"),
    ],
)
def test_the_state_of_another_training_is_refused(backend, saved, recipe, spec, dtype):
    _, path = saved
    with pytest.raises(CheckpointError, match=r"not the state of this training: [^\n]+$"):
        backend.trainer(spec, recipe, dtype).restore(path.parent)


def test_keras_itself_opens_a_state(saved):
    trainer, path = saved
    model = keras.models.load_model(path)
    assert type(model.optimizer).__name__ == "AdamW"
    assert len(model.optimizer.variables) == len(trainer._optimizer.variables)
    images = made(RECIPES["adamw"], 1)[0].images
    assert np.array_equal(model(images), trainer._model(images))


def test_a_full_disk_is_what_the_system_says(saved, tmp_path):
    trainer, _ = saved
    (tmp_path / "state.keras").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        trainer.save(tmp_path)


# --- Several devices, several processes ----------------------------------------------------------------------------

LONG = 10
SMALL = TINY.replace(blocks=(1, 1), widths=(16, 32))
SHARED = {
    "sgd": RECIPES["nesterov"].replace(learning_rate=0.01, steps=LONG),
    "adamw": RECIPES["adamw"].replace(learning_rate=1e-3, clip_norm=0.5, steps=LONG),
}


def share(batch, replica):
    every = slice(replica.rank, None, replica.count)
    return Minibatch(images=batch.images[every], labels=batch.labels[every], learning_rate=batch.learning_rate)


def path(trainer, recipe, dtype, replica=SINGLE, draw=None, part=None):
    """The arrays after all steps from the same weights, every loss, and an evaluation; `draw`: moved by an ulp; `part`:
    of the share of this replica, by a process that knows of no other."""
    weights = canonical.randomize(SMALL, dtype=dtype)
    batches = made(recipe, LONG, dtype)
    if draw is not None:
        weights = canonical.perturb(weights, draw)
        batches = [moved(batch, 100 * draw + step) for step, batch in enumerate(batches)]
    part = part or replica
    trainer.load(weights)
    measured = []
    # One of them stops, and so do all.
    trainer.fit(
        [share(batch, part) for batch in [*batches, *batches]],
        lambda one: not measured.append(one) and ((replica.rank == 0 and replica.count > 1) or len(measured) < LONG),
    )
    batches = [share(batch, part) for batch in batches[:3]]
    test = [trainer.evaluate(batches, ema=ema) for ema in (False, True)]
    losses = np.array([one.loss for one in [*measured, *test]])
    counts = np.array([(one.correct, one.count) for one in [*measured, *test]])
    return trainer.arrays() | {"losses": losses, "counts": counts}


def moved(batch, seed):
    images = canonical.perturb_array(batch.images, seed, "images")
    return Minibatch(images=images, labels=batch.labels, learning_rate=batch.learning_rate)


def alone(trainer, recipe, dtype):
    """The path of one device, its one-ulp response, and what a device would do that took the half of each batch for all
    there is."""
    draws = [path(trainer, recipe, dtype, draw=draw) for draw in range(DRAWS)]
    expected = path(trainer, recipe, dtype)
    half = path(trainer, recipe, dtype, part=Replica(rank=0, count=2))
    return expected, {n: max(np.linalg.norm(draw[n] - a) for draw in draws) for n, a in expected.items()}, half


def check_same_path(found, expected, response, half, dtype):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if name == "counts":
            assert np.array_equal(found[name], array)
            continue
        limit = RESPONSE_FACTOR * max(response[name], FLOOR * UNIT[dtype] * np.linalg.norm(array))
        # Or it would decide nothing: how far rounding goes depends on the processor, how far a mistake goes does not.
        mistake = np.linalg.norm(half[name] - array)
        assert limit < mistake / {"float64": 1e6, "float32": 2}[dtype], (name, limit, mistake)
        assert np.linalg.norm(found[name] - array) <= limit, name


MIRRORED = """
import sys
import numpy as np
import tensorflow as tf
from resnet_keras import distributed
from resnet_keras import backend as probe
from tests.test_training_keras import SHARED, SMALL, path
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
replica, backend = distributed.join(), probe.start(1)
for name, recipe in SHARED.items():
    trainer = backend.trainer(SMALL, recipe, "float64", replica)
    assert trainer._model.distribute_strategy.num_replicas_in_sync == 2
    np.savez(f"{sys.argv[1]}/{name}.npz", **path(trainer, recipe, "float64", replica))
"""


@pytest.mark.training
def test_two_devices_of_tensorflow_take_the_steps_of_one(backend, tmp_path):
    run("-c", MIRRORED, tmp_path)
    for name, recipe in SHARED.items():
        expected = alone(backend.trainer(SMALL, recipe, "float64"), recipe, "float64")
        check_same_path(dict(np.load(tmp_path / f"{name}.npz")), *expected, "float64")


# On JAX Keras computes parts of a float64 network in float32, so float32 is what there is to compare.
ALONE = """
import sys
from pathlib import Path
import keras
import numpy as np
from resnet_keras import distributed
from resnet_keras import backend as probe
from tests.test_training_keras import SHARED, SMALL, alone, made, path, trained
folder = Path(sys.argv[1])
distributed.join()
backend = probe.start(1)
trainer = backend.trainer(SMALL, SHARED["sgd"], "float32")
assert keras.distribution.distribution().num_model_replicas == 2
np.savez(folder / "devices.npz", **path(trainer, SHARED["sgd"], "float32"))
keras.distribution.set_distribution(None)
distributed._State.joined = False
for name, recipe in SHARED.items():
    trainer = backend.trainer(SMALL, recipe, "float32")
    for what, arrays in zip(("", "-response", "-half"), alone(trainer, recipe, "float32"), strict=True):
        np.savez(folder / f"{name}{what}.npz", **arrays)
trainer.save(folder)
np.savez(folder / "later.npz", **trained(trainer, made(recipe, 2, "float32"))[-1])
"""

RESTORED_ALONE = """
import sys
from pathlib import Path
import numpy as np
from resnet_keras import backend as probe
from tests.test_training_keras import SHARED, SMALL, made, same, trained
recipe = SHARED["adamw"]
trainer = probe.start(1).trainer(SMALL, recipe, "float32")
trainer.restore(Path(sys.argv[1]))
same(trained(trainer, made(recipe, 2, "float32"))[-1], dict(np.load(sys.argv[1] + "/later.npz")))
"""

TOGETHER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from resnet_keras import distributed
from resnet_keras import backend as probe
from tests.test_training_keras import LONG, SHARED, SMALL, made, path, same, share
folder, name, victim = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
recipe, replica = SHARED[name], distributed.join()
trainer = probe.start(1).trainer(SMALL, recipe, "float32", replica)
found = path(trainer, recipe, "float32", replica)
trainer.save(folder)
trainer.restore(folder)
same(trainer.arrays(), {key: array for key, array in found.items() if "/" in key})
np.savez(folder / f"{replica.rank}.npz", **found)
print("measured", flush=True)
steps = 0
def after(measured):
    global steps
    steps += 1
    if steps == 3 and replica.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return True
try:
    trainer.fit([share(batch, replica) for batch in 100 * made(recipe, LONG, "float32")], after)
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(2)
"""


def started(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-c", *map(str, arguments)],
        env=environment(KERAS_BACKEND="jax", **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def among(rank, count, port):
    names = ("RESNET_PARITY_COORDINATOR", "RESNET_PARITY_PROCESSES", "RESNET_PARITY_PROCESS")
    return dict(zip(names, (f"localhost:{port}", str(count), str(rank)), strict=True))


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


# XLA divides the threads of an operation among the devices: the bits are those of as many devices.
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


@pytest.fixture(scope="module")
def on_jax(tmp_path_factory):
    """What one process of one device does, and of two."""
    folder = tmp_path_factory.mktemp("jax")
    run("-c", ALONE, folder, KERAS_BACKEND="jax", **TWO_DEVICES, **among(0, 1, free_port()))
    return folder


@pytest.mark.training
def test_two_devices_of_jax_take_the_steps_of_one(on_jax):
    devices, *expected = (dict(np.load(on_jax / f"{n}.npz")) for n in ("devices", "sgd", "sgd-response", "sgd-half"))
    check_same_path(devices, *expected, "float32")


@pytest.mark.training
def test_another_process_goes_on_bit_by_bit_on_jax(on_jax):
    run("-c", RESTORED_ALONE, on_jax, KERAS_BACKEND="jax", **TWO_DEVICES)


@pytest.mark.training
@pytest.mark.parametrize(("name", "victim"), [("sgd", 1), ("adamw", 0)])
def test_two_processes_of_jax_take_the_steps_of_one_and_end_together(on_jax, tmp_path, name, victim):
    port, other = free_port(), 1 - victim
    processes = [started(TOGETHER, tmp_path, name, victim, **among(rank, 2, port)) for rank in range(2)]
    with ThreadPoolExecutor() as pool:
        try:
            reading = [pool.submit(process.communicate) for process in processes]
            reading[victim].result(timeout=300)
            reading[other].result(timeout=60)
        finally:
            for process in processes:
                process.kill()
    (text, errors), (others_text, others_errors) = reading[victim].result(), reading[other].result()
    assert text.count("measured") == others_text.count("measured") == 1, errors + others_errors
    assert processes[victim].returncode == -signal.SIGKILL, errors
    assert processes[other].returncode in (2, -signal.SIGABRT), others_errors
    # JAX itself may be the first to end the other one if it is the victim to which all turn.
    told = f"TrainingError: process {other} of 2: another process ended or did not answer" in others_errors
    assert told or (victim == 0 and "another task died" in others_errors), others_errors

    found, others = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    same(others, found)
    expected = (dict(np.load(on_jax / f"{name}{what}.npz")) for what in ("", "-response", "-half"))
    check_same_path(found, *expected, "float32")


def test_joining_says_what_is_missing_and_what_cannot_be(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(TrainingError, match=r"^TF_CONFIG is set, but on TensorFlow .* take the backend keras:jax$"):
        distributed.join()
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(TrainingError, match="on torch Keras trains on one device only"):
        distributed.join()
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("RESNET_PARITY_COORDINATOR", "localhost:1")
    with pytest.raises(TrainingError, match="RESNET_PARITY_PROCESSES, RESNET_PARITY_PROCESS not set"):
        distributed.join()


def test_batches_that_cannot_be_divided_and_a_single_device_are_refused(monkeypatch):
    monkeypatch.setattr(distributed._State, "joined", True)
    with pytest.raises(TrainingError, match=r"TensorFlow has one device only, .*CPU:0; leave --distributed out"):
        distributed.scope(8)
    with pytest.raises(RecipeError, match="batch_size=9; expected a multiple of the 2 devices"):
        shared(9, 2, "devices")


def test_errors_of_one_s_own_are_not_blamed_on_another_process(monkeypatch):
    ends = []
    monkeypatch.setattr(atexit, "register", ends.append)  # it would end this very process
    for error in (ValueError("shapes differ"), DataError("image 7 cannot be read")):
        with pytest.raises(type(error)), distributed.together(Replica(rank=0, count=2)):
            raise error
    assert len(ends) == 2, "the others would wait for ever"


@pytest.mark.parametrize("recipe", ["adamw"])
def test_arrays_that_nothing_computes_with_stay_as_they_are(backend, recipe):
    check_unused_arrays_stay(partial(begun, backend), DECAYING[recipe].replace(batch_size=8))
