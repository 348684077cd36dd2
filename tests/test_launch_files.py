"""launch/: the files for Slurm and for rented machines, run with stand-ins for what only a cluster has."""

import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from cheaptrain import cli, launching
from cheaptrain.recipe.quantities import parse_seconds

ROOT = Path(cli.__file__).parent.parent
SLURM = ROOT / "launch" / "slurm.sbatch"
# Each notes its arguments; srun runs what it is given, as the second of two nodes, and cheaptrain ends as told.
STAND_INS = {
    "srun": """while [[ $1 == --* ]]; do shift; done
[ -n "${CANCEL:-}" ] && kill -TERM "$PPID"
SLURM_NODEID=1 exec "$@" """,
    "scontrol": """[ "$1" = show ] && printf 'node07\\nnode08\\n'
[ "$1" = requeue ] && exit "${REQUEUE:-0}"
exit 0""",
    "cheaptrain": 'exit "${CODE:-0}"',
    "conda": "exit 0",
    "pip": "exit 0",
    "rsync": "exit 0",
    "sleep": "exec /bin/sleep 600",
}


def _stand_ins(folder: Path) -> dict[str, str]:
    """Programs of a cluster on PATH that note what they were asked; the environment to run with."""
    for name, body in STAND_INS.items():
        program = folder / "bin" / name
        program.parent.mkdir(exist_ok=True)
        note = f'call=$(printf \'%q \' {name} "$@"); echo "$call" >> {folder}/calls'  # one write: several may note
        program.write_text(f"#!/bin/bash\n{note}\n{body}\n", encoding="utf-8")
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def _calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder / "calls").read_text(encoding="utf-8").splitlines()]


def _sbatch(folder: Path, *arguments: str, **environment: str) -> tuple[int, str, list[list[str]]]:
    """Run slurm.sbatch; returns its exit code, its output, and the calls it made."""
    job = {
        "SLURM_JOB_ID": "21234", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "32",
        "SLURM_JOB_END_TIME": str(int(time.time()) + 36_000),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(SLURM), *arguments],
        env=_stand_ins(folder) | job | environment,
        cwd=folder, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, _calls(folder)


def test_a_node_starts_with_the_wrong_rank_or_address(tmp_path: Path) -> None:
    code, output, calls = _sbatch(tmp_path, "recipes/a b.toml", "train.lr=1e-3")
    assert code == 0, output
    show, srun, launch = calls
    assert show == ["scontrol", "show", "hostnames", "node[07-08]"]
    assert srun[:4] == ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=120"]
    where = ["--nodes", "2", "--node-rank", "1", "--main-address", "node07:21234"]
    assert launch[:8] == ["cheaptrain", "launch", *where]
    limit, *rest = launch[8:]
    assert rest == ["recipes/a b.toml", "train.lr=1e-3"]
    key, _, value = limit.partition("=")
    assert key == "run.max_time" and 36_000 - 360 < parse_seconds(value) <= 36_000 - 300


