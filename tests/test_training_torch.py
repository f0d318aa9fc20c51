"""Training in PyTorch: the recipe's own update, state that survives, and several processes that take one's steps."""

import json
import os
import pickle
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402

from torch.nn import functional as F
from training_reference import DECAYING, check_unused_arrays_stay, noise, reference, relative, same, trained
from training_reference import RECIPES as SHARED

import resnet_torch
from common import weights as canonical
from common.architectures import find
from common.errors import CheckpointError, TrainingError
from common.parity.levels import DRAWS, FLOOR, RESPONSE_FACTOR, UNIT
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch, Replica
from resnet_torch import backend as probe
from resnet_torch import distributed
from resnet_torch.training import FILE
from resnet_torch.weights import slots

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = find("resnet20").replace(blocks=(1, 1, 1), in_channels=1)
BOTTLENECK = TINY.replace(block="bottleneck", running_variance="biased", bn_momentum=0.95)

RECIPES = SHARED | {
    "decoupled nesterov": TrainingRecipe(weight_decay=0.3, decay="decoupled", nesterov=True, momentum=0.7),
}
each_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(scope="module")
def backend():
    return probe.start(1)


def made(recipe, steps=6, spec=TINY, count=8, size=8, seed=0):
    return noise(recipe, spec, steps, count, size, seed=seed)


def begun(backend, recipe, dtype="float64", spec=TINY):
    trainer = backend.trainer(spec, recipe, dtype)
    trainer.load(canonical.randomize(spec))
    return trainer


# --- The update, against common/training/recipe.py written in NumPy ------------------------------------------------


def passed(weights, batch, smoothing):
    """Loss and gradients of one pass in training mode, whose running statistics are put into `weights`."""
    model, table = resnet_torch.from_spec(TINY).double(), slots(TINY)
    resnet_torch.load_weights(model, weights)
    target = F.one_hot(torch.tensor(batch.labels), TINY.classes).double() * (1 - smoothing) + smoothing / TINY.classes
    output = model(torch.tensor(batch.images.transpose(0, 3, 1, 2).copy()))
    loss = -(target * output.log_softmax(1)).sum(1).mean()
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {}
    for name, slot in table.items():
        if slot.native in parameters:
            gradients[name] = slot.view(parameters[slot.native].grad).numpy().copy()
        else:
            weights[name] = model.state_dict()[slot.native].numpy().copy()
    return loss.detach().numpy(), gradients


@each_recipe
def test_every_step_is_the_recipe_s_own_update(backend, recipe):
    batches = made(recipe)
    found, expected = trained(begun(backend, recipe), batches), reference(recipe, TINY, batches, passed)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        worst = max(ours, key=lambda name: relative(ours[name], theirs[name]))
        assert relative(ours[worst], theirs[worst]) < 1e-14, (step, worst)


def test_clipping_and_decay_are_at_work_in_these_recipes(backend):
    for name, change in {
        "nesterov": {"clip_norm": 0.500001},  # what `clip_grad_norm_` would make of it
        "decoupled sgd": {"decay": "coupled"},
        "decoupled nesterov": {"decay_norms_and_biases": False},
        "adamw": {"decay": "coupled"},
        "coupled adam": {"clip_norm": 0.3000003},
    }.items():
        recipe = RECIPES[name]
        batches = made(recipe, steps=2)
        one, other = (trained(begun(backend, r), batches)[-1] for r in (recipe, recipe.replace(**change)))
        assert max(relative(one[key], other[key]) for key in one) > 1e-9, name


@each_recipe
def test_float32_takes_the_same_path(backend, recipe):
    batches = made(recipe, steps=3)
    single, double = (trained(begun(backend, recipe, dtype), batches)[-1] for dtype in ("float32", "float64"))
    assert single.keys() == double.keys()
    assert {array.dtype for name, array in single.items() if name != "loss"} == {np.dtype("float32")}
    # Rounding leaves some 1e-6; moments that lie in memory otherwise than their parameters would leave nothing.
    for name in single:
        assert relative(single[name], double[name]) < 1e-5, name


