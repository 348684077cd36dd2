"""Files that are all there or not there: temporary name, fsync, rename; and hashes of what went in and came out.

A file under its final name is complete, whatever was killed when; a JSON file also carries a hash of its own content,
as it is what all other hashes are believed by. The trap: a cache of hashes keyed by modification time believes a file
that changes twice within one tick of the clock, so files touched in the last seconds are hashed again, and a file whose
time somebody set back (`cp -p`, `touch -r`), so the time of the last change of the inode, which nobody can set, counts
as well.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cheaptrain.durable import sha256_of, sync
from cheaptrain.errors import PreflightError

TEMPORARY_PREFIX = ".tmp-"
_RACY_SECONDS = 3.0
_SEAL = "sha256"


def canonical_json(content: Any) -> bytes:
    """The one spelling of `content`, for hashing and for files that must be byte-identical."""
    return (json.dumps(content, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def sealed_json(content: Mapping[str, Any]) -> bytes:
    """`content` as JSON with a SHA-256 of itself, which `read_sealed` checks."""
    return canonical_json({**content, _SEAL: digest(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `sealed_json` was given. Raises OSError, and ValueError when a byte of it is not as it was written."""
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or _SEAL not in content:
        raise ValueError("it has no sha256 of itself: an older version or another program wrote it")
    if content.pop(_SEAL) != digest(content):
        raise ValueError("its content does not match its own sha256")
    return content


def digest(content: Any) -> str:
    """SHA-256 (hex) of a JSON-like value."""
    return hashlib.sha256(canonical_json(content)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. Raises PreflightError when it cannot be read."""
    try:
        return sha256_of(path)
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
    sync(path.parent)


class InputHashes:
    """SHA-256 of input files, remembered by (path, size, times of change) in `<data.dir>/input-hashes.json`."""

    def __init__(self, data_dir: Path) -> None:
        self._file = data_dir / "input-hashes.json"
        self._known: dict[str, list[Any]] = {}
        try:
            known = json.loads(self._file.read_bytes())
            if isinstance(known, dict):
                self._known = {path: entry for path, entry in known.items() if isinstance(entry, list)}
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
        known, now = self._known.get(key, []), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        if known[:-1] == now:
            return str(known[-1])
        value = file_sha256(path)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > _RACY_SECONDS:
            self._known[key] = [*now, value]
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
