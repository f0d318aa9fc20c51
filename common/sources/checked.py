"""Whether a file is the one that was published."""

import hashlib
from pathlib import Path

from common.errors import DownloadError
from common.files import reason

LIBRARIES = {name: (name.replace("_", "-"), "checkpoints") for name in ("requests", "tqdm", "huggingface_hub")}


def mismatch(path: Path, checksum: str | None) -> str:
    """In words how the file differs from its checksum, if it does."""
    if checksum is None:
        return ""
    algorithm, _, digits = checksum.partition(":")
    found = digest(path, algorithm)[: len(digits)]
    if found == digits:
        return ""
    return f"its {algorithm} is {found} and not {digits}: damaged on the way, or not the file that was published"


def digest(path: Path, algorithm: str) -> str:
    """The hexadecimal digits of a file's digest. Raises `DownloadError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DownloadError(f"{path}: cannot be read: {reason(error)}") from None
