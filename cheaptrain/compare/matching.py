"""Which results may be held against each other, and the same questions of both in the same order.

Two scores of one name are only comparable when the task is of one version, asked with the same examples and limit, and
scored by the same harness; what differs is said instead of a difference. Of those that are comparable the questions are
matched by the hash of their content, never by their number: a list that was sorted otherwise would compare one question
with another. What only one side has is left out and counted. The other trap is a score that is no mean of its
questions (a perplexity, a weighted group): its questions would give another difference than the scores do, so the mean
of what is matched is checked against the score that was written down.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cheaptrain.compare.sides import Member
from cheaptrain.compare.statistics import Array, Block
from cheaptrain.evaluate.results import Item, Metric, TaskResult, read_items

_NO_MATTER = ("batch_size", "device", "dtype")  # the last is told beside the difference
_BITS_PER_BYTE = "bits_per_byte"
_NAMED = 3  # questions that are named of those that only one side has
_Scores = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Entry:
    """A result and the run it is of; of its metrics the one called `name`, else the first."""

    member: Member
    result: TaskResult
    name: str | None = None

    @property
    def metric(self) -> Metric:
        return next((metric for metric in self.result.metrics if metric.name == self.name), self.result.metrics[0])


@dataclass(frozen=True)
class Matched:
    """The questions that all have, `blocks` with the runs of the first side and of the second, and what is odd."""

    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = ()

    @property
    def questions(self) -> int:
        return sum(block.questions for block in self.blocks)


def entries_of(members: Sequence[Member], task: str) -> list[list[Entry]]:
    """Of each member its results of `task`, newest first; of one without any an empty list."""
    found = []
    for member in members:
        results = member.evaluation.results if member.evaluation else ()
        named = [result for result in results if result.task == task and result.metrics]
        found.append([Entry(member, result) for result in sorted(named, key=lambda r: r.when, reverse=True)])
    return found


def comparable(entries: Sequence[Sequence[Entry]]) -> list[Entry] | str:
    """One result of each member, all asked in the same way, the newest that are; or why there are none."""
    for candidate in entries[0]:
        asked = _asked(candidate)
        alike = [next((entry for entry in others if _asked(entry) == asked), None) for others in entries]
        found = [entry for entry in alike if entry is not None]
        if len(found) == len(entries):
            return found
    newest = [others[0] for others in entries]
    other = next(entry for entry in newest if _asked(entry) != _asked(newest[0]))
    before, after = _asked(newest[0]), _asked(other)
    differing = [name for name in before | after if before.get(name) != after.get(name)]
    told = (f"{name} {_shown(before.get(name))} against {_shown(after.get(name))}" for name in differing)
    return f"{newest[0].member.name} and {other.member.name} were asked differently: {', '.join(told)}"


def matched(first: Sequence[Entry], second: Sequence[Entry], names: tuple[str, str]) -> Matched | str:
    """The questions of one task that all of them answered; or why they cannot be compared by questions. `names`: of the
    two sides, for the notes."""
    scores = [_scores(entry) for entry in (*first, *second)]
    for entry, of_entry in zip((*first, *second), scores, strict=True):
        if isinstance(of_entry, str):
            return f"{entry.member.name}: {of_entry}"
    known = [of_entry for of_entry in scores if not isinstance(of_entry, str)]
    common = [key for key in known[0] if all(key in of_entry for of_entry in known)]
    if not common:
        return "no question is the same on both sides"
    table = np.array([[of_entry[key] for key in common] for of_entry in known])
    notes = []
    for name, side in ((names[0], known[: len(first)]), (names[1], known[len(first) :])):
        if extra := sorted({key for of_entry in side for key in of_entry} - set(common)):
            shown = ", ".join(doc[:8] for doc, _ in extra[:_NAMED]) + (" …" if len(extra) > _NAMED else "")
            notes.append(
                f"{len(extra)} question{'s' * (len(extra) > 1)} of {name} left out, not on both sides: {shown}"
            )
    return Matched((Block(table[: len(first)], table[len(first) :]),), tuple(notes))


def matched_group(
    first: Sequence[Entry], second: Sequence[Entry], names: tuple[str, str], chosen: Mapping[str, list[Entry]]
) -> Matched | str:
    """The questions of the tasks that a group is made of, each task weighted as it counts in the group's score.

    `chosen`: for each task the results that are compared, those of the first side before those of the second.
    """
    group = first[0]
    missing = [task for task in group.result.members if len(chosen.get(task, ())) != len(first) + len(second)]
    if missing or not group.result.members:
        return f"its task {missing[0]} is not comparable on both sides" if missing else "it is a group without tasks"
    scores = np.array([entry.metric.value for entry in (*first, *second)])
    for name in (None, group.metric.name):  # of each task its first metric, or the one that the group is called by
        tasks = [[replace(entry, name=name) for entry in chosen[task]] for task in group.result.members]
        means = np.array([[entry.metric.value for entry in entries] for entries in tasks])
        weights = _weights(scores, means, [entries[0].result for entries in tasks])
        if weights is not None:
            return _together(tasks, weights, len(first), names)
    return "its score is neither a mean of its tasks nor one of their questions"


def _together(
    tasks: Sequence[Sequence[Entry]], weights: Sequence[float], runs: int, names: tuple[str, str]
) -> Matched | str:
    """The questions of several tasks; `runs`: how many of each task's results are of the first side."""
    blocks, notes = list[Block](), list[str]()
    for entries, weight in zip(tasks, weights, strict=True):
        task = entries[0].result.task
        found = matched(entries[:runs], entries[runs:], names)
        if isinstance(found, str):
            return f"its task {task}: {found}"
        blocks += (replace(block, weight=weight) for block in found.blocks)
        notes += (f"{task}: {note}" for note in found.notes)
    return Matched(tuple(blocks), tuple(notes))


