"""The disks of a run, tried out: what they are, whether they keep promises, how fast they are, and whether all fits.

Checkpoints stand on four promises of the file system: a rename is all or nothing, fsync means on the disk, a lock keeps
a second process out, and a link can be replaced. Network and object file systems break one or another of them, quietly.
So each is tried, in a temporary folder where the run will be, which is removed again.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cheaptrain.checkpoint.lock import RunLock
from cheaptrain.doctor.findings import Finding, doubt, fail, note, ok
from cheaptrain.durable import sync_tree
from cheaptrain.units import duration, size

_TRIAL_BYTES = 200_000_000
_BLOCK_BYTES = 8_000_000
_SYNC_EVERY = 4  # blocks
_TRIAL_SECONDS = 4.0  # for writing, and again for reading
_SHARE_OF_FREE = 50  # at most one part of so many of what is free
_SKEW_SECONDS = 1.0
_SLOW_CHECKPOINT_SECONDS = 300.0
_MEMORY = {"tmpfs", "ramfs"}
_CONTAINER = {"overlay", "aufs"}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "glusterfs", "9p"}
_OBJECT_STORES = ("s3", "gcs", "rclone", "blobfuse", "goofys", "mountpoint", "juicefs")

_TRY_LOCK = """
import fcntl, os, sys
try:
    fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(9)
