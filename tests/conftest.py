"""One process per backend for the whole run: importing TensorFlow alone takes seconds."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from operator import attrgetter

import pytest

from common.parity.session import Session
from tests import scripts

pytest_plugins = ["pytester"]

# The suite checks many networks that share their shapes: JAX compiles their operations once for all of them.
os.environ.setdefault("RESNET_PARITY_JIT", "0")

# Nobody reads where in our code an operation stands, and finding it out is a seventh of all that Flax takes here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# And what one process of this run has compiled, the others read: the same program for the same input to the compiler.
# Set here, since the workers of this run and all that they start inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="resnet-parity-jax-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


# The longest first, so that two workers end together.
LONGEST = (
    *("test_training_faults.py", "test_training_digits.py", "test_training_distributed.py"),
    *("test_mutants.py", "test_properties.py", "test_efficientnet.py", "test_checkpoints.py", "test_resnet_flax.py"),
    *("test_cli.py", "test_parity.py", "test_checkpoints_keras.py", "test_checkpoints_fuzz.py"),
    *("test_training_keras.py", "test_resnet_keras.py", "test_columns.py", "test_resnet_torch.py"),
    *("test_inception_v3.py", "test_steps.py", "test_vgg.py", "test_densenet.py", "test_googlenet.py"),
    *(
        "test_pytest_plugin.py",
        "test_cli_checkpoints.py",
        "test_training_flax.py",
        "test_layers.py",
        "test_resnet_v2.py",
    ),
    *("test_backend_process.py", "test_alexnet.py", "test_checkpoints_torch.py", "test_compare.py", "test_lenet.py"),
    *("test_instruction_sets.py", "test_training_dropout.py", "test_datasets.py", "test_experiment.py"),
    *("test_downloads.py", "test_checkpoints_flax.py", "test_docs.py", "test_pipeline.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing goes into the user's cache."""
    os.environ["RESNET_PARITY_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def session() -> Iterator[Session]:
    """The three frameworks."""
    with Session(["torch", "keras", "flax"]) as session:
        yield session


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Models and compiled programs of one file would take gigabytes from the next."""
    yield
    for name, clear in (("jax", "clear_caches"), ("keras", "utils.clear_session")):
        if name in sys.modules:
            attrgetter(clear)(sys.modules[name])()
    if keras := sys.modules.get("keras"):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    gc.collect()


@pytest.fixture(scope="module")
def unoptimised() -> Iterator[None]:
    """JAX in this process compiles without optimising; the session's processes are others."""
    with scripts.unoptimised():
        yield
