"""Whether processes of this machine reach each other, how fast, and what to set when they do not.

The processes are started as a launcher would: the same variables, the same way to join. A short time-out stands in for
the half hour that training would wait.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed import TCPStore

from cheaptrain.doctor.children import Ended, run_children
from cheaptrain.doctor.collectives import Clocks, Timing
from cheaptrain.doctor.findings import Finding, doubt, fail, note, ok
from cheaptrain.doctor.probe import COMMAND, JOINING, SECONDS
from cheaptrain.doctor.remedies import Settings, as_shell, as_toml, candidates, interfaces_up, try_in_order
from cheaptrain.units import size

START_SECONDS = 120.0  # to import torch, from a slow disk, in all processes at once
SEARCH_SECONDS = 300.0
_SKEW_SECONDS = 1.0
_PRINTED_LINES = 4
_NOT_THE_NETWORK = ("out of memory", "invalid device ordinal", "No CUDA GPUs", "no kernel image")


@dataclass(frozen=True)
class Trial:
    """How a try went. `trouble`: empty when it worked; `began`: all processes got as far as joining, so that settings
    can be what is wrong; `joining`: no further. `printed`: lines of theirs that may say why."""

    trouble: str
    began: bool
    joining: bool
    timings: tuple[Timing, ...]
    clocks: Clocks | None
    printed: tuple[str, ...] = ()


def try_processes(
    count: int,
    environment: Mapping[str, str],
    *,
    command: Sequence[str] = COMMAND,
    start_seconds: float = START_SECONDS,
    seconds: float = SECONDS,
) -> Trial:
    """Start `count` processes on this machine and let them talk, `start_seconds` + `seconds` at most."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "NCCL_DEBUG": "WARN",  # so that the reason stands in what they print
        "OMP_NUM_THREADS": "1",
        **{name: value for name, value in environment.items() if name not in ("CHEAPTRAIN_PROCESSES", "GROUP_RANK")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, as under a launcher: no port can be taken twice
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ended = run_children(
        [[*command, "--seconds", str(seconds)]] * count,
        [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)],
        start_seconds=start_seconds,
        seconds=seconds,
    )
    return _trial(ended, seconds)


def _trial(ended: Sequence[Ended], seconds: float) -> Trial:
    timings = tuple(Timing(**report["timing"]) for report in ended[0].reports if "timing" in report)
    clocks = next((report["clocks"] for report in ended[0].reports if "clocks" in report), None)
    wrong = [f"{timing.operation} of {size(timing.bytes)}" for timing in timings if not timing.right]
    trouble = _trouble(ended, seconds) or (f"wrong numbers came out of {', '.join(wrong)}" if wrong else "")
    return Trial(
        trouble,
        began=all(one.started for one in ended),
        joining=any(_phase(one) == JOINING for one in ended),
        timings=timings,
        clocks=Clocks(tuple(clocks["hosts"]), tuple(clocks["ahead"]), clocks["within"]) if clocks else None,
        printed=_printed(ended),
    )


def _trouble(ended: Sequence[Ended], seconds: float) -> str:
    """What went wrong, with the processes it went wrong in; empty when all ended well."""
    parts: dict[str, list[int]] = {}
    for rank, one in enumerate(ended):
        if one.code == 0:
            continue
        how = f"killed by signal {-one.code}" if one.code is not None and one.code < 0 else f"exit code {one.code}"
        if not one.started:
            what = "no sign of life" if one.code is None else f"{how} before anything was tried"
        elif (error := _error(one)) is not None:
            what = f"{error.splitlines()[0]} (in {_phase(one)!r})"
        elif one.code is None:
            what = f"stuck in {_phase(one)!r}, no end within {seconds:g} s"
        else:
            what = f"{how} in {_phase(one)!r}"
        parts.setdefault(what, []).append(rank)
    return "; ".join(f"{_ranks(ranks)}: {what}" for what, ranks in parts.items())


def _error(one: Ended) -> str | None:
    """The error it reported itself."""
    return next((str(report["error"]) for report in one.reports if "error" in report), None)


def _printed(ended: Sequence[Ended]) -> tuple[str, ...]:
    """What NCCL warned of, else the last lines of the first that failed without reporting an error."""
    bad = [one for one in ended if one.code != 0]
    warned = [line.strip() for one in bad for line in one.output.splitlines() if "NCCL WARN" in line]
    silent = sorted((one for one in bad if _error(one) is None), key=lambda one: one.code is None)
    if warned or not silent:
        return tuple(dict.fromkeys(warned))[:_PRINTED_LINES]
    return silent[0].last_lines(_PRINTED_LINES)


def _phase(one: Ended) -> str:
    return next((report["phase"] for report in reversed(one.reports) if "phase" in report), "starting")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"processes {ranks[0]} to {ranks[-1]}"
    return f"processes {', '.join(map(str, ranks))}"


