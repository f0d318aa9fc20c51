"""Weights from anywhere: a path, a URL, or the name of published weights, into a whole file on this disk.

A download goes into a file of its own beside its target, under a lock, and takes the target's name only when it is
complete and its checksum right; whatever goes wrong, nothing of it stays. What a killed process leaves is never used,
and the next download of the same file starts it anew.
"""

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urldefrag, urlsplit

from common.errors import DownloadError, framework
from common.files import cache_folder, reason
from common.sources import known_weights
from common.sources.known_weights import KnownWeights

_TIMEOUT = (10, 30)  # seconds to connect, and without a single byte
_ATTEMPTS = 8  # each goes on where the one before broke off; two in a row that get nowhere are enough
_CHUNK = 1 << 16  # of the last one that breaks off, nothing arrives
_LARGEST_INDEX = 10 << 20
_SOURCES = ("torchvision", "keras")
_EXPECTED = (
    "a file, a URL, torchvision:IMAGENET1K_V2, torchvision:resnet50:IMAGENET1K_V2, keras:imagenet or hf://owner/repo"
)
# What a repository may hold, best first; an index stands for the files that it lists.
_HUB_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_LIBRARIES = {
    name: (name.replace("_", "-"), "checkpoints") for name in ("pooch", "requests", "tqdm", "huggingface_hub")
}


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A file of weights on this disk, what is known of it, and what a person should read of how it came."""

    path: Path
    known: KnownWeights | None = None
    notes: tuple[str, ...] = ()


def fetch(reference: str | Path, *, variant: str | None = None, progress: bool | None = None) -> Fetched:
    """The file behind a reference, downloaded unless it is in the cache.

    `reference` is a path; an http(s) URL, with ``#sha256=…`` or ``#md5=…`` behind it to have it checked;
    ``torchvision:IMAGENET1K_V2``, ``keras:imagenet`` or ``keras:imagenet:notop`` for a network whose name `variant`
    gives, or with the name inside (``torchvision:resnet50:IMAGENET1K_V2``); or ``hf://owner/repo[@revision][/file]``.
    URLs are cached in $RESNET_PARITY_CACHE, or the user's cache folder; ``hf://`` in Hugging Face's own cache.
    `progress` shows a bar on standard error; by default on a terminal. Raises `DownloadError`; `BackendMissing` without
    the extra `checkpoints`.
    """
    if isinstance(reference, Path) or os.path.exists(reference):
        return _local(Path(reference))
    if progress is None:
        progress = sys.stderr.isatty()
    source, _, rest = reference.partition(":")
    if source in _SOURCES:
        known = _known(source, rest, variant)
        assert known.url is not None
        return _downloaded(known.url, known, progress)
    if reference.startswith("hf://"):
        return _from_hub(reference, progress)
    if reference.startswith(("http://", "https://")):
        try:
            url, fragment = urldefrag(reference)
            urlsplit(url)
        except ValueError as error:
            raise DownloadError(f"the weights' URL is none: {reason(error)}") from None
        return _downloaded(url, known_weights.find(url), progress, fragment)
    raise DownloadError(f"weights {reference!r}: there is no such file; expected {_EXPECTED}")


def _local(path: Path) -> Fetched:
    if not path.exists():
        raise DownloadError(f"weights {str(path)!r}: there is no such file")
    return Fetched(path=path)


def _known(source: str, rest: str, variant: str | None) -> KnownWeights:
    """The entry of the table that ``source:rest`` names, for a variant if `rest` names none."""
    asked = f"{source}:{rest}"
    there = [known for known in known_weights.table() if known.reference.startswith(f"{source}:")]
    first, _, tag = rest.partition(":")
    named = first if first in {known.variant for known in there} else None
    wanted = variant.partition(".")[0] if variant else named
    if named is None:
        tag = rest
    elif wanted != named:
        raise DownloadError(f"{asked}: these are weights of {named}, and the network is {variant}")
    if wanted is None:
        example = next((known.variant for known in there if known.reference.endswith(f":{tag}")), there[0].variant)
        raise DownloadError(f"{asked}: of which network? write {source}:{example}:{tag}, for instance")
    known = known_weights.find(f"{source}:{wanted}:{tag}")
    if known is not None:
        return known
    tags = [known.reference.removeprefix(f"{source}:{wanted}:") for known in there if known.variant == wanted]
    if tags:
        raise DownloadError(f"{asked}: no such weights of {wanted}; there are {', '.join(tags)}")
    names = ", ".join(dict.fromkeys(known.variant for known in there))
    raise DownloadError(f"{asked}: {source} has published no weights of {wanted}; of {names} it has")


# --- http(s) --------------------------------------------------------------------------------------------------------


def _downloaded(url: str, known: KnownWeights | None, progress: bool, fragment: str = "") -> Fetched:
    """The file at a URL: from the cache where it is there and undamaged, or downloaded."""
    checksum = _checksum(url, fragment) or (known.checksum if known else None)
    path = cache_folder() / _cache_name(url, known)
    notes = []
    # Without the lock first: a cache may be shared, and not to be written.
    if not _in_cache(path, checksum):
        with _lock(path) as part:
            if not _in_cache(path, checksum):
                if path.exists():
                    notes.append(f"{path}: the copy in the cache was damaged; downloaded again")
                _download(url, path, part, checksum, progress)
    if checksum is None:
        digest = _digest(path, "sha256")
        notes.append(f"{_shown(url)}: unverified, no checksum is known; to have it checked, append #sha256={digest}")
    return Fetched(path=path, known=known, notes=tuple(notes))


def _checksum(url: str, fragment: str) -> str | None:
    """The checksum in the fragment of a URL, as algorithm:digits."""
    if not fragment:
        return None
    found = re.fullmatch(r"sha256=([0-9a-f]{64})|md5=([0-9a-f]{32})", fragment.lower())
    if found is None:
        raise DownloadError(f"{_shown(url)}#{fragment}: expected #sha256= and 64 hexadecimal digits, or #md5= and 32")
    return fragment.lower().replace("=", ":")


def _cache_name(url: str, known: KnownWeights | None) -> str:
    """A known file keeps its name, which its publisher keeps unique; that of others says their URL too."""
    return _name(url) if known else f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{_name(url)}"


def _name(url: str) -> str:
    """The last part of a URL, as a file may be called."""
    name = unquote(urlsplit(url).path).rpartition("/")[2] or "weights"
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[-100:]


@contextmanager
def _lock(path: Path) -> Iterator[IO[bytes]]:
    """The file beside `path` into which it is downloaded, this process alone; gone again when the block ends."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(part)
    except OSError as error:
        raise DownloadError(f"{part}: cannot be written: {reason(error)}") from None
    try:
        yield file
    finally:
        # Renamed by now, the name may be another process's.
        if _is_named(file, part):
            part.unlink()
        # What a full disk did not take, it does not take on closing either.
        with suppress(OSError):
            file.close()


