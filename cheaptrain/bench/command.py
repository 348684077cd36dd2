"""`cheaptrain bench`: measure, keep, show.

cheaptrain bench                              everything, until the minutes are over
cheaptrain bench --list                       what there is
cheaptrain bench --works 950m,140m --variants "cheaptrain;floor"
cheaptrain bench --profile 950m:cheaptrain    where a step goes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cheaptrain.bench import runner
from cheaptrain.bench.samples import read_samples, results_file
from cheaptrain.bench.table import HEADER, table_rows
from cheaptrain.bench.works import CHEAPTRAIN, FLOOR, chosen_works, find_work, has_floor, works_of
from cheaptrain.errors import RecipeError
from cheaptrain.say import say

SHOWN_KERNEL = 90  # characters of a kernel's name


@dataclass(frozen=True)
class Options:
    """What the command line says; see `cheaptrain bench --help`."""

    works: str | None = None
    variants: str | None = None
    minutes: float = 8.5
    rounds: int = 3
    threads: int = 0
    output: Path | None = None
    show_list: bool = False
    profile: str | None = None


def bench(options: Options, console: Console) -> None:
    """Do what `options` ask for. Raises RecipeError for names that do not exist."""
    machine = runner.machine_here()
    chosen = chosen_works(options.works, options.variants, machine["type"])
    if options.show_list:
        _list(machine["type"], console)
        return
    if options.profile is not None:
        _profile(options.profile, machine, options.threads, console)
        return
    file = results_file(machine, options.output)
    say(console, f"{machine['device']}, {machine['cores']} cores, {_versions(machine)}, code {machine['code']}")
    say(console, f"at most {options.minutes:g} minutes, {options.rounds} rounds; samples go to {file}")
    left = runner.run(
        chosen,
        machine,
        file,
        runner.Limits(options.minutes, options.rounds, options.threads),
        lambda text: say(console, text),
    )
    show(read_samples(file), console, [work.name for work, _ in chosen])
    if left:
        say(console, f"left for want of time, the same command goes on with it: {'; '.join(left)}", "yellow")


def show(held: dict[str, Any], console: Console, works: Sequence[str] | None = None) -> None:
    """Print the table of what was measured, of these works only if they are named."""
    if works is not None:
        held = held | {"samples": [sample for sample in held["samples"] if sample["work"] in works]}
    lines = [list(HEADER), *table_rows(held)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        cells += [text.rjust(width) for text, width in zip(line[2:-1], widths[2:-1], strict=True)]
        say(console, "  ".join([*cells, line[-1]]))


def _list(device: str, console: Console) -> None:
    for work in works_of(device):
        asked = " (only when it is named)" if work.opt_in else ""
        beside = f"; beside {work.beside}" if work.beside else ""
        variants = [*work.variants, *([FLOOR] if has_floor(work) else [])]
        rows = f"{work.rows} rows of {work.seq_len:,}, {work.micro_rows} at once"
        say(console, f"{work.name}: {work.title}; {rows}; {'; '.join(variants)}{beside}{asked}")


def _profile(what: str, machine: dict[str, Any], threads: int, console: Console) -> None:
    name, _, variant = what.partition(":")
    work, variant = find_work(name, machine["type"]), variant or CHEAPTRAIN
    if variant not in work.variants:
        raise RecipeError(f"bench --profile {what}: {work.name} is measured with {', '.join(work.variants)}")
    found = runner.profile(work, variant, machine, threads)
    step = found["step_ms"]
    say(console, f"{work.title}, {variant}: {step:.1f} ms a step")
    for category, milliseconds in found["categories_ms"].items():
        say(console, f"  {milliseconds:9.2f} ms  {milliseconds / step:6.1%}  {category}")
    say(console, "longest:")
    for kernel in found["kernels"]:
        shown = kernel["name"][:SHOWN_KERNEL]
        say(console, f"  {kernel['ms']:9.2f} ms  {kernel['calls']:5d} calls  {kernel['category']}: {shown}")


def _versions(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
