"""`cheaptrain launch`: the right processes come up, whatever lies in the home directory, and their exit codes and the
signals to them get through. The launcher here is the real one, with a small script in place of launch/run.py.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ranks import alive
from recipe_texts import MINIMAL

from cheaptrain import launched, launching
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.launching import Nodes, parse_nodes, prepare, processes_here, recipe_environment
from cheaptrain.recipe.load import LoadedRecipe, load_recipe
from cheaptrain.stopping import ECHO_SECONDS
from cheaptrain.supervise import exit_code

# What a process does stands in WHAT: `all:stop`, or `0:sleep,1:refuse`.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from cheaptrain import launched
from cheaptrain.errors import CheaptrainError, DivergedError, PreflightError, RecipeError, StoppedError
from cheaptrain.exits import guarded
from cheaptrain.launched import assert_started, rank, size

ERRORS = {"recipe": RecipeError, "refuse": PreflightError, "diverge": DivergedError, "stop": StoppedError}
HERE = Path(os.environ["HERE"])
launched.PATIENCE_SECONDS = 2.0

def note(kind, value):
    (HERE / f"{kind}-{rank()}.tmp").write_text(json.dumps(value))
    (HERE / f"{kind}-{rank()}.tmp").rename(HERE / f"{kind}-{rank()}")

def main():
    assert_started(size())
    note("up", {"argv": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid(), "parent": os.getppid()})
    for part in os.environ["WHAT"].split(","):
        who, kind = part.split(":")
        if who not in ("all", str(rank())):
            continue
        if kind == "train":
            train()
        elif kind == "sleep":
            time.sleep(300)
        elif kind == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif kind == "fail":
            raise CheaptrainError("it failed")
        elif kind != "end":
            raise ERRORS[kind](f"{kind}, as asked")

def train():
    from cheaptrain.train.signals import StopRequest, stop_on_signals
    deliveries, plain = [], StopRequest.receive
    def receive(self, number, frame):
        deliveries.append(number)
        plain(self, number, frame)
    StopRequest.receive = receive
    with stop_on_signals() as stop:
        note("training", os.getpid())
        while not stop:
            time.sleep(0.01)
        time.sleep(1.2)  # a save; whatever comes now came a second time
        note("deliveries", deliveries)
        raise StoppedError(f"{stop.name}: saved")

guarded(main)
"""
DRIVER = """
import sys
from pathlib import Path
from rich.console import Console
from cheaptrain import launching
launching.visible_gpus = lambda environment: 0  # two seconds of importing torch
recipe, script, processes, nodes, rank, address = sys.argv[1:]
nodes = launching.parse_nodes(int(nodes), int(rank), address)
sys.exit(launching.launch([recipe], [], Console(), processes=int(processes), nodes=nodes, script=Path(script)))
"""
HOSTILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
mixed_precision: bf16
dynamo_config: {dynamo_backend: INDUCTOR}
num_processes: 7
num_machines: 3
machine_rank: 2
main_process_ip: 10.0.0.1
main_process_port: 4321
gpu_ids: "5"
debug: true
use_cpu: false
"""


class Launch:
    """A `cheaptrain launch` under way, as the leader of a session of its own, like a shell's job."""

    def __init__(
        self, folder: Path, what: str, processes: int = 2, nodes: int = 1, node: int = 0, address: str = ""
    ) -> None:
        self.folder = folder
        for name, text in (("worker.py", WORKER), ("recipe.toml", MINIMAL)):
            (folder / name).write_text(text, encoding="utf-8")
        config = folder / "home" / "accelerate" / "default_config.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(HOSTILE, encoding="utf-8")
        path = [str(Path(launching.__file__).parent.parent), *sys.path]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path), "HF_HOME": str(folder / "home"), "WHAT": what, "HERE": str(folder),
            "PET_NNODES": "4", "RANK": "3", "WORLD_SIZE": "8", "COLUMNS": "500",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, "recipe.toml", "worker.py", str(processes), str(nodes), str(node), address],
            cwd=folder, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output

    def notes(self, kind: str) -> dict[int, object]:
        """What the processes noted, by rank."""
        names = [path for path in self.folder.glob(f"{kind}-*") if path.suffix != ".tmp"]
        return {int(path.name.rpartition("-")[2]): json.loads(path.read_text()) for path in names}

    def await_notes(self, kind: str, count: int) -> dict[int, object]:
        """The same, once there are `count`."""
        _until(lambda: len(self.notes(kind)) == count or self.process.poll() is not None)
        assert len(self.notes(kind)) == count, self.wait()
        return self.notes(kind)