def _locked(part: Path) -> IO[bytes]:
    import fcntl  # POSIX alone has it, and only a download wants it

    while True:
        file = part.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Not so if whoever had the lock before has renamed or removed the file.
        if _is_named(file, part):
            return file
        file.close()


def _is_named(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _download(url: str, path: Path, part: IO[bytes], checksum: str | None, progress: bool) -> None:
    """Download into `part` and give it the name `path`. Raises `DownloadError`."""
    with framework(_LIBRARIES):
        import pooch  # noqa: F401 - `_transfer` wants it; that it is missing is to be said before anything else
        import requests
        import tqdm  # noqa: F401
    shown, transfer = _shown(url), _Transfer(part)
    try:
        _transfer(url, transfer, progress)
        problem = transfer.problem() or _mismatch(Path(part.name), checksum)
        if problem:
            raise DownloadError(f"{shown}: {problem}; nothing was kept")
        os.fsync(part.fileno())
        os.replace(part.name, path)
    # A class of OSError: asked for first.
    except requests.RequestException as error:
        raise DownloadError(f"{shown}: {_said(error, urlsplit(url), transfer)}; nothing was kept") from None
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {reason(error)}; nothing was kept") from None


def _transfer(url: str, transfer: "_Transfer", progress: bool) -> None:
    """Every byte of the body, in as many attempts as get further."""
    import pooch
    import requests
    from tqdm import tqdm

    # pooch asks a bar for its truth, which is whether its total is above 0.
    bar = tqdm(total=1, unit="B", unit_scale=True, desc=_name(url), leave=False, disable=not progress)
    idle = 0
    with closing(bar):
        for attempt in range(_ATTEMPTS):
            get = pooch.HTTPDownloader(
                progressbar=bar,
                chunk_size=_CHUNK,
                timeout=_TIMEOUT,
                headers={"Accept-Encoding": "identity", **transfer.resume()},
                hooks={"response": transfer.begin},
            )
            try:
                get(url, transfer.part, None)
                return
            except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError):
                idle = 0 if transfer.advanced() else idle + 1
                if attempt == _ATTEMPTS - 1 or idle == 2 or not transfer.answered:
                    raise
                bar.reset(total=1)


