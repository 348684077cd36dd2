"""A process that hangs or dies: the job ends, and the one at fault is named with what it was doing."""

import gc
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import end_ranks, run_ranks
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import fully_shard

from cheaptrain.data.loader import Loader
from cheaptrain.parallel.processes import Processes, join
from cheaptrain.parallel.recorder import record_collectives
from cheaptrain.parallel.stacks import in_collective
from cheaptrain.parallel.verdict import Fault, Heard, Pulse, find_fault
from cheaptrain.parallel.watch import COLLECTIVE_GRACE_SECONDS, Watch, set_timeouts, watch

LIMIT = 2.0  # seconds
PERIOD = 0.1
Part = Callable[[int, Watch, Processes], Any]


def sleep_for_ever() -> None:
    """The name that must be in the report."""
    while True:
        time.sleep(0.05)


def _watched(rank: int, size: int, folder: Path, part: Part, limit: float = LIMIT) -> None:
    """One rank: `part` under the watch, its stderr in the folder."""
    handle = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    processes = join(60)
    with watch(processes, limit, limit, folder / "stacks", period_seconds=PERIOD) as watcher:
        part(rank, watcher, processes)


def _end(folder: Path, part: Part, size: int = 3, limit: float = LIMIT) -> dict[int, int | str]:
    return end_ranks(_watched, size, folder, part, limit, folder=folder / "notes", timeout=60)


def _report(folder: Path) -> str:
    return (folder / "stacks" / "report.txt").read_text(encoding="utf-8")


def _everything(folder: Path) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("stderr-*")))


