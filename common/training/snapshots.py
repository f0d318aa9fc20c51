"""The snapshots of a run, its checkpoints: folders that are there whole or not at all, with a checksum of every file.

What is in a snapshot is the framework's own business (`Trainer.save`); where it lies, and whether it is intact, is
decided here. ``RUN/checkpoints/step-00001200/state`` is the framework's, ``checkpoint.json`` beside it is ours.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from common.errors import TrainingError
from common.files import reason

_FORMAT = "resnet-parity training checkpoint 1"
_MANIFEST = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One that was found intact."""

    step: int  # optimiser steps taken
    path: Path

    @property
    def state(self) -> Path:
        """The folder that the framework wrote."""
        return self.path / "state"


class Snapshots:
    """The snapshots in one folder, of which the last `keep` intact ones stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._damaged: set[Path] = set()

    def newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The newest one that is intact; `warn` hears of each newer one that is not."""
        problems: dict[Path, str] = {}
        found = None
        for path in sorted(self.folder.glob("step-*"), reverse=True):
            problem, step = _examine(path)
            if not problem:
                found = Snapshot(step=step, path=path)
                break
            problems[path] = problem
        self._damaged |= problems.keys()
        instead = f"that of step {found.step} is used" if found else "no other is intact, the training begins anew"
        for path, problem in problems.items():
            warn(f"{path}: {problem}; {instead}")
        return found

    @contextmanager
    def writing(self, step: int, *, leading: bool = True) -> Iterator[Path]:
        """The empty folder to save the state of `step` into, which takes its name when the block ends well.

        Every process gets the same folder; the `leading` one makes, checks and names it. Raises `TrainingError` where
        it cannot be written, a full disk included; the snapshots before it stay.
        """
        final = self.folder / f"step-{step:08d}"
        beside = self.folder / f".{final.name}.part"
        try:
            if leading:
                shutil.rmtree(beside, ignore_errors=True)
                (beside / "state").mkdir(parents=True)
            yield beside / "state"
            if leading:
                files = {str(path.relative_to(beside)): _checksum(path) for path in _files(beside)}
                data = {"format": _FORMAT, "step": step, "files": files}
                (beside / _MANIFEST).write_text(json.dumps(data, indent=1), encoding="utf-8")
                for path in [*_files(beside), beside]:
                    _flush(path)
                # One that is there already did not pass `newest`, or is of a run that went back before it.
                shutil.rmtree(final, ignore_errors=True)
                beside.rename(final)
                _flush(self.folder)
                self._damaged.discard(final)
                self._thin_out(final)
        except OSError as error:
            raise TrainingError(
                f"{final}: the checkpoint cannot be written: {reason(error)}; those before it are kept: "
                "make room and go on with --resume"
            ) from None
        finally:
            if leading:
                shutil.rmtree(beside, ignore_errors=True)

    def _thin_out(self, newest: Path) -> None:
        """Remove what `newest` makes superfluous; what is newer than it is damaged, and no reason to remove any."""
        before = [path for path in sorted(self.folder.glob("step-*")) if path.name <= newest.name]
        intact = [path for path in before if path not in self._damaged]
        for path in before:
            if path not in intact[-self.keep :]:
                shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob(".step-*.part"):
            shutil.rmtree(path, ignore_errors=True)


def _examine(path: Path) -> tuple[str, int]:
    """What is wrong with a snapshot, or an empty text, and its step."""
    try:
        data: Any = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            return f"its format is {data['format']!r}, expected {_FORMAT!r}", 0
        for name, checksum in data["files"].items():
            if _checksum(path / name) != checksum:
                return f"{name} was changed after it was written", 0
        return "", int(data["step"])
    except OSError as error:
        return f"it is incomplete: {reason(error)}: {Path(error.filename or '').name}", 0
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MANIFEST} is damaged", 0


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    one = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            one.update(piece)
    return one.hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or a folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
