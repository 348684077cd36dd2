"""metrics.jsonl and samples.jsonl: one JSON object a line, appended as it happens, cut back when a run resumes.

A run that died at step 250 and resumes at 200 would write steps 201 to 250 a second time, so opening for a resumed
run first drops what came after. A line goes to the file in one write; what a full disk does not take is kept in
memory and tried again with the next line, so that a line is never torn by anything but the death of the process.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cheaptrain.durable import sync
from cheaptrain.errors import CheaptrainError

_log = logging.getLogger(__name__)
_BLOCK_BYTES = 2**20


class JsonLines:
    """Append-only writer of records that carry their `step`."""

    def __init__(self, path: Path, resumed_step: int | None, report: Callable[[str], None] = _log.warning) -> None:
        """Open `path`: empty for a run that starts (None), cut back to `resumed_step` for one that resumes.

        Dropped: records of later steps, and lines that are not JSON objects (a last line torn by the death of the
        process, or damage), which are counted to `report`.
        """
        self.path = path
        self._report = report
        self._pending = b""
        self._replace(b"" if resumed_step is None else self._kept(resumed_step))
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, which must have a "step". Numbers that are not finite become null."""
        if not isinstance(record.get("step"), int):
            raise ValueError(f"{self.path.name}: a record needs an integer step, or it could not be cut back: {record}")
        line = json.dumps(_finite(dict(record)), allow_nan=False, ensure_ascii=False) + "\n"
        first = not self._pending
        self._pending += line.encode()
        if (error := self._flush()) and first:
            self._report(
                f"{self.path}: {error.strerror}; what is logged from now on is kept in memory until it can be written"
            )

    def sync(self) -> None:
        """Put everything on the disk. Raises CheaptrainError when it does not take it."""
        if error := self._flush():
            lines = self._pending.count(b"\n")
            raise CheaptrainError(f"{self.path}: {error.strerror}; {lines} lines could not be written")
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise CheaptrainError(f"{self.path}: {error.strerror}; its last lines may not outlive a crash") from error

    def close(self) -> None:
        """Write what is left and close. Raises CheaptrainError when lines are lost."""
        try:
            self.sync()
        finally:
            os.close(self._handle)

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> OSError | None:
        """Write pending bytes; the error that kept some of them from being written."""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._handle, self._pending) :]
        except OSError as error:
            return error
        return None

    def _kept(self, step: int) -> bytes:
        """The lines of records up to `step`, as they stand."""
        if not self.path.exists():
            return b""
        kept, broken = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                record_step = json.loads(line)["step"]
                whole = line.endswith(b"\n") and isinstance(record_step, int)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                broken += 1
            elif record_step <= step:
                kept.append(line)
        if broken:
            self._report(f"{self.path}: {broken} broken line{'s' * (broken > 1)} dropped")
        return b"".join(kept)

    def _replace(self, content: bytes) -> None:
        """Make `content` the whole file, at once."""
        temporary = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(self.path.parent)


def read_records(path: Path, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The records of a file, in order; a last line torn by a dying process, or still being written, is left out.

    Raises ValueError for any other line that is no record; with `report` such lines are left out, and counted to it.
    """
    records, broken = [], 0
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            if report is None:
                raise
            broken += 1
    if broken and report is not None:
        report(f"{path}: {broken} broken line{'s' * (broken > 1)} left out")
    return records


def newest_record(path: Path, key: str) -> dict[str, Any] | None:
    """The last record that has `key`; None without one. Read from the end, so that it costs as little in a long run."""
    mark, rest = json.dumps(key).encode(), b""
    if not path.exists():
        return None
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest = lines.pop(0) if start else b""  # it may begin in the block before
            for line in reversed(lines):
                if mark not in line:
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # torn
                if isinstance(record, dict) and record.get(key) is not None and isinstance(record.get("step"), int):
                    return record
            end = start
    return None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