def _until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _gone(pids: list[int]) -> bool:
    return not any(alive(pid) for pid in pids)


@pytest.mark.parametrize(
    "what, processes, code, said",
    [
        pytest.param("all:refuse", 1, 3, "refused refuse, as asked", marks=pytest.mark.slow),
        ("all:stop", 2, 75, "stopped stop, as asked"),
        pytest.param("all:diverge", 2, 4, "diverged diverge, as asked", marks=pytest.mark.slow),
        pytest.param("all:fail", 2, 1, "failed it failed", marks=pytest.mark.slow),
        pytest.param("0:sleep,1:recipe", 2, 2, "rank 1: error recipe, as asked", marks=pytest.mark.slow),
    ],
)
def test_the_exit_code_gets_lost_in_the_launcher_and_every_process_prints_the_error(
    tmp_path: Path, what: str, processes: int, code: int, said: str
) -> None:
    run = Launch(tmp_path, what, processes)
    answer, output = run.wait()
    assert answer == code, output
    assert sorted(run.notes("up")) == list(range(processes))
    assert "Traceback" not in output and "FAILED" not in output  # of torch's elastic agent
    assert output.count("as asked") + output.count("it failed") == 1 and said in output
    assert output.count(f"exit code {code}") == 1
    assert _gone([up["pid"] for up in run.notes("up").values()])  # type: ignore[index]


@pytest.mark.slow
def test_a_process_that_crashes_leaves_the_others_waiting(tmp_path: Path) -> None:
    run = Launch(tmp_path, "0:sleep,1:crash")
    answer, output = run.wait()
    assert answer == 1 and "SIGSEGV" in output and "rank 1 ended without an exit code" in output, output
    assert "no training was under way" not in output  # nobody asked for a stop
    assert _gone([up["pid"] for up in run.notes("up").values()])  # type: ignore[index]