@pytest.mark.parametrize("seeds", [[], ["--seeds", "1,2"]])
def test_the_chain_of_gpt2_cannot_be_started_by_slurm(
    tmp_path: Path, seeds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [str(ROOT / "recipes" / "gpt2-124m" / f"{name}.toml") for name in ("pretrain", "sft_tulu3", "sft_gsm8k")]
    _, _, calls = _sbatch(tmp_path, *seeds, *recipes, SLURM_NNODES="1")
    monkeypatch.setattr(launching, "visible_gpus", lambda _: 8)
    monkeypatch.chdir(tmp_path)
    started = calls[-1][1:]
    started[started.index("--node-rank") + 1] = "0"  # the stand-in is the second of two
    done = CliRunner().invoke(cli.app, [*started, "--dry-run"])
    assert done.exit_code == 0, done.output
    lines = [line for line in "".join(done.output.split("\n")).split("CHEAPTRAIN_PROCESSES") if line]
    assert len(lines) == (2 if seeds else 1)
    for number, line in enumerate(lines, 1):
        names = [
            f"{name}-seed{number}.toml" if seeds else f"{name}.toml" for name in ("pretrain", "sft_tulu3", "sft_gsm8k")
        ]
        places = [line.index(name) for name in names]
        assert places == sorted(places) and "run.max_time=" in line and "--num_processes 8" in line


def test_a_job_without_an_end_gets_one(tmp_path: Path) -> None:
    _, _, calls = _sbatch(tmp_path, "a.toml", SLURM_JOB_END_TIME="")
    assert calls[-1][8:] == ["a.toml"]


@pytest.mark.parametrize(
    "environment, code, requeued",
    [
        ({"CODE": "75"}, 75, True),
        ({"CODE": "0"}, 0, False),
        ({"CODE": "1"}, 1, False),
        ({"CODE": "3"}, 3, False),
        ({"CODE": "137"}, 137, False),
        ({"CODE": "75", "CANCEL": "1"}, 75, False),  # scancel: nobody wants it back
        ({"CODE": "75", "SLURM_RESTART_COUNT": "100"}, 75, False),
    ],
)
def test_a_stopped_job_is_not_put_back_or_a_failed_one_is(
    tmp_path: Path, environment: dict[str, str], code: int, requeued: bool
) -> None:
    answer, output, calls = _sbatch(tmp_path, "a.toml", **environment)
    assert answer == code, output
    assert (["scontrol", "requeue", "21234"] in calls) == requeued


def test_a_job_that_cannot_be_requeued_is_lost_silently(tmp_path: Path) -> None:
    answer, output, _ = _sbatch(tmp_path, "a.toml", CODE="75", REQUEUE="1")
    assert answer == 75 and "submit it once more" in output


def test_slurm_reads_no_directive_after_the_first_command() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(directives) >= 9 and max(directives) < first
    options = {lines[number].split()[1].partition("=")[0] for number in directives}
    assert {"--signal", "--requeue", "--time", "--output", "--ntasks-per-node"} <= options


def _sky() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("code", [0, 75, 4])
def test_a_rented_machine_answers_another_code_or_keeps_what_it_trained(tmp_path: Path, code: int) -> None:
    sky = _sky()
    script = sky["run"].replace("/bucket", str(tmp_path / "bucket"))
    done = subprocess.run(
        ["bash", "-c", script],
        env=_stand_ins(tmp_path) | sky["envs"] | {"BUCKET": "b", "CODE": str(code), "KEYS": "train.lr=1 log.every=2"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    calls = [call for call in _calls(tmp_path) if call[0] in ("cheaptrain", "rsync")]
    assert done.returncode == code, done.stderr
    assert calls[0][-2:] == [f"{tmp_path}/bucket/outputs/", "outputs/"]
    assert calls[-1][-2:] == ["outputs/", f"{tmp_path}/bucket/outputs/"]
    launches = [["cheaptrain", "launch", "recipes/phase1.toml", "train.lr=1", "log.every=2"]] if code == 0 else []
    assert calls[1:-1] == [["cheaptrain", "prepare", "recipes/phase1.toml"], *launches]


def test_a_managed_job_goes_on_after_a_refusal_or_not_after_a_stop() -> None:
    sky = _sky()
    assert sky["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    (mounted,) = sky["file_mounts"]
    assert f"{mounted}/outputs" in sky["run"]
    assert all((ROOT / recipe).is_file() for recipe in sky["envs"]["RECIPES"].split())


@pytest.mark.parametrize("name", ["launch/skypilot.yaml", "launch/slurm.sbatch", "launch/run.py", "docs/launch.md"])
def test_a_file_names_commands_or_paths_that_are_not_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    commands = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"(?:`|^\s*|&& |exec )cheaptrain ([a-z]+)", text, re.MULTILINE))
    assert named and named <= commands
    paths = re.findall(r"(?<![\w/])(?:launch|recipes|docs)/[\w/.-]+\.(?:py|toml|sbatch|yaml|md)", text)
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    links = [path for path in re.findall(r"\]\(([^)]+)\)", text) if not (ROOT / name).parent.joinpath(path).is_file()]
    assert links == []
