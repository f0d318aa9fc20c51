"""Training in Flax: the recipe's own update, state that survives, and several devices that take one's steps."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_reference import DECAYING, check_unused_arrays_stay, noise, reference, relative, same, trained
from training_reference import RECIPES as SHARED

import resnet_flax
from common import weights as canonical
from common.architectures import find
from common.errors import CheckpointError, DataError, TrainingError
from common.parity.levels import DRAWS, FLOOR, RESPONSE_FACTOR, UNIT
from common.training.recipe import TrainingRecipe
from common.training.trainer import Minibatch
from resnet_flax import backend as probe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TINY = find("resnet20").replace(blocks=(1,), widths=(8,), stem_width=4, in_channels=1, classes=5)

RECIPES = SHARED | {
    "adamw": SHARED["adamw"].replace(decay_norms_and_biases=True),
    "coupled adam": SHARED["coupled adam"].replace(decay_norms_and_biases=False),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield
    compiled.cache_clear()


@pytest.fixture(scope="module")
def histories():
    """By recipe, the batches of six steps in float64 and the state after each."""
    found = {}

    def of(name):
        if name not in found:
            batches = made(RECIPES[name])
            found[name] = batches, trained(begun(RECIPES[name]), batches)
        return found[name]

    return of


def made(recipe, steps=6, spec=TINY, count=8, size=8, dtype="float64"):
    return noise(recipe, spec, steps, count, size, dtype)


@cache
def compiled(recipe, dtype, spec):
    return probe.FlaxBackend(jit=True).trainer(spec, recipe, dtype)


def begun(recipe, dtype="float64", spec=TINY, weights=None):
    """A trainer, of two tests perhaps: compiling one takes seconds."""
    trainer = compiled(recipe, dtype, spec)
    trainer.load(canonical.randomize(spec) if weights is None else weights)
    return trainer


# The update, against common/training/recipe.py written in NumPy


@partial(jax.jit, static_argnames="smoothing")
def slopes(params, batch_stats, images, labels, smoothing):
    def loss(params):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = module.apply(variables, images, mutable=["batch_stats"])
        target = (labels[:, None] == jnp.arange(TINY.classes)) * (1 - smoothing) + smoothing / TINY.classes
        log_likelihood = logits - jnp.log(jnp.exp(logits).sum(1, keepdims=True))
        return -(target * log_likelihood).sum(1).mean(), updates["batch_stats"]

    module = resnet_flax.from_spec(TINY, dtype="float64", param_dtype="float64")
    return jax.value_and_grad(loss, has_aux=True)(params)


def passed(weights, batch, smoothing):
    """Loss and gradients of one pass in training mode, whose running statistics are put into `weights`."""
    variables = resnet_flax.to_variables(TINY, weights, "float64")
    (loss, statistics), tree = slopes(
        variables["params"], variables["batch_stats"], batch.images, batch.labels, smoothing
    )
    weights |= resnet_flax.weights.from_collection(TINY, "batch_stats", statistics)
    return loss, resnet_flax.weights.from_collection(TINY, "params", tree)


@each_recipe
def test_every_step_is_the_recipe_s_own_update(histories, name):
    batches, found = histories(name)
    for step, (ours, theirs) in enumerate(zip(found, reference(RECIPES[name], TINY, batches, passed), strict=True)):
        assert ours.keys() == theirs.keys()
        worst = max(ours, key=lambda key: relative(ours[key], theirs[key]))
        assert relative(ours[worst], theirs[worst]) < 1e-14, (step, worst)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nesterov", {"clip_norm": 0.500001}),
        ("decoupled sgd", {"decay": "coupled"}),
        ("adamw", {"decay_norms_and_biases": False}),
        ("coupled adam", {"clip_norm": 0.3000003}),
    ],
)
def test_what_an_option_changes_shows_in_these_recipes(name, change):
    recipe = RECIPES[name]
    one, other = (reference(r, TINY, made(recipe)[:2], passed)[-1] for r in (recipe, recipe.replace(**change)))
    assert max(relative(one[key], other[key]) for key in one) > 1e-9


def test_float32_takes_the_same_path_in_float32(histories):
    batches, (_, _, double, *_) = histories("nesterov")
    single = trained(begun(RECIPES["nesterov"], "float32"), batches[:3])[-1]
    assert single.keys() == double.keys()
    assert {array.dtype for name, array in single.items() if name != "loss"} == {np.dtype("float32")}
    for name in single:
        assert 1e-9 < relative(single[name], double[name]) < 1e-5, name


# The state


@pytest.mark.parametrize("name", ["nesterov", "no momentum", "adamw"])
def test_the_state_is_whole_before_the_first_step(histories, name):
    after = histories(name)[1][0]  # first: it may be the same trainer's
    trainer, weights = begun(RECIPES[name]), canonical.randomize(TINY)
    found = trainer.arrays()
    assert found.keys() == after.keys() - {"loss"}
    for key, array in found.items():
        kind, _, canonical_name = key.partition("/")
        expected = weights[canonical_name] if kind in ("param", "stat", "ema") else np.zeros_like(array)
        assert np.array_equal(array, expected), key
    same(dict(trainer.export()), weights)


def test_loading_begins_anew_and_nothing_given_out_changes(histories):
    batches, history = histories("nesterov")
    trainer = probe.FlaxBackend(jit=True).trainer(TINY, RECIPES["nesterov"], "float64")
    trainer.load(canonical.randomize(TINY))
    given = [trainer.arrays(), dict(trainer.export()), dict(trainer.export(ema=True))]
    copies = [{name: array.copy() for name, array in arrays.items()} for arrays in given]
    trained(trainer, batches[:3])
    for arrays, copy in zip(given, copies, strict=True):
        same(arrays, copy)
    trainer.load(canonical.randomize(TINY))
    for one, other in zip(trained(trainer, batches), history, strict=True):
        same(one, other)
    assert trainer._step._cache_size() == 1  # compiled once, for the state begun with as for any later one


def test_averages_are_exported_with_the_running_statistics(histories):
    batches, history = histories("adamw")
    trainer = begun(RECIPES["adamw"])
    trained(trainer, batches)
    exported, state = trainer.export(ema=True), history[-1]
    assert list(exported) == list(trainer.export())
    for name, array in exported.items():
        assert np.array_equal(array, state[f"ema/{name}"] if f"ema/{name}" in state else state[f"stat/{name}"])


def test_bfloat16_computes_in_it_and_keeps_float32(histories):
    recipe = RECIPES["nesterov"].replace(precision="bfloat16")
    trainer, batches = begun(recipe, "float32"), made(recipe, steps=3, dtype="float32")
    mixed = trained(trainer, batches)[-1]
    assert {array.dtype for name, array in mixed.items() if name != "loss"} == {np.dtype("float32")}
    assert (
        1e-4
        < relative(mixed["velocity/stem.conv.kernel"], histories("nesterov")[1][2]["velocity/stem.conv.kernel"])
        < 0.5
    )
    program = str(jax.make_jaxpr(trainer._step)(trainer._state, *trainer._arguments(batches[0])))
    convolutions = [line for line in program.splitlines() if "= conv_general_dilated[" in line]
    assert len(convolutions) >= 8  # three forward, and what they have of slopes
    assert all(":bf16[" in line for line in convolutions)
    # Float64 is for proofs.
    same(trained(begun(recipe), histories("nesterov")[0][:1])[0], histories("nesterov")[1][0])


# The loop


def test_fit_ends_after_the_step_that_says_so(histories):
    batches, history = histories("nesterov")
    trainer, seen = begun(RECIPES["nesterov"]), []
    trainer.fit(iter(batches), lambda measured: seen.append(measured) or len(seen) < 3)
    assert [measured.loss for measured in seen] == [state["loss"] for state in history[:3]]
    same(trainer.arrays(), {name: array for name, array in history[2].items() if name != "loss"})
    trainer.fit(iter(batches[3:]), lambda measured: True)
    same(trainer.arrays(), {name: array for name, array in history[-1].items() if name != "loss"})
    trainer.fit(iter([]), lambda measured: True)


@pytest.mark.parametrize("wanted", [2, 1])
def test_an_error_of_the_batches_comes_after_the_step_before_it(histories, wanted):
    batches, history = histories("nesterov")
    trainer, seen = begun(RECIPES["nesterov"]), []

    def failing():
        yield from batches[:wanted]
        raise DataError("an image cannot be read")

    with pytest.raises(DataError, match="an image cannot be read"):
        trainer.fit(failing(), lambda measured: seen.append(measured) or True)
    assert len(seen) == wanted
    same(trainer.arrays(), {name: array for name, array in history[wanted - 1].items() if name != "loss"})
    trainer.fit(failing(), lambda measured: seen.append(measured) or len(seen) < 2 * wanted)  # enough before it


def test_a_step_measures_its_batch_before_the_update():
    recipe, weights = TrainingRecipe(), canonical.randomize(TINY)
    (batch,) = made(recipe, steps=1, count=32)
    backend, seen = probe.FlaxBackend(jit=True), []
    model = backend.build(TINY, "float64")
    backend.load(model, weights)
    output = backend.run(model, batch.images, batch.labels, training=True, gradients=False)
    begun(recipe).fit([batch], lambda measured: seen.append(measured) or True)
    assert seen[0].loss == pytest.approx(float(output["loss"]), rel=1e-13)
    assert seen[0].correct == (output["tap/head.fc"].argmax(1) == batch.labels).sum() > 0
    assert seen[0].count == 32


@pytest.mark.parametrize("ema", [False, True])
def test_evaluation_counts_no_padding_and_changes_nothing(histories, ema):
    batches, history = histories("nesterov")
    trainer, backend = begun(RECIPES["nesterov"]), probe.FlaxBackend(jit=True)
    padding = Minibatch(images=np.full_like(batches[0].images, 7), labels=np.full(8, -1))
    half = Minibatch(images=batches[2].images, labels=np.append(batches[2].labels[:5], [-1] * 3))
    found, states = [], []

    def after(measured):
        found.append(trainer.evaluate(iter([*batches[:2], half, padding]), ema=ema))
        states.append(trainer.arrays() | {"loss": np.float64(measured.loss)})
        return True

    trainer.fit(batches, after)
    for one, other in zip(states, history, strict=True):
        same(one, other)
    model = backend.build(TINY, "float64")
    backend.load(model, trainer.export(ema=ema))
    images = np.concatenate([batch.images for batch in batches[:3]])[:21]
    labels = np.concatenate([batch.labels for batch in batches[:3]])[:21]
    expected = backend.run(model, images, labels, training=False, gradients=False)
    assert found[-1].loss == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert (found[-1].correct, found[-1].count) == ((expected["tap/head.fc"].argmax(1) == labels).sum(), 21)
    assert trainer.evaluate([padding]).count == 0


def test_a_softmax_head_is_trained_on_its_log_probabilities(histories):
    batches, history = histories("nesterov")
    spec = TINY.replace(head="softmax")
    for one, other in zip(trained(begun(RECIPES["nesterov"], spec=spec), batches[:2]), history, strict=False):
        same(one, other)
    # Where float32 has no such probability the loss is still a number, and so is its gradient.
    weights = canonical.randomize(TINY)
    trainer = begun(TrainingRecipe(), "float32", spec, weights | {"head.fc.kernel": weights["head.fc.kernel"] * 1e4})
    (state,) = trained(trainer, batches[:1])
    assert 104 < state["loss"] < np.inf
    assert all(np.isfinite(array).all() for array in state.values())


def test_what_cannot_be_trained_is_one_line():
    with pytest.raises(TrainingError, match=r"ends in head\.pool and has no classifier"):
        begun(TrainingRecipe(), spec=TINY.replace(head="none"))
    trainer = begun(TrainingRecipe())
    for averaged in (lambda: trainer.export(ema=True), lambda: trainer.evaluate([], ema=True)):
        with pytest.raises(TrainingError, match="no moving average of the weights; set ema_decay"):
            averaged()


def test_a_network_without_norms_is_trained():
    spec = TINY.replace(norm=False)
    trainer = begun(TrainingRecipe(learning_rate=0.01), spec=spec)
    first, *_, last = trained(trainer, made(TrainingRecipe(learning_rate=0.01), spec=spec)[:1] * 5)
    assert last["loss"] < first["loss"]
    assert trainer.export().keys() == canonical.shapes(spec).keys()


# Saving and restoring

RESTORED = {
    1: {"sgd": RECIPES["nesterov"], "adamw in bfloat16": RECIPES["adamw"].replace(precision="bfloat16")},
    2: {"sgd": RECIPES["nesterov"]},
}

# Saves in the middle of each training, or goes on from there; either writes the state at the end.
PROCESS = """
import sys
from pathlib import Path
import numpy as np
from common import weights
from resnet_flax import backend as probe
from tests.test_training_flax import RESTORED, TINY, made
folder, threads, restored = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["restored"]
backend = probe.start(threads)
for name, recipe in RESTORED[threads].items():
    trainer, batches = backend.trainer(TINY, recipe, "float32"), made(recipe, count=32, size=16, dtype="float32")
    if restored:
        trainer.restore(folder / name)
        batches = batches[2:]
    else:
        trainer.load(weights.randomize(TINY))
    steps = len(made(recipe)) - len(batches)
    def after(measured):
        global steps
        steps += 1
        if steps == 2:
            (folder / name).mkdir(exist_ok=True)
            trainer.save(folder / name)
        return True
    trainer.fit(batches, after)
    assert steps == 6
    np.savez(folder / f"{name}{' again' if restored else ''}.npz", **trainer.arrays())
