"""The frameworks compute the same function on other processors: with fewer instructions, sums come in other orders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
# The lowest level that each library knows.
LOWEST = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2",
}

# Few channels, many pixels: the networks whose sums show it most.
CODE = """
from common.architectures.resnet import ResNetSpec
from common.images import sample_photos
from common.parity.case import Case
from common.parity.session import Session
from test_parity import explain

SPECS = [
    ResNetSpec(block="basic", blocks=(1,), widths=(4,), stem_kernel=3, stem_stride=1, stem_width=4, stem_pool=False,
               conv_bias=True, classes=7),
    ResNetSpec(block="bottleneck", blocks=(1,), widths=(4,), expansion=2, stem_width=4, classes=7),
]
with Session(["torch", "keras", "flax"]) as session:
    for spec, size, batch in zip(SPECS, (41, 50), (3, 2)):
        case = Case(variant="small", spec=spec, size=(size, size), batch=batch, photos=tuple(sample_photos()),
                    dtypes=("float64",))
        result = session.check(case)
        assert result.passed, explain(result)
        print(result.versions["torch"]["cpu"])
"""


@pytest.mark.parametrize(
    ("settings", "cpu"),
    [pytest.param(AVX2, "AVX2", marks=pytest.mark.long, id="avx2"), pytest.param(LOWEST, "DEFAULT", id="lowest")],
)
def test_small_networks_agree_with_other_instructions(settings: dict[str, str], cpu: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | settings | {"PYTHONPATH": path}
    # What was compiled for this processor is not for that one.
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line.endswith(cpu) for line in done.stdout.splitlines())
    assert done.stdout
