"""One command's worth of measuring: who is measured next, as long as there is time.

Round by round, works in order of worth, the variants of a work in random order, experiments after all else; what has
the fewest samples of the present code comes first, so that a command repeated goes on where the last one ended. While
one process measures, the next one imports its libraries, if there are cores for both. The trap is the end: a command
that is given ten minutes must not be in the middle of something after them, so nothing is begun that took longer, last
time, than what is left.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cheaptrain.bench.children import Child
from cheaptrain.bench.samples import add_sample, read_samples, same_code
from cheaptrain.bench.works import EXPERIMENTS, Work
from cheaptrain.errors import CheaptrainError

_READY_SECONDS = 120.0
_JOB_SECONDS = 240.0
_OVERTIME_SECONDS = 20.0  # for what was begun in time and takes longer than it did before
_GUESSED_SECONDS = {"cuda": 20.0, "cpu": 15.0}  # of what was never measured
_CORES_FOR_TWO = 4


@dataclass(frozen=True)
class Limits:
    """How much is measured: so many rounds, and nothing begun that `minutes` would not see the end of."""

    minutes: float
    rounds: int
    threads: int = 0  # of a process on a CPU; 0: torch's own choice


def machine_here() -> dict[str, Any]:
    """What `child.machine` says, asked in a process of its own: this one never touches a device."""
    with _child({"do": "machine"}) as child:
        found = child.wait("result", _READY_SECONDS)
    if "error" in found:
        raise CheaptrainError(f"bench: the machine cannot be looked at: {found['error']}")
    return {name: value for name, value in found.items() if name != "kind"}


def run(
    chosen: Sequence[tuple[Work, Sequence[str]]],
    machine: dict[str, Any],
    file: Path,
    limits: Limits,
    say: Callable[[str], None],
) -> list[str]:
    """Measure, and keep every sample in `file` as soon as it is there. Returns what was left for want of time."""
    deadline = time.monotonic() + 60 * limits.minutes
    held = read_samples(file)["samples"]
    waiting = _in_order(chosen, held, machine, limits.rounds)
    seconds = {(sample["work"], sample["variant"]): sample.get("wall_seconds", 0.0) for sample in held}
    failed: set[tuple[str, str]] = set()
    left: list[str] = []
    ahead: Child | None = None

    def next_job() -> dict[str, Any] | None:
        while waiting:
            work, variant, number = waiting.pop(0)
            if (work, variant) in failed:
                continue
            expected = seconds.get((work, variant)) or _GUESSED_SECONDS[machine["type"]]
            if time.monotonic() + expected > deadline:
                left.append(f"{work}: {variant} (round {number})")
                continue
            return {
                "do": "measure",
                "work": work,
                "variant": variant,
                "device": machine["type"],
                "threads": limits.threads,
            }
        return None

    try:
        job = next_job()
        while job is not None:
            child, ahead = ahead or Child(job), None
            with _closing(child):
                # By then it is known what is left, and a late start costs nobody anything.
                result = child.wait("ready", _READY_SECONDS)
                if "error" not in result:
                    ready_seconds = result["import_seconds"]
                    child.go()
                    following = next_job()
                    if following is not None and machine["cores"] >= _CORES_FOR_TWO:
                        ahead = Child(following)
                    patience = min(_JOB_SECONDS, deadline + _OVERTIME_SECONDS - time.monotonic())
                    result = child.wait("result", patience)
                    result["import_seconds"] = ready_seconds
                else:
                    following = next_job()
            key = job["work"], job["variant"]
            if "error" in result and time.monotonic() >= deadline + _OVERTIME_SECONDS:
                left.append(f"{': '.join(key)} (took longer than was left)")
                break
            sample = _sample(job, result, machine)
            add_sample(file, machine, sample)
            seconds[key] = max(seconds.get(key, 0.0), sample.get("wall_seconds", 0.0))
            if "error" in sample:
                failed.add(key)
            say(f"{': '.join(key)}: {_in_words(sample)}")
            job = following
    finally:
        if ahead is not None:
            ahead.close(at_once=True)
    return left


def profile(work: Work, variant: str, machine: dict[str, Any], threads: int) -> dict[str, Any]:
    """Where a step of one variant goes (`profiling.profile`)."""
    job = {"do": "profile", "work": work.name, "variant": variant, "device": machine["type"], "threads": threads}
    with _child(job) as child:
        found = child.wait("ready", _READY_SECONDS)
        if "error" not in found:
            child.go()
            found = child.wait("result", _JOB_SECONDS)
    if "error" in found:
        raise CheaptrainError(f"bench --profile {work.name}:{variant}: {found['error']}")
    return found


def _in_order(
    chosen: Sequence[tuple[Work, Sequence[str]]],
    held: Sequence[dict[str, Any]],
    machine: dict[str, Any],
    rounds: int,
) -> list[tuple[str, str, int]]:
    """(work, variant, round) of everything there is to do; of each round what training does not do yet comes last."""
    have = Counter(
        (s["work"], s["variant"]) for s in held if same_code(s, machine) and "error" not in s
    )  # what failed is tried again
    order: list[tuple[int, bool, int, float, tuple[str, str, int]]] = []
    for worth, (work, variants) in enumerate(chosen):
        for variant in variants:
            first = have[work.name, variant]
            for number in range(first, first + rounds):
                job = work.name, variant, number + 1
                order.append((number, variant in EXPERIMENTS, worth, random.random(), job))
    return [job for *_, job in sorted(order)]


def _sample(job: dict[str, Any], result: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    about = {name: machine[name] for name in ("code", "versions", "commit")}
    what = {name: value for name, value in result.items() if name != "kind"}
    if "error" in what:
        what = {name: what[name] for name in ("error", "wall_seconds") if name in what}
    when = datetime.now(UTC).replace(microsecond=0).isoformat()
    return {"work": job["work"], "variant": job["variant"], **what, "date": when, **about}


def _in_words(sample: dict[str, Any]) -> str:
    if "error" in sample:
        return sample["error"]  # type: ignore[no-any-return]
    if "tokens_per_second" not in sample:
        return f"loss {sample['losses'][0]:.4f} → {sample['losses'][-1]:.4f}"
    return f"{sample['tokens_per_second']:,.0f} tokens/s, {sample['wall_seconds']:.0f} s"


@contextmanager
def _child(job: dict[str, Any]) -> Iterator[Child]:
    with _closing(Child(job)) as child:
        yield child


@contextmanager
def _closing(child: Child) -> Iterator[Child]:
    """A process that is gone afterwards: by itself after its result, at once when this one is interrupted."""
    try:
        yield child
    except BaseException:
        child.close(at_once=True)
        raise
    child.close()
