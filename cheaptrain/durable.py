"""Files that survive a power cut, and the hashes that prove they did.

Closing a file does not put it on the disk, and renaming a folder does not put the rename there: both need fsync, on
each file and on each folder that holds it. The trap is to rename first: the new name can reach the disk before the
bytes do, and then a file of the right name is empty after a crash.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_HASH_THREADS = 8


def sync(path: Path) -> None:
    """Put one file or folder on the disk. Raises OSError when the disk cannot."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Put every file below `folder`, then every folder, then `folder` itself on the disk."""
    for directory, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(directory, name))
        sync(Path(directory))


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values, to be hashed. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people to read and put it on the disk. Raises ValueError for NaN and infinity."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: Any) -> None:
    """Like write_json, but a reader (or a crash) meets the old file or the new one whole, never a mixture."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_json(temporary, value)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, several at once (hashlib lets other threads run meanwhile)."""
    listed = list(paths)
    with ThreadPoolExecutor(max_workers=min(_HASH_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(listed, pool.map(sha256_of, listed), strict=True))


def fingerprint(table: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON table, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(dict(table))).hexdigest()