def test_the_state_is_whole_before_the_first_step(backend):
    weights = canonical.randomize(TINY)
    for name in ("nesterov", "adamw"):
        trainer = begun(backend, RECIPES[name])
        arrays, later = trainer.arrays(), trained(trainer, made(RECIPES[name], steps=1))[0]
        assert arrays.keys() == later.keys() - {"loss"}
        for key, array in arrays.items():
            kind, _, canonical_name = key.partition("/")
            expected = weights[canonical_name] if kind in ("param", "stat", "ema") else np.zeros_like(array)
            assert np.array_equal(array, expected), key
        same(
            dict(trainer.export()),
            {n: later[f"{'stat' if n[-4:] in ('mean', '.var') else 'param'}/{n}"] for n in weights},
        )


def test_loading_begins_anew(backend):
    recipe = RECIPES["adamw"]
    trainer, batches = begun(backend, recipe), made(recipe)
    first = trained(trainer, batches)
    trainer.load(canonical.randomize(TINY))
    for one, other in zip(trained(trainer, batches), first, strict=True):
        same(one, other)


def test_arrays_and_exports_are_copies(backend):
    trainer = begun(backend, RECIPES["nesterov"])
    arrays, exported = trainer.arrays(), dict(trainer.export())
    before = {name: array.copy() for name, array in arrays.items()}
    trained(trainer, made(RECIPES["nesterov"], steps=2))
    same(arrays, before)
    same(exported, canonical.randomize(TINY))


def test_bfloat16_computes_in_it_and_keeps_float32(backend):
    recipe = TrainingRecipe(learning_rate=0.01, precision="bfloat16")
    batches = made(recipe, steps=3)
    mixed = trained(begun(backend, recipe, "float32"), batches)[-1]
    full = trained(begun(backend, recipe.replace(precision="float32"), "float32"), batches)[-1]
    assert all(array.dtype == np.float32 for name, array in mixed.items() if name != "loss")
    assert 1e-4 < relative(mixed["velocity/stem.conv.kernel"], full["velocity/stem.conv.kernel"]) < 0.5
    # Float64 is for proofs.
    same(
        trained(begun(backend, recipe), batches)[-1],
        trained(begun(backend, recipe.replace(precision="float32")), batches)[-1],
    )


# --- The loop ------------------------------------------------------------------------------------------------------


def test_fit_ends_after_the_step_that_says_so_and_goes_on_from_there(backend):
    recipe = RECIPES["nesterov"]
    batches = made(recipe)
    expected = trained(begun(backend, recipe), batches)
    trainer, stream, seen = begun(backend, recipe), iter(batches), []

    def after(measured):
        seen.append(measured)
        return len(seen) != 2

    trainer.fit(stream, after)
    assert len(seen) == 2
    same(trainer.arrays() | {"loss": np.float64(seen[-1].loss)}, expected[1])
    trainer.fit(stream, after)
    assert [measured.loss for measured in seen] == [step["loss"] for step in expected]
    same(trainer.arrays() | {"loss": np.float64(seen[-1].loss)}, expected[-1])


def test_a_step_measures_the_batch_before_its_update(backend):
    recipe = TrainingRecipe()
    (batch,) = made(recipe, steps=1, count=64)
    weights, model = canonical.randomize(TINY), backend.build(TINY, "float64")
    backend.load(model, weights)
    output = backend.run(model, batch.images, batch.labels, training=True, gradients=False)
    measured = []
    begun(backend, recipe).fit([batch], lambda one: not measured.append(one))
    assert measured[0].correct == (output["tap/head.fc"].argmax(1) == batch.labels).sum() > 0
    assert (measured[0].count, len(measured)) == (64, 1)
    assert measured[0].loss == pytest.approx(float(output["loss"]), rel=1e-13)


