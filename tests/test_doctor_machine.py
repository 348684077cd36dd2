"""Disks, limits, clocks and GPUs that would end a run, and are passed over by the doctor."""

import errno
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cheaptrain.checkpoint import lock
from cheaptrain.doctor import machine, storage
from cheaptrain.doctor.cgroup import core_limit, memory_limit
from cheaptrain.doctor.device import Device, Gpu
from cheaptrain.doctor.findings import Finding
from cheaptrain.doctor.gpus import attention_findings, gpu_findings, read_nvidia_smi
from cheaptrain.doctor.machine import Clock, Limits, clock_findings, limit_findings
from cheaptrain.doctor.storage import Place, Speed, measure_speed, promises, storage_findings

GIGA = 10**9


def marks(findings: list[Finding] | Iterator[Finding], *wanted: str) -> list[Finding]:
    return [finding for finding in findings if finding.mark in (wanted or ("doubt", "FAIL"))]


@pytest.fixture(autouse=True)
def small_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "measure_speed", lambda folder: measure_speed(folder, 100_000))


def test_a_healthy_disk_is_doubted_or_littered(tmp_path: Path) -> None:
    findings = list(storage_findings([Place("run.dir", tmp_path / "runs" / "a", 1000, 1000)]))
    kinds = {"overlay", "tmpfs"}  # where tests may run, rightly doubted
    assert [f for f in marks(findings) if not any(kind in f.says for kind in kinds)] == []
    assert "rename, fsync, link, lock work" in [finding.says for finding in findings]
    assert list(tmp_path.iterdir()) == []


def test_space_is_counted_by_folder_though_the_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=10 * GIGA))
    places = [Place("run.dir", tmp_path / "a", 6 * GIGA), Place("data.dir", tmp_path / "b", 5 * GIGA)]
    (failure,) = marks(storage_findings(places), "FAIL")
    assert "10 GB free" in failure.says and "11 GB are to come" in failure.says
    assert marks(storage_findings(places[:1]), "FAIL") == []


def test_a_folder_that_cannot_be_written_is_passed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (failure,) = marks(storage_findings([Place("run.dir", tmp_path / "file" / "run")]), "FAIL")
    assert failure.says == f"nothing can be written in {tmp_path}/file: Not a directory"


@pytest.mark.parametrize(
    ("broken", "where", "says"),
    [
        ("rename", (os, "rename"), "rename does not work: Invalid cross-device link"),
        ("fsync", (os, "fsync"), "fsync does not work: Input/output error"),
        ("link", (Path, "symlink_to"), "link does not work: Operation not permitted"),
    ],
)
def test_a_broken_promise_of_the_disk_is_found_in_the_middle_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, where: tuple[object, str], says: str
) -> None:
    number = {"rename": errno.EXDEV, "fsync": errno.EIO, "link": errno.EPERM}[broken]

    def refuse(*arguments: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*where, refuse)
    findings = list(promises(tmp_path, "run.dir"))
    assert [finding.says for finding in marks(findings, "FAIL")] == [says]
    kept = {"rename", "fsync", "link", "lock"} - {broken}
    assert {*findings[-1].says.removesuffix(" work").split(", ")} == kept


def test_a_disk_without_locks_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    assert [f.says for f in marks(promises(tmp_path, "run.dir"))] == ["the file system knows no locks"]


def test_a_lock_that_two_processes_get_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock.fcntl, "lockf", lambda handle, kind: None)
    assert [f.says for f in marks(promises(tmp_path, "run.dir"))] == ["a second process gets the same lock"]


@pytest.mark.parametrize(("skew", "doubts"), [(0.5, 0), (3.0, 1), (-3.0, 1)])
def test_a_disk_with_another_clock_is_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float, doubts: int
) -> None:
    real = storage.time.time
    monkeypatch.setattr(storage.time, "time", lambda: real() - skew)
    found = marks(storage._time_stamps(tmp_path, "run.dir"))
    assert len(found) == doubts
    assert all(f"{skew:+.1f} s off" in finding.says for finding in found)


