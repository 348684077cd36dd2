"""What preparing shows: a bar a source on a terminal, a plain line now and then elsewhere, and a table at the end."""

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cheaptrain.data.manifest import Manifest
from cheaptrain.data.work import Work
from cheaptrain.data.worker import Task
from cheaptrain.say import say
from cheaptrain.units import human

_TICK_SECONDS = 0.2
_LINE_SECONDS = 10.0
_WIDTH = 120  # of the table in a file or a pipe


class PrepareProgress:
    """Progress by expected bytes of text, corrected as units finish."""

    def __init__(self, works: Sequence[Work], console: Console) -> None:
        self._console = console
        self._started = self._last_line = self._last_tick = time.monotonic()
        self._tokens = 0
        self._total: dict[str, int] = {}
        self._finished: dict[str, int] = {}  # expected bytes of finished units
        self._under_way: dict[tuple[str, int], int] = {}
        for work in works:
            name, units = work.job.source.name, work.plan.units
            self._total[name] = max(1, sum(unit.text_bytes for unit in units))
            self._finished[name] = sum(unit.text_bytes for unit in units if unit.index in work.records)
        columns = (
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bars = {
            name: self._progress.add_task(name, total=total, completed=self._of(name), speed="")
            for name, total in self._total.items()
        }

    def __enter__(self) -> "PrepareProgress":
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, task: Task, text_bytes: int, tokens: int) -> None:
        """A worker encoded so much of its unit."""
        key = (task.job.source.name, task.unit.index)
        self._under_way[key] = min(task.unit.text_bytes, self._under_way.get(key, 0) + text_bytes)
        self._tokens += tokens

    def finished(self, task: Task) -> None:
        """A unit is done, whatever its size was thought to be."""
        self._under_way.pop((task.job.source.name, task.unit.index), None)
        self._finished[task.job.source.name] += task.unit.text_bytes

    def tick(self) -> None:
        """Show the state: the bars, or a line when the last one is some time ago."""
        now = time.monotonic()
        if now - self._last_tick < _TICK_SECONDS:
            return
        self._last_tick = now
        speed = f"{human(self._tokens / max(now - self._started, 1e-9))} tokens/s"
        if self._console.is_terminal:
            for name, bar in self._bars.items():
                self._progress.update(bar, completed=self._of(name), speed=speed)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            share = sum(map(self._of, self._total)) / sum(self._total.values())
            open_sources = [name for name in self._total if self._of(name) < self._total[name]]
            say(
                self._console,
                f"preparing: {share:.0%}, {human(self._tokens)} tokens, {speed}, at {', '.join(open_sources[:3])}",
            )

    def _of(self, name: str) -> int:
        under_way = sum(done for (source, _), done in self._under_way.items() if source == name)
        return min(self._total[name], self._finished[name] + under_way)


def print_table(console: Console, works: Sequence[Work], manifests: Mapping[str, Manifest], seconds: float) -> None:
    """What there is now, a source a line, and where."""
    table = Table(
        title=f"prepared in {seconds:.1f} s", title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False
    )
    table.add_column("source")
    for column in ("documents", "tokens", "bytes/token", "held out", "dropped", "skipped", "shards", "CPU s"):
        table.add_column(column, justify="right")
    for work in works:
        name = work.job.source.name
        manifest = manifests.get(name)
        if manifest is None:
            table.add_row(name, *["..."] * 6, f"{len(work.records)}", f"{work.cpu_seconds:.1f}")
            continue
        train, val = manifest.train, manifest.val
        table.add_row(
            name, f"{train.documents:,}", f"{train.tokens:,}", f"{train.bytes / max(1, train.tokens):.2f}",
            f"{val.documents:,}", f"{manifest.dropped:,}", f"{manifest.skipped:,}", f"{len(manifest.units):,}",
            f"{work.cpu_seconds:.1f}" if work.redone else "before",
        )  # fmt: skip
    if console.is_terminal:
        console.print(table)
    else:  # rich takes a file for 80 columns wide and cuts the numbers
        wide = Console(file=io.StringIO(), width=_WIDTH)
        wide.print(table)
        lines = wide.file.getvalue().splitlines()  # type: ignore[attr-defined]
        say(console, "\n".join(line.rstrip() for line in lines))
    for work in works:
        name = work.job.source.name
        say(console, f"{name}: {work.directory}")
        if name in manifests and (chat := manifests[name].chat) is not None:
            say(console, f"{name}: {_chat_counts(manifests[name], chat)}")
        for line in _rewritten(manifests[name]) if name in manifests else ():
            say(console, f"{name}: {line}")
        if name in manifests and not manifests[name].val.documents and work.job.validation > 0:
            say(console, f"{name}: no document is held out, so there is no validation on it")
        unended = sum(unit.get("unended", 0) for unit in manifests[name].units) if name in manifests else 0
        if unended:
            say(console, f"{name}: {unended:,} documents do not end with end-of-text")


def _rewritten(manifest: Manifest) -> Iterator[str]:
    """What the rules of [[data.transform]] did, and where an added token stood in the text anyway."""
    rules = manifest.transform or {}
    for rule, found in rules.items():
        if found["matches"]:
            yield (
                f"rule {rule} rewrote {found['rewritten']:,} of {found['matches']:,} matches in "
                f"{found['documents']:,} documents, with {found['tokens']:,} added tokens in them"
            )
    if idle := [rule for rule, found in rules.items() if not found["matches"]]:
        yield f"no match of rule {', '.join(idle)}"
    if manifest.literal:
        yield f"{manifest.literal:,} documents hold an added token as plain text: it is read as the token there too"


def _chat_counts(manifest: Manifest, chat: Mapping[str, int]) -> str:
    """What became of the conversations of a source."""
    train, total = manifest.train, manifest.train.documents + manifest.val.documents + manifest.dropped
    share = (train.supervised or 0) / max(1, train.tokens)
    merging = (
        f"; in {chat['merging']:,} the answer's first token would merge with its header" if chat["merging"] else ""
    )
    return (
        f"{total:,} conversations: {chat['cut']:,} lost turns to fit a row ({chat['cut'] / max(1, total):.1%}), "
        f"{manifest.dropped:,} left out because no exchange fits ({manifest.dropped / max(1, total):.1%}); the model "
        f"must produce {train.supervised:,} of {train.tokens:,} tokens ({share:.1%}){merging}"
    )
