"""A machine that would fail a run and is called healthy, a doctor that hangs itself, and children it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import alive
from tiny_recipe import pipe, tiny_recipe

from cheaptrain.doctor import attention_paths, communication, examine, remedies
from cheaptrain.doctor.attention_paths import CAUSAL, PACKED, Shape, paths_on, run_path
from cheaptrain.doctor.children import Ended, run_children
from cheaptrain.doctor.collectives import OPERATIONS, Clocks, Timing, expected, numbers
from cheaptrain.doctor.communication import clock_finding, communication_findings, try_processes
from cheaptrain.doctor.device import Device, look_at_device
from cheaptrain.doctor.findings import Finding
from cheaptrain.doctor.remedies import Interface, candidates, try_in_order
from cheaptrain.doctor.subject import count_processes
from cheaptrain.doctor.view import WIDTH, print_section
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model import attention
from cheaptrain.model.attention import check as attention_check
from cheaptrain.recipe.schema import Parallel

torch.set_num_threads(1)

# A process that talks only when the environment is as it wants it; until then it hangs, with a child that hangs too,
# deaf to any polite signal.
_FAKE = """
import json, os, pathlib, signal, subprocess, sys, time
report = open(os.environ["CHEAPTRAIN_DOCTOR_REPORT"], "a")
def say(**what):
    print(json.dumps(what), file=report, flush=True)
say(phase="started")
say(phase="making the process group")
wanted = json.loads(os.environ["FAKE_WANTS"])
if any(os.environ.get(name) != value for name, value in wanted.items()):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    folder = pathlib.Path(os.environ["FAKE_PIDS"])
    for pid in os.getpid(), grandchild.pid:
        (folder / str(pid)).touch()
    say(phase="all-reduce of 4,000 bytes")
    print("waiting for godot", flush=True)
    if os.environ["RANK"] == "1" or os.environ.get("FAKE_ALL_HANG"):
        time.sleep(1000)
    sys.exit(5)