@pytest.mark.parametrize(
    ("kind", "mark"),
    [("ext4", "ok"), ("tmpfs", "doubt"), ("overlay", "doubt"), ("nfs4", "note"), ("fuse.s3fs", "doubt"), ("", "ok")],
)
def test_a_disk_that_forgets_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mark: str) -> None:
    monkeypatch.setattr(storage, "file_system", lambda path: (kind, "/mount"))
    assert storage._kind(Place("run.dir", tmp_path)).mark == mark


def test_the_file_system_of_another_mount_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    mount = namedtuple("mount", "mountpoint fstype")
    mounts = [mount("/", "overlay"), mount("/data", "nfs4"), mount("/data2", "ext4"), mount("/data", "xfs")]
    monkeypatch.setattr(storage.psutil, "disk_partitions", lambda all: mounts)
    assert storage.file_system(Path("/data/runs/x")) == ("xfs", "/data")
    assert storage.file_system(Path("/data2/x")) == ("ext4", "/data2")
    assert storage.file_system(Path("/nowhere")) == ("overlay", "/")


def test_a_checkpoint_that_takes_ten_minutes_is_passed() -> None:
    slow = storage._checkpoint_time(60 * GIGA, Speed(0.1 * GIGA, None, 1))
    assert slow.mark == "doubt" and "about 10m 00s" in slow.says
    assert storage._checkpoint_time(GIGA, Speed(GIGA, None, 1)).says == "one of 1 GB takes about 1.0 s to write here"


def test_speed_is_measured_with_more_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    speed = measure_speed(tmp_path)
    assert speed.bytes == 100_000 and speed.write > 0 and list(tmp_path.iterdir()) == []


def _groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    (folder / "cgroup").write_text(own)
    for name, text in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(text + "\n")
    return folder / "cgroup", folder / "fs"


def test_a_limit_of_the_job_above_our_own_group_is_overlooked(tmp_path: Path) -> None:
    groups = _groups(
        tmp_path,
        "0::/slurm/job/step\n",
        {
            "slurm/job/step/memory.max": "max",
            "slurm/job/memory.max": str(64 * GIGA),
            "slurm/memory.max": str(512 * GIGA),
            "slurm/job/cpu.max": "150000 100000",
            "slurm/cpu.max": "max 100000",
        },
    )
    assert memory_limit(*groups) == 64 * GIGA
    assert core_limit(*groups) == 1.5