@pytest.mark.parametrize("ema", [False, True])
def test_evaluation_counts_no_padding_and_changes_nothing(backend, ema):
    recipe = RECIPES["nesterov"]
    trainer = begun(backend, recipe)
    trained(trainer, made(recipe))
    test = made(recipe, steps=3, seed=1, count=24)
    images, labels = (np.concatenate([getattr(batch, what) for batch in test]) for what in ("images", "labels"))
    model = backend.build(TINY, "float64")
    backend.load(model, trainer.export(ema=ema))
    expected = backend.run(model, images, labels, training=False, gradients=False)
    padding = Minibatch(images=np.full_like(test[0].images, 7), labels=np.full(24, -1))
    half = Minibatch(
        images=np.concatenate([test[2].images, padding.images]), labels=np.append(test[2].labels, padding.labels)
    )

    before = trainer.arrays()
    found = trainer.evaluate(iter([*test[:2], half, padding]), ema=ema)
    assert found.loss == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert (found.correct, found.count) == ((expected["tap/head.fc"].argmax(1) == labels).sum(), 72)
    same(trainer.arrays(), before)
    assert trainer.evaluate([padding]).count == 0


def test_training_goes_on_in_training_mode_after_an_evaluation(backend):
    recipe = RECIPES["nesterov"]
    batches, states = made(recipe), []
    trainer = begun(backend, recipe)

    def after(measured):
        trainer.evaluate(batches[:1])
        trainer.evaluate(batches[:1], ema=True)
        states.append(trainer.arrays() | {"loss": np.float64(measured.loss)})
        return True

    trainer.fit(batches, after)
    for one, other in zip(states, trained(begun(backend, recipe), batches), strict=True):
        same(one, other)


def test_averages_are_exported_with_the_running_statistics(backend):
    recipe = RECIPES["nesterov"]
    trainer = begun(backend, recipe)
    state = trained(trainer, made(recipe))[-1]
    for name, array in trainer.export(ema=True).items():
        assert np.array_equal(array, state[f"ema/{name}"] if f"ema/{name}" in state else state[f"stat/{name}"])
        assert f"stat/{name}" in state or not np.array_equal(array, state[f"param/{name}"])


def test_a_softmax_head_is_trained_on_its_log_probabilities(backend):
    recipe = TrainingRecipe(label_smoothing=0.1)
    batches = made(recipe)
    plain = trained(begun(backend, recipe), batches)
    for one, other in zip(
        trained(begun(backend, recipe, spec=TINY.replace(head="softmax")), batches), plain, strict=True
    ):
        same(one, other)
    # Where float32 has no such probability the loss is still a number, and so is its gradient.
    trainer, weights = backend.trainer(TINY.replace(head="softmax"), recipe, "float32"), canonical.randomize(TINY)
    trainer.load(weights | {"head.fc.kernel": weights["head.fc.kernel"] * 1e4})
    (state,) = trained(trainer, batches[:1])
    assert 104 < state["loss"] < np.inf
    assert all(np.isfinite(array).all() for array in state.values())


def test_a_loss_that_is_not_finite_is_reported(backend):
    recipe = RECIPES["nesterov"]
    (batch,) = made(recipe, steps=1)
    batch.images[0, 0, 0] = np.nan
    measured = []
    begun(backend, recipe).fit([batch], lambda one: not measured.append(one))
    assert np.isnan(measured[0].loss)


def test_what_cannot_be_trained_is_one_line(backend):
    with pytest.raises(TrainingError, match=r"ends in head\.pool and has no classifier"):
        backend.trainer(TINY.replace(head="none"), TrainingRecipe(), "float32")
    trainer = begun(backend, TrainingRecipe())
    for averaged in (lambda: trainer.export(ema=True), lambda: trainer.evaluate([], ema=True)):
        with pytest.raises(TrainingError, match="no moving average of the weights; set ema_decay"):
            averaged()


# --- Saving and restoring ------------------------------------------------------------------------------------------