right = json.loads(os.environ.get("FAKE_WRONG_WITHOUT", "{}")).items() <= dict(os.environ).items()
say(timing={"operation": "all-reduce", "bytes": 4000, "seconds": 0.001, "right": right})
say(phase="done")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The command of a fake probe. Whatever it started is gone at the end, or the test fails."""
    pids = tmp_path / "pids"
    pids.mkdir()
    script = tmp_path / "fake.py"
    script.write_text(_FAKE)
    monkeypatch.setenv("FAKE_PIDS", str(pids))
    monkeypatch.setattr(communication, "interfaces_up", lambda: [Interface("eth9", False), Interface("lo", True)])
    for name in ("NCCL_P2P_DISABLE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    yield [sys.executable, str(script)]
    assert _within(20, lambda: not any(alive(int(pid)) for pid in os.listdir(pids)))  # the kernel takes a moment


def _wants(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    monkeypatch.setenv("FAKE_WANTS", json.dumps(settings))


def _found(count: int, command: list[str], *, on_gpu: bool, seconds: float = 60) -> list[Finding]:
    return list(
        communication_findings(
            count, dict(os.environ), on_gpu=on_gpu, command=command, start_seconds=60, seconds=seconds
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "tried"),
    [({"GLOO_SOCKET_IFNAME": "lo"}, False, ["eth9", "lo"]), ({"NCCL_P2P_DISABLE": "1"}, True, ["1"])],
)
def test_hung_communication_is_left_to_hang_though_one_setting_would_cure_it(
    fake: list[str], monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], on_gpu: bool, tried: list[str]
) -> None:
    monkeypatch.setenv("FAKE_ALL_HANG", "1")
    _wants(monkeypatch, **wanted)
    findings = _found(2, fake, on_gpu=on_gpu, seconds=2)
    assert "processes 0, 1: stuck in 'all-reduce of 4,000 bytes', no end within 2 s" in findings[0].says
    assert findings[0].table == ("waiting for godot",)
    assert len(os.listdir(os.environ["FAKE_PIDS"])) == 4 * len(tried)  # the hung ones, and their own children
    ((name, value),) = wanted.items()
    trials = [finding for finding in findings if finding.subject == "tried"]
    assert [trial.says.split(": ")[0] for trial in trials] == [f"{name}={value}" for value in tried]
    assert trials[-1].says == f"{name}={value}: works"
    _assert_remedy(findings, f'[env]\n{name} = "{value}"')
    failure = next(finding for finding in findings if finding.mark == "FAIL")
    assert ("one machine only" in failure.do) == (value == "lo")


def _assert_remedy(findings: list[Finding], toml: str) -> None:
    (failure,) = [finding for finding in findings if finding.mark == "FAIL"]
    assert failure.do.split("):\n")[1].split("\nThis is for one machine")[0] == toml


def test_two_settings_that_cure_it_only_together_are_not_found(
    fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _wants(monkeypatch, NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
    monkeypatch.setattr("cheaptrain.doctor.children._GRACE_SECONDS", 0.1)
    _assert_remedy(_found(2, fake, on_gpu=True), '[env]\nNCCL_P2P_DISABLE = "1"\nNCCL_SHM_DISABLE = "1"')


def test_wrong_numbers_pass_for_working_communication(fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _wants(monkeypatch)
    monkeypatch.setenv("FAKE_WRONG_WITHOUT", json.dumps({"NCCL_IB_DISABLE": "1"}))
    findings = _found(2, fake, on_gpu=True)
    assert "wrong numbers came out of all-reduce of 4 kB" in findings[0].says
    _assert_remedy(findings, '[env]\nNCCL_IB_DISABLE = "1"')


def test_one_process_that_dies_keeps_the_others_waiting(fake: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _wants(monkeypatch, GLOO_SOCKET_IFNAME="nothing cures this")
    monkeypatch.setattr("cheaptrain.doctor.children._GRACE_SECONDS", 0.2)
    findings = _found(3, fake, on_gpu=False)
    first, second = findings[0].says.split("; ")
    assert first == "processes 0, 2: exit code 5 in 'all-reduce of 4,000 bytes'"
    assert second.startswith("process 1: stuck in 'all-reduce of 4,000 bytes'")
    assert findings[-1].mark == "FAIL" and "none of 2 settings helped" in findings[-1].says


def test_processes_that_cannot_even_start_are_taken_for_a_network_that_hangs(tmp_path: Path) -> None:
    findings = _found(2, [sys.executable, "-c", "import sys; sys.exit('no module named torch')"], on_gpu=True)
    assert [finding.mark for finding in findings] == ["FAIL"]
    assert findings[0].says == "processes 0, 1: exit code 1 before anything was tried"
    assert findings[0].table == ("no module named torch",)


def test_what_nccl_warned_of_is_lost_in_a_traceback() -> None:
    warned = "host:1 [0] NCCL WARN Error while attaching to shared memory"
    crash = Ended(-6, ({"phase": "started"}, {"phase": "all-reduce"}), f"{warned}\nTraceback\nterminate called\n")
    trial = communication._trial([crash, Ended(0, ({"phase": "done"},), "")], 30)
    assert trial.trouble == "process 0: killed by signal 6 in 'all-reduce'" and trial.printed == (warned,)


def test_the_search_for_a_remedy_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(remedies.time, "monotonic", lambda: now[0])

    def attempt(settings: remedies.Settings) -> communication.Trial:
        now[0] += 30
        return communication.Trial("hangs", True, False, (), None)

    settings = list(
        candidates(on_gpu=True, interfaces=[Interface(f"eth{i}", False) for i in range(40)], present={}, joining=False)
    )
    assert len(settings) > 80
    assert len(list(try_in_order(attempt, settings, 100))) == 4
    assert now[0] <= 100 + 30


def test_settings_that_are_in_force_already_are_tried_again() -> None:
    given = {"on_gpu": True, "interfaces": [Interface("eth0", False)], "joining": False}
    everything = list(candidates(present={}, **given))
    without = list(candidates(present={"NCCL_P2P_DISABLE": "1"}, **given))
    assert without == [settings for settings in everything if "NCCL_P2P_DISABLE" not in settings]
    assert everything[0] == {"NCCL_P2P_DISABLE": "1"}
    assert next(candidates(present={}, **{**given, "joining": True})) == {"GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.slow
def test_real_processes_get_wrong_sums_or_no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHEAPTRAIN_PROCESSES", "77")  # of a launch this one has nothing to do with
    trial = try_processes(3, dict(os.environ), seconds=60)
    assert trial.trouble == ""
    assert {timing.operation for timing in trial.timings} == set(OPERATIONS)
    assert all(timing.right and timing.bytes % 12 == 0 and timing.seconds > 0 for timing in trial.timings)
    assert trial.clocks is not None and len(trial.clocks.ahead) == 3 and trial.clocks.ahead[0] == 0
    assert clock_finding(trial.clocks).mark == "ok"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_answer_counts_as_right(operation: str) -> None:
    """What is expected of each operation, added up number by number."""
    share, size = 20, 3
    sent = [numbers(rank, share * size).tolist() for rank in range(size)]
    total = [sum(column) for column in zip(*sent, strict=True)]
    wanted = {
        "all-reduce": [total] * size,
        "all-gather": [[x for rank in range(size) for x in sent[rank][:share]]] * size,
        "reduce-scatter": [total[rank * share : (rank + 1) * share] for rank in range(size)],
    }[operation]
    assert [expected(operation, share, size, rank).tolist() for rank in range(size)] == wanted
    assert len({*map(tuple, sent)}) == size  # one process's numbers are not another's


def test_bandwidths_are_not_those_of_nccl_tests() -> None:
    assert Timing("all-reduce", 8_000, 2.0, True).bus(4) == 4_000 * 1.5
    assert Timing("all-gather", 8_000, 2.0, True).bus(4) == 4_000 * 0.75


def test_clocks_that_differ_by_less_than_can_be_told_are_called_wrong() -> None:
    hosts = ("node-a", "node-a", "node-b")
    wrong = clock_finding(Clocks(hosts, (0.0, 0.001, -2.5), 0.01))
    assert wrong.mark == "doubt" and wrong.says == "node-a is 2.5 s ahead of node-b"
    assert clock_finding(Clocks(hosts, (0.0, 0.001, -2.5), 2.0)).mark == "ok"


def _children(code: str, seconds: float = 60.0) -> Ended:
    command = [sys.executable, "-c", "from cheaptrain.doctor.children import *\n" + textwrap.dedent(code)]
    return run_children([command], [os.environ], start_seconds=60, seconds=seconds)[0]


def test_a_child_that_holds_the_interpreter_for_ever_outlives_its_time() -> None:
    ended = _children(
        """
        import ctypes
        report(phase=STARTED)
        end_after(0.5)
        def in_the_driver():
            ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter's lock
        in_the_driver()
        """
    )
    assert ended.code == 1 and "in_the_driver" in ended.output


def test_a_torn_last_line_of_a_report_hides_the_lines_before() -> None:
    ended = _children(
        """
        import os, signal
        report(phase=STARTED)
        report(phase="b")
        open(os.environ[REPORT], "a").write('{"phase": "c')
        os.kill(os.getpid(), signal.SIGSEGV)
        """
    )
    assert ended.code == -signal.SIGSEGV and [line["phase"] for line in ended.reports] == ["started", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_doctor_that_is_killed_leaves_its_children_behind(tmp_path: Path) -> None:
    child = f"""
