"""A verdict for each task: better, worse, or no difference shown, with what a difference would have had to be.

"No difference shown" is not "no difference": at n questions a small one stays unseen, so the verdict says how wide the
interval is. And whoever looks at twenty tasks finds one that differs by chance: the p-values of all tasks are corrected
for having been asked together (Holm), and a verdict that does not outlast it says so.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from cheaptrain.compare.matching import Entry, Matched, comparable, entries_of, matched, matched_group
from cheaptrain.compare.sides import Member, Side
from cheaptrain.compare.statistics import (
    LEVEL,
    Block,
    Estimate,
    between_paired_seeds,
    between_questions,
    between_seeds,
    holm,
)

BETTER, WORSE, NOT_SHOWN, SAME, NO_ERROR, NOT_COMPARED, ONE_SIDE = (
    "better", "worse", "no difference shown", "the same", "no interval", "not compared", "one side alone",
)  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Comparison:
    """One task (or one loss), the second side against the first.

    `first`, `second`: means of the runs' scores, over all their questions. `scale`, `unit`: a difference is shown times
    `scale`, as so many `unit`. `n`: questions that were compared, 0 without. `seeds`: those that were paired.
    `p_corrected`: `estimate.p` as it counts beside the other tasks. `within`: the group of tasks that it is part of.
    """

    task: str
    metric: str
    outcome: str
    verdict: str = ""
    first: float | None = None
    second: float | None = None
    scale: float = 1.0
    unit: str = ""
    higher_is_better: bool = True
    n: int = 0
    runs: tuple[int, int] = (0, 0)
    estimate: Estimate | None = None
    p_corrected: float | None = None
    within: str | None = None
    version: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For machines. The difference is second minus first, in the unit of the score."""
        return asdict(self) | {"estimate": asdict(self.estimate) if self.estimate else None}


def compare_tasks(first: Side, second: Side) -> list[Comparison]:
    """Every task that one of the two was scored on, in the order of the first side's results."""
    results = [r for m in (*first.members, *second.members) if m.evaluation for r in m.evaluation.results]
    tasks = list(dict.fromkeys(result.task for result in results))
    used = {task: _used(first, second, task) for task in tasks}
    chosen = {task: entries for task in tasks if isinstance(entries := used[task][0], list)}
    groups = {member: result.task for result in results for member in result.members}
    found = []
    for task in tasks:
        entries, counts, notes = used[task]
        comparison = Comparison(task, "", NOT_COMPARED, within=groups.get(task), notes=notes)
        if isinstance(entries, str):
            outcome = NOT_COMPARED if all(counts) else ONE_SIDE
            found.append(replace(comparison, outcome=outcome, verdict=f"not compared: {entries}"))
        elif any(entry.result.shown for entry in entries):
            found.append(replace(comparison, verdict="there to be read, not scored: see the results themselves"))
        else:
            found.append(_compared(comparison, first, second, entries, counts, chosen))
    return _corrected(found, second.name)


def by_runs(
    comparison: Comparison, first: Sequence[tuple[Member, float]], second: Sequence[tuple[Member, float]], name: str
) -> Comparison:
    """Of a number that each run has one of, such as a loss. `name`: of the second side."""
    block = Block(np.array([[value] for _, value in first]), np.array([[value] for _, value in second]))
    estimate, notes = _estimate([member for member, _ in first], [member for member, _ in second], (block,), 0)
    comparison = replace(
        comparison,
        first=float(block.first.mean()),
        second=float(block.second.mean()),
        runs=(len(first), len(second)),
        estimate=estimate,
        notes=(*comparison.notes, *notes),
    )
    return _judged(comparison, name)


def as_far_as_the_others(
    side: Side, of_side: Sequence[tuple[Member, _T]], steps: Sequence[float | None]
) -> tuple[list[tuple[Member, _T]], list[str]]:
    """The runs of one side that are as far as the farthest of them, and a note of the others: seeds of one recipe are
    only alike at the same step."""
    farthest = max((step for step in steps if step is not None), default=None)
    level = [step is None or step == farthest for step in steps]
    behind = [member.name for (member, _), is_level in zip(of_side, level, strict=True) if not is_level]
    note = [f"{side.name}: not as far as the other seeds, and left out: {', '.join(behind)}"] if behind else []
    return [entry for entry, is_level in zip(of_side, level, strict=True) if is_level], note