RESTORED = {
    **{name: (RECIPES[name], "float64") for name in ("nesterov", "no momentum", "adamw")},
    "float32": (RECIPES["nesterov"], "float32"),
    "float32 adamw": (RECIPES["adamw"], "float32"),
    "bfloat16": (RECIPES["nesterov"].replace(precision="bfloat16"), "float32"),
}


@pytest.mark.parametrize(("recipe", "dtype"), RESTORED.values(), ids=RESTORED)
@pytest.mark.parametrize("at", [0, 3])
def test_a_restored_training_goes_on_bit_by_bit(backend, tmp_path, recipe, dtype, at):
    batches = made(recipe)
    expected = trained(begun(backend, recipe, dtype), batches)
    first = begun(backend, recipe, dtype)
    trained(first, batches[:at])
    first.save(tmp_path)
    second = backend.trainer(TINY, recipe, dtype)
    second.restore(tmp_path)
    same(second.arrays(), first.arrays())
    for one, other in zip(trained(second, batches[at:]), expected[at:], strict=True):
        same(one, other)


# Saves in the middle of its training, or restores what another process saved there.
PROCESS = """
import sys
from pathlib import Path
from common import weights
from resnet_torch import backend as probe
from tests.test_training_torch import RECIPES, TINY, made
folder, restored = Path(sys.argv[1]), sys.argv[2:] == ["restored"]
recipe = RECIPES["nesterov"]
batches = made(recipe, count=32, size=16)
for threads in (1, 2):
    trainer, steps = probe.start(threads).trainer(TINY, recipe, "float32"), 0
    own = folder / str(threads)
    def after(measured):
        global steps
        steps += 1
        if steps == 3 and not restored:
            own.mkdir()
            trainer.save(own)
        return True
    if restored:
        trainer.restore(own)
    else:
        trainer.load(weights.randomize(TINY))
    trainer.fit(batches[3 if restored else 0:], after)
    print(threads, weights.digest(trainer.arrays()))
"""


def environment(**more):
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **more}


def run(*arguments, **more):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.training
def test_processes_with_the_same_threads_take_the_same_bits(tmp_path):
    whole = run("-c", PROCESS, tmp_path)
    assert run("-c", PROCESS, tmp_path, "restored") == whole
    assert [line.split()[0] for line in whole.splitlines()] == ["1", "2"]


def damaged(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "changed":
        place = content.index(canonical.randomize(TINY)["head.fc.bias"].tobytes())
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif kind == "text":
        path.write_text("no state at all\nof anything\n")
    elif kind == "pickle that runs code":
        path.write_bytes(pickle.dumps(Runs()))
    elif kind == "a list":
        torch.save([1, 2], path)
    else:
        torch.save({"epoch": torch.tensor(1)}, path)


class Runs:
    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "cut short", "changed", "text", "pickle that runs code", "a list", "another table"]
)
def test_a_damaged_state_is_refused_in_one_line(backend, tmp_path, kind):
    begun(backend, RECIPES["adamw"]).save(tmp_path)
    damaged(tmp_path / FILE, kind)
    with pytest.raises(CheckpointError) as caught:
        begun(backend, RECIPES["adamw"]).restore(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "spec", "dtype", "found"),
    [
        (RECIPES["nesterov"], TINY, "float64", "momentum_buffer"),
        (RECIPES["adamw"].replace(ema_decay=None), TINY, "float64", "unexpected average/n_averaged"),
        (RECIPES["adamw"], TINY.replace(blocks=(1, 1, 2)), "float64", r"missing model/layer3\.1"),
        (
            RECIPES["adamw"],
            TINY.replace(in_channels=3),
            "float64",
            r"model/conv1\.weight is torch\.float64 \(16, 1, 3, 3\)",
        ),
        (RECIPES["adamw"], TINY, "float32", r"expected torch\.float32"),
    ],
)
def test_the_state_of_another_training_is_refused(backend, tmp_path, recipe, spec, dtype, found):
    begun(backend, RECIPES["adamw"]).save(tmp_path)
    with pytest.raises(CheckpointError, match=f"not the state of this training: .*{found}"):
        backend.trainer(spec, recipe, dtype).restore(tmp_path)


