"""From recipes to the `accelerate launch` line that starts the right processes, and what is checked before.

The traps, all silent: on a CPU several processes are only started with --multi_gpu; one process must not have it; a
configuration file that somebody once made in the home directory changes precision, number and kind of the processes.
So every flag that matters is given, with a configuration file of our own, and the line is printed to be copied.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError
from cheaptrain.launched import ENV_APPLIED, PROCESSES
from cheaptrain.recipe.layout import resolve_layout
from cheaptrain.recipe.load import LoadedRecipe, load_recipes
from cheaptrain.say import say
from cheaptrain.supervise import supervise

_FOLDER = Path(__file__).resolve().parent.parent / "launch"
DOOR = _FOLDER / "run.py"
CONFIG = _FOLDER / "accelerate.yaml"
DEFAULT_PORT = 29500
# What the launcher, or the door itself, says to every process: a recipe cannot say it as well.
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE")
_OURS = {*_RANKS, *_SIZES, "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"}
_OUR_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_", "CHEAPTRAIN_")


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, and which one this is. `address` and `port` are those of the first."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = DEFAULT_PORT


@dataclass(frozen=True)
class Start:
    """What to start on this machine: a command, the variables it needs, those it must not have, and how many
    processes come of it here."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    without: tuple[str, ...]
    processes: int

    def __str__(self) -> str:
        """The line for a shell."""
        unset = [f"-u {name}" for name in self.without]
        given = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*(["env", *unset] if unset else []), *given, shlex.join(self.command)])


def launch(
    paths: Sequence[str],
    overrides: Sequence[str],
    console: Console,
    *,
    processes: int | None = None,
    nodes: Nodes | None = None,
    dry_run: bool = False,
    script: Path = DOOR,
) -> int:
    """Check the recipes, print the line that trains them, and unless `dry_run` run it; returns its exit code.

    `processes` is for this machine. Raises RecipeError or PreflightError before anything starts.
    """
    start = prepare(paths, overrides, processes=processes, nodes=nodes or Nodes(), script=script)
    say(console, str(start))
    if dry_run:
        return 0
    environment = {name: value for name, value in os.environ.items() if name not in start.without}
    return supervise(start.command, {**environment, **start.environment}, start.processes, partial(say, console))


def prepare(
    paths: Sequence[str], overrides: Sequence[str], *, processes: int | None, nodes: Nodes, script: Path = DOOR
) -> Start:
    """What `launch` would start. Raises RecipeError and PreflightError."""
    if not script.exists():
        raise CheaptrainError(f"{script} is not there: install cheaptrain from its folder with `pip install -e .`")
    recipes = load_recipes(paths, overrides)
    environment = recipe_environment(recipes)
    gpus = visible_gpus({**os.environ, **environment})
    here = processes_here(recipes, processes, nodes.count, gpus)
    total = here * nodes.count
    for recipe in recipes:
        resolve_layout(recipe.recipe.parallel, total, recipe.provenance)
    if 0 < gpus < here:
        raise PreflightError(f"{here} processes on this machine, and {_gpus(gpus)}: one process needs one GPU")
    timeout = max(recipe.recipe.parallel.start_timeout for recipe in recipes)
    command = [*_accelerate(), *_flags(total, nodes, timeout), _short(script), *paths, *overrides]
    environment[PROCESSES] = str(total)
    if total > 1:
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "900"  # for the line copied: 30 s end a save in the middle
    if total > 1 and not gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
    return Start(tuple(command), environment, _outer_launcher(), here)