def _step(member: Member) -> int | None:
    """Of the checkpoint that was scored."""
    return member.evaluation.checkpoint.step if member.evaluation else None


def _used(first: Side, second: Side, task: str) -> tuple[list[Entry] | str, tuple[int, int], tuple[str, ...]]:
    """The results to compare, those of the first side before those of the second, or why not; and how many of each."""
    found, notes, counts = list[list[Entry]](), list[str](), list[int]()
    for side in (first, second):
        entries = entries_of(side.members, task)
        missing = [member.name for member, of_member in zip(side.members, entries, strict=True) if not of_member]
        if len(missing) == len(side.members):
            return f"{side.name} was not scored on it", (0, 0), ()
        if missing:
            notes.append(f"{side.name}: not scored on it, and left out: {', '.join(missing)}")
        scored = [(of_member[0].member, of_member) for of_member in entries if of_member]
        abreast, behind = as_far_as_the_others(side, scored, [_step(member) for member, _ in scored])
        notes += behind
        found += [of_member for _, of_member in abreast]
        counts.append(len(abreast))
    chosen = comparable(found)
    if isinstance(chosen, list):
        kinds = {str(entry.result.settings.get("dtype")) for entry in chosen}
        if len(kinds) > 1:
            notes.append(f"scored in different precision: {', '.join(sorted(kinds))}")
        for text, those in _told(chosen).items():
            notes.append(f"{', '.join(those)}: {text}")
    return chosen, (counts[0], counts[1]), tuple(notes)