def test_a_full_disk_is_what_the_system_says(backend, tmp_path):
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        begun(backend, RECIPES["adamw"]).save(tmp_path)


# --- Several processes ---------------------------------------------------------------------------------------------

# Trains on its share of the batches, and writes what it has at the end.
WORKER = """
import json, os, sys
from pathlib import Path
import numpy as np
from common import weights
from resnet_torch import distributed
from resnet_torch import backend as probe
from tests.test_training_torch import CASES, STEPS, made, share
replica = distributed.join()
backend = probe.start(1)
for number, (recipe, spec, fsdp) in enumerate(CASES.values()):
    folder = Path(sys.argv[1]) / str(number)
    folder.mkdir(exist_ok=True)
    os.environ["RESNET_PARITY_FSDP"] = fsdp
    trainer, single = (backend.trainer(spec, recipe, dtype, replica) for dtype in ("float64", "float32"))
    trainer.load(weights.randomize(spec))
    single.load(weights.randomize(spec))
    measured = []
    def after(one):
        measured.append(one)
        # One of them stops, and so do all.
        return replica.rank == 0 or len(measured) < STEPS
    batches = [share(batch, replica) for batch in made(recipe, STEPS + 2, spec)]
    trainer.fit(batches, after)
    trainer.evaluate(batches)
    test = trainer.evaluate(batches, ema=True)
    trainer.save(folder)
    single.fit(batches[:3], lambda measured: True)
    for name, arrays in {"arrays": trainer.arrays(), "export": trainer.export(), "float32": single.arrays()}.items():
        np.savez(folder / f"{name}{replica.rank}.npz", **arrays)
    facts = [any("DTensor" in type(p).__name__ for p in trainer._model.parameters())]
    facts += [[one.loss for one in measured], [one.correct for one in measured], measured[0].count]
    (folder / f"{replica.rank}.json").write_text(json.dumps([*facts, [test.loss, test.correct, test.count]]))
"""
STEPS = 10
SMOOTH = RECIPES["nesterov"].replace(learning_rate=0.01, steps=12)
ADAMW = RECIPES["adamw"].replace(learning_rate=1e-3, clip_norm=0.5, steps=12)
CASES = {
    "ddp": (SMOOTH, TINY, "0"),
    "ddp, bottleneck, biased variance": (ADAMW, BOTTLENECK, "0"),
    "fsdp": (SMOOTH, TINY, "1"),
}


def share(batch, replica):
    every = slice(replica.rank, None, replica.count)
    return Minibatch(images=batch.images[every], labels=batch.labels[every], learning_rate=batch.learning_rate)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder that two processes wrote, by number of the case."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "worker.py").write_text(WORKER)
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "worker.py", folder)
    return folder