"""


@dataclass(frozen=True)
class Place:
    """A folder of the recipe. `needed`: bytes to come there, None: not known. `checkpoint`: bytes of one."""

    name: str
    path: Path
    needed: int | None = None
    checkpoint: int | None = None

    @property
    def existing(self) -> Path:
        """The folder, or the nearest one above it that is there."""
        absolute = self.path.absolute()
        return next(place for place in (absolute, *absolute.parents) if place.exists())

    @property
    def device(self) -> int:
        """Tells file systems apart."""
        return self.existing.stat().st_dev


@dataclass(frozen=True)
class Speed:
    """Bytes a second, synced; `read` is None when it could not be told from the cache."""

    write: float
    read: float | None
    bytes: int


def storage_findings(places: list[Place]) -> Iterator[Finding]:
    """Space by file system; then kind, promises and speed, each folder and each file system once."""
    yield from _space(places)
    tried: set[Path] = set()
    said: set[Finding] = set()
    measured: dict[int, Speed | None] = {}
    for place in places:
        if place.existing in tried:
            speed = measured.get(place.device)
        else:
            tried.add(place.existing)
            speed = yield from _try_out(place, measured)
        if speed is not None and place.checkpoint:
            finding = _checkpoint_time(place.checkpoint, speed)
            if finding not in said:  # stages of one size in sister folders
                said.add(finding)
                yield finding


def _space(places: list[Place]) -> Iterator[Finding]:
    by_device: dict[int, list[Place]] = {}
    for place in places:
        by_device.setdefault(place.device, []).append(place)
    for together in by_device.values():
        free = shutil.disk_usage(together[0].existing).free
        needed = sum(place.needed or 0 for place in together)
        where = " and ".join(dict.fromkeys(f"{place.name} ({place.path})" for place in together))
        unknown = "; more is to come, how much is not known" if any(place.needed is None for place in together) else ""
        says = f"{size(free)} free for {where}"
        if needed > free:
            yield fail(
                "space",
                f"{says}, and {size(needed)} are to come{unknown}",
                "free space, set run.dir or data.dir to another disk, or keep fewer checkpoints "
                "(checkpoint.keep_last, checkpoint.keep_every)",
            )
        elif needed:
            yield ok("space", f"{says}, {size(needed)} to come{unknown}")
        else:
            yield note("space", says + unknown)


def _try_out(place: Place, measured: dict[int, Speed | None]) -> Generator[Finding, None, Speed | None]:
    """Findings on one folder; returns the speed of its file system."""
    yield _kind(place)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".cheaptrain-doctor-", dir=place.existing))
    except OSError as error:
        yield fail(
            place.name,
            f"nothing can be written in {place.existing}: {error.strerror}",
            f"give another {place.name}, or make it writable",
        )
        return None
    try:
        yield from promises(folder, place.name)
        yield from _time_stamps(folder, place.name)
        if place.device not in measured:
            measured[place.device] = None
            try:
                speed = measure_speed(folder)
            except OSError as error:
                yield fail(place.name, f"no large file can be written: {error.strerror}", "free space, or check quotas")
            else:
                measured[place.device] = speed
                yield _speed(place.name, speed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return measured[place.device]


def file_system(path: Path) -> tuple[str, str]:
    """Kind of the file system that holds `path`, and where it is mounted; kind empty when nobody says."""
    path, best = path.resolve(), ("", "")
    for mount in psutil.disk_partitions(all=True):
        inside = path.is_relative_to(mount.mountpoint)
        if inside and len(mount.mountpoint) >= len(best[1]):  # of two on one folder the later one is seen
            best = (mount.fstype, mount.mountpoint)
    return best


def _kind(place: Place) -> Finding:
    kind, mount = file_system(place.existing)
    says = f"{place.existing} lies on {kind or 'an unknown kind of file system'}" + (f" at {mount}" if mount else "")
    if kind in _MEMORY:
        return doubt(place.name, f"{says}: memory, gone with the machine", f"set {place.name} to a folder on a disk")
    if kind in _CONTAINER:
        return doubt(
            place.name, f"{says}: gone with the container", f"mount a volume and set {place.name} to a folder on it"
        )
    if kind.startswith("fuse") and any(word in kind for word in _OBJECT_STORES):
        return doubt(
            place.name,
            f"{says}: an object store, where a rename copies and is not all or nothing",
            f"set {place.name} to a disk, and copy finished checkpoints",
        )
    if kind in _NETWORK or kind.startswith("fuse"):
        return note(place.name, f"{says}: over the network")
    return ok(place.name, says)


def promises(folder: Path, name: str) -> Iterator[Finding]:
    """Try rename, fsync, link and lock in an empty folder: a finding for all that hold, and for each that does not."""
    kept = []
    for what, trial, remedy in (
        ("rename", _rename, "no checkpoint can be finished here: give another folder"),
        ("fsync", _fsync, "a power cut could cost a checkpoint: give another folder"),
        ("link", _link, "the link `final` cannot be made here: give another folder"),
    ):
        try:
            trial(folder)
        except OSError as error:
            yield fail(name, f"{what} does not work: {error.strerror}", remedy)
        else:
            kept.append(what)
    locked = _lock(folder)
    if locked is None:
        kept.append("lock")
    else:
        yield doubt(name, locked, "start a run once only: nothing would keep a second one out of the same folder")
    if kept:
        yield ok(name, f"{', '.join(kept)} {'works' if len(kept) == 1 else 'work'}")


def _rename(folder: Path) -> None:
    """A folder with a file in it, as checkpoints are; and a file over another, as recipe.json is."""
    (folder / "a").mkdir()
    (folder / "a" / "file").write_text("new")
    os.rename(folder / "a", folder / "b")
    (folder / "c").write_text("old")
    os.replace(folder / "b" / "file", folder / "c")
    if (folder / "c").read_text() != "new" or (folder / "a").exists():
        raise OSError(0, "the old content is still there")


def _fsync(folder: Path) -> None:
    (folder / "synced").write_text("x")
    sync_tree(folder)


def _link(folder: Path) -> None:
    (folder / "link").symlink_to("target")
    (folder / "other").symlink_to("target-2")
    os.replace(folder / "other", folder / "link")
    if os.readlink(folder / "link") != "target-2":
        raise OSError(0, "a replaced link still points to the old target")


def _lock(folder: Path) -> str | None:
    """What is wrong with locks; None when a second process is kept out."""
    try:
        lock = RunLock(folder / "lock")
    except OSError as error:
        return f"locks do not work: {error.strerror}"
    try:
        if not lock.exclusive:
            return "the file system knows no locks"
        other = subprocess.run([sys.executable, "-c", _TRY_LOCK, str(folder / "lock")], timeout=30)
        return None if other.returncode == 9 else "a second process gets the same lock"
    except subprocess.TimeoutExpired:
        return "asking for a lock hangs"
    finally:
        lock.release()


def _time_stamps(folder: Path, name: str) -> Iterator[Finding]:
    before = time.time()
    (folder / "stamp").write_text("x")
    after = time.time()
    stamp = (folder / "stamp").stat().st_mtime
    skew = stamp - after if stamp > after else min(0.0, stamp - before)
    if abs(skew) > _SKEW_SECONDS:
        yield doubt(
            name,
            f"files written now carry a time {skew:+.1f} s off this machine's clock",
            "set both clocks by NTP: what is newest is otherwise told wrongly between machines",
        )


def measure_speed(folder: Path, trial_bytes: int = _TRIAL_BYTES, seconds: float = _TRIAL_SECONDS) -> Speed:
    """Write and read up to `trial_bytes`, less when space is short or the disk slow. Raises OSError."""
    path, block = folder / "speed", os.urandom(_BLOCK_BYTES)
    budget = min(trial_bytes, shutil.disk_usage(folder).free // _SHARE_OF_FREE)
    blocks = max(1, budget // _BLOCK_BYTES)
    if budget < _BLOCK_BYTES:
        block = block[: max(4096, budget)]
    written, began = 0, time.perf_counter()
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        path.unlink()  # now, so that its space comes back however this process ends
        for number in range(1, blocks + 1):
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(handle, rest) :]
            written += len(block)
            if number % _SYNC_EVERY == 0 or number == blocks:
                os.fsync(handle)
                if time.perf_counter() - began > seconds:
                    break
        os.fsync(handle)
        write = written / (time.perf_counter() - began)
        return Speed(write, _read_speed(handle, written, seconds), written)
    finally:
        os.close(handle)


def _read_speed(handle: int, written: int, seconds: float) -> float | None:
    """Speed of reading what was written, after asking the kernel to forget it; None where it cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return None
    with suppress(OSError):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    done, began = 0, time.perf_counter()
    while done < written and time.perf_counter() - began < seconds:
        got = len(os.pread(handle, _BLOCK_BYTES, done))
        if got == 0:
            break
        done += got
    return done / max(1e-6, time.perf_counter() - began)


def _speed(name: str, speed: Speed) -> Finding:
    read = f", reads {size(speed.read)}/s" if speed.read is not None else ""
    return ok(name, f"writes {size(speed.write)}/s{read} (tried with {size(speed.bytes)}, synced)")


def _checkpoint_time(checkpoint: int, speed: Speed) -> Finding:
    seconds = checkpoint / speed.write
    took = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    says = f"one of {size(checkpoint)} takes about {took} to write here"
    if seconds > _SLOW_CHECKPOINT_SECONDS:
        return doubt(
            "checkpoint", says, "set run.dir to a faster disk, or save less often (checkpoint.every); it is written "
            "in the background as long as checkpoint.asynchronous is on"
        )  # fmt: skip
    return ok("checkpoint", says)