from cheaptrain.doctor.children import *
import os, pathlib, time
end_with_parent()
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
report(phase=STARTED)
time.sleep(1000)
"""
    doctor = f"""
from cheaptrain.doctor.children import run_children
import os, sys
run_children([[sys.executable, "-c", {child!r}]], [os.environ], start_seconds=600, seconds=600)
"""
    parent = subprocess.Popen([sys.executable, "-c", doctor], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        pid = _within(60, lambda: int((tmp_path / "pid").read_text() or 0) if (tmp_path / "pid").exists() else 0)
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    assert _within(30, lambda: not alive(pid))


def _within(seconds: float, what):
    """The first true answer of `what`, or the last one when time is up."""
    ends = time.monotonic() + seconds
    while not (answer := what()) and time.monotonic() < ends:
        time.sleep(0.05)
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_path_that_works_is_called_wrong(dtype: torch.dtype) -> None:
    for name in paths_on("cpu"):
        ran = run_path(name, Shape(heads=6, kv_heads=2, head_dim=16, seq=40), "cpu", dtype)
        assert ran.right, (name, ran)


def test_attention_that_runs_and_is_wrong_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(segments: torch.Tensor) -> torch.Tensor:
        return torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()

    monkeypatch.setattr(attention, "_document_causal_mask", leaky)
    assert run_path(CAUSAL, Shape(), "cpu", torch.float32).right
    packed = run_path(PACKED, Shape(), "cpu", torch.float32)
    assert packed.difference is not None and packed.difference > 0.01 and not packed.right


def test_attention_that_gives_nan_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention, "_document_causal_mask", lambda segments: torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    )
    assert not run_path(PACKED, Shape(), "cpu", torch.float32).right


def test_a_gradient_of_nan_is_lost_among_good_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("nan")

    def spoilt(query, key, value, *, documents):
        return attention_check.written_out(query, key, Spoilt.apply(value), documents=documents)

    monkeypatch.setattr(attention_paths, "_attention", lambda name, *inputs, **named: spoilt(*inputs, **named))
    ran = run_path(CAUSAL, Shape(), "cpu", torch.float32)
    assert ran.difference is not None and not ran.right


def test_a_path_that_does_not_run_is_named_without_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(segments: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.\nC++ trace")

    monkeypatch.setattr(attention, "_document_causal_mask", refuse)
    ran = run_path(PACKED, Shape(), "cpu", torch.float32)
    assert ran.difference is None and ran.error == "No available kernel. Aborting execution."


_FAKE_DEVICE = """
import json, os, signal, sys, time
asked = json.loads(sys.argv[1])
report = open(os.environ["CHEAPTRAIN_DOCTOR_REPORT"], "a")
def say(**what):
    print(json.dumps(what), file=report, flush=True)
