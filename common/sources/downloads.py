"""Weights from anywhere: a path, a URL, or the name of published weights, into a whole file on this disk.

A download goes into a file of its own beside its target, under a lock, and takes the target's name only when it is
complete and its checksum right; whatever goes wrong, nothing of it stays. What a killed process leaves is never used,
and the next download of the same file starts it anew.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urldefrag, urlsplit

from common.errors import DownloadError, framework
from common.files import cache_folder, reason
from common.sources import hub, known_weights
from common.sources.checked import LIBRARIES, digest, mismatch
from common.sources.known_weights import KnownWeights

_TIMEOUT = (10, 30)  # seconds to connect, and without a single byte
_ATTEMPTS = 8  # each goes on where the one before broke off; two in a row that get nowhere are enough
_CHUNK = 1 << 16  # of the last one that breaks off, nothing arrives
_SOURCES = ("torchvision", "keras")
_EXPECTED = (
    "a file, a URL, torchvision:IMAGENET1K_V2, torchvision:resnet50:IMAGENET1K_V2, keras:imagenet or hf://owner/repo"
)


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
        path, published = hub.download(reference, progress)
        return Fetched(path=path, known=published)
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
        found = digest(path, "sha256")
        notes.append(f"{_shown(url)}: unverified, no checksum is known; to have it checked, append #sha256={found}")
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
    with framework(LIBRARIES):
        import requests  # noqa: F401 - `_received` wants both; that one is missing is to be said before anything else
        import tqdm  # noqa: F401
    try:
        problem = _received(url, part, progress) or mismatch(Path(part.name), checksum)
        if problem:
            raise DownloadError(f"{_shown(url)}: {problem}; nothing was kept")
        os.fsync(part.fileno())
        os.replace(part.name, path)
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {reason(error)}; nothing was kept") from None


def _received(url: str, part: IO[bytes], progress: bool) -> str:
    """Every byte of the body into `part`, in as many attempts as get further; or, in words, why not."""
    import requests
    from tqdm import tqdm

    total, validator, idle = None, "", 0
    with tqdm(unit="B", unit_scale=True, desc=_name(url), leave=False, disable=not progress) as bar:
        for attempt in range(_ATTEMPTS):
            before, answered = part.seek(0, os.SEEK_END), False
            headers = {"Accept-Encoding": "identity"}
            if before and validator:  # the rest is sure to be that of the same file
                headers |= {"Range": f"bytes={before}-", "If-Range": validator}
            try:
                with requests.get(url, stream=True, headers=headers, timeout=_TIMEOUT) as response:
                    response.raise_for_status()
                    if problem := _unfit(response, before):
                        return problem
                    answered = True
                    if response.status_code == 200:
                        part.truncate(0)  # of what an earlier attempt brought, or left when its process was killed
                        before = 0
                    length = response.headers.get("Content-Length", "")
                    total = before + int(length) if length.isdecimal() else None
                    # A weak ETag says that two files mean the same, not that they have the same bytes.
                    etag = response.headers.get("ETag", "")
                    validator = "" if etag.startswith("W/") else etag or response.headers.get("Last-Modified", "")
                    bar.reset(total)
                    bar.update(before)
                    for chunk in response.iter_content(_CHUNK):
                        part.write(chunk)
                        bar.update(len(chunk))
                return "" if _size(part) else "the server sent an empty file"
            except (requests.exceptions.ChunkedEncodingError, requests.ConnectionError) as error:
                size = _size(part)
                idle = 0 if size > before else idle + 1
                if attempt == _ATTEMPTS - 1 or idle == 2 or not answered:
                    return f"broken off after {size} of {total} bytes" if total and size else _said(error, url)
            except requests.RequestException as error:
                return _said(error, url)
    raise AssertionError("the last attempt returns")


def _unfit(response: Any, before: int) -> str:
    """Why an answer is not what was asked for: the file, or what follows its first `before` bytes."""
    if response.headers.get("Content-Type", "").startswith("text/html"):
        return "the server sent a web page, not a file of weights"
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return "the server sent a compressed body, which was not asked for"
    ranged = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code != 200 and (not before or ranged is None or int(ranged[1]) != before):
        return "the server sent another part than was asked for"
    return ""


def _size(part: IO[bytes]) -> int:
    part.flush()
    return os.fstat(part.fileno()).st_size


def _said(error: Exception, url: str) -> str:
    """What went wrong, in words, instead of an exception that holds an exception that holds an exception."""
    import requests

    host, text = urlsplit(url).hostname or "", repr(error)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        phrase = next((each.phrase for each in HTTPStatus if each == status), "")
        return f"the server answered {status} {phrase}".rstrip()
    if isinstance(error, requests.exceptions.InvalidURL):
        return "this is not a URL"
    if isinstance(error, requests.Timeout):
        return f"no answer from {host} in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"{host} has no certificate that can be trusted"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy cannot be reached"
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
    return path.is_file() and not mismatch(path, checksum)