def _weights(scores: Array, means: Array, tasks: Sequence[TaskResult]) -> list[float] | None:
    """What a point of each task is worth in the group's score, by what reproduces it. `scores` [runs], `means` [tasks,
    runs]. Groups are means over their questions, over their tasks, or over their tasks with guessing taken off."""
    sizes = np.array([task.n for task in tasks], dtype=float)
    guessed = np.array([task.baseline or 0.0 for task in tasks])
    above = 1 / (len(tasks) * (1 - np.minimum(guessed, 0.999)))
    for weights, offset in ((sizes / sizes.sum(), 0.0), (np.full(len(tasks), 1 / len(tasks)), 0.0), (above, guessed)):
        if np.allclose(weights @ (means - np.reshape(offset, (-1, 1))), scores, rtol=0, atol=1e-6):
            return list(map(float, weights))
    return None


def _asked(entry: Entry) -> dict[str, Any]:
    settings = {key: value for key, value in entry.result.settings.items() if key not in _NO_MATTER}
    metric = f"{entry.metric.name} ({entry.metric.filter})"
    return {"version": entry.result.version, "harness": entry.result.harness, "metric": metric, **settings}


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _scores(entry: Entry) -> _Scores | str:
    """Question → score, in the order of the task; or why there is none. A question that stands twice is told apart by
    which of them it is."""
    items = [item for item in read_items(entry.member.evaluation, entry.result) if item.filter == entry.metric.filter]  # type: ignore[arg-type]
    values = list(_values(items, entry.metric))
    if len(values) != len(items) or not items:
        return "its score is not kept question by question"
    if not math.isclose(sum(values) / len(values), entry.metric.value, rel_tol=1e-6, abs_tol=1e-6):
        return f"{entry.metric.name} is no mean over its questions"
    seen: Counter[str] = Counter()
    scores: _Scores = {}
    for item, value in zip(items, values, strict=True):
        scores[item.doc, seen[item.doc]] = value
        seen[item.doc] += 1
    return scores


def _values(items: Sequence[Item], metric: Metric) -> Iterator[float]:
    """The score of each question. Bits per byte are one ratio over all texts: of each text it is the part by which
    it moves that ratio, so that their mean is the ratio and their spread is the ratio's."""
    if all(metric.name in item.metrics for item in items):
        yield from (item.metrics[metric.name] for item in items)
        return
    pairs = [item.extra.get(metric.name) for item in items]
    if metric.name != _BITS_PER_BYTE or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return
    bits = np.array([-pair[0] / math.log(2) for pair in pairs if pair is not None])
    size = np.array([pair[1] for pair in pairs if pair is not None], dtype=float)
    ratio = bits.sum() / size.sum()
    yield from map(float, ratio + (bits - ratio * size) / size.mean())