def _told(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """What the evaluation noted → whose."""
    told: dict[str, list[str]] = {}
    for entry in entries:
        for note in entry.result.notes:
            told.setdefault(note, []).append(entry.member.name)
    return told


def _compared(
    comparison: Comparison,
    first: Side,
    second: Side,
    entries: list[Entry],
    counts: tuple[int, int],
    chosen: dict[str, list[Entry]],
) -> Comparison:
    before, after = entries[: counts[0]], entries[counts[0] :]
    names, metric, notes = (first.name, second.name), entries[0].metric, list(comparison.notes)
    is_group = bool(entries[0].result.members)
    found = matched_group(before, after, names, chosen) if is_group else matched(before, after, names)
    if isinstance(found, str):
        notes.append(f"not compared by questions: {found}")
        values = [np.array([[entry.metric.value] for entry in side]) for side in (before, after)]
        found, questions = Matched((Block(values[0], values[1]),)), 0
    else:
        notes += found.notes
        questions = found.questions
    runs = [entry.member for entry in before], [entry.member for entry in after]
    estimate, more = _estimate(*runs, found.blocks, questions)
    if len(before) == len(after) == 1 and max(len(first.members), len(second.members)) > 1:
        notes.append("one run each is left, so this is about two checkpoints and not about the recipes")
    in_points = metric.higher_is_better and all(abs(entry.metric.value) <= 1 for entry in entries)
    comparison = replace(
        comparison,
        metric=metric.name,
        first=float(np.mean([entry.metric.value for entry in before])),
        second=float(np.mean([entry.metric.value for entry in after])),
        scale=100.0 if in_points else 1.0,
        unit="points" if in_points else metric.name.replace("_", " "),
        higher_is_better=metric.higher_is_better,
        n=questions,
        runs=counts,
        estimate=estimate,
        version=entries[0].result.version,
        settings=entries[0].result.settings,
        notes=(*notes, *more),
    )
    hashes = [_hashes(side) for side in (before, after)]
    if hashes[0] == hashes[1] and comparison.first == comparison.second:
        verdict = "the same: both sides are the same checkpoint, by its hash"
        return replace(comparison, outcome=SAME, verdict=verdict)
    return _judged(comparison, second.name)


def _hashes(entries: Sequence[Entry]) -> list[str]:
    """Of the checkpoints, in order."""
    return sorted(entry.member.evaluation.checkpoint.hash for entry in entries if entry.member.evaluation)


def _estimate(
    first: Sequence[Member], second: Sequence[Member], blocks: Sequence[Block], questions: int
) -> tuple[Estimate | None, tuple[str, ...]]:
    """The interval that the runs allow, and what one should know of it. With seeds on both sides those that both have
    are paired."""
    seeds = [[member.seed for member in side] for side in (first, second)]
    clear = all(None not in of_side and len(set(of_side)) == len(of_side) for of_side in seeds)
    common = [seed for seed in seeds[0] if seed in seeds[1]] if clear else []
    if len(first) == len(second) == 1:
        return between_questions(blocks) if questions else None, ()
    if len(common) > 1:
        rows = [[of_side.index(seed) for seed in common] for of_side in seeds]
        kept = [Block(block.first[rows[0]], block.second[rows[1]], block.weight) for block in blocks]
        alone = [str(seed) for of_side in seeds for seed in of_side if seed not in common]
        note = (f"seeds of one side alone, not in the interval: {', '.join(alone)}",) if alone else ()
        return between_paired_seeds(kept), note
    notes = ["the seeds of the two sides are not the same, so they are not paired"] if clear else []
    if min(len(first), len(second)) == 1:
        notes.append("one run on one side: its spread is taken to be that of the other")
    return between_seeds(blocks), tuple(notes)


def _judged(comparison: Comparison, name: str) -> Comparison:
    """With outcome and verdict. `name`: of the second side."""
    estimate, scale, unit = comparison.estimate, comparison.scale, comparison.unit
    if estimate is None:
        assert comparison.first is not None and comparison.second is not None
        difference = (comparison.second - comparison.first) * scale
        told = _signed(difference, digits_for(difference / 10))
        return replace(comparison, outcome=NO_ERROR, verdict=f"{told} {unit}; one run each: no interval")
    basis = _basis(comparison, estimate)
    low, high, difference = (value * scale for value in (estimate.low, estimate.high, estimate.difference))
    half = estimate.half_width * scale
    digits, level = digits_for(half or difference), f"{LEVEL:.0%}".replace("%", " %")
    if not estimate.shown:
        ends = f"{_signed(low, digits)} … {_signed(high, digits)}"
        found = f"{_signed(difference, digits)} {unit} ({level} {ends}, p {shown_p(estimate.p)})"
        unseen = f"less than about ±{half:.{digits}f} does not show"
        verdict = f"no difference shown{f' at {basis}' if basis else ''}: {found}; {unseen}"
        return replace(comparison, outcome=NOT_SHOWN, verdict=verdict)
    won = (difference > 0) == comparison.higher_is_better
    near, far = (low, high) if difference > 0 else (-high, -low)
    verdict = (
        f"{name} is {'better' if won else 'worse'} by {abs(difference):.{digits}f} {unit} ({level} {near:.{digits}f} … "
        f"{far:.{digits}f}, p {shown_p(estimate.p)}{f', {basis}' if basis else ''})"
    )
    return replace(comparison, outcome=BETTER if won else WORSE, verdict=verdict)


def _basis(comparison: Comparison, estimate: Estimate) -> str:
    parts = [f"n = {comparison.n:,}"] if comparison.n else []
    if estimate.method == "paired seeds":
        parts.append(f"{round(estimate.df or 0) + 1} paired seeds")
    elif estimate.method == "seeds":
        parts.append(f"{comparison.runs[0]} and {comparison.runs[1]} runs")
    return ", ".join(parts)


def _corrected(comparisons: list[Comparison], name: str) -> list[Comparison]:
    """Tasks that stand side by side are corrected for each other: those at the top, and those within each group."""
    found = list(comparisons)
    for within in {comparison.within for comparison in comparisons}:
        asked = [i for i, c in enumerate(found) if c.within == within and c.estimate and c.outcome != SAME]
        corrected = holm([estimate.p for i in asked if (estimate := found[i].estimate)])
        for i, p in zip(asked, corrected, strict=True):
            verdict = found[i].verdict
            if found[i].outcome in (BETTER, WORSE) and p >= 1 - LEVEL:
                verdict += f"; not when corrected for the {len(asked)} tasks compared (p {shown_p(p)})"
            found[i] = replace(found[i], p_corrected=p, verdict=verdict)
    return found


def shown_p(p: float) -> str:
    """`= 0.0042`, or `< 0.0001`."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def digits_for(uncertain: float) -> int:
    """Digits behind the point of a number that is known as well as that: two of the uncertainty, one at least."""
    return 1 if uncertain == 0 else min(6, max(1, 1 - math.floor(math.log10(abs(uncertain)))))


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−") if value else "0"
