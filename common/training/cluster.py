"""Which processes train together, where no cluster manager says so: three environment variables, for JAX's engines."""

import os

from common.errors import TrainingError

# host:port of process 0, how many there are, and which one this is, counted from 0.
SETTINGS = ("RESNET_PARITY_COORDINATOR", "RESNET_PARITY_PROCESSES", "RESNET_PARITY_PROCESS")


def given() -> dict[str, str]:
    """Those that are set."""
    return {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def complete() -> list[str | None]:
    """All three in order, or three times None where none is set. Raises `TrainingError` where some are missing."""
    found = given()
    if found and len(found) < len(SETTINGS):
        missing = ", ".join(name for name in SETTINGS if name not in found)
        raise TrainingError(f"{missing} not set; set all of {', '.join(SETTINGS)}, or none where JAX knows the cluster")
    return [found.get(name) for name in SETTINGS]