"""


def python(code, *arguments, wait=True, **environment):
    """Runs it in a process of its own, with the packages of this tree."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return finished(process) if wait else process


def finished(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.training
@pytest.mark.parametrize("threads", RESTORED)
def test_a_training_restored_in_another_process_goes_on_bit_by_bit(tmp_path, threads):
    for how in ((), ("restored",)):
        assert python(PROCESS, tmp_path, threads, *how) == ("", "")  # quiet, too
    for name in RESTORED[threads]:
        whole, again = (dict(np.load(tmp_path / f"{name}{end}.npz")) for end in ("", " again"))
        same(again, whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, double_precision):
    folder = tmp_path_factory.mktemp("saved")
    begun(RECIPES["nesterov"], "float32").save(folder)
    return folder


def restored(folder, recipe=RECIPES["nesterov"], dtype="float32", spec=TINY):
    """The state read from `folder`."""
    trainer = compiled(recipe, dtype, spec)
    trainer.restore(folder)
    return trainer.arrays()


def refusal(folder, expected):
    """The message of the error that `folder` is refused with; none where it holds the state `expected`."""
    try:
        found = restored(folder)
    except CheckpointError as error:
        return str(error)
    same(found, expected)
    return None


# Orbax gives up in the middle, and tensorstore answers to a loop that is closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_one_line_or_read_as_it_was(saved, tmp_path):
    expected, found, refused = restored(saved), [], defaultdict(set)
    files = [path.relative_to(saved) for path in sorted(saved.rglob("*")) if path.is_file()]
    for number, name in enumerate(files):
        for how in ("gone", "cut", "noise"):
            folder = tmp_path / f"{number} {how}"
            shutil.copytree(saved, folder)
            path = folder / name
            if how == "gone":
                path.unlink()
            elif how == "cut":
                os.truncate(path, path.stat().st_size // 2)
            else:
                path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))
            if (message := refusal(folder, expected)) is not None:
                found.append(message.removeprefix(str(folder)))
                assert message != found[-1]
                refused[str(name)].add(how)
    # Beside these two orbax writes as many files as it happens to, and reads as many as it needs.
    for name in ("orbax/_METADATA", "orbax/manifest.ocdbt"):
        assert refused[name] == {"gone", "cut", "noise"}
    assert refusal(tmp_path / "none", expected)
    assert all(len(message) < 300 and "\n" not in message for message in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": RECIPES["adamw"]}, "missing .*/mu/.*; unexpected .*/trace/"),
        ({"recipe": RECIPES["nesterov"].replace(ema_decay=None)}, "unexpected ema/"),
        ({"dtype": "float64"}, r"is float32 \(.*\), expected float64"),
        ({"spec": TINY.replace(classes=6)}, r"Dense_0/kernel is float32 \(8, 5\), expected float32 \(8, 6\)"),
    ],
)
def test_the_state_of_another_training_is_refused_by_name(saved, changes, message):
    with pytest.raises(CheckpointError, match=f"not the state of this training: .*{message}"):
        restored(saved, **changes)


