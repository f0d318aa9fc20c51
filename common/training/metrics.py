"""What a run measures, as JSON lines and as TensorBoard's event file; both go on where a resumed run goes on."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import TrainingError, framework
from common.files import written

NAME = "metrics.jsonl"


class Metrics:
    """Writes the metrics of the run in `folder` from `step` on; what an earlier process wrote beyond it is dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / NAME
        kept = [line for line in read(folder) if line["step"] <= step] if path.exists() else []
        with written(path, TrainingError) as beside:
            beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._lines = path.open("a", encoding="utf-8")
        # The usual writers import TensorFlow wherever it is installed, or PyTorch; the format of the records alone does
        # not. Half a second, and an extra of its own: not before it is needed.
        with framework({"tensorboard": ("TensorBoard", "training")}):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{step}"
        self._events = (folder / name).open("wb")
        self._records = RecordWriter(self._events)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard then drops the points of earlier files at and after this step.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line, and one point in every curve ``<kind>/<name>``; `kind` is train, validation or test."""
        self._lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._lines.flush()
        points = [self._summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=points)))

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def read(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, in order; a last line that was cut off is left out. Raises `TrainingError`."""
    path = folder / NAME
    try:
        return list(_lines(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        raise TrainingError(f"{folder}: not the folder of a run: it has no readable {NAME}") from None


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            return
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            return
        yield values
