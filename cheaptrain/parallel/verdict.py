"""Which process holds up the others, told from what each says of itself.

Every process sends a `Pulse` about once a second, also while its training thread hangs. The trap: when one process
hangs, all of them stop within milliseconds of each other, the innocent ones inside a collective, waiting for it. So
the one named is not the one that stopped first by the clock: it is one that is no longer heard of, or one that stopped
outside a collective, or one that is behind. And a process that waits for another one which is at work (rank 0 writing
a checkpoint) is not at fault, however long it waits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Fault:
    """Who is at fault, with a line for each; `ranks` is empty when it cannot be one of them alone. `silent`: they say
    nothing any more, so neither will they end by themselves."""

    ranks: tuple[int, ...]
    words: tuple[str, ...]
    silent: bool = False


@dataclass(frozen=True)
class Pulse:
    """One process's word on itself. `step`, `phase` and `beats` (since the step began) say how far it is."""

    rank: int
    host: str
    pid: int
    born: float  # when the process started: tells it from a later one with its pid
    count: int  # of this message
    step: int
    phase: str
    beats: int
    age_seconds: float  # since its last beat
    limit_seconds: float  # how long it may go without one
    waiting: bool  # inside a collective
    left: str | None = None  # ended its part: "" in order, otherwise its error
    fault: Fault | None = None  # what ends the job, once it knows
    stacks: str = ""  # of its threads, once it knows that

    def to_json(self) -> str:
        """As text, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """From what `to_json` made."""
        values: dict[str, Any] = json.loads(text)
        if values["fault"] is not None:
            fault = values["fault"]
            values["fault"] = Fault(tuple(fault["ranks"]), tuple(fault["words"]), fault["silent"])
        return cls(**values)

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"phase {self.phase!r}, step {self.step:,}"


@dataclass(frozen=True)
class Heard:
    """The last pulse of a process, None before its first, and how long ago it came."""

    pulse: Pulse | None
    seconds_ago: float

    @property
    def is_overdue(self) -> bool:
        """Whether its last beat that we can know of is longer ago than it may be."""
        return self.pulse is not None and self.pulse.age_seconds + self.seconds_ago > self.pulse.limit_seconds

    def is_silent(self, limit_seconds: float) -> bool:
        """Whether that is so because nothing comes from it any more. `limit_seconds` holds before a first pulse."""
        if self.pulse is None:
            return self.seconds_ago > limit_seconds
        return self.is_overdue and self.seconds_ago > self.pulse.limit_seconds / 2


def find_fault(heard: Mapping[int, Heard], limit_seconds: float) -> Fault | None:
    """What is wrong with the processes, by rank; None while nothing is. `limit_seconds` holds before a first pulse."""
    told = [one.pulse.fault for one in heard.values() if one.pulse and one.pulse.fault]
    if told:
        return told[0]
    here = {rank: one for rank, one in heard.items() if one.pulse is None or one.pulse.left is None}
    silent = {rank: one for rank, one in here.items() if one.is_silent(limit_seconds)}
    if silent:
        return Fault(tuple(silent), tuple(_silence(rank, one) for rank, one in silent.items()), True)
    stuck = [one.pulse for one in here.values() if one.pulse and one.is_overdue]
    at_work = len(stuck) < len(here)
    if not stuck or (at_work and all(pulse.waiting for pulse in stuck)):
        return None
    failed = [one.pulse for one in heard.values() if one.pulse and one.pulse.left]
    if failed:
        return Fault(tuple(pulse.rank for pulse in failed), tuple(_failure(pulse) for pulse in failed))
    return _stuck(stuck)


def others(heard: Mapping[int, Heard], fault: Fault) -> list[str]:
    """A line for each process that is not at fault: where it is."""
    lines = []
    for rank, one in heard.items():
        pulse = one.pulse
        if rank in fault.ranks or pulse is None:
            continue
        if pulse.left is not None:
            how = "has left"
        elif pulse.waiting:
            how = f"has waited in a collective for {pulse.age_seconds:.0f} s"
        else:
            how = f"made progress {pulse.age_seconds:.0f} s ago"
        lines.append(f"rank {rank}: {pulse.place}, {how}")
    return lines


def _stuck(stuck: Sequence[Pulse]) -> Fault:
    """Of those that stand still: the ones outside a collective that are furthest behind."""
    free = [pulse for pulse in stuck if not pulse.waiting]
    suspects = free or stuck
    least = min((pulse.step, pulse.beats) for pulse in suspects)
    behind = [pulse for pulse in suspects if (pulse.step, pulse.beats) == least]
    if not free and len(behind) == len(stuck) and len(stuck) > 1:
        first = behind[0]
        return Fault(
            (),
            (
                f"all processes wait in a collective, for {first.age_seconds:.0f} s now, in {first.place}: the network "
                "between them, or a collective that not all of them take part in",
            ),
        )
    return Fault(
        tuple(pulse.rank for pulse in behind),
        tuple(
            f"rank {pulse.rank} has made no progress for {pulse.age_seconds:.0f} s (limit {pulse.limit_seconds:g} s): "
            f"{pulse.place}{', inside a collective' if pulse.waiting else ''} (pid {pulse.pid} on {pulse.host})"
            for pulse in behind
        ),
    )


def _silence(rank: int, one: Heard) -> str:
    if one.pulse is None:
        return f"rank {rank} has not been heard of in {one.seconds_ago:.0f} s, not once"
    pulse = one.pulse
    return (
        f"rank {rank} has not been heard of for {one.seconds_ago:.0f} s; last seen in {pulse.place} "
        f"(pid {pulse.pid} on {pulse.host}): it died, was stopped, or hangs in code that lets no thread run"
    )


def _failure(pulse: Pulse) -> str:
    return f"rank {pulse.rank} ended its part with {pulse.left} in {pulse.place} (pid {pulse.pid} on {pulse.host})"