def test_a_checkpoint_that_cannot_be_written_whole_is_one_line(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
from common import weights
from resnet_flax import backend as probe
from tests.test_training_flax import RECIPES, TINY
trainer = probe.start(1).trainer(TINY, RECIPES["nesterov"], "float32")
trainer.load(weights.randomize(TINY))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # as of a full disk
try:
    trainer.save(Path(sys.argv[1]))
except OSError as error:
    print(error)
"""
    output, _ = python(code, tmp_path)
    assert output.count("\n") == 1
    assert "large" in output


# Several devices

PARALLEL = TINY.replace(block="bottleneck", expansion=2, shortcut="projection")
TOGETHER = TrainingRecipe(
    nesterov=True, weight_decay=5e-4, label_smoothing=0.1, clip_norm=2.0, ema_decay=0.9, warmup_steps=4, steps=10
)

# Ten steps on this process's part of twelve batches: the last process says that it is enough. Then many more.
WORKER = """
import itertools, sys
from pathlib import Path
import numpy as np
from common import weights
from common.training.trainer import SINGLE, Minibatch
from resnet_flax import distributed
from resnet_flax import backend as probe
from tests.test_training_flax import PARALLEL, TOGETHER, made
folder, join = Path(sys.argv[1]), sys.argv[2:] == ["join"]
replica = distributed.join() if join else SINGLE
trainer, seen = probe.start(1).trainer(PARALLEL, TOGETHER, "float64", replica), []
trainer.load(weights.randomize(PARALLEL))
def part(batch):
    mine = slice(replica.rank * 8 // replica.count, (replica.rank + 1) * 8 // replica.count)
    return Minibatch(images=batch.images[mine], labels=batch.labels[mine], learning_rate=batch.learning_rate)
def after(measured):
    seen.append(measured)
    return len(seen) < 10 or replica.rank < replica.count - 1
batches = [part(batch) for batch in made(TOGETHER, steps=12, spec=PARALLEL)]
trainer.fit(batches, after)
assert len(seen) == 10, len(seen)
assert seen[-1].count == 8
trainer.save(folder)
uneven = Minibatch(images=batches[0].images[:3], labels=np.array([0, 1, -1]))
measured = [trainer.evaluate([*batches[:2], uneven], ema=ema) for ema in (False, True)]
values = {f"{n}/{what}": getattr(one, what) for n, one in enumerate(measured) for what in ("loss", "correct", "count")}
np.savez(folder / f"{replica.rank}.npz", last=seen[-1].loss, **values, **trainer.arrays())
if join:
    print("going on", flush=True)
    trainer.fit(itertools.cycle(batches), lambda measured: True)
"""


def processes(code, *arguments, count=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    shared = {"RESNET_PARITY_COORDINATOR": address, "RESNET_PARITY_PROCESSES": str(count)}
    return [python(code, *arguments, wait=False, RESNET_PARITY_PROCESS=str(rank), **shared) for rank in range(count)]


def killed(both, victim):
    """Kill one of two processes once both go on; the exit code of the other, its errors, and how long it took."""
    try:
        for process in both:
            while "going on" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
        both[victim].kill()
        started, other = time.monotonic(), both[1 - victim]
        errors = other.communicate(timeout=120)[1]
        return other.returncode, errors, time.monotonic() - started
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder that two processes wrote, and how one of them ended when the other was killed."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, killed(processes(WORKER, folder, "join"), victim=1)


@pytest.fixture(scope="module")
def alone(double_precision):
    """The state after ten steps in one process on one device, and how far an ulp of the weights moves each array."""
    batches, weights = made(TOGETHER, steps=10, spec=PARALLEL), canonical.randomize(PARALLEL)
    state = trained(begun(TOGETHER, spec=PARALLEL), batches)[-1]
    response = dict.fromkeys(state, 0.0)
    for draw in range(DRAWS):
        moved = trained(begun(TOGETHER, spec=PARALLEL, weights=canonical.perturb(weights, draw)), batches)[-1]
        response = {name: max(response[name], np.linalg.norm(moved[name] - state[name])) for name in state}
    return state, response


def check_at_l1(found, alone):
    state, response = alone
    for name, expected in state.items():
        floor = FLOOR * UNIT["float64"] * np.linalg.norm(expected)
        limit = RESPONSE_FACTOR * max(response[name], floor)
        assert np.linalg.norm(found[name] - expected) <= limit, name
        assert 0 < limit < 1e-9 * max(np.linalg.norm(expected), 1), name


def check_saved_and_measured(folder, found, parts):
    """What several devices saved goes on on one, and what they measured is what one measures."""
    trainer = compiled(TOGETHER, "float64", PARALLEL)
    trainer.restore(folder)
    arrays = trainer.arrays()
    same(arrays, {name: found[name] for name in arrays})
    batches = made(TOGETHER, steps=3, spec=PARALLEL)
    last = [Minibatch(images=batches[0].images[part], labels=np.array([0, 1, -1])) for part in parts]
    for number, ema in enumerate((False, True)):
        expected = trainer.evaluate([*batches[:2], *last], ema=ema)
        assert found[f"{number}/loss"] == pytest.approx(expected.loss, rel=1e-12)
        assert (found[f"{number}/correct"], found[f"{number}/count"]) == (expected.correct, expected.count)
        assert expected.count == 16 + 2 * len(parts)


@pytest.mark.training
def test_two_processes_take_the_steps_of_one_at_l1(alone, pair):
    folder, _ = pair
    found, other = (dict(np.load(folder / f"{rank}.npz")) for rank in range(2))
    same(found, other)
    check_at_l1(found | {"loss": found["last"]}, alone)
    check_saved_and_measured(folder, found, parts=[slice(3), slice(4, 7)])


@pytest.mark.training
def test_two_devices_of_one_process_take_the_steps_of_one_at_l1(alone, tmp_path):
    python(WORKER, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    found = dict(np.load(tmp_path / "0.npz"))
    check_at_l1(found | {"loss": found["last"]}, alone)
    check_saved_and_measured(tmp_path, found, parts=[slice(3)])


@pytest.mark.training
def test_a_process_that_is_killed_ends_the_other_with_an_error(pair):
    _, (code, errors, seconds) = pair
    assert code != 0
    assert seconds < 60
    assert "another process ended or did not answer" in errors


@pytest.mark.training
def test_killing_the_process_that_coordinates_ends_the_other_too():
    code, _, seconds = killed(
        processes("""
from resnet_flax import distributed
from resnet_flax import backend as probe
replica = distributed.join()
probe.start(1)
with distributed.together(replica):
    while distributed.agree(replica, True):
        print("going on", flush=True)
"""),
        victim=0,
    )
    assert code != 0
    assert seconds < 60


def test_uneven_batches_and_wrong_settings_are_one_line(tmp_path):
    code = """
from common.errors import RecipeError, TrainingError
from resnet_flax import distributed
from resnet_flax import backend as probe
from tests.test_training_flax import TINY, RECIPES
try:
    distributed.join()
except TrainingError as error:
    print(error)
try:
    probe.start(1).trainer(TINY, RECIPES["nesterov"].replace(batch_size=3), "float32")
except RecipeError as error:
    print(error)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    for settings, message in (
        ({}, "set RESNET_PARITY_COORDINATOR"),
        ({"RESNET_PARITY_PROCESSES": "2"}, "RESNET_PARITY_COORDINATOR, RESNET_PARITY_PROCESS not set"),
    ):
        output, _ = python(code, **flags, **settings)
        first, second = output.splitlines()
        assert message in first
        assert second == "batch_size=3; expected a multiple of the 2 devices that share it"


@pytest.mark.parametrize("recipe", ["adamw", "nesterov"])
def test_arrays_that_nothing_computes_with_stay_as_they_are(recipe):
    check_unused_arrays_stay(begun, DECAYING[recipe])