def communication_findings(
    count: int,
    environment: Settings,
    *,
    on_gpu: bool,
    command: Sequence[str] = COMMAND,
    start_seconds: float = START_SECONDS,
    seconds: float = SECONDS,
    search_seconds: float = SEARCH_SECONDS,
) -> Iterator[Finding]:
    """Try `count` processes in this environment; when they fail, look for settings that help."""

    def attempt(settings: Settings) -> Trial:
        return try_processes(
            count, {**environment, **settings}, command=command, start_seconds=start_seconds, seconds=seconds
        )

    first = attempt({})
    if not first.trouble:
        yield from trial_findings(first, count, on_gpu)
        return
    if not first.began or any(words in first.trouble for words in _NOT_THE_NETWORK):
        yield fail("processes", first.trouble, "mend that first: no setting of the network would help", first.printed)
        return
    yield note("processes", f"{first.trouble}. Trying settings, each in fresh processes:", first.printed)
    settings = list(candidates(on_gpu=on_gpu, interfaces=interfaces_up(), present=environment, joining=first.joining))
    tried = 0
    for tries, trial in try_in_order(attempt, settings, search_seconds):
        tried += 1
        yield note("tried", f"{as_shell(tries)}: {trial.trouble or 'works'}")
        if not trial.trouble:
            yield fail(
                "processes",
                f"{count} cannot talk to each other as things are, and with {as_shell(tries)} they can",
                f"put into the recipe (into its [env], if it has one):\n{as_toml(tries)}{_one_machine_only(tries)}",
            )
            yield from trial_findings(trial, count, on_gpu)
            return
    left = f", and for {len(settings) - tried} more there was no time" if tried < len(settings) else ""
    yield fail(
        "processes",
        f"{count} cannot talk to each other; none of {tried} settings helped{left}",
        "run again with NCCL_DEBUG=INFO set and look at what is printed last; see whether a firewall, an unusual "
        "interface, or a broken GPU (nvidia-smi -q, dmesg) is in the way",
    )


def trial_findings(trial: Trial, count: int, on_gpu: bool) -> Iterator[Finding]:
    """What a try that worked has shown."""
    if count == 1:
        yield ok("processes", "one, its process group can be made; --processes 2 would try out how two talk")
    else:
        yield from timing_findings(trial.timings, count, "cuda" if on_gpu else "cpu")
    if trial.clocks is not None and len(set(trial.clocks.hosts)) > 1:
        yield clock_finding(trial.clocks)


def timing_findings(timings: Sequence[Timing], count: int, device: str) -> Iterator[Finding]:
    """A table of what was measured, and whether the numbers were right."""
    backend = "NCCL" if device == "cuda" else "gloo"
    wrong = [f"{timing.operation} of {size(timing.bytes)}" for timing in timings if not timing.right]
    if wrong:
        yield fail("numbers", f"wrong after {', '.join(wrong)}", "NCCL_P2P_DISABLE=1 is the first thing to try")
    table = [f"{'':<15} {'size':>8} {'time':>10} {'bandwidth':>13} {'on the bus':>13}"]
    for timing in sorted(timings, key=lambda timing: timing.operation):
        table.append(
            f"{timing.operation:<15} {size(timing.bytes):>8} {timing.seconds * 1e3:>7.2f} ms "
            f"{timing.algorithm / 1e9:>8.2f} GB/s {timing.bus(count) / 1e9:>8.2f} GB/s"
        )
    latency = f", latency {min(timing.seconds for timing in timings) * 1e3:.2f} ms" if timings else ""
    sums = "" if wrong else ", all numbers right"
    yield ok("processes", f"{count} over {backend}{latency}{sums}", tuple(table))


def clock_finding(clocks: Clocks) -> Finding:
    """Whether all machines have the same time."""
    low, high = min(clocks.ahead), max(clocks.ahead)
    skew, hosts = high - low, len(set(clocks.hosts))
    if skew - clocks.within > _SKEW_SECONDS:
        early, late = (clocks.hosts[clocks.ahead.index(ahead)] for ahead in (high, low))
        return doubt(
            "clocks",
            f"{early} is {skew:.1f} s ahead of {late}",
            "set all machines by NTP (timedatectl set-ntp true): logs and the age of files are otherwise told wrongly",
        )
    machines = "one machine" if hosts == 1 else f"{hosts} machines"
    return ok("clocks", f"within {max(skew, clocks.within) * 1e3:.1f} ms on {machines}")


def _one_machine_only(settings: Settings) -> str:
    loopback = {interface.name for interface in interfaces_up() if interface.loopback}
    if loopback.isdisjoint(settings.values()):
        return ""
    return "\nThis is for one machine only: several do not reach each other that way."
