"""In which way a task was asked, so that only what was asked alike stands in one row or on one line.

A score with five examples before each question, or of the first hundred questions, is another than that of the whole
task without any, though both carry its name. The trap is a group: of its settings only those are kept in which all its
members agree, and where their limits differ (of a member with fewer questions than the limit there is none) the
number of questions says it instead.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from cheaptrain.durable import fingerprint
from cheaptrain.evaluate.results import Evaluation, TaskResult


@dataclass(frozen=True)
class Way:
    """How one was asked. `shots`: None where members of a group differ. `limit`: None for all questions. `mixed`: the
    number of questions of a group whose members differ in their limits. `content`: hash of task file and questions."""

    version: str
    shots: int | None
    limit: int | None
    mixed: int | None
    chat_template: bool | None
    system: str | None
    content: str | None

    @property
    def limited(self) -> str | None:
        """Which questions were asked, in words; None for all."""
        if self.mixed is not None:
            return f"{self.mixed:,}, limits differ"
        return None if self.limit is None else f"first {self.limit:,}"

    def told(self, ways: Collection["Way"], *, columns: bool = False) -> str:
        """In words, telling it from the others of `ways`; with `columns` without shots and limit, which stand beside.
        Empty for a task that was asked in full and of which nothing else is to be said."""
        parts = []
        if not columns:
            parts += [] if self.shots is None else [f"{self.shots}-shot"]
            parts += (
                [] if self.limited is None else [f"{self.limited} questions" if self.mixed is None else self.limited]
            )
        parts += ["in the chat template"] if self.chat_template else []
        if self.system:
            several = len({way.system for way in ways} - {None}) > 1
            parts.append(
                f"with system prompt {fingerprint({'': self.system})[:8]}" if several else "with system prompt"
            )
        if len({way.version for way in ways}) > 1:
            parts.append(f"version {self.version}")
        if len({way.content for way in ways}) > 1:
            parts.append(f"content {self.content[:8] if self.content else 'not known'}")
        return ", ".join(parts)


def way_of(result: TaskResult) -> Way:
    """The way in which a task was asked."""
    settings = result.settings
    differ = bool(result.members) and "limit" not in settings
    return Way(
        version=result.version,
        shots=settings.get("shots"),
        limit=settings.get("limit"),
        mixed=result.n if differ else None,
        chat_template=settings.get("chat_template"),
        system=settings.get("system"),
        content=settings.get("content"),
    )


def newest_by_way(evaluation: Evaluation) -> dict[tuple[str, Way], TaskResult]:
    """The last result of each task and way; those without a score, or only there to be read, left out."""
    results = sorted(evaluation.results, key=lambda result: result.when)
    return {(result.task, way_of(result)): result for result in results if result.metrics and not result.shown}


def by_task(results: Iterable[TaskResult]) -> dict[str, list[Way]]:
    """Every way that each task was asked in, that with most questions and then the newest first. Tasks in order:
    groups, then tasks that are in none, then members of groups."""
    found: dict[str, dict[Way, tuple[int, str]]] = {}
    groups, members = set[str](), set[str]()
    for result in results:
        ways, way = found.setdefault(result.task, {}), way_of(result)
        ways[way] = max(ways.get(way, (0, "")), (result.n, result.when))
        members.update(result.members)
        groups.update([result.task] if result.members else [])
    tasks = sorted(found, key=lambda task: (task in members, task not in groups, task))
    return {task: sorted(found[task], key=lambda way: found[task][way], reverse=True) for task in tasks}