@pytest.mark.training
@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_two_processes_take_the_steps_of_one(backend, pair, number):
    recipe, spec, fsdp = list(CASES.values())[number]
    folder = pair / str(number)
    spread, losses, correct, count, test = json.loads((folder / "0.json").read_text())
    assert json.loads((folder / "1.json").read_text()) == [spread, losses, correct, count, test]
    assert spread == bool(int(fsdp))

    alone = backend.trainer(spec, recipe, "float64")
    batches = made(recipe, STEPS + 2, spec)

    def path(weights, seed=None):
        alone.load(weights)
        moved = [batch if seed is None else perturbed(batch, seed + step) for step, batch in enumerate(batches)]
        measured = []
        alone.fit(moved[:STEPS], lambda one: not measured.append(one))
        return alone.arrays() | {"loss": np.array([one.loss for one in measured])}, measured

    draws = [path(canonical.perturb(canonical.randomize(spec), seed), 100 * seed)[0] for seed in range(DRAWS)]
    expected, measured = path(canonical.randomize(spec))
    response = {name: max(np.linalg.norm(draw[name] - array) for draw in draws) for name, array in expected.items()}
    found = dict(np.load(folder / "arrays0.npz"))
    same(dict(np.load(folder / "arrays1.npz")), found)
    for name, array in (found | {"loss": np.array(losses)}).items():
        limit = RESPONSE_FACTOR * max(response[name], FLOOR * UNIT["float64"] * np.linalg.norm(expected[name]))
        assert limit < 1e-9 * max(np.linalg.norm(expected[name]), 1e-3), name  # or it would decide nothing
        assert np.linalg.norm(array - expected[name]) <= limit, name
    assert (correct, count) == ([one.correct for one in measured], measured[0].count)
    whole = alone.evaluate(batches, ema=True)
    assert test == [pytest.approx(whole.loss, rel=1e-10), whole.correct, whole.count]

    # What they saved goes on in one process.
    alone.restore(folder)
    same(alone.arrays(), found)
    same(dict(alone.export()), dict(np.load(folder / "export0.npz")))

    # In float32 the layout of gradients in memory is another.
    single, found = backend.trainer(spec, recipe, "float32"), dict(np.load(folder / "float320.npz"))
    single.load(canonical.randomize(spec))
    single.fit(batches[:3], lambda measured: True)
    assert max(relative(found[name], array) for name, array in single.arrays().items()) < 1e-5


def perturbed(batch, seed):
    images = canonical.perturb_array(batch.images, seed, "images")
    return Minibatch(images=images, labels=batch.labels, learning_rate=batch.learning_rate)


KILLED = """
import os, signal, sys, time
from itertools import cycle
from common import weights
from common.errors import ParityError
from resnet_torch import distributed
from resnet_torch import backend as probe
from tests.test_training_torch import CASES, TINY, made
recipe = CASES["ddp"][0]
steps = 0
def after(measured):
    global steps
    steps += 1
    if steps == 3 and replica.rank == 1:
        print("killed", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return True
try:
    replica = distributed.join()
    trainer = probe.start(1).trainer(TINY, recipe, "float32", replica)
    trainer.load(weights.randomize(TINY))
    trainer.fit(cycle(made(recipe)), after)
except ParityError as error:
    print("ended", time.time(), flush=True)
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.training
def test_a_killed_process_ends_the_others_within_a_minute():
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = str(probing.getsockname()[1])
    # Without torchrun, which would end the others itself: on another machine its agent may be gone too.
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED], env=environment(RANK=rank, **where), **pipes) for rank in "01"
    ]
    (out, error), (killed, _) = (process.communicate(timeout=200) for process in processes)
    assert [process.returncode for process in processes] == [1, -9]
    assert error.strip().splitlines()[-1].startswith("TrainingError: process 0 of 2: another process ended")
    assert float(out.split()[-1]) - float(killed.split()[-1]) < 60


def test_joining_outside_torchrun_says_how_to(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(TrainingError, match=r"RANK is not set, .* run: torchrun"):
        distributed.join()


def test_joining_nobody_is_one_line(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.timedelta(seconds=1))
    with pytest.raises(TrainingError, match=r"the other processes cannot be reached at 127\.0\.0\.1:9: ") as caught:
        distributed.join()
    assert "\n" not in str(caught.value)


def test_errors_of_one_s_own_are_not_blamed_on_another_process():
    pair = Replica(rank=0, count=2)
    for error in (RuntimeError("out of memory"), TrainingError("of gloo")):
        with pytest.raises(type(error), match=str(error)), distributed.together(pair):
            raise error
    with pytest.raises(RuntimeError, match="gloo"), distributed.together(Replica()):
        raise RuntimeError("gloo")


@pytest.mark.parametrize("recipe", DECAYING)
def test_arrays_that_nothing_computes_with_stay_as_they_are(backend, recipe):
    check_unused_arrays_stay(partial(begun, backend), DECAYING[recipe])