def test_a_rank_that_hangs_in_its_loader_is_not_the_one_that_is_named(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("forward", 4)
        dist.all_reduce(torch.ones(4))
        watcher.beat("waiting for data", 5)
        if rank == 1:
            sleep_for_ever()
        dist.all_reduce(torch.ones(4))

    assert _end(tmp_path, part) == {0: 1, 1: 1, 2: 1}
    report = _report(tmp_path)
    assert "rank 1 has made no progress for" in report and "rank 0 has made" not in report
    assert "phase 'waiting for data', step 5" in report
    assert "sleep_for_ever" in report.partition("stacks of rank 1")[2]
    assert "rank 0: phase 'waiting for data', step 5, has waited in a collective" in report
    assert _everything(tmp_path).count("ends the job") == 1  # one speaks for all
    for rank in range(3):
        own = (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
        assert ("sleep_for_ever" if rank == 1 else "all_reduce") in own
        recorded = pickle.loads((tmp_path / "stacks" / f"collectives-rank-{rank}").read_bytes())
        states = [e["profiling_name"] for e in recorded["entries"] if "all_reduce" in e["profiling_name"]]
        assert len(states) == (1 if rank == 1 else 2)  # torchfrtrace tells from this who did not come


@pytest.mark.slow
def test_a_reader_thread_that_hangs_is_not_seen_in_the_stacks(tmp_path: Path) -> None:
    class Hanging(Loader):
        def __post_init__(self) -> None:
            """Nothing to check."""

        def step(self, first_row: int) -> Any:
            return sleep_for_ever() if first_row else []

    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        none: Any = None
        loader = Hanging(none, [], 8, 4, 2, rank, 2, True)
        rows: Generator[Any, None, None] = loader.prefetch(0, 5)
        with closing(rows):
            for step in range(5):
                watcher.beat("waiting for data", step)
                next(rows)

    assert _end(tmp_path, part, size=1) == {0: 1}
    report = _report(tmp_path)
    assert "rank 0 has made no progress" in report and "phase 'waiting for data', step 1" in report
    assert "thread rows_0" in report and "sleep_for_ever" in report


def test_a_reader_that_fails_on_one_rank_leaves_the_others_waiting(tmp_path: Path) -> None:
    class Failing(Loader):
        def __post_init__(self) -> None:
            """Nothing to check."""

        def step(self, first_row: int) -> Any:
            if self.data_rank == 1 and first_row >= 8:
                raise OSError(5, "Input/output error", "/nfs/train-00003.bin")
            return []

    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        none: Any = None
        with closing(Failing(none, [], 4, 2, rank, 2).prefetch(0, 5)) as rows:
            for step, _ in enumerate(rows):
                watcher.beat("forward", step)
                dist.all_reduce(torch.ones(4))

    assert _end(tmp_path, part, size=2) == {0: 1, 1: 1}
    assert "train-00003.bin" in pickle.loads((tmp_path / "notes" / "1").read_bytes())[1]


@pytest.mark.slow
def test_a_stopped_rank_keeps_the_job_for_ever(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("backward", 7)
        dist.all_reduce(torch.ones(4))
        time.sleep(4 * PERIOD)  # the others hear of it
        if rank == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.ones(4))

    assert _end(tmp_path, part) == {0: 1, 1: 1, 2: -signal.SIGKILL}
    report = _report(tmp_path)
    assert "rank 2 has not been heard of for" in report and "last seen in phase 'backward', step 7" in report


@pytest.mark.slow
def test_the_rank_that_holds_the_store_is_stopped_and_nobody_can_say_so(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("backward", 7)
        dist.all_reduce(torch.ones(4))
        time.sleep(4 * PERIOD)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        sleep_for_ever()

    assert _end(tmp_path, part) == {0: -signal.SIGKILL, 1: 1, 2: 1}
    said = _everything(tmp_path)
    assert "the store, which rank 0 (last seen in phase 'backward', step 7" in said


@pytest.mark.slow
def test_a_killed_rank_is_waited_for_where_no_connection_breaks(tmp_path: Path) -> None:
    """The others compute and beat: only the watch can notice."""

    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("forward", 3)
        time.sleep(4 * PERIOD)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(10_000):
            watcher.beat("forward", 4)
            time.sleep(0.01)

    assert _end(tmp_path, part) == {0: 1, 1: -signal.SIGKILL, 2: 1}
    assert "rank 1 has not been heard of for" in _report(tmp_path)


def test_a_killed_rank_leaves_the_others_in_their_collective(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("forward", 3)
        dist.all_reduce(torch.ones(4))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(4))

    ended = _end(tmp_path, part)
    assert ended == {0: 1, 1: -signal.SIGKILL, 2: 1}


@pytest.mark.slow
def test_a_rank_that_holds_the_interpreter_is_silent_about_its_stack(tmp_path: Path) -> None:
    def hold_the_interpreter() -> None:
        re.match(r"(a+)+$", "a" * 60 + "b")

    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("forward", 3)
        dist.all_reduce(torch.ones(4))
        time.sleep(4 * PERIOD)
        if rank == 1:
            hold_the_interpreter()
        dist.all_reduce(torch.ones(4))

    assert _end(tmp_path, part) == {0: 1, 1: -signal.SIGKILL, 2: 1}
    assert "rank 1 has not been heard of" in _report(tmp_path)
    assert "hold_the_interpreter" in (tmp_path / "stderr-1").read_text()


@pytest.mark.slow
def test_a_rank_that_left_with_an_error_is_not_named_by_those_who_wait(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("saving", 9)
        if rank == 1:
            watcher.stop("OSError: disk on fire")
            time.sleep(4 * LIMIT)
            os._exit(1)
        dist.all_reduce(torch.ones(4))

    assert _end(tmp_path, part) == {0: 1, 1: 1, 2: 1}
    assert "rank 1 ended its part with OSError: disk on fire in phase 'saving', step 9" in _report(tmp_path)


@pytest.mark.slow
def test_long_phases_that_beat_and_waiting_for_them_are_taken_for_hangs(tmp_path: Path) -> None:
    """Rank 0 works alone for three time-outs and the others wait for it; then a wait that was announced."""

    def part(rank: int, watcher: Watch, processes: Processes) -> Any:
        def work() -> int:
            for _ in range(60):
                watcher.beat("saving", 1)
                time.sleep(0.1)
            return 59

        watcher.beat("forward", 1)
        assert processes.on_main(work) == 59
        watcher.tighten()
        for step in range(4):
            watcher.beat("forward", step)
            time.sleep(0.5)
        watcher.beat("waiting for a checkpoint", step, allow_seconds=60)
        time.sleep(3)
        processes.wait_for_all()
        return "through"

    assert _end(tmp_path, part, limit=2.0) == {0: 0, 1: 0, 2: 0}, _everything(tmp_path)
    assert not (tmp_path / "stacks").exists() and "ends the job" not in _everything(tmp_path)


@pytest.mark.slow
def test_a_process_that_was_stopped_by_its_user_is_killed_when_it_goes_on(tmp_path: Path) -> None:
    """Ctrl-Z, a long lunch, fg: nothing was hanging."""

    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        (tmp_path / "pid").write_text(str(os.getpid()))
        watcher.beat("forward", 1)
        until = time.monotonic() + 6
        time.sleep(0.5)
        while time.monotonic() < until:
            time.sleep(0.05)
        watcher.beat("forward", 2)
        time.sleep(0.5)

    def stop_and_go_on() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        time.sleep(0.5)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(4.5)
        os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go_on)
    thread.start()
    assert _end(tmp_path, part, size=1, limit=3.0) == {0: 0}, _everything(tmp_path)
    thread.join()


@pytest.mark.slow
def test_the_time_out_of_the_start_stays_for_the_steps(tmp_path: Path) -> None:
    def part(rank: int, watcher: Watch, processes: Processes) -> None:
        watcher.beat("forward", 1)
        time.sleep(1.5)  # compiling
        watcher._step_timeout = 0.5
        watcher.tighten()
        watcher.beat("forward", 2)
        sleep_for_ever()

    assert _end(tmp_path, part, size=1, limit=20.0) == {0: 1}
    assert "limit 0.5 s" in _report(tmp_path) and "step 2" in _report(tmp_path)


@pytest.mark.slow
def test_the_threads_of_the_watch_grow(tmp_path: Path) -> None:
    assert run_ranks(_growth, 2, tmp_path) == [True, True]


def _growth(rank: int, size: int, folder: Path) -> bool:
    processes, me = join(60), psutil.Process()
    with watch(processes, 60, 60, folder, period_seconds=0.002) as watcher:

        def run(seconds: float) -> int:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                watcher.beat("forward", 1)
                time.sleep(0.001)
            gc.collect()
            return int(me.memory_info().rss)

        run(1.0)
        told = next(watcher._messages)
        grown = run(3.0) - run(0.0)
        assert next(watcher._messages) - told > 100
        before = run(0.5)
        after = run(3.0)
    processes.wait_for_all()
    assert grown < 4_000_000
    assert after - before < 2_000_000
    return True


def test_waiting_is_told_from_working(tmp_path: Path) -> None:
    names = ["all_reduce", "barrier", "broadcast", "fsdp"]
    assert run_ranks(_waiting, 2, tmp_path) == [names, [*names, "not while working"]]


def _waiting(rank: int, size: int, folder: Path) -> list[str]:
    """Rank 0 comes to each collective only when rank 1 has seen itself wait in it, or after ten seconds."""
    processes, main = join(60), threading.get_ident()
    seen: list[str] = []
    model = fully_shard(torch.nn.Linear(4, 4))
    calls = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(4)),
        "barrier": processes.wait_for_all,
        "broadcast": lambda: processes.on_main(lambda: 1),
        "fsdp": lambda: model(torch.ones(2, 4)),
    }

    def look(name: str) -> None:
        if _within(10, lambda: in_collective(main)):
            seen.append(name)
            (folder / name).touch()

    for name, call in calls.items():
        if rank == 0:
            if _within(10, (folder / name).exists):
                seen.append(name)
            call()
        else:
            looking = threading.Thread(target=look, args=(name,))
            looking.start()
            call()
            looking.join()
    if rank == 1:
        looking = threading.Thread(target=lambda: in_collective(main) or seen.append("not while working"))
        looking.start()
        while looking.is_alive():
            time.sleep(0.01)
    return seen


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_a_slow_disk_fails_in_a_collective_meant_for_training() -> None:
    assert run_ranks(_timeouts, 2) == [None, None]


def _timeouts(rank: int, size: int) -> None:
    processes = join(120)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))

    def seconds(group: dist.ProcessGroup) -> float:
        options = group._get_backend(torch.device("cpu")).options
        return float(options._timeout.total_seconds())

    set_timeouts(processes, 30)
    default = distributed_c10d._get_default_group()
    for group in (default, mesh["a"].get_group(), mesh["b"].get_group()):
        assert seconds(group) == 30 + COLLECTIVE_GRACE_SECONDS
    for group in (processes.control, processes.saving):
        assert seconds(group) == 120