class _Transfer:
    """What the answers to one download have said: how long it is, and how to go on with it."""

    def __init__(self, part: IO[bytes]) -> None:
        self.part = part
        self.total: int | None = None
        self.validator = ""
        self.answered = False
        self.before = 0  # bytes there were when the last attempt began

    def resume(self) -> dict[str, str]:
        """The headers that ask for the rest, if it is sure to be the rest of the same file."""
        self.answered = False
        self.before = self.part.seek(0, os.SEEK_END)
        return {"Range": f"bytes={self.before}-", "If-Range": self.validator} if self.before and self.validator else {}

    def begin(self, response: Any, *args: Any, **kwargs: Any) -> None:
        """Called with each answer before its body is read."""
        if response.status_code not in (200, 206):
            return
        self.answered = True
        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise DownloadError(f"{_shown(response.url)}: the server sent a web page, not a file of weights")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(f"{_shown(response.url)}: the server sent a compressed body, which was not asked for")
        ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code == 206 and (ranged is None or int(ranged[1]) != self.before):
            raise DownloadError(f"{_shown(response.url)}: the server sent another part than was asked for")
        if response.status_code == 200:
            self.part.truncate(0)  # of what an earlier attempt brought, or left when its process was killed
            self.before = 0
        length = response.headers.get("Content-Length", "")
        self.total = int(ranged[2]) if ranged else int(length) if length.isdecimal() else None
        # A weak ETag says that two files mean the same, not that they have the same bytes.
        etag = response.headers.get("ETag", "")
        self.validator = "" if etag.startswith("W/") else etag or response.headers.get("Last-Modified", "")

    @property
    def size(self) -> int:
        self.part.flush()
        return os.fstat(self.part.fileno()).st_size

    def advanced(self) -> bool:
        return self.size > self.before

    def problem(self) -> str:
        """What is wrong with what came, if anything."""
        if self.size == 0:
            return "the server sent an empty file"
        if self.total is not None and self.size != self.total:
            return f"{self.size} bytes came of {self.total}"
        return ""


def _said(error: Exception, url: SplitResult, transfer: _Transfer) -> str:
    """What went wrong, in words, instead of an exception that holds an exception that holds an exception."""
    import requests

    host = url.hostname or ""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        phrase = next((each.phrase for each in HTTPStatus if each == status), "")
        return f"the server answered {status} {phrase}".rstrip()
    if isinstance(error, requests.exceptions.InvalidURL):
        return "this is not a URL"
    if transfer.total is not None and transfer.size:
        return f"broken off after {transfer.size} of {transfer.total} bytes"
    if isinstance(error, requests.Timeout):
        return f"no answer from {host} in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"{host} has no certificate that can be trusted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached"
    text = repr(error)
    if "NameResolution" in text or "getaddrinfo" in text:
        return f"{host} cannot be found; is this machine offline?"
    if "refused" in text:
        return f"{host} refuses the connection"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return f"the connection to {host} broke; is this machine offline?"
    return reason(error)


