"""Files of a Hugging Face repository, through the hub's own client and cache, which serves where nobody answers."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from common.errors import DownloadError, framework
from common.files import reason
from common.sources import known_weights
from common.sources.checked import LIBRARIES, mismatch
from common.sources.known_weights import KnownWeights

# What a repository may hold, best first; an index stands for the files that it lists.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_LARGEST_INDEX = 10 << 20
_TIMEOUT = (5, 10)  # seconds to connect, and without a byte
_OFFLINE = "not in the cache, and the hub does not answer; is this machine offline?"


def download(reference: str, progress: bool) -> tuple[Path, KnownWeights | None]:
    """The file of a repository, with the files it lists if it is an index, beside it; and what is known of them."""
    asked = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", reference)
    if asked is None:
        raise DownloadError(f"{reference}: expected hf://owner/repo, with @revision and /file behind it if you like")
    repo, revision, file = asked.groups()
    revision = revision and unquote(revision)
    with framework(LIBRARIES):
        import huggingface_hub  # noqa: F401 - the name that the error gives
        import requests  # noqa: F401
    try:
        with _quiet(progress):
            path = _first(repo, revision, [file] if file else FILES)
            if path.name.endswith(".index.json"):
                folder = PurePosixPath(file).parent if file else PurePosixPath()
                for shard in _shards(path):
                    _first(repo, revision, [str(folder / shard)])
    except DownloadError as error:
        raise DownloadError(f"{reference}: {error}") from None
    except Exception as error:  # of the hub's client, its transports and this disk
        raise DownloadError(f"{reference}: {_said(error)}; nothing was kept") from None
    return path, None if revision else known_weights.find(f"hf://{repo}")


def _first(repo: str, revision: str | None, names: Sequence[str]) -> Path:
    """The first of these files that there is, whole and undamaged. Raises `DownloadError`."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    local, problem = not _answers(repo, revision, names[0]), f"there is no {' or '.join(names)}"
    for name in names:
        try:
            return _there(repo, revision, name, local)
        except LocalEntryNotFoundError:
            problem = _OFFLINE
        except EntryNotFoundError:
            continue
    raise DownloadError(problem)


def _answers(repo: str, revision: str | None, name: str) -> bool:
    """Whether anybody answers. The hub's client would try for half a minute before it looks into its cache."""
    import huggingface_hub
    import requests

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
        return requests.head(url, timeout=_TIMEOUT).status_code < 500
    except requests.RequestException:
        return False


def _there(repo: str, revision: str | None, name: str, local: bool) -> Path:
    """A file whose content is what the hub says it is; fetched again if the cache's copy is not."""
    import huggingface_hub

    for again in (False, True):
        path = Path(
            huggingface_hub.hf_hub_download(
                repo, name, revision=revision, force_download=again and not local, local_files_only=local
            )
        )
        problem = mismatch(path, _checksum_of_blob(path))
        if not problem:
            return path
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise DownloadError(f"{name}: {problem}; nothing was kept")


def _shards(index: Path) -> list[str]:
    """The files that an index lists, each a plain name beside it."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            raise ValueError("its weight_map does not name files beside it")
    # Of JSON that is something else, the look-ups raise each its own.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{index.name} is no index of weights: {reason(error)}") from None
    return names


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """The hub's client without its warnings, and without its bars unless they are wanted."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger = logging.getLogger("huggingface_hub")
    level, hide = logger.level, not (progress or are_progress_bars_disabled())
    logger.setLevel(logging.CRITICAL)
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()


def _checksum_of_blob(path: Path) -> str | None:
    """The checksum of a file in the hub's cache: large ones are links to a file whose name it is."""
    name = path.resolve().name
    return f"sha256:{name}" if re.fullmatch("[0-9a-f]{64}", name) else None


def _said(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner asks for a login (`hf auth login`) and for terms to be accepted"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one; see `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    return f"cannot be fetched: {reason(error)}"