def test_a_limit_of_the_older_kind_of_group_is_overlooked(tmp_path: Path) -> None:
    own = "4:memory:/docker/abc\n2:cpu,cpuacct:/\n1:name=systemd:/\n0::/\n"
    groups = _groups(
        tmp_path,
        own,
        {
            "memory/memory.limit_in_bytes": str(8 * GIGA),  # in a container its own group is the root
            "memory/docker/memory.limit_in_bytes": "9223372036854771712",
            "cpu/cpu.cfs_quota_us": "-1",
            "cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(*groups) == 8 * GIGA
    assert core_limit(*groups) is None
    assert memory_limit(tmp_path / "none", tmp_path) is None
    (tmp_path / "fs/memory/memory.limit_in_bytes").unlink()
    assert memory_limit(*groups) is None  # a number near the largest one means no limit


LIMITS = Limits(64 * GIGA, None, 60 * GIGA, 16, 16, 65_536, 32 * GIGA, None)


@pytest.mark.parametrize(
    ("change", "gpus", "infiniband", "subject"),
    [
        ({}, 8, False, None),
        ({"usable_cores": 4}, 8, False, "cores"),
        ({"open_files": 256}, 8, False, "open files"),
        ({"open_files": -1}, 8, False, None),
        ({"shm": 64_000_000}, 8, False, "/dev/shm"),
        ({"shm": 64_000_000}, 1, False, None),
        ({"locked_memory": 65_536}, 8, True, "locked memory"),
        ({"locked_memory": 65_536}, 8, False, None),
    ],
)
def test_a_limit_that_would_be_hit_is_passed(change, gpus: int, infiniband: bool, subject: str | None) -> None:
    findings = limit_findings(replace(LIMITS, **change), 8, gpus=gpus, infiniband=infiniband)
    assert [finding.subject for finding in marks(findings)] == ([subject] if subject else [])


def test_a_container_s_memory_is_taken_for_the_machine_s() -> None:
    limited = replace(LIMITS, memory_limit=8 * GIGA)
    (memory,) = [f for f in limit_findings(limited, 1, gpus=0, infiniband=False) if f.subject == "memory"]
    assert "limited to 8 GB" in memory.says


def test_packages_that_are_missing_or_of_another_version_are_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1.0", "torch>=2.11,<2.14", "no-such-package>=3", "psutil<0.1", "gone>=1; extra == 'gpu'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    missing, other = marks(machine.software())
    assert missing.mark == "FAIL" and missing.do == "pip install 'no-such-package>=3'"
    assert other.mark == "doubt" and "psutil" in other.says and "numpy" not in other.says and "torch" not in other.says


def test_a_variable_of_the_shell_is_overruled_without_a_word() -> None:
    shell = {"NCCL_P2P_DISABLE": "1", "NCCL_DEBUG": "INFO", "HOME": "/root"}
    doubtful, told = machine.environment(shell, {"NCCL_P2P_DISABLE": "0"})
    assert doubtful.mark == "doubt" and "'1' in the environment, '0' in [env]" in doubtful.says
    assert told.table == ("NCCL_DEBUG=INFO",)


@pytest.mark.parametrize(
    ("before", "after", "newest", "mark"),
    [
        (Clock(1e9, 5), Clock(1e9 + 10, 15), 0, "ok"),
        (Clock(1e9, 5), Clock(1e9 + 70, 15), 0, "doubt"),
        (Clock(1e9, 5), Clock(1e9 - 50, 15), 0, "doubt"),
        (Clock(1e9, 5), Clock(1e9 - 6, 4), 0, "FAIL"),
        (Clock(1e9, 5), Clock(1e9 + 10, 15), 1.7e9, "doubt"),
    ],
)
def test_a_clock_that_jumps_is_passed(before: Clock, after: Clock, newest: float, mark: str) -> None:
    assert [finding.mark for finding in clock_findings(before, after, newest)] == [mark]


SMI = read_nvidia_smi(
    "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4  |",
    "550.54.15\n550.54.15\n",
    "GPU-11aa, 4242, 30000 MiB, python, train.py\n[No data]\n",
    "\x1b[4m\tGPU0\tGPU1\x1b[0m\nGPU0\t X \tNV18\n\nLegend:\n  X = Self\n",
)
H100 = Gpu("NVIDIA H100", "11aa", 80 * GIGA, 79 * GIGA, (9, 0), True)
HEALTHY = Device("12.4", ("sm_80", "sm_90"), (H100,), "", ((True,),), {})
BARE = Device(None, (), (), "Torch not compiled with CUDA enabled", (), {})


def _doubts(device: Device, smi=SMI, *, seen: bool = True) -> list[Finding]:
    return marks(gpu_findings(device, smi, seen=seen, torch_version="2.13.0+cpu"))


def test_nvidia_smi_is_misread() -> None:
    assert SMI.driver == "550.54.15" and SMI.cuda == (12, 4)
    assert SMI.users == {"GPU-11aa": ("process 4242, 30000 MiB: python, train.py",)}
    assert SMI.topology == ("\tGPU0\tGPU1", "GPU0\t X \tNV18")


def test_a_cpu_build_trains_on_a_gpu_machine_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (failure,) = _doubts(BARE)
    assert failure.mark == "FAIL" and "build for the CPU" in failure.says and "whl/cu12" in failure.do
    assert [finding.mark for finding in _doubts(BARE, None)] == ["FAIL"]
    assert _doubts(BARE, None, seen=False) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _doubts(BARE) == []  # who hides the GPUs means it


def test_a_driver_older_than_the_build_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    why = "The NVIDIA driver on your system is too old"
    (failure,) = _doubts(replace(BARE, build_cuda="13.0", why_no_gpu=why))
    assert failure.mark == "FAIL" and "built for CUDA 13.0" in failure.says and "up to 12.4" in failure.says
    (unusable,) = _doubts(replace(BARE, build_cuda="12.1", why_no_gpu="No CUDA GPUs are available"))
    assert unusable.mark == "FAIL" and "No CUDA GPUs are available" in unusable.says


@pytest.mark.parametrize(
    ("kernels_for", "capability", "runs"),
    [
        (("sm_80", "sm_90"), (9, 0), True),
        (("sm_80",), (8, 9), True),  # the same major, a higher minor
        (("sm_86",), (8, 0), False),
        (("sm_80", "sm_90"), (12, 0), False),
        (("sm_80", "compute_90"), (12, 0), True),  # PTX is compiled for what comes later
        (("sm_90a", "sm_120"), (12, 0), True),
        ((), (12, 0), True),
    ],
)
def test_a_gpu_newer_than_the_build_is_passed(kernels_for, capability: tuple[int, int], runs: bool) -> None:
    device = replace(HEALTHY, kernels_for=kernels_for, gpus=(replace(H100, capability=capability, uuid="x"),))
    assert [finding.subject for finding in _doubts(device)] == ([] if runs else ["build"])


def test_memory_that_somebody_else_holds_is_passed() -> None:
    (taken,) = _doubts(replace(HEALTHY, gpus=(replace(H100, free=48 * GIGA),)))
    assert taken.subject == "GPU 0" and "80 GB, 48 GB free" in taken.says and "process 4242" in taken.table[0]
    (other,) = _doubts(replace(HEALTHY, gpus=(replace(H100, free=48 * GIGA, uuid="22bb"),)))
    assert other.table == () and "nvidia-smi on the host" in other.do  # in another container


def test_gpus_that_do_not_reach_each_other_or_differ_are_passed() -> None:
    other = replace(H100, name="NVIDIA A100", uuid="x", bf16=False)
    apart = ((True, False), (True, True))
    device = replace(HEALTHY, gpus=(replace(H100, uuid="y"), other), peers=apart)
    findings = list(gpu_findings(device, SMI, seen=True, torch_version="2"))
    assert "between 0-1" in next(f for f in findings if f.subject == "GPU to GPU").says
    assert [finding.subject for finding in marks(findings)] == ["bf16", "GPUs"]


def test_an_attention_path_of_training_that_fails_is_no_failure() -> None:
    good, bad = {"difference": 0.01, "allowed": 0.05, "error": ""}, {"difference": 0.4, "allowed": 0.05, "error": ""}
    missing = {"difference": None, "allowed": 0.05, "error": "no kernel"}
    paths = {"causal rows": good, "packed rows": missing, "SDPA flash": bad, "SDPA math": missing}
    found = {f.subject: f for f in attention_findings(replace(HEALTHY, paths=paths), "auto") if f.mark != "ok"}
    assert found["packed rows"].mark == "FAIL" and "does not run: no kernel" in found["packed rows"].says
    assert "data.document_mask = false" in found["packed rows"].do
    assert found["SDPA flash"].mark == "doubt" and "wrong by 4.0e-01" in found["SDPA flash"].says
    assert found["SDPA math"].mark == "note"
    assert found["causal rows"].mark == "doubt" and "no fast kernel" in found["causal rows"].says
