"""One error hierarchy: every error a user can cause is a `ParityError` whose message is one line.

A message says what was found, what was expected and what to do; where many files are at fault, a list of them follows.
The command line prints it and exits with 2.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class ParityError(Exception):
    """Root of all errors that resnet-parity raises on purpose."""


class SpecError(ParityError, ValueError):
    """A specification is invalid, contradictory or unknown."""


class WeightsError(ParityError, ValueError):
    """Weights do not fit their specification, or their file is damaged."""


class CheckpointError(WeightsError):
    """A public checkpoint is damaged, unsafe, of no known format, or not a network of ours."""


class DownloadError(WeightsError):
    """Weights cannot be fetched: offline, not there, broken off, or not the file that was published."""


class InputError(ParityError, ValueError):
    """Images or their size cannot be used."""


class DataError(InputError):
    """A data set is missing, damaged, of no known format, or its labels are out of range."""


class RecipeError(ParityError, ValueError):
    """A training recipe is invalid, contradictory or unknown."""


class TrainingError(ParityError, RuntimeError):
    """A training cannot begin or go on: its folder, its checkpoints, or a loss that is not finite."""


class RecordError(ParityError, ValueError):
    """A record is damaged, or two records cannot be compared."""


class ModelError(ParityError, ValueError):
    """A user's own model, or the function that makes it, cannot be used: it raises, or is not what it must be."""


class BackendError(ParityError, RuntimeError):
    """A backend failed while it ran: an exception inside it, or its process ended."""


class BackendMissing(BackendError, ImportError):
    """The framework of a backend is not installed."""


class BackendCrashed(BackendError):
    """The process of a backend ended before it answered: a crash, or a signal from outside."""


@contextmanager
def framework(names: Mapping[str, tuple[str, str]]) -> Iterator[None]:
    """Around an import: raises `BackendMissing` where a framework is not installed.

    `names` give, by the module that is missing, what people call it and the extra that installs it.
    """
    try:
        yield
    except ImportError as error:
        missing = names.get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        name, extra = missing
        raise BackendMissing(f"{name} is not installed; run: pip install 'resnet-parity[{extra}]'") from None
