"""Files of a data set by name: in a folder, or in a .tar or .tar.gz, which is read once and never unpacked on disk."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import IO, Any

from common.errors import DataError
from common.files import reason

_MOST_BYTES = 256 << 20  # unpacked; the archives of CIFAR hold 186 million


class Files:
    """The files among `wanted` that are in a folder or an archive. Raises `DataError` for a damaged archive."""

    def __init__(self, path: Path, wanted: Collection[str]) -> None:
        self.path = path.absolute()
        self._unpacked = None if path.is_dir() else _unpack(self.path, wanted)
        self.names = set(self._unpacked or ()) | {name for name in wanted if (self.path / name).is_file()}

    def where(self, name: str) -> str:
        """A file, for a message."""
        return str(self.path / name) if self._unpacked is None else f"{self.path}: {name}"

    def place(self, name: str) -> Path | None:
        """The path of a file that is not in an archive."""
        return self.path / name if self._unpacked is None else None

    def read(self, name: str) -> bytes:
        """A file's content. Raises `DataError` where it is missing, or larger than an archive may be."""
        if name not in self.names:
            raise DataError(f"{self.path}: {name} is missing, of the files of its format; fetch the archive again")
        if self._unpacked is not None:
            return self._unpacked[name]
        try:
            with (self.path / name).open("rb") as file:
                return bounded(file, _MOST_BYTES, self.where(name))
        except OSError as error:
            raise DataError(f"{self.where(name)}: cannot be read: {reason(error)}") from None


def bounded(file: IO[bytes], most: int, where: str) -> bytes:
    """The rest of a file. Raises `DataError` where that is more than `most` bytes, having read no more."""
    content = file.read(most + 1)
    if len(content) > most:
        raise DataError(f"{where}: more than {most} bytes; its format needs no more")
    return content


class _Counted:
    """A stream that ends in an error before it has given too much: a small archive can unpack into anything."""

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        self._stream, self._path, self._left = stream, path, _MOST_BYTES

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._path}: unpacks into more than {_MOST_BYTES} bytes, as no archive of CIFAR; refused"
            )
        return content


def _unpack(path: Path, wanted: Collection[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            # As a stream: a header's size is never trusted with a jump or an allocation.
            with tarfile.open(fileobj=_Counted(stream, path), mode="r|") as archive:  # type: ignore[call-overload]
                for member in archive:
                    name = PurePosixPath(member.name).name
                    if name not in wanted or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                        continue
                    if name in found:
                        raise DataError(f"{path}: holds {name} twice; fetch the archive again")
                    content = archive.extractfile(member)
                    found[name] = b"" if content is None else content.read()
                    if len(found[name]) != member.size:
                        raise DataError(f"{path}: ends within {name}; fetch the archive again")
    except (OSError, EOFError, tarfile.TarError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as a .tar or .tar.gz: {reason(error)}; fetch it again") from None
    return found