names = asked["paths"] if asked["paths"] is not None else ["a", "b", "c", "d"]
facts = {"build_cuda": None, "kernels_for": [], "gpus": [], "why_no_gpu": "", "peers": []}
say(phase="started")
say(facts=facts, planned=names)
for name in names:
    if name == "b":
        print("illegal memory access", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV) if MODE == "crash" else time.sleep(1000)
    say(path=name, difference=0.0, allowed=0.1, error="")
"""


@pytest.mark.parametrize("mode", ["crash", "hang"])
def test_a_kernel_that_takes_its_process_with_it_ends_the_doctor(mode: str) -> None:
    command = [sys.executable, "-c", _FAKE_DEVICE.replace("MODE", repr(mode))]
    paths = look_at_device({}, "auto", command=command, seconds=1.0 if mode == "hang" else 60.0).paths
    assert list(paths) == ["a", "b", "c", "d"] and paths["a"]["difference"] == 0
    if mode == "crash":
        assert paths["b"]["error"] == f"it was killed by signal {signal.SIGSEGV:d}: illegal memory access"
        assert paths["c"]["difference"] == paths["d"]["difference"] == 0
    else:
        assert paths["b"]["error"] == "it did not end in time and was killed"
        assert paths["c"]["error"] == paths["d"]["error"] == "not tried: b hung"


@pytest.mark.parametrize(
    ("layout", "asked", "gpus", "count"),
    [
        ({}, None, 0, (1, 1)),
        ({}, None, 8, (8, 8)),
        ({"dp_shard": 2, "tp": 2}, None, 0, (4, 4)),
        ({"dp_shard": 8, "dp_replicate": 4}, None, 8, (32, 8)),  # a cluster's recipe on one of its machines
        ({"dp_shard": 512}, None, 0, (512, 8)),  # or on a laptop
        ({"tp": 2}, 2, 8, (2, 2)),
    ],
)
def test_another_number_of_processes_is_tried_than_trains(layout, asked, gpus: int, count: tuple[int, int]) -> None:
    assert count_processes([Parallel(**layout)], asked, gpus) == count


def test_more_processes_than_gpus_are_started() -> None:
    with pytest.raises(PreflightError, match="2 GPUs"):
        count_processes([], 3, 2)
    with pytest.raises(RecipeError, match="1 or more"):
        count_processes([], 0, 0)


def test_the_table_to_paste_is_eaten_as_markup_or_folded() -> None:
    console, written = pipe()
    print_section("t", [Finding("FAIL", "processes", "word " * 60, 'put:\n[env]\nNCCL_P2P_DISABLE = "1"')], console)
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.strip() for line in lines[-2:]] == ["[env]", 'NCCL_P2P_DISABLE = "1"']


def test_a_doctor_started_by_a_launcher_starts_processes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PreflightError, match="once on each machine"):
        examine([], pipe()[0])


def test_a_healthy_machine_is_refused_or_something_is_left_on_its_disk(tmp_path: Path) -> None:
    loaded = tiny_recipe(tmp_path, "parallel.dp_shard=2", 'env.GLOO_SOCKET_IFNAME="lo"', prepared=True)
    before = sorted(tmp_path.rglob("*"))
    console, written = pipe()
    examine([loaded], console)
    said = written.getvalue()
    assert "2 over gloo" in said and "all numbers right" in said
    for name in ("packed rows", "rename, fsync, link, lock work", "to write here", "open files", "ran evenly"):
        assert name in said
    assert "FAIL" not in said and "nothing found that would stop a run" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_setting_of_the_recipe_does_not_reach_what_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_recipe(tmp_path, "parallel.dp_shard=2", 'env.GLOO_SOCKET_IFNAME="nosuch0"', "train.precision=bf16")
    asked: dict[str, tuple[object, ...]] = {}

    def processes(count: int, environment: dict[str, str], *, on_gpu: bool) -> list[Finding]:
        asked["processes"] = (count, environment["GLOO_SOCKET_IFNAME"], on_gpu)
        return [Finding("FAIL", "processes", "cannot talk", "do")]

    def device(shape: dict[str, int], precision: str, environment: dict[str, str]) -> Device:
        asked["device"] = (shape, precision, environment["GLOO_SOCKET_IFNAME"])
        return Device(None, (), (), "", (), {})

    monkeypatch.setattr("cheaptrain.doctor.communication.communication_findings", processes)
    monkeypatch.setattr("cheaptrain.doctor.device.look_at_device", device)
    console, written = pipe()
    with pytest.raises(PreflightError, match="processes: cannot talk") as refused:
        examine([loaded], console)
    assert refused.value.exit_code == 3 and "ran evenly" in written.getvalue()  # said after everything was looked at
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 16, "seq": 64}
    assert asked == {"processes": (2, "nosuch0", False), "device": (shape, "bf16", "nosuch0")}


@pytest.mark.slow
def test_gloo_on_an_interface_that_is_not_there_finds_no_cure() -> None:
    findings = list(communication_findings(2, {**os.environ, "GLOO_SOCKET_IFNAME": "nosuch0"}, on_gpu=False))
    assert "Unable to find address for: nosuch0" in findings[0].says
    (failure,) = [finding for finding in findings if finding.mark == "FAIL"]
    assert '[env]\nGLOO_SOCKET_IFNAME = "' in failure.do and "nosuch0" not in failure.do
    assert "all numbers right" in findings[-1].says


@pytest.mark.slow
def test_the_probe_under_a_launcher_prints_nothing_or_once_a_process() -> None:
    command = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    launched = [sys.executable, "-m", "accelerate.commands.launch", *command.split(), "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launched, "-m", "cheaptrain.doctor.probe", "--seconds", "60"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("communication, 2 processes") == done.stdout.count("all numbers right") == 1
    assert "on one machine" in done.stdout
