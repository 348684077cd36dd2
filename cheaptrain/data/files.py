"""Files that are all there or not there: temporary name, fsync, rename; and hashes of what went in and came out.

A file under its final name is complete, whatever was killed when. The trap: a cache of hashes keyed by modification
time believes a file that changes twice within one tick of the clock, so files touched in the last seconds are hashed
again.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cheaptrain.errors import PreflightError

TEMPORARY_PREFIX = ".tmp-"
_RACY_SECONDS = 3.0


def canonical_json(content: Any) -> bytes:
    """The one spelling of `content`, for hashing and for files that must be byte-identical."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def digest(content: Any) -> str:
    """SHA-256 (hex) of a JSON-like value."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises PreflightError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error


def cannot_read(path: Path | str, error: OSError) -> str:
    """One clear sentence for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; check the path in the recipe"
    if isinstance(error, PermissionError):
        return f"{path}: no permission to read it; change its mode or owner (chmod, chown)"
    return f"{path}: cannot be read ({error.strerror or error})"


def temporary_path(path: Path, owner: str = "") -> Path:
    """The name under which `path` is written first. `owner` keeps runs that share a folder apart."""
    return path.with_name(f"{TEMPORARY_PREFIX}{owner}-{os.getpid()}-{path.name}")


def write_atomically(path: Path, content: bytes, owner: str = "") -> None:
    """Write a whole file under a temporary name, fsync, rename."""
    temporary = temporary_path(path, owner)
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class InputHashes:
    """SHA-256 of input files, remembered by (path, size, modification time) in `<data.dir>/input-hashes.json`."""

    def __init__(self, data_dir: Path) -> None:
        self._file = data_dir / "input-hashes.json"
        self._known: dict[str, list[Any]] = {}
        try:
            known = json.loads(self._file.read_bytes())
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # only an accelerator: without it everything is hashed again
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Hash of one file. Raises PreflightError when it cannot be read."""
        try:
            stat = path.stat()
            key = str(path.resolve())
        except OSError as error:
            raise PreflightError(cannot_read(path, error)) from error
        known = self._known.get(key)
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        value = file_sha256(path)
        if time.time() - stat.st_mtime > _RACY_SECONDS:
            self._known[key] = [stat.st_size, stat.st_mtime_ns, value]
            self._changed = True
        return value

    def of(self, paths: Iterable[Path]) -> list[str]:
        """Hashes of several files, read in parallel."""
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(self.sha256, paths))

    def save(self) -> None:
        """Keep what was learned for the next time; a folder that cannot be written to is no matter."""
        if not self._changed:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, canonical_json(self._known))
        except OSError:
            return
        self._changed = False