def test_a_configuration_in_the_home_directory_changes_what_runs(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:end")
    answer, output = run.wait()
    assert answer == 0, output
    ups = run.notes("up")
    assert len(ups) == 2
    for rank, up in ups.items():
        environment = up["environment"]  # type: ignore[index]
        said = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
        assert said == {
            "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
            "ACCELERATE_DYNAMO_USE_DYNAMIC": "False", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
        }  # fmt: skip
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), "2")
        assert environment["MASTER_PORT"] != "4321" and environment.get("CUDA_VISIBLE_DEVICES") != "5"
        assert launched.EXIT_DIR not in environment  # or what a run starts would speak in its name
        assert up["argv"] == ["recipe.toml"]  # type: ignore[index]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_ctrl_c_reaches_the_processes_twice_or_never(tmp_path: Path, processes: int) -> None:
    run = Launch(tmp_path, "all:train", processes)
    run.await_notes("training", processes)
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal does
    answer, output = run.wait()
    assert answer == 75, output
    assert run.notes("deliveries") == {rank: [signal.SIGINT] for rank in range(processes)}
    assert output.count("stopped SIGINT: saved") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_a_scheduler_that_signals_every_process_makes_a_second_request_of_it(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:train")
    run.await_notes("training", 2)
    driver = psutil.Process(run.process.pid)
    everyone = [driver, *driver.children(recursive=True)]
    assert len(everyone) == 4  # this one, the agent, two workers
    for process in everyone:
        process.send_signal(signal.SIGTERM)
    answer, output = run.wait()
    assert answer == 75, output
    assert "Traceback" not in output and sorted(run.notes("deliveries")) == [0, 1]


@pytest.mark.slow
def test_a_signal_to_the_agent_alone_ends_the_processes_after_thirty_seconds(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:train")
    run.await_notes("training", 2)
    (agent,) = psutil.Process(run.process.pid).children()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        agent.send_signal(number)
    time.sleep(0.5)
    assert agent.is_running() and run.notes("deliveries") == {}  # deaf: nobody was asked for anything
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.wait()[0] == 75


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_something_running(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:sleep")  # hangs where no handler of training is installed
    ups = run.await_notes("up", 2)
    started = psutil.Process(run.process.pid).children(recursive=True)
    for worker in started[1:]:
        worker.suspend()  # it cannot answer at all
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(1.2 * ECHO_SECONDS)
    os.kill(run.process.pid, signal.SIGINT)
    answer, output = run.wait()
    assert answer == 1 and "left at once" in output, output
    assert _gone([process.pid for process in started]) and len(ups) == 2


def test_ctrl_c_before_training_is_lost_or_looks_like_a_crash(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:sleep")
    run.await_notes("up", 2)
    os.kill(run.process.pid, signal.SIGINT)
    answer, output = run.wait()
    assert answer == 75 and output.count("no training was under way") == 1 and "Traceback" not in output, output


def test_ctrl_c_before_there_are_processes_is_lost(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:train")
    _until(lambda: psutil.Process(run.process.pid).children())
    os.kill(run.process.pid, signal.SIGINT)  # the agent imports torch; the processes get it when they are there
    answer, output = run.wait()
    assert answer == 75 and run.notes("training") == {}, output


def test_a_second_ctrl_c_before_there_are_processes_waits_for_them(tmp_path: Path) -> None:
    run = Launch(tmp_path, "all:train")
    driver = psutil.Process(run.process.pid)
    _until(driver.children)
    (agent,) = driver.children()
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(1.2 * ECHO_SECONDS)
    os.kill(run.process.pid, signal.SIGINT)
    answer, output = run.wait()
    assert answer == 1 and "left at once" in output and _gone([agent.pid]), output


# As training hears signals, and before.
@pytest.mark.parametrize("what", [pytest.param("train", marks=pytest.mark.slow), "sleep"])
def test_a_killed_launcher_leaves_processes_that_train_unseen(tmp_path: Path, what: str) -> None:
    run = Launch(tmp_path, f"all:{what}")
    run.await_notes("training" if what == "train" else "up", 2)
    pids = [process.pid for process in psutil.Process(run.process.pid).children(recursive=True)]
    run.process.kill()
    _until(lambda: _gone(pids))
    asked = {rank: set(got) for rank, got in run.notes("deliveries").items()}  # type: ignore[call-overload]
    # In training each of them saved. The kernel sends one signal for every thread of the agent.
    assert asked == ({0: {signal.SIGTERM}, 1: {signal.SIGTERM}} if what == "train" else {})


@pytest.mark.slow
def test_two_nodes_do_not_find_each_other_or_end_one_by_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [Launch(tmp_path, "all:train", 1, 2, node, address) for node in range(2)]
    runs[0].await_notes("training", 2)
    ranks = [up["environment"] for _, up in sorted(runs[0].notes("up").items())]  # type: ignore[index]
    assert [(up["RANK"], up["LOCAL_RANK"], up["WORLD_SIZE"]) for up in ranks] == [("0", "0", "2"), ("1", "0", "2")]
    for run in runs:
        os.kill(run.process.pid, signal.SIGUSR1)
    answers = [run.wait() for run in runs]
    assert [code for code, _ in answers] == [75, 75], answers
    assert ["saved" in output.replace("to save", "") for _, output in answers] == [True, False]  # one of them says it


@pytest.mark.parametrize(
    "codes, processes, agent, answer",
    [
        ({0: 0, 1: 0}, 2, 0, 0),
        ({0: 0, 1: 0}, 2, 1, 1),  # crashed after the end
        ({0: 0}, 2, 1, 1),
        ({}, 2, 1, 1),
        ({0: 75, 1: 75}, 2, 0, 75),
        ({0: 75}, 2, -9, 75),  # the other one was still waiting for the rest to come up
        ({0: 75, 1: 1}, 2, 1, 1),
        ({0: 1, 1: 3}, 2, 1, 3),  # the refusal is why the other failed
        ({1: 2}, 2, 1, 2),
        ({0: 4, 1: 4}, 2, 0, 4),
        ({0: 130}, 1, 0, 1),
    ],
)
def test_one_code_of_many_is_the_wrong_one(codes: dict[int, int], processes: int, agent: int, answer: int) -> None:
    assert exit_code(codes, processes, agent) == answer


def _loaded(folder: Path, *texts: str) -> list[LoadedRecipe]:
    recipes = []
    for number, text in enumerate(texts):
        path = folder / f"stage{number}.toml"
        path.write_text(MINIMAL + text, encoding="utf-8")
        recipes.append(load_recipe(path))
    return recipes


FIXED = "\n[parallel]\ndp_shard = 4\ntp = 2\n"
AUTO = "\n[parallel]\ntp = 2\n"


@pytest.mark.parametrize(
    "texts, asked, nodes, gpus, count",
    [
        (("",), None, 1, 0, 1),
        (("",), None, 1, 8, 8),
        (("",), 3, 1, 8, 3),
        ((FIXED,), None, 1, 8, 8),
        ((FIXED,), None, 2, 8, 4),
        ((FIXED, AUTO), None, 1, 2, 8),
        ((AUTO,), None, 1, 0, 2),  # no GPU: as few as [parallel] can do with
        ((AUTO,), None, 2, 0, 1),
        ((AUTO,), None, 1, 8, 8),
    ],
)
def test_the_number_of_processes_is_not_what_the_recipe_or_the_machine_says(
    tmp_path: Path, texts: tuple[str, ...], asked: int | None, nodes: int, gpus: int, count: int
) -> None:
    assert processes_here(_loaded(tmp_path, *texts), asked, nodes, gpus) == count


def test_recipes_that_want_different_numbers_of_processes_start_with_one_of_them(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stage0 8, stage1 4"):
        processes_here(_loaded(tmp_path, FIXED, "\n[parallel]\ndp_shard = 4\n"), None, 1, 0)
    with pytest.raises(RecipeError, match="do not divide over 3 nodes"):
        processes_here(_loaded(tmp_path, FIXED), None, 3, 0)


def _prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str = "", gpus: int = 0, processes: int | None = None,
    nodes: Nodes | None = None,
) -> list[str]:  # fmt: skip
    monkeypatch.setattr(launching, "visible_gpus", lambda environment: gpus)
    monkeypatch.chdir(folder)
    Path("a b.toml").write_text(MINIMAL + text, encoding="utf-8")
    start = prepare(["a b.toml"], ["train.lr=1e-3"], processes=processes, nodes=nodes or Nodes())
    return str(start).split(" launch ")


NO = "--mixed_precision no --dynamo_backend no"
CONFIG, DOOR = launching.CONFIG, launching.DOOR


def test_the_line_is_not_what_one_would_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = f"{NO} {DOOR} 'a b.toml' train.lr=1e-3"
    own, several = f"--config_file {CONFIG} --quiet", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900"
    one = _prepared(tmp_path, monkeypatch, gpus=1)
    assert one[0].startswith("CHEAPTRAIN_PROCESSES=1 ") and one[0].endswith("accelerate")
    assert one[1] == f"{own} --num_processes 1 --num_machines 1 {end}"
    assert _prepared(tmp_path, monkeypatch, gpus=0)[1] == one[1]  # on a CPU the same
    eight = _prepared(tmp_path, monkeypatch, gpus=8)
    assert eight[0].startswith(f"CHEAPTRAIN_PROCESSES=8 {several} /")
    assert eight[1] == f"{own} --multi_gpu --num_processes 8 --num_machines 1 --main_process_port 0 {end}"
    cpu = _prepared(tmp_path, monkeypatch, processes=2, text='\n[env]\nNCCL_P2P_DISABLE = "1"\nX = "a b"\n')
    assert cpu[0].startswith(f"NCCL_P2P_DISABLE=1 X='a b' CHEAPTRAIN_PROCESSES=2 {several} ACCELERATE_USE_CPU=true /")
    nodes = _prepared(tmp_path, monkeypatch, gpus=8, nodes=Nodes(4, 3, "node01", 29500))
    assert nodes[0].startswith("CHEAPTRAIN_PROCESSES=32 ")
    assert nodes[1] == (
        f"{own} --multi_gpu --num_processes 32 --num_machines 4 --machine_rank 3 --main_process_ip node01 "
        f"--main_process_port 29500 --rdzv_conf timeout=1800 {end}"
    )


def test_more_processes_than_gpus_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="8 processes on this machine, and 2 GPUs are visible"):
        _prepared(tmp_path, monkeypatch, gpus=2, processes=8)
    with pytest.raises(RecipeError, match="takes 8 processes"):
        _prepared(tmp_path, monkeypatch, text=FIXED, gpus=2, processes=2)


def test_fewer_processes_than_asked_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launched.PROCESSES, "8")
    launched.assert_started(8)
    with pytest.raises(PreflightError, match=r"8 processes were to start .* and 1 came up"):
        launched.assert_started(1)
    monkeypatch.delenv(launched.PROCESSES)
    launched.assert_started(1)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "PET_NNODES", "HF_HUB_OFFLINE"])
def test_a_recipe_speaks_for_the_launcher(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"stage0\.toml:.*env\.{name}"):
        recipe_environment(_loaded(tmp_path, f'\n[env]\n{name} = "1"\n'))


def test_two_recipes_of_one_process_want_different_environments(tmp_path: Path) -> None:
    same, other = '\n[env]\nA = "1"\nB = "2"\n', '\n[env]\nA = "2"\n'
    assert recipe_environment(_loaded(tmp_path, same, same)) == {"A": "1", "B": "2"}
    with pytest.raises(RecipeError, match=r"env\.A is '2', and '1' in another recipe"):
        recipe_environment(_loaded(tmp_path, same, other))


@pytest.mark.parametrize("address", [None, "", "node01", ":29500", "node01:", "node01:0", "node01:65536", "node01:²"])
def test_an_address_without_host_or_port_hangs_in_the_rendezvous(address: str | None) -> None:
    with pytest.raises(RecipeError, match="write HOST:PORT"):
        parse_nodes(2, 0, address)


def test_a_node_that_does_not_exist_is_waited_for() -> None:
    assert parse_nodes(2, 1, "[::1]:29500") == Nodes(2, 1, "[::1]", 29500)
    assert parse_nodes(1, 0, "node01:29500") == Nodes()
    for count, rank in ((2, 2), (1, 1), (2, -1)):
        with pytest.raises(RecipeError, match="it is one of 0 to"):
            parse_nodes(count, rank, "node01:29500")


def test_the_gpus_of_a_machine_are_counted_without_its_environment() -> None:
    assert launching.visible_gpus(os.environ | {"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_env_of_a_recipe_comes_too_late_for_what_reads_it_at_the_start(tmp_path: Path) -> None:
    """Also by plain `accelerate launch launch/run.py`; once, whatever Python itself makes of a variable."""
    (tmp_path / "r.toml").write_text(MINIMAL + '\n[env]\nPYTHONHASHSEED = "0"\nLC_CTYPE = "C"\n', encoding="utf-8")
    (tmp_path / "door.py").write_text(
        "import os, sys\nprint('start', os.getpid(), flush=True)\n"
        "from cheaptrain.launching import apply_environment\nfrom cheaptrain.recipe.load import load_recipe\n"
        "apply_environment([load_recipe('r.toml')])\nprint('hash', hash('a'), sys.argv[1:])\n",
        encoding="utf-8",
    )
    path = os.pathsep.join([str(Path(launching.__file__).parent.parent), *sys.path])
    plain = {name: value for name, value in os.environ.items() if name not in ("PYTHONHASHSEED", "LC_ALL")}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-u", "door.py", "x y"],
            cwd=tmp_path, env=plain | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines())
    first, second, hashed = outputs[0]
    assert first == second and hashed.endswith("['x y']") and hashed == outputs[1][-1]


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_that_wait_take_the_cores_from_whoever_works(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys\nfrom cheaptrain.launching import apply_environment\napply_environment([])\n"
            "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])",
        ],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"OMP_WAIT_POLICY": own} if own else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", own or "PASSIVE"]  # torch, once there, has read it


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        ({}, {}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}, None),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {}, "max_split_size_mb:64"),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_a_default_of_the_allocator_overrules_what_somebody_asked_for(
    own: dict[str, str], asked: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reads the variables in the order of their age, so a default under the new name would hide the old one."""
    monkeypatch.setattr(os, "environ", dict(own))
    monkeypatch.setattr(launching, "recipe_environment", lambda recipes: asked)
    monkeypatch.setattr(os, "execv", lambda *_: None)
    launching.apply_environment([])
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == (own | asked).get("PYTORCH_CUDA_ALLOC_CONF")