def processes_here(recipes: Sequence[LoadedRecipe], asked: int | None, nodes: int, gpus: int) -> int:
    """Processes to start on this machine of `nodes`: `asked`, else what [parallel] says, else one a GPU.

    Raises RecipeError when the recipes want different numbers, or one that does not divide over the machines.
    """
    if asked is not None:
        return asked
    wanted: dict[int, str] = {}
    least = 1
    for loaded in recipes:
        parallel = loaded.recipe.parallel
        fixed = parallel.dp_replicate * parallel.cp * parallel.tp
        if parallel.dp_shard != "auto":
            wanted.setdefault(fixed * parallel.dp_shard, loaded.name)
        least = max(least, fixed)
    if len(wanted) > 1:
        numbers = ", ".join(f"{name} {count}" for count, name in wanted.items())
        raise RecipeError(
            f"the recipes run in the same processes, but [parallel] asks for different numbers of them: {numbers}. "
            'Set parallel.dp_shard = "auto", or launch them one after the other'
        )
    total = next(iter(wanted), None)
    if total is None:
        return gpus or -(-least // nodes)
    if total % nodes:
        raise RecipeError(f"[parallel] takes {total} processes, which do not divide over {nodes} nodes")
    return total // nodes


# torch reads the first of them that is set, and all of the allocator's settings from it.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def recipe_environment(recipes: Sequence[LoadedRecipe]) -> dict[str, str]:
    """`[env]` of the recipes together. Raises RecipeError when they differ, or name what the launcher sets."""
    environment: dict[str, str] = {}
    for loaded in recipes:
        for name, value in loaded.recipe.env.items():
            origin = loaded.provenance.get(f"env.{name}", str(loaded.path))
            if name in _OURS or name.startswith(_OUR_PREFIXES):
                raise RecipeError(f"{origin}: env.{name}: cheaptrain and its launcher set this one; leave it out")
            if environment.setdefault(name, value) != value:
                raise RecipeError(
                    f"{origin}: env.{name} is {value!r}, and {environment[name]!r} in another recipe of the same "
                    "processes; launch them one after the other"
                )
    return environment


def set_defaults(environment: MutableMapping[str, str], asked: Collection[str] = ()) -> None:
    """What a training process has in its `environment` unless somebody, there or among the names `asked`, says
    otherwise.

    OpenMP threads that wait sleep: spinning, those of one training process took six times as long for a step as soon
    as anything else ran on the same cores (docs/log.md). And segments of GPU memory grow, so that what was freed is of
    use to tensors of another size."""
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(name in environment or name in asked for name in _ALLOCATOR):
        environment[_ALLOCATOR[0]] = "expandable_segments:True"


def apply_environment(recipes: Sequence[LoadedRecipe]) -> None:
    """Make `[env]` the environment of this process. Where a value is new the process starts itself again, because
    libraries read theirs when they are loaded, some before the first line of Python. Returns when all is set.

    What nobody says otherwise is as `set_defaults` has it."""
    asked = recipe_environment(recipes)
    set_defaults(os.environ, asked)
    wanted = {name: value for name, value in asked.items() if os.environ.get(name) != value}
    os.environ.update(wanted)
    if wanted and ENV_APPLIED not in os.environ:  # once: Python changes some itself when it starts, LC_CTYPE for one
        os.environ[ENV_APPLIED] = "1"
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def visible_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that a process with this environment sees. Asked in a process of its own: torch reads the environment once,
    and this one has no need of its gigabytes."""
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode or not asked.stdout.split()[-1:]:
        reason = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
        raise CheaptrainError(f"torch cannot be imported: {reason}")
    return int(asked.stdout.split()[-1])


def parse_nodes(count: int, rank: int, address: str | None) -> Nodes:
    """`--nodes`, `--node-rank` and `--main-address HOST:PORT`. Raises RecipeError."""
    if not 0 <= rank < count:
        raise RecipeError(f"--node-rank {rank}: with --nodes {count} it is one of 0 to {count - 1}")
    if count == 1:  # scripts give the address whatever the number of nodes; one node has no use for it
        return Nodes()
    host, colon, port = (address or "").rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        raise RecipeError(
            f"--main-address {address or '(not given)'}: with several nodes, write HOST:PORT of the first one, the "
            f"same on all, e.g. node01:{DEFAULT_PORT}"
        )
    return Nodes(count, rank, host, int(port))


def _flags(total: int, nodes: Nodes, timeout_seconds: float) -> list[str]:
    flags = ["--config_file", _short(CONFIG), "--quiet"]
    if total > 1:
        flags.append("--multi_gpu")  # also on a CPU: --cpu starts one process, whatever is asked
    flags += ["--num_processes", str(total), "--num_machines", str(nodes.count)]
    if nodes.count > 1:
        flags += ["--machine_rank", str(nodes.rank), "--main_process_ip", nodes.address]
        flags += ["--main_process_port", str(nodes.port), "--rdzv_conf", f"timeout={round(timeout_seconds)}"]
    elif total > 1:
        flags += ["--main_process_port", "0"]  # any free one
    return [*flags, "--mixed_precision", "no", "--dynamo_backend", "no"]


def _accelerate() -> list[str]:
    """The one that belongs to this Python, whatever PATH says."""
    script = shutil.which("accelerate", path=str(Path(sys.executable).parent))
    return [_short(Path(script)), "launch"] if script else [sys.executable, "-m", "accelerate.commands.launch"]


def _outer_launcher() -> tuple[str, ...]:
    """Variables of a launcher around this one; a single process would take them for its own and wait for the rest."""
    ranks = [name for name in (*_RANKS, *_SIZES) if name in os.environ]
    return tuple(ranks + sorted(name for name in os.environ if name.startswith(("PET_", "TORCHELASTIC_"))))


def _short(path: Path) -> str:
    """From the current folder when it is inside, so that the line stays readable."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _gpus(count: int) -> str:
    return "1 GPU is visible" if count == 1 else f"{count} GPUs are visible"