def test_the_users_settings_of_the_flight_recorder_are_overridden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    )  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    record_collectives(tmp_path / "a")
    record_collectives(tmp_path / "b")
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/b/collectives-rank-"
    assert int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0 and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    for name in names:
        os.environ.pop(name, None)
    theirs = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "x"}
    os.environ |= theirs
    record_collectives(tmp_path / "c")
    assert {name: os.environ[name] for name in names if name in os.environ} == theirs


def _pulse(rank: int, **values: Any) -> Pulse:
    usual: dict[str, Any] = {
        "host": "h", "pid": 10 + rank, "born": 1.5, "count": 3, "step": 5, "phase": "forward", "beats": 2,
        "age_seconds": 40.0, "limit_seconds": 30.0, "waiting": True,
    }  # fmt: skip
    return Pulse(rank=rank, **(usual | values))


@pytest.mark.parametrize(
    "pulses, at_fault",
    [
        ([_pulse(0), _pulse(1, waiting=False), _pulse(2)], (1,)),  # outside a collective
        ([_pulse(0, waiting=False), _pulse(1, waiting=False, beats=1), _pulse(2, waiting=False)], (1,)),  # behind
        ([_pulse(0), _pulse(1, step=4, beats=9), _pulse(2)], (1,)),  # all in collectives, one in an earlier one
        ([_pulse(0), _pulse(1), _pulse(2)], ()),  # nobody alone
        ([_pulse(0, waiting=False, step=6), _pulse(1), _pulse(2)], (0,)),  # ahead, and not waiting
        ([_pulse(0, age_seconds=1), _pulse(1), _pulse(2)], None),  # they wait for one at work
        ([_pulse(0, age_seconds=1), _pulse(1, waiting=False), _pulse(2)], (1,)),
        ([_pulse(0, left=""), _pulse(1), _pulse(2, age_seconds=2)], None),
        ([_pulse(0), _pulse(1, left="ValueError: x"), _pulse(2)], (1,)),
        ([_pulse(0), _pulse(1, fault=Fault((2,), ("w",))), _pulse(2)], (2,)),  # what another one has found holds
        ([_pulse(0, limit_seconds=50), _pulse(1, limit_seconds=50), _pulse(2, limit_seconds=50)], None),
    ],
)
def test_the_wrong_rank_is_blamed(pulses: list[Pulse], at_fault: tuple[int, ...] | None) -> None:
    sent = [Pulse.from_json(pulse.to_json()) for pulse in pulses]
    assert sent == pulses
    fault = find_fault({pulse.rank: Heard(pulse, 0.5) for pulse in sent}, 30.0)
    assert (fault.ranks if fault else None) == at_fault


def test_a_rank_that_never_spoke_is_forgotten() -> None:
    heard = {0: Heard(_pulse(0, age_seconds=1), 0.5), 1: Heard(None, 29.0)}
    assert find_fault(heard, 30.0) is None
    fault = find_fault(heard | {1: Heard(None, 31.0)}, 30.0)
    assert fault and fault.ranks == (1,) and "has not been heard of in 31 s" in fault.words[0]
