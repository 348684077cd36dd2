"""Answers on the terminal while they come: one as running text, two as columns.

Two columns are redrawn as a whole and may be taller than the terminal, so while they come only their top is shown,
and in the end they are printed in full, once.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cheaptrain.talk.session import Reply, Session
from cheaptrain.talk.visible import visible


def ask_shown(session: Session, question: str, console: Console) -> None:
    """Put `question` to all sides of `session` and print what they say and how each answer ended."""
    if len(session.sides) == 1:
        _ask_one(session, question, console)
    else:
        _ask_beside(session, question, console)


def _ask_one(session: Session, question: str, console: Console) -> None:
    shown = 0

    def show(replies: Sequence[Reply]) -> None:
        nonlocal shown
        said = replies[0].said
        # Not by way of rich: it lays out each piece as if it stood at the beginning of a line (tabs, for one).
        console.file.write(visible(said[shown:]))
        console.file.flush()
        shown = len(said)

    reply = session.ask(question, show)[0]
    if reply.said and not reply.said.endswith("\n"):
        console.print()
    console.print(_note(reply), soft_wrap=True)


def _ask_beside(session: Session, question: str, console: Console) -> None:
    def draw(replies: Sequence[Reply]) -> Table:
        table = Table(expand=True, padding=(0, 1))
        for reply in replies:
            table.add_column(Text(visible(reply.talker.name)), ratio=1, overflow="fold")
        table.add_row(*(Text(visible(reply.said)) for reply in replies))
        table.add_section()
        table.add_row(*(_note(reply) for reply in replies))
        return table

    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as live:
            replies = session.ask(question, lambda replies: live.update(draw(replies), refresh=True))
    else:
        replies = session.ask(question, lambda _: None)
    console.print(draw(replies))


def _note(reply: Reply) -> Text:
    return Text(visible(reply.note()), style="red" if reply.error else "dim")