def _shown(url: str) -> str:
    """A URL as it may stand in a message: without the name, password and query in which secrets travel."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _in_cache(path: Path, checksum: str | None) -> bool:
    return path.is_file() and not _mismatch(path, checksum)


def _mismatch(path: Path, checksum: str | None) -> str:
    """In words how the file differs from its checksum, if it does."""
    if checksum is None:
        return ""
    algorithm, _, digits = checksum.partition(":")
    found = _digest(path, algorithm)[: len(digits)]
    if found == digits:
        return ""
    return f"its {algorithm} is {found} and not {digits}: damaged on the way, or not the file that was published"


def _digest(path: Path, algorithm: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DownloadError(f"{path}: cannot be read: {reason(error)}") from None


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def _from_hub(reference: str, progress: bool) -> Fetched:
    """A file of a Hugging Face repository, with the files it lists if it is an index, beside it."""
    asked = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?", reference)
    if asked is None:
        raise DownloadError(f"{reference}: expected hf://owner/repo, with @revision and /file behind it if you like")
    repo, revision, file = asked.groups()
    hub = _Hub(reference, repo, revision and unquote(revision), progress)
    path = hub.first([file] if file else _HUB_FILES)
    if path.name.endswith(".index.json"):
        folder = PurePosixPath(file).parent if file else PurePosixPath()
        for shard in _shards(reference, path):
            hub.first([str(folder / shard)])
    return Fetched(path=path, known=None if revision else known_weights.find(f"hf://{repo}"))


def _shards(reference: str, index: Path) -> list[str]:
    """The files that an index lists, each a plain name beside it."""
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError("it is too large")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
            raise ValueError("its weight_map does not name files beside it")
    # Of JSON that is something else, the look-ups raise each its own.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{reference}: {index.name} is no index of weights: {reason(error)}") from None
    return names


class _Hub:
    """One revision of one repository of Hugging Face."""

    def __init__(self, reference: str, repo: str, revision: str | None, progress: bool) -> None:
        self.reference, self.repo, self.revision, self.progress = reference, repo, revision, progress

    def first(self, names: Sequence[str]) -> Path:
        """The first of these files that there is, whole and undamaged. Raises `DownloadError`."""
        with framework(_LIBRARIES):
            import huggingface_hub  # noqa: F401 - the name that the error gives
            from huggingface_hub.errors import EntryNotFoundError
        try:
            with _quiet(self.progress):
                for name in names:
                    with suppress(EntryNotFoundError):
                        return self._there(name) if self._online(name) else self._cached(names)
        except DownloadError:
            raise
        except Exception as error:  # of the hub's client, its transports and this disk
            raise self._error(f"{_said_of_hub(error)}; nothing was kept") from None
        raise self._error(f"there is no {' or '.join(names)}")

    def _online(self, name: str) -> bool:
        """Whether the hub answers. Asked before the hub's client, which first tries for half a minute."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError

        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(self.repo, name, revision=self.revision))
        except HfHubHTTPError as error:
            if error.response.status_code >= 500:
                return False
            raise
        except (OSError, ValueError):  # no hub, or no such name: its client says which
            return False
        except Exception as error:
            # The transport's errors have no root in common with anything, nor one name in all releases of the hub.
            if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
                return False
            raise
        return True

    def _cached(self, names: Sequence[str]) -> Path:
        """The first of these files that is in the cache. Raises `DownloadError`."""
        import huggingface_hub

        for name in names:
            path = huggingface_hub.try_to_load_from_cache(self.repo, name, revision=self.revision)
            if isinstance(path, str) and not _mismatch(Path(path), _checksum_of_blob(Path(path))):
                return Path(path)
        raise self._error("not in the cache, and the hub does not answer; is this machine offline?")

    def _there(self, name: str) -> Path:
        """A file whose content is what the hub says it is; fetched again if the cache's copy is not."""
        import huggingface_hub

        for again in (False, True):
            path = Path(huggingface_hub.hf_hub_download(self.repo, name, revision=self.revision, force_download=again))
            problem = _mismatch(path, _checksum_of_blob(path))
            if not problem:
                return path
            path.resolve().unlink()
            path.unlink(missing_ok=True)
        raise self._error(f"{name}: {problem}; nothing was kept")

    def _error(self, problem: str) -> DownloadError:
        return DownloadError(f"{self.reference}: {problem}")


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


def _said_of_hub(error: Exception) -> str:
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
